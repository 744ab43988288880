"""Threads that meet in one table: they wait for each other, or are refused; no row is read or written
by two at once.

The calls release the GIL while they run. Batches here are large enough that threads do meet.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")

from coldrow import _core  # noqa: E402
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

ROWS, DIM, N = 2000, 64, 20_000
SGD = coldrow.RowUpdate(coldrow.SGD(lr=1.0))


def run_together(*bodies) -> list[BaseException]:
    """Run each in a thread of its own; return what they raised."""
    raised: list[BaseException] = []

    def guarded(body) -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def uniform_table(**options) -> TableBatchedEmbeddingBags:
    """A table of zeros. A step of ``whole_table`` below adds 1 to every element of every row."""
    return TableBatchedEmbeddingBags(
        [Table("a", ROWS, DIM, init=torch.nn.init.zeros_)], SGD, pooling="none", **options
    )


INDICES = torch.arange(ROWS)
OFFSETS = torch.arange(ROWS + 1)


def whole_table(emb) -> None:
    emb(INDICES, OFFSETS).backward(-torch.ones(ROWS, DIM))


@pytest.mark.parametrize("charge", ["touch", "read"])
def test_a_forward_sees_all_of_a_step_or_nothing(charge):
    """Every row holds the number of steps done, so a forward in mid-update would see two numbers."""
    emb = uniform_table(charge=charge)
    serving = TableBatchedEmbeddingBags([Table("a", ROWS, DIM)], SGD, pooling="none", charge=charge)
    serving.weights._parameters["a"] = emb.weights["a"]  # one memory, two modules
    seen, stop = set(), threading.Event()

    def train() -> None:
        try:
            for _ in range(150):
                whole_table(emb)
        finally:
            stop.set()

    def serve(module) -> None:
        with torch.no_grad():
            while not stop.is_set():
                out = module(INDICES, OFFSETS)
                low, high = float(out.min()), float(out.max())
                assert low == high, "half a step"
                seen.add(low)

    def read() -> None:
        while not stop.is_set():
            out = emb.read("a")
            assert float(out.min()) == float(out.max()), "half a step"

    errors = run_together(train, lambda: serve(emb), lambda: serve(serving), read)
    assert not errors, errors
    assert emb.clock == 150
    assert len(seen) > 1  # they did meet


def test_two_threads_that_train_one_table():
    """Each step happens once, whole, and whoever comes too late is told."""
    emb = uniform_table()
    done = []

    def train() -> None:
        for _ in range(100):
            try:
                whole_table(emb)
                done.append(1)
            except RuntimeError as error:
                message = str(error)
                assert any(
                    part in message
                    for part in (
                        "waiting for its backward",  # another's forward is outstanding
                        "has had its backward",
                        "being updated by another thread",
                        "another thread trains these tables too",
                    )
                ), message

    errors = run_together(train, train, train)
    assert not errors, errors
    assert emb.clock == len(done) >= 100 / 3
    weight = emb.weights["a"].detach()
    assert float(weight.min()) == float(weight.max()) == len(done)
    assert (emb.state["a"]["prev_iter"] == emb.clock).all()


def test_functions_in_several_threads_are_serialised():
    """The same arrays from four threads, and no gradient is lost."""
    weight = np.zeros((ROWS, DIM), np.float32)
    state = coldrow.init_state(SGD, ROWS, DIM, like=weight)
    grad, indices = -np.ones((ROWS, DIM), np.float32), np.arange(ROWS)
    steps, turn = iter(range(1, 201)), threading.Lock()

    def train() -> None:
        while True:
            with turn:  # the steps in order; the reads beside them take no turn
                step = next(steps, None)
                if step is None:
                    return
                coldrow.apply_(SGD, weight, grad, indices, state, step=step)

    def read() -> None:
        out = np.empty((ROWS, DIM), np.float32)
        for _ in range(100):
            coldrow.read_(out, SGD, weight, indices, state, step=201)
            assert out.min() == out.max(), "half a step"

    errors = run_together(train, train, read, read)
    assert not errors, errors
    assert weight.min() == weight.max() == 200


def test_steps_of_several_threads_in_any_order():
    """Without turns of their own, a step that comes too late is refused and writes nothing."""
    weight = np.zeros((ROWS, DIM), np.float32)
    state = coldrow.init_state(SGD, ROWS, DIM, like=weight)
    grad, indices = -np.ones((ROWS, DIM), np.float32), np.arange(ROWS)
    done = []

    def train(steps) -> None:
        for step in steps:
            try:
                coldrow.apply_(SGD, weight, grad, indices, state, step=step)
                done.append(step)
            except ValueError as error:
                assert "step: got" in str(error)  # noqa: PT017

    errors = run_together(*(lambda k=k: train(range(1 + k, 400, 4)) for k in range(4)))
    assert not errors, errors
    assert weight.min() == weight.max() == len(done)
    assert (state["prev_iter"] == max(done)).all()


def test_a_held_table_makes_the_others_wait():
    """evict() and read() hold tables like this; writers wait for readers and readers for writers."""
    emb = uniform_table()
    whole_table(emb)
    events: list[str] = []

    def look() -> None:
        with torch.no_grad():
            emb(INDICES, OFFSETS)
        events.append("read")

    for write, expected in ((True, ["let go", "read"]), (False, ["read", "let go"])):
        events.clear()
        held = _core.HeldTables([emb.weights["a"].detach()], write)
        held.__enter__()
        reader = threading.Thread(target=look)
        reader.start()
        reader.join(timeout=0.2 if write else 60)
        events.append("let go")
        held.__exit__(None, None, None)
        reader.join()
        assert events == expected


def test_fork_while_another_thread_updates():
    """A child of a process in mid-update does not wait for threads that it does not have.

    (NumPy arrays: what torch itself does in such a child is torch's to say.)
    """
    weight = np.zeros((ROWS, DIM), np.float32)
    state = coldrow.init_state(SGD, ROWS, DIM, like=weight)
    grad, indices = -np.ones((ROWS, DIM), np.float32), np.arange(ROWS)
    stop = threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            coldrow.apply_(SGD, weight, grad, indices, state, step=step)

    def in_child() -> bool:
        signal.alarm(60)
        out = np.empty((ROWS, DIM), np.float32)
        coldrow.read_(out, SGD, weight, indices, state, step=2**31)  # caught perhaps in mid-update
        coldrow.apply_(SGD, weight, grad, indices, state, step=2**31 - 1)
        return bool((weight == out + 1).all()) and bool((state["prev_iter"] == 2**31 - 1).all())

    thread = threading.Thread(target=train)
    thread.start()
    codes = []
    try:
        for _ in range(20):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                ok = False
                try:
                    ok = in_child()
                finally:
                    os._exit(0 if ok else 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    finally:
        stop.set()
        thread.join()
    assert codes == [0] * 20
