"""The state that every optimizer declares: shapes, views, copies, checkpoints."""

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
from every_optimizer import (
    DECAYS,
    OPTIMIZERS,
    ROUNDINGS,
    STATES,
    assert_same,
    both_layouts,
    every_optimizer,
    shapes_of,
    snapshot,
    subclasses,
)
from support import Table64, check_step

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.policies import compiled

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # torch's, of its own Adagrad
]


# ------------------------------------------------------------------------------------ as documented

SEMANTICS = pathlib.Path(__file__).parents[3] / "docs" / "semantics.md"


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
