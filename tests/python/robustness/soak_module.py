"""The soak test's modules: operations on a TableBatchedEmbeddingBags."""

from __future__ import annotations

import copy
import pathlib
import tempfile

import numpy as np
import torch
from soak_tables import DTYPES, LAST, LENGTHS, LRS, Bits, Owner, picked, random_shape, raw
from support import (
    ROUND,
    exact_grad,
    pool,
    unpool,
    within,
)

from coldrow import checkpoint
from coldrow.nn import Table, TableBatchedEmbeddingBags


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
