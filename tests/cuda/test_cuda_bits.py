"""Bits: a GPU's are a CPU's where sums are exact and the policy has no transcendental function, and
every run's are the first run's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    EXACT_UPDATES,
    Batches,
    assert_same,
    both,
    contents,
    module,
    quarters,
    same_bits,
    using,
)

import coldrow

pytestmark = pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use")
ROUNDINGS = {"nearest": coldrow.Nearest(), "stochastic": coldrow.Stochastic(5)}
POOLINGS = ["sum", "weighted", "mean", "none"]


def train(place, *args, **options):
    """Train with exact gradients or noise; returns the outputs and all tables."""
    with using(place):
        return train_there(place, *args, **options)


def train_there(device, update, pooling="sum", *, steps=3, exact=True, seed=1, **options):
    weighted = pooling == "weighted"
    emb = module(device, update, pooling="sum" if weighted else pooling, **options)
    batches = Batches(emb, seed)
    found = {}
    for s in range(steps):
        # With lengths that are powers of two a mean is exact too.
        lengths = batches.rng.choice([0, 1, 2, 4, 8], 4 * batches.bags)
        indices, offsets, weights = batches.draw(weighted=weighted, lengths=lengths)
        if s == 1:
            emb.new_epoch()
        out = emb(indices, offsets, weights)
        grad = batches.grad_for(out)
        if not exact:
            noise = batches.rng.normal(size=tuple(out.shape))
            grad = torch.from_numpy(noise).to(out.device, out.dtype)
        out.backward(grad)
        found[f"out{s}"] = out.detach().cpu()
    emb.check()
    return {**found, **contents(emb)}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("update", EXACT_UPDATES)
def test_first_step_has_the_cpu_bits(device, update, pooling, dtype, rounding):
    """One step: after it sums of squares of element-wise state need not be exact any more."""
    update = replace(EXACT_UPDATES[update], rounding=ROUNDINGS[rounding])
    for charge in ("touch", "read"):
        options = {"dtype": dtype, "charge": charge, "steps": 1}
        assert_same(
            train(device, update, pooling, **options), train("cpu", update, pooling, **options)
        )


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_steps_have_the_cpu_bits(device, dtype, rounding, charge):
    """Gaps, epochs and a learning rate that changes; state that has been stored and read again."""
    update = replace(EXACT_UPDATES["rmsprop"], rounding=ROUNDINGS[rounding])
    options = {"dtype": dtype, "charge": charge, "steps": 6}
    assert_same(train(device, update, **options), train("cpu", update, **options))


@pytest.mark.parametrize("dim", [1, 3, 8, 50, 100, 129, 260, 1000])
def test_any_width_has_the_cpu_bits(device, dim):
    for dtype in DTYPES:
        update = replace(EXACT_UPDATES["rmsprop"], rounding=coldrow.Stochastic(2))
        options = {"dtype": dtype, "dim": (dim, dim, dim), "charge": "read", "steps": 1}
        assert_same(train(device, update, **options), train("cpu", update, **options))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_repeat_bit_for_bit(device, dtype, pooling):
    """Noise, all optimizers' worth of arithmetic, hot rows summed in parts: the same bits each time."""
    update = coldrow.RowUpdate(
        coldrow.Adam(lr=0.01), coldrow.CumulativeLinear(half_life=2.5), coldrow.Stochastic(1)
    )
    first = train(device, update, pooling, exact=False, dtype=dtype, charge="read")
    for _ in range(4):
        assert_same(train(device, update, pooling, exact=False, dtype=dtype, charge="read"), first)


def test_long_runs_repeat_and_are_near(device):
    """One row gets nearly all of the gradients of a large batch."""
    n, rows, dim = 200_000, 5, 96
    rng = np.random.default_rng(3)
    grad = torch.from_numpy(rng.normal(size=(n, dim))).float()
    indices = torch.from_numpy(np.minimum(rng.geometric(0.9, n) - 1, rows - 1))
    update = EXACT_UPDATES["rmsprop"]
    results = []
    for place in (device, device, device, "cpu"):
        weight = torch.ones(rows, dim, device=place)
        state = coldrow.init_state(update, rows, dim, like=weight)
        with using(place):
            coldrow.apply_(update, weight, grad.to(place), indices.to(place), state, step=1)
        results.append((weight.cpu(), state["momentum1"].cpu()))
    for weight, momentum1 in results[1:3]:
        assert same_bits(weight, results[0][0])
        assert same_bits(momentum1, results[0][1])
    torch.testing.assert_close(results[0], results[3], rtol=1e-4, atol=1e-5)


def test_stochastic_bits_are_keyed(device):
    """Seed, step, table and offsets decide the bits; shards draw what the whole table draws."""
    rows, dim = 64, 40
    start = torch.full((rows, dim), 1.7, dtype=torch.bfloat16)

    def run(place, *, seed=3, step=1, piece=slice(None), **keys):
        weight = start[piece].to(place, copy=True)
        update = coldrow.RowUpdate(
            coldrow.RowwiseRMSprop(lr=1.0), coldrow.Constant(0.22223), coldrow.Stochastic(seed)
        )
        state = coldrow.init_state(update, *weight.shape, like=weight)
        zero = torch.zeros(weight.shape, device=place)
        rows = torch.arange(len(weight), device=place)
        with using(place):
            coldrow.apply_(update, weight, zero, rows, state, step=step, **keys)
        return weight.cpu()

    base = run(device)
    assert same_bits(base, run("cpu"))
    assert len(base.unique()) == 2
    for change in (
        {"seed": 4},
        {"step": 2},
        {"table": "user"},
        {"row_offset": 64},
        {"col_offset": 8},
    ):
        assert same_bits(run(device, **change), run("cpu", **change)), change
        assert not torch.equal(run(device, **change), base), change
    shards = [run(device, piece=slice(0, 20)), run(device, piece=slice(20, None), row_offset=20)]
    assert torch.equal(torch.cat(shards), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_functions_have_the_cpu_bits(device, dtype):
    """apply_ and read_ with int32 and int64 indices and gradients of every dtype."""
    rng = np.random.default_rng(5)
    start = torch.from_numpy(rng.normal(size=(50, 36))).to(dtype)
    update = replace(EXACT_UPDATES["rmsprop"], rounding=coldrow.Stochastic(9))
    for grad_dtype in DTYPES:
        for index_dtype in (torch.int32, torch.int64):
            grad = torch.from_numpy(quarters(rng, (300, 36))).to(grad_dtype)
            indices = torch.from_numpy(rng.integers(0, 50, 300)).to(index_dtype)
            found = []
            for place in both():
                weight = start.to(place, copy=True)
                state = coldrow.init_state(update, 50, 36, like=weight)
                coldrow.apply_(update, weight, grad.to(place), indices.to(place), state, step=4)
                out = torch.empty(300, 36, device=place)
                coldrow.read_(out, update, weight, indices.to(place), state, step=9)
                found.append(
                    {
                        "weight": weight.cpu(),
                        "out": out.cpu(),
                        **{k: v.cpu() for k, v in state.items()},
                    }
                )
            assert_same(*found)
