"""Ctrl-C at any moment: a call has happened, or it has not; then KeyboardInterrupt.

Python raises it between two of its instructions, so what belongs together has to be written by one native
call. A timer stands in for the key. After each interruption the bits must be those of an undisturbed run at
the step that the clock says; training then goes on.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time

import pytest

import coldrow

torch = pytest.importorskip("torch")

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402
from coldrow.optim import SparseOptimizer  # noqa: E402

UPDATE = coldrow.RowUpdate(
    coldrow.Adam(lr=0.1), coldrow.CumulativeLinear(half_life=3.0), coldrow.Stochastic(2)
)
ROWS, DIM = 3000, 32
STEPS = int(os.environ.get("COLDROW_FAULTS", "30"))


def digest(tensors) -> str:
    whole = hashlib.blake2b()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def indices_of(step: int) -> torch.Tensor:
    return torch.randint(ROWS, (2, 4000), generator=torch.Generator().manual_seed(step))


class Module:
    """Two tables, fused or not; one bag of each step has a gradient that is not finite."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        tables = [Table("a", ROWS, DIM, dtype=torch.bfloat16), Table("b", ROWS, DIM)]
        self.emb = TableBatchedEmbeddingBags(tables, UPDATE, charge="read", **options)
        self.offsets = torch.arange(0, 8001, 20)

    @property
    def clock(self) -> int:
        return self.emb.clock

    def step(self) -> None:
        self.emb.discard_forward()
        self.emb.zero_grad()
        out = self.emb(indices_of(self.emb.clock + 1).flatten(), self.offsets)
        grad = out.detach().cos()
        grad[3, 5] = float("nan")
        out.backward(grad)
        if not self.emb.fused:
            self.emb.step()

    def now(self) -> tuple[int, str]:
        emb = self.emb
        views = [view for views in emb.state.values() for view in views.values()]
        rows = torch.tensor(emb.nonfinite_rows)
        return emb.clock, digest([*emb.weights.values(), *views, rows.view(1)])


class Optimizer:
    """Two parameters under SparseOptimizer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.nn.Parameter(torch.randn(ROWS, DIM, generator=generator)) for _ in range(2)
        ]
        self.opt = SparseOptimizer(self.params, UPDATE)

    @property
    def clock(self) -> int:
        return self.opt.clock

    def step(self) -> None:
        self.opt.zero_grad()
        for p, indices in zip(self.params, indices_of(self.opt.clock + 1), strict=True):
            torch.nn.functional.embedding(indices, p, sparse=True).square().sum().backward()
        self.opt.step()

    def now(self) -> tuple[int, str]:
        states = [s for p in self.params for s in self.opt.state[p].values()]
        return self.opt.clock, digest([*self.params, *states])


LEARNERS = {
    "fused": Module,
    "fused, propagate": lambda: Module(on_nonfinite="propagate"),
    "unfused": lambda: Module(fused=False),
    "optimizer": Optimizer,
}


@pytest.fixture
def alarm():
    """Arms a timer whose signal is handled as Ctrl-C's is."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", LEARNERS)
def test_interrupted_at_any_moment(kind, alarm, one_thread):
    straight, expected, fastest = LEARNERS[kind](), {}, float("inf")
    for step in range(1, STEPS + 1):
        begin = time.perf_counter()
        straight.step()
        fastest = min(fastest, time.perf_counter() - begin)
        clock, expected[step] = straight.now()
        assert clock == step

    learner, chance, interrupted = LEARNERS[kind](), random.Random(0), 0
    while learner.clock < STEPS:
        try:
            alarm(fastest * chance.uniform(0.01, 2.0))
            while learner.clock < STEPS:
                learner.step()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            alarm(0)
            torch.set_grad_enabled(True)  # what an interruption of torch's own no_grad may leave
        clock, bits = learner.now()
        assert clock == 0 or bits == expected[clock], f"half a step, interruption {interrupted}"
    assert interrupted >= STEPS // 4
    assert learner.now() == (STEPS, expected[STEPS])
    print(f"{kind}: {interrupted} interruptions, {STEPS} steps")
