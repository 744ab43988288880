"""What goes wrong around a training run: a full disk, a second process on one file, Ctrl-C from outside.

(Kills are in test_checkpoint_files.py, Ctrl-C at every moment in test_interrupts.py, threads and forks in
test_threads.py, lack of memory in test_bad_memory.py.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from coldrow import checkpoint  # noqa: E402
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

UPDATE = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.5))

# ---------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """Writing on behind that fails, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def check_that_a_save_fails(emb, path, small_enough, limit) -> None:
    small_enough(emb)
    checkpoint.save(emb.state_dict(), path)
    before = path.read_bytes()
    many = TableBatchedEmbeddingBags([Table("a", 20_000, 32)], UPDATE)
    with limit, pytest.raises(OSError) as caught:
        checkpoint.save(many.state_dict(), path)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    again = TableBatchedEmbeddingBags([Table("a", 50, 32)], UPDATE)
    again.load_state_dict(checkpoint.load(path))
    assert again.clock == 1
    small_enough(emb)  # and training and saving go on
    checkpoint.save(emb.state_dict(), path)
    again.load_state_dict(checkpoint.load(path))
    assert again.clock == 2


def trained() -> TableBatchedEmbeddingBags:
    return TableBatchedEmbeddingBags([Table("a", 50, 32)], UPDATE)


def one_step(emb) -> None:
    emb(torch.arange(50), torch.arange(51)).sum().backward()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_no_more_room_in_the_file(suffix, tmp_path):
    limit = files_no_larger_than(1 << 20)
    check_that_a_save_fails(trained(), tmp_path / f"model.{suffix}", one_step, limit)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_no_more_room_on_the_disk(suffix, small_disk):
    path = small_disk / f"model.{suffix}"
    check_that_a_save_fails(trained(), path, one_step, contextlib.nullcontext())


# -------------------------------------------------------------------------------- one file, mapped


def mapped(folder, mode: str = "r+") -> tuple[np.ndarray, dict]:
    """A table and its state in files, [100, 8]."""
    shapes = {"weight": (100, 8), "momentum1": (100,), "prev_iter": (100,)}
    arrays = {}
    for name, shape in shapes.items():
        kind = np.int32 if name == "prev_iter" else np.float32
        arrays[name] = np.memmap(folder / name, kind, mode, shape=shape)
    return arrays.pop("weight"), arrays


SECOND = """
    import sys, pathlib
    sys.path.insert(0, {here!r})
    from test_faults import *
    weight, state = mapped(pathlib.Path({folder!r}))
    try:
        coldrow.apply_(UPDATE, weight, np.ones((3, 8), np.float32), np.array([1, 2, 3]), state, step={step})
    except ValueError as error:
        print("refused:", error)
    else:
        print("trained")
"""


def second_process(folder, step: int) -> str:
    code = SECOND.format(here=os.path.dirname(__file__), folder=str(folder), step=step)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    ).stdout


def test_second_process_with_a_clock_of_its_own_is_refused(tmp_path):
    """Where prev_iter is mapped too, a step that another process has done is not done again."""
    weight, state = mapped(tmp_path, "w+")
    ones, rows = np.ones((3, 8), np.float32), np.array([1, 2, 3])
    for step in (1, 2, 3):
        coldrow.apply_(UPDATE, weight, ones, rows, state, step=step)
    before = [weight.tobytes(), *(array.tobytes() for array in state.values())]
    said = second_process(tmp_path, step=1)
    assert said.startswith("refused: step: got 1, accepted: more than prev_iter"), said
    assert [weight.tobytes(), *(array.tobytes() for array in state.values())] == before
    assert second_process(tmp_path, step=4) == "trained\n"  # taking turns is fine
    assert state["prev_iter"][1:4].tolist() == [4, 4, 4]


def test_a_lock_on_the_file_keeps_the_second_process_out(tmp_path):
    """As docs/reliability.md advises: coldrow sees an array, not the file behind it."""
    mapped(tmp_path, "w+")
    with open(tmp_path / "weight", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        code = (
            f"import fcntl; f = open({str(tmp_path / 'weight')!r}, 'r+b')\n"
            "try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except BlockingIOError: print('kept out')"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "kept out\n", run.stderr


# ------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_comes_after_the_call():
    """SIGINT while the kernels run: the call ends, KeyboardInterrupt follows, the step has happened."""
    emb = TableBatchedEmbeddingBags([Table("a", 1000, 64)], UPDATE, pooling="none")
    rows, offsets = torch.arange(1000).repeat(400), torch.arange(400_001)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        out = emb(rows, offsets)
        grad = torch.ones_like(out)
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            while True:
                out.backward(grad)
                out = emb(rows, offsets)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    torch.set_grad_enabled(True)
    touched = emb.state["a"]["prev_iter"].unique().tolist()
    assert touched == [emb.clock]  # every row, at the step that the clock says
    emb.discard_forward()
    emb(rows, offsets).sum().backward()
