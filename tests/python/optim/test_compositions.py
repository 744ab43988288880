"""Every optimizer, decay, rounding and dtype: each composition against the float64 reference step by step,
and bit for bit against itself.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from every_optimizer import (
    DECAYS,
    DTYPES,
    OPTIMIZERS,
    ROUNDINGS,
    STATES,
    assert_same,
    both_layouts,
    every_optimizer,
    snapshot,
    subclasses,
)
from support import Table64, check_step, exact_grad

import coldrow
from coldrow import _core
from coldrow.nn import Table, TableBatchedEmbeddingBags

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of its own Adagrad
]


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
