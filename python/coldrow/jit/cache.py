"""The folder of compiled policies, whose code is run: what is in it is looked at before it is loaded.

A build is a folder, named by what decides its code (:mod:`coldrow.jit.compiler`), with one library, named by
the digest of its bytes. It appears at once, by a rename, when it is on the disk. A library that was cut off
or changed is built again; one that another user made, or could write to, is refused.

What is under way is in one of 32 folders, each with a lock, so that what a killed process left is
removed by the next that uses the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_WORKPLACES = 32
_LIBRARY = re.compile(r"policy-([0-9a-f]{32})\.so")
_CANNOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


def folder() -> Path:
    """Return the folder of compiled policies, made if need be.

    Raises:
        OSError: it cannot be made; PermissionError: others could put code into it.
    """
    given = os.environ.get("COLDROW_JIT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    where = Path(given) if given else Path(home) / "coldrow" / "jit"
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = where.stat()
    except OSError as error:
        raise OSError(
            f"COLDROW_JIT_CACHE: cannot make {str(where)!r} ({error.strerror}), accepted: a folder "
            "that can be written to"
        ) from None
    if not _only_ours(info):
        raise PermissionError(
            f"COLDROW_JIT_CACHE: {str(where)!r} can be written by others, whose code would be run, "
            "accepted: a folder of your own (delete it and what is in it, or name another)"
        )
    return where


def _only_ours(info: os.stat_result) -> bool:
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _open_ours(name: str, flags: int, inside: int | None = None, shown: Path | None = None) -> int:
    """Open what this user alone can write to (not through a link), or refuse it."""
    opened = os.open(
        name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=inside
    )
    if _only_ours(os.fstat(opened)):
        return opened
    os.close(opened)
    raise PermissionError(
        f"COLDROW_JIT_CACHE: {str(shown or name)!r} was made by another user or can be written by others, "
        "whose code would be run, accepted: files of your own (delete the folder)"
    )


def find(cache: Path, name: str) -> Path | None:
    """Return the library of a build; None where there is none, or a damaged one.

    Raises:
        PermissionError: another user made it, or could have changed it.
    """
    built = cache / name
    with contextlib.ExitStack() as stack:
        try:
            inside = _open_ours(str(built), os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, inside)
            libraries = [file for file in os.listdir(inside) if _LIBRARY.fullmatch(file)]
            for file in libraries:
                opened = _open_ours(file, os.O_RDONLY, inside, built / file)
                stack.callback(os.close, opened)
                if len(libraries) == 1 and _digest(opened) == _LIBRARY.sub(r"\1", file):
                    return built / file
        except PermissionError:
            raise
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO):
                raise
    return None


def _digest(file: int) -> str:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    while part := os.read(file, 1 << 20):
        digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def workplace(cache: Path, what: str) -> Iterator[Path]:
    """Make an empty folder that this thread alone uses; whoever does the same waits.

    Args:
        cache: see :func:`folder`. Where it cannot be written to, the folder is among the temporary files.
        what: what will be done there, so that the same is done once.
    """
    number = hashlib.blake2b(what.encode("utf-8", "surrogatepass"), digest_size=1).digest()[0]
    shown = cache / f"lock-{number % _WORKPLACES:02}"
    try:
        lock = _open_ours(str(shown), os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE or os.access(cache, os.W_OK):
            raise
        with tempfile.TemporaryDirectory(prefix="coldrow-jit-") as made:
            yield Path(made)
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(
                error.errno,
                f"COLDROW_JIT_CACHE: cannot lock a file there ({error.strerror}), accepted: a folder on a "
                "file system that has locks",
                str(shown),
            ) from None
        work = cache / f"building-{number % _WORKPLACES:02}"
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        try:
            work.mkdir(mode=0o700)
        except FileExistsError:
            raise PermissionError(
                f"COLDROW_JIT_CACHE: {str(work)!r} cannot be removed, accepted: a folder in which all "
                "is your own"
            ) from None
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def require_writable(cache: Path) -> None:
    """Refuse a cache that nothing can be put into."""
    if not os.access(cache, os.W_OK | os.X_OK):
        raise PermissionError(
            f"COLDROW_JIT_CACHE: {str(cache)!r} cannot be written to and does not have this policy, "
            "accepted: a folder that can be written to, or one that has it"
        )


def keep(cache: Path, name: str, work: Path, library: Path) -> None:
    """Put a library, made in ``work``, into the cache; a damaged one that was there goes."""
    made = work / "build"
    made.mkdir(mode=0o700)
    with open(library, "rb") as file:
        library.chmod(0o700)
        os.fsync(file.fileno())
        library.rename(made / f"policy-{_digest(file.fileno())}.so")
    _sync(made)
    for attempt in range(2):
        try:
            os.rename(made, cache / name)
            break
        except OSError:
            if attempt:
                raise
            (cache / name).rename(work / "old")
    _sync(cache)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such sync
            raise
    finally:
        os.close(opened)
