"""Checkpoint files that are whole or not there at all.

``save`` writes to a file beside the target, syncs it to disk and renames it: a kill or a power cut at any
moment leaves the last good checkpoint. ``.safetensors`` files hold tensors and, in their metadata, what a
state_dict has besides (the policies of coldrow's modules); anything else is written by ``torch.save``::

    coldrow.checkpoint.save(model.state_dict(), "model.safetensors")
    model.load_state_dict(coldrow.checkpoint.load("model.safetensors"))
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["load", "save"]

_PLAIN = "coldrow.plain"  # key of the metadata under which values that are no tensors are kept


def save(state_dict: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state_dict to a file, all of it or nothing.

    Args:
        state_dict: tensors by name; other values are plain (dict, list, str, number, None). In a file
            that is not ``.safetensors``: whatever ``torch.save`` takes.
        path: a file is replaced; its folder must exist.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.
        TypeError: a value that a ``.safetensors`` file cannot hold.
    """
    path = os.path.abspath(path)
    folder, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".part", dir=folder)
    try:
        os.close(handle)
        if path.endswith(".safetensors"):
            _write_safetensors(state_dict, temporary)
        else:
            with open(temporary, "wb") as file:  # of ours, so that its errors can be told
                torch.save(dict(state_dict), file)
        os.chmod(temporary, _mode_of(path))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        number = _system_error(error)
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(number, os.strerror(number), path) from error
    entry = os.open(folder, os.O_RDONLY)  # the rename itself
    try:
        os.fsync(entry)
    finally:
        os.close(entry)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state_dict in a file that :func:`save` wrote, its tensors on the CPU.

    No code in the file is run.

    Raises:
        OSError: the file cannot be read.
    """
    if not str(path).endswith(".safetensors"):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        plain = (file.metadata() or {}).get(_PLAIN, "{}")
    return {**state, **json.loads(plain)}


def _write_safetensors(state_dict: Mapping[str, Any], path: str) -> None:
    from safetensors.torch import save_file

    tensors, plain = {}, {}
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            tensors[key] = value.detach().contiguous()
        else:
            plain[key] = value
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"state_dict: {error}, accepted in a .safetensors file: tensors and plain values"
        ) from None
    save_file(tensors, path, {_PLAIN: text})


def _system_error(error: BaseException | None) -> int | None:
    """Return the error number behind what torch or safetensors raised, if the system refused to write."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        if told := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors is written in Rust
            return int(told[1])
        error = error.__context__
    return None


def _mode_of(path: str) -> int:
    """Return the permissions of the file that is replaced, or those of a new one."""
    try:
        return os.stat(path).st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
