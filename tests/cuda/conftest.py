"""Tests of the CUDA path. They run where there is a GPU; tests/gpu.sh runs them all.

The device is one setting, COLDROW_TEST_DEVICE. "cpu": those that mean something on a CPU run there, which
shows that the tests themselves are right. The folder of the stand-in for a device (CMake's target
``stand_in``): they run through the CUDA module's own code, without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "python"))  # their helpers, used here too
sys.path.insert(0, str(Path(__file__).parent.parent / "python" / "functional"))

from cases import DEVICE, SETTING, using


def why_not() -> str | None:
    """Return what is missing for tests on a GPU, None if nothing is."""
    import coldrow

    if SETTING != "cuda":
        return None
    if not coldrow.cuda.is_built():
        return "this build of coldrow has no CUDA kernels"
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None if coldrow.cuda.is_available() else "coldrow cannot use the CUDA device"


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if not here:
        return
    missing = why_not()
    for item in here:
        only = item.get_closest_marker("cuda_only")
        item.add_marker(pytest.mark.cuda)
        if SETTING != "cuda":
            if only:
                item.add_marker(pytest.mark.skip(reason="means nothing without a GPU"))
        elif missing:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _kernels():
    with using(DEVICE):
        yield
