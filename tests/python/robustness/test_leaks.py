"""The binding keeps nothing: no instance of its classes, no reference to an array, no memory."""

import os
import subprocess
import sys

import pytest

# Every entry of coldrow._core, in calls that work and calls that are refused. Each is a function of no
# arguments, over arrays that live as long as the process.
ENTRIES = """
import ctypes, gc, sys
import numpy as np
import torch
from coldrow import _core

E, D, N = 5, 3, 4

def new_update():
    return _core.Update(optimizer="adam_by_touches", decay="cumulative_linear",
                        optimizer_fields={"eps": 1e-3, "beta1": 0.5, "beta2": 0.5},
                        decay_fields={"alpha": 0.5}, rounding="stochastic",
                        rounding_fields={"seed": 1})

def new_batch():
    return _core.TableBatch(["a", "b"], [1, 2], [0, 1, 0])

update, batch = new_update(), new_batch()
w = [np.ones((E, D), np.float32), torch.ones(E, D, dtype=torch.bfloat16)]
p = [np.zeros(E, np.int32), torch.zeros(E, dtype=torch.int32)]
s = [[np.zeros(E, np.float32), np.zeros((E, D), np.float32), np.zeros((E, D), np.float32)],
     [torch.zeros(E), torch.zeros(E, D), torch.zeros(E, D)]]
i64 = np.array([0, 1, 4, 1])
i32 = torch.tensor([0, 1, 4, 1], dtype=torch.int32)
offsets, bad = np.array([0, 1, 3, 4]), np.array([0, 3, 1, 4])
grad, nan = np.ones((N, D), np.float32), np.full((N, D), np.nan, np.float32)
flat = torch.ones(3 * D)
out, out_n = np.zeros((1, 3 * D), np.float32), np.zeros(N, np.float32)
psw = np.ones(N, np.float32)
w64, g64, p64 = np.ones((E, D)), np.ones((N, D)), np.zeros(E, np.int64)
s64 = {"prev_iter": p64, "touches": np.zeros(E), "momentum1": np.ones((E, D)),
       "momentum2": np.ones((E, D))}
updates, lrs = [update, update], [0.1, 0.1]

def apply(k, index, g, mode="skip", step=1):
    return _core.apply(update, w[k], g, index, s[k], p[k], step, 0.1, 0, mode, 0, 0, 0, False, False)

def steps(step):
    clock, skipped = np.full((), step - 1), np.zeros((), np.int64)
    parts = [(update, w[k], grad, i64, s[k], p[k], 0.1, k, 0, 0) for k in (0, 1)]
    return _core.apply_steps(parts, step, 0, "skip", clock, skipped)

def held():
    with _core.HeldTables(w, True):
        pass

def refused(call):
    def run():
        try:
            call()
        except (TypeError, ValueError, IndexError):
            return
        raise AssertionError("was not refused")
    return run

def lookup(o=offsets, sizes=None):
    batch.lookup(w, p, updates, lrs, i64, o, psw, sizes, "sum", True, 2, 0, out)

CALLS = {
    "Update": new_update,
    "Update, refused": refused(lambda: _core.Update(optimizer="none", decay="none", rounding="x")),
    "Update.scalar_states": lambda: (update.scalar_states, update.vector_states),
    "TableBatch": new_batch,
    "TableBatch, refused": refused(lambda: _core.TableBatch(["a"], [1, 2], [0])),
    "apply, NumPy": lambda: apply(0, i64, grad),
    "apply, torch": lambda: apply(1, i32, grad),
    "apply, not an array": refused(lambda: apply(0, "x", grad)),
    "apply, index": refused(lambda: apply(0, np.array([0, 1, 9, 1]), grad)),
    "apply, NaN": refused(lambda: apply(0, i64, nan, "raise")),
    "apply, step": refused(lambda: apply(0, i64, grad, step=0)),
    "apply_steps": lambda: steps(1),
    "apply_steps, refused": refused(lambda: steps(0)),
    "HeldTables": held,
    "read": lambda: _core.read(update, grad, w[0], i64, p[0], 2, 0.1, 0),
    "read, refused": refused(lambda: _core.read(update, w[0][:4], w[0], i64, p[0], 2, 0.1, 0)),
    "lookup": lookup,
    "lookup, sizes": lambda: lookup(sizes=[1, 1, 1]),
    "lookup, offsets": refused(lambda: lookup(bad)),
    "lookup, sizes, refused": refused(lambda: lookup(sizes=[1, 2, 3])),
    "weight_gradients": lambda: batch.weight_gradients(
        w, p, updates, lrs, i64, offsets, None, "sum", True, 2, 0, flat, out_n),
    "update": lambda: batch.update(
        w, s, p, updates, lrs, i64, offsets, psw, None, "sum", 2, 0, flat, "skip"),
    "update, refused": refused(lambda: batch.update(
        w, s, p, updates, lrs, i64, offsets, psw, None, "sum", 2, 0, flat[1:], "skip")),
    "factor": lambda: _core.factor(update, 1, 5, 0.1, 0, False),
    "reference_apply": lambda: _core.reference_apply(update, w64, g64, i64, s64, 1, 0.1, 0),
    "reference_apply, refused": refused(
        lambda: _core.reference_apply(update, w64, g64, i32, s64, 1, 0.1, 0)),
    "reference_read_factor": lambda: _core.reference_read_factor(update, 1, 5, 0.1, 0),
    "threads": _core.threads,
    "builds": _core.builds,
    "build": _core.build,
    "advise_huge_pages": lambda: _core.advise_huge_pages(w[1]),
    "advise_huge_pages, refused": refused(lambda: _core.advise_huge_pages(1)),
    "use_build": lambda: _core.use_build(_core.build()),
    "use_build, refused": refused(lambda: _core.use_build("none")),
}
"""


def run(body, **environment):
    return subprocess.run(
        [sys.executable, "-c", ENTRIES + body],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_every_entry_is_called():
    from coldrow import _core

    entries = {n for n in vars(_core) if not n.startswith("_")}
    entries |= {n for n in vars(_core.TableBatch) if not n.startswith("_")}
    for name in entries:
        assert f'"{name}' in ENTRIES or f"_core.{name}" in ENTRIES, name


CALLS = int(os.environ.get("COLDROW_LEAK_CALLS", 10_000))  # make sanitize: 100,000
PLANTED = {
    "none": "",
    "malloc": "CALLS = {'factor': lambda: ctypes.CDLL(None).malloc(16)}",
    "block": "lost = []; CALLS = {'factor': lambda: lost.append(object())}",
    "reference": "CALLS = {'factor': lambda: ctypes.pythonapi.Py_IncRef(ctypes.py_object(i64))}",
}


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps what was freed"
)
@pytest.mark.parametrize("planted", PLANTED)
def test_memory_does_not_grow(planted):
    """Many calls of each entry: two bytes of malloc each would be seen, any block or reference kept."""
    result = run(
        PLANTED[planted]
        + f"\nN = {CALLS if planted == 'none' else 10_000}\n"
        + """
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keep".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Info
kept = [update, batch, i64, i32, offsets, bad, grad, nan, flat, out, out_n, psw, w64, g64, p64,
        *w, *p, *s[0], *s[1], *s64.values(), s64, lrs, updates]

def state():
    gc.collect()
    info = mallinfo2()
    references = [sys.getrefcount(x) for x in kept]
    return info.uordblks + info.hblkhd, sys.getallocatedblocks(), references

for name, call in CALLS.items():
    for _ in range(1000):
        call()
    before = state()
    for _ in range(N):
        call()
    after = state()
    grown = [after[0] - before[0], after[1] - before[1]]
    if grown[0] > 2 * N or grown[1] > 500 or before[2] != after[2]:
        sys.exit(f"{name}: {grown} bytes and blocks, references {before[2] == after[2]}")
print("no growth in", len(CALLS), "calls")
"""
    )
    if planted == "none":
        assert result.returncode == 0, result.stderr
        assert "no growth in 34 calls" in result.stdout
    else:
        assert "factor: " in result.stderr
        assert result.returncode == 1


@pytest.mark.parametrize("keep", [False, True], ids=["nothing kept", "one kept on purpose"])
def test_nanobind_reports_no_leak(keep):
    """What is alive when the interpreter ends is reported; the second case shows that it would be."""
    result = run(
        """
for call in CALLS.values():
    for _ in range(3):
        call()
"""
        + ("ctypes.pythonapi.Py_IncRef(ctypes.py_object(update))" if keep else ""),
        COLDROW_LEAK_WARNINGS="1",
    )
    assert result.returncode == 0, result.stderr
    assert ("leaked" in result.stderr) == keep, result.stderr
