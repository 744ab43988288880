"""RowwiseRMSpropAR and SparseOptimizer saved, loaded and copied in mid-training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

import coldrow

torch = pytest.importorskip("torch")
from sparse_embeddings import (  # noqa: E402
    UPDATE,
    assert_equal_state,
    batches,
    make_embedding,
    make_poisoned,
    train,
)

from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer  # noqa: E402

STOCHASTIC = coldrow.Stochastic(seed=7)
BUILDS = {
    "AR float32": (RowwiseRMSpropAR, {"lr": 0.1, "ar_alpha": 0.2}, torch.float32),
    "AR bfloat16": (
        RowwiseRMSpropAR,
        {"lr": 0.1, "ar_alpha": 0.2, "rounding": STOCHASTIC},
        torch.bfloat16,
    ),
    "gated float16": (
        SparseOptimizer,
        {
            "update": coldrow.RowUpdate(
                coldrow.RowwiseRMSprop(lr=0.1),
                coldrow.EpochGated(coldrow.CumulativeLinear(half_life=3.0)),
                STOCHASTIC,
                decay_state=True,
            )
        },
        torch.float16,
    ),
    "tensor lr": (
        SparseOptimizer,
        {"update": UPDATE, "lr": torch.tensor(0.3)},
        torch.float32,
    ),
}


def make_pair(name: str, seed: int = 0) -> tuple:
    build, options, dtype = BUILDS[name]
    layer = make_embedding(seed, dtype)
    return layer, build(layer.parameters(), **copy.deepcopy(options))


def start(name: str) -> tuple:
    """A pair in the middle of a run: an epoch declared, the clock ahead, lr changed."""
    layer, optimizer = make_pair(name)
    train(optimizer, layer, batches(3))
    optimizer.clock = 5
    optimizer.new_epoch()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
    train(optimizer, layer, batches(1, seed=3))
    return layer, optimizer


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_state_dict(name, layer, optimizer):
    fresh, other = make_pair(name, seed=99)
    fresh.load_state_dict(saved(layer.state_dict()))
    other.load_state_dict(saved(optimizer.state_dict()))
    return fresh, other


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": lambda name, *pair: copy.deepcopy(pair),
    "pickle": lambda name, *pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", BUILDS)
def test_copy_in_the_middle_of_a_run_goes_on_bit_for_bit(how, name):
    layer, optimizer = start(name)
    fresh, other = COPIES[how](name, layer, optimizer)
    assert other.clock == optimizer.clock == 6
    assert fresh.weight is not layer.weight
    for pair in ((layer, optimizer), (fresh, other)):
        train(pair[1], pair[0], batches(3, seed=5))
        pair[1].new_epoch()
        train(pair[1], pair[0], batches(2, seed=6))
    assert torch.equal(layer.weight, fresh.weight)
    assert_equal_state(optimizer.state[layer.weight], other.state[fresh.weight])
    assert (other.clock, other.param_groups[0]["lr"]) == (11, optimizer.param_groups[0]["lr"])
    dtypes = {key: value.dtype for key, value in other.state[fresh.weight].items()}
    assert dtypes == {"prev_iter": torch.int32, "momentum1": torch.float32}


def test_resuming_matters():
    """The check above can fail: without the clock, or without the state, the run differs."""
    layer, optimizer = start("AR float32")
    for spoil in (
        lambda d: d["clock"].fill_(50),
        lambda d: d["state"][0]["prev_iter"].fill_(1),
        lambda d: d["param_groups"][0].update(lr=0.01),
    ):
        fresh, other = make_pair("AR float32")
        state = copy.deepcopy(optimizer.state_dict())
        spoil(state)
        fresh.load_state_dict(layer.state_dict())
        other.load_state_dict(state)
        train(other, fresh, batches(1, seed=5))
        same, third = through_state_dict("AR float32", layer, optimizer)
        train(third, same, batches(1, seed=5))
        assert not torch.equal(fresh.weight, same.weight)


def test_state_dict_is_not_changed_by_training_on():
    layer, optimizer = start("AR float32")
    state = optimizer.state_dict()
    clock = state["clock"].clone()
    train(optimizer, layer, batches(1))
    assert torch.equal(state["clock"], clock)


def test_load_copies():
    layer, optimizer = start("AR float32")
    state = optimizer.state_dict()
    fresh, other = make_pair("AR float32")
    other.load_state_dict(state)
    train(other, fresh, batches(2))
    assert other.clock == 8
    assert optimizer.clock == 6
    assert optimizer.state[layer.weight]["prev_iter"].max() == 6


def test_policies_come_from_the_state_dict():
    """As torch's optimizers do it: options of param groups are loaded with the rest."""
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), UPDATE)
    other = SparseOptimizer(layer.parameters(), coldrow.RowUpdate())
    other.load_state_dict(saved(optimizer.state_dict()))
    assert other.param_groups[0]["update"] == UPDATE


def test_loading_sets_the_clock_back():
    layer, optimizer = make_pair("AR float32")
    train(optimizer, layer, batches(1))
    state = saved(optimizer.state_dict())
    train(optimizer, layer, batches(3))
    optimizer.load_state_dict(state)
    assert optimizer.clock == 1


def test_state_dict_from_before_the_first_step_starts_over():
    layer, optimizer = make_pair("AR float32")
    weights, state = copy.deepcopy(layer.state_dict()), saved(optimizer.state_dict())
    train(optimizer, layer, batches(3))
    want = layer.weight.detach().clone()
    layer.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.clock == 0
    train(optimizer, layer, batches(3))
    assert torch.equal(layer.weight, want)


SPOILED = {
    r"prev_iter.*got.*7.*accepted.*6": lambda d: d["state"][0]["prev_iter"].fill_(7),
    r"prev_iter.*got.*-1.*accepted": lambda d: d["state"][0]["prev_iter"].fill_(-1),
    r"clock.*got.*-1.*accepted": lambda d: d["clock"].fill_(-1),
    r"clock.*got.*2147483648.*accepted": lambda d: d["clock"].fill_(2**31),
    r"state.*momentum1": lambda d: d["state"][0].pop("momentum1"),
    r"lr: got nan, accepted": lambda d: d["param_groups"][0].update(lr=float("nan")),
    r"ar_alpha: got -1\.0, accepted": lambda d: d["param_groups"][0].update(ar_alpha=-1.0),
    r"clock.*accepted": lambda d: [part.pop("clock") for part in (d, *d["param_groups"])],
}


@pytest.mark.parametrize("says", SPOILED)
def test_state_that_cannot_be_is_refused_and_nothing_changes(says):
    _, optimizer = start("AR float32")
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    SPOILED[says](bad)
    with pytest.raises((ValueError, KeyError), match=says):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert_equal_state(after["state"][0], before["state"][0])
    assert after["param_groups"] == before["param_groups"]
    assert (after["clock"], after["epoch_start"]) == (before["clock"], before["epoch_start"])


def test_copy_counts_skipped_rows():
    _, optimizer = make_poisoned("skip", float("nan"))
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.nonfinite_rows, other.on_nonfinite, other.clock) == (1, "skip", 1)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            coldrow.Adam(),
            r"^update: got one with \['momentum1', 'momentum2', 'prev_iter'\], accepted",
        ),
        (coldrow.SGD(), r"^update: got one with \['prev_iter'\], accepted: .*'momentum1'"),
        (coldrow.RowwiseAdagrad(), r"^momentum1: got float32\[12, 5\], accepted: shape \[12\]"),
    ],
)
def test_another_optimizer_in_mid_training_is_refused_and_nothing_changes(other, says):
    """Its state would be missing, or be taken for something else."""
    layer = make_embedding()
    optimizer = SparseOptimizer(layer.parameters(), coldrow.RowUpdate(coldrow.Adagrad()))
    train(optimizer, layer, batches(2))
    before = copy.deepcopy((layer.weight, optimizer.state[layer.weight]))
    optimizer.param_groups[0]["update"] = coldrow.RowUpdate(other)
    with pytest.raises(ValueError, match=says):
        optimizer.step()
    assert torch.equal(layer.weight, before[0])
    assert_equal_state(optimizer.state[layer.weight], before[1])
    assert optimizer.clock == 2


def test_state_dicts_of_the_two_classes_are_not_each_others():
    layer = make_embedding()
    one = SparseOptimizer(layer.parameters(), UPDATE)
    other = RowwiseRMSpropAR(layer.parameters())
    with pytest.raises(ValueError, match=r"^param_groups: got no \['ar_alpha', .*accepted"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"^param_groups: got no \['update'\], accepted"):
        one.load_state_dict(other.state_dict())
