"""RowwiseRMSpropAR and SparseOptimizer on torch's own sparse embeddings."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")
from sparse_embeddings import (  # noqa: E402
    DIM,
    ROWS,
    UPDATE,
    assert_equal_state,
    batches,
    loss_of,
    make_embedding,
    make_poisoned,
    sparse,
    train,
)
from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer  # noqa: E402

LAST = 2**31 - 1


def make_bag(seed: int = 0, mode: str = "sum") -> nn.EmbeddingBag:
    torch.manual_seed(seed)
    return nn.EmbeddingBag(ROWS, DIM, sparse=True, mode=mode)


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
    assert not any(array.any() for array in optimizer.state[without.weight].values())
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
