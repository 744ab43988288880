"""Stochastic rounding: unbiased, repeatable, and what it is for."""

import numpy as np
import pytest
import torch

import coldrow
from coldrow import _core

GRID = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # spacing of [1, 2)


def shrink_once(dtype, value, factor, seed, *, rows=1, dim=1, table=0, step=1, row_offset=0):
    """Multiply a table of equal values by `factor` through an update with no gradient."""
    weight = torch.full((rows, dim), value, dtype=dtype)
    update = coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=1.0),
        coldrow.Constant(1.0 - factor),
        coldrow.Stochastic(seed) if seed is not None else coldrow.Nearest(),
    )
    state = coldrow.init_state(update, rows, dim, like=weight)
    coldrow.apply_(
        update,
        weight,
        torch.zeros(rows, dim),
        torch.arange(rows),
        state,
        step=step,
        table=table,
        row_offset=row_offset,
    )
    return weight


@pytest.mark.parametrize("dtype", GRID, ids=str)
@pytest.mark.parametrize("fraction", [0.03, 0.25, 0.5, 0.9])
def test_unbiased(dtype, fraction):
    """Rounds up with the probability of the dropped fraction: within 5 standard deviations.

    A correct implementation fails a case with probability below 6e-7; the seed is fixed.
    """
    grid = GRID[dtype]
    target = 1.0 + 8 * grid + fraction * grid
    start = 1.75
    w = shrink_once(dtype, start, target / start, seed=5, rows=2000, dim=50).double()
    exact = float(np.float32(np.float32(1) - np.float32(1 - target / start)) * np.float32(start))
    low = 1.0 + 8 * grid
    assert set(w.unique().tolist()) == {low, low + grid}
    p = (exact - low) / grid
    n = w.numel()
    ups = (w == low + grid).sum().item()
    assert abs(ups - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_subnormal_float16_is_unbiased():
    value, factor = 2.0**-20, 0.53  # 16 units of 2^-24: lands between 8 and 9 units
    w = shrink_once(torch.float16, value, factor, seed=1, rows=1000, dim=64).double()
    exact = float(np.float32(np.float32(1) - np.float32(1 - factor)) * np.float32(value))
    units = w / 2.0**-24
    assert set(units.unique().tolist()) == {8.0, 9.0}
    p = exact / 2.0**-24 - 8
    n = w.numel()
    assert abs(units.sub(8).sum().item() - n * p) < 5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("dtype", GRID, ids=str)
def test_repeatable_and_keyed(dtype):
    def run(**change):
        args = {"seed": 3, "rows": 64, "dim": 40} | change
        seed = args.pop("seed")
        return shrink_once(dtype, 1.7, 0.77777, seed, **args)

    base = run()
    assert torch.equal(run(), base)
    for change in ({"seed": 4}, {"table": 1}, {"table": "user"}, {"step": 2}, {"row_offset": 64}):
        assert not torch.equal(run(**change), base), change
    # neighbouring rows and columns draw different bits
    assert not torch.equal(base[0], base[1])
    assert len(base[0].unique()) == 2


@pytest.mark.parametrize("dtype", GRID, ids=str)
@pytest.mark.parametrize("split", [1, 7, 8, 20])
def test_shards_draw_what_the_whole_table_draws(dtype, split):
    """Row and column shards with their offsets give the bits of one table."""
    rng = np.random.default_rng(0)
    rows, dim = 12, 37
    update = coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=0.1), coldrow.Constant(0.3), coldrow.Stochastic(9)
    )
    whole = torch.from_numpy(rng.normal(size=(rows, dim))).to(dtype)
    parts = [whole[:5].clone(), whole[5:].clone()]
    columns = [whole[:, :split].contiguous(), whole[:, split:].contiguous()]
    zero = torch.zeros(rows, dim)

    def run(weight, **offsets):
        n, d = weight.shape
        state = coldrow.init_state(update, n, d, like=weight)
        grad = zero[:n, :d].contiguous()
        coldrow.apply_(update, weight, grad, torch.arange(n), state, step=1, table="t", **offsets)

    run(whole)
    run(parts[0])
    run(parts[1], row_offset=5)
    assert torch.equal(torch.cat(parts), whole)
    run(columns[0])
    run(columns[1], col_offset=split)
    assert torch.equal(torch.cat(columns, dim=1), whole)


@pytest.mark.parametrize("build", _core.builds())
def test_same_bits_for_any_number_of_threads_and_build(build):
    best, threads = _core.build(), torch.get_num_threads()
    results = []
    try:
        for name, n in ((best, threads), (build, 1), (build, 2)):
            _core.use_build(name)
            torch.set_num_threads(n)
            results.append(shrink_once(torch.bfloat16, 1.7, 0.7777, 3, rows=5000, dim=33))
    finally:
        _core.use_build(best)
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nearest_loses_a_small_decay_in_bfloat16_that_stochastic_keeps_on_average():
    """1 - 2^-10 per step for 700 steps halves a weight; to nearest, bfloat16 does not move at all."""
    factor, steps, rows, dim = 1 - 2.0**-10, 700, 200, 16

    def train(rounding):
        weight = torch.ones(rows, dim, dtype=torch.bfloat16)
        update = coldrow.RowUpdate(
            coldrow.RowwiseRMSprop(lr=1.0), coldrow.Constant(1 - factor), rounding
        )
        state = coldrow.init_state(update, rows, dim, like=weight)
        for step in range(1, steps + 1):
            coldrow.apply_(
                update, weight, torch.zeros(rows, dim), torch.arange(rows), state, step=step
            )
        return weight.double()

    assert torch.equal(train(coldrow.Nearest()), torch.ones(rows, dim, dtype=torch.float64))
    kept = train(coldrow.Stochastic(0))
    # Per step a weight moves by a unit (2^-8 below 1) or not at all: standard deviation of the mean
    # of 3200 independent weights after 700 steps is below 0.0012.
    assert kept.mean().item() == pytest.approx(factor**steps, abs=5 * 0.0012)


def test_float32_is_not_rounded():
    rng = np.random.default_rng(1)
    start = torch.from_numpy(rng.normal(size=(20, 9))).float()
    results = []
    for rounding in (coldrow.Nearest(), coldrow.Stochastic(3)):
        weight = start.clone()
        update = coldrow.RowUpdate(decay=coldrow.Constant(0.3), rounding=rounding)
        state = coldrow.init_state(update, 20, 9, like=weight)
        coldrow.apply_(update, weight, torch.ones(20, 9), torch.arange(20), state, step=1)
        results.append(weight)
    assert torch.equal(*results)
