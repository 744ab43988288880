"""The kernels that an array's memory belongs to: the processor's or a CUDA device's.

Nothing here imports torch. An engine applies policies to arrays; :mod:`coldrow.nn.kernels` has what modules
ask for besides.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from coldrow import _core
from coldrow._checks import torch_of
from coldrow.policies import RowUpdate, compiled, native_arguments


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


class Engine(Protocol):
    """Applies policies to arrays in one kind of memory. Bad values raise before anything is written."""

    def number(self, array: Any) -> int:
        """Return the number of the device that an array is on."""

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


class Host:
    """The processor."""

    def number(self, array: Any) -> int:
        """Return the number of the device that an array is on: there is one."""
        return 0

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


class Device:
    """CUDA devices. What is wrong with values is found there, so these calls wait for them."""

    torch_type = "cuda"
    dlpack_types = (2, 13)  # CUDA's memory, managed memory
    always_sync = False  # modules wait after each call, whatever their ``validate`` says

    def __init__(self, native: Any) -> None:
        self.native = native
        self.update = functools.lru_cache(maxsize=1024)(self._update)

    def _update(self, update: RowUpdate, number: int) -> Any:
        return self.native.DeviceUpdate(self.native.Update(**native_arguments(update)), number)

    def unavailable(self) -> str | None:
        """Return why no kernel can run here, or None if one can."""
        count, error = self.native.devices()
        return None if count > 0 else error or "there is no CUDA device"

    def number(self, array: Any) -> int:
        """Return the number of the device that an array is on."""
        if torch_of(array) is not None:
            return int(array.device.index or 0)
        return int(array.__dlpack_device__()[1])

    def stream(self, array: Any) -> int:
        """Return the current stream of the array's library on the array's device."""
        if (torch := torch_of(array)) is not None:
            return int(torch.cuda.current_stream(array.device).cuda_stream)
        if (cupy := sys.modules.get("cupy")) is None:
            return 0
        with _current(array):
            return int(cupy.cuda.get_current_stream().ptr)

    def allocator(self, array: Any) -> Callable[[int], Any]:
        """Return what gives memory beside the array, from its library's own allocator."""
        if (torch := torch_of(array)) is not None:
            return lambda count: array.new_empty(count, dtype=torch.uint8)
        library = _library_of(array)

        def allocate(count: int) -> Any:
            with _current(array):
                return library.empty_like(array, shape=count, dtype="uint8")

        return allocate

    def report(self, array: Any) -> Any:
        """Return an empty report beside the array."""
        size = self.native.report_size
        if (torch := torch_of(array)) is not None:
            return array.new_zeros(size, dtype=torch.int64)
        with _current(array):
            return _library_of(array).zeros_like(array, shape=size, dtype="int64")

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
        if not steps:
            return 0
        first = steps[0].weight
        report, stream, allocate = self.report(first), self.stream(first), self.allocator(first)
        for s in steps:
            self.native.apply(
                self.update(s.update, self.number(first)),
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
                report,
                stream,
                allocate,
            )
        rows = [s.weight.shape[0] for s in steps]
        return int(self.native.finish(report, rows, step, stream))

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
        report, stream = self.report(weight), self.stream(weight)
        self.native.read(
            self.update(update, self.number(weight)),
            out,
            weight,
            indices,
            prev_iter,
            step,
            lr,
            epoch_start,
            report,
            stream,
            self.allocator(weight),
        )
        self.native.finish(report, [weight.shape[0]], step, stream)


def _current(array: Any) -> AbstractContextManager[Any]:
    """Return a context in which the array's device is its library's current one, where CuPy allocates."""
    device = getattr(array, "device", None)
    return device if isinstance(device, AbstractContextManager) else nullcontext()


def _library_of(array: Any) -> Any:
    library = sys.modules.get(type(array).__module__.partition(".")[0])
    if library is None or not hasattr(library, "empty_like"):
        raise TypeError(
            f"weight: got {type(array).__name__}, accepted on a CUDA device: torch tensors and CuPy "
            "arrays"
        )
    return library


def _built() -> Device | None:
    try:
        return Device(importlib.import_module("coldrow._cuda"))
    except ModuleNotFoundError:
        return None


HOST = Host()

#: The kernels for CUDA devices, None where this build has none. Tests put a stand-in here, which takes the
#: processor's memory for a device's.
device: Device | None = _built()


def device_engine(name: str, given: Any) -> Device:
    """Return the engine for CUDA devices, or raise naming the argument that asks for it."""
    if device is None:
        reason = "this build has no CUDA support, see coldrow.cuda.is_built()"
    elif (why := device.unavailable()) is not None:
        reason = f"no CUDA device can be used: {why}, see coldrow.cuda.is_available()"
    else:
        return device
    raise ValueError(f"{name}: got {given}, accepted: 'cpu' ({reason})")


def engine_of(name: str, array: Any) -> Engine:
    """Return the engine for an array's memory, or raise naming the argument."""
    kind = Device if device is None else device
    if torch_of(array) is not None:
        if array.device.type != kind.torch_type:
            return HOST
        where = str(array.device)
    else:
        # (Only arrays know: the binding says what is wrong with anything else.)
        asked = getattr(array, "__dlpack_device__", None)
        memory, number = asked() if asked is not None else (0, 0)
        if int(memory) not in kind.dlpack_types:
            return HOST
        where = f"cuda:{int(number)}"
    return device_engine(name, f"an array on {where!r}")
