"""The device, and batches and modules that several of these tests use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

SETTING = os.environ.get("COLDROW_TEST_DEVICE", "cuda")


class Place(str):
    """Where the tests' tables are. (A kind of its own: the stand-in's is "cpu", as the processor's.)"""


DEVICE = Place("cuda" if SETTING == "cuda" else "cpu")
#: What is wrong with values is found when kernels run, and raised at a check point.
DEFERRED = SETTING != "cpu"
ENGINE: Any = None
if SETTING not in ("cuda", "cpu"):
    import stand_in

    ENGINE = stand_in.load(SETTING)


@contextlib.contextmanager
def using(place: str) -> Iterator[None]:
    """Let tables be trained by the kernels of a place: the tests' device, or "cpu", the processor."""
    if ENGINE is None:
        yield
        return
    with stand_in.in_use(ENGINE if isinstance(place, Place) else None):
        yield


def both() -> Iterator[str]:
    """Yield the tests' device and then "cpu", each with its own kernels in use."""
    for place in (DEVICE, "cpu"):
        with using(place):
            yield place


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# No transcendental function in any of them, so that a GPU gives a CPU's bits where sums are exact.
LINEAR = coldrow.LinearClipped(alpha=0.5, min_shrinkage=0.25)
EXACT_UPDATES = {
    "rmsprop": coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.125, ema_beta=0.75), LINEAR),
    "plain": coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.125)),
    "adagrad": coldrow.RowUpdate(coldrow.Adagrad(lr=0.125), LINEAR, decay_state=True),
    "rowwise_adagrad": coldrow.RowUpdate(
        coldrow.RowwiseAdagrad(lr=0.125), coldrow.Constant(0.5), decay_state=True
    ),
    "sgd": coldrow.RowUpdate(coldrow.SGD(lr=0.125), coldrow.EpochReset()),
}


def quarters(rng: np.random.Generator, shape) -> np.ndarray:
    """Multiples of 1/4 in [-1/2, 1/2]: their sums and the sums of their squares are exact."""
    return rng.integers(-2, 3, shape) / 4.0


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, on the CPU: NaNs compare too."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def contents(emb: TableBatchedEmbeddingBags) -> dict[str, torch.Tensor]:
    """Weights and state by name, copied to the CPU."""
    out = {}
    for table in emb.tables:
        out[table.name] = emb.weights[table.name].detach().cpu().clone()
        for name, array in emb.state[table.name].items():
            out[f"{table.name}.{name}"] = array.cpu().clone()
    return out


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits(one[name], other[name]), name


def module(
    device, update=None, *, dtype=torch.float32, rows=(300, 7, 60), dim=(64, 64, 64), **options
):
    """Tables a (two features, x and y), b (few rows, so long runs) and c of weights that do not depend
    on the device.
    """
    names = ["a", "b", "c"][: len(rows)]
    emb = TableBatchedEmbeddingBags(
        [
            Table(n, r, d, dtype=dtype, features=["x", "y"] if n == "a" else [n])
            for n, r, d in zip(names, rows, dim, strict=True)
        ],
        update or coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.125, ema_beta=0.75), LINEAR),
        device=device,
        **options,
    )
    rng = np.random.default_rng(17)
    for p in emb.weights.values():
        p.data.copy_(torch.from_numpy(rng.normal(size=p.shape)))
    return emb


class Batches:
    """Batches for :func:`module`, the same whatever the device."""

    def __init__(self, emb, seed: int = 0, bags: int = 40, longest: int = 5) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows = [emb.tables[t].num_rows for t in emb.layout.features]
        self.device = next(iter(emb.weights.values())).device
        self.bags, self.longest = bags, longest

    def draw(self, *, weighted: bool = False, index_dtype=torch.int64, lengths=None):
        """(indices, offsets, weights or None) on the device."""
        features = len(self.rows)
        if lengths is None:
            lengths = self.rng.integers(0, self.longest + 1, features * self.bags)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ends = offsets[:: self.bags]
        parts = [
            self.rng.integers(0, r, hi - lo)
            for r, lo, hi in zip(self.rows, ends[:-1], ends[1:], strict=True)
        ]
        indices = torch.from_numpy(np.concatenate(parts)).to(index_dtype)
        weights = None
        if weighted:
            weights = torch.from_numpy(self.rng.integers(-4, 5, len(indices)) / 4.0).float()
            weights = weights.to(self.device)
        offsets = torch.from_numpy(offsets).to(index_dtype)
        return indices.to(self.device), offsets.to(self.device), weights

    def grad_for(self, out: torch.Tensor) -> torch.Tensor:
        """An exact gradient of the output's shape and dtype."""
        return torch.from_numpy(quarters(self.rng, tuple(out.shape))).to(out.device, out.dtype)
