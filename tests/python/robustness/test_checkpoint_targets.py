"""What ``checkpoint.save`` may be given as a path and as a state_dict, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from coldrow import checkpoint  # noqa: E402
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

SUFFIXES = ["pt", "safetensors"]
STATE = {"t": torch.arange(3)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------- the path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_links_stay_and_lead_to_the_new_file(suffix, tmp_path):
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / f"real.{suffix}", tmp_path / f"link.{suffix}"
    for before in (b"old", None):  # a link to a file; one to a name that is free
        if before is None:
            real.unlink()
        else:
            real.write_bytes(before)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.join("there", real.name))
        checkpoint.save(STATE, link)
        assert link.is_symlink()
        assert torch.equal(checkpoint.load(real)["t"], STATE["t"])
        assert names(tmp_path) == [link.name, "there"]
        assert names(tmp_path / "there") == [real.name]


def test_what_is_no_file_stays(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for call in (lambda path: checkpoint.save(STATE, path), checkpoint.load):
        with pytest.raises(ValueError, match=r"^path: got '.*pipe', which is no regular file"):
            call(pipe)
        with pytest.raises(IsADirectoryError) as caught:
            call(folder)
        assert caught.value.filename == str(folder)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["folder", "pipe"]
    assert names(folder) == []


@pytest.mark.parametrize("name", ["x" * 250 + ".pt", "x" * 240 + ".safetensors", "x" * 255])
def test_long_names(name, tmp_path):
    checkpoint.save(STATE, tmp_path / name)
    assert torch.equal(checkpoint.load(tmp_path / name)["t"], STATE["t"])
    with pytest.raises(OSError, match="File name too long") as caught:
        checkpoint.save(STATE, tmp_path / ("y" * 256))
    assert caught.value.filename == str(tmp_path / ("y" * 256))
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_of_any_kind(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (f"a.{suffix}", f"b.{suffix}".encode(), tmp_path / f"c.{suffix}",
                 os.fsencode(tmp_path) + b"/\xff." + suffix.encode()):  # fmt: skip
        checkpoint.save(STATE, path)
        assert torch.equal(checkpoint.load(path)["t"], STATE["t"])
    for wrong, kind in ((3, TypeError), (None, TypeError), ("", ValueError), ("a\0b", ValueError)):
        for call in (lambda path: checkpoint.save(STATE, path), checkpoint.load):
            with pytest.raises(kind, match=r"^path: got .*, accepted: the name of a file"):
                call(wrong)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder_that_may_not_be_listed(suffix, tmp_path):
    """Whose rename cannot be synced through the folder itself. It raised when the file was replaced."""
    folder = tmp_path / "folder"
    folder.mkdir()
    checkpoint.save(STATE, folder / f"warm.{suffix}")  # imports what is imported late
    folder.chmod(0o333)
    for part in (tmp_path, *tmp_path.parents):
        if part.owner() == "root" and not part.stat().st_mode & 0o001:
            part.chmod(part.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            checkpoint.save({"t": torch.arange(4)}, folder / f"model.{suffix}")
            os._exit(0)
        except BaseException as error:
            print(type(error), error, file=sys.stderr, flush=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(checkpoint.load(folder / f"model.{suffix}")["t"], torch.arange(4))
    assert names(folder) == [f"model.{suffix}", f"warm.{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_umask_is_left_alone(suffix, tmp_path, monkeypatch):
    """Asking for it sets it, for files that other threads make at that moment."""
    mask = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was set"))
        checkpoint.save(STATE, tmp_path / f"model.{suffix}")
        assert stat.S_IMODE((tmp_path / f"model.{suffix}").stat().st_mode) == 0o640
    finally:
        monkeypatch.undo()
        os.umask(mask)


KILLED = """
import os, signal, sys
import torch
from coldrow import checkpoint
os.replace = lambda *_: (print(flush=True), signal.pause())  # nothing is renamed any more
checkpoint.save({"t": torch.arange(1000)}, sys.argv[1])
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_a_kill_leaves_is_removed_by_the_next_save(suffix, tmp_path):
    path = tmp_path / f"model.{suffix}"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert len(names(tmp_path)) == 1
        checkpoint.save(STATE, path)  # while another process writes: its file is left alone
        assert len(names(tmp_path)) == 2
        child.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 2
    checkpoint.save(STATE, tmp_path / f"other.{suffix}")  # another file's are not looked for
    assert len(names(tmp_path)) == 3
    checkpoint.save(STATE, path)
    assert names(tmp_path) == [f"model.{suffix}", f"other.{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_threads_that_save_to_one_file(suffix, tmp_path):
    path, errors = tmp_path / f"model.{suffix}", []

    def run(k):
        try:
            for _ in range(10):
                checkpoint.save({"t": torch.full((1000,), k)}, path)
                loaded = checkpoint.load(path)["t"]
                assert (loaded == loaded[0]).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert names(tmp_path) == [path.name]


# ------------------------------------------------------------------------------------- the state_dict


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_one_module_under_two_names(suffix, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = TableBatchedEmbeddingBags([Table("a", 5, 3)])
            self.second = self.first
            self.dense = torch.nn.Linear(3, 3)
            self.tied = self.dense

    path, model, other = tmp_path / f"model.{suffix}", Model(), Model()
    checkpoint.save(model.state_dict(), path)
    loaded = checkpoint.load(path)
    assert list(loaded) == list(model.state_dict()) or suffix == "safetensors"
    other.load_state_dict(loaded)
    assert torch.equal(other.first.weights["a"], model.first.weights["a"])
    assert torch.equal(other.tied.weight, model.dense.weight)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_state_is_written_packed(suffix, tmp_path):
    """(Its live arrays are interleaved.)"""
    emb = TableBatchedEmbeddingBags([Table("a", 10_000, 1)])
    checkpoint.save(emb.state_dict(), tmp_path / f"x.{suffix}")
    assert (tmp_path / f"x.{suffix}").stat().st_size < 10_000 * 12 + 10_000


def test_tensors_that_share_memory(tmp_path):
    base = torch.arange(10.0)
    state = {"whole": base, "front": base[:5], "back": base[5:], "turned": base.view(2, 5).t(),
             "conjugate": torch.tensor([1 + 2j]).conj(), "empty": base[:0], "empty2": base[:0]}  # fmt: skip
    checkpoint.save(state, tmp_path / "x.safetensors")
    loaded = checkpoint.load(tmp_path / "x.safetensors")
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ([1], r"^state_dict: got list, accepted: a dict of tensors by name"),
        ({1: torch.ones(1)}, r"^state_dict: got the key 1, accepted in a .safetensors file: a str"),
        ({"__metadata__": torch.ones(1)}, r"^state_dict: got the key '__metadata__'"),
        ({"\ud800": torch.ones(1)}, r"^state_dict: got the key "),
        ({"t": torch.eye(2).to_sparse()}, r"^state_dict\['t'\]: got a Tensor of layout torch.sparse"),
        ({"t": torch.ones(2, device="meta")}, r"^state_dict\['t'\]: got .* on 'meta'"),
        ({"t": torch.ones(1), "m": {1: 2}}, r"keys that are no str come back as others"),
        ({"t": torch.ones(1), "m": {"x": (2, 3)}}, r"tuples and keys"),
        ({"t": torch.ones(1), "m": {2, 3}}, r"accepted in a .safetensors file: tensors and plain"),
        ({"t": torch.ones(1), "m": float("nan")}, r"accepted in a .safetensors file: tensors and"),
        ({"t": torch.ones(1), "m": {"t": torch.ones(1)}}, r"accepted in a .safetensors file: tensors"),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_is_refused_is_refused_before_anything_is_written(state, says, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(TypeError, match=says):
        checkpoint.save(state, path)
    assert names(tmp_path) == []


def test_plain_values_come_back_as_they_were(tmp_path):
    state = {"m": [2**64 - 1, 0.1 + 0.2, 1e-320, True, None, "\ud800"], "n": np.float64(0.5)}
    checkpoint.save(state, tmp_path / "x.safetensors")
    assert checkpoint.load(tmp_path / "x.safetensors") == state
