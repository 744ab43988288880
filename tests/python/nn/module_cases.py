"""Modules and batches that the tests of TableBatchedEmbeddingBags share."""

from __future__ import annotations

import numpy as np
import pytest

import coldrow
import coldrow.optim

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

NAN = float("nan")
UPDATE = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1, eps=1e-6, ema_beta=0.9), coldrow.LinearClipped(alpha=0.2)
)
DECAY = coldrow.RowUpdate(UPDATE.optimizer, coldrow.CumulativeLinear(half_life=3.0))
# Rows and dim of each table, and its features: "a" is shared.
TABLES = {"a": (9, 4, ["a1", "a2"]), "b": (7, 6, ["b"])}
FEATURES = ["a", "a", "b"]  # table of each feature


def make(update=UPDATE, dims=None, dtype=torch.float32, **options) -> TableBatchedEmbeddingBags:
    torch.manual_seed(0)
    tables = [
        Table(name, rows, (dims or {}).get(name, dim), dtype=dtype, features=features)
        for name, (rows, dim, features) in TABLES.items()
    ]
    return TableBatchedEmbeddingBags(tables, update, **options)


def make_batch(seed=0, bags=(3, 3, 3), dtype=torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and offsets; bags of 0 to 3 indices, with duplicates."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(0, 4, b) for b in bags]
    indices = [
        rng.integers(0, TABLES[table][0], n.sum())
        for table, n in zip(FEATURES, lengths, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return torch.tensor(np.concatenate(indices), dtype=dtype), torch.tensor(offsets, dtype=dtype)


def per_feature(indices, offsets, bags=(3, 3, 3)):
    """The batch of each feature alone: its indices, its offsets from 0, its positions."""
    first = 0
    for count in bags:
        part = offsets[first : first + count + 1]
        yield indices[part[0] : part[-1]], part - part[0], slice(int(part[0]), int(part[-1]))
        first += count


def torch_bags(weights, indices, offsets, pooling="sum", psw=None, bags=(3, 3, 3)) -> list:
    """What nn.EmbeddingBag makes of each feature."""
    outs = []
    for table, (i, o, at) in zip(FEATURES, per_feature(indices, offsets, bags), strict=True):
        outs.append(
            F.embedding_bag(
                i,
                weights[table],
                o,
                mode=pooling,
                include_last_offset=True,
                per_sample_weights=None if psw is None else psw[at],
            )
        )
    return outs


def copies(emb) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in emb.weights.items()}


def step(emb, *batch, scale=1.0, **options) -> None:
    """One training step of a loss whose gradient differs everywhere."""
    out = emb(*batch, **options)
    parts = out if isinstance(out, list) else [out]
    loss = sum((p.float() * torch.linspace(-1, 2, p.numel()).view(p.shape)).sum() for p in parts)
    (loss * scale).backward()
    if not emb.fused:
        emb.step()
        emb.zero_grad()


def snapshot(emb) -> dict[str, torch.Tensor]:
    """Copies of weights, state and clock."""
    return {k: v.clone() for k, v in emb.state_dict().items() if k != "_extra_state"}


def assert_same(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


# ------------------------------------------------------------------- what an audit of the module found


def small(dtype=torch.float32, **options):
    init = nn.init.ones_
    return TableBatchedEmbeddingBags(
        [Table("a", 6, 4, dtype=dtype, init=init)],
        coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1, ema_beta=0.0)),
        **options,
    )


ONE, BAGS = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
