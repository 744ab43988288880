"""A module's tables as a ``torch.optim.Optimizer``: for LR schedulers, training loops and checkpoints."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from coldrow._checks import LAST_STEP, integer, number, require_state_dict
from coldrow.nn.table_batch import TableBatch


class TrainsTables(Protocol):
    """A module whose tables are trained by its own backward, or by its ``step()``."""

    @property
    def fused(self) -> bool:
        """Whether the backward trains them."""

    @property
    def table_batch(self) -> TableBatch:
        """The tables."""

    @property
    def param_groups(self) -> list[Any]:
        """Learning rates."""

    def step(self) -> None:
        """Apply waiting gradients."""

    def set_clock(self, step: int, epoch_start: int | None = None) -> None:
        """Set the clock."""

    def attach(self, optimizer: Any) -> None:
        """Let an optimizer follow what becomes of the tables."""


class TablesOptimizer(torch.optim.Optimizer):
    """The param groups and state of a module in the shape that torch's tools ask for.

    ``state[table]`` are the live state arrays, and ``state_dict()`` has clock and epoch start in each group
    beside ``lr``, so torch.distributed.checkpoint's ``get_optimizer_state_dict`` and
    ``set_optimizer_state_dict`` make a round trip. A copy of a model that holds it belongs to the copy.
    """

    def __init__(self, module: TrainsTables) -> None:
        self._refers_to = weakref.ref(module)
        super().__init__([{"params": g["params"]} for g in module.param_groups], {})
        self.param_groups = module.param_groups
        self.follow(module.table_batch)
        module.attach(self)

    @property
    def _module(self) -> TrainsTables:
        module = self._refers_to()
        if module is None:
            raise RuntimeError("the module whose optimizer this is no longer exists")
        return module

    def follow(self, tables: TableBatch) -> None:
        """Show the state arrays of these tables."""
        self.state.clear()
        on = tables.operands
        for table, weight, prev_iter, arrays in zip(
            tables.layout.tables, tables.weights, on.prev_iters, on.states, strict=True
        ):
            names = table.update.state_names
            self.state[weight] = dict(zip(names, (prev_iter, *arrays), strict=True))

    def mark_stepped(self) -> None:
        """Let schedulers see that a step was done: they warn where none was."""
        self._opt_called = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups beside those of the module."""
        if len(self.param_groups) == len(self._module.param_groups):
            raise ValueError("param_groups: accepted: the module's own, one per distinct update")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the step of the module where its backward did not update the tables already.

        Args:
            closure: called first, with gradients on; its result is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._module.fused:
            self._module.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return live state by table, and the groups with lr, clock and epoch start as numbers."""
        saved = super().state_dict()
        at = self._module.table_batch.counters
        for group in saved["param_groups"]:
            group["lr"] = float(group["lr"])
            group["clock"], group["epoch_start"] = int(at.clock), int(at.epoch_start)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, all or nothing.

        A table whose state is not in it keeps its own (the state_dict of the module has it too).

        Raises:
            ValueError: groups, tables or state that do not fit.
        """
        require_state_dict(state_dict)
        groups = state_dict["param_groups"]
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                f"param_groups: got tables {[g['params'] for g in groups]}, accepted: groups of "
                f"{[len(g['params']) for g in self.param_groups]} tables"
            )
        at = self._module.table_batch.counters
        clock, epoch_start = int(at.clock), int(at.epoch_start)
        for group in groups:
            number("lr", group["lr"])
            clock = integer("clock", group.get("clock", clock), 0, LAST_STEP)
            epoch_start = integer(
                "epoch_start", group.get("epoch_start", epoch_start), 0, LAST_STEP
            )
        copies = []
        for group, own in zip(groups, self.param_groups, strict=True):
            for key, table in zip(group["params"], own["params"], strict=True):
                given = state_dict.get("state", {}).get(key, self.state[table])
                copies += _copies(given, self.state[table], clock)
        for target, value in copies:
            target.copy_(value)
        for group, saved in zip(self.param_groups, groups, strict=True):
            kept = ("params", "clock", "epoch_start")
            group.update({k: v for k, v in saved.items() if k not in kept})
        self._module.set_clock(clock, epoch_start)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]


def _copies(
    given: dict[str, Any], own: dict[str, Tensor], clock: int
) -> list[tuple[Tensor, Tensor]]:
    """Return what to copy where, or raise for state that does not fit a table."""
    if set(given) != set(own):
        raise ValueError(f"state: got {sorted(given)}, accepted: {sorted(own)}")
    for name, target in own.items():
        value = given[name]
        if not isinstance(value, Tensor) or value.shape != target.shape:
            got = list(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state {name}: got {got}, accepted: {list(target.shape)}")
    low, high = int(given["prev_iter"].min()), int(given["prev_iter"].max())
    if low < 0 or high > clock:
        raise ValueError(f"prev_iter: got {low} to {high}, accepted: 0 to the clock, {clock}")
    return [(own[name], given[name]) for name in own]
