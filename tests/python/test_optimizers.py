"""Every optimizer: each composition against the float64 reference step by step, whole runs against
torch.optim and against FBGEMM's formulas, and the state it declares.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import itertools
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch
from support import ROUND, Table64, check_step, exact_grad
from torch import nn

import coldrow
from coldrow import _core, policies
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer
from coldrow.policies import compiled

# Constants that no other optimizer has, and an eps that counts beside gradients of about 1/2.
ADAM = {"beta1": 0.8, "beta2": 0.95, "eps": 0.05}
OPTIMIZERS = {
    "SGD": coldrow.SGD(lr=0.03),
    "RowwiseRMSprop": coldrow.RowwiseRMSprop(lr=0.02, eps=0.05, ema_beta=0.7),
    "RowwiseAdagrad": coldrow.RowwiseAdagrad(lr=0.04, eps=0.07),
    "Adagrad": coldrow.Adagrad(lr=0.035, eps=0.06),
    "Adam": coldrow.Adam(lr=0.031, **ADAM),
    "Adam by row": coldrow.Adam(lr=0.028, **ADAM, bias_correction="row"),
    "PartialRowwiseAdam": coldrow.PartialRowwiseAdam(lr=0.032, **ADAM),
    "PartialRowwiseAdam by row": coldrow.PartialRowwiseAdam(
        lr=0.038, **ADAM, bias_correction="row"
    ),
}
# What the optimizer keeps beside prev_iter, in order: arrays [rows], then arrays [rows, dim].
STATES = {
    "SGD": ([], []),
    "RowwiseRMSprop": (["momentum1"], []),
    "RowwiseAdagrad": (["momentum1"], []),
    "Adagrad": ([], ["momentum1"]),
    "Adam": ([], ["momentum1", "momentum2"]),
    "Adam by row": (["touches"], ["momentum1", "momentum2"]),
    "PartialRowwiseAdam": (["momentum2"], ["momentum1"]),
    "PartialRowwiseAdam by row": (["momentum2", "touches"], ["momentum1"]),
}
# Such that with the lr above no factor between 0 and 0.1 comes about: see support.check_step.
UNGATED = [
    coldrow.LinearClipped(alpha=2.0, min_shrinkage=0.5),
    coldrow.LinearClipped(alpha=20.0, min_shrinkage=0.0),
    coldrow.CumulativeLinear(alpha=0.02),
    coldrow.CumulativeLinear(half_life=4.0),
    coldrow.CumulativeLinear(alpha=1e-9),
    coldrow.Exponential(weight_decay=3.0),
    coldrow.Exponential(half_life=5.0),
    coldrow.Constant(weight_decay=8.0),
]
DECAYS = [
    coldrow.NoDecay(),
    *UNGATED,
    *map(coldrow.EpochGated, UNGATED),
    coldrow.EpochReset(),
]
ROUNDINGS = [coldrow.Nearest(), coldrow.Stochastic(seed=21)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread():
    """The tables here are tiny: on a busy machine torch would spend its time waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


pytestmark = [
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of its own Adagrad
]
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_layouts = pytest.mark.parametrize("layout", ["record", "split"])


def shapes_of(name: str, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
    """The state's shapes by name, in order, prev_iter included."""
    by_row, by_element = STATES[name]
    return dict.fromkeys(["prev_iter", *by_row], (rows,)) | dict.fromkeys(by_element, (rows, dim))


def subclasses(base: type) -> set[type]:
    return {
        kind
        for kind in vars(policies).values()
        if isinstance(kind, type) and issubclass(kind, base) and dataclasses.is_dataclass(kind)
    }


def test_every_policy_is_listed_here():
    assert {type(o) for o in OPTIMIZERS.values()} == subclasses(coldrow.Optimizer)
    assert {type(d) for d in DECAYS} == subclasses(coldrow.Decay)
    assert {type(r) for r in ROUNDINGS} == subclasses(coldrow.Rounding)
    assert OPTIMIZERS.keys() == STATES.keys()
    for kind in subclasses(coldrow.Optimizer):
        assert getattr(coldrow, kind.__name__) is kind
        assert kind.__name__ in coldrow.__all__


# ------------------------------------------------------------------- compositions, step by step


@every_optimizer
def test_every_composition_follows_the_reference(name):
    """Seven rows, five steps; gaps of 1 to 9, an epoch beginning at the third."""
    rows, number = 7, 0
    for decay, rounding, decay_state in itertools.product(DECAYS, ROUNDINGS, (False, True)):
        update = coldrow.RowUpdate(OPTIMIZERS[name], decay, rounding, decay_state)
        for dtype, grad_dtype in itertools.product(DTYPES, DTYPES):
            number += 1
            dim = (1, 5, 16, 21, 33)[number % 5]
            rng = np.random.default_rng(number)
            weight = torch.from_numpy(rng.normal(size=(rows, dim))).to(dtype)
            state = coldrow.init_state(update, rows, dim, like=weight)
            for step, n in ((1, 6), (2, 3), (5, 9), (6, 1), (14, 9)):
                grad, indices = exact_grad(rng, (n, dim)), rng.integers(0, rows, n)
                epoch_start = 5 if step >= 5 else 0
                before = Table64(weight, state)
                coldrow.apply_(
                    update,
                    weight,
                    torch.from_numpy(grad).to(grad_dtype),
                    torch.from_numpy(indices),
                    state,
                    step=step,
                    epoch_start=epoch_start,
                )
                after = Table64(weight, state)
                check_step(update, before, after, grad, indices, step=step, epoch_start=epoch_start)


@both_layouts
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("charge", ["touch", "read"])
def test_every_composition_in_one_module(charge, fused, layout):
    """One table for each optimizer, all in one module, of one decay at a time."""
    dims = dict(zip(OPTIMIZERS, (1, 5, 16, 18, 4, 33, 7, 20), strict=True))
    rows, number = 5, ["touch", "read"].index(charge) + 2 * fused  # so that dtypes meet decays
    for decay, decay_state in itertools.product(DECAYS, (False, True)):
        number += 1
        dtype, rounding = DTYPES[number % 3], ROUNDINGS[number // 2 % 2]
        if not fused and not hasattr(torch.Tensor, "grad_dtype"):
            dtype = torch.float32  # else gradients pass through the tables' dtype
        updates = {
            name: coldrow.RowUpdate(optimizer, decay, rounding, decay_state)
            for name, optimizer in OPTIMIZERS.items()
        }
        emb = TableBatchedEmbeddingBags(
            [Table(n, rows, dims[n], dtype=dtype, update=updates[n]) for n in OPTIMIZERS],
            charge=charge,
            fused=fused,
            state_layout=layout,
        )
        rng = np.random.default_rng(number)
        for next_step in (1, 2, 5, 9):
            emb.clock = next_step - 1
            if next_step == 5:
                emb.new_epoch()
            before = {n: Table64(emb.weights[n], emb.state[n]) for n in OPTIMIZERS}
            indices = rng.integers(0, rows, (len(OPTIMIZERS), 4))
            out = emb(torch.from_numpy(indices.reshape(-1)), torch.arange(0, indices.size + 1, 2))
            grads = {n: exact_grad(rng, (2, dims[n])) for n in OPTIMIZERS}
            out.backward(torch.from_numpy(np.concatenate(list(grads.values()), axis=1)).float())
            if not fused:
                emb.step()
                emb.zero_grad()
            for t, (n, update) in enumerate(updates.items()):
                check_step(
                    update,
                    before[n],
                    Table64(emb.weights[n], emb.state[n]),
                    np.repeat(grads[n], 2, axis=0),
                    indices[t],
                    step=next_step,
                    epoch_start=emb.epoch_start,
                )


@every_optimizer
def test_what_is_compared_can_fail(name):
    """The tolerances above are tight: no constant can be off by a thousandth, no state forgotten."""
    rng = np.random.default_rng(3)
    update = coldrow.RowUpdate(OPTIMIZERS[name], coldrow.Exponential(half_life=9.0))
    weight = torch.from_numpy(rng.normal(size=(4, 8))).float()
    state = coldrow.init_state(update, 4, 8, like=weight)
    indices = torch.arange(4)
    for step in (1, 2, 3):
        grad = exact_grad(rng, (4, 8))
        before = Table64(weight, state)
        coldrow.apply_(
            update, weight, torch.from_numpy(grad).float(), indices, state, step=2 * step
        )
    after = Table64(weight, state)
    check_step(update, before, after, grad, indices.numpy(), step=6)

    wrong = [dataclasses.replace(update, decay_state=True)] if any(STATES[name]) else []
    wrong.append(dataclasses.replace(update, decay=coldrow.Exponential(half_life=9.009)))
    for field in dataclasses.fields(update.optimizer):
        value = getattr(update.optimizer, field.name)
        if isinstance(value, float):  # (The other bias correction asks for another state.)
            changed = dataclasses.replace(update.optimizer, **{field.name: value * 1.001})
            wrong.append(dataclasses.replace(update, optimizer=changed))
    for other in wrong:
        with pytest.raises(AssertionError):
            check_step(other, before, after, grad, indices.numpy(), step=6)
    for spoiled in (
        {"weight": after.weight * (1 + 1e-5)},
        *(
            {"state": after.state | {n: after.state[n] * (1 + 1e-5)}}
            for n in itertools.chain(*STATES[name])
        ),
    ):
        other = copy.copy(after)
        vars(other).update(spoiled)
        with pytest.raises(AssertionError):
            check_step(update, before, other, grad, indices.numpy(), step=6)


# --------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS, ids=repr)
@every_optimizer
def test_a_decay_without_strength_is_the_plain_optimizer_bit_for_bit(name, rounding, dtype):
    rng = np.random.default_rng(2)
    first = torch.from_numpy(rng.normal(size=(50, 33))).to(dtype)
    batches = [
        (
            torch.from_numpy(rng.normal(size=(80, 33))).float(),
            torch.from_numpy(rng.integers(0, 50, 80)),
        )
        for _ in range(12)
    ]
    results = []
    for decay in (
        coldrow.NoDecay(),
        coldrow.LinearClipped(0.0),
        coldrow.CumulativeLinear(alpha=0.0),
        coldrow.Exponential(weight_decay=0.0),
        coldrow.Constant(0.0),
        coldrow.EpochGated(coldrow.Constant(5.0)),  # no epoch was declared
    ):
        for decay_state in (False, True):
            update = coldrow.RowUpdate(OPTIMIZERS[name], decay, rounding, decay_state)
            weight = first.clone()
            state = coldrow.init_state(update, 50, 33, like=weight)
            for step, (grad, indices) in enumerate(batches, start=1):
                coldrow.apply_(update, weight, grad, indices, state, step=3 * step)
            results.append({"weight": weight, **state})
    assert not torch.equal(results[0]["weight"], first)
    for other in results[1:]:
        assert_same(other, results[0])


def trained_with(build: str, threads: int, dtype, rounding) -> dict[str, torch.Tensor]:
    """Four steps of one table for each optimizer, with hot rows and empty bags, and all that came of it."""
    best = _core.build()
    _core.use_build(build)
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(12)
        emb = TableBatchedEmbeddingBags(
            [
                Table(
                    name,
                    num_rows=400 + 7 * i,
                    dim=45,
                    dtype=dtype,
                    update=coldrow.RowUpdate(
                        optimizer,
                        # (Gaps and factors that differ from table to table.)
                        DECAYS[1 + 2 * i],
                        rounding,
                        decay_state=i % 2 == 0,
                    ),
                )
                for i, (name, optimizer) in enumerate(OPTIMIZERS.items())
            ],
            charge="read",
        )
        for p in emb.weights.values():
            p.copy_(torch.from_numpy(rng.normal(size=p.shape)))
        outs = {}
        for step in range(4):
            if step == 2:
                emb.new_epoch()
            lengths = rng.integers(0, 4, len(OPTIMIZERS) * 300)
            indices = np.minimum(rng.zipf(1.3, lengths.sum()), 400) - 1
            offsets = np.cumsum([0, *lengths])
            out = emb(torch.from_numpy(indices), torch.from_numpy(offsets))
            out.backward(torch.from_numpy(rng.normal(size=out.shape)).float())
            outs[f"out {step}"] = out.detach()
        return outs | snapshot(emb)
    finally:
        _core.use_build(best)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_threads_and_build(dtype, rounding):
    base = trained_with(_core.build(), 1, dtype, rounding)
    assert all(view.isfinite().all() for view in base.values())
    for build, threads in itertools.product(_core.builds(), (1, 2, 3)):
        assert_same(trained_with(build, threads, dtype, rounding), base)


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


# ------------------------------------------------------------------------------------ as documented

SEMANTICS = pathlib.Path(__file__).parents[2] / "docs" / "semantics.md"


def test_the_documented_defaults_and_states_are_the_policys():
    documented = {}
    for line in SEMANTICS.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        found = re.match(r"`(\w+)\((.*)\)`", cells[0]) if len(cells) == 6 else None
        if found:
            documented[found[1]] = (found[2], *cells[2:4])
    optimizers = {name: documented[name] for name in documented if name in STATES}
    assert optimizers.keys() == {k.__name__ for k in subclasses(coldrow.Optimizer)}
    for name, (arguments, per_row, per_element) in optimizers.items():
        kind = getattr(coldrow, name)
        if arguments == "...":  # as Adam
            arguments = optimizers["Adam"][0]
        assert eval(f"kind({arguments})", {"kind": kind}) == kind()
        assert set(re.findall(r"\w+=", arguments)) == {
            f"{f.name}=" for f in dataclasses.fields(kind)
        }
        by_row, by_element = STATES.get(f"{name} by row", STATES[name])
        assert set(re.findall(r"`(\w+)`", per_row)) == set(by_row)
        assert set(re.findall(r"`(\w+)`", per_element)) == set(by_element)


@every_optimizer
def test_values(name):
    update = coldrow.RowUpdate(OPTIMIZERS[name], DECAYS[-2], ROUNDINGS[1], decay_state=True)
    assert eval(repr(update), vars(coldrow)) == update
    assert pickle.loads(pickle.dumps(update)) == update
    assert hash(copy.deepcopy(update)) == hash(update)
    assert coldrow.RowUpdate.from_dict(update.to_dict()) == update
    assert compiled(copy.deepcopy(update)) is compiled(update)
    assert [n for n, o in OPTIMIZERS.items() if o == update.optimizer] == [name]
    for field in dataclasses.fields(update.optimizer):  # each is part of the value, and is checked
        assert inspect.signature(type(update.optimizer)).parameters[field.name].default is not None
        with pytest.raises((TypeError, ValueError), match=f"^{field.name}: got None, accepted: "):
            dataclasses.replace(update.optimizer, **{field.name: None})


# -------------------------------------------------------------------------------------------- state


@every_optimizer
def test_declared_state(name):
    update = coldrow.RowUpdate(OPTIMIZERS[name])
    want = shapes_of(name, 9, 4)
    assert update.state_names == tuple(want)
    assert list(update.state_shapes(9, 4).items()) == list(want.items())
    for like in (np.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)):
        state = coldrow.init_state(update, 9, 4, like=like)
        assert list(state) == list(want)
        for key, array in state.items():
            assert type(array) is type(like)
            assert tuple(array.shape) == want[key]
            dtype = "int32" if key == "prev_iter" else "float32"
            assert str(array.dtype).removeprefix("torch.") == dtype
            assert not array.any()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@every_optimizer
def test_arrays_of_one_value_per_row_may_have_any_stride(name, library):
    """Each another one; NumPy's may run backwards."""
    update = coldrow.RowUpdate(OPTIMIZERS[name], coldrow.Exponential(half_life=3.0))
    rng = np.random.default_rng(4)
    dense = coldrow.init_state(update, 9, 5, like=np.zeros(1))
    given = {}
    for k, (key, array) in enumerate(dense.items()):
        if array.ndim == 1:
            wide = np.zeros(9 * (k + 2), array.dtype)
            array = wide[:: k + 2] if library == "torch" or k % 2 == 0 else wide[:: -(k + 2)]
        given[key] = array.copy() if array.ndim == 2 else array
    weights = [rng.normal(size=(9, 5)).astype(np.float32)]
    weights.append(weights[0].copy())
    for step in (1, 2, 6):
        grad, indices = rng.normal(size=(6, 5)).astype(np.float32), rng.integers(0, 9, 6)
        coldrow.apply_(update, weights[0], grad, indices, dense, step=step)
        arrays = given
        if library == "torch":
            arrays = {key: torch.from_numpy(array) for key, array in given.items()}
        coldrow.apply_(update, weights[1], grad, indices, arrays, step=step)
    assert weights[0].tobytes() == weights[1].tobytes()
    for key, array in dense.items():
        assert array.any()
        assert array.tobytes() == given[key].tobytes()
    # A read finds prev_iter likewise.
    outs = [np.empty((9, 5), np.float32) for _ in range(2)]
    for out, weight, state in zip(outs, weights, (dense, given), strict=True):
        coldrow.read_(out, update, weight, np.arange(9), state, step=9)
    assert outs[0].tobytes() == outs[1].tobytes() != weights[0].tobytes()


def make(name: str, seed: int = 0, own: str | None = None, **options) -> TableBatchedEmbeddingBags:
    """Two tables in bfloat16, read-charged, everything on that a checkpoint must carry.

    ``own``: the optimizer of the second.
    """
    torch.manual_seed(seed)
    decay = coldrow.EpochGated(coldrow.CumulativeLinear(half_life=2.0))
    updates = [
        coldrow.RowUpdate(OPTIMIZERS[n], decay, coldrow.Stochastic(seed=5), decay_state=True)
        for n in (name, own or name)
    ]
    return TableBatchedEmbeddingBags(
        [
            Table("a", 9, 4, dtype=torch.bfloat16, features=["x", "y"]),
            Table("b", 7, 19, dtype=torch.bfloat16, update=updates[1]),
        ],
        updates[0],
        **{"charge": "read", **options},
    )


def train(emb, *seeds: int) -> None:
    """One step per seed: two bags of two rows of each feature."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        indices = [torch.randint(n, (4,), generator=generator) for n in (9, 9, 7)]
        out = emb(torch.cat(indices), torch.arange(0, 13, 2))
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        if not emb.fused:
            emb.step()
            emb.zero_grad()


def in_mid_training(name: str, **options) -> TableBatchedEmbeddingBags:
    emb = make(name, **options)
    train(emb, 1, 2, 3)
    emb.clock = 6
    emb.new_epoch()
    train(emb, 4)
    emb.lr = 0.02
    return emb


def snapshot(emb) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in emb.state_dict().items() if k != "_extra_state"}


def assert_same(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key in one:
        a, b = one[key], other[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        bits = [x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)]
        assert torch.equal(*bits), key


@both_layouts
@every_optimizer
def test_views_are_live_and_writable_and_counted(name, layout):
    emb = make(name, state_layout=layout)
    for table, rows, dim in (("a", 9, 4), ("b", 7, 19)):
        views = emb.state[table]
        assert {n: tuple(v.shape) for n, v in views.items()} == shapes_of(name, rows, dim)
        for key, view in views.items():
            assert view.dtype == (torch.int32 if key == "prev_iter" else torch.float32)
            assert not view.any()
    by_row, by_element = STATES[name]
    assert emb.state_bytes() == sum(
        4 * rows * (1 + len(by_row) + dim * len(by_element)) for rows, dim in ((9, 4), (7, 19))
    )
    views = dict(emb.state["a"])
    assert views["prev_iter"].stride() == ((1 + len(by_row),) if layout == "record" else (1,))
    for key in by_element:
        assert views[key].is_contiguous()  # ones of their own in both layouts

    train(emb, 1)
    touched = views["prev_iter"] > 0
    assert 0 < int(touched.sum()) < 9
    for view in views.values():  # seen through the views taken before
        assert torch.equal(view.reshape(9, -1).any(1), touched)
    with torch.no_grad():
        for key in views.keys() - {"prev_iter"}:
            views[key].copy_(torch.rand(views[key].shape) + 1)
            views[key][3] = 2.0
        views["prev_iter"][3] = 1
        emb.weights["a"][3] = 1.5
    before = Table64(emb.weights["a"], emb.state["a"])
    out = emb(torch.tensor([3]), torch.tensor([0, 1, 1, 1]))
    out[:, :4].sum().backward()  # goes on from what was written
    check_step(
        emb.update,
        before,
        Table64(emb.weights["a"], views),
        np.ones((1, 4)),
        np.array([3]),
        step=2,
    )


@every_optimizer
def test_evict_zeroes_all_state(name):
    emb = make(name)
    emb(torch.arange(9).repeat(3) % 7, torch.tensor([0, 9, 18, 27])).sum().backward()
    train(emb, 1, 2, 3, 4)
    before = snapshot(emb)
    emb.evict("b", [2, 5, 2])
    kept = [0, 1, 3, 4, 6]
    for key, view in emb.state["b"].items():
        assert before[f"state.b.{key}"][[2, 5]].any()
        assert not view[[2, 5]].any()
        assert torch.equal(view[kept], before[f"state.b.{key}"][kept])
    assert_same(
        {k: v for k, v in snapshot(emb).items() if ".a" in k},
        {k: v for k, v in before.items() if ".a" in k},
    )


@both_layouts
@every_optimizer
def test_conversion_leaves_state_alone(name, layout):
    emb = make(name, state_layout=layout)
    train(emb, 1, 2)
    before = snapshot(emb)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert emb.to(dtype) is emb
        assert emb.weights["a"].dtype == dtype
        after = snapshot(emb)
        state = [k for k in before if not k.startswith("weights.")]
        assert_same({k: after[k] for k in state}, {k: before[k] for k in state})
    # Three tables later: training goes on in the memory that the views show.
    train(emb.half(), 3)
    assert emb.state["a"]["prev_iter"].max() == 3


def through_state_dict(emb, options):
    buffer = io.BytesIO()
    torch.save(emb.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(seed=99, **options)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    return fresh


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": lambda emb, _: copy.deepcopy(emb),
    "pickle": lambda emb, _: pickle.loads(pickle.dumps(emb)),
}


@both_layouts
@pytest.mark.parametrize("how", COPIES)
@every_optimizer
def test_copies_in_mid_training_go_on_bit_for_bit(name, how, layout):
    options = {"name": name, "state_layout": layout, "fused": layout == "record"}
    emb = in_mid_training(**options)
    other = COPIES[how](emb, options)
    before = snapshot(emb)
    assert_same(snapshot(other), before)
    train(other, 5, 6)
    assert_same(snapshot(emb), before)  # nothing is shared
    train(emb, 5, 6)
    for one in (emb, other):
        one.new_epoch()
        train(one, 7, 8)
    assert_same(snapshot(other), snapshot(emb))


@pytest.mark.parametrize(("source", "target"), [("record", "split"), ("split", "record")])
@every_optimizer
def test_layouts_load_each_other(name, source, target):
    emb = in_mid_training(name, own="Adam by row", state_layout=source)
    fresh = make(name, seed=9, own="Adam by row", state_layout=target)
    fresh.load_state_dict(emb.state_dict())
    for one in (emb, fresh):
        train(one, 5, 6)
    assert_same(snapshot(fresh), snapshot(emb))


@every_optimizer
def test_every_state_that_is_saved_matters(name):
    """The checks above can fail."""
    emb = in_mid_training(name)
    for key in shapes_of(name, 7, 19):
        state = copy.deepcopy(emb.state_dict())
        array = state[f"state.b.{key}"]
        array.copy_(array.clamp(max=1) if key == "prev_iter" else array * 1.5 + 1)
        fresh = make(name)
        fresh.load_state_dict(state)
        same = copy.deepcopy(emb)
        for one in (fresh, same):
            train(one, 5, 6)
        assert not torch.equal(fresh.weights["b"], same.weights["b"]), key


# --------------------------------------------------------------------------- state that does not fit


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("theirs", "mine"), list(itertools.permutations(OPTIMIZERS, 2)))
def test_checkpoint_of_another_optimizer_is_refused_and_nothing_changes(theirs, mine, own):
    """Of the module or of one table. Where the arrays would fit, because the policies differ."""
    if own:
        saved, emb = in_mid_training("Adagrad", own=theirs), in_mid_training("Adagrad", own=mine)
    else:
        saved, emb = in_mid_training(theirs), in_mid_training(mine)
    before = snapshot(emb)
    with pytest.raises(RuntimeError, match=r"update of 'b': got .*accepted: the module's"):
        emb.load_state_dict(saved.state_dict())
    assert_same(snapshot(emb), before)

    fits = shapes_of(theirs, 7, 19).items()
    shared = [k for k, s in shapes_of(mine, 7, 19).items() if (k, s) not in fits]
    shared = [k for k in shared if k in dict(fits)]  # names of both, of different shapes
    if not shared:
        return
    with pytest.raises(RuntimeError, match=rf"state\.b\.{shared[0]}: got torch.float32 \["):
        emb.load_state_dict(saved.state_dict(), strict=False)
    assert_same(snapshot(emb), before)


WRONG = {
    "transposed": lambda x: x.T.contiguous(),
    "of one row": lambda x: x[:1].clone(),
    "of one column": lambda x: x[:, :1].clone(),
    "by row": lambda x: x[:, 0].clone(),
    "float64": lambda x: x.double(),
    "bfloat16": lambda x: x.bfloat16(),
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("name", ["Adagrad", "Adam by row", "PartialRowwiseAdam"])
def test_element_wise_state_that_does_not_fit_is_refused_and_nothing_changes(name, how, strict):
    emb = in_mid_training(name)
    state = make(name, seed=9).state_dict()
    state["state.b.momentum1"] = WRONG[how](state["state.b.momentum1"])
    before = snapshot(emb)
    with pytest.raises(RuntimeError, match=r"state\.b\.momentum1: got .*float32 \[7, 19\]"):
        emb.load_state_dict(state, strict=strict)
    assert_same(snapshot(emb), before)


@every_optimizer
def test_missing_and_unexpected_state_is_refused_and_nothing_changes(name):
    emb = in_mid_training(name)
    before = snapshot(emb)
    for key in shapes_of(name, 7, 19):
        state = make(name, seed=9).state_dict()
        del state[f"state.b.{key}"]
        with pytest.raises(RuntimeError, match=rf'Missing key.*"state\.b\.{key}"'):
            emb.load_state_dict(state)
        assert_same(snapshot(emb), before)
    state = make(name, seed=9).state_dict() | {"state.b.momentum3": torch.zeros(7, 19)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"state\.b\.momentum3"'):
        emb.load_state_dict(state)
    assert_same(snapshot(emb), before)


# ------------------------------------------------------------------------------------ what is not finite


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


# ------------------------------------------------------------------------------------ SparseOptimizer


def module_and_optimizer(name: str, dtype=torch.float32):
    """An unfused module, and an nn.EmbeddingBag of the same weights with a SparseOptimizer."""
    update = coldrow.RowUpdate(
        OPTIMIZERS[name],
        coldrow.EpochGated(coldrow.Exponential(half_life=4.0)),
        coldrow.Stochastic(seed=8),
        decay_state=True,
    )
    torch.manual_seed(0)
    emb = TableBatchedEmbeddingBags([Table("a", 9, 7, dtype=dtype)], update, fused=False)
    bag = nn.EmbeddingBag(9, 7, mode="sum", sparse=True, include_last_offset=True, dtype=dtype)
    with torch.no_grad():
        bag.weight.copy_(emb.weights["a"])
    return emb, bag, SparseOptimizer(bag.parameters(), update)


def touch(layer, owner, seed: int) -> None:
    """One step; owner: what steps, the module itself or its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    out = layer(torch.randint(9, (6,), generator=generator), torch.tensor([0, 2, 5, 6]))
    owner.zero_grad()
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    owner.step()


@every_optimizer
def test_sparse_optimizer_is_the_module(name):
    emb, bag, optimizer = module_and_optimizer(name)
    for seed in range(6):
        if seed == 3:
            emb.new_epoch()
            optimizer.new_epoch()
        touch(emb, emb, seed)
        touch(bag, optimizer, seed)
        assert torch.equal(bag.weight, emb.weights["a"])
        assert_same(optimizer.state[bag.weight], dict(emb.state["a"]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_optimizer
def test_copies_of_a_sparse_optimizer_go_on_bit_for_bit(name, dtype):
    _, bag, optimizer = module_and_optimizer(name, dtype)
    for seed in range(3):
        touch(bag, optimizer, seed)
    optimizer.new_epoch()
    touch(bag, optimizer, 3)
    buffer = io.BytesIO()
    torch.save((bag.state_dict(), optimizer.state_dict()), buffer)
    buffer.seek(0)
    weights, state = torch.load(buffer, weights_only=True)
    _, other, resumed = module_and_optimizer(name, dtype)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    pairs = [
        (bag, optimizer),
        (other, resumed),
        copy.deepcopy((bag, optimizer)),
        pickle.loads(pickle.dumps((bag, optimizer))),
    ]
    for layer, owner in pairs:
        assert {k: tuple(v.shape) for k, v in owner.state[layer.weight].items()} == shapes_of(
            name, 9, 7
        )
        for seed in (5, 6):
            touch(layer, owner, seed)
    for layer, owner in pairs[1:]:
        assert torch.equal(layer.weight, bag.weight)
        assert_same(owner.state[layer.weight], optimizer.state[bag.weight])


@every_optimizer
def test_sparse_optimizer_refuses_state_that_does_not_fit_and_nothing_changes(name):
    _, bag, optimizer = module_and_optimizer(name)
    touch(bag, optimizer, 0)
    before = {k: v.clone() for k, v in optimizer.state[bag.weight].items()}
    good = optimizer.state_dict()
    bad = [(f"state: got .*accepted: .*{key}", {key: None}) for key in before]
    bad.append((r"state: got .*'momentum3'", {"momentum3": torch.zeros(9, 7)}))
    for key, array in before.items():
        if key != "prev_iter":
            for wrong in (array[:5], array.double(), array.unsqueeze(1), array.reshape(-1)[:1]):
                shape = re.escape(f"{wrong.dtype} {list(wrong.shape)}")
                bad.append((f"^state {key}: got {shape}, accepted: torch.float32", {key: wrong}))
    others = (o for n, o in OPTIMIZERS.items() if STATES[n] != STATES[name])
    for message, change in bad:
        state = copy.deepcopy(good)
        for key, array in change.items():
            if array is None:
                del state["state"][0][key]
            else:
                state["state"][0][key] = array
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert_same(optimizer.state[bag.weight], before)
    for other in others:  # the arrays of one optimizer under the name of another
        state = copy.deepcopy(good)
        update = coldrow.RowUpdate.from_dict(state["param_groups"][0]["update"])
        state["param_groups"][0]["update"] = dataclasses.replace(update, optimizer=other).to_dict()
        with pytest.raises(ValueError, match=r"^state( \w+)?: got "):
            optimizer.load_state_dict(state)
        assert_same(optimizer.state[bag.weight], before)
        assert optimizer.param_groups[0]["update"] == update
