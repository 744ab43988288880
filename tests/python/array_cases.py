"""Arrays of one table, NumPy's or torch's, and one update on them."""

from __future__ import annotations

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")

UPDATE = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.1))
ROWS, DIM = 6, 4


def make_arrays() -> dict[str, np.ndarray]:
    """Arguments for step 7: three gradients for rows 1 and 4."""
    rng = np.random.default_rng(0)
    return {
        "weight": rng.standard_normal((ROWS, DIM), dtype=np.float32),
        "grad": rng.standard_normal((3, DIM), dtype=np.float32),
        "indices": np.array([1, 4, 1]),
        "momentum1": rng.random(ROWS, dtype=np.float32),
        "prev_iter": np.array([0, 3, 2, 0, 5, 1], np.int32),
    }


def make_tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in make_arrays().items()}


def train(arrays: dict, step: int = 7) -> None:
    rest = dict(arrays)
    state = {name: rest.pop(name) for name in ("momentum1", "prev_iter")}
    coldrow.apply_(UPDATE, **rest, state=state, step=step)
