"""Policies that are not accepted, and the least and largest values that are."""

from __future__ import annotations

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")
from refusals import FRACTION, INF, NAN, NUMBER, refused  # noqa: E402

c = coldrow
NORMAL = "accepted: a number >= 1.17549e-38 and finite"
BELOW_ONE = "accepted: a number >= 0 and <= 0.9999999404"  # the largest float32 below 1
POLICIES = {
    f"lr: got -1 ... {NUMBER}": (ValueError, lambda: c.RowwiseRMSprop(lr=-1)),
    f"eps: got nan ... {NUMBER}": (ValueError, lambda: c.RowwiseRMSprop(eps=NAN)),
    f"ema_beta: got 1.01 ... {FRACTION}": (ValueError, lambda: c.RowwiseRMSprop(ema_beta=1.01)),
    f"lr: got inf ... {NUMBER}": (ValueError, lambda: c.SGD(lr=INF)),
    f"lr: got None ... {NUMBER}": (TypeError, lambda: c.SGD(lr=None)),
    f"eps: got -0.1 ... {NUMBER}": (ValueError, lambda: c.RowwiseAdagrad(eps=-0.1)),
    f"eps: got 0 ... {NORMAL}": (ValueError, lambda: c.Adagrad(eps=0)),
    f"eps: got 1e-40 ... {NORMAL}": (ValueError, lambda: c.Adagrad(eps=1e-40)),
    f"eps: got 0.0 ... {NORMAL}": (ValueError, lambda: c.Adam(eps=0.0)),
    f"eps: got '0' ... {NORMAL}": (TypeError, lambda: c.PartialRowwiseAdam(eps="0")),
    f"eps: got -1.0 ... {NORMAL}": (ValueError, lambda: c.PartialRowwiseAdam(eps=-1.0)),
    f"beta1: got 1 ... {BELOW_ONE}": (ValueError, lambda: c.Adam(beta1=1)),
    f"beta1: got -0.1 ... {BELOW_ONE}": (ValueError, lambda: c.PartialRowwiseAdam(beta1=-0.1)),
    f"beta2: got 1.0 ... {BELOW_ONE}": (ValueError, lambda: c.PartialRowwiseAdam(beta2=1.0)),
    # In float32 that would be 1.
    f"beta2: got 0.99999999 ... {BELOW_ONE}": (ValueError, lambda: c.Adam(beta2=0.99999999)),
    f"beta2: got nan ... {BELOW_ONE}": (ValueError, lambda: c.Adam(beta2=NAN)),
    "bias_correction: got 'step' ... accepted: 'clock', 'row'": (
        ValueError,
        lambda: c.Adam(bias_correction="step"),
    ),
    "bias_correction: got True ... accepted: 'clock', 'row'": (
        ValueError,
        lambda: c.PartialRowwiseAdam(bias_correction=True),
    ),
    f"alpha: got inf ... {NUMBER}": (ValueError, lambda: c.LinearClipped(alpha=INF)),
    f"min_shrinkage: got 2 ... {FRACTION}": (ValueError, lambda: c.LinearClipped(0.1, 2)),
    f"alpha: got 'a' ... {NUMBER}": (TypeError, lambda: c.CumulativeLinear(alpha="a")),
    "CumulativeLinear: got neither ... accepted: exactly one of alpha and half_life": (
        TypeError,
        lambda: c.CumulativeLinear(),
    ),
    "CumulativeLinear: got alpha and half_life ... accepted: exactly one of": (
        TypeError,
        lambda: c.CumulativeLinear(alpha=1, half_life=2),
    ),
    "half_life: got 0 ... accepted: a number > 0": (
        ValueError,
        lambda: c.CumulativeLinear(half_life=0),
    ),
    "steps_per_epoch: got -5 ... accepted: a number > 0": (
        ValueError,
        lambda: c.CumulativeLinear.for_epoch(-5),
    ),
    "steps_per_epoch: got nan ... accepted: a number > 0": (
        ValueError,
        lambda: c.EpochGated.for_epoch(NAN),
    ),
    f"weight_decay: got -1 ... {NUMBER}": (ValueError, lambda: c.Exponential(weight_decay=-1)),
    "Exponential: got neither ... accepted: exactly one of weight_decay and half_life": (
        TypeError,
        lambda: c.Exponential(),
    ),
    f"weight_decay: got nan ... {NUMBER}": (ValueError, lambda: c.Constant(NAN)),
    "decay: got EpochReset() ... accepted: a decay that is not epoch-aware": (
        TypeError,
        lambda: c.EpochGated(c.EpochReset()),
    ),
    "seed: got -1 ... accepted: an integer from 0": (ValueError, lambda: c.Stochastic(seed=-1)),
    "seed: got 1844 ... accepted: an integer from 0": (ValueError, lambda: c.Stochastic(2**64)),
    "seed: got 0.5 ... accepted: an integer from 0": (TypeError, lambda: c.Stochastic(0.5)),
    "optimizer: got 'sgd' ... accepted: an instance of coldrow.Optimizer": (
        TypeError,
        lambda: c.RowUpdate(optimizer="sgd"),
    ),
    "decay: got 0.1 ... accepted: an instance of coldrow.Decay": (
        TypeError,
        lambda: c.RowUpdate(decay=0.1),
    ),
    "decay_state: got 'yes' ... accepted: True or False": (
        TypeError,
        lambda: c.RowUpdate(decay_state="yes"),
    ),
    "policy: got 'Sgd' ... accepted: RowUpdate, SGD, RowwiseRMSprop": (
        ValueError,
        lambda: c.RowUpdate.from_dict({"policy": "Sgd"}),
    ),
}


@pytest.mark.parametrize("says", POLICIES)
def test_policy_that_is_not_accepted(says):
    kind, build = POLICIES[says]
    with refused(kind, says):
        build()


def test_the_least_and_largest_that_is_accepted():
    assert c.RowwiseAdagrad(eps=0).eps == c.RowwiseRMSprop(eps=0).eps == 0
    for kind in (c.Adam, c.PartialRowwiseAdam):
        assert kind(beta1=0, beta2=0, eps=1.17549436e-38).beta1 == 0
        assert kind(beta1=1 - 2.0**-24, beta2=1 - 2.0**-24).beta2 < np.float32(1)
