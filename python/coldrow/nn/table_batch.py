"""What kernels work on: some tables, their state, policies, clock and learning rates, bound to a backend.

A :class:`TableBatch` knows no autograd and no nn.Module. Modules, shards, operators and shims are made of it.
Nothing of it changes but what its arrays hold: whoever moves or replaces memory makes a new one.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from coldrow._backends.protocol import Counters, Kernels, Operands, RowStep
from coldrow._backends.registry import backend_of, kernels_of, kernels_on
from coldrow._checks import integer, require_dense, table_key
from coldrow._steps import apply_steps, sparse_rows
from coldrow.nn.table import Origin
from coldrow.policies import RowUpdate


@dataclass(frozen=True)
class TableLayout:
    """One table, without its arrays."""

    name: str
    dim: int
    update: RowUpdate
    group: int = 0  # of learning rates
    origin: Origin | None = None  # of a shard

    @property
    def whole(self) -> Origin:
        """Where the first row is in the whole table: what messages and random bits are about."""
        return Origin(self.name) if self.origin is None else self.origin


@dataclass(frozen=True)
class Layout:
    """Some tables and how they are looked up: all that is not a tensor.

    Args:
        tables: in order.
        features: the table of each feature, in the order of the caller.
        pooling: "sum", "mean" or "none".
        charge: "touch" or "read".
        output_dtype: of lookups.
        on_nonfinite: "skip", "raise" or "propagate".
    """

    tables: tuple[TableLayout, ...]
    features: tuple[int, ...]
    pooling: str
    charge: str
    output_dtype: torch.dtype
    on_nonfinite: str

    dims: tuple[int, ...] = field(init=False)  # columns by feature
    width: int | None = field(init=False)  # columns, where all features have as many

    def __post_init__(self) -> None:
        dims = tuple([self.tables[t].dim for t in self.features])
        object.__setattr__(self, "dims", dims)
        object.__setattr__(self, "width", dims[0] if len(set(dims)) == 1 else None)

    @property
    def groups(self) -> list[int]:
        """The group of learning rates of each table."""
        return [t.group for t in self.tables]

    def spec(self, token: str | None) -> str:
        """Return the layout as text, with the token of the kernels that are to run it."""
        updates = list(dict.fromkeys(t.update for t in self.tables))
        number = {update: i for i, update in enumerate(updates)}
        values = {
            "kernels": token,
            "updates": [u.to_dict() for u in updates],
            "tables": [(t.name, t.dim, number[t.update], t.group, t.origin) for t in self.tables],
            "features": self.features,
            "pooling": self.pooling,
            "charge": self.charge,
            "output": str(self.output_dtype).removeprefix("torch."),
            "on_nonfinite": self.on_nonfinite,
        }
        return json.dumps(values)

    @classmethod
    def of_spec(cls, spec: str) -> tuple[Layout, str | None]:
        """Return what :meth:`spec` was made of."""
        values = json.loads(spec)
        updates = [RowUpdate.from_dict(u) for u in values["updates"]]
        tables = [
            TableLayout(name, dim, updates[u], group, None if at is None else Origin(*at))
            for name, dim, u, group, at in values["tables"]
        ]
        layout = cls(
            tuple(tables),
            tuple(values["features"]),
            values["pooling"],
            values["charge"],
            getattr(torch, values["output"]),
            values["on_nonfinite"],
        )
        return layout, values["kernels"]

    def batch_sizes(self, given: Any, offsets: Tensor) -> tuple[int, ...]:
        """Return bags by feature as a user gave them, checked."""
        features, bags = len(self.features), offsets.shape[0] - 1
        accepted = f"accepted: one per feature ({features}), adding up to len(offsets) - 1 = {bags}"
        if isinstance(given, Tensor) and not given.is_meta:
            with suppress(RuntimeError):  # sparse, nested and quantised tensors have no list
                given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"batch_sizes: got {given!r}, {accepted}")
        if torch.compiler.is_compiling():  # (the operator checks each again)
            sizes = tuple(given)
        else:
            sizes = tuple([integer("batch_sizes", b, 0, 2**31 - 1) for b in given])
        if len(sizes) != features or sum(sizes) != bags:
            raise ValueError(
                f"batch_sizes: got {len(sizes)} sizes that add up to {sum(sizes)}, {accepted}"
            )
        return sizes

    def output_shape(
        self, indices: Tensor, offsets: Tensor, batch_sizes: Sequence[int] | None
    ) -> tuple[Any, ...]:
        """Return the shape of what a lookup writes; flat where features differ in size."""
        dims = self.dims
        if self.pooling == "none" and self.width is not None:
            return (indices.shape[0] * self.width,)
        if self.pooling == "none":
            counts = counts_of(offsets, batch_sizes, len(dims))
            total = sum(n * d for n, d in zip(counts, dims, strict=True))
            # Offsets that are wrong ask for any size; the kernels will refuse them.
            least, most = indices.numel() * min(dims), indices.numel() * max(dims)
            return (min(max(total, least), most),)
        if batch_sizes is not None:
            return (sum(b * d for b, d in zip(batch_sizes, dims, strict=True)),)
        return ((offsets.shape[0] - 1) // len(dims), sum(dims))

    def shaped(self, out: Tensor, offsets: Tensor, batch_sizes: Sequence[int] | None) -> Any:
        """Return what a lookup wrote as users get it."""
        if self.pooling != "none":
            return out
        if self.width is not None:
            return out.view(-1, self.width)
        counts = counts_of(offsets, batch_sizes, len(self.dims))
        parts = out.split([n * d for n, d in zip(counts, self.dims, strict=True)])
        return [part.view(-1, d) for part, d in zip(parts, self.dims, strict=True)]


class Native(NamedTuple):
    """What the binding makes of a layout: it may serve any arrays of that layout."""

    keys: list[int]  # of tables, for random bits
    tables: Any
    updates: list[Any]  # by table


class TableBatch:
    """Some tables bound to their arrays and kernels.

    Args:
        layout: all that is not a tensor.
        kernels: of the device that the arrays are on.
        weights: float32, float16 or bfloat16 ``[E, D]``, by table.
        state: by table ``prev_iter`` int32 ``[E]``, then the state of the optimizer in the order of
            ``update.state_names`` (updates need it). Empty where nothing is updated or charged on read.
        counters: clock, epoch and learning rates.
        native: of the same layout and kernels, where it was made before.
    """

    def __init__(
        self,
        layout: Layout,
        kernels: Kernels,
        weights: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        counters: Counters,
        *,
        native: Native | None = None,
    ) -> None:
        self.layout, self.kernels, self.counters = layout, kernels, counters
        self.weights, self.state_by_table = weights, state
        self.state = [array for arrays in state for array in arrays]
        self.native = native = _native(layout, kernels) if native is None else native
        self.operands = Operands(
            native.tables,
            weights,
            [arrays[1:] for arrays in state],
            [arrays[0] for arrays in state],
            native.updates,
            layout.pooling,
            layout.charge == "read",
        )
        # What a step writes and autograd should hear of. (Inference tensors have no versions.)
        written = [*weights, *self.state, counters.clock, counters.nonfinite]
        self._written = [t for t in written if not t.is_inference()]

    def over(
        self,
        weights: Sequence[Tensor],
        state: Sequence[Sequence[Tensor]],
        counters: Counters,
    ) -> TableBatch:
        """Return the same tables over other arrays."""
        return TableBatch(self.layout, self.kernels, weights, state, counters, native=self.native)

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.weights[0].device

    def index_of(self, name: str) -> int:
        """Return the number of a table, or raise KeyError."""
        for i, table in enumerate(self.layout.tables):
            if isinstance(name, str) and table.name == name:
                return i
        accepted = ", ".join(t.name for t in self.layout.tables)
        raise KeyError(f"table: got {name!r}, accepted: {accepted}")

    def versions(self) -> tuple[int, ...]:
        """Return what changes whenever somebody writes to a table."""
        return tuple([w._version for w in self.weights])

    def held(self, *, write: bool) -> AbstractContextManager[Any]:
        """Return a context in which no other thread's call writes the tables, or reads them either."""
        return self.kernels.held(self.weights, write=write)

    # ------------------------------------------------------------------------------------ lookups

    def moment(self, sizes: tuple[int, ...] | None, *, keep: bool = False) -> Any:
        """Return what a lookup needs to know besides tensors. keep: as it is now, for a later call."""
        return self.kernels.moment(sizes, self.counters, read=self.operands.read, keep=keep)

    def lookup(
        self, moment: Any, indices: Tensor, offsets: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Return the rows, pooled; :meth:`Layout.shaped` gives them their shape.

        Args:
            moment: see :meth:`moment`.
            indices: int32 or int64 ``[N]``, contiguous.
            offsets: dtype of ``indices``, ``[bags + 1]``, contiguous.
            weights: float32 ``[N]`` or None.
        """
        layout = self.layout
        shape = layout.output_shape(indices, offsets, moment.batch_sizes)
        out = torch.empty(
            *shape, dtype=layout.output_dtype, device=indices.device
        )  # (a tuple: 0.5 us)
        weights = None if weights is None else weights.detach()
        self.kernels.lookup(self.operands, moment, indices, offsets, weights, out)
        return out

    def weight_gradients(
        self, moment: Any, indices: Tensor, offsets: Tensor, grad: Tensor
    ) -> Tensor:
        """Return the gradient of per_sample_weights, float32 ``[N]``, from that of the output."""
        out = torch.empty(indices.shape[0], dtype=torch.float32, device=indices.device)
        self.kernels.weight_gradients(self.operands, moment, indices, offsets, grad, out)
        return out

    # ------------------------------------------------------------------------------------ updates

    def update(
        self,
        sizes: Sequence[int] | None,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        grad: Tensor,
        *,
        on_nonfinite: str | None = None,
        check_only: bool = False,
    ) -> None:
        """Do a step: update the rows that a lookup read, and tick the clock.

        Args:
            sizes: bags by feature, or None where all features have as many.
            indices: as in :meth:`lookup`.
            offsets: as in :meth:`lookup`.
            weights: as in :meth:`lookup`.
            grad: of the output of the lookup, contiguous.
            on_nonfinite: default: that of the layout.
            check_only: raise what is wrong, and write nothing.
        """
        mode = self.layout.on_nonfinite if on_nonfinite is None else on_nonfinite
        self.kernels.update(
            self.operands,
            self.counters,
            sizes,
            indices,
            offsets,
            weights,
            grad,
            mode,
            check_only=check_only,
        )
        if not check_only:
            increment_version(self._written)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Do a step with sparse gradients, by table; a table without one is not touched."""
        counters, layout = self.counters, self.layout
        step, lrs = counters.next_step(), counters.lr_values()
        steps = []
        for i, (table, grad) in enumerate(zip(layout.tables, gradients, strict=True)):
            accepted = "sparse gradients, as this module's backward makes them"
            rows = sparse_rows(grad, f"weights.{table.name}.grad", accepted)
            if rows is not None:
                arrays, prev_iter = list(self.operands.states[i]), self.operands.prev_iters[i]
                row_step = RowStep(
                    table.update,
                    self.weights[i],
                    *rows,
                    arrays,
                    prev_iter,
                    lrs[i],
                    self.native.keys[i],
                )
                row_step.row_offset, row_step.col_offset = table.whole.row, table.whole.column
                steps.append(row_step)
        apply_steps(
            steps,
            step=step,
            epoch_start=int(counters.epoch_start),
            on_nonfinite=layout.on_nonfinite,
            clock=counters.clock,
            nonfinite=counters.nonfinite,
        )
        increment_version(self._written)

    # --------------------------------------------------------------------------------------- rows

    def rows(self, table: int, rows: Any) -> Tensor:
        """Return row numbers of a table as int32 or int64 ``[n]``, checked; None: all."""
        count, device = self.weights[table].shape[0], self.device
        if rows is None:
            return torch.arange(count, device=device)
        return row_numbers(rows, range(count), device)

    def read(self, table: int, rows: Tensor) -> Tensor:
        """Return rows ``[n, D]`` as a lookup would read them now."""
        layout = self.layout
        kind, weight = layout.tables[table], self.weights[table].detach()
        if not self.operands.read:
            with self.held(write=False):
                return weight.index_select(0, rows).to(layout.output_dtype)
        out = torch.empty(rows.numel(), kind.dim, dtype=layout.output_dtype, device=weight.device)
        backend_of("weight", weight).read(
            kind.update,
            out,
            weight,
            rows,
            self.operands.prev_iters[table],
            step=int(self.counters.clock) + 1,
            lr=self.counters.lr_values()[table],
            epoch_start=int(self.counters.epoch_start),
        )
        return out

    def check(self) -> None:
        """Raise what was found on a device and not raised yet."""
        self.kernels.check(self.native.tables, [len(w) for w in self.weights])


def _native(layout: Layout, kernels: Kernels) -> Native:
    wholes = [t.whole for t in layout.tables]
    keys = [table_key(o.name) for o in wholes]
    tables = kernels.tables(
        [o.name for o in wholes],
        keys,
        layout.features,
        [o.row for o in wholes],
        [o.column for o in wholes],
    )
    return Native(keys, tables, [kernels.update_of(t.update) for t in layout.tables])


class BoundLayout:
    """The layout that a spec describes, made ready to run on one device: what operators keep.

    Where the module whose kernels the spec names is gone, kernels of its own wait and raise.
    """

    def __init__(self, spec: str, device: torch.device) -> None:
        self.layout, self._token = Layout.of_spec(spec)
        self._device = device
        self._own: Kernels | None = None
        self._made: tuple[weakref.ref[Kernels], Native] | None = None

    def _kernels(self) -> Kernels:
        found = kernels_of(self._token)
        if found is not None:
            return found
        if self._own is None:
            self._own = kernels_on(self._device, sync=True)
        return self._own

    def over(
        self, weights: Sequence[Tensor], state: Sequence[Tensor], counters: Counters
    ) -> TableBatch:
        """Return the tables over these arrays; ``state`` of all tables, one after another, or empty."""
        rest = iter(state)
        by_table = [
            list(itertools.islice(rest, len(t.update.state_names)))
            for t in (self.layout.tables if state else ())
        ]
        kernels, native = self._kernels(), None
        if self._made is not None and self._made[0]() is kernels:
            native = self._made[1]
        made = TableBatch(self.layout, kernels, weights, by_table, counters, native=native)
        self._made = weakref.ref(kernels), made.native
        return made


def row_numbers(rows: Any, within: range, device: torch.device | None = None) -> Tensor:
    """Return ``rows`` as an int32 or int64 ``[n]`` tensor, or raise unless all are in ``within``."""
    if isinstance(rows, range):
        rows = torch.arange(rows.start, rows.stop, rows.step)
    try:
        rows = torch.as_tensor(rows, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rows: got {rows!r}, accepted: int32 or int64 [n]") from None
    require_dense("rows", rows)
    if rows.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
        raise TypeError(
            f"rows: got {rows.dtype} of shape {list(rows.shape)}, accepted: int32 or int64 [n]"
        )
    low, high = int(rows.min()), int(rows.max())
    if low < within.start or high >= within.stop:
        got = low if low < within.start else high
        raise IndexError(f"rows: got {got}, accepted: {within.start} to {within.stop - 1}")
    aligned = rows.data_ptr() % rows.element_size() == 0  # not so of every array of NumPy's
    found: Tensor = rows.contiguous() if aligned else rows.clone()
    return found


def counts_of(offsets: Tensor, sizes: Sequence[int] | None, features: int) -> list[int]:
    """Return the number of indices of each feature, by the offsets (not checked here). Waits."""
    each = (offsets.numel() - 1) // features
    ends = itertools.accumulate(sizes or [each] * features, initial=0)
    at = offsets[torch.tensor(list(ends), device=offsets.device)].tolist()
    return [b - a for a, b in itertools.pairwise(at)]
