"""TableBatchedEmbeddingBags: clock, learning rates and epochs."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest

import coldrow
import coldrow.optim

torch = pytest.importorskip("torch")
from module_cases import BAGS, ONE, UPDATE, copies, make, make_batch, small, step  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

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


# ------------------------------------------------------------------- what an audit of the module found


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
