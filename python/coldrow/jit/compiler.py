"""From C++ source to a loaded library.

A build is known by what decides its code: the source as the preprocessor leaves it (all that it
includes, coldrow's headers among it, and whatever the environment says of where to look), the compiler and the
flags (the instruction set among them, so that machines of different kinds may share a home). It is the
preprocessed source that is compiled. Builds are kept in :mod:`coldrow.jit.cache`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldrow import _core, _paths
from coldrow._version import __version__
from coldrow.jit import cache

# What coldrow::strict says (CMakeLists.txt): the flags under which every build gives the same bits.
STRICT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

#: The name of the wrapper in the compiler's messages.
WRAPPER = "coldrow_wrapper.cpp"

# Where the compiler finds its own parts, and what it may be told besides.
_ENVIRONMENT = ("GCC_EXEC_PREFIX", "COMPILER_PATH", "LIBRARY_PATH", "CCC_OVERRIDE_OPTIONS")
# Where headers are looked for.
_SEARCHED = ("CPATH", "CPLUS_INCLUDE_PATH", "C_INCLUDE_PATH")


class CompileError(RuntimeError):
    """The compiler refused a policy's source; the message is the compiler's."""


class MissingFieldsError(CompileError):
    """A struct has fields without a default that were not given: :attr:`names`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


@dataclass(frozen=True)
class Compiled:
    """A library and what it was made of.

    Args:
        identity: of what decides its code.
        included: of the files that the source includes besides the compiler's and coldrow's, "" if none.
        library: loaded, for as long as the process runs.
    """

    identity: str
    included: str
    library: ctypes.CDLL


# What this process has loaded, by identity. (Nothing is ever unloaded: pointers to it may be anywhere.)
_loaded: dict[str, ctypes.CDLL] = {}


def forget() -> None:
    """Look at the cache again for what is loaded already."""
    _loaded.clear()
    _remembered.cache_clear()


def _off() -> bool:
    return os.environ.get("COLDROW_JIT", "on").lower() in ("0", "off", "no", "false")


def _compiler(given: str | None) -> tuple[tuple[str, ...], str]:
    """Return the compiler's command and what identifies it (its version is in what it preprocesses)."""
    if given:
        command = tuple(shlex.split(given)) or (given,)
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
    path = os.path.abspath(path)
    real = os.path.realpath(path)
    info = os.stat(real)
    environment = [os.environ.get(name) for name in _ENVIRONMENT]
    # (The name counts too: some programs do what the name they are called by says.)
    identity = f"{path} {real} {info.st_size} {info.st_mtime_ns} {command[1:]} {environment}"
    return (path, *command[1:]), identity


def _instruction_set() -> tuple[str, ...]:
    build = _core.build()  # the kernels in use: x86_64_v2, _v3, _v4 or generic
    if not build.startswith("x86_64"):
        return ()
    wide = ("-mprefer-vector-width=512",) if build.endswith("v4") else ()
    return (f"-march={build.replace('_', '-')}", *wide)


def _flags() -> list[str]:
    return [
        "-std=c++20",
        "-O3",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",  # two policies of one name must not meet
        *STRICT,
        *_instruction_set(),
        "-Wmissing-field-initializers",  # a field that was not given would be zero
    ]


def library(
    wrapper: str, source: str, file: str, path: str | None, given: Collection[str] = ()
) -> Compiled:
    """Compile (or find compiled) and load a library.

    Args:
        wrapper: C++ that includes ``file``.
        source: the user's code, the contents of ``file``.
        file: a file name without folders.
        path: where ``source`` was read from, if it was: what it includes is looked for there.
        given: fields that may be without a default.

    Raises:
        CompileError: with the compiler's message.
        MissingFieldsError: g++ warns of others in the wrapper.
        OSError: the cache cannot be used; PermissionError: others could put code into it.
        RuntimeError: if compiling is turned off, or there is no compiler.
    """
    if _off():
        raise RuntimeError("COLDROW_JIT: is off, so no policy can be compiled or loaded")
    command, compiler = _compiler(os.environ.get("CXX"))
    make = _Make(wrapper, source, file, path, tuple(given), command, compiler, tuple(_flags()))
    kept = cache.folder()
    if "#" in source or "%:" in source:  # it may include what changes
        return make.run(kept)
    paths = tuple(os.environ.get(name) for name in _SEARCHED)
    return _remembered(make, paths, kept)


@dataclass(frozen=True)
class _Make:
    """All that is known of a build before the preprocessor has run."""

    wrapper: str
    source: str
    file: str
    path: str | None
    given: tuple[str, ...]
    command: tuple[str, ...]
    compiler: str
    flags: tuple[str, ...]

    def run(self, kept: Path) -> Compiled:
        """Preprocess; find the library, or build it; load it."""
        with cache.workplace(kept, f"{self.wrapper}\0{self.source}\0{self.path}") as work:
            placed = _placed(self.source, self.path)
            for name, text in ((WRAPPER, self.wrapper), (self.file, placed)):
                (work / name).write_text(text, encoding="utf-8", errors="surrogateescape")
            beside = [f"-iquote{os.path.dirname(self.path)}"] if self.path else []
            flags = [flag for flag in self.flags if flag != "-shared"]  # clang++ warns of it here
            options = [*flags, *beside, f"-isystem{_paths.includes()}"]
            preprocess = [*self.command, *options, "-E", WRAPPER]
            run = _run(preprocess, work)
            if run.returncode != 0:
                raise CompileError(_message(run))
            key = "\0".join((__version__, self.compiler, *self.flags))
            digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16)
            digest.update(b"\0" + run.stdout)
            identity = digest.hexdigest()
            if identity not in _loaded:
                found = cache.find(kept, identity)
                if found is None:
                    cache.require_writable(kept)
                    compile = [*self.command, *self.flags]
                    built = _build(compile, preprocess, run.stdout, work, self.given)
                    cache.keep(kept, identity, work, built)
                    found = cache.find(kept, identity)
                if found is None:
                    raise RuntimeError(f"{kept / identity}: changed while it was being built")
                _loaded[identity] = ctypes.CDLL(str(found))
            included = _included(run.stdout, work, (WRAPPER, self.file, self.path))
            return Compiled(identity, included, _loaded[identity])


@functools.lru_cache(maxsize=256)
def _remembered(make: _Make, paths: tuple[str | None, ...], kept: Path) -> Compiled:
    """What a source without directives is made into is looked up once: nothing else can change it here."""
    return make.run(kept)


def _run(command: Sequence[str], work: Path) -> subprocess.CompletedProcess[bytes]:
    # (The time of day is no part of a policy: __TIME__ would be another source each time.)
    environment = {"SOURCE_DATE_EPOCH": "0", **os.environ, "LC_ALL": "C"}
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, check=False)


def _message(run: subprocess.CompletedProcess[bytes]) -> str:
    text = run.stderr.decode(errors="replace").strip()
    return text or f"{run.args[0]} failed without a message (status {run.returncode})"


def _placed(source: str, path: str | None) -> str:
    """Return the source so that messages name the header it was read from."""
    if path is None:
        return source
    quoted = path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\012")
    return f'#line 1 "{quoted}"\n{source}'


def _build(
    command: list[str], preprocess: list[str], text: bytes, work: Path, given: Collection[str]
) -> Path:
    (work / "policy.ii").write_bytes(text)
    run = _run([*command, "policy.ii", "-opolicy.so"], work)
    if run.returncode != 0:
        # Of the source as it was written: the compiler then quotes lines and counts columns as they are.
        plain = _run([*(x for x in preprocess if x != "-E"), "-fsyntax-only"], work)
        raise CompileError(_message(plain if plain.returncode != 0 else run))
    warned = _missing(run.stderr.decode(errors="replace"))
    if missing := [name for name in warned if name not in given]:
        raise MissingFieldsError(missing)
    return work / "policy.so"


def _missing(warnings: str) -> list[str]:
    warnings = warnings.replace("\u2018", "'").replace("\u2019", "'")
    warned = rf"^{re.escape(WRAPPER)}:\d+:\d+: warning: missing initializer for member '([^']*)'"
    names = [name.rpartition("::")[2] for name in re.findall(warned, warnings, re.MULTILINE)]
    return list(dict.fromkeys(names))


_MARKER = re.compile(rb'^# \d+ "((?:[^"\\]|\\.)*)"((?: \d)*)\r?$', re.MULTILINE)


def _included(text: bytes, work: Path, own: Sequence[str | None]) -> str:
    """Return a digest of the files that the source includes, but those of the system and coldrow's."""
    digest, seen = hashlib.blake2b(digest_size=16), set()
    for name in _files(text):
        if name not in seen and not name.startswith("<") and name not in own:
            seen.add(name)
            try:
                contents = (work / name).read_bytes()
            except OSError:
                continue
            digest.update(hashlib.blake2b(contents).digest())
    return digest.hexdigest() if seen else ""


def _files(text: bytes) -> Iterator[str]:
    for name, flags in _MARKER.findall(text):
        if b"3" not in flags.split():  # of the system, as -isystem folders are
            unquoted = re.sub(rb"\\([0-7]{3}|.)", _unquoted, name)
            yield os.fsdecode(unquoted)


def _unquoted(match: re.Match[bytes]) -> bytes:
    what = match[1]
    return bytes([int(what, 8) & 255]) if len(what) == 3 else what
