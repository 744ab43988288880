"""The backend for CUDA devices: torch tensors and CuPy arrays.

What is wrong with values is found on the device. Calls on arrays wait for it; the kernels of modules report
it, and it is raised where they are checked.
"""

from __future__ import annotations

import functools
import importlib
import sys
import uuid
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from coldrow._backends.protocol import (
    Counters,
    DeviceMoment,
    Kernels,
    Operands,
    RowStep,
)
from coldrow._checks import torch_of
from coldrow.policies import RowUpdate, native_arguments

if TYPE_CHECKING:
    from torch import Tensor


class Cuda:
    """CUDA devices; see ``protocol.Backend``. What is wrong with values is found there, so calls wait."""

    torch_type = "cuda"
    dlpack_types: tuple[int, ...] = (2, 13)  # CUDA's memory, managed memory
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

    def kernels(self, device: Any, *, sync: bool) -> Kernels:
        """Return the kernels for tables on a device. sync: each call waits and raises what it found."""
        return CudaKernels(self, device, sync)

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


class CudaKernels:
    """Kernels for tables on one CUDA device; see ``protocol.Kernels``.

    Args:
        backend: the backend for CUDA devices.
        device: where the tables are.
        sync: wait after each call and raise what it found.
    """

    def __init__(self, backend: Cuda, device: Any, sync: bool) -> None:
        self._backend, self._sync = backend, sync or backend.always_sync
        torch = sys.modules["torch"]
        self._report = torch.zeros(backend.native.report_size, dtype=torch.int64, device=device)
        self.device = self._report.device
        self._number = backend.number(self._report)
        self._allocate = backend.allocator(self._report)
        # What an operator traced by torch.compile is told, so that it reports to the module.
        self.token: str | None = uuid.uuid4().hex
        _known[str(self.token)] = self

    def _place(self) -> tuple[Any, int, Any]:
        return self._report, self._backend.stream(self._report), self._allocate

    def tables(self, *layout: Any) -> Any:
        """Return the native form of some tables and features."""
        return self._backend.native.TableBatch(*map(list, layout))

    def update_of(self, update: RowUpdate) -> Any:
        """Return the native form of an update."""
        return self._backend.update(update, self._number)

    def moment(
        self, sizes: tuple[int, ...] | None, at: Counters, *, read: bool, keep: bool = False
    ) -> DeviceMoment:
        """Return where a lookup finds what it needs to know. keep: as it is now, for later.

        (The kernels look when they need it, so ``read`` changes nothing.)
        """
        if not keep:
            return DeviceMoment(sizes, at.clock, at.epoch_start, at.lrs_by_table())
        kept = at.lr.clone().unbind()
        by_table = tuple([kept[g] for g in at.groups])
        return DeviceMoment(sizes, at.clock.clone(), at.epoch_start.clone(), by_table)

    def lookup(
        self,
        on: Operands,
        moment: Any,
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
            moment.lrs,
            indices,
            offsets,
            weights,
            moment.batch_sizes,
            on.pooling,
            on.read,
            moment.clock,
            moment.epoch_start,
            out,
            *self._place(),
        )
        self._after(on)

    def weight_gradients(
        self,
        on: Operands,
        moment: Any,
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
            moment.lrs,
            indices,
            offsets,
            moment.batch_sizes,
            on.pooling,
            on.read,
            moment.clock,
            moment.epoch_start,
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
        *,
        check_only: bool = False,
    ) -> None:
        """Update the tables, count what was skipped, and tick the clock; all on the device."""
        if check_only:
            raise NotImplementedError("check_only: accepted: False on a CUDA device")
        on.native.update(
            on.weights,
            on.states,
            on.prev_iters,
            on.updates,
            at.lrs_by_table(),
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
        at.epoch_start.copy_(at.clock).add_(1)

    def no_epoch(self, epoch_start: Tensor) -> bool:
        """Return whether no epoch has begun; without waiting, so a device only says that it may be."""
        return True

    def _after(self, on: Operands) -> None:
        if self._sync:
            self.check(on.native, [len(w) for w in on.weights])

    def check(self, native: Any, rows: Sequence[int]) -> None:
        """Wait, and raise what the kernels found since the last check."""
        native.check(self._report, rows, self._backend.stream(self._report))


_known: weakref.WeakValueDictionary[str, CudaKernels] = weakref.WeakValueDictionary()


def kernels_of(token: str | None) -> CudaKernels | None:
    """Return the kernels that have this token, while their module lives."""
    return None if token is None else _known.get(token)


def built() -> Cuda | None:
    """Return the backend, or None where this build has none."""
    try:
        return Cuda(importlib.import_module("coldrow._cuda"))
    except ModuleNotFoundError:
        return None
