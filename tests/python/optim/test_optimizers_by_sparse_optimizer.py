"""Every optimizer under coldrow.optim.SparseOptimizer: the same as in a module."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re

import pytest
import torch
from every_optimizer import (
    DTYPES,
    OPTIMIZERS,
    STATES,
    assert_same,
    every_optimizer,
    shapes_of,
    touch,
)
from torch import nn

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of its own Adagrad
]


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
