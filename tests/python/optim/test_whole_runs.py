"""Whole runs of every optimizer against torch.optim and against FBGEMM's formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from every_optimizer import ADAM
from support import ROUND
from torch import nn

import coldrow

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of its own Adagrad
]


# -------------------------------------------------------------------------------- whole runs: torch

ROWS, DIM, STEPS = 11, 6, 300
# torch computes in float64 here, so only coldrow rounds. A weight below 4 is rounded at each step, with a
# standard deviation of 2^-22 / sqrt(12): 8 times that of STEPS roundings. (Amounts are smaller by lr.)
CLOSE = {"rtol": 0.0, "atol": 8 * (STEPS / 12) ** 0.5 * 4 * ROUND}


def start(dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, dim)).astype(np.float32)


def dense_gradients(dim: int = DIM) -> list[tuple[np.ndarray, np.ndarray]]:
    """(values, indices) for each step: all rows, a slowly turning gradient, so that moments matter."""
    rng = np.random.default_rng(1)
    drift = rng.normal(size=(ROWS, dim))
    return [
        ((np.cos(0.05 * t + drift) + 0.5 * rng.normal(size=(ROWS, dim))).astype(np.float32),
         np.arange(ROWS))
        for t in range(STEPS)
    ]  # fmt: skip


def sparse_gradients(dim: int = DIM) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of five random rows each, duplicates among them."""
    rng = np.random.default_rng(2)
    return [
        (values[rows], rows)
        for values, _ in dense_gradients(dim)
        for rows in [rng.integers(0, ROWS, 5)]
    ]


def ours(optimizer, gradients, *, at_step=None, fill=0.0, dim: int = DIM) -> np.ndarray:
    """Train with coldrow in float32. at_step(optimizer, t): the optimizer as of step t."""
    weight = start(dim)
    state = coldrow.init_state(coldrow.RowUpdate(optimizer), ROWS, dim, like=weight)
    for name in state.keys() - {"prev_iter"}:
        state[name].fill(fill)
    for t, (values, indices) in enumerate(gradients, start=1):
        now = coldrow.RowUpdate(at_step(optimizer, t) if at_step else optimizer)
        coldrow.apply_(now, weight, values, indices, state, step=t)
    return weight


def torchs(kind, gradients, *, dense: bool, dim: int = DIM, **options) -> np.ndarray:
    """Train with an optimizer of torch in float64."""
    p = nn.Parameter(torch.from_numpy(start(dim)).double())
    optimizer = kind([p], **options)
    for values, indices in gradients:
        grad = torch.sparse_coo_tensor(
            torch.from_numpy(indices)[None],
            torch.from_numpy(values).double(),
            p.shape,
            check_invariants=True,
        )
        p.grad = grad.to_dense() if dense else grad
        optimizer.step()
    assert (p.detach() - torch.from_numpy(start(dim))).abs().mean() > 0.05  # it did something
    assert p.detach().abs().max() < 4
    return p.detach().numpy()


def test_sgd_is_torchs():
    for gradients, dense in ((dense_gradients(), True), (sparse_gradients(), False)):
        want = torchs(torch.optim.SGD, gradients, dense=dense, lr=0.01)
        np.testing.assert_allclose(ours(coldrow.SGD(lr=0.01), gradients), want, **CLOSE)


@pytest.mark.parametrize("bias_correction", ["clock", "row"])
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.7, 0.97, 0.3)])
def test_adam_on_rows_of_every_step_is_torchs_adam(beta1, beta2, eps, bias_correction):
    gradients = dense_gradients()
    betas = {"lr": 0.01, "betas": (beta1, beta2), "eps": eps}
    want = torchs(torch.optim.Adam, gradients, dense=True, **betas)
    optimizer = coldrow.Adam(0.01, beta1, beta2, eps, bias_correction)
    np.testing.assert_allclose(ours(optimizer, gradients), want, **CLOSE)


@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.7, 0.97, 0.3)])
def test_adam_on_sparse_gradients_is_torchs_sparse_adam(beta1, beta2, eps):
    """SparseAdam adds eps to sqrt(v) before the bias correction: ours is then eps / sqrt(1-beta2^t)."""
    gradients = sparse_gradients()
    betas = {"lr": 0.01, "betas": (beta1, beta2), "eps": eps}
    want = torchs(torch.optim.SparseAdam, gradients, dense=False, **betas)
    optimizer = coldrow.Adam(0.01, beta1, beta2, eps)

    def at_step(o, t):
        return dataclasses.replace(o, eps=eps / (1 - beta2**t) ** 0.5)

    np.testing.assert_allclose(ours(optimizer, gradients, at_step=at_step), want, **CLOSE)
    if eps > 0.1:  # and the placement matters
        assert np.abs(ours(optimizer, gradients) - want).max() > 100 * CLOSE["atol"]


def test_adam_by_row_is_torchs_adam_on_each_row_alone():
    gradients = sparse_gradients()
    got = ours(coldrow.Adam(0.01, 0.8, 0.97, 0.01, bias_correction="row"), gradients)
    for row in range(ROWS):
        p = nn.Parameter(torch.from_numpy(start()[row]).double())
        alone = torch.optim.Adam([p], lr=0.01, betas=(0.8, 0.97), eps=0.01)
        for values, indices in gradients:
            if row in indices:
                p.grad = torch.from_numpy(values[indices == row].astype(np.float64).sum(0))
                alone.step()
        np.testing.assert_allclose(got[row], p.detach().numpy(), **CLOSE)


@pytest.mark.parametrize(("eps", "fill"), [(1e-10, 0.0), (0.2, 0.0), (1e-10, 0.5)])
@pytest.mark.parametrize("dense", [True, False])
def test_adagrad_is_torchs(dense, eps, fill):
    gradients = dense_gradients() if dense else sparse_gradients()
    options = {"lr": 0.05, "eps": eps, "initial_accumulator_value": fill}
    want = torchs(torch.optim.Adagrad, gradients, dense=dense, **options)
    got = ours(coldrow.Adagrad(0.05, eps), gradients, fill=fill)
    np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize(("eps", "beta"), [(1e-8, 0.99), (0.2, 0.8)])
def test_rowwise_rmsprop_of_one_column_is_torchs_rmsprop(eps, beta):
    gradients = dense_gradients(1)
    options = {"lr": 0.01, "alpha": beta, "eps": eps}
    want = torchs(torch.optim.RMSprop, gradients, dense=True, dim=1, **options)
    got = ours(coldrow.RowwiseRMSprop(0.01, eps, beta), gradients, dim=1)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_row_wise_states_of_one_column_are_element_wise():
    gradients = sparse_gradients(1)
    for row_wise, element_wise in (
        (coldrow.RowwiseAdagrad(0.05, 0.01), coldrow.Adagrad(0.05, 0.01)),
        (coldrow.PartialRowwiseAdam(0.01, **ADAM), coldrow.Adam(0.01, **ADAM)),
        (
            coldrow.PartialRowwiseAdam(0.01, **ADAM, bias_correction="row"),
            coldrow.Adam(0.01, **ADAM, bias_correction="row"),
        ),
    ):
        got, want = (ours(o, gradients, dim=1) for o in (row_wise, element_wise))
        np.testing.assert_allclose(got, want, **CLOSE)


# ------------------------------------------------------------------------------- whole runs: FBGEMM


def summed(values: np.ndarray, indices: np.ndarray):
    """Each row of a batch with its gradients summed."""
    for row in np.unique(indices):
        yield row, values[indices == row].astype(np.float64).sum(0)


@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_rowwise_adagrad_is_fbgemms_formula(eps):
    """EXACT_ROWWISE_ADAGRAD: momentum1 += mean(g^2); w -= lr / (sqrt(momentum1) + eps) * g."""
    gradients = sparse_gradients()
    w, momentum1 = start().astype(np.float64), np.zeros(ROWS)
    for values, indices in gradients:
        for row, g in summed(values, indices):
            momentum1[row] += np.mean(g**2)
            w[row] -= 0.05 / (np.sqrt(momentum1[row]) + eps) * g
    np.testing.assert_allclose(ours(coldrow.RowwiseAdagrad(0.05, eps), gradients), w, **CLOSE)


@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.7, 0.97, 0.3)])
@pytest.mark.parametrize("bias_correction", ["clock", "row"])
def test_partial_rowwise_adam_is_fbgemms_formula(bias_correction, beta1, beta2, eps):
    """PARTIAL_ROWWISE_ADAM: m = beta1*m + (1-beta1)*g; v = beta2*v + (1-beta2)*mean(g^2);
    w -= lr * (m / (1-beta1^iter)) / (sqrt(v / (1-beta2^iter)) + eps).
    """
    gradients = sparse_gradients()
    w, m, v = start().astype(np.float64), np.zeros((ROWS, DIM)), np.zeros(ROWS)
    touches = np.zeros(ROWS)
    for t, (values, indices) in enumerate(gradients, start=1):
        for row, g in summed(values, indices):
            touches[row] += 1
            n = t if bias_correction == "clock" else touches[row]
            m[row] = beta1 * m[row] + (1 - beta1) * g
            v[row] = beta2 * v[row] + (1 - beta2) * np.mean(g**2)
            root = np.sqrt(v[row] / (1 - beta2**n))
            w[row] -= 0.01 * (m[row] / (1 - beta1**n)) / (root + eps)
    optimizer = coldrow.PartialRowwiseAdam(0.01, beta1, beta2, eps, bias_correction)
    np.testing.assert_allclose(ours(optimizer, gradients), w, **CLOSE)
