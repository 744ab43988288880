"""What a module asks of the kernels where its tables are: one class for the processor, one for CUDA devices.

On the processor step, learning rates and counters are read here, as numbers, and whatever is wrong raises at
once. On a device they stay tensors, which the kernels read and write: nothing waits, so calls can be captured
in a CUDA graph, and what is wrong is found on the device and raised at a check point.
"""

from __future__ import annotations

import itertools
import uuid
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coldrow import _core, _engines
from coldrow._checks import LAST_STEP, number, table_key
from coldrow.policies import RowUpdate, compiled


class Batch(NamedTuple):  # (made in half the time of a dataclass)
    """What a forward was asked, besides tensors, and when."""

    batch_sizes: tuple[int, ...] | None
    step: int = 1
    epoch_start: int = 0
    lrs: tuple[float, ...] = ()  # by table


class DeviceBatch(NamedTuple):
    """The same on a device: tensors, read when the kernels run."""

    batch_sizes: tuple[int, ...] | None
    clock: Tensor
    epoch_start: Tensor
    lrs: tuple[Tensor, ...]  # by table


class Origin(NamedTuple):
    """Where a table's first row and column are in the table that it is a shard of, and that one's name."""

    name: str
    row: int = 0
    column: int = 0


@dataclass(frozen=True)
class Operands:
    """What a call works on: native tables and features, and the arrays they name."""

    native: Any
    weights: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]  # the optimizer's, by table; updates need them
    prev_iters: Sequence[Tensor]  # updates and read charging need them
    updates: Sequence[Any]
    pooling: str
    read: bool  # charge="read"


@dataclass(frozen=True)
class Counters:
    """0-dim tensors of a module: int64, grad_scale and each group's lr float64."""

    clock: Tensor
    epoch_start: Tensor
    nonfinite: Tensor
    grad_scale: Tensor
    lrs: Sequence[Tensor]  # by group
    groups: Sequence[int]  # by table

    def by_table(self) -> tuple[Tensor, ...]:
        """Return the learning rates by table."""
        return tuple([self.lrs[g] for g in self.groups])

    def lr_values(self) -> list[float]:
        """Return the learning rates by group as numbers."""
        return [lr.item() for lr in self.lrs]

    def next_step(self) -> int:
        """Return the number of the next step, or raise where there is none."""
        clock = int(self.clock.item())
        if clock >= LAST_STEP:
            raise ValueError(
                f"clock: is at {clock}, accepted: steps up to 2**31 - 1 (prev_iter is int32)"
            )
        return clock + 1


class HostKernels:
    """The processor's."""

    token: str | None = None
    device = torch.device("cpu")

    def tables(self, *layout: Any) -> Any:
        """Return the native form of some tables and features."""
        return _core.TableBatch(*layout)

    def update_of(self, update: RowUpdate) -> Any:
        """Return the native form of an update."""
        return compiled(update)

    def batch(
        self, sizes: tuple[int, ...] | None, at: Counters, *, read: bool, keep: bool = False
    ) -> Batch:
        """Return what a lookup needs to know of the moment: nothing, unless it charges (``read``)."""
        if not read:
            return Batch(sizes)
        lrs = at.lr_values()
        by_table = tuple([lrs[g] for g in at.groups])
        return Batch(sizes, int(at.clock.item()) + 1, int(at.epoch_start.item()), by_table)

    def lookup(
        self,
        on: Operands,
        batch: Any,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write the output."""
        on.native.lookup(
            on.weights,
            on.prev_iters,
            on.updates,
            batch.lrs,
            indices,
            offsets,
            weights,
            batch.batch_sizes,
            on.pooling,
            on.read,
            batch.step,
            batch.epoch_start,
            out,
        )

    def weight_gradients(
        self,
        on: Operands,
        batch: Any,
        indices: Tensor,
        offsets: Tensor,
        grad: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient of per_sample_weights."""
        on.native.weight_gradients(
            on.weights,
            on.prev_iters,
            on.updates,
            batch.lrs,
            indices,
            offsets,
            batch.batch_sizes,
            on.pooling,
            on.read,
            batch.step,
            batch.epoch_start,
            grad,
            out,
        )

    def update(
        self,
        on: Operands,
        at: Counters,
        sizes: Sequence[int] | None,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        grad: Tensor,
        on_nonfinite: str,
    ) -> None:
        """Update the tables, count what was skipped, and tick the clock."""
        if at.grad_scale.item() != 1.0:
            grad = grad.float() / number("grad_scale", at.grad_scale, low_open=True)
        lrs = at.lr_values()
        on.native.update(  # counts too
            on.weights,
            on.states,
            on.prev_iters,
            on.updates,
            [lrs[g] for g in at.groups],
            indices,
            offsets,
            weights,
            sizes,
            on.pooling,
            at.next_step(),
            at.epoch_start.item(),
            grad,
            on_nonfinite,
            False,
            at.clock,
            at.nonfinite,
        )

    def held(self, tables: Sequence[Tensor], *, write: bool) -> AbstractContextManager[Any]:
        """Return a context in which other threads' calls leave the tables alone."""
        held: AbstractContextManager[Any] = _core.HeldTables(tables, write)
        return held

    def begin_epoch(self, at: Counters) -> None:
        """Let an epoch begin with the next step."""
        at.epoch_start.fill_(at.next_step())

    def no_epoch(self, epoch_start: Tensor) -> bool:
        """Return whether no epoch has begun; without waiting, so a device only says that it may be."""
        return int(epoch_start) == 0

    def check(self, native: Any, rows: Sequence[int]) -> None:
        """Raise what was found and not raised yet: nothing."""


class DeviceKernels:
    """A CUDA device's.

    Args:
        engine: the CUDA engine.
        device: where the tables are.
        sync: wait after each call and raise what it found.
    """

    def __init__(self, engine: _engines.Device, device: torch.device, sync: bool) -> None:
        self._engine, self._sync = engine, sync or engine.always_sync
        self._report = torch.zeros(engine.native.report_size, dtype=torch.int64, device=device)
        self.device = self._report.device
        self._number = engine.number(self._report)
        self._allocate = engine.allocator(self._report)
        # What an operator traced by torch.compile is told, so that it reports to the module.
        self.token = uuid.uuid4().hex
        _known[self.token] = self

    def _place(self) -> tuple[Any, int, Any]:
        return self._report, self._engine.stream(self._report), self._allocate

    def tables(self, *layout: Any) -> Any:
        """Return the native form of some tables and features."""
        return self._engine.native.TableBatch(*layout)

    def update_of(self, update: RowUpdate) -> Any:
        """Return the native form of an update."""
        return self._engine.update(update, self._number)

    def batch(
        self, sizes: tuple[int, ...] | None, at: Counters, *, read: bool, keep: bool = False
    ) -> DeviceBatch:
        """Return where a lookup finds what it needs to know. keep: as it is now, for later.

        (The kernels look when they need it, so ``read`` changes nothing.)
        """
        if not keep:
            return DeviceBatch(sizes, at.clock, at.epoch_start, at.by_table())
        lrs = [lr.clone() for lr in at.lrs]
        by_table = tuple([lrs[g] for g in at.groups])
        return DeviceBatch(sizes, at.clock.clone(), at.epoch_start.clone(), by_table)

    def lookup(
        self,
        on: Operands,
        batch: Any,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write the output; zeros where the batch is refused."""
        on.native.lookup(
            on.weights,
            on.prev_iters,
            on.updates,
            batch.lrs,
            indices,
            offsets,
            weights,
            batch.batch_sizes,
            on.pooling,
            on.read,
            batch.clock,
            batch.epoch_start,
            out,
            *self._place(),
        )
        self._after(on)

    def weight_gradients(
        self,
        on: Operands,
        batch: Any,
        indices: Tensor,
        offsets: Tensor,
        grad: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient of per_sample_weights; zeros where the batch is refused."""
        on.native.weight_gradients(
            on.weights,
            on.prev_iters,
            on.updates,
            batch.lrs,
            indices,
            offsets,
            batch.batch_sizes,
            on.pooling,
            on.read,
            batch.clock,
            batch.epoch_start,
            grad,
            out,
            *self._place(),
        )
        self._after(on)

    def update(
        self,
        on: Operands,
        at: Counters,
        sizes: Sequence[int] | None,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        grad: Tensor,
        on_nonfinite: str,
    ) -> None:
        """Update the tables, count what was skipped, and tick the clock; all on the device."""
        on.native.update(
            on.weights,
            on.states,
            on.prev_iters,
            on.updates,
            at.by_table(),
            indices,
            offsets,
            weights,
            sizes,
            on.pooling,
            at.clock,
            at.epoch_start,
            at.nonfinite,
            at.grad_scale,
            grad,
            on_nonfinite,
            *self._place(),
        )
        self._after(on)

    def held(self, tables: Sequence[Tensor], *, write: bool) -> AbstractContextManager[Any]:
        """Return a context that does nothing: on a device, the stream keeps calls apart."""
        return nullcontext()

    def begin_epoch(self, at: Counters) -> None:
        """Let an epoch begin with the next step. (After the last there is none; the next call finds it.)"""
        if self._sync:
            at.next_step()
        torch.add(at.clock, 1, out=at.epoch_start)

    def no_epoch(self, epoch_start: Tensor) -> bool:
        """Return whether no epoch has begun; without waiting, so a device only says that it may be."""
        return True

    def _after(self, on: Operands) -> None:
        if self._sync:
            self.check(on.native, [len(w) for w in on.weights])

    def check(self, native: Any, rows: Sequence[int]) -> None:
        """Wait, and raise what the kernels found since the last check."""
        native.check(self._report, rows, self._engine.stream(self._report))


Kernels = HostKernels | DeviceKernels

_known: weakref.WeakValueDictionary[str, DeviceKernels] = weakref.WeakValueDictionary()


def require_device(device: torch.device) -> None:
    """Raise, naming the argument ``device``, unless tables can be there."""
    if device.type == (_engines.device or _engines.Device).torch_type:
        _engines.device_engine("device", repr(str(device)))
    elif device.type != "cpu":
        raise ValueError(f"device: got {str(device)!r}, accepted: 'cpu' or 'cuda'")


def kernels_on(device: torch.device, *, sync: bool) -> Kernels:
    """Return the kernels for tables on a device. sync: on CUDA, wait and raise in each call."""
    require_device(device)
    engine = _engines.device
    if engine is not None and device.type == engine.torch_type:
        return DeviceKernels(engine, device, sync)
    return HostKernels()


def kernels_of(token: str | None) -> DeviceKernels | None:
    """Return the kernels that have this token, while their module lives."""
    return None if token is None else _known.get(token)


def native_tables(kernels: Kernels, origins: Sequence[Origin], features: Sequence[int]) -> Any:
    """Return the native form of tables and features: names and random bits are the whole tables'."""
    names, rows, columns = zip(*origins, strict=True)
    keys = [table_key(n) for n in names]
    return kernels.tables(list(names), keys, list(features), list(rows), list(columns))


def counts_of(offsets: Tensor, sizes: Sequence[int] | None, features: int) -> list[int]:
    """Return the number of indices of each feature, by the offsets (not checked here). Waits."""
    each = (offsets.numel() - 1) // features
    ends = itertools.accumulate(sizes or [each] * features, initial=0)
    at = offsets[torch.tensor(list(ends), device=offsets.device)].tolist()
    return [b - a for a, b in itertools.pairwise(at)]
