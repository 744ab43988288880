"""What a backend offers: policies applied to arrays, and kernels for several tables at once.

Nothing here imports torch when it is run: functions on NumPy arrays go through backends too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from coldrow._checks import LAST_STEP
from coldrow.policies import RowUpdate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RowStep:
    """One table's part in a step: gradient rows, and what they update."""

    update: RowUpdate
    weight: Any
    grad: Any  # [n, D]
    indices: Any  # [n]
    state: list[Any]  # the optimizer's
    prev_iter: Any
    lr: float
    key: int
    row_offset: int = 0
    col_offset: int = 0


class Moment(NamedTuple):  # (made in half the time of a dataclass)
    """What a lookup needs besides tensors: sizes, and the step that comes next. Numbers, on the host."""

    batch_sizes: tuple[int, ...] | None
    step: int = 1
    epoch_start: int = 0
    lrs: tuple[float, ...] = ()  # by table


class DeviceMoment(NamedTuple):
    """The same on a device: 0-dim tensors, read when the kernels run."""

    batch_sizes: tuple[int, ...] | None
    clock: Tensor
    epoch_start: Tensor
    lrs: tuple[Tensor, ...]  # by table


@dataclass(frozen=True)
class Operands:
    """What a call works on: native tables and features, and the arrays they name."""

    native: Any
    weights: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]  # of the optimizer, by table; updates need them
    prev_iters: Sequence[Tensor]  # updates and read charging need them
    updates: Sequence[Any]
    pooling: str
    read: bool  # charge="read"


@dataclass(frozen=True)
class Counters:
    """Clock, epoch and learning rates of some tables, as the tensors that own them.

    ``clock``, ``epoch_start`` and ``nonfinite`` are 0-dim int64, ``grad_scale`` is 0-dim float64, ``lr``
    is float64 ``[groups]``; ``groups`` has the group of each table.
    """

    clock: Tensor
    epoch_start: Tensor
    nonfinite: Tensor
    grad_scale: Tensor
    lr: Tensor
    groups: Sequence[int]
    _views: list[tuple[Tensor, ...]] = field(default_factory=list, compare=False, repr=False)

    def lrs(self) -> tuple[Tensor, ...]:
        """Return the learning rates by group, 0-dim views of ``lr``."""
        if not self._views:
            self._views.append(self.lr.unbind())
        return self._views[0]

    def lrs_by_table(self) -> tuple[Tensor, ...]:
        """Return the learning rates by table, 0-dim views of ``lr``."""
        lrs = self.lrs()
        return tuple([lrs[g] for g in self.groups])

    def lr_values(self) -> tuple[float, ...]:
        """Return the learning rates by table as numbers. (Waits for a device.)"""
        values = self.lr.tolist()
        return tuple([values[g] for g in self.groups])

    def next_step(self) -> int:
        """Return the number of the next step, or raise where there is none. (Waits for a device.)"""
        clock = int(self.clock.item())
        if clock >= LAST_STEP:
            raise ValueError(
                f"clock: is at {clock}, accepted: steps up to 2**31 - 1 (prev_iter is int32)"
            )
        return clock + 1


class Kernels(Protocol):
    """What modules ask of a backend, for tables on one device.

    On the host, step, learning rates and counters are read as numbers and whatever is wrong raises at once.
    On a device they stay tensors, which the kernels read and write: nothing waits, so calls can be captured
    in a CUDA graph, and what is wrong is found on the device and raised by :meth:`check`.
    """

    token: str | None  # names the kernels in an operator's spec; None: any of this kind do
    device: Any

    def tables(
        self,
        names: Sequence[str],
        keys: Sequence[int],
        features: Sequence[int],
        rows: Sequence[int],
        columns: Sequence[int],
    ) -> Any:
        """Return the native form of some tables and features."""

    def update_of(self, update: RowUpdate) -> Any:
        """Return the native form of an update."""

    def moment(
        self, sizes: tuple[int, ...] | None, at: Counters, *, read: bool, keep: bool = False
    ) -> Any:
        """Return what a lookup needs to know of the moment. keep: as it is now, for later."""

    def lookup(
        self,
        on: Operands,
        moment: Any,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write the output."""

    def weight_gradients(
        self,
        on: Operands,
        moment: Any,
        indices: Tensor,
        offsets: Tensor,
        grad: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient of per_sample_weights."""

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
        *,
        check_only: bool = False,
    ) -> None:
        """Update the tables, count what was skipped, and tick the clock; or only raise what is wrong."""

    def held(self, tables: Sequence[Tensor], *, write: bool) -> AbstractContextManager[Any]:
        """Return a context in which calls of other threads leave the tables alone."""

    def begin_epoch(self, at: Counters) -> None:
        """Let an epoch begin with the next step."""

    def no_epoch(self, epoch_start: Tensor) -> bool:
        """Return whether no epoch has begun; without waiting, so a device only says that it may be."""

    def check(self, native: Any, rows: Sequence[int]) -> None:
        """Raise what was found and not raised yet."""


class Backend(Protocol):
    """Applies policies to arrays in one kind of memory. Bad values raise before anything is written."""

    torch_type: str  # of torch.device
    dlpack_types: tuple[int, ...]

    def unavailable(self) -> str | None:
        """Return why no kernel can run here, or None if one can."""

    def number(self, array: Any) -> int:
        """Return the number of the device that an array is on."""

    def kernels(self, device: Any, *, sync: bool) -> Kernels:
        """Return the kernels for tables on a device. sync: each call waits and raises what it found."""

    def apply(
        self,
        steps: Sequence[RowStep],
        *,
        step: int,
        epoch_start: int,
        on_nonfinite: str,
        check_step: bool,
        check_only: bool,
    ) -> int:
        """Update some tables on one device in turn; return the number of rows skipped as non-finite."""

    def read(
        self,
        update: RowUpdate,
        out: Any,
        weight: Any,
        indices: Any,
        prev_iter: Any,
        *,
        step: int,
        lr: float,
        epoch_start: int,
    ) -> None:
        """Write rows as a read-charged forward before ``step`` sees them."""
