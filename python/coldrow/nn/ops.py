"""The operators that ``torch.compile`` and ``torch.export`` see, in ``torch.ops.coldrow``::

    lookup(anchor, weights, memory, lrs, clock, epoch_start, nonfinite, grad_scale, indices, offsets,
           per_sample_weights, batch_sizes, train, spec) -> Tensor
    update_(weights!, memory!, clock!, nonfinite!, lrs, epoch_start, grad_scale, indices, offsets,
            per_sample_weights, batch_sizes, grad, spec)
    weight_gradients(weights, memory, lrs, clock, epoch_start, indices, offsets, batch_sizes, grad, spec)
    apply_(weight!, grad, indices, prev_iter!, state!, step, lr, epoch_start, spec)

They are what :class:`coldrow.nn.TableBatchedEmbeddingBags` and :func:`coldrow.apply_` turn into while they
are traced; eager calls take a shorter way to the same kernels. ``spec`` is text that says all that is not a
tensor: tables, features, policies and options. Clock, epoch start (int64) and learning rates (float64) are
0-dim tensors read when the kernel runs, so that changing them compiles nothing anew. ``memory`` is optimizer
state as ``coldrow.nn.table.State`` keeps it: int32 records. The backward of ``lookup`` calls
``update_`` where ``train`` is set, and ticks the clock. On a CUDA device what is wrong with values is
reported to the module whose spec it is (``check()``), and raised at once where there is no such module.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from coldrow._steps import apply_now, bump_versions
from coldrow.nn.kernels import (
    Batch,
    Counters,
    DeviceBatch,
    Kernels,
    Operands,
    Origin,
    kernels_of,
    kernels_on,
    native_tables,
)
from coldrow.nn.table import State
from coldrow.policies import RowUpdate

_F = TypeVar("_F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from coldrow.nn.module import TableBatchedEmbeddingBags


def spec_of(module: TableBatchedEmbeddingBags) -> str:
    """Return what an operator needs to know of a module besides its tensors."""
    return json.dumps(
        {
            "tables": [
                {"name": t.name, "dim": t.dim, "update": u.to_dict()}
                for t, u in zip(module.tables, module._updates, strict=True)
            ],
            "origins": module._origins,
            "features": module._feature_tables,
            "groups": module._group_of,
            "pooling": module.pooling,
            "read": module.charge == "read",
            "on_nonfinite": module.on_nonfinite,
            "layout": module.state_layout,
            "output": str(module.output_dtype).removeprefix("torch."),
            "kernels": module._kernels.token,
        }
    )


class _Plan:
    """A spec, made ready to run on one device."""

    def __init__(self, spec: str, device: torch.device) -> None:
        values = json.loads(spec)
        tables = values["tables"]
        origins = [Origin(*o) for o in values["origins"]] or [Origin(t["name"]) for t in tables]
        self._token, self._device = values["kernels"], device
        self._own: Kernels | None = None
        kernels = self.kernels
        self.updates = [RowUpdate.from_dict(t["update"]) for t in tables]
        self._compiled = [kernels.update_of(u) for u in self.updates]
        self._native = native_tables(kernels, origins, values["features"])
        self.dims = [tables[t]["dim"] for t in values["features"]]
        self.pooling: str = values["pooling"]
        self.read: bool = values["read"]
        self.on_nonfinite: str = values["on_nonfinite"]
        self.layout: str = values["layout"]
        self.output: torch.dtype = getattr(torch, values["output"])
        self.groups: list[int] = values["groups"]

    @property
    def kernels(self) -> Kernels:
        """The kernels of the module that the spec is of; where it is gone, ones that wait and raise."""
        found = kernels_of(self._token)
        if found is not None:
            return found
        if self._own is None:
            self._own = kernels_on(self._device, sync=True)
        return self._own

    def operands(
        self, weights: Sequence[Tensor], memory: Sequence[Tensor], *, with_state: bool
    ) -> Operands:
        prev_iters, states, rest = [], [], list(memory)
        if with_state:
            for weight, update in zip(weights, self.updates, strict=True):
                shapes = update.state_shapes(weight.shape[0], weight.shape[1])
                views = State.over(shapes, self.layout, rest).views()
                prev_iters.append(views.pop("prev_iter"))
                states.append(list(views.values()))
        return Operands(
            self._native, weights, states, prev_iters, self._compiled, self.pooling, self.read
        )

    def batch(
        self,
        sizes: Sequence[int] | None,
        clock: Tensor,
        epoch_start: Tensor,
        lrs: Sequence[Tensor],
    ) -> Batch | DeviceBatch:
        # (nonfinite and grad_scale play no part in a lookup.)
        at = Counters(clock, epoch_start, clock, clock, lrs, self.groups)
        return self.kernels.batch(None if sizes is None else tuple(sizes), at, read=self.read)

    def shape(
        self, indices: Tensor, offsets: Tensor, batch_sizes: Sequence[int] | None
    ) -> tuple[Any, ...]:
        return _shape(self.pooling, self.dims, indices, offsets, batch_sizes)


def _shape(
    pooling: str,
    dims: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    batch_sizes: Sequence[int] | None,
) -> tuple[Any, ...]:
    if pooling == "none":
        return (indices.shape[0] * dims[0],)
    if batch_sizes is not None:
        return (sum(b * d for b, d in zip(batch_sizes, dims, strict=True)),)
    return ((offsets.shape[0] - 1) // len(dims), sum(dims))


_plan = functools.lru_cache(maxsize=256)(_Plan)
_register_fake: Callable[[str], Callable[[_F], _F]] = torch.library.register_fake

torch.library.define(
    "coldrow::lookup",
    "(Tensor anchor, Tensor[] weights, Tensor[] memory, Tensor[] lrs, Tensor clock, "
    "Tensor epoch_start, Tensor nonfinite, Tensor grad_scale, Tensor indices, Tensor offsets, "
    "Tensor? per_sample_weights, SymInt[]? batch_sizes, bool train, str spec) -> Tensor",
)
torch.library.define(
    "coldrow::update_",
    "(Tensor(a!)[] weights, Tensor(b!)[] memory, Tensor(c!) clock, Tensor(d!) nonfinite, "
    "Tensor[] lrs, Tensor epoch_start, Tensor grad_scale, Tensor indices, Tensor offsets, "
    "Tensor? per_sample_weights, SymInt[]? batch_sizes, Tensor grad, str spec) -> ()",
)
torch.library.define(
    "coldrow::weight_gradients",
    "(Tensor[] weights, Tensor[] memory, Tensor[] lrs, Tensor clock, Tensor epoch_start, "
    "Tensor indices, Tensor offsets, SymInt[]? batch_sizes, Tensor grad, str spec) -> Tensor",
)
torch.library.define(
    "coldrow::apply_",
    "(Tensor(a!) weight, Tensor grad, Tensor indices, Tensor(b!) prev_iter, Tensor(c!)[] state, "
    "Tensor step, Tensor lr, Tensor epoch_start, str spec) -> ()",
)


@torch.library.impl("coldrow::lookup", ("cpu", "cuda"))
def _lookup(
    anchor: Tensor,
    weights: Sequence[Tensor],
    memory: Sequence[Tensor],
    lrs: Sequence[Tensor],
    clock: Tensor,
    epoch_start: Tensor,
    nonfinite: Tensor,
    grad_scale: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    batch_sizes: Sequence[int] | None,
    train: bool,
    spec: str,
) -> Tensor:
    plan = _plan(spec, weights[0].device)
    out = weights[0].new_empty(plan.shape(indices, offsets, batch_sizes), dtype=plan.output)
    plan.kernels.lookup(
        plan.operands(weights, memory, with_state=plan.read),
        plan.batch(batch_sizes, clock, epoch_start, lrs),
        indices,
        offsets,
        None if per_sample_weights is None else per_sample_weights.detach(),
        out,
    )
    return out


@_register_fake("coldrow::lookup")
def _lookup_fake(
    anchor: Tensor,
    weights: Sequence[Tensor],
    memory: Sequence[Tensor],
    lrs: Sequence[Tensor],
    clock: Tensor,
    epoch_start: Tensor,
    nonfinite: Tensor,
    grad_scale: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    batch_sizes: Sequence[int] | None,
    train: bool,
    spec: str,
) -> Tensor:
    values = json.loads(spec)
    dims = [values["tables"][t]["dim"] for t in values["features"]]
    shape = _shape(values["pooling"], dims, indices, offsets, batch_sizes)
    return weights[0].new_empty(shape, dtype=getattr(torch, values["output"]))


@torch.library.impl("coldrow::update_", ("cpu", "cuda"))
def _update(
    weights: Sequence[Tensor],
    memory: Sequence[Tensor],
    clock: Tensor,
    nonfinite: Tensor,
    lrs: Sequence[Tensor],
    epoch_start: Tensor,
    grad_scale: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    batch_sizes: Sequence[int] | None,
    grad: Tensor,
    spec: str,
) -> None:
    plan = _plan(spec, weights[0].device)
    plan.kernels.update(
        plan.operands(weights, memory, with_state=True),
        Counters(clock, epoch_start, nonfinite, grad_scale, lrs, plan.groups),
        batch_sizes,
        indices,
        offsets,
        per_sample_weights,
        grad.contiguous(),
        plan.on_nonfinite,
    )
    bump_versions(*weights, *memory, clock, nonfinite)


@_register_fake("coldrow::update_")
def _update_fake(*args: Any) -> None:
    return None


@torch.library.impl("coldrow::weight_gradients", ("cpu", "cuda"))
def _weight_gradients(
    weights: Sequence[Tensor],
    memory: Sequence[Tensor],
    lrs: Sequence[Tensor],
    clock: Tensor,
    epoch_start: Tensor,
    indices: Tensor,
    offsets: Tensor,
    batch_sizes: Sequence[int] | None,
    grad: Tensor,
    spec: str,
) -> Tensor:
    plan = _plan(spec, weights[0].device)
    out = weights[0].new_empty(indices.shape[0], dtype=torch.float32)
    plan.kernels.weight_gradients(
        plan.operands(weights, memory, with_state=plan.read),
        plan.batch(batch_sizes, clock, epoch_start, lrs),
        indices,
        offsets,
        grad.contiguous(),
        out,
    )
    return out


@_register_fake("coldrow::weight_gradients")
def _weight_gradients_fake(
    weights: Sequence[Tensor],
    memory: Sequence[Tensor],
    lrs: Sequence[Tensor],
    clock: Tensor,
    epoch_start: Tensor,
    indices: Tensor,
    offsets: Tensor,
    batch_sizes: Sequence[int] | None,
    grad: Tensor,
    spec: str,
) -> Tensor:
    return indices.new_empty(indices.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (_, weights, memory, lrs, *scalars, indices, offsets, sample_weights, sizes, train, spec) = (
        inputs
    )
    ctx.counts = len(weights), len(memory), len(lrs)
    ctx.sizes, ctx.train, ctx.spec = sizes, train, spec
    ctx.save_for_backward(*weights, *memory, *lrs, *scalars, indices, offsets, sample_weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    groups = []
    for count in ctx.counts:
        groups.append(saved[:count])
        saved = saved[count:]
    weights, memory, lrs = groups
    clock, epoch_start, nonfinite, grad_scale, indices, offsets, sample_weights = saved
    weights_grad = None
    if ctx.needs_input_grad[10]:
        weights_grad = torch.ops.coldrow.weight_gradients(
            weights, memory, lrs, clock, epoch_start, indices, offsets, ctx.sizes, grad, ctx.spec
        )
    if ctx.train:
        torch.ops.coldrow.update_(
            weights,
            memory,
            clock,
            nonfinite,
            lrs,
            epoch_start,
            grad_scale,
            indices,
            offsets,
            sample_weights,
            ctx.sizes,
            grad,
            ctx.spec,
        )
    none_of = [[None] * count for count in ctx.counts]
    return (None, *none_of, *[None] * 6, weights_grad, None, None, None)


torch.library.register_autograd("coldrow::lookup", _backward, setup_context=_setup_context)


@torch.library.impl("coldrow::apply_", ("cpu", "cuda"))
def _apply(
    weight: Tensor,
    grad: Tensor,
    indices: Tensor,
    prev_iter: Tensor,
    state: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    epoch_start: Tensor,
    spec: str,
) -> None:
    options = json.loads(spec)
    update = RowUpdate.from_dict(options.pop("update"))
    names = update.state_names
    with torch.no_grad():
        apply_now(
            update,
            weight,
            grad,
            indices,
            dict(zip(names, (prev_iter, *state), strict=True)),
            step=int(step),
            lr=float(lr),
            epoch_start=int(epoch_start),
            **options,
        )


@_register_fake("coldrow::apply_")
def _apply_fake(*args: Any) -> None:
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _apply_spec(update: RowUpdate, *options: Any) -> str:
    names = ("on_nonfinite", "table", "row_offset", "col_offset")
    return json.dumps({"update": update.to_dict(), **dict(zip(names, options, strict=True))})


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _optimizer_state(update: RowUpdate) -> tuple[str, ...]:
    return update.state_names[1:]


def traced_apply(
    update: RowUpdate,
    weight: Tensor,
    grad: Tensor,
    indices: Tensor,
    state: Mapping[str, Any],
    *,
    step: Any,
    lr: Any,
    epoch_start: Any,
    on_nonfinite: str,
    table: int | str,
    row_offset: int,
    col_offset: int,
) -> None:
    """Call ``torch.ops.coldrow.apply_`` with what :func:`coldrow.apply_` was given."""
    torch.ops.coldrow.apply_(
        weight,
        grad,
        indices,
        state["prev_iter"],
        [state[n] for n in _optimizer_state(update)],
        torch.as_tensor(step, dtype=torch.int64),
        torch.as_tensor(update.optimizer.lr if lr is None else lr, dtype=torch.float64),
        torch.as_tensor(0 if epoch_start is None else epoch_start, dtype=torch.int64),
        _apply_spec(update, on_nonfinite, table, row_offset, col_offset),
    )
