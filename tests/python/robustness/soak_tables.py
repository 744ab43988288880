"""What the soak test trains: tables, what is compared of them, and owners of some under one clock."""

from __future__ import annotations

import collections
import copy

import numpy as np
import torch
from support import (
    ROUND,
    Table64,
    check_step,
    exact_grad,
    on_grid,
    within,
)

import coldrow
from coldrow import _core
from coldrow.optim import SparseOptimizer
from coldrow.policies import compiled

LAST = 2**31 - 1
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LRS = [0.0, 0.02, 0.3]
BETA32 = float(np.float32(0.99))
OPTIMIZERS = [
    coldrow.SGD(0.02),
    coldrow.RowwiseRMSprop(0.02, 1e-3, BETA32),
    coldrow.RowwiseRMSprop(0.3, 0.25, 0.5),
    coldrow.RowwiseAdagrad(0.02, 1e-8),
    coldrow.Adagrad(0.3, 1e-3),
    coldrow.Adam(0.02, 0.9, 0.999, 1e-3),
    coldrow.Adam(0.02, 0.5, 0.5, 0.25, "row"),
    coldrow.PartialRowwiseAdam(0.02, 0.9, 0.999, 1e-3),
    coldrow.PartialRowwiseAdam(0.02, 0.0, 0.9, 0.25, "row"),
]
DECAYS = [
    coldrow.NoDecay(),
    coldrow.LinearClipped(0.5, 0.1),
    coldrow.LinearClipped(15.0, 0.0),
    coldrow.CumulativeLinear(1e-7),
    coldrow.CumulativeLinear(1e-3),
    coldrow.CumulativeLinear(half_life=9.0),
    coldrow.Exponential(1e-3),
    coldrow.Exponential(half_life=30.0),
    coldrow.Constant(0.2),
    coldrow.EpochGated(coldrow.CumulativeLinear(half_life=20.0)),
    coldrow.EpochGated(coldrow.LinearClipped(0.5, 0.0)),
    coldrow.EpochReset(),
    coldrow.EpochGated(coldrow.Exponential(half_life=5.0)),
]
LENGTHS = [0, 0, 1, 2, 2, 4, 8]  # powers of two: then a mean of exact gradients is exact


class Tally:
    """What was done, and the largest share of an accepted error that was used."""

    def __init__(self) -> None:
        self.operations: collections.Counter[str] = collections.Counter()
        self.rows = 0
        self.worst = {"out": 0.0, "state": 0.0, "weight": 0.0}

    def used(self, **shares: float) -> None:
        for name, share in shares.items():
            self.worst[name] = max(self.worst[name], share)

    def __str__(self) -> str:
        worst = ", ".join(f"{name} {share:.2f}" for name, share in self.worst.items())
        total = sum(self.operations.values())
        return f"{total:,} operations, {self.rows:,} rows checked, worst share of bound: {worst}"


def raw(array) -> bytes:
    """Every byte of an array."""
    if isinstance(array, torch.Tensor):
        array = array.detach()
        array = (array.view(torch.int16) if array.dtype == torch.bfloat16 else array).numpy()
    return array.tobytes()


def picked(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


class Bits:
    """Every byte of the tables of an owner, taken now."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._was = self._now()

    def _now(self) -> dict:
        return {
            (table, name): raw(array)
            for table, arrays in self._owner.arrays().items()
            for name, array in arrays.items()
        }

    def unchanged(self, why: str) -> None:
        for key, bits in self._now().items():
            assert bits == self._was[key], f"{why} changed {key[1]} of {key[0]}"


class Owner:
    """Tables under one clock, and the operations on them."""

    updates: dict[str, coldrow.RowUpdate]

    def __init__(self, rng: np.random.Generator, tally: Tally) -> None:
        self.rng, self.tally = rng, tally

    def arrays(self) -> dict:
        """{table: {"weight": ..., "prev_iter": ..., ...}}, live."""
        raise NotImplementedError

    def now(self) -> dict[str, Table64]:
        """Copies in float64."""
        return {
            table: Table64(arrays["weight"], {k: v for k, v in arrays.items() if k != "weight"})
            for table, arrays in self.arrays().items()
        }

    def check(self, before, done, *, step, lrs, epoch_start, left=None) -> None:
        """Compare an update: done {table: [(grad, indices)]}; left {table: rows not to look at}."""
        after = self.now()
        for table, parts in done.items():
            grad = np.concatenate([g for g, _ in parts])
            indices = np.concatenate([i for _, i in parts])
            rows = (left or {}).get(table)
            if rows is not None and len(rows):
                keep = ~np.isin(indices, rows)
                grad, indices = grad[keep], indices[keep]
                after[table].weight[rows] = before[table].weight[rows]
                for name, array in after[table].state.items():
                    array[rows] = before[table].state[name][rows]
            shares = check_step(
                self.updates[table],
                before[table],
                after[table],
                grad,
                indices,
                step=step,
                lr=lrs[table],
                epoch_start=epoch_start,
            )
            self.tally.used(**shares)
            self.tally.rows += len(np.unique(indices))

    def check_read(self, got, table, before, rows, *, step, lr, epoch_start, charge, dtype) -> None:
        """Compare rows as read, [n, D] float64."""
        want = before.weight[rows]
        error = 6 * ROUND * np.abs(want) + 1e-38
        if charge == "read":
            want = self.factors(table, before, rows, step, lr, epoch_start)[:, None] * want
        self.check_out(got, want, error, dtype)
        self.tally.rows += len(rows)

    def factors(self, table, before, rows, step, lr, epoch_start) -> np.ndarray:
        """What a read-charged read multiplies rows by."""
        last, which = np.unique(before.state["prev_iter"][rows], return_inverse=True)
        update = compiled(self.updates[table])
        each = [_core.reference_read_factor(update, int(p), step, lr, epoch_start) for p in last]
        return np.array(each, dtype=np.float64)[which]

    def check_out(self, got, want, error, dtype: str) -> None:
        low, high = want - error, want + error
        if dtype != "float32":
            low, high = (on_grid(x, dtype, np.rint) for x in (low, high))
        share = within(got, low, high, "out")
        if dtype == "float32":
            self.tally.used(out=share)


def random_updates(rng: np.random.Generator, count: int) -> list[coldrow.RowUpdate]:
    """All optimizers and decays in turn, from a random place on."""
    a, b = int(rng.integers(100)), int(rng.integers(100))
    return [
        coldrow.RowUpdate(
            OPTIMIZERS[(a + k) % len(OPTIMIZERS)],
            DECAYS[(b + k) % len(DECAYS)],
            picked(rng, [coldrow.Nearest(), coldrow.Stochastic(int(rng.integers(2**40)))]),
            bool(rng.integers(2)),
        )
        for k in range(count)
    ]


def random_shape(rng: np.random.Generator) -> tuple[int, int]:
    rows = int(np.exp(rng.uniform(0, np.log(2000))))
    dim = picked(rng, [1, 3, 4, 8, 15, 16, 17, 32, 33, 64, 70, 130])
    return rows, dim


class OptimizerOwner(Owner):
    """Parameters looked up by torch, under coldrow.optim.SparseOptimizer."""

    def __init__(self, rng, tally, updates) -> None:
        super().__init__(rng, tally)
        self.names = [f"p{i}" for i in range(len(updates))]
        self.updates = dict(zip(self.names, updates, strict=True))
        self.params = {
            name: torch.nn.Parameter(
                torch.from_numpy(rng.normal(size=random_shape(rng))).to(picked(rng, DTYPES))
            )
            for name in self.names
        }
        self.on_nonfinite = picked(rng, ["skip", "raise"])
        self.opt = self.build()
        self.clock = self.nonfinite = 0

    def build(self) -> SparseOptimizer:
        groups = [{"params": [self.params[n]], "update": self.updates[n]} for n in self.names]
        first = self.updates[self.names[0]]
        return SparseOptimizer(groups, first, on_nonfinite=self.on_nonfinite)

    def state_of(self, name: str) -> dict:
        p = self.params[name]
        return self.opt.state.get(p) or coldrow.init_state(self.updates[name], *p.shape, p)

    def arrays(self) -> dict:
        return {n: {"weight": self.params[n], **self.state_of(n)} for n in self.names}

    def train(self, poison=None) -> None:
        rng, before, bits = self.rng, self.now(), Bits(self)
        done: dict = {name: [] for name in self.names}
        lrs = {n: float(g["lr"]) for n, g in zip(self.names, self.opt.param_groups, strict=True)}
        step, epoch_start = self.opt.clock + 1, int(self.opt.state_dict()["epoch_start"])
        spoiled = {}
        for name, p in self.params.items():
            indices = rng.integers(0, p.shape[0], int(rng.integers(0, 200)))
            grad = exact_grad(rng, (len(indices), p.shape[1]))
            if poison is not None and len(indices):
                grad[0, 0] = poison
                spoiled[name] = indices[:1]
            rows = torch.nn.functional.embedding(torch.from_numpy(indices), p, sparse=True)
            rows.backward(torch.from_numpy(grad).to(p.dtype))
            done[name].append((grad, indices))
        try:
            self.opt.step()
        except ValueError:
            assert spoiled
            assert self.on_nonfinite == "raise"
            bits.unchanged("a refused gradient")
            return
        finally:
            self.opt.zero_grad()
        assert not (spoiled and self.on_nonfinite == "raise")
        self.clock += 1
        self.nonfinite += len(spoiled)
        self.check(before, done, step=step, lrs=lrs, epoch_start=epoch_start, left=spoiled)

    def nonfinite_gradient(self) -> None:
        self.train(poison=picked(self.rng, [np.nan, np.inf]))

    def new_epoch(self) -> None:
        self.opt.new_epoch()

    def learning_rate(self) -> None:
        picked(self.rng, self.opt.param_groups)["lr"] = picked(self.rng, LRS)

    def move_clock(self) -> None:
        self.opt.clock += int(self.rng.integers(0, picked(self.rng, [3, 40, 10**4])))
        self.clock = self.opt.clock

    def save_and_load(self) -> None:
        bits, nonfinite = Bits(self), self.nonfinite
        state = copy.deepcopy(self.opt.state_dict())
        weights = {n: p.detach().clone() for n, p in self.params.items()}
        clock = self.clock
        if self.rng.integers(2):
            self.train()
        with torch.no_grad():
            for n, p in self.params.items():
                p.copy_(weights[n])
        self.opt = self.build()
        self.opt.load_state_dict(state)
        bits.unchanged("a checkpoint")
        self.clock, self.nonfinite, self.opt.nonfinite_rows = clock, nonfinite, nonfinite

    def settle(self) -> None:
        assert self.opt.clock == self.clock
        assert self.opt.nonfinite_rows == self.nonfinite

    operations = {  # noqa: RUF012
        "train": 8,
        "nonfinite_gradient": 1,
        "new_epoch": 1,
        "learning_rate": 1,
        "move_clock": 1,
        "save_and_load": 1,
    }


class ArrayOwner(Owner):
    """NumPy arrays under coldrow.apply_ and coldrow.read_, which keep no clock."""

    def __init__(self, rng, tally, updates) -> None:
        super().__init__(rng, tally)
        self.updates = {f"n{i}": u for i, u in enumerate(updates)}
        self.tables = {}
        for name, update in self.updates.items():
            rows, dim = random_shape(rng)
            weight = rng.normal(size=(rows, dim)).astype(picked(rng, ["float32", "float16"]))
            self.tables[name] = {"weight": weight, **coldrow.init_state(update, rows, dim, weight)}
        self.clock = self.epoch_start = 0

    def arrays(self) -> dict:
        return self.tables

    def now_of(self, name: str) -> tuple:
        table = self.tables[name]
        return (
            self.updates[name],
            table["weight"],
            {k: v for k, v in table.items() if k != "weight"},
        )

    def train(self) -> None:
        rng, before = self.rng, self.now()
        name, lr = picked(rng, list(self.tables)), picked(rng, LRS)
        update, weight, state = self.now_of(name)
        step = self.clock + int(rng.integers(1, picked(rng, [2, 2, 50, 10**5])))
        indices = rng.integers(0, len(weight), int(rng.integers(0, 400)))
        grad = exact_grad(rng, (len(indices), weight.shape[1]))
        given = grad.astype(picked(rng, ["float32", "float16"]))
        kind = picked(rng, [np.int32, np.int64])
        now = {"step": step, "lr": lr, "epoch_start": self.epoch_start}
        coldrow.apply_(update, weight, given, indices.astype(kind), state, **now)
        done = {n: [(np.zeros((0, t["weight"].shape[1])), np.zeros(0, np.int64))]
                for n, t in self.tables.items()}  # fmt: skip
        done[name] = [(grad, indices)]
        lrs = dict.fromkeys(self.tables, lr)
        self.check(before, done, step=step, lrs=lrs, epoch_start=self.epoch_start)
        self.clock = step
        if len(indices):
            bits = Bits(self)
            try:
                coldrow.apply_(update, weight, given, indices.astype(kind), state, **now)
            except ValueError as error:
                assert "step: got" in str(error)  # noqa: PT017
            else:
                raise AssertionError("a step twice")
            bits.unchanged("a step twice")

    def nonfinite_gradient(self) -> None:
        bits = Bits(self)
        update, weight, state = self.now_of(picked(self.rng, list(self.tables)))
        grad = exact_grad(self.rng, (3, weight.shape[1])).astype(np.float32)
        grad[1, 0] = picked(self.rng, [np.nan, np.inf])
        indices = self.rng.integers(0, len(weight), 3)
        try:
            coldrow.apply_(update, weight, grad, indices, state, step=self.clock + 1)
        except ValueError as error:
            assert "is not finite" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a gradient that is not finite")
        bits.unchanged("a refused gradient")

    def read(self) -> None:
        name, lr, bits = picked(self.rng, list(self.tables)), picked(self.rng, LRS), Bits(self)
        update, weight, state = self.now_of(name)
        rows = self.rng.integers(0, len(weight), int(self.rng.integers(0, 60)))
        out = np.empty((len(rows), weight.shape[1]), picked(self.rng, ["float32", "float16"]))
        now = {"step": self.clock + 1, "lr": lr, "epoch_start": self.epoch_start}
        coldrow.read_(out, update, weight, rows, state, **now)
        before = self.now()[name]
        got, dtype = out.astype(np.float64), str(out.dtype)
        self.check_read(got, name, before, rows, charge="read", dtype=dtype, **now)
        bits.unchanged("a read")

    def new_epoch(self) -> None:
        self.epoch_start = self.clock + 1

    def settle(self) -> None:
        pass

    operations = {"train": 6, "read": 3, "nonfinite_gradient": 1, "new_epoch": 1}  # noqa: RUF012
