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

from coldrow import _engines


class StandIn(_engines.Device):
    """An engine whose device is the processor."""

    torch_type = "cpu"
    dlpack_types = (1,)

    def stream(self, array: Any) -> int:
        return 0


def load(folder: str | Path) -> StandIn:
    """Return the engine from the folder where CMake's target ``stand_in`` puts its module."""
    (path,) = Path(folder).glob("_cuda*.so")
    spec = importlib.util.spec_from_file_location("coldrow._cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return StandIn(module)


@contextlib.contextmanager
def in_use(engine: _engines.Device | None, *, always_sync: bool = False) -> Iterator[None]:
    """Let tables in the processor's memory be trained by this engine."""
    before = _engines.device
    _engines.device = engine
    if engine is not None:
        engine.always_sync = always_sync
    try:
        yield
    finally:
        _engines.device = before
