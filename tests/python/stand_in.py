"""The CUDA module on a machine without a GPU: the same sources, compiled for the tests' stand-in for a device
(tests/cpp/device/simt.hpp), which takes the processor's memory for its own.

``pytest --stand-in FOLDER`` runs tests with it; see conftest.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coldrow._backends import cuda, registry
from coldrow._backends.host import HOST


class StandIn(cuda.Cuda):
    """A backend whose device is the processor."""

    torch_type = "cpu"
    dlpack_types = (1,)

    def stream(self, array: Any) -> int:
        return 0


def load(folder: str | Path) -> StandIn:
    """Return the backend from the folder where CMake's target ``stand_in`` puts its module."""
    (path,) = Path(folder).glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("coldrow._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return StandIn(module)


@contextlib.contextmanager
def in_use(backend: cuda.Cuda | None, *, always_sync: bool = False) -> Iterator[None]:
    """Let this backend be the only one beside the processor's; None: as in a build without CUDA.

    The stand-in takes the place of the processor's: tables in its memory are trained by it.
    """
    backends = {HOST.torch_type: HOST}
    if backend is not None:
        backend.always_sync = always_sync
        backends[backend.torch_type] = backend
    before = registry.exchange(backends)
    try:
        yield
    finally:
        registry.exchange(before)
