"""Checkpoints on disk: resumed in mid-training bit for bit, whichever way; whole after a kill."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

import coldrow

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch.distributed.checkpoint as dcp  # noqa: E402

from coldrow import checkpoint  # noqa: E402
from coldrow._described import described, plain_values  # noqa: E402
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

KILLS = int(os.environ.get("COLDROW_FAULTS", "8")) // 2  # of each kind of file

UPDATE = coldrow.RowUpdate(
    coldrow.Adam(lr=0.1, bias_correction="row"),
    coldrow.EpochGated(coldrow.CumulativeLinear(half_life=2.0)),
    coldrow.Stochastic(seed=5),
    decay_state=True,
)


class Model(torch.nn.Module):
    def __init__(self, seed, **options) -> None:
        super().__init__()
        torch.manual_seed(seed)
        tables = [
            Table("a", 9, 4, dtype=torch.bfloat16),
            Table("b", 7, 6, dtype=torch.float16, update=coldrow.RowUpdate(coldrow.Adagrad())),
        ]
        self.emb = TableBatchedEmbeddingBags(tables, UPDATE, charge="read", **options)
        self.dense = torch.nn.Linear(10, 1)


def train(model, steps):
    optimizer = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    for step in steps:
        if step % 3 == 0:
            model.emb.new_epoch()
        generator = torch.Generator().manual_seed(step)
        indices = torch.cat([torch.randint(n, (4,), generator=generator) for n in (9, 7)])
        loss = model.dense(model.emb(indices, torch.arange(0, 9, 2))).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def with_torch(model, path):
    torch.save(model.state_dict(), path / "model.pt")
    return torch.load(path / "model.pt", weights_only=True)


def with_save(model, path):
    checkpoint.save(model.state_dict(), path / "model.pt")
    return checkpoint.load(path / "model.pt")


def with_safetensors(model, path):
    checkpoint.save(model.state_dict(), path / "model.safetensors")
    return checkpoint.load(path / "model.safetensors")


def with_dcp(model, path):
    dcp.save({"model": model.state_dict()}, checkpoint_id=path / "dcp", no_dist=True)
    state = {"model": Model(seed=9).state_dict()}  # what a new process has
    dcp.load(state, checkpoint_id=path / "dcp", no_dist=True)
    return state["model"]


@pytest.mark.parametrize("through", [with_torch, with_save, with_safetensors, with_dcp])
@pytest.mark.parametrize("layout", ["record", "split"])
def test_resumed_bit_for_bit(through, layout, tmp_path):
    straight = train(Model(seed=0), range(1, 12))
    half = train(Model(seed=0), range(1, 6))
    resumed = Model(seed=1, state_layout=layout)
    resumed.load_state_dict(through(half, tmp_path))
    assert resumed.emb.clock == 5
    train(resumed, range(6, 12))
    expected, got = straight.state_dict(), resumed.state_dict()
    assert list(expected) == list(got)
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == got[key].dtype
            one, other = (x.contiguous().reshape(-1).view(torch.uint8) for x in (value, got[key]))
            assert torch.equal(one, other), key
        else:
            assert value == got[key]


@pytest.mark.parametrize("through", [with_torch, with_save, with_safetensors])
def test_other_policies_are_refused_whole(through, tmp_path):
    saved = through(train(Model(seed=0), range(1, 4)), tmp_path)
    policies = plain_values(saved["emb._extra_state"])
    policies["update"]["a"]["optimizer"]["beta1"] = 0.5
    saved["emb._extra_state"] = described(policies)
    model = Model(seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(RuntimeError, match="update of 'a'"):
        model.load_state_dict(saved)
    for key, value in before.items():
        if key.startswith("emb."):
            assert torch.equal(model.state_dict()[key], value), key


def test_plain_values_travel_and_others_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    state = {
        "t": torch.arange(3),
        "zero": torch.tensor(2.5),
        "plain": {"a": [1, None, "x"]},
        "n": 3,
    }
    checkpoint.save(state, path)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["t"], state["t"])
    assert loaded["zero"].shape == ()
    assert loaded["plain"] == state["plain"]
    assert loaded["n"] == 3
    for wrong in (object(), {1, 2}, float("nan")):
        with pytest.raises(TypeError, match=r"accepted in a .safetensors file: tensors and plain"):
            checkpoint.save({"t": torch.arange(4), "x": wrong}, path)
    assert torch.equal(checkpoint.load(path)["t"], torch.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "model.pt")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        checkpoint.load(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_failure_leaves_the_last_file(suffix, tmp_path, monkeypatch):
    """A disk that fills up, in the file or at its sync."""
    path = tmp_path / f"model.{suffix}"
    checkpoint.save({"t": torch.arange(3)}, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"t": torch.arange(4)}, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError):
        checkpoint.save({"t": torch.arange(3)}, tmp_path / "no" / path.name)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_while_writing(tmp_path, monkeypatch):
    real = torch.save

    def save(state, _):
        with open("/dev/full", "wb") as file:
            real(state, file)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"t": torch.arange(100_000)}, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_permissions_are_kept(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save({"t": torch.arange(3)}, path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    checkpoint.save({"t": torch.arange(3)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# Trains from the last checkpoint on, and saves after each step; a new process for each line it is given.
TRAINER = """
import os, sys
sys.path.insert(0, {here!r})
from test_checkpoint_files import *
torch.set_num_threads(1)  # threads do not survive a fork
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        model = Model(seed=0)
        if os.path.exists({path!r}):
            model.load_state_dict(checkpoint.load({path!r}))
        print(os.getpid(), flush=True)
        for step in range(model.emb.clock + 1, 10**9):
            train(model, [step])
            checkpoint.save(model.state_dict(), {path!r})
            print("saved", flush=True)
    os.waitpid(child, 0)
    print("\\nkilled", flush=True)  # on a line of its own, wherever the child was stopped
"""


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_killed_at_any_moment(suffix, tmp_path):
    """The last checkpoint is whole, and training goes on from it bit for bit."""
    path = tmp_path / f"model.{suffix}"
    code = TRAINER.format(here=os.path.dirname(__file__), path=str(path))
    clock, generator = 0, torch.Generator().manual_seed(0)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        for _ in range(KILLS):
            trainer.stdin.write("\n")
            trainer.stdin.flush()
            child = int(trainer.stdout.readline())
            assert trainer.stdout.readline() == "saved\n"  # once at least, however busy the machine
            time.sleep(0.1 * torch.rand((), generator=generator).item())
            os.kill(child, signal.SIGKILL)
            while trainer.stdout.readline() != "killed\n":
                pass
            resumed = Model(seed=2)
            resumed.load_state_dict(checkpoint.load(path))
            assert resumed.emb.clock > clock
            clock = resumed.emb.clock
        trainer.stdin.close()
    straight = train(Model(seed=0), range(1, clock + 1))
    for key, value in straight.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[key]), key
    print(f"{KILLS} kills, {clock} steps")
