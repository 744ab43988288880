"""TableBatchedEmbeddingBags under what torch does with modules: conversion, copies, models, compilation."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import numpy as np
import pytest

import coldrow
import coldrow.optim

torch = pytest.importorskip("torch")
from module_cases import (  # noqa: E402
    BAGS,
    DECAY,
    FEATURES,
    ONE,
    TABLES,
    UPDATE,
    assert_same,
    make,
    make_batch,
    small,
    snapshot,
    step,
)
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

# ---------------------------------------------------------------------- torch's ways with a module


@pytest.mark.parametrize("mode", ["sum", "mean", "none"])
def test_from_torch(mode):
    torch.manual_seed(0)
    layer = nn.Embedding(9, 4) if mode == "none" else nn.EmbeddingBag(9, 4, mode=mode)
    emb = TableBatchedEmbeddingBags.from_torch(layer, DECAY, charge="read")
    assert (emb.pooling, emb.charge, emb.update) == (mode, "read", DECAY)
    rows, offsets = torch.tensor([1, 2, 2, 8]), torch.tensor([0, 3, 3, 4])
    want = layer(rows) if mode == "none" else layer(rows, offsets[:-1])
    torch.testing.assert_close(emb(rows, offsets), want)


def test_from_torch_copies():
    layer = nn.EmbeddingBag(9, 4, mode="sum")
    emb = TableBatchedEmbeddingBags.from_torch(layer, UPDATE)
    emb(torch.arange(9), torch.tensor([0, 9])).sum().backward()
    assert (layer.weight != emb.weights["weight"]).all()
    emb.evict("weight", [1])  # drawn anew
    assert emb.weights["weight"][1].all()


def test_from_torch_keeps_the_dtype():
    emb = TableBatchedEmbeddingBags.from_torch(nn.EmbeddingBag(3, 2, mode="sum").bfloat16(), UPDATE)
    assert emb.weights["weight"].dtype == emb.tables[0].dtype == torch.bfloat16


CONVERSIONS = {
    "half": (lambda emb: emb.half(), torch.float16),
    "bfloat16": (lambda emb: emb.to(torch.bfloat16), torch.bfloat16),
    "to like": (lambda emb: emb.to(torch.empty(0, dtype=torch.float16)), torch.float16),
    "float": (lambda emb: emb.half().float(), torch.float32),
    "parent": (lambda emb: nn.Sequential(emb).bfloat16()[0], torch.bfloat16),
    "type": (lambda emb: emb.type(torch.bfloat16), torch.bfloat16),  # casts integers too
}


@pytest.mark.parametrize("layout", ["record", "split"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_changes_tables_and_leaves_state(name, fused, layout):
    convert, dtype = CONVERSIONS[name]
    emb = make(fused=fused, state_layout=layout)
    step(emb, *make_batch(0))
    before = snapshot(emb)
    assert convert(emb) is emb
    assert {p.dtype for p in emb.parameters()} == {t.dtype for t in emb.tables} == {dtype}
    after = snapshot(emb)
    for key in before:
        if key.startswith("weights."):
            intermediate = torch.float16 if name == "float" else dtype
            assert torch.equal(after[key], before[key].to(intermediate).to(dtype))
        else:
            assert_same({key: after[key]}, {key: before[key]})
    step(emb, *make_batch(1))
    assert emb.clock == 2
    assert emb.state["a"]["prev_iter"].max() == 2
    assert {p.dtype for p in emb.parameters()} == {dtype}
    moved = (emb.weights["a"] != after["weights.a"]).any(1)
    assert moved.tolist() == (emb.state["a"]["prev_iter"] == 2).tolist()


def asks_for_large_pages(tensor) -> bool:
    """Whether the middle of a tensor's memory was given the advice."""
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            name, *values = line.split()
            if "-" in name and ":" not in name:
                begin, end = (int(address, 16) for address in name.split("-"))
                inside = begin <= middle < end
            elif inside and name == "VmFlags:":
                return "hg" in values
    return False


@pytest.mark.host_only
@pytest.mark.parametrize("convert", [lambda emb: emb, *(c for c, _ in CONVERSIONS.values())])
def test_tables_and_state_lie_in_large_pages(convert):
    probe = torch.empty(2**22)
    if not coldrow._core.advise_huge_pages(probe) or not asks_for_large_pages(probe):
        pytest.skip("this system has none, or does not say")
    emb = convert(TableBatchedEmbeddingBags([Table("a", 2**20, 8)], UPDATE))
    assert asks_for_large_pages(emb.weights["a"])
    assert asks_for_large_pages(emb.state["a"]["prev_iter"])
    assert not asks_for_large_pages(torch.zeros(2**24))  # (never from memory used before)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda emb: pickle.loads(pickle.dumps(emb)),
    "torch.save": saved,
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", COPIES)
def test_copy_goes_on_bit_for_bit_and_shares_nothing(how, fused):
    update = coldrow.RowUpdate(
        UPDATE.optimizer,
        coldrow.EpochGated(coldrow.CumulativeLinear(half_life=2.0)),
        coldrow.Stochastic(seed=3),
        decay_state=True,
    )
    emb = make(update, dtype=torch.bfloat16, charge="read", fused=fused, on_nonfinite="propagate")
    for seed in range(3):
        step(emb, *make_batch(seed))
    emb.new_epoch()
    emb.clock = 7
    emb.lr = 0.05
    emb.grad_scale = 2.0
    emb.nonfinite_rows = 4
    other = COPIES[how](emb)
    before = snapshot(emb)
    for seed in range(3, 6):
        step(other, *make_batch(seed))
    assert_same(snapshot(emb), before)
    for seed in range(3, 6):
        step(emb, *make_batch(seed))
    assert_same(snapshot(other), snapshot(emb))
    assert (other.clock, other.lr, other.grad_scale, other.nonfinite_rows) == (10, 0.05, 2.0, 4)
    assert other.optimizer is not emb.optimizer


def test_copy_takes_along_what_was_assigned_to_a_group():
    emb = make()
    emb.param_groups[0]["lr"] = 0.75
    assert copy.deepcopy(emb).lr == pickle.loads(pickle.dumps(emb)).lr == emb.lr == 0.75


def test_copy_with_a_forward_outstanding():
    emb = make()
    out = emb(*make_batch())
    other = copy.deepcopy(emb)
    step(other, *make_batch())
    assert (emb.clock, other.clock) == (0, 1)
    out.sum().backward()
    assert emb.clock == 1


def test_deepcopy_needs_no_picklable_initialiser():
    emb = TableBatchedEmbeddingBags([Table("a", 3, 2, init=lambda w: w.fill_(1.0))], UPDATE)
    other = copy.deepcopy(emb)
    other.evict("a", [0])
    assert (other.weights["a"] == 1).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("charge", ["touch", "read"])
def test_model_with_an_mlp_and_adam_learns(charge, fused):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = make(
                coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.02), UPDATE.decay),
                charge=charge,
                fused=fused,
            )
            self.mlp = nn.Sequential(nn.Linear(14, 16), nn.ReLU(), nn.Linear(16, 1))

        def forward(self, indices, offsets):
            return self.mlp(self.emb(indices, offsets)).squeeze(1)

    model = Model()
    dense = model.mlp.parameters() if not fused else model.parameters()
    adam = torch.optim.Adam(dense, lr=0.01)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(60):
        rows = np.stack([rng.integers(0, TABLES[table][0], 32) for table in FEATURES])
        label = torch.tensor((rows[0] + rows[2]) % 2, dtype=torch.float32)
        out = model(torch.tensor(rows.reshape(-1)), torch.arange(3 * 32 + 1))
        loss = F.binary_cross_entropy_with_logits(out, label)
        model.zero_grad()
        loss.backward()
        adam.step()
        if not fused:
            model.emb.step()
        losses.append(loss.item())
    assert model.emb.clock == 60
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_parameters_are_named_after_the_tables():
    emb = make()
    assert [name for name, _ in emb.named_parameters()] == ["weights.a", "weights.b"]
    assert emb.features == ["a1", "a2", "b"]
    assert "a: 9 x 4 float32, features=['a1', 'a2']" in repr(emb)


def test_cpu_checks_need_no_check():
    for validate, charge in itertools.product(("deferred", "sync"), ("touch", "read")):
        emb = make(validate=validate, charge=charge)
        with pytest.raises(IndexError):
            emb(torch.tensor([99]), torch.tensor([0, 1, 1, 1]))
        assert emb.check() is None


def test_building_under_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="could never be trained"):
        make()


def test_compiled_model_breaks_its_graph_around_the_tables():
    emb = make()
    model = torch.compile(lambda *batch: emb(*batch).sum() * 2, backend="eager")
    model(*make_batch()).backward()
    assert emb.clock == 1


# ------------------------------------------------------------------- what an audit of the module found


def test_tables_put_in_place_of_others_are_noticed():
    emb = small()
    state = {k: v.clone() for k, v in emb.weights.state_dict().items()}
    emb.weights.load_state_dict(state, assign=True)
    emb(ONE, BAGS).sum().backward()
    assert not torch.equal(emb.weights["a"], torch.ones(6, 4))


def test_functional_call_is_refused():
    with pytest.raises(TypeError, match="weights: got tables that are not Parameters"):
        torch.func.functional_call(small(), {"weights.a": torch.zeros(6, 4)}, (ONE, BAGS))


def test_lazily_negated_inputs_mean_what_they_say():
    weights = torch.tensor([1.0, 2.0, 3.0])
    emb = small().eval()
    negated = emb(ONE, BAGS, per_sample_weights=torch._neg_view(weights))
    assert torch.equal(negated, -emb(ONE, BAGS, per_sample_weights=weights))
    emb = small()
    emb(ONE, BAGS).backward(torch._neg_view(torch.ones(2, 4)))
    assert (emb.weights["a"][1] > 1).all()  # the gradient was -1


def test_the_default_device_stays_outside():
    emb = small()
    with torch.device("meta"):
        assert emb.read("a").device.type == "cpu"
        emb(ONE, BAGS).sum().backward()
        emb.evict("a", torch.tensor([0], device="cpu"))
    assert emb.clock == 1


def test_share_memory_shares_the_clock_too():
    emb = small()
    emb.share_memory()
    assert all(t.is_shared() for t in (*emb.parameters(), *emb.buffers()))
    emb.lr = 0.5
    lr = emb.table_batch.counters.lr
    assert emb.param_groups[0]["lr"].data_ptr() == lr.data_ptr()
    assert float(emb.param_groups[0]["lr"]) == 0.5


def test_fused_tables_in_a_sparse_optimizer():
    with pytest.raises(ValueError, match="fused module"):
        coldrow.optim.SparseOptimizer(small().parameters(), coldrow.RowUpdate())
