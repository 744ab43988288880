"""RowwiseRMSpropAR and SparseOptimizer on torch's own sparse embeddings."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer  # noqa: E402

ROWS, DIM = 12, 5
LAST = 2**31 - 1
UPDATE = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1, eps=1e-6, ema_beta=0.9),
    coldrow.LinearClipped(alpha=0.2, min_shrinkage=0.3),
)


def make_embedding(seed: int = 0, dtype=torch.float32) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(ROWS, DIM, sparse=True).to(dtype)


def make_bag(seed: int = 0, mode: str = "sum") -> nn.EmbeddingBag:
    torch.manual_seed(seed)
    return nn.EmbeddingBag(ROWS, DIM, sparse=True, mode=mode)


def batches(steps: int, seed: int = 1) -> list[torch.Tensor]:
    """Index tensors [4, 3] with many duplicates."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(ROWS, (4, 3), generator=generator) for _ in range(steps)]


def loss_of(layer: nn.Module, indices: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs from row to row and from step to step."""
    out = layer(indices).float()
    scale = torch.linspace(-1, 2, out.numel()).view(out.shape)
    return (out * scale).sum() + out.square().sum()


def train(optimizer, layer, steps) -> None:
    for indices in steps:
        optimizer.zero_grad()
        loss_of(layer, indices).backward()
        optimizer.step()


def sparse(rows: list[int], values: torch.Tensor) -> torch.Tensor:
    """A gradient as torch's embeddings make them: duplicates are not summed."""
    index = torch.tensor([rows])
    return torch.sparse_coo_tensor(index, values, (ROWS, DIM), check_invariants=False)


def assert_equal_state(one: dict, other: dict) -> None:
    """Bit for bit, dtypes included."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


# ------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("layer", [make_embedding, make_bag])
def test_equals_apply_by_hand(layer):
    ours, hand = layer(), layer()
    optimizer = SparseOptimizer(ours.parameters(), UPDATE)
    weight = hand.weight
    state = coldrow.init_state(UPDATE, ROWS, DIM, like=weight)
    for step, indices in enumerate(batches(6), start=1):
        train(optimizer, ours, [indices])
        (grad,) = torch.autograd.grad(loss_of(hand, indices), [weight])
        with torch.no_grad():
            coldrow.apply_(
                UPDATE, weight, grad._values(), grad._indices()[0].contiguous(), state, step=step
            )
        assert torch.equal(ours.weight, weight)
        assert_equal_state(optimizer.state[ours.weight], state)
    assert optimizer.clock == 6


def test_equals_the_formula():
    layer = make_embedding()
    optimizer = RowwiseRMSpropAR(
        layer.parameters(), lr=0.1, ar_alpha=0.2, eps=1e-6, ema_beta=0.9, min_shrinkage=0.3
    )
    w = layer.weight.detach().double().numpy().copy()
    v, last = np.zeros(ROWS), np.zeros(ROWS, int)
    for step, indices in enumerate(batches(40), start=1):
        train(optimizer, layer, [indices[:1]])  # three of the twelve rows: gaps
        g = layer.weight.grad.to_dense().double().numpy()
        for r in set(indices[0].tolist()):
            gap = step - last[r] if last[r] else 1
            shrink = max(0.3, 1 - min(1, 0.1 * 0.2 * gap))
            v[r] = 0.9 * v[r] + 0.1 * np.mean(g[r] ** 2)
            w[r] = shrink * w[r] - 0.1 / (np.sqrt(v[r]) + 1e-6) * g[r]
            last[r] = step
    np.testing.assert_allclose(layer.weight.detach(), w, rtol=2e-5, atol=2e-6)
    state = optimizer.state[layer.weight]
    np.testing.assert_allclose(state["momentum1"], v, rtol=1e-5)
    assert state["prev_iter"].tolist() == last.tolist()


def test_the_two_optimizers_agree():
    one, other = make_embedding(), make_embedding()
    train(SparseOptimizer(one.parameters(), UPDATE), one, batches(5))
    options = {"lr": 0.1, "ar_alpha": 0.2, "eps": 1e-6, "ema_beta": 0.9, "min_shrinkage": 0.3}
    train(RowwiseRMSpropAR(other.parameters(), **options), other, batches(5))
    assert torch.equal(one.weight, other.weight)


def test_duplicates_of_an_uncoalesced_gradient_are_summed_first():
    one, other = make_embedding(), make_embedding()
    values = torch.arange(4.0 * DIM).view(4, DIM)
    one.weight.grad = sparse([3, 7, 3, 3], values)
    other.weight.grad = sparse([3, 7], torch.stack([values[0] + values[2] + values[3], values[1]]))
    for layer in (one, other):
        assert not layer.weight.grad.is_coalesced()
        SparseOptimizer(layer.parameters(), UPDATE).step()
    assert torch.equal(one.weight, other.weight)


def test_coalesced_gradient():
    one, other = make_embedding(), make_embedding()
    for layer in (one, other):
        loss_of(layer, batches(1)[0]).backward()
    other.weight.grad = other.weight.grad.coalesce()
    for layer in (one, other):
        SparseOptimizer(layer.parameters(), UPDATE).step()
    torch.testing.assert_close(one.weight, other.weight)


def test_gradients_of_several_backwards_are_summed():
    one, other = make_embedding(), make_embedding()
    first, second = batches(2)
    loss_of(one, first).backward()
    loss_of(one, second).backward()
    optimizer = SparseOptimizer(one.parameters(), UPDATE)
    optimizer.step()
    (loss_of(other, first) + loss_of(other, second)).backward()
    SparseOptimizer(other.parameters(), UPDATE).step()
    torch.testing.assert_close(one.weight, other.weight)
    assert optimizer.clock == 1
    assert optimizer.state[one.weight]["prev_iter"].max() == 1


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_modes(mode):
    layer = make_bag(mode=mode)
    before = layer.weight.detach().clone()
    loss_of(layer, torch.tensor([[1, 1, 3]])).backward()
    grad = layer.weight.grad.to_dense()
    SparseOptimizer(layer.parameters(), UPDATE).step()
    v = 0.1 * grad[[1, 3]].square().mean(1, keepdim=True)
    want = (1 - 0.1 * 0.2) * before[[1, 3]] - 0.1 / (v.sqrt() + 1e-6) * grad[[1, 3]]
    torch.testing.assert_close(layer.weight[[1, 3]], want)
    untouched = [r for r in range(ROWS) if r not in (1, 3)]
    assert torch.equal(layer.weight[untouched], before[untouched])


def test_a_row_touched_with_zero_gradient_still_decays():
    layer = make_embedding()
    before = layer.weight.detach().clone()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    layer(torch.tensor([2])).mul(0).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight[2], (1 - 0.1 * 0.2) * before[2])
    assert optimizer.state[layer.weight]["prev_iter"][2] == 1


def test_memory_is_kept():
    layer = make_embedding()
    pointer = layer.weight.data_ptr()
    train(SparseOptimizer(layer.parameters(), UPDATE), layer, batches(2))
    assert layer.weight.data_ptr() == pointer


# ------------------------------------------------------------------------------- params and groups


def test_several_parameters_each_have_their_own_state():
    layers = nn.ModuleList([make_embedding(0), make_bag(1)])
    alone = [make_embedding(0), make_bag(1)]
    optimizer = SparseOptimizer(layers.parameters(), UPDATE)
    steps = list(zip(batches(4, seed=1), batches(4, seed=2), strict=True))
    for pair in steps:
        optimizer.zero_grad()
        sum(loss_of(layer, i) for layer, i in zip(layers, pair, strict=True)).backward()
        optimizer.step()
    assert optimizer.clock == 4  # once per step, not once per parameter
    for k, layer in enumerate(alone):
        train(SparseOptimizer(layer.parameters(), UPDATE), layer, [pair[k] for pair in steps])
        assert torch.equal(layers[k].weight, layer.weight)


def test_groups_with_their_own_lr_and_options():
    layers, alone = [make_embedding(0), make_embedding(1)], [make_embedding(0), make_embedding(1)]
    options = [{"lr": 0.5, "ar_alpha": 0.1}, {"ar_alpha": 1.0, "min_shrinkage": 0.0}]
    optimizer = RowwiseRMSpropAR(
        [{"params": layer.parameters(), **o} for layer, o in zip(layers, options, strict=True)],
        lr=0.02,
    )
    for layer in layers:
        loss_of(layer, batches(1)[0]).backward()
    optimizer.step()
    for layer, single, o in zip(layers, alone, options, strict=True):
        train(RowwiseRMSpropAR(single.parameters(), **{"lr": 0.02, **o}), single, batches(1))
        assert torch.equal(layer.weight, single.weight)


def test_groups_with_their_own_update():
    other = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.Exponential(half_life=2.0))
    layers, alone = [make_embedding(0), make_embedding(1)], [make_embedding(0), make_embedding(1)]
    optimizer = SparseOptimizer(
        [{"params": layers[0].parameters()}, {"params": layers[1].parameters(), "update": other}],
        UPDATE,
    )
    for indices in batches(4):
        optimizer.zero_grad()
        for layer in layers:
            loss_of(layer, indices).backward()
        optimizer.step()
    for layer, single, update in zip(layers, alone, (UPDATE, other), strict=True):
        train(SparseOptimizer(single.parameters(), update), single, batches(4))
        assert torch.equal(layer.weight, single.weight)


def test_lr_of_a_group_comes_from_its_own_update():
    other = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5))
    groups = [
        {"params": make_embedding(0).parameters()},
        {"params": make_embedding(1).parameters(), "update": other},
        {"params": make_embedding(2).parameters(), "update": other, "lr": 0.25},
    ]
    assert [g["lr"] for g in SparseOptimizer(groups, UPDATE).param_groups] == [0.1, 0.5, 0.25]
    groups = [
        {"params": make_embedding(0).parameters()},
        {"params": make_embedding(1).parameters(), "update": other},
    ]
    assert [g["lr"] for g in SparseOptimizer(groups, UPDATE, lr=3.0).param_groups] == [3.0, 3.0]


def test_group_added_later():
    first, second = make_embedding(0), make_embedding(1)
    optimizer = RowwiseRMSpropAR(first.parameters(), lr=0.1)
    train(optimizer, first, batches(3))
    optimizer.add_param_group({"params": second.parameters(), "lr": 0.2, "ar_alpha": 0.5})
    train(optimizer, second, batches(1))
    assert optimizer.state[second.weight]["prev_iter"].max() == 4
    assert optimizer.param_groups[1]["lr"] == 0.2


def test_tables_of_a_touch_charged_unfused_module():
    from coldrow.nn import Table, TableBatchedEmbeddingBags

    def make():
        torch.manual_seed(0)
        return TableBatchedEmbeddingBags(
            [Table("a", ROWS, DIM), Table("b", ROWS, DIM)], UPDATE, fused=False
        )

    ours, theirs = make(), make()
    optimizer = SparseOptimizer(ours.parameters(), UPDATE)
    for indices in batches(3):
        for emb, step in ((ours, optimizer.step), (theirs, theirs.step)):
            emb.zero_grad()
            emb(indices.view(-1), torch.tensor([0, 3, 6, 9, 12])).square().sum().backward()
            step()
    for name in "ab":
        assert torch.equal(ours.weights[name], theirs.weights[name])


# ---------------------------------------------------------------------------------- learning rates


def applied_lr(optimizer, layer) -> float:
    """The learning rate that one step really uses: |change| where lr * g / sqrt(g**2) is all of it."""
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    layer(torch.tensor([0])).sum().backward()
    optimizer.step()
    return float((before - layer.weight.detach())[0, 0])


def make_measurable(lr, build) -> tuple:
    layer = make_embedding()
    with torch.no_grad():
        layer.weight.zero_()
    if build is RowwiseRMSpropAR:
        return build(layer.parameters(), lr=lr, eps=0.0, ema_beta=0.0), layer
    plain = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=9.0, eps=0.0, ema_beta=0.0))
    return SparseOptimizer(layer.parameters(), plain, lr=lr), layer


SCHEDULERS = {
    "step": (lambda o: lr_scheduler.StepLR(o, 2, 0.5), [1, 1, 0.5, 0.5, 0.25]),
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)), [1, 1 / 2, 1 / 3, 1 / 4]),
    "cosine": (
        lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
        [(1 + np.cos(np.pi * k / 4)) / 2 for k in range(5)],
    ),
}


@pytest.mark.parametrize("build", [RowwiseRMSpropAR, SparseOptimizer])
@pytest.mark.parametrize("lr", [0.8, torch.tensor(0.8), torch.tensor(0.8, dtype=torch.float64)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_takes_effect_at_the_next_step(build, lr, name):
    make, factors = SCHEDULERS[name]
    optimizer, layer = make_measurable(copy.deepcopy(lr), build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # e.g. torch finding the calls out of order
        scheduler = make(optimizer)
        used = []
        for _ in factors:
            used.append(applied_lr(optimizer, layer))
            scheduler.step()
    np.testing.assert_allclose(used, 0.8 * np.array(factors), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [RowwiseRMSpropAR, SparseOptimizer])
def test_lr_assigned_takes_effect_at_the_next_step(build):
    optimizer, layer = make_measurable(0.5, build)
    assert applied_lr(optimizer, layer) == pytest.approx(0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    assert applied_lr(optimizer, layer) == pytest.approx(0.25)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.125)
    assert applied_lr(optimizer, layer) == pytest.approx(0.125)
    optimizer.param_groups[0]["lr"].fill_(2.0)
    assert applied_lr(optimizer, layer) == pytest.approx(2.0)


# --------------------------------------------------------------------------- what an optimizer does


def test_closure():
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(layer, batches(1)[0])
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
    same = make_embedding()
    train(SparseOptimizer(same.parameters(), UPDATE), same, batches(1))
    assert torch.equal(layer.weight, same.weight)
    assert optimizer.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    loss_of(layer, batches(1)[0]).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert optimizer.clock == 1


def test_gradients_stay_until_zero_grad():
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    loss_of(layer, batches(1)[0]).backward()
    grad = layer.weight.grad.clone()
    optimizer.step()
    assert torch.equal(layer.weight.grad.to_dense(), grad.to_dense())


def test_parameter_without_gradient_is_untouched_but_the_clock_ticks():
    with_grad, without = make_embedding(0), make_embedding(1)
    before = without.weight.detach().clone()
    optimizer = SparseOptimizer([with_grad.weight, without.weight], UPDATE)
    train(optimizer, with_grad, batches(2))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.clock == 3
    assert torch.equal(without.weight, before)
    assert not optimizer.state[without.weight]
    train(optimizer, without, batches(1))
    assert optimizer.state[without.weight]["prev_iter"].max() == 4


def test_steps_without_gradient_count_in_the_gap():
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE, lr=0.0)  # no step, and then only decay
    with torch.no_grad():
        layer.weight.fill_(1.0)

    def touch():
        layer(torch.tensor([0])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    touch()
    assert torch.equal(layer.weight[0], torch.ones(DIM))
    for _ in range(3):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    layer.weight.grad = sparse([0], torch.zeros(1, DIM))
    optimizer.step()  # step 5, last touched at 1: a gap of 4
    torch.testing.assert_close(layer.weight[0], torch.full((DIM,), 1 - 0.1 * 0.2 * 4))


def test_clock_rules():
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    assert optimizer.clock == 0
    train(optimizer, layer, batches(2))
    assert optimizer.clock == 2
    optimizer.clock = 2
    optimizer.clock = torch.tensor(10)
    assert optimizer.clock == 10
    assert type(optimizer.clock) is int
    with pytest.raises(
        ValueError, match=r"^clock: got 9, accepted: an integer from 10 to 21474836"
    ):
        optimizer.clock = 9
    train(optimizer, layer, batches(1))
    assert optimizer.state[layer.weight]["prev_iter"].max() == 11
    optimizer.clock = LAST - 1
    train(optimizer, layer, batches(1))
    assert optimizer.clock == LAST
    with pytest.raises(ValueError, match="2147483648"):
        optimizer.step()


def test_new_epoch_opens_the_gate():
    update = coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=0.0), coldrow.EpochGated(coldrow.Exponential(half_life=1.0))
    )
    layer = make_embedding()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimizer = SparseOptimizer(layer.parameters(), update)

    def touch(*rows):
        optimizer.zero_grad()
        layer(torch.tensor(rows)).sum().backward()
        optimizer.step()
        return layer.weight[:, 0].tolist()[:3]

    touch(0, 1)  # step 1
    assert touch(0) == [1, 1, 1]  # step 2: no epoch was declared
    optimizer.new_epoch()
    assert touch(0, 2) == [0.5, 1, 1]  # step 3: gap 1; row 2 was never touched
    assert touch(0, 1) == [0.5, 0.125, 1]  # step 4: row 0 in this epoch already; row 1: gap 3


# ---------------------------------------------------------------------------------- not finite


def make_poisoned(on_nonfinite: str, value: float):
    """Gradients for rows 1 and 2 of two layers; row 2 of the second has the value."""
    layers = [make_embedding(0), make_embedding(1)]
    optimizer = SparseOptimizer([p.weight for p in layers], UPDATE, on_nonfinite=on_nonfinite)
    for k, layer in enumerate(layers):
        grad = torch.ones(2, DIM)
        grad[1, 0] = value if k == 1 else 1.0
        layer.weight.grad = sparse([1, 2], grad)
    return layers, optimizer


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nonfinite_rows_are_skipped_and_counted(value):
    layers, optimizer = make_poisoned("skip", value)
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer.step()
    assert (optimizer.nonfinite_rows, optimizer.clock) == (1, 1)
    changed = [
        (w.weight != b).any(1).nonzero().flatten().tolist()
        for w, b in zip(layers, before, strict=True)
    ]
    assert changed == [[1, 2], [1]]
    state = optimizer.state[layers[1].weight]
    assert state["prev_iter"].tolist() == [0, 1] + [0] * 10
    assert state["momentum1"].count_nonzero() == 1
    optimizer.step()
    assert optimizer.nonfinite_rows == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_nonfinite_gradients_raise_and_change_nothing(value):
    layers, optimizer = make_poisoned("raise", value)
    before = [layer.weight.detach().clone() for layer in layers]
    with pytest.raises(ValueError, match=r"^grad: the update of row 2 is not finite .* accepted"):
        optimizer.step()
    assert [torch.equal(w.weight, b) for w, b in zip(layers, before, strict=True)] == [True, True]
    assert (optimizer.nonfinite_rows, optimizer.clock) == (0, 0)
    layers[1].weight.grad = None
    optimizer.step()
    assert optimizer.clock == 1


def test_nonfinite_gradients_propagate():
    layers, optimizer = make_poisoned("propagate", float("nan"))
    optimizer.step()
    assert layers[1].weight[2].isnan().any()
    assert layers[1].weight[1].isfinite().all()
    assert optimizer.state[layers[1].weight]["prev_iter"][2] == 1
    assert (optimizer.nonfinite_rows, optimizer.clock) == (0, 1)


# ------------------------------------------------------------------------------ saving and copying

STOCHASTIC = coldrow.Stochastic(seed=7)
BUILDS = {
    "AR float32": (RowwiseRMSpropAR, {"lr": 0.1, "ar_alpha": 0.2}, torch.float32),
    "AR bfloat16": (
        RowwiseRMSpropAR,
        {"lr": 0.1, "ar_alpha": 0.2, "rounding": STOCHASTIC},
        torch.bfloat16,
    ),
    "gated float16": (
        SparseOptimizer,
        {
            "update": coldrow.RowUpdate(
                coldrow.RowwiseRMSprop(lr=0.1),
                coldrow.EpochGated(coldrow.CumulativeLinear(half_life=3.0)),
                STOCHASTIC,
                decay_state=True,
            )
        },
        torch.float16,
    ),
    "tensor lr": (
        SparseOptimizer,
        {"update": UPDATE, "lr": torch.tensor(0.3)},
        torch.float32,
    ),
}


def make_pair(name: str, seed: int = 0) -> tuple:
    build, options, dtype = BUILDS[name]
    layer = make_embedding(seed, dtype)
    return layer, build(layer.parameters(), **copy.deepcopy(options))


def start(name: str) -> tuple:
    """A pair in the middle of a run: an epoch declared, the clock ahead, lr changed."""
    layer, optimizer = make_pair(name)
    train(optimizer, layer, batches(3))
    optimizer.clock = 5
    optimizer.new_epoch()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
    train(optimizer, layer, batches(1, seed=3))
    return layer, optimizer


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_state_dict(name, layer, optimizer):
    fresh, other = make_pair(name, seed=99)
    fresh.load_state_dict(saved(layer.state_dict()))
    other.load_state_dict(saved(optimizer.state_dict()))
    return fresh, other


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": lambda name, *pair: copy.deepcopy(pair),
    "pickle": lambda name, *pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", BUILDS)
def test_copy_in_the_middle_of_a_run_goes_on_bit_for_bit(how, name):
    layer, optimizer = start(name)
    fresh, other = COPIES[how](name, layer, optimizer)
    assert other.clock == optimizer.clock == 6
    assert fresh.weight is not layer.weight
    for pair in ((layer, optimizer), (fresh, other)):
        train(pair[1], pair[0], batches(3, seed=5))
        pair[1].new_epoch()
        train(pair[1], pair[0], batches(2, seed=6))
    assert torch.equal(layer.weight, fresh.weight)
    assert_equal_state(optimizer.state[layer.weight], other.state[fresh.weight])
    assert (other.clock, other.param_groups[0]["lr"]) == (11, optimizer.param_groups[0]["lr"])
    dtypes = {key: value.dtype for key, value in other.state[fresh.weight].items()}
    assert dtypes == {"prev_iter": torch.int32, "momentum1": torch.float32}


def test_resuming_matters():
    """The check above can fail: without the clock, or without the state, the run differs."""
    layer, optimizer = start("AR float32")
    for spoil in (
        lambda d: d["clock"].fill_(50),
        lambda d: d["state"][0]["prev_iter"].fill_(1),
        lambda d: d["param_groups"][0].update(lr=0.01),
    ):
        fresh, other = make_pair("AR float32")
        state = copy.deepcopy(optimizer.state_dict())
        spoil(state)
        fresh.load_state_dict(layer.state_dict())
        other.load_state_dict(state)
        train(other, fresh, batches(1, seed=5))
        same, third = through_state_dict("AR float32", layer, optimizer)
        train(third, same, batches(1, seed=5))
        assert not torch.equal(fresh.weight, same.weight)


def test_state_dict_is_not_changed_by_training_on():
    layer, optimizer = start("AR float32")
    state = optimizer.state_dict()
    clock = state["clock"].clone()
    train(optimizer, layer, batches(1))
    assert torch.equal(state["clock"], clock)


def test_load_copies():
    layer, optimizer = start("AR float32")
    state = optimizer.state_dict()
    fresh, other = make_pair("AR float32")
    other.load_state_dict(state)
    train(other, fresh, batches(2))
    assert other.clock == 8
    assert optimizer.clock == 6
    assert optimizer.state[layer.weight]["prev_iter"].max() == 6


def test_policies_come_from_the_state_dict():
    """As torch's optimizers do it: options of param groups are loaded with the rest."""
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    other = SparseOptimizer(layer.parameters(), coldrow.RowUpdate())
    other.load_state_dict(saved(optimizer.state_dict()))
    assert other.param_groups[0]["update"] == UPDATE


def test_loading_sets_the_clock_back():
    layer, optimizer = make_pair("AR float32")
    train(optimizer, layer, batches(1))
    state = saved(optimizer.state_dict())
    train(optimizer, layer, batches(3))
    optimizer.load_state_dict(state)
    assert optimizer.clock == 1


def test_state_dict_from_before_the_first_step_starts_over():
    layer, optimizer = make_pair("AR float32")
    weights, state = copy.deepcopy(layer.state_dict()), saved(optimizer.state_dict())
    train(optimizer, layer, batches(3))
    want = layer.weight.detach().clone()
    layer.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.clock == 0
    train(optimizer, layer, batches(3))
    assert torch.equal(layer.weight, want)


SPOILED = {
    r"prev_iter.*got.*7.*accepted.*6": lambda d: d["state"][0]["prev_iter"].fill_(7),
    r"prev_iter.*got.*-1.*accepted": lambda d: d["state"][0]["prev_iter"].fill_(-1),
    r"clock.*got.*-1.*accepted": lambda d: d["clock"].fill_(-1),
    r"clock.*got.*2147483648.*accepted": lambda d: d["clock"].fill_(2**31),
    r"state.*momentum1": lambda d: d["state"][0].pop("momentum1"),
    r"lr: got nan, accepted": lambda d: d["param_groups"][0].update(lr=float("nan")),
    r"ar_alpha: got -1\.0, accepted": lambda d: d["param_groups"][0].update(ar_alpha=-1.0),
    r"clock.*accepted": lambda d: d.pop("clock"),
}


@pytest.mark.parametrize("says", SPOILED)
def test_state_that_cannot_be_is_refused_and_nothing_changes(says):
    _, optimizer = start("AR float32")
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    SPOILED[says](bad)
    with pytest.raises((ValueError, KeyError), match=says):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert_equal_state(after["state"][0], before["state"][0])
    assert after["param_groups"] == before["param_groups"]
    assert (after["clock"], after["epoch_start"]) == (before["clock"], before["epoch_start"])


def test_copy_counts_skipped_rows():
    _, optimizer = make_poisoned("skip", float("nan"))
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.nonfinite_rows, other.on_nonfinite, other.clock) == (1, "skip", 1)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            coldrow.Adam(),
            r"^update: got one with \['momentum1', 'momentum2', 'prev_iter'\], accepted",
        ),
        (coldrow.SGD(), r"^update: got one with \['prev_iter'\], accepted: .*'momentum1'"),
        (coldrow.RowwiseAdagrad(), r"^momentum1: got float32\[12, 5\], accepted: shape \[12\]"),
    ],
)
def test_another_optimizer_in_mid_training_is_refused_and_nothing_changes(other, says):
    """Its state would be missing, or be taken for something else."""
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), coldrow.RowUpdate(coldrow.Adagrad()))
    train(optimizer, layer, batches(2))
    before = copy.deepcopy((layer.weight, optimizer.state[layer.weight]))
    optimizer.param_groups[0]["update"] = coldrow.RowUpdate(other)
    with pytest.raises(ValueError, match=says):
        optimizer.step()
    assert torch.equal(layer.weight, before[0])
    assert_equal_state(optimizer.state[layer.weight], before[1])
    assert optimizer.clock == 2


def test_state_dicts_of_the_two_classes_are_not_each_others():
    layer = make_embedding()
    one = SparseOptimizer(layer.parameters(), UPDATE)
    other = RowwiseRMSpropAR(layer.parameters())
    with pytest.raises(ValueError, match=r"^param_groups: got no \['ar_alpha', .*accepted"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"^param_groups: got no \['update'\], accepted"):
        one.load_state_dict(other.state_dict())
