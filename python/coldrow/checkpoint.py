"""Checkpoint files that are whole or not there at all, and that say so when they were damaged.

``save`` writes to a file beside the target, syncs it to disk and renames it: a kill or a power cut at any
moment leaves the last good checkpoint. ``.safetensors`` files hold tensors and, in their metadata, what a
state_dict has besides (the policies of coldrow's modules); anything else is written by ``torch.save``::

    coldrow.checkpoint.save(model.state_dict(), "model.safetensors")
    model.load_state_dict(coldrow.checkpoint.load("model.safetensors"))

Both kinds carry a digest of all their bytes, which ``load`` compares, and both are still files that
``torch.load`` and safetensors read (neither looks at the digest): it is the comment of the zip archive that
``torch.save`` writes, and an entry of the metadata of ``.safetensors``. Files without one (of coldrow 0.1.0, of
``torch.save``, of safetensors itself) are loaded and cannot be verified.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from coldrow import _digest
from coldrow._version import __version__

__all__ = ["CheckpointError", "load", "save"]

# Keys of a .safetensors file's metadata.
_OURS = "coldrow."
_PLAIN = "coldrow.plain"  # values that are no tensors
_DIGEST = "coldrow.digest"
_VERSION = "coldrow.version"  # beside the digest: a file with either must have it

_FORM = "1:"  # of the digest: how it is made (_digest.py)
_IN_METADATA = re.compile(rb'"coldrow\.digest"\s*:\s*"1:([0-9a-f]{%d})"' % _digest.DIGITS)

# The end of a zip archive: 22 bytes that end with the length of a comment, then the comment.
_ZIP, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"
_ZIP_END_SIZE = 22
_COMMENT = f"{_DIGEST}:{_FORM}".encode()
_COMMENT_SIZE = len(_COMMENT) + _digest.DIGITS


class CheckpointError(ValueError):
    """A file is no checkpoint, or one that was damaged; the message names it and says what is wrong."""


def save(state_dict: Mapping[str, Any], path: str | bytes | os.PathLike[Any]) -> None:
    """Write a state_dict to a file, all of it or nothing, with a digest.

    Args:
        state_dict: tensors by name; other values are plain: what JSON gives back as it was (dict with str
            keys, list, str, number, bool, None). In a file that is not ``.safetensors``: whatever
            ``torch.save`` takes. Tensors that share memory (one module under two names) are written each.
        path: a file is replaced and keeps its permissions; a link stays and the file it leads to is replaced;
            its folder must exist.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
        TypeError: a value that a ``.safetensors`` file cannot hold, or no state_dict.
        ValueError: the path is not one of a file.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: got {type(state_dict).__name__}, accepted: a dict of tensors by name"
        )
    given = _checked(path)
    target = os.path.realpath(given)  # (through a link, so that it stays one)
    folder, name = os.path.split(target)
    before = _replaced(given, target)
    tensors = _tensors_and_plain(state_dict) if given.endswith(".safetensors") else None
    try:
        with _workplace(folder, name) as temporary:
            mode = _new_file(temporary, before)
            if tensors is not None:
                _write_safetensors(*tensors, temporary)
            else:
                # (A Python file of our own, so that its errors can be told.)
                with open(temporary, "wb") as file:
                    torch.save({key: _packed(value) for key, value in state_dict.items()}, file)
            with open(temporary, "rb+") as file:
                _add_digest(file.fileno(), tensors is not None)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_folder(folder)
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), given) from error


def load(path: str | bytes | os.PathLike[Any], *, verify: bool = True) -> dict[str, Any]:
    """Return the state_dict in a file that :func:`save` wrote, its tensors on the CPU.

    No code in the file is run.

    Args:
        path: a file of :func:`save`, or one of ``torch.save`` or safetensors (``.safetensors``).
        verify: compare the file's digest, for which all of it is read. A file without one is loaded as it
            is: nobody can say whether it is what was written.

    Raises:
        CheckpointError: the file was damaged, or is no checkpoint.
        OSError: the file cannot be read.
    """
    given = _checked(path)
    if not stat.S_ISREG(os.stat(given).st_mode):
        raise _not_a_file(given)
    with open(given, "rb") as file:
        safetensors = given.endswith(".safetensors")
        find = _place_in_safetensors if safetensors else _place_in_zip
        try:
            place = find(file.fileno()) if verify else None
            if place is not None:
                written = _digest.read(file.fileno(), place, _digest.DIGITS).decode("ascii")
                if written != _digest.of_file(file.fileno(), place):
                    raise _Damaged("its digest is another one than when it was written")
            return (
                _read_safetensors(_name_of(file.fileno(), given))
                if safetensors
                else _read_zip(file)
            )
        except _Damaged as error:
            raise CheckpointError(f"{given}: is damaged: {error}") from None
        except (MemoryError, ImportError):
            raise
        except OSError as error:  # torch and safetensors tell so of what they cannot read, too
            if error.errno not in (None, errno.EINVAL):
                raise
            raise _unreadable(given, error, place is not None) from error
        except Exception as error:
            raise _unreadable(given, error, place is not None) from error


# ------------------------------------------------------------------------------------------- the file


def _checked(path: Any) -> str:
    """Return the absolute path of a file's name."""
    accepted = "accepted: the name of a file (str, bytes or os.PathLike)"
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: got {path!r}, {accepted}") from None
    if not name or "\0" in name:
        raise ValueError(f"path: got {path!r}, {accepted}")
    return os.path.abspath(name)


def _not_a_file(path: str) -> Exception:
    if os.path.isdir(path):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return ValueError(f"path: got {path!r}, which is no regular file (a pipe, a device), accepted: "
                      "a regular file, or a name that is free to make one")  # fmt: skip


def _replaced(given: str, target: str) -> os.stat_result | None:
    """Return what is known of the file that will be replaced, if there is one."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), given) from None
    if not stat.S_ISREG(found.st_mode):
        raise _not_a_file(given)
    return found


@contextlib.contextmanager
def _workplace(folder: str, name: str) -> Iterator[str]:
    """Make a hidden folder beside the target; yield the name of a file in it. It goes away again.

    It is locked while it is in use, so that what a killed process left can be told and removed.
    """
    # (A name of its own length: that of the target may be as long as names can be.)
    mine = f".coldrow-{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}-"
    _remove_left(folder, mine)
    while True:
        made = os.path.join(folder, f"{mine}{secrets.token_hex(4)}.part")
        os.mkdir(made, 0o700)
        # (Another process may take it, not yet locked, for one that was left.)
        with contextlib.suppress(FileNotFoundError):
            lock = _lock(made)
            if os.path.exists(made):
                break
            os.close(lock)
    try:
        yield os.path.join(made, "file")
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)


def _lock(folder: str, wait: int = 0) -> int:
    """Open a folder and lock it. (On a file system without locks, nothing that was left is removed.)"""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | wait)
    except OSError:
        if wait:
            os.close(opened)
            raise
    return opened


def _remove_left(folder: str, prefix: str) -> None:
    """Remove what killed processes left of earlier saves of one file."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(prefix):
                with contextlib.suppress(OSError):
                    lock = _lock(entry.path, fcntl.LOCK_NB)
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)


def _new_file(path: str, before: os.stat_result | None) -> int:
    """Make a file and return the permissions that it is to have in the end."""
    # Those of a new one are the system's to say: asking for the umask changes it for other threads.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return (os.fstat(file) if before is None else before).st_mode & 0o777
    finally:
        os.close(file)


def _sync_folder(folder: str) -> None:
    """Sync the rename itself."""
    try:
        entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # one that may be written to and not be listed
        os.sync()
        return
    try:
        os.fsync(entry)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such sync
            raise
    finally:
        os.close(entry)


def _system_error(error: BaseException | None) -> int | None:
    """Return the error number behind what torch or safetensors raised, if the system refused to write."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors is written in Rust
            return int(told[1])
        error = error.__context__
    return None


# --------------------------------------------------------------------------------- what is in the file


class _Damaged(Exception):
    pass


def _unreadable(path: str, error: Exception, verified: bool) -> CheckpointError:
    what = (
        "cannot be read, though its digest is right" if verified else "is no checkpoint, or damaged"
    )
    return CheckpointError(f"{path}: {what} ({type(error).__name__}: {str(error).strip()})")


def _add_digest(file: int, safetensors: bool) -> None:
    """Put the digest into a file that torch.save or safetensors wrote."""
    if not safetensors:  # into a comment of the archive
        size = os.fstat(file).st_size
        os.pwrite(file, struct.pack("<H", _COMMENT_SIZE), size - 2)
        os.pwrite(file, _COMMENT + _digest.NOT_YET.encode(), size)
    place = _place_in_safetensors(file) if safetensors else _place_in_zip(file)
    if place is None:
        raise RuntimeError("path: the file has no place for a digest where one was expected")
    os.pwrite(file, _digest.of_file(file, place).encode(), place)


def _place_in_zip(file: int) -> int | None:
    """Return where the digest of what torch.save wrote is, or None where there is none."""
    size = os.fstat(file).st_size
    place = size - _digest.DIGITS
    tail = max(0, size - _ZIP_END_SIZE - _COMMENT_SIZE)
    end = _digest.read(file, tail, size - tail)
    has_comment = end[-_COMMENT_SIZE:].startswith(_COMMENT)
    announced = end.startswith(_ZIP_END + bytes(4)) and end[20:22] == struct.pack(
        "<H", _COMMENT_SIZE
    )
    if has_comment or announced:
        return place
    # torch.save leaves the comment empty: any other end was cut off, or damaged where ours was.
    empty = end[-_ZIP_END_SIZE:]
    if _digest.read(file, 0, len(_ZIP)) == _ZIP and not (
        empty.startswith(_ZIP_END) and empty.endswith(b"\0\0")
    ):
        raise _Damaged("the end of the archive is missing")
    return None


def _packed(value: Any) -> Any:
    """Return a tensor without the gaps between its elements, with which torch.save would write it."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return value
    return value if value.is_contiguous() else value.detach().contiguous()


def _read_zip(file: Any) -> dict[str, Any]:
    state: Any = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}, accepted: a dict")
    return state


def _place_in_safetensors(file: int) -> int | None:
    """Return where the digest of a .safetensors file is, or None where there is none."""
    length = int.from_bytes(_digest.read(file, 0, 8), "little")
    if length > os.fstat(file).st_size - 8:
        raise _Damaged("its header is incomplete")
    header = _digest.read(file, 8, length)
    found = [*_IN_METADATA.finditer(header)]
    if len(found) == 1:
        return 8 + found[0].start(1)
    try:
        metadata = json.loads(header).get("__metadata__") or {}
        foreign = [key for key in metadata if key.startswith(_OURS) and key != _PLAIN]
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise _Damaged("its header cannot be read") from None
    if foreign:
        raise _Damaged("its digest cannot be read")
    return None


def _name_of(file: int, path: str) -> str:
    """Return a name of an open file that every library takes: of this file, whatever replaces it meanwhile."""
    name = f"/proc/self/fd/{file}"
    return name if os.path.exists(name) else path


def _read_safetensors(path: str) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        plain = (file.metadata() or {}).get(_PLAIN, "{}")
    return {**state, **json.loads(plain)}


def _tensors_and_plain(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Return what a .safetensors file is made of, or refuse it."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    memory = set()
    for key, value in state_dict.items():
        if not isinstance(key, str) or key == "__metadata__" or not _encodable(key):
            raise TypeError(
                f"state_dict: got the key {key!r}, accepted in a .safetensors file: a str other than "
                "'__metadata__', without lone surrogates"
            )
        if not isinstance(value, Tensor):
            plain[key] = value
            continue
        if value.layout != torch.strided or value.is_nested or value.device.type == "meta" or (
            type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
        ):  # fmt: skip
            raise TypeError(
                f"state_dict[{key!r}]: got a {type(value).__name__} of layout {value.layout} on "
                f"{value.device.type!r}, accepted in a .safetensors file: dense tensors with memory"
            )
        tensor = value.detach().resolve_conj().resolve_neg().contiguous()
        if tensor.untyped_storage().data_ptr() in memory:  # the library takes no two in one memory
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    try:
        text = json.dumps(plain, allow_nan=False)
        if json.loads(text) != plain:
            raise TypeError("tuples and keys that are no str come back as others")
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"state_dict: {error}, accepted in a .safetensors file: tensors and plain values"
        ) from None
    return tensors, text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_safetensors(tensors: dict[str, Tensor], plain: str, path: str) -> None:
    from safetensors.torch import save_file

    metadata = {_PLAIN: plain, _VERSION: __version__, _DIGEST: _FORM + _digest.NOT_YET}
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:  # (The library writes another file beside it and renames that.)
        there = os.path.join(_name_of(folder, os.path.dirname(path)), os.path.basename(path))
        save_file(tensors, there, metadata)
    except Exception as error:
        if _system_error(error) is not None:
            raise
        raise TypeError(
            f"state_dict: {error}, accepted in a .safetensors file: tensors of its dtypes"
        ) from error
    finally:
        os.close(folder)
