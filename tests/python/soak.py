"""Random operations on 20 tables, each checked against the float64 reference: ``make soak``.

A round builds 20 tables of all optimizers, decays, roundings and dtypes (14 in three modules, 3 under an
optimizer beside torch's own lookup, 3 NumPy arrays under the functions) and runs some hundred operations on
them. After each one the table it was for is compared with what the reference makes of what was there before,
within the roundings of one step (support.py), and every other byte of every table with what it was. Between
rounds the memory of the process is looked at.

    python tests/python/soak.py --minutes 60
    python tests/python/soak.py --replay 123456     # the round that a failure names
"""

from __future__ import annotations

import argparse
import collections
import copy
import ctypes
import gc
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

import numpy as np
import torch
from support import (
    ROUND,
    Table64,
    check_step,
    exact_grad,
    on_grid,
    pool,
    unpool,
    within,
)

import coldrow
from coldrow import _core, checkpoint
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import SparseOptimizer
from coldrow.policies import compiled

LAST = 2**31 - 1
OPERATIONS = 300  # of a round
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


class ModuleOwner(Owner):
    """A TableBatchedEmbeddingBags; its first table serves two features."""

    def __init__(self, rng, tally, updates) -> None:
        super().__init__(rng, tally)
        names = [f"t{i}" for i in range(len(updates))]
        self.updates = dict(zip(names, updates, strict=True))
        self.fused = bool(rng.integers(2))
        self.weighted = bool(rng.integers(2))
        self.pooling = picked(rng, ["sum", "sum", "mean", "none"])
        self.weighted = self.pooling == "sum" and bool(rng.integers(2))
        same_dim = bool(rng.integers(2))
        width = random_shape(rng)[1]
        self.specs = []
        for i, name in enumerate(names):
            rows, dim = random_shape(rng)
            self.specs.append(
                {
                    "name": name,
                    "num_rows": rows,
                    "dim": width if same_dim else dim,
                    "dtype": picked(rng, DTYPES),
                    "features": ["a", "b"] if i == 0 else None,
                    "init": torch.nn.init.zeros_ if i == 1 else None,
                    "update": self.updates[name],
                }
            )
        self.options = {
            "pooling": self.pooling,
            "charge": picked(rng, ["touch", "read"]),
            "fused": self.fused,
            "on_nonfinite": picked(rng, ["skip", "raise", "propagate"]),
            "output_dtype": picked(rng, DTYPES),
        }
        self.of_feature = [0, 0, *range(1, len(updates))]
        self.emb = self.build()
        for p in self.emb.weights.values():
            p.data.copy_(torch.from_numpy(rng.normal(size=p.shape)))
        self.clock = self.nonfinite = 0

    def build(self) -> TableBatchedEmbeddingBags:
        layout = picked(self.rng, ["record", "split"])
        tables = [Table(**spec) for spec in self.specs]
        return TableBatchedEmbeddingBags(tables, state_layout=layout, **self.options)

    def arrays(self) -> dict:
        emb = self.emb
        return {name: {"weight": emb.weights[name], **emb.state[name]} for name in self.updates}

    def counters(self) -> tuple:
        emb = self.emb
        return emb.clock, emb.epoch_start, [float(g["lr"]) for g in emb.param_groups]

    def lrs(self) -> dict[str, float]:
        found = {}
        for group in self.emb.param_groups:
            for name, p in self.emb.weights.items():
                if any(p is q for q in group["params"]):
                    found[name] = float(group["lr"])
        return found

    # ---------------------------------------------------------------------------------- a batch

    def batch(self):
        """Arguments of a forward, and by feature (rows, offsets, per-sample weights)."""
        rng = self.rng
        vary = bool(rng.integers(2))
        bags = int(rng.integers(0, picked(rng, [3, 30, 200])))
        sizes = [int(rng.integers(0, bags + 1)) if vary else bags for _ in self.of_feature]
        parts = []
        for t, size in zip(self.of_feature, sizes, strict=True):
            lengths = rng.choice(LENGTHS, size)
            rows = self.specs[t]["num_rows"]
            indices = rng.integers(0, rows, lengths.sum())
            if rng.integers(2):
                indices = np.minimum(indices, rng.zipf(1.2, len(indices)) - 1)
            psw = rng.integers(-8, 9, len(indices)) / 4 if self.weighted else None
            parts.append((indices, np.cumsum([0, *lengths]), psw))
        ends = np.cumsum([0] + [len(i) for i, _, _ in parts])
        offsets = [o[1:] + e for (_, o, _), e in zip(parts, ends, strict=False)]
        kind = picked(rng, [torch.int32, torch.int64])
        weights = None
        if self.weighted:
            weights = torch.from_numpy(np.concatenate([p for _, _, p in parts])).float()
            weights.requires_grad_(bool(rng.integers(2)))
        given = (
            torch.from_numpy(np.concatenate([i for i, _, _ in parts])).to(kind),
            torch.from_numpy(np.concatenate([[0], *offsets])).to(kind),
            weights,
            sizes if vary else None,
        )
        return given, parts

    def expected(self, before, parts):
        """By feature: what the forward gives, the error accepted, and the rows as they are read."""
        now = {"step": self.emb.clock + 1, "epoch_start": self.emb.epoch_start}
        lrs = self.lrs()
        for t, (indices, offsets, psw) in zip(self.of_feature, parts, strict=True):
            name = f"t{t}"
            rows = before[name].weight[indices]
            size = np.abs(rows)
            if self.options["charge"] == "read":
                factor = self.factors(name, before[name], indices, lr=lrs[name], **now)
                rows = factor[:, None] * rows
            if self.pooling == "none":
                yield rows, 6 * ROUND * size + 1e-38, rows, size
                continue
            most = max(LENGTHS) + 8
            error = (
                most * ROUND * pool(size, offsets, self.pooling, None if psw is None else abs(psw))
            )
            yield pool(rows, offsets, self.pooling, psw), error + 1e-38, rows, size

    def split(self, out, wants) -> list[np.ndarray]:
        """A result by feature, as float64."""
        if isinstance(out, list):
            return [x.detach().double().numpy() for x in out]
        flat = out.detach().double().numpy()
        if self.pooling == "none":
            return np.split(flat, np.cumsum([len(w) for w in wants])[:-1])
        if flat.ndim == 1:
            cuts = np.cumsum([w.size for w in wants])[:-1]
            return [x.reshape(w.shape) for x, w in zip(np.split(flat, cuts), wants, strict=True)]
        return np.split(flat, np.cumsum([w.shape[1] for w in wants])[:-1], axis=1)

    def joined(self, grads, out):
        """Gradients by feature in the shape of a result."""
        if isinstance(out, list):
            return [torch.from_numpy(g).to(o.dtype) for g, o in zip(grads, out, strict=True)]
        if self.pooling == "none":
            whole = np.concatenate(grads)
        elif out.dim() == 1:
            whole = np.concatenate([g.reshape(-1) for g in grads])
        else:
            whole = np.concatenate(grads, axis=1)
        return torch.from_numpy(whole).to(out.dtype)

    def look_up(self, before):
        """A forward, compared; returns its result and what a backward needs."""
        given, parts = self.batch()
        out = self.emb(*given)
        expected = list(self.expected(before, parts))
        wants = [want for want, *_ in expected]
        dtype = str(self.options["output_dtype"]).removeprefix("torch.")
        for got, (want, error, *_) in zip(self.split(out, wants), expected, strict=True):
            self.check_out(got, want, error, dtype)
        self.tally.rows += sum(len(i) for i, _, _ in parts)
        return out, given[2], parts, expected

    def one_backward(self, before, done, scale=1.0, poison=None) -> dict:
        """A forward and its backward; adds to ``done``, returns {table: rows poisoned}."""
        out, weights, parts, expected = self.look_up(before)
        grads = [exact_grad(self.rng, want.shape) for want, *_ in expected]
        spoiled: dict[str, list] = {}
        if poison is not None:
            places = [(f, b) for f, g in enumerate(grads) for b in range(len(g))]
            for at in self.rng.permutation(len(places))[:2]:
                f, b = places[at]
                grads[f][b, int(self.rng.integers(grads[f].shape[1]))] = poison
                indices, offsets, _ = parts[f]
                rows = indices[b : b + 1]
                if self.pooling != "none":
                    rows = indices[offsets[b] : offsets[b + 1]]
                spoiled.setdefault(f"t{self.of_feature[f]}", []).extend(rows.tolist())
        for t, (indices, offsets, psw), grad in zip(self.of_feature, parts, grads, strict=True):
            each = grad if self.pooling == "none" else unpool(grad, offsets, self.pooling, psw)
            done[f"t{t}"].append((each, indices))
        if self.fused:
            self.emb.grad_scale = scale
        scaled = self.joined([g * scale for g in grads], out)
        torch.autograd.backward(out, scaled)
        if weights is not None and weights.requires_grad and poison is None:
            self.check_weight_gradient(weights, parts, grads, expected, scale)
        return {k: np.unique(np.array(rows, np.int64)) for k, rows in spoiled.items()}

    def check_weight_gradient(self, weights, parts, grads, expected, scale) -> None:
        wants, errors = [], []
        for (_, offsets, _), grad, (*_, rows, size) in zip(parts, grads, expected, strict=True):
            each = unpool(grad, offsets, "sum") * scale
            wants.append((each * rows).sum(1))
            errors.append((grad.shape[1] / 16 + 24) * ROUND * (abs(each) * size).sum(1) + 1e-38)
        want, error = np.concatenate(wants), np.concatenate(errors)
        self.tally.used(
            out=within(weights.grad.double().numpy(), want - error, want + error, "psw")
        )

    def run(self, *, poison=None):
        """A whole step. Returns what was done and {table: rows poisoned}."""
        before, done = self.now(), {name: [] for name in self.updates}
        step, lrs, epoch_start = self.emb.clock + 1, self.lrs(), self.emb.epoch_start
        scale = picked(self.rng, [1.0, 1.0, 4.0]) if self.fused else 1.0
        bits, refused, spoiled = Bits(self), False, {}
        try:
            for _ in range(1 if self.fused or poison is not None else int(self.rng.integers(1, 4))):
                spoiled = self.one_backward(before, done, scale, poison)
            if not self.fused:
                bits.unchanged("a backward without a step")
                self.emb.step()
        except ValueError as error:
            if poison is None:
                raise
            assert self.options["on_nonfinite"] == "raise", error  # noqa: PT017
            assert "is not finite" in str(error)  # noqa: PT017
            refused = True
        finally:
            self.emb.zero_grad()
            self.emb.grad_scale = 1.0
        if refused:
            bits.unchanged("a refused gradient")
            return
        self.clock += 1
        now = {"step": step, "lrs": lrs, "epoch_start": epoch_start}
        if self.options["on_nonfinite"] == "skip":
            self.nonfinite += sum(map(len, spoiled.values()))
            after = self.arrays()
            for name, rows in spoiled.items():
                for key, array in after[name].items():
                    old = before[name].weight if key == "weight" else before[name].state[key]
                    assert raw(array[rows].double()) == raw(old[rows].astype(np.float64)), key
        elif spoiled:
            for name, rows in spoiled.items():
                weight = self.emb.weights[name].detach()[torch.from_numpy(rows)]
                assert not weight.isfinite().all(1).any(), "propagate left a row finite"
                assert (self.emb.state[name]["prev_iter"][torch.from_numpy(rows)] == step).all()
        self.check(before, done, left=spoiled, **now)
        if self.options["on_nonfinite"] == "propagate":
            for name, rows in spoiled.items():
                self.emb.evict(name, rows.tolist())

    # ------------------------------------------------------------------------------- operations

    def train(self) -> None:
        self.run()

    def nonfinite_gradient(self) -> None:
        values = [np.nan] if self.weighted else [np.nan, np.inf, -np.inf]
        self.run(poison=picked(self.rng, values))

    def evaluate(self) -> None:
        bits = Bits(self)
        self.emb.eval()
        with torch.no_grad():
            self.look_up(self.now())
        self.emb.train()
        bits.unchanged("an evaluation")

    def read(self) -> None:
        name = picked(self.rng, list(self.updates))
        bits, before, emb = Bits(self), self.now()[name], self.emb
        count = len(before.weight)
        rows = np.arange(count)
        given = None
        if self.rng.integers(2):
            rows = self.rng.integers(0, count, int(self.rng.integers(0, 50)))
            given = torch.from_numpy(rows)
        got = emb.read(name, given).double().numpy()
        self.check_read(
            got,
            name,
            before,
            rows,
            step=emb.clock + 1,
            lr=self.lrs()[name],
            epoch_start=emb.epoch_start,
            charge=self.options["charge"],
            dtype=str(self.options["output_dtype"]).removeprefix("torch."),
        )
        gap = int(self.rng.integers(0, 100))
        cold = np.flatnonzero(before.state["prev_iter"] <= emb.clock - gap)
        np.testing.assert_array_equal(emb.cold_rows(name, gap).numpy(), cold)
        bits.unchanged("a read")

    def new_epoch(self) -> None:
        bits = Bits(self)
        self.emb.new_epoch()
        assert self.emb.epoch_start == self.clock + 1
        bits.unchanged("new_epoch()")

    def evict(self) -> None:
        name = picked(self.rng, list(self.updates))
        spec = next(s for s in self.specs if s["name"] == name)
        rows = np.unique(self.rng.integers(0, spec["num_rows"], int(self.rng.integers(1, 9))))
        before = {key: raw(a) for key, a in self.arrays()[name].items()}
        others = {t: {k: raw(a) for k, a in arrays.items()} for t, arrays in self.arrays().items()}
        self.emb.evict(name, rows.tolist())
        for key, array in self.arrays()[name].items():
            width = array[0].numel() * array.element_size()
            old = np.frombuffer(before[key], np.uint8).reshape(-1, width).copy()
            new = np.frombuffer(raw(array), np.uint8).reshape(-1, width)
            if key == "weight":
                bound = 0.0 if spec["init"] else spec["dim"] ** -0.5 * (1 + 2.0**-7)
                assert array.detach()[torch.from_numpy(rows)].abs().max() <= bound
            else:
                assert not new[rows].any(), f"{key} of an evicted row"
            old[rows] = new[rows]
            assert (old == new).all(), f"evict changed {key} of other rows"
        for t, arrays in self.arrays().items():
            for key, array in arrays.items():
                assert t == name or raw(array) == others[t][key], f"evict changed {t}"
        self.tally.rows += len(rows)

    def saved(self, folder: pathlib.Path) -> dict:
        """A state_dict that went through something."""
        state = self.emb.state_dict()
        way = picked(self.rng, ["memory", "pt", "safetensors", "torch.save"])
        if way == "memory":
            return copy.deepcopy(state)
        path = folder / f"x.{way}"
        if way == "torch.save":
            torch.save(state, path)
            return torch.load(path, weights_only=True)
        checkpoint.save(state, path)
        return checkpoint.load(path)

    def save_and_load(self) -> None:
        """Go back to a checkpoint: in the module itself, or in a new one."""
        with tempfile.TemporaryDirectory() as folder:
            state = self.saved(pathlib.Path(folder))
        bits, counters, nonfinite = Bits(self), self.counters(), self.nonfinite
        if self.rng.integers(2):
            for _ in range(int(self.rng.integers(1, 3))):
                self.run()
        else:
            self.emb = self.build()
        self.emb.load_state_dict(state)
        bits.unchanged("a checkpoint")
        assert self.counters() == counters
        self.emb.nonfinite_rows = self.nonfinite = nonfinite
        self.clock = counters[0]

    def copied(self) -> None:
        bits, counters = Bits(self), self.counters()
        self.emb = copy.deepcopy(self.emb)
        bits.unchanged("a copy")
        assert self.counters() == counters

    def learning_rate(self) -> None:
        emb, value = self.emb, picked(self.rng, LRS)
        group = picked(self.rng, emb.param_groups)
        how = self.rng.integers(3)
        if how == 0:
            emb.lr = value
        elif how == 1:
            group["lr"] = value
        else:
            group["lr"].fill_(value) if isinstance(group["lr"], torch.Tensor) else None

    def move_clock(self) -> None:
        bits = Bits(self)
        most = picked(self.rng, [3, 3, 3, 40, 40, 1000, 10**5])
        self.emb.clock += int(self.rng.integers(0, most))
        self.clock = self.emb.clock
        bits.unchanged("the clock")

    def end_of_clock(self) -> None:
        """Train at the last step, be refused after it, and come back."""
        bits, counters, state = Bits(self), self.counters(), copy.deepcopy(self.emb.state_dict())
        nonfinite = self.nonfinite
        self.emb.clock = self.clock = LAST - 1
        self.run()
        end = Bits(self)
        try:
            self.run()
        except ValueError as error:
            assert "clock: is at 2147483647" in str(error)  # noqa: PT017
        else:
            raise AssertionError("a step after the last")
        end.unchanged("a step after the last")
        self.evaluate()
        self.emb.load_state_dict(state)
        bits.unchanged("going back from the last step")
        self.clock, self.nonfinite = counters[0], nonfinite
        self.emb.nonfinite_rows = nonfinite

    def bad_input(self) -> None:
        (indices, offsets, weights, sizes), _ = self.batch()
        bits = Bits(self)
        if len(indices):
            wrong = indices.clone()
            wrong[int(self.rng.integers(len(wrong)))] = picked(self.rng, [-1, 2**31 - 1])
            self.refused(IndexError, wrong, offsets, weights, sizes)
        self.refused(ValueError, indices, offsets + 1, weights, sizes)
        bits.unchanged("bad input")

    def refused(self, kind, *given) -> None:
        try:
            self.emb(*given)
        except kind:
            return
        raise AssertionError(f"no {kind.__name__}")

    def settle(self) -> None:
        assert self.emb.clock == self.clock
        assert self.emb.nonfinite_rows == self.nonfinite

    operations = {  # noqa: RUF012
        "train": 10,
        "evaluate": 4,
        "read": 3,
        "nonfinite_gradient": 2,
        "new_epoch": 1,
        "evict": 1,
        "save_and_load": 1,
        "copied": 0.3,
        "learning_rate": 1,
        "move_clock": 2,
        "end_of_clock": 0.2,
        "bad_input": 0.5,
    }


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
        step, epoch_start = self.opt.clock + 1, int(self.opt._epoch_start)
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


# ---------------------------------------------------------------------------------------- a round


def one_round(seed: int, tally: Tally, until: float) -> None:
    """20 tables and OPERATIONS operations on them, or as many as there is time for."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    updates = random_updates(rng, 20)
    owners = [
        ModuleOwner(rng, tally, updates[:6]),
        ModuleOwner(rng, tally, updates[6:11]),
        ModuleOwner(rng, tally, updates[11:14]),
        OptimizerOwner(rng, tally, updates[14:17]),
        ArrayOwner(rng, tally, updates[17:]),
    ]
    chance = np.array([6.0, 5.0, 3.0, 2.0, 2.0])
    for n in range(OPERATIONS):
        if time.monotonic() > until:
            return
        if n % 20 == 0:
            torch.set_num_threads(picked(rng, [1, 1, 1, 2]))
            _core.use_build(picked(rng, _core.builds()))
        owner = owners[int(rng.choice(len(owners), p=chance / chance.sum()))]
        weights = np.array(list(owner.operations.values()))
        name = str(rng.choice(list(owner.operations), p=weights / weights.sum()))
        others = [Bits(other) for other in owners if other is not owner]
        try:
            getattr(owner, name)()
            owner.settle()
            for bits in others:
                bits.unchanged(f"{name} of another owner")
        except BaseException:
            kind = type(owner).__name__
            print(f"operation {n} of round {seed}: {kind}.{name}()", flush=True)
            print(f"replay: python tests/python/soak.py --replay {seed}", flush=True)
            print("\n".join(map(str, (vars(owner).get("options"), owner.updates))), flush=True)
            raise
        tally.operations[name] += 1


def resident() -> float:
    """MiB of memory that the process has, freed memory given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, help="of the first round; the others count from it")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this one round")
    parser.add_argument("--growth", type=float, default=32.0, help="MiB that memory may grow by")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="an epoch-aware decay is in use")

    tally, start = Tally(), time.monotonic()
    if args.replay is not None:
        one_round(args.replay, tally, float("inf"))
        print(tally)
        return 0
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    commit = subprocess.run(
        ["git", "-C", os.path.dirname(__file__), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    print(f"coldrow {coldrow.__version__} {commit}, torch {torch.__version__}, "
          f"{platform.machine()} {_core.build()}, first seed {seed}", flush=True)  # fmt: skip
    until, rounds, memory = start + 60 * args.minutes, 0, []
    while time.monotonic() < until or rounds == 0:
        one_round(seed + rounds, tally, until)
        rounds += 1
        memory.append(resident())
        minutes, busy = (time.monotonic() - start) / 60, time.process_time() / 60
        print(
            f"{minutes:.1f} min ({busy:.1f} of CPU), {rounds} rounds: {tally}, {memory[-1]:.0f} MiB",
            flush=True,
        )
    settled = memory[min(3, len(memory) - 1)]  # caches and pools have filled
    for name, count in tally.operations.most_common():
        print(f"  {name:20} {count:9,}")
    print(f"memory {settled:.0f} MiB after the first rounds, {max(memory):.0f} at most, "
          f"{memory[-1]:.0f} at the end; accepted: {args.growth:.0f} more", flush=True)  # fmt: skip
    if memory[-1] > settled + args.growth:
        print("soak FAILED: memory grew")
        return 1
    print(f"soak passed: {rounds} rounds, {tally}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        print("soak FAILED")
        sys.exit(1)
