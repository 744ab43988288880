"""What users ask of a module's counters: clock, epoch, learning rate, scale, rows skipped."""

from __future__ import annotations

from torch import Tensor, nn

from coldrow._checks import LAST_STEP, integer, number
from coldrow.nn.table_batch import TableBatch


class Clocked(nn.Module):
    """A module whose ``table_batch`` has counters. They are tensors; here they are numbers."""

    #: Whether somebody has declared an epoch, or loaded one.
    epoch_declared = False

    @property
    def table_batch(self) -> TableBatch:
        """What the kernels work on."""
        raise NotImplementedError

    @property
    def clock(self) -> int:
        """Optimizer steps done so far. Assignable to any value from there on, up to 2**31 - 1."""
        return int(self.table_batch.counters.clock)

    @clock.setter
    def clock(self, value: int) -> None:
        self.table_batch.counters.clock.fill_(integer("clock", value, self.clock, LAST_STEP))

    @property
    def epoch_start(self) -> int:
        """The first step of the running epoch, 0 before the first :meth:`new_epoch`."""
        return int(self.table_batch.counters.epoch_start)

    def new_epoch(self) -> None:
        """Declare that the next step begins an epoch (for EpochGated and EpochReset)."""
        tables = self.table_batch
        tables.kernels.begin_epoch(tables.counters)
        self.epoch_declared = True

    def follow_clock(self, clock: Tensor, epoch_start: Tensor) -> None:
        """Take over clock and epoch start, 0-dim int64, from whoever owns them."""
        self.table_batch.counters.clock.copy_(clock)
        self.table_batch.counters.epoch_start.copy_(epoch_start)

    def set_clock(self, step: int, epoch_start: int | None = None) -> None:
        """Set the clock, also back, though not to before the last touch of a row.

        Args:
            step: steps done, 0 to 2**31 - 1.
            epoch_start: the first step of the running epoch; default: as it is.
        """
        step = integer("step", step, 0, LAST_STEP)
        at = self.table_batch.counters
        if step < self.clock:
            latest = max(int(p.max()) for p in self.table_batch.operands.prev_iters)
            if step < latest:
                raise ValueError(
                    f"step: got {step}, accepted: from the last step that touched a row, {latest}"
                )
        if epoch_start is not None:
            at.epoch_start.fill_(integer("epoch_start", epoch_start, 0, LAST_STEP))
        at.clock.fill_(step)

    @property
    def nonfinite_rows(self) -> int:
        """Rows skipped so far as non-finite. Assignable."""
        return int(self.table_batch.counters.nonfinite)

    @nonfinite_rows.setter
    def nonfinite_rows(self, value: int) -> None:
        self.table_batch.counters.nonfinite.fill_(integer("nonfinite_rows", value, 0, 2**63 - 1))

    @property
    def grad_scale(self) -> float:
        """What fused gradients are divided by (in float32): set it where the loss is scaled."""
        return float(self.table_batch.counters.grad_scale)

    @grad_scale.setter
    def grad_scale(self, value: float) -> None:
        self.table_batch.counters.grad_scale.fill_(number("grad_scale", value, low_open=True))

    @property
    def lr(self) -> float:
        """Learning rate of the next step (of the first group); assigning sets it for all tables."""
        return float(self.table_batch.counters.lr[0])

    @lr.setter
    def lr(self, value: float) -> None:
        self.table_batch.counters.lr.fill_(number("lr", value))
