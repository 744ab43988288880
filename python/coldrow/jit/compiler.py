"""From C++ source to a loaded library: flags, cache, lock.

A build is a folder of the cache named by a hash of all that could change it: source, the wrapper around
it, coldrow's headers, the compiler and the flags (the instruction set among them, so that machines of
different kinds may share a home). It appears at once, by a rename, when it is complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from coldrow import _core, _paths
from coldrow._version import __version__

# What coldrow::strict says (CMakeLists.txt): the flags under which every build gives the same bits.
STRICT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


class CompileError(RuntimeError):
    """The compiler refused a policy's source; the message is the compiler's."""


def _off() -> bool:
    return os.environ.get("COLDROW_JIT", "on").lower() in ("0", "off", "no", "false")


def cache_dir() -> Path:
    """Return the folder of compiled policies, made if need be."""
    given = os.environ.get("COLDROW_JIT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    where = Path(given) if given else Path(home) / "coldrow" / "jit"
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OSError(
            f"COLDROW_JIT_CACHE: cannot make {str(where)!r} ({error.strerror}), accepted: a folder "
            "that can be written to"
        ) from None
    info = where.stat()
    if info.st_uid != os.geteuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"COLDROW_JIT_CACHE: {str(where)!r} can be written by others, whose code would be run, "
            "accepted: a folder of your own (chmod go-w)"
        )
    return where


@functools.lru_cache(maxsize=8)
def _compiler(given: str | None) -> tuple[tuple[str, ...], str]:
    """Return the compiler's command and what identifies it."""
    if given:
        command = tuple(shlex.split(given))
        path = shutil.which(command[0])
    else:
        found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
        path = next((p for p in found if p), None)
        command = (path or "",)
    if path is None:
        raise RuntimeError(
            f"CXX: got {given!r} and found no such program, accepted: a C++20 compiler (g++ 11 or "
            "later, clang++ 14 or later) as CXX, or as c++, g++ or clang++ on the PATH"
        )
    real = os.path.realpath(path)
    info = os.stat(real)
    return (path, *command[1:]), f"{real} {info.st_size} {info.st_mtime_ns} {command[1:]}"


@functools.lru_cache(maxsize=1)
def _headers() -> str:
    """Return a hash of coldrow's own headers."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=16)
    for path in sorted(_paths.includes().rglob("*.hpp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _instruction_set() -> tuple[str, ...]:
    build = _core.build()  # the kernels in use: x86_64_v2, _v3, _v4 or generic
    if not build.startswith("x86_64"):
        return ()
    wide = ("-mprefer-vector-width=512",) if build.endswith("v4") else ()
    return (f"-march={build.replace('_', '-')}", *wide)


def _flags(path: str | None) -> list[str]:
    return [
        "-std=c++20",
        "-O3",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",  # two policies of one name must not meet
        *STRICT,
        *_instruction_set(),
        "-Werror=missing-field-initializers",  # a field that was not given would be zero
        *([f"-I{os.path.dirname(path)}"] if path else []),
    ]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _library_in(folder: Path) -> Path | None:
    """Return a build's library, if it is there and what the source included is still the same."""
    try:
        record = json.loads((folder / "record.json").read_text())
        found = folder / record["library"]
        same = all(_digest(Path(path)) == digest for path, digest in record["included"].items())
        return found if same and found.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _included(folder: Path) -> dict[str, str]:
    """Return the hashes of files outside the build that the compiler's dependency list names."""
    text = (folder / "policy.d").read_text().replace("\\\n", " ")
    names = text.partition(":")[2].replace("\\ ", "\0").split()
    paths = [Path(name.replace("\0", " ")) for name in names]
    return {str(p): _digest(p) for p in paths if p.is_absolute() and p.parent != folder}


def library(wrapper: str, source: str, file: str, path: str | None) -> ctypes.CDLL:
    """Compile (or find compiled) and load a library.

    Args:
        wrapper: C++ that includes ``file``.
        source: the user's code, the contents of ``file``.
        file: a file name without folders.
        path: where ``source`` was read from, if it was: what it includes is looked for there.

    Raises:
        CompileError: with the compiler's message.
        RuntimeError: if compiling is turned off, or there is no compiler.
    """
    if _off():
        raise RuntimeError("COLDROW_JIT: is off, so no policy can be compiled or loaded")
    command, identity = _compiler(os.environ.get("CXX"))
    flags = _flags(path)
    key = "\0".join((wrapper, source, str(path), identity, *flags, _headers()))
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    cache = cache_dir()
    built = cache / name
    found = _library_in(built)
    if found is None:
        with _locked(cache / f"{name}.lock"):
            found = _library_in(built)  # somebody else's build may be there by now
            if found is None:
                files = {"coldrow_wrapper.cpp": wrapper, file: _placed(source, path)}
                _build(built, [*command, *flags], files)
                found = _library_in(built)
    if found is None:
        raise RuntimeError(f"{built}: changed while it was being built")
    return ctypes.CDLL(str(found))


def _placed(source: str, path: str | None) -> str:
    """Return the source so that messages name the header it was read from."""
    if path is None:
        return source
    quoted = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'#line 1 "{quoted}"\n{source}'


def _build(built: Path, command: Sequence[str], files: dict[str, str]) -> None:
    work = Path(tempfile.mkdtemp(prefix="building-", dir=built.parent))
    try:
        for name, text in files.items():
            (work / name).write_text(text, encoding="utf-8")
        outputs = ("-MMD", "-MFpolicy.d", "coldrow_wrapper.cpp", "-opolicy.so")
        run = subprocess.run(
            [*command, f"-isystem{_paths.includes()}", *outputs],
            cwd=work,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if run.returncode != 0:
            raise CompileError(run.stderr.strip() or f"{command[0]} failed without a message")
        # (A name of its own for each build: a library of the same path would not be loaded again.)
        library = f"policy-{_digest(work / 'policy.so')}.so"
        (work / "policy.so").rename(work / library)
        record = {"library": library, "included": _included(work)}
        (work / "record.json").write_text(json.dumps(record))
        if built.exists():  # of a source that includes what has changed
            built.rename(work / "old")
        os.rename(work, built)
        shutil.rmtree(built / "old", ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
