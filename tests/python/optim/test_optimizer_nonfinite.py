"""Every optimizer and rows that would not be finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from every_optimizer import DTYPES, OPTIMIZERS, assert_same, every_optimizer
from support import Table64, check_step, exact_grad
from torch import nn

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of its own Adagrad
]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_optimizer
def test_a_row_that_is_not_finite_keeps_all_its_state(name, dtype, bad):
    """1e30 is finite but its square is not. The bad value is in the last of 21 columns."""
    update = coldrow.RowUpdate(OPTIMIZERS[name], coldrow.Constant(1.0), decay_state=True)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(4, 21))).to(dtype)
    state = coldrow.init_state(update, 4, 21, like=weight)
    indices = torch.tensor([0, 1, 3, 1])
    grad = torch.from_numpy(exact_grad(rng, (4, 21))).float()
    coldrow.apply_(update, weight, grad, indices, state, step=1)
    before = {"weight": weight.clone()} | {key: array.clone() for key, array in state.items()}
    poisoned = grad.clone()
    poisoned[3, 20] = bad

    with pytest.raises(
        ValueError, match=r"^grad: the update of row 1 is not finite \(1 such rows\)"
    ):
        coldrow.apply_(update, weight, poisoned, indices, state, step=2)
    assert_same({"weight": weight, **state}, before)

    old = Table64(before["weight"], {key: before[key] for key in state})
    coldrow.apply_(update, weight, poisoned, indices, state, step=2, on_nonfinite="skip")
    after = Table64(weight, state)
    check_step(update, old, after, grad[[0, 2]].double().numpy(), np.array([0, 3]), step=2)

    weight.copy_(before["weight"])
    for key in state:
        state[key].copy_(before[key])
    coldrow.apply_(update, weight, poisoned, indices, state, step=2, on_nonfinite="propagate")
    # Without a second moment that overflows (Adagrad's ends at the largest float32) only float16 does.
    bounded = name in ("SGD", "Adagrad") and bad == 1e30 and dtype != torch.float16
    assert all(array[1].isfinite().all() for array in (weight, *state.values())) == bounded
    assert state["prev_iter"].tolist() == [2, 2, 0, 2]
    for array in (weight, *state.values()):
        assert array[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("kind", [coldrow.RowwiseRMSprop, coldrow.RowwiseAdagrad])
def test_a_row_with_nothing_to_divide_by_is_not_finite(kind):
    """No eps, no gradient yet: lr / 0."""
    update = coldrow.RowUpdate(kind(eps=0.0))
    weight = np.ones((3, 4), np.float32)
    state = coldrow.init_state(update, 3, 4, like=weight)
    grad = np.zeros((2, 4), np.float32)
    grad[0, 1] = 0.5
    with pytest.raises(ValueError, match=r"^grad: the update of row 2 is not finite"):
        coldrow.apply_(update, weight, grad, np.array([1, 2]), state, step=1)
    assert (weight == 1).all()
    coldrow.apply_(update, weight, grad, np.array([1, 2]), state, step=1, on_nonfinite="skip")
    assert state["prev_iter"].tolist() == [0, 1, 0]
    assert (weight[[0, 2]] == 1).all()
    assert weight[1].tolist() == [1, weight[1, 1], 1, 1]
    assert 0 < weight[1, 1] < 1


@every_optimizer
def test_skipped_rows_are_counted_by_module_and_optimizer(name):
    update = coldrow.RowUpdate(OPTIMIZERS[name])
    grad = torch.ones(3, 4)
    grad[1, 3] = float("inf")
    indices, offsets = torch.tensor([2, 0, 5]), torch.arange(4)
    emb = TableBatchedEmbeddingBags([Table("a", 6, 4)], update)
    layer = nn.Embedding(6, 4, sparse=True)
    optimizer = SparseOptimizer(layer.parameters(), update)
    emb(indices, offsets).backward(grad)
    layer(indices).backward(grad)
    optimizer.step()
    for owner, state in ((emb, emb.state["a"]), (optimizer, optimizer.state[layer.weight])):
        assert (owner.nonfinite_rows, owner.clock) == (1, 1)
        assert state["prev_iter"].tolist() == [0, 0, 1, 0, 0, 1]
        for array in state.values():
            assert array.isfinite().all()
            assert array.reshape(6, -1).any(1).tolist() == [False, False, True, False, False, True]
