"""Gradients that are not finite: every way to train, every way to treat them.

(Across ranks: tests/distributed/test_row_sharded.py and test_together.py.)
"""

from __future__ import annotations

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402
from coldrow.optim import SparseOptimizer  # noqa: E402

ROWS, DIM = 6, 20
INDICES = [1, 4, 1, 0]
BAD = 1  # position: row 4; row 2 is not looked up
START = torch.linspace(-1, 1, ROWS * DIM).view(ROWS, DIM)
RMSPROP = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.5))
UPDATES = {
    "SGD": coldrow.RowUpdate(coldrow.SGD(lr=0.1), coldrow.Constant(0.5)),
    "RowwiseRMSprop": RMSPROP,
    "Adam": coldrow.RowUpdate(
        coldrow.Adam(lr=0.1), coldrow.CumulativeLinear(0.01), decay_state=True
    ),
}


class Module:
    fused, compile = True, False

    def __init__(self, update, on_nonfinite) -> None:
        tables = [Table("a", ROWS, DIM, init=lambda w: w.copy_(START))]
        self.emb = TableBatchedEmbeddingBags(
            tables, update, pooling="none", fused=self.fused, on_nonfinite=on_nonfinite
        )
        self.call = torch.compile(self.emb, backend="aot_eager") if self.compile else self.emb

    def train(self, grad) -> None:
        self.call(torch.tensor(INDICES), torch.arange(5)).backward(grad)
        if not self.fused:
            self.emb.step()

    def arrays(self) -> list:
        return [self.emb.weights["a"].detach(), *self.emb.state["a"].values()]

    def counted(self) -> tuple[int, int]:
        return self.emb.clock, self.emb.nonfinite_rows


class Unfused(Module):
    fused = False


class Compiled(Module):
    compile = True


class Optimizer:
    def __init__(self, update, on_nonfinite) -> None:
        self.weight = torch.nn.Parameter(START.clone())
        self.opt = SparseOptimizer([self.weight], update, on_nonfinite=on_nonfinite)
        self.state = coldrow.init_state(update, ROWS, DIM, self.weight)

    def train(self, grad) -> None:
        rows = torch.nn.functional.embedding(torch.tensor(INDICES), self.weight, sparse=True)
        rows.backward(grad)
        self.opt.step()

    def arrays(self) -> list:
        return [self.weight.detach(), *(self.opt.state.get(self.weight) or self.state).values()]

    def counted(self) -> tuple[int, int]:
        return self.opt.clock, self.opt.nonfinite_rows


class Function:
    def __init__(self, update, on_nonfinite) -> None:
        self.update, self.mode = update, on_nonfinite
        self.weight = START.numpy().copy()
        self.state = coldrow.init_state(update, ROWS, DIM, self.weight)

    def train(self, grad) -> None:
        coldrow.apply_(
            self.update,
            self.weight,
            grad.numpy(),
            np.array(INDICES),
            self.state,
            step=1,
            on_nonfinite=self.mode,
        )

    def arrays(self) -> list:
        return [torch.from_numpy(a) for a in (self.weight, *self.state.values())]

    def counted(self) -> None:
        """Keeps no count: its caller owns the clock."""


WAYS = {c.__name__.lower(): c for c in (Module, Unfused, Compiled, Optimizer, Function)}
VALUES = [float("nan"), float("inf"), -float("inf"), 1e30]  # 1e30: its square overflows


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("mode", ["raise", "skip", "propagate"])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("way", WAYS)
def test_row_that_would_not_be_finite(way, update, mode, value):
    if way == "compiled" and (update != "Adam" or value == value):  # one of each mode is enough
        pytest.skip("compiled once per mode")
    grad = torch.full((4, DIM), 0.25)
    clean = WAYS[way](UPDATES[update], mode)
    clean.train(grad)
    grad[BAD, 3] = value
    learner = WAYS[way](UPDATES[update], mode)
    before = [a.clone() for a in learner.arrays()]

    if mode == "raise":
        with pytest.raises(
            ValueError, match=r"^grad: the update of row 4 .*is not finite \(1 such"
        ):
            learner.train(grad)
        for was, array in zip(before, learner.arrays(), strict=True):
            assert torch.equal(was, array)
        assert learner.counted() in (None, (0, 0))
        return
    learner.train(grad)
    good = [0, 1, 2, 3, 5]
    for array, was, wanted in zip(learner.arrays(), before, clean.arrays(), strict=True):
        assert torch.equal(array[good], wanted[good])  # as if nothing had been wrong
        if mode == "skip":
            assert torch.equal(array[4], was[4])
    if mode == "propagate":
        weight, prev_iter = learner.arrays()[:2]
        assert prev_iter[4] == 1
        # 1e30 itself is finite; where the row's second moment overflows nothing is subtracted
        assert value == 1e30 or not weight[4].isfinite().all()
    assert learner.counted() in (None, (1, 1 if mode == "skip" else 0))
