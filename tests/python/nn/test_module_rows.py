"""TableBatchedEmbeddingBags: reading and evicting rows, live state, rows that are not finite."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from module_cases import (  # noqa: E402
    BAGS,
    DECAY,
    NAN,
    ONE,
    UPDATE,
    assert_same,
    copies,
    make,
    make_batch,
    small,
    snapshot,
    step,
)

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

# ---------------------------------------------------------------------------------- rows and state


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_is_what_a_forward_sees(dtype, charge):
    emb = make(DECAY, charge=charge, dtype=dtype, pooling="none", dims={"a": 4, "b": 4})
    for seed in range(5):
        step(emb, *make_batch(seed))
    emb.clock = 9
    before = snapshot(emb)
    rows = torch.tensor([4, 0, 4, 6])
    read = emb.read("b", rows)
    with torch.no_grad():
        forward = emb(rows, torch.tensor([0, 0, 0, 4]))
    assert torch.equal(read, forward)
    assert torch.equal(emb.read("b")[rows], read)
    assert torch.equal(emb.read("b", rows.int()), read)
    assert torch.equal(emb.read("b", [4, 0, 4, 6]), read)
    odd = np.frombuffer(b"." + rows.numpy().tobytes(), np.int64, offset=1)
    assert not odd.flags.aligned
    assert torch.equal(emb.read("b", odd), read)
    assert emb.read("b", []).shape == (0, 4)
    stored = emb.weights["b"].detach().float()[rows]
    assert torch.equal(read, stored) == (charge == "touch")
    assert_same(snapshot(emb), before)
    assert not read.requires_grad


def test_cold_rows():
    emb = make()
    for rows in ([0, 1, 2], [1], [2, 3]):
        emb(torch.tensor(rows), torch.tensor([0, len(rows), len(rows), len(rows)])).sum().backward()
    # clock 3; last touched at 1, 2, 3, 3, and never
    assert emb.cold_rows("a", 0).tolist() == list(range(9))
    assert emb.cold_rows("a", 1).tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert emb.cold_rows("a", 2).tolist() == [0, 4, 5, 6, 7, 8]
    assert emb.cold_rows("a", 3).tolist() == [4, 5, 6, 7, 8]
    assert emb.cold_rows("a", 4).tolist() == []
    assert emb.cold_rows("a", 1).dtype == torch.int64


@pytest.mark.parametrize("layout", ["record", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evict(dtype, layout):
    filled = []

    def init(weight):
        filled.append(tuple(weight.shape))
        weight.fill_(7.0)

    table = Table("a", 6, 4, dtype=dtype, init=init)
    emb = TableBatchedEmbeddingBags([table], UPDATE, state_layout=layout)
    emb(torch.arange(6), torch.tensor([0, 6])).sum().backward()
    before = snapshot(emb)
    emb.evict("a", [1, 4, 1])
    assert filled[0] == (6, 4)
    kept = [0, 2, 3, 5]
    assert (emb.weights["a"][[1, 4]] == 7).all()
    assert torch.equal(emb.weights["a"][kept], before["weights.a"][kept])
    for name, view in emb.state["a"].items():
        assert not view[[1, 4]].any()
        assert torch.equal(view[kept], before[f"state.a.{name}"][kept])
        assert view[kept].all()
    assert emb.clock == 1
    emb.evict("a", [])
    emb(torch.tensor([1]), torch.tensor([0, 1])).sum().backward()  # touched for the first time
    assert emb.state["a"]["prev_iter"].tolist() == [1, 2, 1, 1, 0, 1]


def test_evict_draws_anew():
    emb = make()
    torch.manual_seed(5)
    emb.evict("a", [2, 3])
    bound = 4**-0.5
    fresh = emb.weights["a"][[2, 3]]
    assert fresh.unique().numel() == 8
    assert fresh.abs().max() <= bound


@pytest.mark.parametrize("layout", ["record", "split"])
def test_state_bytes(layout):
    assert make(state_layout=layout).state_bytes() == 8 * (9 + 7)


@pytest.mark.parametrize("layout", ["record", "split"])
def test_weights_and_state_are_live_and_writable(layout):
    emb = make(state_layout=layout)
    step(emb, *make_batch())
    assert set(emb.state) == {"a", "b"}
    views = emb.state["a"]
    assert {name: (v.dtype, v.shape) for name, v in views.items()} == {
        "prev_iter": (torch.int32, (9,)),
        "momentum1": (torch.float32, (9,)),
    }
    weight = emb.weights["a"]
    step(emb, *make_batch(1))
    assert weight is emb.weights["a"]
    assert views["prev_iter"].max() == 2  # seen through the views taken before
    with torch.no_grad():
        weight[0] = 5.0
    views["momentum1"][0], views["prev_iter"][0] = 4.0, 1
    emb.clock = 9
    emb(torch.tensor([0]), torch.tensor([0, 1, 1, 1])).sum().backward()
    v = 0.9 * 4.0 + 0.1
    want = (1 - 0.1 * 0.2 * (10 - 1)) * 5.0 - 0.1 / (v**0.5 + 1e-6)
    torch.testing.assert_close(weight[0].detach(), torch.full((4,), want))
    assert views["momentum1"][0].item() == pytest.approx(v)
    assert views["prev_iter"][0] == 10


@pytest.mark.parametrize("name", ["items", "type", "keys", "values", "weight", "training", "clock"])
def test_any_table_name(name):
    emb = TableBatchedEmbeddingBags([Table(name, 3, 2), Table("other", 3, 2)], UPDATE)
    before = copies(emb)
    emb(torch.tensor([1, 2]), torch.arange(3)).sum().backward()
    assert not torch.equal(emb.weights[name], before[name])
    assert emb.state[name]["prev_iter"].tolist() == [0, 1, 0]
    assert list(emb.weights) == list(emb.weights.keys()) == [name, "other"]
    assert len(list(emb.weights.values())) == len(emb.weights) == 2
    assert name in emb.weights
    fresh = TableBatchedEmbeddingBags([Table(name, 3, 2), Table("other", 3, 2)], UPDATE)
    fresh.load_state_dict(emb.state_dict())
    assert torch.equal(fresh.weights[name], emb.weights[name])
    assert torch.equal(copy.deepcopy(emb).half().weights[name], emb.weights[name].half())


# ---------------------------------------------------------------------------------- not finite


def poison(emb, value=NAN) -> None:
    """A step with a gradient for rows 1 and 2 of "a", row 2's not finite."""
    out = emb(torch.tensor([1, 2]), torch.tensor([0, 1, 2, 2, 2, 2, 2]))
    grad = torch.ones_like(out)
    grad[1, 0] = value
    out.backward(grad)
    if not emb.fused:
        emb.step()
        emb.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30])
def test_nonfinite_rows_are_skipped_and_counted(fused, value):
    emb = make(fused=fused)
    before = snapshot(emb)
    poison(emb, value)
    assert (emb.nonfinite_rows, emb.clock) == (1, 1)
    assert emb.state["a"]["prev_iter"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert emb.state["a"]["momentum1"].count_nonzero() == 1
    changed = (emb.weights["a"] != before["weights.a"]).any(1)
    assert changed.nonzero().flatten().tolist() == [1]
    poison(emb, value)
    assert emb.nonfinite_rows == 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [NAN, float("inf"), 1e30])
def test_nonfinite_rows_raise_and_nothing_changes(fused, value):
    emb = make(fused=fused, on_nonfinite="raise")
    before = snapshot(emb)
    with pytest.raises(ValueError, match=r"^grad: the update of row 2 .*is not finite .*accepted"):
        poison(emb, value)
    assert (emb.nonfinite_rows, emb.clock) == (0, 0)
    assert_same(snapshot(emb), before)


@pytest.mark.parametrize("fused", [True, False])
def test_nonfinite_rows_propagate(fused):
    emb = make(fused=fused, on_nonfinite="propagate")
    poison(emb)
    assert emb.weights["a"][2].isnan().all()
    assert emb.weights["a"][1].isfinite().all()
    assert emb.state["a"]["momentum1"][2].isnan()
    assert emb.state["a"]["prev_iter"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert (emb.nonfinite_rows, emb.clock) == (0, 1)


# ---------------------------------------------------------------------- torch's ways with a module


def test_evict_with_a_gradient_waiting():
    emb = make(fused=False)
    emb(*make_batch()).sum().backward()
    name = emb.tables[0].name
    before = emb.weights[name].detach().clone()
    with pytest.raises(RuntimeError, match=r"evict: table .* call step\(\) or zero_grad\(\) first"):
        emb.evict(name, [1])
    assert torch.equal(emb.weights[name], before)
    emb.zero_grad()
    emb.evict(name, [1])


# ------------------------------------------------------------------- what an audit of the module found


def test_unfused_evict_between_forward_and_backward():
    emb = small(fused=False)
    out = emb(ONE, BAGS)
    emb.evict("a", [1, 2, 3])
    with pytest.raises(RuntimeError, match="evicted from"):
        out.sum().backward()


def test_evict_of_more_rows_than_there_are():
    """Rows may be named twice."""
    emb = small()
    emb.evict("a", [0, 1, 2, 3, 4, 5, 0, 1])
    assert torch.equal(emb.weights["a"], torch.ones(6, 4))
