"""Clock, epoch start, learning rates and row state as torch's tools see them: all are buffers of the module."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import coldrow
from coldrow import checkpoint
from coldrow.nn import Embedding, EmbeddingBag, Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer

UPDATE = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1), coldrow.EpochGated(coldrow.Exponential(half_life=3.0))
)
OTHER = coldrow.RowUpdate(coldrow.Adam(lr=0.05), coldrow.Exponential(half_life=4.0))
IDS, BAGS = torch.tensor([0, 1, 5, 0, 3, 3]), torch.tensor([0, 2, 3, 5, 6])


def make(layout: str = "record", **options) -> TableBatchedEmbeddingBags:
    torch.manual_seed(0)
    tables = [Table("a", 9, 4), Table("b", 7, 3, update=OTHER)]
    options = {"charge": "read", "state_layout": layout, **options}
    return TableBatchedEmbeddingBags(tables, UPDATE, **options)


def train(emb, steps: int = 4) -> None:
    """Touch rows 0, 1, 5 of ``a`` once and others often, so that rows owe decay of several steps."""
    emb.train()
    emb.new_epoch()
    emb(IDS, BAGS).square().sum().backward()
    emb.new_epoch()
    for _ in range(steps):
        emb(torch.tensor([2, 6]), torch.tensor([0, 1, 2])).square().sum().backward()
    emb.eval()


def reads(emb) -> list[torch.Tensor]:
    return [emb.read("a"), emb.read("b")]


def same_reads(one, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(reads(one), reads(other), strict=True))


def stored_rows_owe_decay(emb) -> bool:
    return not torch.equal(emb.read("a"), emb.weights["a"])


def trained(layout: str = "record", **options) -> TableBatchedEmbeddingBags:
    emb = make(layout, **options)
    train(emb)
    assert stored_rows_owe_decay(emb)
    return emb


LAYOUTS = pytest.mark.parametrize("layout", ["record", "split"])


# --------------------------------------------------------------------------------- what is in sight


@LAYOUTS
def test_every_key_of_the_state_dict_is_an_attribute_path(layout):
    model = nn.Sequential(trained(layout))
    for key, value in model.state_dict().items():
        assert isinstance(value, torch.Tensor)
        found = functools.reduce(getattr, key.split("."), model) if "extra" not in key else value
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, value)
        else:  # the properties clock, epoch_start and lr are numbers
            assert found == value.flatten()[0].item()


@LAYOUTS
def test_buffers_are_all_that_a_read_needs(layout):
    emb, other = trained(layout), make(layout)
    with torch.no_grad():
        for name, value in dict(emb.named_buffers()).items():
            dict(other.named_buffers())[name].copy_(value)
        for mine, theirs in zip(other.parameters(), emb.parameters(), strict=True):
            mine.copy_(theirs)
    assert (other.clock, other.epoch_start, other.lr) == (emb.clock, emb.epoch_start, emb.lr)
    assert same_reads(other, emb)


@LAYOUTS
def test_a_buffer_put_in_the_place_of_another_is_the_one_that_counts(layout):
    emb, other = trained(layout), trained(layout)
    emb._buffers["clock"] = torch.tensor(50)
    other.clock = 50
    with torch.no_grad():
        assert torch.equal(emb(IDS, BAGS), other(IDS, BAGS))
    assert copy.deepcopy(emb).clock == 50


# ----------------------------------------------------------------------------------------- copies


@LAYOUTS
def test_deepcopy_reads_the_same_and_trains_apart(layout):
    emb = trained(layout)
    other = copy.deepcopy(emb)
    assert same_reads(other, emb)
    before = reads(emb)
    train(other)
    assert all(torch.equal(x, y) for x, y in zip(reads(emb), before, strict=True))
    assert not same_reads(other, emb)


@pytest.mark.parametrize(
    "make_average", [AveragedModel, functools.partial(AveragedModel, use_buffers=True)]
)
@LAYOUTS
def test_averaged_model_reads_what_the_model_reads(layout, make_average):
    emb = make(layout)
    average = make_average(emb)
    train(emb)
    average.update_parameters(emb)  # the first update copies
    assert same_reads(average.module, emb)
    assert average.module.clock == emb.clock


def test_ema_of_an_untouched_row_fades_as_the_row():
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.0), coldrow.Exponential(half_life=2.0))
    weight = torch.ones(4, 1)
    emb = Embedding(4, 1, _weight=weight, update=update, charge="read")
    average = AveragedModel(emb, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    emb(torch.tensor([1])).sum().backward()
    average.update_parameters(emb)
    for _ in range(6):
        emb(torch.tensor([2])).sum().backward()
        average.update_parameters(emb)
    emb.eval()
    average.eval()
    with torch.no_grad():
        row = emb(torch.tensor([1])).item()
        assert row == pytest.approx(2.0**-3.5)
        assert average(torch.tensor([1])).item() == row


@pytest.mark.parametrize("decay", [0.0, 0.9])
@LAYOUTS
def test_an_average_over_state_dict_values_reaches_the_module(layout, decay):
    """The loop of timm's ModelEmaV3: floats are averaged in place, others copied in place."""
    emb = trained(layout)
    average = copy.deepcopy(emb).eval()
    train(emb)
    for mine, theirs in zip(average.state_dict().values(), emb.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, weight=1.0 - decay)
        else:
            mine.copy_(theirs)
    assert average.clock == emb.clock
    for table in ("a", "b"):
        assert torch.equal(average.state[table]["prev_iter"], emb.state[table]["prev_iter"])
    if decay == 0.0:
        assert same_reads(average, emb)
    assert stored_rows_owe_decay(average)


def test_target_network():
    online, target = trained(), make()
    target.load_state_dict(online.state_dict())
    assert same_reads(target, online)
    train(online, 9)
    target.load_state_dict(online.state_dict())
    assert same_reads(target, online)
    older = trained()
    target.load_state_dict(older.state_dict())  # also back
    assert (target.clock, same_reads(target, older)) == (older.clock, True)


@pytest.mark.parametrize(
    "mean",
    [
        lambda a, b: (a + b) / 2,
        lambda a, b: ((a.double() + b.double()) / 2).to(a.dtype),
        lambda a, b: torch.stack([a.float(), b.float()]).mean(0),
        lambda a, b: (a + b) / 2 if a.is_floating_point() else b,
    ],
)
def test_mean_of_checkpoints_of_one_moment(mean):
    emb, other = trained(), make()
    saved = emb.state_dict()
    averaged = {key: mean(value, value) for key, value in saved.items()}
    averaged["lr"] = averaged["lr"].double()
    other.load_state_dict(averaged)
    assert same_reads(other, emb)
    assert other.clock == emb.clock


def test_mean_of_the_clocks_of_two_moments_is_refused():
    early, late = trained(), trained()
    train(late, 2)
    states = early.state_dict(), late.state_dict()
    averaged = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    emb = make()
    before = copy.deepcopy(emb.state_dict())
    with pytest.raises(RuntimeError, match="no whole numbers"):
        emb.load_state_dict(averaged)
    for key, value in emb.state_dict().items():
        assert torch.equal(value, before[key])


# ------------------------------------------------------------------------------------------- files


@LAYOUTS
def test_torch_save_of_the_live_state_dict(layout):
    emb, other = trained(layout), make("split" if layout == "record" else "record")
    file = io.BytesIO()
    torch.save(emb.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_reads(other, emb)


@pytest.mark.parametrize("kind", [Embedding, EmbeddingBag])
def test_safetensors_of_a_drop_in(kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = (nn.Sequential(kind(10, 4, update=UPDATE)) for _ in range(2))
    model(torch.tensor([[1, 2]])).sum().backward()
    safetensors.save_file(model.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[0].clock == 1
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")


def test_safetensors_of_records_are_refused_by_it_and_written_by_coldrow(tmp_path):
    """What is strided must be made contiguous, as coldrow.checkpoint does and split layout is."""
    safetensors = pytest.importorskip("safetensors.torch")
    emb, other = trained("record"), make("record")
    with pytest.raises(ValueError, match="contiguous"):
        safetensors.save_file(emb.state_dict(), tmp_path / "state.safetensors")
    checkpoint.save(emb.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(checkpoint.load(tmp_path / "state.safetensors"))
    assert same_reads(other, emb)
    other = make("split")
    safetensors.save_model(trained("split"), tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert same_reads(other, emb)


def test_checkpoint_of_0_1_0():
    """Its ``_extra_state`` was a dict, its state contiguous copies; the keys are the same."""
    emb, other = trained(), make()
    old = {key: value.clone().contiguous() for key, value in emb.state_dict().items()}
    updates = {"a": UPDATE.to_dict(), "b": OTHER.to_dict()}
    old["_extra_state"] = {"update": updates, "charge": "read"}
    other.load_state_dict(old)
    assert same_reads(other, emb)
    old["_extra_state"]["charge"] = "touch"
    with pytest.raises(RuntimeError, match="charge: got 'touch'"):
        make().load_state_dict(old)


# --------------------------------------------------------------- torch.distributed.checkpoint's API


@pytest.mark.parametrize("fused", [True, False])
@LAYOUTS
def test_model_state_dict_makes_a_round_trip(layout, fused):
    model, other = (nn.ModuleDict({"emb": make(layout, fused=fused)}) for _ in range(2))
    emb = model["emb"]
    emb.train()
    for ids in (IDS, IDS.flip(0)):
        emb(ids, BAGS).sum().backward()
        if not fused:
            emb.step()
            emb.zero_grad()
    state = get_model_state_dict(model)
    assert set(state) == set(model.state_dict())
    set_model_state_dict(other, copy.deepcopy(state))
    assert other["emb"].clock == 2
    assert same_reads(other["emb"], emb)


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_of_a_module_makes_a_round_trip(fused):
    model, other = (nn.ModuleDict({"emb": make(fused=fused)}) for _ in range(2))
    emb, mine = model["emb"], other["emb"]
    emb(IDS, BAGS).sum().backward()
    if not fused:
        emb.optimizer.step()
        emb.optimizer.zero_grad()
    emb.lr = 0.25
    state = copy.deepcopy(get_optimizer_state_dict(model, emb.optimizer))
    assert float(emb.lr) == 0.25  # (torch sets lr to 0 and back where an optimizer has no state)
    set_model_state_dict(other, copy.deepcopy(get_model_state_dict(model)))
    set_optimizer_state_dict(other, mine.optimizer, state)
    assert (mine.clock, mine.lr) == (1, 0.25)
    for table, arrays in emb.state.items():
        for name, array in arrays.items():
            assert torch.equal(array, mine.state[table][name])


def test_sparse_optimizer_makes_a_round_trip():
    ids = torch.tensor([[1, 2], [2, 3]])
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=True))
        made.append((model, SparseOptimizer(model.parameters(), OTHER)))
    (model, optimizer), (other, others) = made
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(model, optimizer)
    saved = copy.deepcopy(saved)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, others, saved)
    assert others.clock == optimizer.clock == 3
    for step_of, opt in ((model, optimizer), (other, others)):
        step_of(ids).sum().backward()
        opt.step()
    assert torch.equal(other[0].weight, model[0].weight)
    for mine, theirs in zip(others.state.values(), optimizer.state.values(), strict=True):
        for name, array in theirs.items():
            assert torch.equal(mine[name], array)
    before_the_first_step = SparseOptimizer(other.parameters(), OTHER)
    get_optimizer_state_dict(other, before_the_first_step)  # (steps with dense zeros if it must)


# ------------------------------------------------------------------------- the optimizer of a module


def test_copied_optimizer_belongs_to_the_copy():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = make(fused=False)
            self.optimizer = self.emb.optimizer

    model = Model()
    model.emb.optimizer.param_groups[0]["initial_lr"] = 0.5
    other = copy.deepcopy(model)
    before = [w.clone() for w in model.emb.weights.values()]
    other.emb(IDS, BAGS).sum().backward()
    other.optimizer.step()
    assert (other.emb.clock, model.emb.clock) == (1, 0)
    assert other.emb.optimizer is other.optimizer
    assert all(map(torch.equal, before, model.emb.weights.values()))
    other.optimizer.param_groups[0]["lr"] = 0.75
    assert (other.emb.lr, model.emb.lr) == (0.75, 0.1)
    assert other.optimizer.param_groups[0]["initial_lr"] == 0.5


def test_step_takes_a_closure():
    emb = make(fused=False)

    def closure():
        emb.zero_grad()
        loss = emb(IDS, BAGS).square().sum()
        loss.backward()
        return loss

    loss = emb.optimizer.step(closure)
    assert loss.requires_grad
    assert emb.clock == 1


def test_optimizer_state_that_does_not_fit_changes_nothing():
    emb = make()
    train(emb)
    state = copy.deepcopy(emb.optimizer.state_dict())
    spoiled = {
        "clock": lambda s: [g.update(clock=2) for g in s["param_groups"]],
        "names": lambda s: s["state"][0].pop("momentum1"),
        "shape": lambda s: s["state"][1].update(momentum2=torch.zeros(2, 2)),
        "groups": lambda s: s["param_groups"].pop(),
        "lr": lambda s: s["param_groups"][1].update(lr=-1.0),
    }
    for name, spoil in spoiled.items():
        given = copy.deepcopy(state)
        given["state"][0]["prev_iter"].clamp_(max=3 if name != "clock" else 99)
        spoil(given)
        before = copy.deepcopy(emb.state_dict())
        with pytest.raises(ValueError, match="got"):
            emb.optimizer.load_state_dict(given)
        for key, value in emb.state_dict().items():
            assert torch.equal(value, before[key]), (name, key)


# ---------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.cpu(), lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()],
)
def test_a_waiting_gradient_survives_a_conversion(convert):
    emb, other = make(fused=False), make(fused=False)
    for m in (emb, other):
        m(IDS, BAGS).sum().backward()
    convert(emb)
    gradient = emb.weights["a"].grad
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient.to_dense(), other.weights["a"].grad.to_dense())
    emb.step()
    other.step()
    convert(other)
    assert emb.clock == 1
    for mine, theirs in zip(emb.weights.values(), other.weights.values(), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


@LAYOUTS
def test_conversions_touch_no_state(layout):
    emb = trained(layout)
    before = {k: v.clone() for k, v in emb.named_buffers()}
    for convert in (emb.half, emb.bfloat16, emb.float, lambda: emb.to("cpu", torch.bfloat16)):
        convert()
        for name, value in emb.named_buffers():
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name])


# -------------------------------------------------------------------------------------- many tables


def test_ten_thousand_tables_are_built_in_linear_time():
    """By counting calls, not by the clock: what is done per table does not grow with their number."""
    import sys

    def calls(count: int) -> int:
        seen = 0

        def note(frame, event, argument):
            nonlocal seen
            seen += event in ("call", "c_call")

        tables = [Table(f"t{i}", 2, 2) for i in range(count)]
        sys.setprofile(note)
        try:
            TableBatchedEmbeddingBags(tables, UPDATE)
        finally:
            sys.setprofile(None)
        return seen

    few, many = calls(100), calls(1000)
    assert many < 11 * few
