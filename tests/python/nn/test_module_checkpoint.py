"""A module's state_dict: complete, plain, and loaded as a whole or not at all."""

from __future__ import annotations

import copy
import io

import pytest

import coldrow
from coldrow._described import described, plain_values

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

NAN = float("nan")
RMSPROP = coldrow.RowwiseRMSprop(lr=0.1, ema_beta=0.9)
UPDATE = coldrow.RowUpdate(RMSPROP, coldrow.LinearClipped(alpha=0.2))
GATED = coldrow.RowUpdate(
    RMSPROP,
    coldrow.EpochGated(coldrow.CumulativeLinear(half_life=2.0)),
    coldrow.Stochastic(seed=5),
    decay_state=True,
)
KEYS = {
    "weights.a": (torch.float32, (9, 4)),
    "weights.b": (torch.float32, (7, 6)),
    "state.a.prev_iter": (torch.int32, (9,)),
    "state.a.momentum1": (torch.float32, (9,)),
    "state.b.prev_iter": (torch.int32, (7,)),
    "state.b.momentum1": (torch.float32, (7,)),
    "clock": (torch.int64, ()),
    "epoch_start": (torch.int64, ()),
    "lr": (torch.float64, (1,)),
}


def make(update=UPDATE, seed=0, dtype=torch.float32, own=None, **options):
    """Two tables; ``own``: an update of table "b"."""
    torch.manual_seed(seed)
    tables = [Table("a", 9, 4, dtype=dtype), Table("b", 7, 6, dtype=dtype, update=own)]
    return TableBatchedEmbeddingBags(tables, update, **options)


def train(emb, *seeds: int) -> None:
    """One step per seed: two bags of two rows of each table."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.cat([torch.randint(n, (4,), generator=generator) for n in (9, 7)])
        out = emb(indices, torch.arange(0, 9, 2))
        (out.float() * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum().backward()
        if not emb.fused:
            emb.step()
            emb.zero_grad()


def make_trained(*args, **options):
    """In the middle of a run: an epoch declared, the clock ahead, lr changed."""
    emb = make(*args, **options)
    train(emb, 1, 2, 3)
    emb.clock = 6
    emb.new_epoch()
    train(emb, 4)
    emb.lr = 0.03
    return emb


def through_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tensors(emb) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in emb.state_dict().items() if k != "_extra_state"}


def assert_same(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert one[key].numpy(force=True).tobytes() == other[key].numpy(force=True).tobytes(), key


def assert_same16(one: dict, other: dict) -> None:
    """Bit for bit, where tables may be bfloat16, which NumPy has not."""
    bits = [
        {k: v.view(torch.int16) if v.dtype == torch.bfloat16 else v for k, v in d.items()}
        for d in (one, other)
    ]
    assert_same(*bits)


# ------------------------------------------------------------------------------------- what is saved


@pytest.mark.parametrize("layout", ["record", "split"])
def test_keys(layout):
    state = make_trained(state_layout=layout).state_dict()
    extra = plain_values(state.pop("_extra_state"))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in state.items()} == KEYS
    assert extra == {"update": {"a": UPDATE.to_dict(), "b": UPDATE.to_dict()}, "charge": "touch"}
    assert (int(state["clock"]), int(state["epoch_start"]), state["lr"].tolist()) == (7, 7, [0.03])


def test_keys_of_a_nested_module():
    parent = nn.ModuleDict({"emb": make(), "mlp": nn.Linear(2, 1)})
    mine = {k for k in parent.state_dict() if k.startswith("emb.")}
    assert mine == {f"emb.{key}" for key in KEYS} | {"emb._extra_state"}


@pytest.mark.parametrize("layout", ["record", "split"])
def test_saved_state_is_the_live_state(layout):
    emb = make_trained(state_layout=layout)
    state = emb.state_dict()
    for table, views in emb.state.items():
        for name, view in views.items():
            saved = state[f"state.{table}.{name}"]
            assert saved.data_ptr() == view.data_ptr()
            assert saved.stride() == view.stride()
            assert layout == "record" or saved.is_contiguous()
    train(emb, 9)
    now = emb.state_dict()
    for key, value in state.items():
        assert torch.equal(value, now[key])


def test_policies_are_saved_as_plain_values_that_rebuild_them():
    emb = make(GATED, own=UPDATE, charge="read")
    extra = plain_values(through_file(emb.state_dict())["_extra_state"])
    assert extra["charge"] == "read"
    rebuilt = {
        name: coldrow.RowUpdate.from_dict(values) for name, values in extra["update"].items()
    }
    assert rebuilt == {"a": GATED, "b": UPDATE}


def test_lr_assigned_to_a_group_is_saved():
    emb = make(own=coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5)))
    emb.param_groups[0]["lr"] = 0.25
    assert emb.state_dict()["lr"].tolist() == [0.25, 0.5]


# ---------------------------------------------------------------------------------------- resuming

RUNS = {
    "touch": {},
    "read": {"update": GATED, "charge": "read"},
    "bfloat16": {"update": GATED, "charge": "read", "dtype": torch.bfloat16},
    "float16": {"update": GATED, "dtype": torch.float16},
    "split": {"state_layout": "split"},
    "unfused": {"fused": False},
    "own update": {"own": GATED, "charge": "read"},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("run", RUNS)
def test_resuming_is_bit_equal(run, nested):
    emb, fresh = make_trained(**RUNS[run]), make(**RUNS[run], seed=99)
    if nested:
        nn.Sequential(fresh).load_state_dict(through_file(nn.Sequential(emb).state_dict()))
    else:
        fresh.load_state_dict(through_file(emb.state_dict()))
    assert (fresh.clock, fresh.epoch_start, fresh.lr) == (7, 7, 0.03)
    assert_same16(tensors(fresh), tensors(emb))
    for one in (emb, fresh):
        train(one, 5, 6)
        one.new_epoch()
        train(one, 7, 8)
    assert_same16(tensors(fresh), tensors(emb))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["clock"].add_(1),
        lambda state: state["epoch_start"].zero_(),
        lambda state: state["lr"].mul_(2),
        lambda state: state["state.a.prev_iter"].clamp_(max=1),
        lambda state: state["state.a.momentum1"].mul_(2),
    ],
    ids=["clock", "epoch_start", "lr", "prev_iter", "momentum1"],
)
def test_everything_saved_matters(spoil):
    """The check above can fail."""
    emb = make_trained(GATED, charge="read", dtype=torch.bfloat16)
    state = copy.deepcopy(emb.state_dict())
    spoil(state)
    fresh = make(GATED, charge="read", dtype=torch.bfloat16)
    fresh.load_state_dict(state)
    train(emb, 5, 6)
    train(fresh, 5, 6)
    assert not torch.equal(emb.weights["a"], fresh.weights["a"])


@pytest.mark.parametrize(("source", "target"), [("record", "split"), ("split", "record")])
def test_layouts_load_each_other(source, target):
    emb, fresh = make_trained(state_layout=source), make(state_layout=target)
    fresh.load_state_dict(through_file(emb.state_dict()))
    assert_same(tensors(fresh), tensors(emb))
    assert fresh.state["a"]["momentum1"].stride() == ((2,) if target == "record" else (1,))


def test_resuming_with_a_scheduler():
    def start():
        emb = make()
        return emb, lr_scheduler.CosineAnnealingLR(emb.optimizer, 6)

    def run(emb, scheduler, *seeds):
        for seed in seeds:
            train(emb, seed)
            emb.optimizer.step()
            scheduler.step()

    emb, scheduler = start()
    run(emb, scheduler, 1, 2)
    saved = through_file({"emb": emb.state_dict(), "scheduler": scheduler.state_dict()})
    other, resumed = start()
    other.load_state_dict(saved["emb"])
    resumed.load_state_dict(saved["scheduler"])
    run(emb, scheduler, 3, 4, 5)
    run(other, resumed, 3, 4, 5)
    assert_same(tensors(other), tensors(emb))
    assert 0 < other.lr < 0.1


def test_loading_copies_and_keeps_the_memory():
    emb, fresh = make_trained(), make()
    weight, views = fresh.weights["a"], fresh.state["a"]
    state = emb.state_dict()
    fresh.load_state_dict(state)
    assert fresh.weights["a"] is weight
    assert views["prev_iter"].max() == 7
    before = copy.deepcopy(state)
    train(fresh, 5)
    for key in KEYS:
        assert torch.equal(state[key], before[key])


def test_loading_may_set_the_clock_back():
    emb = make()
    train(emb, 1)
    state = through_file(emb.state_dict())
    train(emb, 2, 3)
    emb.new_epoch()
    emb.load_state_dict(state)
    assert (emb.clock, emb.epoch_start) == (1, 0)
    same = make()
    train(same, 1, 2)
    train(emb, 2)
    assert_same(tensors(emb), tensors(same))


def test_loading_with_assign_trains_what_was_loaded():
    emb, fresh = make_trained(), make()
    fresh.load_state_dict(copy.deepcopy(emb.state_dict()), assign=True)
    assert_same(tensors(fresh), tensors(emb))
    train(emb, 5)
    train(fresh, 5)
    assert_same(tensors(fresh), tensors(emb))
    assert fresh.param_groups[0]["params"][0] is fresh.weights["a"]


def test_loading_between_forward_and_backward_is_found():
    emb = make()
    out = emb(torch.tensor([1, 2]), torch.arange(3))
    emb.load_state_dict(make_trained().state_dict())
    before = tensors(emb)
    with pytest.raises(RuntimeError, match="between forward and backward"):
        out.sum().backward()
    assert_same(tensors(emb), before)


# ---------------------------------------------------------------------------------------- refusing


def policies(change):
    """Return what changes the policies in a state_dict."""

    def spoil(state) -> None:
        extra = plain_values(state["_extra_state"])
        change(extra)
        state["_extra_state"] = described(extra)

    return spoil


def other_policy(**changes):
    return policies(lambda extra: extra["update"]["b"].update(changes))


# What is done to a good state_dict, and what the message must say.
BAD = {
    "weight shape": (
        lambda s: s.update({"weights.b": torch.zeros(7, 5)}),
        ["weights.b: got torch.float32 [7, 5]", "accepted: torch.float32 [7, 6]"],
    ),
    "weight that could broadcast": (
        lambda s: s.update({"weights.a": torch.zeros(1, 4)}),
        ["weights.a: got torch.float32 [1, 4]", "accepted: torch.float32 [9, 4]"],
    ),
    "weight dtype": (
        lambda s: s.update({"weights.b": s["weights.b"].half()}),
        ["weights.b: got torch.float16 [7, 6]", "accepted: torch.float32 [7, 6]"],
    ),
    "state shape": (
        lambda s: s.update({"state.b.momentum1": torch.zeros(9)}),
        ["state.b.momentum1: got torch.float32 [9]", "accepted: torch.float32 [7]"],
    ),
    "state dtype": (
        lambda s: s.update({"state.b.prev_iter": torch.zeros(7, dtype=torch.int64)}),
        ["state.b.prev_iter: got torch.int64 [7]", "accepted: torch.int32 [7]"],
    ),
    "prev_iter averaged to fractions": (
        lambda s: s.update({"state.b.prev_iter": torch.full((7,), 0.5)}),
        ["state.b.prev_iter: got torch.float32", "no whole numbers", "accepted: torch.int32 [7]"],
    ),
    "no text": (
        lambda s: s.update(_extra_state=torch.tensor([300.0])),
        ["_extra_state: got a tensor [1] that is no text", "accepted"],
    ),
    "clock dtype": (
        lambda s: s.update(clock=torch.tensor(7.5)),
        ["clock: got torch.float32 that are no whole numbers", "accepted: torch.int64 []"],
    ),
    "clock that is no tensor": (
        lambda s: s.update(clock=7),
        ["clock: got", "accepted: torch.int64 []"],
    ),
    "lr of other groups": (
        lambda s: s.update(lr=torch.tensor([0.1, 0.2], dtype=torch.float64)),
        ["lr: got torch.float64 [2]", "accepted: torch.float64 [1]"],
    ),
    "lr not finite": (lambda s: s["lr"].fill_(NAN), ["lr: got", "nan", "accepted"]),
    "lr negative": (lambda s: s["lr"].fill_(-1), ["lr: got", "-1.0", "accepted"]),
    "clock negative": (
        lambda s: s["clock"].fill_(-1),
        ["clock: got -1", "accepted: 0 to 2**31 - 1"],
    ),
    "clock past its end": (
        lambda s: s["clock"].fill_(2**31),
        ["clock: got 2147483648", "accepted: 0 to 2**31 - 1"],
    ),
    "epoch_start negative": (
        lambda s: s["epoch_start"].fill_(-1),
        ["epoch_start: got -1", "accepted"],
    ),
    "epoch_start past its end": (
        lambda s: s["epoch_start"].fill_(2**40),
        ["epoch_start: got 1099511627776", "accepted"],
    ),
    "prev_iter beyond the clock": (
        lambda s: s["state.b.prev_iter"][2].fill_(8),
        ["state.b.prev_iter: got", "to 8, accepted: 0 to the clock, 7"],
    ),
    "prev_iter negative": (
        lambda s: s["state.b.prev_iter"][2].fill_(-1),
        ["state.b.prev_iter: got -1 to 7", "accepted: 0 to the clock, 7"],
    ),
    "clock before prev_iter": (
        lambda s: s["clock"].fill_(6),
        ["state.a.prev_iter: got 0 to 7", "accepted: 0 to the clock, 6"],
    ),
    "charge": (
        policies(lambda extra: extra.update(charge="read")),
        ["charge: got 'read'", "accepted: the module's, 'touch'"],
    ),
    "decay": (
        other_policy(decay={"policy": "NoDecay"}),
        ["update of 'b': got", "NoDecay", "accepted: the module's", "LinearClipped"],
    ),
    "alpha": (
        policies(lambda extra: extra["update"]["b"]["decay"].update(alpha=0.3)),
        ["update of 'b': got", "0.3", "accepted: the module's", "0.2"],
    ),
    "rounding": (
        other_policy(rounding={"policy": "Stochastic", "seed": 0}),
        ["update of 'b': got", "Stochastic", "accepted: the module's", "Nearest"],
    ),
    "decay_state": (
        other_policy(decay_state=True),
        ["update of 'b': got", "'decay_state': True", "accepted: the module's"],
    ),
    "policies of another kind": (
        lambda s: s.update(_extra_state=3),
        ["_extra_state: got 3", "accepted"],
    ),
    "policies cut short": (
        policies(lambda extra: extra["update"].update(b={})),
        ["update of 'b': got {}", "accepted: the module's"],
    ),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_refused_and_nothing_changed(case, nested):
    spoil, says = BAD[case]
    state = through_file(make_trained().state_dict())
    spoil(state)
    emb = make(seed=99)
    train(emb, 1)
    before, policy = tensors(emb), (emb.update, emb.charge)
    target, prefix = emb, ""
    if nested:
        target = nn.ModuleDict({"emb": emb, "other": nn.Linear(1, 1)})
        prefix = "emb."
        state = {f"emb.{key}": value for key, value in state.items()}
        state |= {f"other.{key}": value for key, value in nn.Linear(1, 1).state_dict().items()}
    given = copy.copy(state)
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(state)
    for part in says:
        assert part in str(caught.value)
    key = says[0].partition(":")[0]
    if not key.startswith(("update", "charge")):
        assert prefix + key in str(caught.value)
    assert_same(tensors(emb), before)
    assert (emb.update, emb.charge) == policy
    assert state.keys() == given.keys()  # nor is the dict that was given
    train(emb, 2)
    assert emb.clock == 2


def test_refusal_names_no_keys_that_are_there():
    state = through_file(make_trained().state_dict())
    state["clock"].fill_(-1)
    with pytest.raises(RuntimeError) as caught:
        make().load_state_dict(state)
    assert "Missing key" not in str(caught.value)


def test_all_problems_are_named_at_once():
    state = through_file(make_trained().state_dict())
    state["weights.a"] = torch.zeros(1, 4)
    state["state.b.prev_iter"] = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"(?s)weights\.a: got.*state\.b\.prev_iter: got"):
        make().load_state_dict(state)


@pytest.mark.parametrize("key", [*KEYS, "_extra_state"])
def test_missing_key_is_refused_and_nothing_changed(key):
    emb = make(seed=99)
    before = tensors(emb)
    state = make_trained().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        emb.load_state_dict(state)
    assert_same(tensors(emb), before)


@pytest.mark.parametrize("key", ["weights.c", "state.c.momentum1", "state.a.momentum2", "other"])
def test_unexpected_key_is_refused_and_nothing_changed(key):
    emb = make(seed=99)
    before = tensors(emb)
    state = make_trained().state_dict()
    state[key] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{key}"'):
        emb.load_state_dict(state)
    assert_same(tensors(emb), before)


def test_lr_is_loaded_and_not_compared():
    other = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.7, ema_beta=0.9), UPDATE.decay)
    emb = make(other)
    emb.load_state_dict(make_trained().state_dict())
    assert emb.lr == 0.03
    assert emb.update == other


# ------------------------------------------------------------------------------------- strict=False


def test_not_strict_takes_what_is_there():
    emb, trained = make(seed=99), make_trained()
    before = tensors(emb)
    weights = {k: v for k, v in trained.state_dict().items() if k.startswith("weights.")}
    result = emb.load_state_dict(weights | {"other": torch.zeros(1)}, strict=False)
    assert set(result.missing_keys) == (KEYS.keys() | {"_extra_state"}) - weights.keys()
    assert result.unexpected_keys == ["other"]
    after = tensors(emb)
    for key in KEYS:
        assert torch.equal(after[key], weights.get(key, before[key]))
    train(emb, 1)
    assert emb.clock == 1


def test_not_strict_keeps_the_modules_own_policies():
    emb = make(GATED, seed=99, charge="read")
    trained = make_trained()
    emb.load_state_dict(through_file(trained.state_dict()), strict=False)
    assert_same(tensors(emb), tensors(trained))
    assert (emb.update, emb.charge) == (GATED, "read")


@pytest.mark.parametrize(
    "case", ["weight shape", "state dtype", "lr of other groups", "prev_iter beyond the clock"]
)
def test_not_strict_still_refuses_what_cannot_be_loaded(case):
    spoil, says = BAD[case]
    emb = make(seed=99)
    before = tensors(emb)
    state = through_file(make_trained().state_dict())
    spoil(state)
    with pytest.raises(RuntimeError) as caught:
        emb.load_state_dict(state, strict=False)
    for part in says:
        assert part in str(caught.value)
    assert_same(tensors(emb), before)


def test_not_strict_refuses_a_clock_before_the_state_that_stays():
    emb = make_trained()
    before = tensors(emb)
    clock = {"clock": torch.tensor(3)}
    with pytest.raises(RuntimeError, match="prev_iter: got 0 to 7, accepted: 0 to the clock, 3"):
        emb.load_state_dict(clock, strict=False)
    assert_same(tensors(emb), before)
