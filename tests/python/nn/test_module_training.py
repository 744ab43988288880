"""TableBatchedEmbeddingBags: what it trains, fused and unfused, and what it leaves alone."""

from __future__ import annotations

import copy
import weakref

import pytest

import coldrow
import coldrow.optim

torch = pytest.importorskip("torch")
from module_cases import (  # noqa: E402
    BAGS,
    DECAY,
    FEATURES,
    NAN,
    ONE,
    TABLES,
    UPDATE,
    assert_same,
    copies,
    make,
    make_batch,
    per_feature,
    small,
    snapshot,
    step,
    torch_bags,
)
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

# ----------------------------------------------------------------------------------------- training


def dense_step(weights, state, grads, step, update=UPDATE) -> None:
    """The update of touched rows in float64; ``grads``: a dense gradient and the rows, by table."""
    o = update.optimizer
    for name, (grad, rows) in grads.items():
        for r in rows:
            v, last = state[name][r]
            gap = step - last if last else 1
            shrink = max(0.1, 1 - min(1, o.lr * update.decay.alpha * gap))
            v = o.ema_beta * v + (1 - o.ema_beta) * float(grad[r].square().mean())
            weights[name][r] = shrink * weights[name][r] - o.lr / (v**0.5 + o.eps) * grad[r]
            state[name][r] = (v, step)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("pooling", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
def test_training_equals_the_formula(pooling, weighted, fused):
    emb = make(pooling=pooling, fused=fused)
    weights = {name: p.double() for name, p in copies(emb).items()}
    state = {name: {r: (0.0, 0) for r in range(TABLES[name][0])} for name in TABLES}
    for t in range(1, 13):
        indices, offsets = make_batch(seed=t, bags=(1, 1, 1))  # few rows: gaps
        psw = torch.linspace(0.5, 2, indices.numel()) if weighted else None
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        double = None if psw is None else psw.double()
        outs = torch_bags(leaves, indices, offsets, pooling, double, bags=(1, 1, 1))
        sum(out.square().sum() for out in outs).backward()
        touched = {name: set() for name in TABLES}
        for table, (i, _, _) in zip(
            FEATURES, per_feature(indices, offsets, (1, 1, 1)), strict=True
        ):
            touched[table] |= set(i.tolist())
        grads = {name: (leaf.grad, touched[name]) for name, leaf in leaves.items() if touched[name]}
        dense_step(weights, state, grads, t)
        emb(indices, offsets, psw).square().sum().backward()
        if not fused:
            emb.step()
            emb.zero_grad()
    for name, p in emb.weights.items():
        torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-4, atol=1e-5)
        assert emb.state[name]["prev_iter"].tolist() == [last for _, last in state[name].values()]


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("pooling", ["sum", "none"])
@pytest.mark.parametrize("update", [UPDATE, DECAY])
def test_fused_and_unfused_give_the_same_bits(update, pooling, charge):
    fused = make(update, pooling=pooling, charge=charge)
    unfused = make(update, pooling=pooling, charge=charge, fused=False)
    for seed in range(6):
        for emb in (fused, unfused):
            step(emb, *make_batch(seed))
    assert_same(snapshot(fused), snapshot(unfused))


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize(("pooling", "weighted"), [("sum", True), ("mean", False)])
def test_fused_and_unfused_agree_where_gradients_are_scaled(pooling, weighted, charge):
    """The fused sum takes the scale into an fma; a sparse gradient is rounded first."""
    pair = [make(DECAY, pooling=pooling, charge=charge, fused=fused) for fused in (True, False)]
    for seed in range(6):
        batch = make_batch(seed)
        psw = torch.linspace(0.1, 2, batch[0].numel()) if weighted else None
        for emb in pair:
            step(emb, *batch, per_sample_weights=psw)
    one, other = map(snapshot, pair)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("fused", [True, False])
def test_gradient_of_per_sample_weights_equals_torch(fused, charge):
    emb = make(DECAY, fused=fused, charge=charge)
    for seed in range(4):
        step(emb, *make_batch(seed))
    for seed in range(4, 7):
        batch = make_batch(seed)
        read = {name: emb.read(name) for name in emb.weights}  # rows as the forward sees them
        ours = torch.linspace(-1, 1, batch[0].numel(), requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        emb(*batch, ours).square().sum().backward()
        sum(o.square().sum() for o in torch_bags(read, *batch, psw=theirs)).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
        if not fused:
            emb.step()
            emb.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_gradient_of_per_sample_weights_has_their_dtype(dtype, fused):
    emb, batch = make(fused=fused), make_batch()
    psw = torch.ones(batch[0].numel(), dtype=dtype, requires_grad=True)
    emb(*batch, psw).sum().backward()
    assert psw.grad.dtype == dtype
    assert psw.grad.count_nonzero() == batch[0].numel()


def test_gradient_of_per_sample_weights_in_eval_mode():
    emb, batch = make().eval(), make_batch()
    before = snapshot(emb)
    psw = torch.ones(batch[0].numel(), requires_grad=True)
    emb(*batch, psw).sum().backward()
    rows = torch.cat(
        [
            emb.weights[table][i].sum(1)
            for table, (i, _, _) in zip(FEATURES, per_feature(*batch), strict=True)
        ]
    )
    torch.testing.assert_close(psw.grad, rows)
    assert_same(snapshot(emb), before)


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("fused", [True, False])
def test_evaluation_changes_nothing(fused, charge):
    emb = make(DECAY, fused=fused, charge=charge)
    step(emb, *make_batch(0))
    before = snapshot(emb)
    emb.eval()
    first = emb(*make_batch(1))
    for _ in range(3):
        assert torch.equal(emb(*make_batch(1)), first)
    emb.train()
    with torch.no_grad():
        assert torch.equal(emb(*make_batch(1)), first)
    with torch.inference_mode():
        assert torch.equal(emb(*make_batch(1)), first)
    emb.read("a")
    assert_same(snapshot(emb), before)
    assert emb.clock == 1


def test_a_forward_does_not_tick_and_a_backward_ticks_once():
    emb = make()
    for n in range(3):
        out = emb(*make_batch(n))
        assert emb.clock == n
        out.sum().backward()
        assert emb.clock == n + 1
    assert emb.state["a"]["prev_iter"].max() == 3


def test_evaluations_between_steps_do_not_age_rows():
    one, other = make(DECAY, charge="read"), make(DECAY, charge="read")
    for seed in range(4):
        step(one, *make_batch(seed))
        step(other, *make_batch(seed))
        with torch.no_grad():
            for _ in range(5):
                other(*make_batch(9))
    assert_same(snapshot(one), snapshot(other))


def test_read_charged_forward_is_the_decayed_row():
    emb = make(
        coldrow.RowUpdate(UPDATE.optimizer, coldrow.Exponential(half_life=2.0)), charge="read"
    )
    with torch.no_grad():
        emb.weights["b"].fill_(1.0)
    emb.state["b"]["prev_iter"].copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6]))
    emb.clock = 6  # the next step is 7: gaps of 7 - 1 - prev_iter have passed, none for row 0
    indices = torch.arange(7)
    offsets = torch.cat([torch.zeros(15, dtype=torch.int64), torch.arange(1, 8)])
    with torch.no_grad():
        out = emb(indices, offsets)[:, 8]
    want = torch.tensor([1.0] + [2 ** (-(6 - k) / 2) for k in range(1, 7)])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(emb.read("b")[:, 0], want)
    assert (emb.weights["b"] == 1).all()


def test_second_forward_passes_once_the_first_is_dropped():
    emb = make()
    out = emb(*make_batch(0))
    dead = weakref.ref(out.grad_fn)
    with pytest.raises(RuntimeError, match="waiting for its backward"):
        emb(*make_batch(1))
    del out
    assert dead() is None
    emb(*make_batch(1)).sum().backward()
    assert emb.clock == 1


def test_forwards_that_will_not_be_trained_pass_while_one_is_outstanding():
    emb = make()
    out = emb(*make_batch(0))
    with torch.no_grad():
        emb(*make_batch(1))
    emb.eval()
    emb(*make_batch(1))
    emb.train()
    out.sum().backward()
    assert emb.clock == 1


def test_a_run_goes_on_after_a_backward_that_raised():
    emb = make(on_nonfinite="raise")
    out = emb(*make_batch(0))
    with pytest.raises(ValueError, match="is not finite"):
        out.backward(torch.full_like(out, NAN))
    assert emb.clock == 0
    step(emb, *make_batch(0))
    assert emb.clock == 1


def test_fused_tables_get_no_grad():
    emb = make()
    step(emb, *make_batch(0))
    assert [p.grad for p in emb.parameters()] == [None, None]
    assert [p.requires_grad for p in emb.parameters()] == [False, False]
    assert [p.requires_grad for p in make(fused=False).parameters()] == [True, True]


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("fused", [True, False])
def test_activation_checkpointing_trains_the_same(fused, charge, how):
    plain, recomputed = (make(DECAY, fused=fused, charge=charge) for _ in range(2))
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(14, 8), nn.Tanh(), nn.Linear(8, 1))
    mlps = {plain: mlp, recomputed: copy.deepcopy(mlp)}
    for seed in range(4):
        for emb in (plain, recomputed):
            x = torch.full((1,), 1.5, requires_grad=True)  # reentrant mode wants an input with grad

            def run(x, indices, offsets, emb=emb):
                return mlps[emb](emb(indices, offsets) * x)

            if emb is plain:
                out = run(x, *make_batch(seed))
            else:
                out = checkpoint(run, x, *make_batch(seed), use_reentrant=how == "reentrant")
            out.square().sum().backward()
            if not fused:
                emb.step()
                emb.zero_grad()
    assert recomputed.clock == 4
    assert_same(snapshot(plain), snapshot(recomputed))
    assert_same(mlps[plain].state_dict(), mlps[recomputed].state_dict())


def test_gradient_accumulation():
    """Two forwards and one step are the step of the summed loss."""
    twice, once = make(fused=False), make(fused=False)
    first, second = make_batch(0), make_batch(1)
    twice(*first).square().sum().backward()
    twice(*second).square().sum().backward()
    assert twice.clock == 0
    twice.step()
    (once(*first).square().sum() + once(*second).square().sum()).backward()
    once.step()
    assert twice.clock == once.clock == 1
    assert twice.state["a"]["prev_iter"].max() == 1
    for name, p in twice.weights.items():
        torch.testing.assert_close(p, once.weights[name])


def test_accumulated_gradient_equals_one_batch_of_both():
    """[first, second] bag by bag is the same set of gradients."""
    twice, joined = make(fused=False), make(fused=False)
    halves = [make_batch(seed) for seed in (0, 1)]
    for half in halves:
        twice(*half).sum().backward()
    twice.step()
    parts = [list(per_feature(*half)) for half in halves]
    indices = torch.cat([i for pair in zip(*parts, strict=True) for i, _, _ in pair])
    lengths = torch.cat([o.diff() for pair in zip(*parts, strict=True) for _, o, _ in pair])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    joined(indices, offsets).sum().backward()
    joined.step()
    for name, p in twice.weights.items():
        torch.testing.assert_close(p, joined.weights[name])


def test_step_keeps_gradients_until_zero_grad():
    emb = make(fused=False)
    emb(*make_batch()).sum().backward()
    grad = emb.weights["a"].grad.to_dense()
    emb.step()
    assert torch.equal(emb.weights["a"].grad.to_dense(), grad)
    emb.zero_grad()
    before = copies(emb)
    emb.step()
    assert emb.clock == 2
    assert_same(copies(emb), before)


def test_gradients_can_be_clipped_before_the_step():
    emb, same = make(fused=False), make(fused=False)
    emb(*make_batch()).mul(8).sum().backward()
    for p in emb.parameters():
        p.grad *= 0.125
    emb.step()
    same(*make_batch()).sum().backward()
    same.step()
    assert_same(snapshot(emb), snapshot(same))


def test_grad_scaler():
    emb, plain = make(fused=False), make(fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        scaler.scale(emb(*make_batch(seed)).sum()).backward()
        scaler.step(emb.optimizer)
        scaler.update()
        emb.zero_grad()
        plain(*make_batch(seed)).sum().backward()
        plain.step()
        plain.zero_grad()
    assert_same(snapshot(emb), snapshot(plain))


def test_frozen_table_of_an_unfused_module():
    emb = make(fused=False)
    emb.weights["b"].requires_grad_(False)
    before = copies(emb)
    step(emb, *make_batch())
    assert torch.equal(emb.weights["b"], before["b"])
    assert not torch.equal(emb.weights["a"], before["a"])


def test_grad_scale():
    scaled, plain = make(), make()
    scaled.grad_scale = 1024.0
    for seed in range(3):
        step(scaled, *make_batch(seed), scale=1024.0)
        step(plain, *make_batch(seed))
    assert_same(snapshot(scaled), snapshot(plain))


def test_shared_table_sums_over_its_features():
    torch.manual_seed(0)
    shared = TableBatchedEmbeddingBags([Table("a", 9, 4, features=["x", "y"])], UPDATE)
    torch.manual_seed(0)
    single = TableBatchedEmbeddingBags([Table("a", 9, 4)], UPDATE)
    shared(torch.tensor([3, 5, 3, 7]), torch.tensor([0, 2, 4])).sum().backward()
    single(torch.tensor([3, 5, 3, 7]), torch.tensor([0, 2, 4])).sum().backward()
    assert_same(snapshot(shared), snapshot(single))
    assert shared.state["a"]["prev_iter"].tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("fused", [True, False])
def test_table_with_its_own_update(fused):
    tables = [Table("a", 9, 4), Table("b", 9, 4, update=DECAY)]
    torch.manual_seed(0)
    both = TableBatchedEmbeddingBags(tables, UPDATE, fused=fused)
    singles = [
        TableBatchedEmbeddingBags([Table(t.name, 9, 4)], t.update or UPDATE, fused=fused)
        for t in tables
    ]
    for single in singles:
        name = single.tables[0].name
        with torch.no_grad():
            single.weights[name].copy_(both.weights[name])
    for rows in ([1, 2], [1, 3], [4, 4], [1, 2]):
        step_rows = torch.tensor(rows)
        out = both(torch.cat([step_rows, step_rows]), torch.arange(5))
        out.square().sum().backward()
        if not fused:
            both.step()
            both.zero_grad()
        for single in singles:
            single(step_rows, torch.arange(3)).square().sum().backward()
            if not fused:
                single.step()
                single.zero_grad()
    for single in singles:
        name = single.tables[0].name
        assert torch.equal(both.weights[name], single.weights[name])
        assert_same(both.state[name], single.state[name])


def test_state_layouts_give_the_same_bits():
    record, split = make(DECAY, charge="read"), make(DECAY, charge="read", state_layout="split")
    assert record.state["a"]["prev_iter"].stride() == (2,)
    assert split.state["a"]["prev_iter"].stride() == (1,)
    pointers = [record.state["a"][n].data_ptr() for n in ("prev_iter", "momentum1")]
    assert abs(pointers[0] - pointers[1]) == 4  # one record of 8 bytes
    for seed in range(5):
        step(record, *make_batch(seed))
        step(split, *make_batch(seed))
    assert_same(snapshot(record), snapshot(split))


# ------------------------------------------------------------------- what an audit of the module found


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch < 2.10")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_16_bit_tables_accumulate_in_float32(dtype):
    emb = small(dtype, fused=False)
    for _ in range(600):  # bfloat16 would stop counting at 256
        emb(torch.tensor([1]), torch.tensor([0, 1])).sum().backward()
    emb.step()
    assert emb.state["a"]["momentum1"][1] == 600.0**2


def test_grad_scale_divides_in_float32():
    emb = small(output_dtype=torch.float16)
    emb.grad_scale = 65536.0
    (emb(ONE, BAGS).float().sum() * (1e-8 * 65536.0)).backward()
    assert emb.state["a"]["momentum1"][1].item() == pytest.approx(1e-16, rel=1e-2)


def test_discard_forward():
    emb = small()
    kept = emb(ONE, BAGS).sum()
    with pytest.raises(RuntimeError, match=r"call discard_forward\(\)"):
        emb(ONE, BAGS)
    emb.discard_forward()
    emb(ONE, BAGS).sum().backward()
    with pytest.raises(RuntimeError, match="has had its backward"):
        kept.backward()
    assert emb.clock == 1
