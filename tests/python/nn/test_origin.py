"""Shards: tables that are part of a larger one draw its random bits and speak of it by name."""

from __future__ import annotations

import copy

import pytest
import torch

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.nn.table import Origin

ROWS, DIM = 64, 8
BY_ROW = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1), coldrow.Exponential(half_life=5.0), coldrow.Stochastic(seed=1)
)
# (Row-wise state is that of the columns of a shard: only element-wise updates know no columns.)
BY_ELEMENT = coldrow.RowUpdate(
    coldrow.Adagrad(lr=0.1), coldrow.Exponential(half_life=5.0), coldrow.Stochastic(seed=1)
)
INDICES, OFFSETS = torch.arange(ROWS), torch.arange(ROWS + 1)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def start() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()


def shard(rows: slice, columns: slice, update, name="0", **options) -> TableBatchedEmbeddingBags:
    """Part of the table "user", called ``name``."""
    part = start()[rows, columns].contiguous()
    table = Table(
        name,
        *part.shape,
        dtype=torch.bfloat16,
        storage=part,
        origin=Origin("user", rows.start, columns.start),
    )
    return TableBatchedEmbeddingBags([table], update, **options)


def user(update, **options) -> TableBatchedEmbeddingBags:
    """The whole table."""
    table = Table("user", ROWS, DIM, dtype=torch.bfloat16, storage=start())
    return TableBatchedEmbeddingBags([table], update, **options)


def compiled(module):
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def as_it_is(module):
    return module


def train(emb, call, columns: slice = slice(0, DIM), first: int | None = None) -> torch.Tensor:
    """Three steps on every row; return the rows."""
    (table,) = emb.tables
    rows = table.num_rows
    if first is None:
        first = 0 if table.origin is None else table.origin.row
    g = torch.Generator().manual_seed(3)
    for _ in range(3):
        grad = torch.randn(ROWS, DIM, generator=g)
        call(INDICES[:rows], OFFSETS[: rows + 1]).backward(grad[first : first + rows, columns])
        if not emb.fused:
            emb.step()
            emb.zero_grad()
    (weight,) = emb.weights.values()
    return weight.detach().clone()


PARTS = {
    "rows": (slice(20, 51), slice(0, DIM), BY_ROW),
    "columns": (slice(0, ROWS), slice(4, 8), BY_ELEMENT),
    "both": (slice(33, 64), slice(2, 7), BY_ELEMENT),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_a_shard_draws_the_bits_of_the_whole_table(part, fused):
    rows, columns, update = PARTS[part]
    whole = user(update, fused=fused)
    want = train(whole, whole)[rows, columns]
    emb = shard(rows, columns, update, fused=fused)
    assert torch.equal(train(emb, emb, columns), want)
    for name, state in emb.state["0"].items():
        of_whole = whole.state["user"][name]
        assert torch.equal(state, of_whole[rows, columns] if state.dim() == 2 else of_whole[rows])


@pytest.mark.parametrize("part", PARTS)
def test_compiled_code_draws_the_same_bits(part):
    rows, columns, update = PARTS[part]
    eager, traced = (shard(rows, columns, update) for _ in range(2))
    want = train(eager, eager, columns)
    assert torch.equal(train(traced, compiled(traced), columns), want)
    # Equal bits say something: without the origin they are others.
    part = start()[rows, columns].contiguous()
    alone = Table("0", *part.shape, dtype=torch.bfloat16, storage=part)
    plain = TableBatchedEmbeddingBags([alone], update)
    assert not torch.equal(train(plain, plain, columns, rows.start), want)


@pytest.mark.parametrize("how", [as_it_is, compiled])
def test_an_index_outside_is_said_of_the_whole_table(how):
    emb = shard(slice(20, 51), slice(0, DIM), BY_ROW)
    call = how(emb)
    with pytest.raises(IndexError, match=r"got 31 at position 1 of table 'user', accepted: 0 to"):
        call(torch.tensor([3, 31]), torch.tensor([0, 1, 2]))
    assert emb.clock == 0


@pytest.mark.parametrize("how", [as_it_is, compiled])
def test_a_gradient_that_is_not_finite_is_said_of_the_whole_table(how):
    emb = shard(slice(20, 51), slice(0, DIM), BY_ROW, on_nonfinite="raise")
    out = how(emb)(torch.tensor([3]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"table 'user'.*is not finite"):
        out.sum().mul(float("nan")).backward()
    assert emb.clock == 0


def test_a_copy_and_a_conversion_keep_the_origin():
    emb = shard(slice(20, 51), slice(0, DIM), BY_ROW)
    twin = copy.deepcopy(emb).float().bfloat16()
    for module in (emb, twin):
        assert module.tables[0].origin == Origin("user", 20, 0)
    assert torch.equal(train(twin, twin), train(emb, emb))


def test_the_memory_given_is_the_table():
    part = start()
    emb = TableBatchedEmbeddingBags(
        [Table("t", ROWS, DIM, dtype=torch.bfloat16, storage=part)], BY_ROW
    )
    assert emb.weights["t"].data_ptr() == part.data_ptr()
    train(emb, emb)
    assert not torch.equal(part, start())
    assert torch.equal(part, emb.weights["t"])
