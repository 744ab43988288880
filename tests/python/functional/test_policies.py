"""Policies as values: equal, hashable, picklable, printed as written, refused by name."""

import copy
import pickle

import pytest

import coldrow
from coldrow import _core, policies
from coldrow.policies import compiled

UPDATES = [
    coldrow.RowUpdate(),
    coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.02), coldrow.LinearClipped(1e-3)),
    coldrow.RowUpdate(decay=coldrow.CumulativeLinear(alpha=1e-4), decay_state=True),
    coldrow.RowUpdate(decay=coldrow.CumulativeLinear(half_life=100)),
    coldrow.RowUpdate(decay=coldrow.Exponential(half_life=100)),
    coldrow.RowUpdate(decay=coldrow.Exponential(weight_decay=0.1), rounding=coldrow.Stochastic(7)),
    coldrow.RowUpdate(decay=coldrow.Constant(0.5)),
    coldrow.RowUpdate(decay=coldrow.EpochGated.for_epoch(1000), decay_state=True),
    coldrow.RowUpdate(decay=coldrow.EpochReset()),
]


@pytest.mark.parametrize("update", UPDATES, ids=repr)
def test_values(update):
    assert eval(repr(update), vars(coldrow)) == update
    assert pickle.loads(pickle.dumps(update)) == update
    assert copy.deepcopy(update) == update
    assert hash(copy.deepcopy(update)) == hash(update)
    assert coldrow.RowUpdate.from_dict(update.to_dict()) == update
    assert compiled(copy.deepcopy(update)) is compiled(update)
    assert [u for u in UPDATES if u == update] == [update]
    assert update.state_names == ("prev_iter", "momentum1")


def test_defaults_for_an_epoch():
    assert coldrow.CumulativeLinear.for_epoch(200) == coldrow.CumulativeLinear(half_life=60)
    assert coldrow.EpochGated.for_epoch(200) == coldrow.EpochGated(
        coldrow.CumulativeLinear(half_life=10)
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: coldrow.RowwiseRMSprop(lr=-1), ValueError, r"lr: got -1, accepted: a number >= 0"),
        (lambda: coldrow.RowwiseRMSprop(lr=float("nan")), ValueError, r"lr: got nan"),
        (lambda: coldrow.RowwiseRMSprop(lr=float("inf")), ValueError, r"lr: got inf"),
        (lambda: coldrow.RowwiseRMSprop(lr="0.1"), TypeError, r"lr: got '0.1', accepted: a number"),
        (lambda: coldrow.RowwiseRMSprop(eps=-1e-8), ValueError, r"eps: got -1e-08"),
        (lambda: coldrow.RowwiseRMSprop(ema_beta=1.5), ValueError, r"ema_beta: got 1.5.*<= 1"),
        (lambda: coldrow.LinearClipped(-1), ValueError, r"alpha: got -1"),
        (lambda: coldrow.LinearClipped(1, 2), ValueError, r"min_shrinkage: got 2"),
        (lambda: coldrow.Constant(None), TypeError, r"weight_decay: got None"),
        (lambda: coldrow.CumulativeLinear(), TypeError, r"got neither, accepted: exactly one"),
        (lambda: coldrow.CumulativeLinear(1, 2), TypeError, r"got alpha and half_life"),
        (lambda: coldrow.Exponential(half_life=0), ValueError, r"half_life: got 0.*> 0"),
        (lambda: coldrow.EpochGated(coldrow.EpochReset()), TypeError, r"decay: got EpochReset\(\)"),
        (lambda: coldrow.EpochGated(3), TypeError, r"decay: got 3"),
        (lambda: coldrow.Stochastic(-1), ValueError, r"seed: got -1"),
        (lambda: coldrow.Stochastic(1.5), TypeError, r"seed: got 1.5"),
        (lambda: coldrow.RowUpdate(decay=0.1), TypeError, r"decay: got 0.1.*coldrow.Decay"),
        (lambda: coldrow.RowUpdate(optimizer="adam"), TypeError, r"optimizer: got 'adam'"),
        (lambda: coldrow.RowUpdate(rounding=None), TypeError, r"rounding: got None"),
        (lambda: coldrow.RowUpdate(decay_state=1), TypeError, r"decay_state: got 1"),
        (
            lambda: coldrow.RowUpdate.from_dict({"policy": "Magic"}),
            ValueError,
            r"policy: got 'Magic'",
        ),
    ],
)
def test_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_frozen():
    with pytest.raises(AttributeError):
        coldrow.LinearClipped(1.0).alpha = 2.0


def test_every_decay_is_listed_exported_and_does_something():
    """A decay forgotten somewhere on its way to the kernels would come out as a factor of 1."""
    kinds = {
        kind
        for kind in vars(policies).values()
        if isinstance(kind, type) and issubclass(kind, coldrow.Decay) and kind is not coldrow.Decay
    }
    listed = {type(u.decay): u for u in UPDATES}
    assert kinds == set(listed)
    for kind, update in listed.items():
        assert getattr(coldrow, kind.__name__) is kind
        factor = _core.factor(compiled(update), 100, 1000, 0.5, 500, False)
        assert (factor == 1.0) == (kind is coldrow.NoDecay), kind


def test_a_decay_without_a_kernel_is_refused():
    class Mine(coldrow.Decay):
        pass

    with pytest.raises(TypeError, match=r"decay: got .*Mine.* has no kernel"):
        coldrow.RowUpdate(decay=Mine())


def test_the_shortest_half_life_forgets_at_once():
    update = compiled(coldrow.RowUpdate(decay=coldrow.CumulativeLinear(half_life=1e-170)))
    assert _core.factor(update, 1, 2, 0.1, 0, False) == 1.0  # the step after the touch
    assert _core.factor(update, 1, 3, 0.1, 0, False) == 0.0
