"""The backend for the memory of the processor."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from coldrow import _core
from coldrow._backends.protocol import Counters, Kernels, Moment, Operands, RowStep
from coldrow._checks import number
from coldrow.policies import RowUpdate, compiled

if TYPE_CHECKING:
    from torch import Tensor


class HostKernels:
    """Kernels for tables in the memory of the processor; see ``protocol.Kernels``."""

    token: str | None = None

    def __init__(self, device: Any) -> None:
        self.device = device

    def tables(self, *layout: Any) -> Any:
        """Return the native form of some tables and features."""
        return _core.TableBatch(*map(list, layout))

    def update_of(self, update: RowUpdate) -> Any:
        """Return the native form of an update."""
        return compiled(update)

    def moment(
        self, sizes: tuple[int, ...] | None, at: Counters, *, read: bool, keep: bool = False
    ) -> Moment:
        """Return what a lookup needs to know of the moment: nothing, unless it charges (``read``)."""
        if not read:
            return Moment(sizes)
        clock, epoch_start = int(at.clock.item()), int(at.epoch_start.item())
        return Moment(sizes, clock + 1, epoch_start, at.lr_values())

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
        on.native.lookup(
            on.weights,
            on.prev_iters,
            on.updates,
            moment.lrs,
            indices,
            offsets,
            weights,
            moment.batch_sizes,
            on.pooling,
            on.read,
            moment.step,
            moment.epoch_start,
            out,
        )

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
        on.native.weight_gradients(
            on.weights,
            on.prev_iters,
            on.updates,
            moment.lrs,
            indices,
            offsets,
            moment.batch_sizes,
            on.pooling,
            on.read,
            moment.step,
            moment.epoch_start,
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
        *,
        check_only: bool = False,
    ) -> None:
        """Update the tables, count what was skipped, and tick the clock; or only raise what is wrong."""
        if at.grad_scale.item() != 1.0:
            grad = grad.float() / number("grad_scale", at.grad_scale, low_open=True)
        on.native.update(
            on.weights,
            on.states,
            on.prev_iters,
            on.updates,
            at.lr_values(),
            indices,
            offsets,
            weights,
            sizes,
            on.pooling,
            at.next_step(),
            at.epoch_start.item(),
            grad,
            on_nonfinite,
            check_only,
            at.clock,
            at.nonfinite,
        )

    def held(self, tables: Sequence[Tensor], *, write: bool) -> AbstractContextManager[Any]:
        """Return a context in which calls of other threads leave the tables alone."""
        held: AbstractContextManager[Any] = _core.HeldTables(tables, write)
        return held

    def begin_epoch(self, at: Counters) -> None:
        """Let an epoch begin with the next step."""
        at.epoch_start.fill_(at.next_step())

    def no_epoch(self, epoch_start: Tensor) -> bool:
        """Return whether no epoch has begun."""
        return int(epoch_start) == 0

    def check(self, native: Any, rows: Sequence[int]) -> None:
        """Do nothing: whatever was wrong has been raised."""


class Host:
    """The memory of the processor; see ``protocol.Backend``."""

    torch_type = "cpu"
    dlpack_types: tuple[int, ...] = (1,)

    def unavailable(self) -> str | None:
        """Return None: there is a processor."""
        return None

    def number(self, array: Any) -> int:
        """Return the number of the device that an array is on: there is one."""
        return 0

    def kernels(self, device: Any, *, sync: bool) -> Kernels:
        """Return the kernels for tables in the memory of the processor. (They always wait.)"""
        return HostKernels(device)

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
        """Update some tables in turn; return the number of rows skipped as non-finite."""
        return sum(
            _core.apply(
                compiled(s.update),
                s.weight,
                s.grad,
                s.indices,
                s.state,
                s.prev_iter,
                step,
                s.lr,
                epoch_start,
                on_nonfinite,
                s.key,
                s.row_offset,
                s.col_offset,
                check_step,
                check_only,
            )
            for s in steps
        )

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
        _core.read(compiled(update), out, weight, indices, prev_iter, step, lr, epoch_start)


HOST: Host = Host()
