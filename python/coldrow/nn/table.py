"""What a table is made of: its description, its parameter and its optimizer state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coldrow import _core
from coldrow._checks import MAX_DIM, MAX_ELEMENTS, integer, listed, one_of
from coldrow.policies import RowUpdate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Init = Callable[[Tensor], Any]


@dataclass
class Table:
    """One embedding table.

    Args:
        name: unique, without dots; names the table in ``state_dict`` and in stochastic rounding.
        num_rows: E >= 1.
        dim: D >= 1.
        dtype: torch.float32, torch.float16 or torch.bfloat16.
        features: names of the features looked up in it; default: one, named as the table.
        init: called on the ``[rows, dim]`` tensor to fill it; default uniform in +-1/sqrt(dim).
        update: overrides the module's update for this table.
    """

    name: str
    num_rows: int
    dim: int
    dtype: torch.dtype = torch.float32
    features: list[str] | None = None
    init: Init | None = None
    update: RowUpdate | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"name: got {self.name!r}, accepted: a non-empty string without dots")
        self.dim = integer("dim", self.dim, 1, MAX_DIM)
        self.num_rows = integer("num_rows", self.num_rows, 1, MAX_ELEMENTS // self.dim)
        one_of("dtype", self.dtype, DTYPES)
        if isinstance(self.features, str):
            raise TypeError(f"features: got {self.features!r}, accepted: a list of names")
        if self.features is not None:
            self.features = listed("features", self.features, "a list of names")
        self.features = self.features or [self.name]
        if self.init is not None and not callable(self.init):
            raise TypeError(f"init: got {self.init!r}, accepted: a callable on a tensor")
        if self.update is not None and not isinstance(self.update, RowUpdate):
            raise TypeError(f"update: got {self.update!r}, accepted: a coldrow.RowUpdate")

    def fill(self, weight: Tensor) -> None:
        """Initialise ``weight`` (some rows of this table, ``[n, dim]``) in place."""
        with torch.no_grad():
            if self.init is None:
                bound = 1.0 / math.sqrt(self.dim)
                weight.uniform_(-bound, bound)
            else:
                self.init(weight)


def table_memory(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """Return uninitialised memory for a table or its state, in 2 MiB pages where the system grants them.

    Rows lie far apart: on small pages every touch of a row also walks the page table.
    """
    memory = torch.empty(shape, dtype=dtype, device=device)
    if type(memory) is Tensor and memory.device.type == "cpu":  # (a fake one has no memory)
        _core.advise_huge_pages(memory)
    return memory


class Weights(nn.Module):
    """Parameters by table name. (nn.ParameterDict refuses names such as "items" or "type".)"""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters.update(parameters)

    def __getitem__(self, name: str) -> nn.Parameter:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def keys(self) -> Iterator[str]:
        """Table names."""
        return iter(self)

    def values(self) -> Iterator[nn.Parameter]:
        """Tables."""
        return (self[name] for name in self)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and tables."""
        return ((name, self[name]) for name in self)


class State:
    """Optimizer state of one table, kept as int32 memory that no dtype conversion touches.

    What a row has one value of lies, with layout "record", in one ``[rows, n]`` array, so that prev_iter
    and momentum1 of a row share a cache line; with "split" in one array each. Element-wise state is
    ``[rows, dim]`` each.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layout: str) -> None:
        self.names = tuple(shapes)  # prev_iter first, then as the kernels take them
        self._by_row = [name for name, shape in shapes.items() if len(shape) == 1]
        self._by_element = [name for name, shape in shapes.items() if len(shape) == 2]
        self._record = layout == "record"
        self._shapes = [shapes[name] for name in (*self._by_row, *self._by_element)]
        if self._record:
            rows = shapes["prev_iter"][0]
            self._shapes[: len(self._by_row)] = [(rows, len(self._by_row))]
        self.memory: list[Tensor] = []

    @classmethod
    def zeros(
        cls, shapes: Mapping[str, tuple[int, ...]], layout: str, device: torch.device
    ) -> State:
        """Return the state of a table never trained."""
        state = cls(shapes, layout)
        state.memory = [table_memory(shape, torch.int32, device).zero_() for shape in state._shapes]
        return state

    @classmethod
    def over(
        cls, shapes: Mapping[str, tuple[int, ...]], layout: str, memory: list[Tensor]
    ) -> State:
        """Return the state that lies in the first of ``memory``, which are taken off the list."""
        state = cls(shapes, layout)
        count = len(state._shapes)
        state.memory, memory[:count] = memory[:count], []
        return state

    def views(self) -> dict[str, Tensor]:
        """Live views by name: prev_iter int32, the others float32."""
        by_row, rest = self.memory[: len(self._by_row)], self.memory[len(self._by_row) :]
        if self._record:
            by_row, rest = list(self.memory[0].unbind(1)), self.memory[1:]
        named = dict(zip((*self._by_row, *self._by_element), (*by_row, *rest), strict=True))
        return {
            name: named[name] if name == "prev_iter" else named[name].view(torch.float32)
            for name in self.names
        }

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow a module conversion that moves memory; refuse to be converted by one that casts."""
        self.memory = [moved(m, fn) for m in self.memory]


def in_table_memory(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn``, with what it makes in the processor's memory laid where tables lie."""

    def converted(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        here = type(new) is Tensor and new.device.type == tensor.device.type == "cpu"
        if not here or new.data_ptr() == tensor.data_ptr():  # (from a device it may be on its way)
            return new
        return table_memory(tuple(new.shape), new.dtype, new.device).copy_(new)

    return converted


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a module conversion makes of a tensor that must keep its dtype."""
    new = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)
