"""Imports without torch, one OpenMP runtime for both, and threads that do not survive a fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

import coldrow

torch = pytest.importorskip("torch")


def run_script(script: str, *arguments: str, **environment: str) -> object:
    """Run Python source in a process of its own; returns what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_brings_no_torch():
    script = """
        import sys, json
        import coldrow
        print(json.dumps([name for name in ("torch", "numpy", "jax") if name in sys.modules]))
    """
    assert run_script(script) == []


def test_numpy_arrays_are_trained_without_torch():
    script = """
        import sys, json
        import numpy as np, coldrow
        weight = np.ones((4, 2), np.float32)
        update = coldrow.RowUpdate()
        state = coldrow.init_state(update, 4, 2, like=weight)
        coldrow.apply_(update, weight, np.ones((1, 2), np.float32), np.array([2]), state, step=1)
        print(json.dumps(["torch" in sys.modules, (weight != 1).any(1).tolist()]))
    """
    assert run_script(script) == [False, [False, False, True, False]]


IMPORTS = {
    "coldrow first": "import coldrow._core, torch",
    "torch first": "import torch, coldrow._core",
}
# Large enough that two threads share the work.
TRAIN = """
import numpy as np
def train():
    rows, dim = 20_000, 16
    weight = np.ones((rows, dim), np.float32)
    grad = np.ones((rows, dim), np.float32)
    update = coldrow.RowUpdate()
    state = coldrow.init_state(update, rows, dim, like=weight)
    coldrow.apply_(update, weight, grad, np.arange(rows), state, step=1)
    assert (weight != 1).all()
    return float(weight.astype(np.float64).sum())
"""


@pytest.mark.parametrize("imports", IMPORTS)
def test_threads_follow_torch(imports):
    script = f"""
        import json
        {IMPORTS[imports]}
        counts = []
        for n in (1, 3, 2, 1):
            torch.set_num_threads(n)
            counts.append(coldrow._core.threads())
        print(json.dumps(counts))
    """
    assert run_script(script) == [1, 3, 2, 1]


@pytest.mark.parametrize("imports", IMPORTS)
def test_one_openmp_runtime(imports):
    script = f"""
        import json
        {IMPORTS[imports]}
        {TRAIN.replace(chr(10), chr(10) + 8 * " ")}
        train()
        torch.ones(1000, 1000).sum()  # in parallel
        with open("/proc/self/maps") as maps:
            paths = {{line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}}
        names = ("libgomp", "libomp", "libiomp")
        print(json.dumps([p for p in paths if p.rpartition("/")[2].startswith(names)]))
    """
    loaded = run_script(script)
    assert len(loaded) == 1
    assert "libgomp" in loaded[0]


@pytest.mark.parametrize("imports", ["import coldrow._core", *IMPORTS.values()])
def test_forked_child_trains(imports):
    script = f"""
        import json, os, signal
        {imports}
        {TRAIN.replace(chr(10), chr(10) + 8 * " ")}
        assert coldrow._core.threads() == 2
        want = train()  # starts the threads that the child will not have
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # ends it if it hangs
            os.close(read_end)
            with os.fdopen(write_end, "w") as out:
                json.dump([coldrow._core.threads(), train()], out)
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as answer:
            threads, got = json.load(answer)
        _, status = os.waitpid(child, 0)
        print(json.dumps([threads, got == want, status, train() == want]))
    """
    assert run_script(script) == [1, True, 0, True]


def test_one_row_of_state_shared_with_stride_0():
    memory = torch.zeros(1)
    momentum1 = memory.as_strided((1,), (0,))
    prev_iter = memory.view(torch.int32).as_strided((1,), (0,))
    with pytest.raises(ValueError, match="share memory"):
        coldrow.rowwise_rmsprop_ar_(
            torch.zeros(1, 4),
            torch.ones(1, 4),
            torch.tensor([0]),
            momentum1,
            prev_iter,
            step=1,
            lr=0.1,
        )
