"""The float64 reference as tests use it: whole tables, and pooled batches expanded to plain lookups."""

from __future__ import annotations

import itertools

import numpy as np

import coldrow
from coldrow import _core
from coldrow.policies import compiled


class Reference:
    """One table in float64, trained by the reference implementation (include/coldrow/reference.hpp)."""

    def __init__(self, update: coldrow.RowUpdate, weight: np.ndarray) -> None:
        self.update = compiled(update)
        self.weight = np.array(weight, dtype=np.float64)
        self.state = {
            name: np.zeros(shape, dtype=np.int64 if name == "prev_iter" else np.float64)
            for name, shape in update.state_shapes(*self.weight.shape).items()
        }
        self.prev_iter = self.state["prev_iter"]

    def apply(self, grad, indices, *, step: int, lr: float, epoch_start: int = 0) -> None:
        """One step: grad [n, D], indices [n]; duplicates are summed first."""
        _core.reference_apply(
            self.update,
            self.weight,
            np.ascontiguousarray(grad, dtype=np.float64),
            np.ascontiguousarray(indices, dtype=np.int64),
            self.state,
            step,
            lr,
            epoch_start,
        )

    def read(self, *, step: int, lr: float, epoch_start: int = 0) -> np.ndarray:
        """The table as a read-charged forward before ``step`` sees it."""
        factors = [
            _core.reference_read_factor(self.update, int(p), step, lr, epoch_start)
            for p in self.prev_iter
        ]
        return np.array(factors)[:, None] * self.weight


def pool(rows: np.ndarray, offsets: np.ndarray, pooling: str, psw=None) -> np.ndarray:
    """Pool rows [n, D] (float64) into bags [B, D]."""
    out = np.zeros((len(offsets) - 1, rows.shape[1]))
    for b, (lo, hi) in enumerate(itertools.pairwise(offsets)):
        scale = 1.0 if psw is None else np.asarray(psw, dtype=np.float64)[lo:hi, None]
        out[b] = (rows[lo:hi] * scale).sum(0)
        if pooling == "mean" and hi > lo:
            out[b] /= hi - lo
    return out


def unpool(grad: np.ndarray, offsets: np.ndarray, pooling: str, psw=None) -> np.ndarray:
    """The gradient of each lookup [n, D] from the gradient of the bags [B, D]."""
    lengths = np.diff(offsets)
    if pooling == "mean":
        grad = grad / np.maximum(lengths, 1)[:, None]
    rows = np.repeat(np.asarray(grad, dtype=np.float64), lengths, axis=0)
    return rows if psw is None else rows * np.asarray(psw, dtype=np.float64)[:, None]


def random_batch(rng: np.random.Generator, rows: int, bags: int, longest: int):
    """Indices int64 [n] and offsets int64 [bags + 1]; some bags are empty, duplicates are likely."""
    lengths = rng.integers(0, longest + 1, bags)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return rng.integers(0, rows, offsets[-1]), offsets
