"""The operators that tables become where they are traced (torch.compile, torch.export, ...), in ``torch.ops.coldrow``::

    lookup(anchor, weights, state, lr, clock, epoch_start, nonfinite, grad_scale, indices, offsets,
           per_sample_weights, batch_sizes, train, spec) -> Tensor
    update_(weights!, state!, clock!, nonfinite!, lr, epoch_start, grad_scale, indices, offsets,
            per_sample_weights, batch_sizes, grad, spec)
    weight_gradients(weights, state, lr, clock, epoch_start, indices, offsets, batch_sizes, grad, spec)

:class:`coldrow.nn.TableBatchedEmbeddingBags` calls ``lookup`` while it is traced; eager calls take a shorter way
to the same kernels. Tensors are the module's own parameters and buffers. ``spec`` is text that says all that is
not a tensor (``table_batch.Layout``). Clock, epoch start (int64) and ``lr`` (float64 ``[groups]``) are read when
the kernel runs, so that changing them compiles nothing anew. ``state`` is that of all tables: of each prev_iter,
then that of its optimizer; empty where it is not needed. The backward of ``lookup`` calls ``update_`` where
``train`` is set, and ticks the clock. On a CUDA device what is wrong with values is reported to the module whose
spec it is (``check()``), and raised at once where there is no such module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from coldrow._backends.protocol import Counters
from coldrow._backends.registry import TORCH_TYPES
from coldrow.nn.table_batch import BoundLayout, Layout, TableBatch

_F = TypeVar("_F", bound=Callable[..., Any])
_register_fake: Callable[[str], Callable[[_F], _F]] = torch.library.register_fake

_bound = functools.lru_cache(maxsize=256)(BoundLayout)
_layout = functools.lru_cache(maxsize=256)(Layout.of_spec)


def _tables(
    spec: str,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lr: Tensor,
    clock: Tensor,
    epoch_start: Tensor,
    nonfinite: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> TableBatch:
    """Return the tables of a spec over the tensors of a call. (A lookup counts and scales nothing.)"""
    bound = _bound(spec, weights[0].device)
    scale = clock if grad_scale is None else grad_scale
    count = clock if nonfinite is None else nonfinite
    counters = Counters(clock, epoch_start, count, scale, lr, bound.layout.groups)
    return bound.over(weights, state, counters)


def _sizes(given: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if given is None else tuple(given)


torch.library.define(
    "coldrow::lookup",
    "(Tensor anchor, Tensor[] weights, Tensor[] state, Tensor lr, Tensor clock, "
    "Tensor epoch_start, Tensor nonfinite, Tensor grad_scale, Tensor indices, Tensor offsets, "
    "Tensor? per_sample_weights, SymInt[]? batch_sizes, bool train, str spec) -> Tensor",
)
torch.library.define(
    "coldrow::update_",
    "(Tensor(a!)[] weights, Tensor(b!)[] state, Tensor(c!) clock, Tensor(d!) nonfinite, "
    "Tensor lr, Tensor epoch_start, Tensor grad_scale, Tensor indices, Tensor offsets, "
    "Tensor? per_sample_weights, SymInt[]? batch_sizes, Tensor grad, str spec) -> ()",
)
torch.library.define(
    "coldrow::weight_gradients",
    "(Tensor[] weights, Tensor[] state, Tensor lr, Tensor clock, Tensor epoch_start, "
    "Tensor indices, Tensor offsets, SymInt[]? batch_sizes, Tensor grad, str spec) -> Tensor",
)


@torch.library.impl("coldrow::lookup", TORCH_TYPES)
def _lookup(
    anchor: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lr: Tensor,
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
    tables = _tables(spec, weights, state, lr, clock, epoch_start)
    return tables.lookup(tables.moment(_sizes(batch_sizes)), indices, offsets, per_sample_weights)


@_register_fake("coldrow::lookup")
def _lookup_fake(
    anchor: Tensor,
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lr: Tensor,
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
    layout, _ = _layout(spec)
    shape = layout.output_shape(indices, offsets, batch_sizes)
    return weights[0].new_empty(shape, dtype=layout.output_dtype)


@torch.library.impl("coldrow::update_", TORCH_TYPES)
def _update(
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    clock: Tensor,
    nonfinite: Tensor,
    lr: Tensor,
    epoch_start: Tensor,
    grad_scale: Tensor,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor | None,
    batch_sizes: Sequence[int] | None,
    grad: Tensor,
    spec: str,
) -> None:
    tables = _tables(spec, weights, state, lr, clock, epoch_start, nonfinite, grad_scale)
    tables.update(_sizes(batch_sizes), indices, offsets, per_sample_weights, grad.contiguous())


@_register_fake("coldrow::update_")
def _update_fake(*args: Any) -> None:
    return None


@torch.library.impl("coldrow::weight_gradients", TORCH_TYPES)
def _weight_gradients(
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lr: Tensor,
    clock: Tensor,
    epoch_start: Tensor,
    indices: Tensor,
    offsets: Tensor,
    batch_sizes: Sequence[int] | None,
    grad: Tensor,
    spec: str,
) -> Tensor:
    tables = _tables(spec, weights, state, lr, clock, epoch_start)
    moment = tables.moment(_sizes(batch_sizes))
    return tables.weight_gradients(moment, indices, offsets, grad.contiguous())


@_register_fake("coldrow::weight_gradients")
def _weight_gradients_fake(
    weights: Sequence[Tensor],
    state: Sequence[Tensor],
    lr: Tensor,
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
    (_, weights, state, *scalars, indices, offsets, sample_weights, sizes, train, spec) = inputs
    ctx.counts = len(weights), len(state)
    ctx.sizes, ctx.train, ctx.spec = sizes, train, spec
    ctx.save_for_backward(*weights, *state, *scalars, indices, offsets, sample_weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    tables, states = ctx.counts
    weights, state, saved = (
        saved[:tables],
        saved[tables : tables + states],
        saved[tables + states :],
    )
    lr, clock, epoch_start, nonfinite, grad_scale, indices, offsets, sample_weights = saved
    weights_grad = None
    if ctx.needs_input_grad[10]:
        weights_grad = torch.ops.coldrow.weight_gradients(
            weights, state, lr, clock, epoch_start, indices, offsets, ctx.sizes, grad, ctx.spec
        )
    if ctx.train:
        torch.ops.coldrow.update_(
            weights,
            state,
            clock,
            nonfinite,
            lr,
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
    return (None, *none_of, *[None] * 7, weights_grad, None, None, None)


torch.library.register_autograd("coldrow::lookup", _backward, setup_context=_setup_context)


def is_traced() -> bool:
    """Return whether calls are recorded or faked, so that tables must go through an operator."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or is_in_torch_dispatch_mode()  # make_fx, FakeTensorMode and the like
    )
