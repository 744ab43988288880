"""The workloads of the benchmarks: shapes, and batches drawn from a fixed seed.

A workload is ``T`` tables of one width ``D``; a batch has ``B`` bags per table of ``L`` ids each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Distinct values in the 26 categorical columns of Criteo's display advertising set, as published
# with DLRM; the workload clips them to 10..1,000,000.
CRITEO_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One batch, in the layout of a table-batched embedding: table-major, ids local to a table."""

    indices: NDArray[np.int64]  #: [T * B * L] row ids
    offsets: NDArray[np.int64]  #: [T * B + 1] where each bag starts in ``indices``
    grad: NDArray[np.float32]  #: gradient of the loss by the output, [B, T * D] or [T * B * L, D]


@dataclass(frozen=True)
class Workload:
    """Shapes of one benchmark case."""

    name: str
    rows: tuple[int, ...]  #: rows of each table, [T]
    dim: int  #: D, values per row
    batch: int  #: B, bags per table
    bag: int  #: L, ids per bag
    zipf: float | None  #: exponent of the ids' distribution; None is uniform
    pooled: bool = True  #: rows of a bag are summed; else each id gives a row of its own

    @property
    def ids(self) -> int:
        """Ids per batch, over all tables."""
        return len(self.rows) * self.batch * self.bag

    def __str__(self) -> str:
        tables = len(self.rows)
        low, high = min(self.rows), max(self.rows)
        rows = f"{high:,}" if low == high else f"{low:,} to {high:,}"
        draw = "uniform" if self.zipf is None else f"Zipf {self.zipf}"
        return (
            f"{self.name}: {tables} table{'s' * (tables > 1)} of {rows} rows, D={self.dim}, "
            f"B={self.batch}, L={self.bag}, {draw}{'' if self.pooled else ', pooling none'}"
        )

    def batches(self, count: int, seed: int = 0) -> Iterator[Batch]:
        """Draw ``count`` batches. The popular rows of a table are scattered over it at random."""
        rng = np.random.default_rng(seed)
        tables, per_table = len(self.rows), self.batch * self.bag
        offsets = np.arange(0, tables * per_table + 1, self.bag, dtype=np.int64)
        indices = np.empty((count, tables, per_table), np.int64)
        for table, rows in enumerate(self.rows):
            if self.zipf is None:
                indices[:, table] = rng.integers(rows, size=(count, per_table))
                continue
            cdf = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -self.zipf)
            rank = np.searchsorted(cdf, rng.random((count, per_table)) * cdf[-1], side="right")
            indices[:, table] = rng.permutation(rows)[np.minimum(rank, rows - 1)]
        for drawn in indices:
            shape = (self.batch, tables * self.dim) if self.pooled else (self.ids, self.dim)
            grad = rng.standard_normal(shape, dtype=np.float32)
            yield Batch(drawn.reshape(-1), offsets, grad)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1z", rows=(1_000_000,), dim=64, batch=4096, bag=20, zipf=1.05),
        Workload("W1u", rows=(1_000_000,), dim=64, batch=4096, bag=20, zipf=None),
        Workload("W2", rows=(200_000,) * 10, dim=64, batch=2048, bag=10, zipf=1.05),
        Workload(
            "W3",
            rows=tuple(min(max(count, 10), 1_000_000) for count in CRITEO_CARDINALITIES),
            dim=16,
            batch=8192,
            bag=1,
            zipf=1.05,
        ),
        Workload("W4", rows=(1_000_000,), dim=128, batch=2048, bag=50, zipf=1.05),
        Workload(
            "W1z-none", rows=(1_000_000,), dim=64, batch=4096, bag=20, zipf=1.05, pooled=False
        ),
    )
}
# The five over which means are taken.
POOLED = tuple(name for name, workload in WORKLOADS.items() if workload.pooled)

# Two that fill a large GPU, for gpu.py.
LARGE = {
    workload.name: workload
    for workload in (
        Workload("G1u", rows=(10_000_000,), dim=128, batch=65_536, bag=20, zipf=None),
        Workload("G1z", rows=(10_000_000,), dim=128, batch=65_536, bag=20, zipf=1.05),
    )
}
