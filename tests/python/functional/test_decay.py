"""Decay schedules against high-precision products, for all gaps and strengths."""

import math

import mpmath
import numpy as np
import pytest

import coldrow
from coldrow import _core
from coldrow.policies import compiled

GAPS = [1, 2, 3, 5, 10, 37, 100, 999, 1406, 10_000, 45_571, 10**6, 10**8, 2**31 - 2]


def factor(decay, gap, lr=1.0, *, epoch_start=0, step=2**31 - 1):
    """The factor of a touch `gap` steps after the last one."""
    update = compiled(coldrow.RowUpdate(decay=decay))
    return _core.factor(update, step - gap, step, lr, epoch_start, False)


def close(got, want):
    """2e-6 relative above 1e-4, 1e-9 absolute below."""
    want = float(want)
    return abs(got - want) <= (2e-6 * want if want > 1e-4 else 1e-9)


def exact_product(alpha, n):
    """prod_{j=1}^{n} (1 - alpha*j) by gamma functions, 60 digits."""
    with mpmath.workdps(60):
        x = 1 / mpmath.mpf(alpha)
        if n >= x:
            return mpmath.mpf(0)
        log = mpmath.loggamma(x) - mpmath.loggamma(x - n) - n * mpmath.log(x)
        return mpmath.exp(log)


@pytest.mark.parametrize("alpha", [1e-9, 3e-9, 9.9e-9, 1e-8, 1e-7, 1e-5, 1e-3, 0.02, 0.3, 1.0])
def test_cumulative_linear(alpha):
    middle = math.sqrt(1 / alpha)  # where the factor moves
    gaps = {*GAPS, *(max(1, int(middle * x)) for x in (0.01, 0.1, 0.5, 1, 2, 4, 6, 12))}
    for gap in sorted(gaps):
        got = factor(coldrow.CumulativeLinear(alpha=alpha), gap)
        assert close(got, exact_product(alpha, gap - 1)), (alpha, gap, got)


def test_the_gamma_oracle_is_the_product():
    product = 1.0
    for j in range(1, 40):
        product *= 1 - 0.01 * j
    assert math.isclose(exact_product(0.01, 39), product, rel_tol=1e-12)


def test_cumulative_linear_half_life():
    h = 1000.0
    assert factor(coldrow.CumulativeLinear(half_life=h), 1000) == pytest.approx(0.5, rel=2e-3)
    assert factor(coldrow.CumulativeLinear(half_life=h), 2000) == pytest.approx(0.0625, rel=6e-3)


@pytest.mark.parametrize("lr", [1e-3, 0.05, 1.0])
@pytest.mark.parametrize("weight_decay", [1e-9, 1e-6, 1e-3, 0.3, 1.0])
def test_exponential(lr, weight_decay):
    for gap in GAPS:
        with mpmath.workdps(60):
            base = 1 - mpmath.mpf(lr) * mpmath.mpf(weight_decay)
            want = base**gap
        got = factor(coldrow.Exponential(weight_decay=weight_decay), gap, lr)
        assert close(got, want), (lr, weight_decay, gap, got, float(want))


def test_exponential_half_life():
    decay = coldrow.Exponential(half_life=250.0)
    assert factor(decay, 250) == 0.5
    assert factor(decay, 500) == 0.25
    assert factor(decay, 25) == pytest.approx(2**-0.1, rel=1e-7)
    assert factor(decay, 2**31 - 2) == 0.0


def test_a_weight_decay_that_float32_cannot_hold_still_decays():
    # 1 - 1e-8 is 1 in float32
    assert factor(coldrow.Exponential(weight_decay=1e-8), 10**8) == pytest.approx(
        math.exp(-1), rel=1e-5
    )


def test_linear_clipped():
    decay = coldrow.LinearClipped(alpha=0.01, min_shrinkage=0.1)
    assert factor(decay, 10, lr=0.5) == pytest.approx(0.95, rel=1e-6)
    assert factor(decay, 10**6, lr=0.5) == np.float32(0.1)
    assert factor(coldrow.LinearClipped(0.01, 0.0), 10**6, lr=0.5) == 0.0


def test_constant():
    assert factor(coldrow.Constant(0.1), 1, lr=0.5) == factor(coldrow.Constant(0.1), 10**6, lr=0.5)
    assert factor(coldrow.Constant(0.1), 5, lr=0.5) == pytest.approx(0.95, rel=1e-6)
    assert factor(coldrow.Constant(0.1), 5, lr=100.0) == 0.0


ALL = [
    coldrow.NoDecay(),
    coldrow.LinearClipped(0.01),
    coldrow.LinearClipped(1e30, 0.0),
    coldrow.CumulativeLinear(alpha=1e-4),
    coldrow.CumulativeLinear(alpha=1e-9),
    coldrow.CumulativeLinear(alpha=1e30),
    coldrow.Exponential(weight_decay=0.1),
    coldrow.Exponential(weight_decay=1e30),
    coldrow.Exponential(half_life=10.0),
    coldrow.Constant(0.1),
    coldrow.EpochGated(coldrow.CumulativeLinear(alpha=1e-4)),
    coldrow.EpochReset(),
]


@pytest.mark.parametrize("decay", ALL, ids=repr)
def test_factors_lie_between_0_and_1_and_never_rise(decay):
    for epoch_start in (0, 2**31 - 50):
        last = 1.0
        for gap in [1, 2, 3, 49, 50, 51, 1000, 2**20, 2**31 - 2]:
            f = factor(decay, gap, 0.5, epoch_start=epoch_start)
            assert 0.0 <= f <= last
            last = f


@pytest.mark.parametrize("decay", ALL, ids=repr)
def test_a_read_right_after_the_touch_owes_nothing(decay):
    update = compiled(coldrow.RowUpdate(decay=decay))
    assert _core.factor(update, 99, 100, 0.5, 0, True) == 1.0
    assert _core.factor(update, 0, 100, 0.5, 0, True) == 1.0  # never touched


def test_epoch_gate():
    inner = coldrow.Exponential(half_life=10.0)
    gated = coldrow.EpochGated(inner)
    step, start = 100, 91  # the running epoch began with step 91
    assert factor(gated, 9, epoch_start=start, step=step) == 1.0  # last touched at 91
    assert factor(gated, 10, epoch_start=start, step=step) == factor(inner, 10)  # at 90
    assert factor(gated, 50, epoch_start=0, step=step) == 1.0  # no epoch was declared
    reset = coldrow.EpochReset()
    assert factor(reset, 9, epoch_start=start, step=step) == 1.0
    assert factor(reset, 10, epoch_start=start, step=step) == 0.0


def test_epoch_gate_at_the_first_step_of_an_epoch():
    reset = compiled(coldrow.RowUpdate(decay=coldrow.EpochReset()))
    # touched at the last step of the old epoch, read before the first of the new: gap 0, gate open
    assert _core.factor(reset, 99, 100, 1.0, 100, True) == 0.0
    # a row never touched has nothing to fade, first touch or not
    assert _core.factor(reset, 0, 100, 1.0, 100, False) == 1.0
