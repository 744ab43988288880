"""What a device asks of the Python package beyond what the processor does, on the stand-in for one: values
that are only looked at there, clock and lr that kernels read, refusals that wait for a check point.

Where COLDROW_STAND_IN names the folder of the stand-in's module (``make test`` does).
"""

from __future__ import annotations

import os
import weakref

import numpy as np
import pytest
import stand_in
import torch

import coldrow
from coldrow import nn
from coldrow._backends import registry
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer

FOLDER = os.environ.get("COLDROW_STAND_IN")
if not FOLDER and not os.environ.get("COLDROW_REQUIRE_ALL_TESTS"):
    pytest.skip("COLDROW_STAND_IN is not set", allow_module_level=True)

INF = float("inf")
LAST = 2**31 - 1


@pytest.fixture(scope="module")
def engine():
    assert FOLDER, "COLDROW_REQUIRE_ALL_TESTS needs COLDROW_STAND_IN"
    return stand_in.load(FOLDER)


@pytest.fixture(autouse=True)
def _in_use(engine):
    with stand_in.in_use(engine):
        yield


def small(update=None, **options):
    """Tables "a" (two features) and "b", all ones."""
    update = update or coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1))
    tables = [
        Table("a", 6, 4, features=["f", "g"], init=torch.nn.init.ones_),
        Table("b", 5, 3, init=torch.nn.init.ones_),
    ]
    return TableBatchedEmbeddingBags(tables, update, **options)


GOOD = torch.tensor([0, 1, 5, 5, 2, 4]), torch.tensor([0, 1, 2, 3, 4, 5, 6])


def with_index(position, value):
    indices = GOOD[0].clone()
    indices[position] = value
    return indices, GOOD[1]


def snapshot(emb):
    tensors = [*emb.weights.values(), *(v for s in emb.state.values() for v in s.values())]
    return [t.detach().clone() for t in tensors] + [emb.clock]


def same(one, other):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def without_reading(monkeypatch):
    """Let every reading of a tensor's value by Python fail, as in the capture of a CUDA graph."""

    def fail(*_):
        raise AssertionError("a value was read on the host")

    for name in ("item", "__int__", "__float__", "__bool__", "__index__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    monkeypatch.setattr(stand_in.StandIn, "finish", fail, raising=False)


# ------------------------------------------------------------------------------------- the hot path


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "propagate"])
def test_a_training_step_reads_no_value(monkeypatch, charge, pooling, on_nonfinite):
    decay = coldrow.EpochGated(coldrow.CumulativeLinear(half_life=3.0))
    update = coldrow.RowUpdate(coldrow.Adam(lr=0.1), decay)
    emb = small(update, charge=charge, pooling=pooling, on_nonfinite=on_nonfinite)
    other = small(update, charge=charge, pooling=pooling, on_nonfinite=on_nonfinite)
    other.new_epoch()
    for _ in range(3):
        other(*GOOD).sum().backward()
    with monkeypatch.context() as patch:
        without_reading(patch)
        emb.new_epoch()
        for _ in range(3):
            emb(*GOOD).sum().backward()
    assert emb.clock == 3
    assert same(snapshot(emb), snapshot(other))


def test_weighted_step_reads_no_value(monkeypatch):
    emb = small(charge="read", update=coldrow.RowUpdate(decay=coldrow.LinearClipped(5.0)))
    weights = torch.arange(6.0, requires_grad=True)
    with monkeypatch.context() as patch:
        without_reading(patch)
        emb(*GOOD, per_sample_weights=weights).sum().backward()
        emb.lr = 0.3
        emb.grad_scale = 4.0
        emb(*GOOD, per_sample_weights=weights).sum().backward()
    emb.check()
    assert emb.clock == 2
    assert weights.grad is not None


def test_clock_lr_epoch_and_scale_are_read_when_kernels_run(engine):
    """What a captured graph replays: the same native calls, with tensors that change in between."""
    decay = coldrow.EpochGated(coldrow.LinearClipped(2.0, 0.0))
    emb, eager = (small(coldrow.RowUpdate(decay=decay)) for _ in range(2))
    out, grad = torch.empty(2, 11), torch.ones(2, 11)
    tables = emb.table_batch
    moment = tables.moment(None)

    def replay():
        tables.kernels.lookup(tables.operands, moment, *GOOD, None, out)
        tables.update(None, *GOOD, None, grad)

    for lr, scale, epoch in ((0.1, 1.0, False), (0.4, 8.0, True), (0.05, 1.0, False)):
        for module in (emb, eager):
            module.lr, module.grad_scale = lr, scale
            if epoch:
                module.new_epoch()
        replay()
        eager(*GOOD).backward(grad)
    assert emb.clock == 3
    assert same(snapshot(emb), snapshot(eager))


def test_loading_a_checkpoint_keeps_what_a_graph_holds():
    emb = small()
    kernels, tables = emb.table_batch.kernels, emb.table_batch
    addresses = [tables.counters.clock.data_ptr(), tables.counters.lr.data_ptr()]
    emb.load_state_dict(small().state_dict())
    emb.lr = 0.5
    emb.param_groups[0]["lr"] = 0.25
    emb(*GOOD).sum().backward()
    now = emb.table_batch.counters
    assert [now.clock.data_ptr(), now.lr.data_ptr()] == addresses
    assert emb.table_batch.kernels is kernels  # and with them the report


def test_grad_scale_divides_the_sum():
    scaled, plain = small(), small()
    scaled.grad_scale = 1024.0
    for _ in range(2):
        (scaled(*GOOD).sum() * 1024.0).backward()
        plain(*GOOD).sum().backward()
    assert same(snapshot(scaled), snapshot(plain))


def test_gradient_of_weights_is_that_of_the_rows_read():
    """lr changes between forward and backward; the forward's is what the rows were read with."""
    grads = []
    for change in (False, True):
        emb = small(
            coldrow.RowUpdate(coldrow.SGD(0.1), coldrow.LinearClipped(2.0, 0.0)), charge="read"
        )
        emb(*GOOD).sum().backward()
        emb.clock = 4
        weights = torch.ones(6, requires_grad=True)
        out = emb(*GOOD, per_sample_weights=weights)
        if change:
            emb.lr = 0.0
        out.sum().backward()
        grads.append(weights.grad)
    assert torch.equal(*grads)


# ----------------------------------------------------------------------------------------- refusals

BAD = {
    "indices: got 6 at position 1 of table 'a', accepted: 0 to 5": (with_index(1, 6), IndexError),
    "indices: got -1 at position 0 of table 'a', accepted: 0 to 5": (with_index(0, -1), IndexError),
    "indices: got 5 at position 4 of table 'b', accepted: 0 to 4": (with_index(4, 5), IndexError),
    "offsets: starts with 1, accepted: 0": (
        (GOOD[0], torch.tensor([1, 1, 2, 3, 4, 5, 6])),
        ValueError,
    ),
    "offsets: falls to 1 at position 3": (
        (GOOD[0], torch.tensor([0, 1, 2, 1, 4, 5, 6])),
        ValueError,
    ),
    "offsets: ends with 5, accepted: the number of indices, 6": (
        (GOOD[0], torch.tensor([0, 1, 2, 3, 4, 5, 5])),
        ValueError,
    ),
}


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("says", BAD)
def test_bad_values_change_nothing_and_wait_for_the_check(says, charge):
    batch, kind = BAD[says]
    emb = small(charge=charge)
    emb(*GOOD).sum().backward()
    before = snapshot(emb)
    out = emb(*batch)
    assert not out.any()  # zeros, and no other row
    out.sum().backward()
    assert same(snapshot(emb), before)
    emb(*GOOD).sum().backward()  # later batches are judged by themselves
    emb(*with_index(2, 99)).sum().backward()
    assert emb.clock == 2
    with pytest.raises(kind) as caught:
        emb.check()
    assert str(caught.value).startswith(says)
    assert "(found on the device, batch 2; that batch changed nothing)" in str(caught.value)
    emb.check()  # said once
    emb(*GOOD).sum().backward()
    emb.check()


def test_sync_validation_raises_at_once():
    emb = small(validate="sync")
    before = snapshot(emb)
    with pytest.raises(IndexError, match="got 6 at position 1 of table 'a'"):
        emb(*with_index(1, 6))
    assert same(snapshot(emb), before)
    emb(*GOOD).sum().backward()


def test_an_index_changed_before_backward_is_found_there():
    emb = small()
    indices = GOOD[0].clone()
    out = emb(indices, GOOD[1])
    indices.data[3] = 77
    before = snapshot(emb)
    out.sum().backward()
    assert same(snapshot(emb), before)
    with pytest.raises(IndexError, match="got 77 at position 3 of table 'a'"):
        emb.check()


def test_unpooled_tables_of_several_widths_say_at_once():
    emb = small(pooling="none")
    assert [part.shape for part in emb(*GOOD)] == [(2, 4), (2, 4), (2, 3)]
    with pytest.raises(IndexError, match="got 9 at position 5 of table 'b'"):
        emb(*with_index(5, 9))
    with pytest.raises(ValueError, match="offsets: falls"):
        emb(GOOD[0], torch.tensor([0, 4, 2, 3, 4, 5, 6]))


def test_sparse_gradients_say_at_once():
    emb = small(fused=False)
    out = emb(*with_index(1, 6))
    with pytest.raises(IndexError, match="got 6 at position 1 of table 'a'"):
        out.sum().backward()
    assert emb.weights["a"].grad is None


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "propagate"])
def test_nonfinite_rows(on_nonfinite):
    emb = small(on_nonfinite=on_nonfinite)
    before = snapshot(emb)
    grad = torch.ones(2, 11)
    grad[0, 0] = INF  # feature f, bag 0: row 0 of a
    emb(*GOOD).backward(grad)
    if on_nonfinite == "raise":
        assert same(snapshot(emb), before)
        with pytest.raises(
            ValueError, match=r"grad: the update of row 0 of table 'a' is not finit"
        ):
            emb.check()
        return
    emb.check()
    assert emb.clock == 1
    assert emb.nonfinite_rows == (1 if on_nonfinite == "skip" else 0)
    assert torch.equal(emb.weights["a"][0], torch.ones(4)) == (on_nonfinite == "skip")
    assert not torch.equal(emb.weights["a"][1], torch.ones(4))
    emb(*GOOD).backward(grad)
    assert emb.nonfinite_rows == (2 if on_nonfinite == "skip" else 0)


def test_the_step_after_the_last():
    emb = small()
    emb.clock = LAST - 1
    emb(*GOOD).sum().backward()
    assert emb.clock == LAST
    before = snapshot(emb)
    emb(*GOOD).sum().backward()
    assert same(snapshot(emb), before)
    with pytest.raises(ValueError, match=r"clock: is at 2147483647, accepted: steps up to 2\*\*31"):
        emb.check()


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("lr", float("nan")), ("epoch", -5)])
def test_numbers_that_went_bad(name, value):
    emb = small(coldrow.RowUpdate(decay=coldrow.EpochReset()))
    before = snapshot(emb)
    counters = emb.table_batch.counters
    (counters.lr if name == "lr" else counters.epoch_start).fill_(value)
    emb(*GOOD).sum().backward()
    assert same(snapshot(emb), before)
    with pytest.raises(ValueError, match=f"^{name}"):
        emb.check()


def test_refusals_are_raised_before_tables_move():
    emb = small()
    emb(*with_index(0, 9))
    with pytest.raises(IndexError):
        emb.to(torch.bfloat16)
    assert emb.to(torch.bfloat16).weights["a"].dtype == torch.bfloat16


def test_empty_batches():
    emb = small()
    none = torch.zeros(0, dtype=torch.int64)
    out = emb(none, torch.zeros(7, dtype=torch.int64))
    assert out.shape == (2, 11)
    assert not out.any()
    out.sum().backward()
    assert emb(none, torch.zeros(1, dtype=torch.int64)).shape == (0, 11)
    emb.check()
    assert emb.clock == 1  # (the second had no backward)
    assert torch.equal(emb.weights["a"], torch.ones(6, 4))


# ------------------------------------------------------------------------------------- functional


def arrays(library):
    made = {
        "weight": np.ones((6, 4), np.float32),
        "grad": np.ones((3, 4), np.float32),
        "indices": np.array([0, 5, 0]),
        "momentum1": np.zeros(6, np.float32),
        "prev_iter": np.zeros(6, np.int32),
    }
    return made if library == "numpy" else {k: torch.from_numpy(v) for k, v in made.items()}


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_functional_calls_raise(library):
    a = arrays(library)
    coldrow.rowwise_rmsprop_ar_(**a, step=3, lr=0.1, ar_alpha=0.5)
    now = {k: v.copy() if library == "numpy" else v.clone() for k, v in a.items()}
    with pytest.raises(ValueError, match="step: got 3, accepted: more than prev_iter of every row"):
        coldrow.rowwise_rmsprop_ar_(**a, step=3, lr=0.1)
    bad = a["grad"].copy() if library == "numpy" else a["grad"].clone()
    bad[1, 2] = INF
    with pytest.raises(ValueError, match="grad: the update of row 5 is not finite"):
        coldrow.rowwise_rmsprop_ar_(**a | {"grad": bad}, step=4, lr=0.1)
    index = a["indices"] * 2
    with pytest.raises(IndexError, match="indices: got 10 at position 1, accepted: 0 to 5"):
        coldrow.rowwise_rmsprop_ar_(**a | {"indices": index}, step=4, lr=0.1)
    for name, array in a.items():
        assert bytes(np.asarray(array).data) == bytes(np.asarray(now[name]).data)


def test_an_optimizer_writes_all_tables_or_none():
    bags = [torch.nn.EmbeddingBag(4, 3, mode="sum", sparse=True) for _ in range(2)]
    opt = SparseOptimizer(
        [b.weight for b in bags], coldrow.RowUpdate(coldrow.SGD(0.1)), on_nonfinite="raise"
    )
    before = [b.weight.detach().clone() for b in bags]
    out = [b(torch.tensor([[0, 1]])) for b in bags]
    (out[0].sum() + out[1].sum() * INF).backward()
    with pytest.raises(ValueError, match="grad: the update of row 0 is not finite"):
        opt.step()
    assert all(torch.equal(b.weight, w) for b, w in zip(bags, before, strict=True))
    assert opt.clock == 0


# -------------------------------------------------------------------------------- equal to the CPU


def test_rounding_draws_the_bits_of_the_processor(engine):
    """Sums are exact and nothing is transcendental: the bits are the processor's."""
    update = coldrow.RowUpdate(
        coldrow.SGD(lr=0.25), coldrow.LinearClipped(0.5, 0.0), coldrow.Stochastic(5)
    )

    def train(on):
        with stand_in.in_use(on):
            tables = [Table("t", 40, 37, dtype=torch.bfloat16, init=torch.nn.init.ones_)]
            emb = TableBatchedEmbeddingBags(tables, update, charge="read")
            rng = np.random.default_rng(0)
            outs = []
            for _ in range(4):
                indices = torch.from_numpy(rng.integers(0, 40, 90))
                grad = torch.from_numpy(rng.integers(-4, 5, (9, 37)) / 64).float()
                out = emb(indices, torch.arange(0, 91, 10))
                out.backward(grad)
                outs.append(out.detach())
            return [*outs, *snapshot(emb)]

    assert same(train(engine), train(None))


def test_results_repeat():
    def train():
        torch.manual_seed(0)
        emb = small(coldrow.RowUpdate(coldrow.Adam(0.1), coldrow.CumulativeLinear(0.01)))
        for _ in range(3):
            indices = torch.randint(0, 5, (600,))
            emb(indices, torch.arange(0, 601, 100)).square().sum().backward()
        return snapshot(emb)

    assert same(train(), train())


# ------------------------------------------------------------------------------- compiled, and kept


@pytest.mark.parametrize("charge", ["touch", "read"])
def test_compiled_operators_report_to_their_module(charge):
    torch._dynamo.reset()
    emb, eager = small(charge=charge), small(charge=charge)

    @torch.compile(backend="aot_eager")
    def step(indices, offsets):
        return emb(indices, offsets).sum()

    for lr in (0.1, 0.4):
        emb.lr = eager.lr = lr
        step(*GOOD).backward()
        eager(*GOOD).sum().backward()
    assert same(snapshot(emb), snapshot(eager))
    before = snapshot(emb)
    step(*with_index(1, 6)).backward()
    assert same(snapshot(emb), before)
    with pytest.raises(IndexError, match="got 6 at position 1 of table 'a'"):
        emb.check()


def test_operator_of_no_module_raises_at_once():
    emb = small()
    tables = emb.table_batch
    at = tables.counters
    kept = list(tables.weights), list(tables.state), at.lr
    counters = at.clock, at.epoch_start, at.nonfinite, at.grad_scale
    spec, anchor, gone = emb.spec, emb.anchor.detach(), weakref.ref(tables.kernels)
    del tables

    def call(indices):
        lookup = torch.ops.coldrow.lookup
        return lookup(anchor, *kept, *counters, indices, GOOD[1], None, None, False, spec)

    assert not call(with_index(2, 9)[0]).any()
    with pytest.raises(IndexError, match="got 9 at position 2"):
        emb.check()
    del emb
    assert gone() is None
    assert call(GOOD[0]).shape == (2, 11)
    with pytest.raises(IndexError, match="got 9 at position 2"):
        call(with_index(2, 9)[0])


def test_policies_of_the_jit_are_refused():
    source = (
        "struct Half { COLDROW_HD float operator()(std::int32_t, float) const { return 0.5f; } };"
    )
    update = coldrow.RowUpdate(decay=coldrow.jit.decay("Half", source))
    with pytest.raises(
        ValueError, match=r"update: has a policy compiled for the CPU by coldrow.jit"
    ):
        small(update)


def test_memory_comes_from_the_caller(engine, monkeypatch):
    asked = []

    def allocator(self, array):
        def allocate(count):
            asked.append(count)
            return torch.full((count,), 0xFF, dtype=torch.uint8)  # what is not written shows

        return allocate

    monkeypatch.setattr(stand_in.StandIn, "allocator", allocator)
    emb = small()
    emb(*GOOD).sum().backward()
    assert len(asked) == 2
    assert emb.clock == 1

    def no_memory(self, array):
        def allocate(count):
            raise MemoryError(f"{count} bytes")

        return allocate

    out = emb(*GOOD)
    before = snapshot(emb)
    emb.table_batch.kernels._allocate = no_memory(None, None)
    with pytest.raises(MemoryError):
        out.sum().backward()
    assert same(snapshot(emb), before)


def test_modules_of_the_other_name(engine):
    bag = nn.EmbeddingBag(6, 4, mode="sum", padding_idx=2)
    bag(torch.tensor([[0, 2], [1, 5]])).sum().backward()
    assert bag.clock == 1
    assert isinstance(registry.accelerator(), stand_in.StandIn)
    assert nn.Embedding(6, 4)(torch.tensor([[1], [2]])).shape == (2, 1, 4)
