"""What a table is made of: its description, its parameter and its optimizer state.

:class:`Weights` and :class:`States` are modules, so that every key of a ``state_dict`` is an attribute path
(``emb.state.user.momentum1``), and mappings, so that tables are found by name (``emb.state["user"]``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import dlpack

from coldrow import _core
from coldrow._checks import MAX_DIM, MAX_ELEMENTS, integer, listed, one_of
from coldrow.policies import RowUpdate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Init = Callable[[Tensor], Any]


class Origin(NamedTuple):
    """Where the first row and column of a shard are in the whole table, and the name of that table."""

    name: str
    row: int = 0
    column: int = 0


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
        update: overrides the update of the module for this table.
        storage: memory to use for the rows, ``[num_rows, dim]``, contiguous, as it is; default: memory of
            the module's own, filled by ``init``.
        origin: of a shard: where it begins in the whole table, so that random bits and messages are those
            of the whole table.
    """

    name: str
    num_rows: int
    dim: int
    dtype: torch.dtype = torch.float32
    features: list[str] | None = None
    init: Init | None = None
    update: RowUpdate | None = None
    storage: Tensor | None = None
    origin: Origin | None = None

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
        if self.storage is not None:
            given, shape = self.storage, (self.num_rows, self.dim)
            fits = isinstance(given, Tensor) and tuple(given.shape) == shape
            if not fits or given.dtype != self.dtype or not given.is_contiguous():
                got = (
                    f"{given.dtype} {list(given.shape)}"
                    if isinstance(given, Tensor)
                    else repr(given)
                )
                raise ValueError(
                    f"storage: got {got}, accepted: a contiguous {self.dtype} tensor {list(shape)}"
                )

    def memory(self, device: torch.device) -> Tensor:
        """Return the rows as the table begins, ``[num_rows, dim]``."""
        if self.storage is not None:
            return self.storage.detach()
        weight = table_memory((self.num_rows, self.dim), self.dtype, device)
        self.fill(weight)
        return weight

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


_V = TypeVar("_V")


class _Named(nn.Module, Generic[_V]):
    """A module that is a mapping by name too. (nn.ParameterDict refuses names such as "items" or "type".)"""

    def _members(self) -> Mapping[str, _V]:
        raise NotImplementedError

    def __getitem__(self, name: str) -> _V:
        return self._members()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members())

    def __len__(self) -> int:
        return len(self._members())

    def __contains__(self, name: object) -> bool:
        return name in self._members()

    def keys(self) -> KeysView[str]:
        """Names."""
        return self._members().keys()

    def values(self) -> ValuesView[_V]:
        """What the names stand for."""
        return self._members().values()

    def items(self) -> ItemsView[str, _V]:
        """Names and what they stand for."""
        return self._members().items()

    def get(self, name: str, default: Any = None) -> Any:
        """Return what a name stands for, or ``default``."""
        return self._members().get(name, default)


Mapping.register(_Named)


class Weights(_Named[nn.Parameter]):
    """Parameters by table name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters.update(parameters)

    def _members(self) -> Mapping[str, nn.Parameter]:
        return self._parameters  # type: ignore[return-value]

    def tensors(self) -> list[nn.Parameter]:
        """Return the tables, in order."""
        return list(self._parameters.values())  # type: ignore[arg-type]

    def replace(self, name: str, parameter: nn.Parameter) -> None:
        """Put another Parameter in the place of a table."""
        self._parameters[name] = parameter


class TableState(_Named[Tensor]):
    """Optimizer state of one table: buffers by name, ``prev_iter`` int32 and the others float32.

    What a row has one value of lies, with layout "record", in one int32 array ``[rows, n]``, so that prev_iter
    and momentum1 of a row share a cache line, and the buffers are strided views of it; with "split" in one
    contiguous array each. Element-wise state is ``[rows, dim]`` each. No conversion changes a dtype.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], layout: str, device: torch.device
    ) -> None:
        super().__init__()
        self._names = tuple(shapes)  # prev_iter first, then as the kernels take them
        self._in_record = [name for name in self._names if len(shapes[name]) == 1]
        if layout == "split":
            self._in_record = self._in_record[:1]
        rows = shapes["prev_iter"][0]
        alone = [shapes[name] for name in self._names if name not in self._in_record]
        arrays = [(rows, len(self._in_record)), *alone]
        self._memory = [table_memory(shape, torch.int32, device).zero_() for shape in arrays]
        self._show()

    def _show(self) -> None:
        """Make the buffers, live views of the memory."""
        record, *rest = self._memory
        columns = dict(zip(self._in_record, record.unbind(1), strict=True))
        others = iter(rest)
        for name in self._names:
            view = columns[name] if name in columns else next(others)
            if name != "prev_iter":
                view = view.view(torch.float32)
                view = _own_storage(view) if name in columns else view
            self._buffers[name] = view

    def _members(self) -> Mapping[str, Tensor]:
        return self._buffers  # type: ignore[return-value]

    def tensors(self) -> list[Tensor]:
        """Return the state in the order of the kernels: prev_iter, then that of the optimizer."""
        return list(self._buffers.values())  # type: ignore[arg-type]

    def num_bytes(self) -> int:
        """Return the bytes that the state takes."""
        return sum(m.numel() * m.element_size() for m in self._memory)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._memory = [moved(m, fn) for m in self._memory]
        self._show()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Do nothing: the module whose state this is loads it, after it has looked at everything."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show()


class States(_Named[TableState]):
    """Optimizer state of all tables, by table name."""

    def __init__(self, states: Mapping[str, TableState]) -> None:
        super().__init__()
        self._modules.update(states)

    def _members(self) -> Mapping[str, TableState]:
        return self._modules  # type: ignore[return-value]

    def tensors(self) -> list[Tensor]:
        """Return the state of all tables: of each prev_iter, then that of the optimizer."""
        return [tensor for state in self._modules.values() for tensor in state.tensors()]  # type: ignore


def _own_storage(view: Tensor) -> Tensor:
    """Return a tensor over the same memory with a storage of its own, which begins where the view does.

    torch.save refuses two dtypes over one storage. (Fake and meta tensors have no memory; memory shared
    between processes is known as such by its storage alone.)
    """
    if type(view) is not Tensor or view.is_meta or view.untyped_storage().is_shared():
        return view
    own: Tensor = dlpack.from_dlpack(dlpack.to_dlpack(view))  # type: ignore[attr-defined]
    return own


def in_table_memory(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn``, with what it makes in the processor's memory laid where tables lie."""

    def converted(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        if new.layout != torch.strided:  # a sparse gradient
            return new
        here = type(new) is Tensor and new.device.type == tensor.device.type == "cpu"
        if not here or new.data_ptr() == tensor.data_ptr():  # (from a device it may be on its way)
            return new
        return table_memory(tuple(new.shape), new.dtype, new.device).copy_(new)

    return converted


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what a module conversion makes of a tensor that must keep its dtype."""
    new = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)
