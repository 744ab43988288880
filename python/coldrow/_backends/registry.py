"""Which backend an array or a device belongs to.

Backends stand in a dict by torch device type. One more kind of memory is one more entry, made by
:func:`register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldrow._backends import cuda
from coldrow._backends.host import HOST
from coldrow._backends.protocol import Backend, Kernels
from coldrow._checks import torch_of

#: Device types that coldrow has kernels for, whether or not this build has them.
TORCH_TYPES = ("cpu", "cuda")

_BACKENDS: dict[str, Backend] = {HOST.torch_type: HOST}


def register(backend: Backend) -> None:
    """Let a backend work on the memory of its torch device type."""
    _BACKENDS[backend.torch_type] = backend


_cuda = cuda.built()
if _cuda is not None:
    register(_cuda)


def exchange(backends: Mapping[str, Backend]) -> dict[str, Backend]:
    """Put other backends in the place of all that are registered, and return those. (For tests.)"""
    before = dict(_BACKENDS)
    _BACKENDS.clear()
    _BACKENDS.update(backends)
    return before


def accelerator() -> Backend | None:
    """Return the backend for devices that are not the processor, or None where this build has none."""
    return next((b for b in _BACKENDS.values() if b is not HOST), None)


def _available(name: str, torch_type: str, given: str) -> Backend:
    """Return the backend for a device type, or raise naming the argument that asks for it."""
    backend = _BACKENDS.get(torch_type)
    if backend is None:
        reason = "this build has no CUDA support, see coldrow.cuda.is_built()"
    elif (why := backend.unavailable()) is not None:
        reason = f"no CUDA device can be used: {why}, see coldrow.cuda.is_available()"
    else:
        return backend
    raise ValueError(f"{name}: got {given}, accepted: 'cpu' ({reason})")


def backend_of(name: str, array: Any) -> Backend:
    """Return the backend for the memory of an array, or raise naming the argument."""
    if torch_of(array) is not None:
        torch_type = array.device.type
        if torch_type not in (*_BACKENDS, *TORCH_TYPES):
            return HOST  # whose checks say what is wrong
        where = str(array.device)
    else:
        # (Only arrays know: the binding says what is wrong with anything else.)
        asked = getattr(array, "__dlpack_device__", None)
        memory, number = asked() if asked is not None else (0, 0)
        found = next((b for b in _BACKENDS.values() if int(memory) in b.dlpack_types), None)
        if found is None and int(memory) not in cuda.Cuda.dlpack_types:
            return HOST
        torch_type = cuda.Cuda.torch_type if found is None else found.torch_type
        where = f"{cuda.Cuda.torch_type}:{int(number)}"
    return _available(name, torch_type, f"an array on {where!r}")


def require_device(device: Any) -> None:
    """Raise, naming the argument ``device``, unless tables can be on this torch device."""
    if device.type not in (*_BACKENDS, *TORCH_TYPES):
        accepted = " or ".join(map(repr, TORCH_TYPES))
        raise ValueError(f"device: got {str(device)!r}, accepted: {accepted}")
    _available("device", device.type, repr(str(device)))


def kernels_on(device: Any, *, sync: bool) -> Kernels:
    """Return the kernels for tables on a torch device. sync: on CUDA, wait and raise in each call."""
    require_device(device)
    return _BACKENDS[device.type].kernels(device, sync=sync)


def kernels_of(token: str | None) -> Kernels | None:
    """Return the kernels that have this token, while their module lives."""
    return cuda.kernels_of(token)
