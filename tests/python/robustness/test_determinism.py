"""The same bits for any number of threads, any instruction-set build, and any run."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import coldrow
from coldrow import _core
from coldrow.nn import Table, TableBatchedEmbeddingBags

BEST = _core.build()


def train(dtype, rounding, pooling, *, build, threads, charge="read"):
    """Five steps on three tables with hot rows, empty bags and odd dims; returns all that came of it."""
    before = torch.get_num_threads()
    _core.use_build(build)
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(12)
        update = coldrow.RowUpdate(
            coldrow.RowwiseRMSprop(lr=0.1),
            coldrow.CumulativeLinear(half_life=2.5),
            rounding,
            decay_state=True,
        )
        exponential = coldrow.RowUpdate(
            coldrow.RowwiseRMSprop(lr=0.1), coldrow.Exponential(half_life=3.0), rounding
        )
        emb = TableBatchedEmbeddingBags(
            [
                Table("a", 3000, 64, dtype=dtype, features=["x", "y"]),
                Table("b", 7, 64, dtype=dtype, update=exponential),
                Table("c", 500, 64, dtype=dtype, update=coldrow.RowUpdate(rounding=rounding)),
            ],
            update,
            pooling=pooling,
            charge=charge,
        )
        sizes = [3000, 3000, 7, 500]
        for p in emb.weights.values():
            p.copy_(torch.from_numpy(rng.normal(size=p.shape)))
        outs = []
        for _ in range(5):
            lengths = rng.integers(0, 5, 4 * 600)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            indices = np.concatenate(
                [
                    np.minimum(rng.zipf(1.3, offsets[600 * (f + 1)] - offsets[600 * f]), e) - 1
                    for f, e in enumerate(sizes)
                ]
            )
            psw = None
            if pooling == "sum":
                psw = torch.from_numpy(rng.normal(size=len(indices))).float().requires_grad_()
            out = emb(torch.from_numpy(indices), torch.from_numpy(offsets), psw)
            out.backward(torch.from_numpy(rng.normal(size=out.shape)).float())
            outs += [out.detach(), *([psw.grad] if psw is not None else [])]
        tensors = [v for v in emb.state_dict().values() if isinstance(v, torch.Tensor)]
        return [t.reshape(-1).contiguous().view(torch.uint8) for t in (*outs, *tensors) if t.dim()]
    finally:
        _core.use_build(BEST)
        torch.set_num_threads(before)


@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
@pytest.mark.parametrize("rounding", [coldrow.Nearest(), coldrow.Stochastic(1)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_threads_and_builds(dtype, rounding, pooling):
    base = train(dtype, rounding, pooling, build=BEST, threads=1)
    for build in _core.builds():
        for threads in (1, 2, 5):
            other = train(dtype, rounding, pooling, build=build, threads=threads)
            for a, b in zip(base, other, strict=True):
                assert torch.equal(a, b), (build, threads)


def hot_rows(threads, *, dim, pooling, spoil=None):
    """Two steps in which half of all ids are of one row and a fifth of another; returns weights and state."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rng = np.random.default_rng(7)
        emb = TableBatchedEmbeddingBags(
            [Table("cold", 50_000, dim), Table("hot", 50_000, dim)],
            coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=1e-3)),
            pooling=pooling,
        )
        for p in emb.weights.values():
            p.copy_(torch.from_numpy(rng.normal(size=p.shape)))
        for _ in range(2):
            ids = rng.integers(0, 50_000, (2, 60_000))
            of = rng.random(ids.shape[1])
            ids[1, of < 0.5] = 31
            ids[1, (of >= 0.5) & (of < 0.7)] = 49_999
            offsets = torch.arange(0, 120_001, 5)
            out = emb(torch.from_numpy(ids.reshape(-1)), offsets)
            grad = torch.from_numpy(rng.normal(size=out.shape)).float()
            if spoil is not None:
                grad[spoil] = float("inf")
            out.backward(grad)
        state = [array for arrays in emb.state.values() for array in arrays.values()]
        return [*emb.weights.values(), *state, torch.tensor(emb.nonfinite_rows)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("dim", [16, 21])
def test_a_hot_row_is_work_for_all_threads(dim, pooling):
    """Its gradients are summed in slices: by several threads, or by one in the same order."""
    base = hot_rows(1, dim=dim, pooling=pooling)
    for threads in (2, 3, 5):
        for a, b in zip(base, hot_rows(threads, dim=dim, pooling=pooling), strict=True):
            assert torch.equal(a, b), threads


def test_a_hot_row_that_is_not_finite():
    """It is judged like any other row, by whichever thread."""
    base = hot_rows(1, dim=16, pooling="sum", spoil=(7000, slice(16, 32)))
    assert base[-1] > 0
    for a, b in zip(
        base, hot_rows(3, dim=16, pooling="sum", spoil=(7000, slice(16, 32))), strict=True
    ):
        assert torch.equal(a, b)


def test_another_process():
    """A run of its own, with other addresses and hash seeds, gives the same bits."""

    def digest():
        parts = train(torch.bfloat16, coldrow.Stochastic(1), "sum", build=BEST, threads=2)
        return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()

    code = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_determinism import *\n"
        "parts = train(torch.bfloat16, coldrow.Stochastic(1), 'sum', build=BEST, threads=2)\n"
        "print(hashlib.sha256(b''.join(p.numpy().tobytes() for p in parts)).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == digest()


def test_several_threads_are_really_used():
    """The comparison above means something only where OpenMP gives more than one thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert _core.threads() == 3
    finally:
        torch.set_num_threads(before)


def test_this_machine_has_more_than_one_build():
    assert _core.builds()[0] == BEST
    if BEST.startswith("x86_64") and BEST != "x86_64_v2":
        assert len(_core.builds()) > 1
    with pytest.raises(ValueError, match="build: got 'sse', accepted: one of builds"):
        _core.use_build("sse")
