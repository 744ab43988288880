"""TableBatchedEmbeddingBags: what it returns, what it trains, and what it leaves alone."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
import weakref

import numpy as np
import pytest

import coldrow
import coldrow.optim

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

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


# ------------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pooled_forward_equals_torch(pooling, dtype, fused):
    emb = make(pooling=pooling, fused=fused)
    batch = make_batch(dtype=dtype)
    empty = (batch[1].diff() == 0).view(3, 3).T  # [bag, feature]
    assert empty.any()
    out = emb(*batch)
    assert out.shape == (3, 4 + 4 + 6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.cat(torch_bags(emb.weights, *batch, pooling), 1))
    for f, part in enumerate(out.split([4, 4, 6], 1)):
        assert not part[empty[:, f]].any()
        assert part[~empty[:, f]].all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
def test_weighted_forward_equals_torch(weights, fused):
    emb, batch = make(fused=fused), make_batch()
    psw = torch.linspace(-1, 1, batch[0].numel()).to(weights)
    want = torch.cat(torch_bags(emb.weights, *batch, psw=psw.float()), 1)
    torch.testing.assert_close(emb(*batch, psw), want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unpooled_forward_equals_torch(dtype):
    batch = make_batch(dtype=dtype)
    emb = make(pooling="none", dims={"a": 5, "b": 5})
    parts = [
        F.embedding(i, emb.weights[table])
        for table, (i, _, _) in zip(FEATURES, per_feature(*batch), strict=True)
    ]
    assert torch.equal(emb(*batch), torch.cat(parts))


def test_unpooled_forward_of_different_widths_gives_one_tensor_per_feature():
    emb, batch = make(pooling="none"), make_batch()
    out = emb(*batch)
    assert [part.shape[1] for part in out] == [4, 4, 6]
    for part, table, (i, _, _) in zip(out, FEATURES, per_feature(*batch), strict=True):
        assert torch.equal(part, F.embedding(i, emb.weights[table]))


@pytest.mark.parametrize("output", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_output_dtype(pooling, dtype, output):
    emb = make(dtype=dtype, output_dtype=output, pooling=pooling, dims={"a": 4, "b": 4})
    batch = make_batch()
    out = emb(*batch)
    assert out.dtype == output
    weights = {name: p.float() for name, p in emb.weights.items()}
    want = torch.cat(torch_bags(weights, *batch), 1)
    if pooling == "none":
        parts = zip(FEATURES, per_feature(*batch), strict=True)
        want = torch.cat([weights[table][i] for table, (i, _, _) in parts])
    torch.testing.assert_close(out, want.to(output))
    out.sum().backward()
    assert emb.clock == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
@pytest.mark.parametrize("bags", [(2, 5, 1), (0, 3, 2), (1, 0, 0)])
def test_batch_sizes_equal_a_loop_over_the_features(bags, pooling, fused):
    emb = make(pooling=pooling, fused=fused, dims={"a": 4, "b": 4} if pooling == "none" else None)
    batch = make_batch(seed=3, bags=bags)
    out = emb(*batch, batch_sizes=bags)
    if pooling == "none":
        parts = zip(FEATURES, per_feature(*batch, bags), strict=True)
        want = torch.cat([emb.weights[table][i] for table, (i, _, _) in parts])
    else:
        parts = torch_bags(emb.weights, *batch, pooling, bags=bags)
        want = torch.cat([part.reshape(-1) for part in parts])  # flat, feature-major
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_equal_batch_sizes_train_as_no_batch_sizes(pooling):
    one, other = make(pooling=pooling), make(pooling=pooling)
    for seed in range(3):
        batch = make_batch(seed)
        flat = one(*batch, batch_sizes=[3, 3, 3])
        plain = other(*batch)
        if pooling == "sum":
            split = flat.split([12, 12, 18])
            flat = torch.cat([p.view(3, -1) for p in split], 1)
        for out in (flat, plain):
            parts = out if isinstance(out, list) else [out]
            sum(p.square().sum() for p in parts).backward()
    assert_same(snapshot(one), snapshot(other))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_empty_batch(pooling, fused):
    emb = make(pooling=pooling, fused=fused)
    before = copies(emb)
    out = emb(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    parts = out if isinstance(out, list) else [out]
    assert [p.shape[0] for p in parts] == [0] * len(parts)
    sum(p.sum() for p in parts).backward()
    if not fused:
        emb.step()
    assert emb.clock == 1
    assert_same(copies(emb), before)


def test_batch_of_empty_bags():
    emb = make()
    before = copies(emb)
    out = emb(torch.empty(0, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 14))
    out.sum().backward()
    assert emb.clock == 1
    assert_same(copies(emb), before)


def test_arguments_that_are_not_contiguous_are_read_as_they_are():
    emb, (indices, offsets) = make(), make_batch()
    want = emb(indices, offsets).detach().clone()
    wide = [x.repeat_interleave(2)[::2] for x in (indices, offsets)]
    assert not wide[0].is_contiguous()
    assert torch.equal(emb.eval()(*wide), want)


def test_init():
    def ramp(weight):
        weight.copy_(torch.arange(weight.numel()).view(weight.shape))

    torch.manual_seed(0)
    emb = TableBatchedEmbeddingBags(
        [Table("a", 3, 2, init=ramp), Table("b", 5000, 16), Table("c", 3, 2, init=nn.init.zeros_)]
    )
    assert emb.weights["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert 0.24 < emb.weights["b"].max() <= 0.25
    assert -0.25 <= emb.weights["b"].min() < -0.24
    assert not emb.weights["c"].any()


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


# -------------------------------------------------------------------------------- clock, lr, epochs


def test_clock_is_assignable_forwards():
    emb = make()
    emb.clock = 5
    emb.clock = torch.tensor(10)
    assert emb.clock == 10
    assert type(emb.clock) is int
    step(emb, *make_batch())
    assert emb.clock == emb.state["a"]["prev_iter"].max() == 11


def test_new_epoch_starts_at_the_next_step():
    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.0), coldrow.EpochReset())
    for charge in ("touch", "read"):
        emb = TableBatchedEmbeddingBags(
            [Table("a", 3, 2, init=nn.init.ones_)], update, charge=charge
        )

        def touch(*rows, emb=emb):
            emb(torch.tensor(rows), torch.tensor([0, len(rows)])).sum().backward()
            return emb.weights["a"][:, 0].tolist()

        assert touch(0, 1) == [1, 1, 1]
        assert touch(0) == [1, 1, 1]
        assert emb.epoch_start == 0
        emb.new_epoch()
        assert emb.epoch_start == 3
        seen = [0, 0, 1] if charge == "read" else [1, 1, 1]  # row 2 was never touched
        assert emb.read("a")[:, 0].tolist() == seen
        assert touch(0, 2) == [0, 1, 1]
        with torch.no_grad():
            emb.weights["a"][0] = 1
        assert touch(0, 1) == [1, 0, 1]


def applied_lr(emb) -> float:
    """The learning rate one step really uses."""
    before = emb.weights["a"].detach().clone()
    emb(torch.tensor([0]), torch.tensor([0, 1])).sum().backward()
    emb.optimizer.step()
    if not emb.fused:
        emb.zero_grad()
    return float((before - emb.weights["a"].detach())[0, 0])


def make_measurable(fused=True, lr=0.5) -> TableBatchedEmbeddingBags:
    plain = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=lr, eps=0.0, ema_beta=0.0))
    return TableBatchedEmbeddingBags([Table("a", 2, 3, init=nn.init.zeros_)], plain, fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_lr_takes_effect_at_the_next_step(fused):
    emb = make_measurable(fused)
    assert emb.lr == 0.5
    assert applied_lr(emb) == pytest.approx(0.5)
    emb.lr = 0.25
    assert emb.lr == emb.param_groups[0]["lr"] == 0.25
    assert applied_lr(emb) == pytest.approx(0.25)
    emb.param_groups[0]["lr"] = 0.125
    assert emb.lr == 0.125
    assert applied_lr(emb) == pytest.approx(0.125)
    emb.param_groups[0]["lr"].fill_(2.0)
    assert emb.lr == 2.0
    assert applied_lr(emb) == pytest.approx(2.0)
    emb.lr = torch.tensor(0.75)
    assert applied_lr(emb) == pytest.approx(0.75)


SCHEDULERS = {
    "step": (lambda o: lr_scheduler.StepLR(o, 2, 0.5), [1, 1, 0.5, 0.5, 0.25]),
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)), [1, 1 / 2, 1 / 3, 1 / 4]),
    "cosine": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
        [(1 + np.cos(np.pi * k / 4)) / 2 for k in range(5)],
    ),
    "warm-up": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 10), lr_scheduler.ExponentialLR(o, 0.5)], [2]
        ),
        [0.1, 0.1, 1, 0.5, 0.25],
    ),
}


@pytest.mark.filterwarnings("error:Detected call of")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_schedulers(name, fused):
    if name == "warm-up" and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch < 2.10: SequentialLR loses a learning rate that is a tensor")
    make_scheduler, factors = SCHEDULERS[name]
    emb = make_measurable(fused)
    scheduler = make_scheduler(emb.optimizer)
    used = []
    for _ in factors:
        used.append(applied_lr(emb))
        scheduler.step()
    np.testing.assert_allclose(used, 0.5 * np.array(factors), rtol=1e-6, atol=1e-7)
    assert emb.clock == len(factors)  # optimizer.step() after a fused backward is no second step


def test_scheduler_on_plateau():
    emb = make_measurable()
    scheduler = lr_scheduler.ReduceLROnPlateau(emb.optimizer, factor=0.1, patience=0)
    for _ in range(2):
        scheduler.step(1.0)
    assert applied_lr(emb) == pytest.approx(0.05)


def test_optimizer_handle_survives_its_own_state_dict():
    emb = make_measurable()
    handle = emb.optimizer
    state = copy.deepcopy(handle.state_dict())
    emb.lr = 0.125
    handle.load_state_dict(state)
    assert emb.lr == 0.5
    handle.param_groups[0]["lr"] = 0.25
    assert applied_lr(emb) == pytest.approx(0.25)


def test_param_groups_hold_the_tables_of_each_update():
    fast = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5))
    tables = [Table("a", 2, 2), Table("b", 2, 2, update=fast), Table("c", 2, 2)]
    emb = TableBatchedEmbeddingBags(tables, UPDATE)
    names = {id(p): name for name, p in emb.weights.items()}
    groups = [([names[id(p)] for p in g["params"]], float(g["lr"])) for g in emb.param_groups]
    assert groups == [(["a", "c"], 0.1), (["b"], 0.5)]
    emb.param_groups[1]["lr"] = 0.25
    before = copies(emb)
    emb(torch.tensor([0, 0, 0]), torch.arange(4)).sum().backward()
    grown = {
        name: float((before[name] - p.detach())[0].abs().sum()) for name, p in emb.weights.items()
    }
    assert grown["a"] != grown["b"]
    emb.lr = 1.0  # for all
    assert [float(g["lr"]) for g in emb.param_groups] == [1.0, 1.0]


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


def test_building_under_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="could never be trained"):
        make()


def test_compiled_model_breaks_its_graph_around_the_tables():
    emb = make()
    model = torch.compile(lambda *batch: emb(*batch).sum() * 2, backend="eager")
    model(*make_batch()).backward()
    assert emb.clock == 1


# ------------------------------------------------------------------- what an audit of the module found


def small(dtype=torch.float32, **options):
    init = nn.init.ones_
    return TableBatchedEmbeddingBags(
        [Table("a", 6, 4, dtype=dtype, init=init)],
        coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1, ema_beta=0.0)),
        **options,
    )


ONE, BAGS = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])


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
    tensors = [
        emb._clock,
        emb._epoch_start,
        *emb._lr,
        *emb.weights.values(),
        *emb.state["a"].values(),
    ]
    assert all(t.is_shared() for t in tensors)
    emb.lr = 0.5
    assert emb.param_groups[0]["lr"] is emb._lr[0]


def test_unfused_evict_between_forward_and_backward():
    emb = small(fused=False)
    out = emb(ONE, BAGS)
    emb.evict("a", [1, 2, 3])
    with pytest.raises(RuntimeError, match="evicted from"):
        out.sum().backward()


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


def test_an_epoch_that_nobody_declared_is_mentioned_once():
    emb = TableBatchedEmbeddingBags(
        [Table("a", 6, 4)], coldrow.RowUpdate(decay=coldrow.EpochGated.for_epoch(10))
    )
    with pytest.warns(UserWarning, match=r"new_epoch\(\) was never called"):
        emb(ONE, BAGS).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emb(ONE, BAGS).sum().backward()


def test_a_scheduler_of_a_fused_module_does_not_warn():
    emb = small()
    scheduler = torch.optim.lr_scheduler.StepLR(emb.optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        emb(ONE, BAGS).sum().backward()
        scheduler.step()
    assert emb.lr == 0.05


def test_fused_tables_in_a_sparse_optimizer():
    with pytest.raises(ValueError, match="fused module"):
        coldrow.optim.SparseOptimizer(small().parameters(), coldrow.RowUpdate())


def test_evict_of_more_rows_than_there_are():
    """Rows may be named twice."""
    emb = small()
    emb.evict("a", [0, 1, 2, 3, 4, 5, 0, 1])
    assert torch.equal(emb.weights["a"], torch.ones(6, 4))
