"""The two ways a lookup takes part in autograd: updating in backward, or leaving sparse gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from coldrow._backends.protocol import DeviceMoment
from coldrow.nn.table_batch import TableBatch, counts_of


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous memory that means what it says."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


class Ticket:
    """One training forward whose backward has not run. It dies with its autograd graph."""

    __slots__ = ("__weakref__", "_left")

    def __init__(self) -> None:
        self._left = [True]

    @property
    def used(self) -> bool:
        """Whether the forward has had its backward, or was given up."""
        return not self._left

    def take(self) -> None:
        """Begin the one backward, or raise where there was one. (Of several threads one succeeds.)"""
        try:
            self._left.pop()
        except IndexError:
            raise RuntimeError(
                "this forward has had its backward; a fused module takes one backward per forward, "
                "which updates the tables. Build it with fused=False to accumulate gradients."
            ) from None

    def give_back(self) -> None:
        """Undo :meth:`take`: nothing was written."""
        self._left.append(True)


class Owner(Protocol):
    """Who owns the tables that are looked up: a module."""

    def current(self, tables: TableBatch) -> TableBatch:
        """Return the tables as they are trained now, or raise where they are others than these."""

    def stepping(self) -> None:
        """Say what is to be said before a step; whatever raises here has changed nothing."""

    def stepped(self) -> None:
        """Take note of a step that was done."""


def require_unwritten(versions: tuple[int, ...], tables: TableBatch) -> None:
    """Refuse a gradient of per_sample_weights that would be computed from other rows than were read."""
    if versions != tables.versions():
        raise RuntimeError(
            "the tables were written to between forward and backward, so the gradient of "
            "per_sample_weights can no longer be computed"
        )


class _Once(torch.autograd.Function):
    """The identity, through which no gradient flows back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, needed: Tensor) -> Tensor:
        """Return the tensor; ``needed`` requires grad so that autograd calls the backward."""
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Refuse."""
        raise RuntimeError(
            "trying to differentiate twice a function that was marked with once_differentiable: the "
            "gradient of per_sample_weights depends on the tables, and those on what was read"
        )


def once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Return a backward whose results, under ``create_graph=True``, refuse a second one.

    (torch's once_differentiable refuses only where the incoming gradient requires grad.)
    """

    def refusing(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = backward(ctx, grad)
        if not create_graph:
            return gradients
        needed = torch.empty(0, device=grad.device, requires_grad=True)
        return tuple([g if g is None or g.is_sparse else _Once.apply(g, needed) for g in gradients])

    return refusing


# What no gradient flows to, in one argument: for each autograd takes its time.
Asked = tuple["Owner | None", TableBatch, "Ticket | None", Any, Tensor, Tensor]


class FusedLookup(torch.autograd.Function):
    """Forward: look rows up. Backward: update them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weights: Tensor | None, asked: Asked) -> Tensor:
        """Look up; ``anchor`` requires grad so that autograd calls the backward."""
        ctx.owner, tables, ctx.ticket, moment, indices, offsets = asked
        ctx.tables, ctx.moment = tables, moment
        ctx.versions = None if weights is None else tables.versions()
        ctx.save_for_backward(indices, offsets, weights)
        return tables.lookup(moment, indices, offsets, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Update the tables; return the gradient of per_sample_weights."""
        # (Gradients are off here unless there is create_graph=True; switching them off takes 3 us.)
        return once(update)(ctx, grad) if torch.is_grad_enabled() else update(ctx, grad)


def update(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Do the backward of FusedLookup."""
    owner, tables, ticket = ctx.owner, ctx.tables, ctx.ticket
    if ticket is not None:
        ticket.take()
    try:
        if owner is not None:
            tables = owner.current(tables)
        indices, offsets, weights = ctx.saved_tensors
        grad = plain(grad)
        weights_grad = None
        if ctx.needs_input_grad[1]:
            require_unwritten(ctx.versions, tables)
            weights_grad = tables.weight_gradients(ctx.moment, indices, offsets, grad)
        if ticket is not None and owner is not None:
            owner.stepping()
    except BaseException:
        if ticket is not None:
            ticket.give_back()
        raise
    if ticket is not None:
        tables.update(ctx.moment.batch_sizes, indices, offsets, weights, grad)
        if owner is not None:
            owner.stepped()
    return None, weights_grad, None


class SparseLookup(torch.autograd.Function):
    """Forward: look rows up. Backward: sparse gradients for the tables."""

    @staticmethod
    def forward(ctx: Any, asked: Asked, weights: Tensor | None, *parameters: Tensor) -> Tensor:
        """Look up; ``parameters`` are what the gradients will be for."""
        ctx.owner, tables, _, moment, indices, offsets = asked
        ctx.tables, ctx.moment, ctx.versions = tables, moment, tables.versions()
        ctx.save_for_backward(indices, offsets, weights)
        return tables.lookup(moment, indices, offsets, weights)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of per_sample_weights and of the tables."""
        tables, moment = ctx.tables, ctx.moment
        if ctx.owner is not None:
            tables = ctx.owner.current(tables)
        indices, offsets, weights = ctx.saved_tensors
        grad = plain(grad)
        weights_grad = None
        if ctx.needs_input_grad[1]:
            require_unwritten(ctx.versions, tables)
            weights_grad = tables.weight_gradients(moment, indices, offsets, grad)
        needed = ctx.needs_input_grad[2:]
        gradients = sparse_gradients(tables, moment, indices, offsets, weights, grad, needed)
        return None, weights_grad, *gradients


def sparse_gradients(
    tables: TableBatch,
    moment: Any,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """One gradient row per index, as sparse tensors of the shape of each table, in its gradient dtype."""
    if isinstance(moment, DeviceMoment):  # sizes are asked of the device, so this waits anyway
        tables.check()
    layout = tables.layout
    dims = layout.dims
    bags_of = moment.batch_sizes or ((offsets.numel() - 1) // len(dims),) * len(dims)
    indices_of = counts_of(offsets, moment.batch_sizes, len(dims))
    lengths = offsets.diff()
    rows: list[list[Tensor]] = [[] for _ in layout.tables]
    values: list[list[Tensor]] = [[] for _ in layout.tables]
    bag, column, flat, lo = 0, 0, 0, 0
    for table, size, dim, n in zip(layout.features, bags_of, dims, indices_of, strict=True):
        hi = lo + n
        if layout.pooling == "none":
            value = grad.reshape(-1)[flat : flat + n * dim].view(-1, dim).float()
            flat += n * dim
        else:
            if moment.batch_sizes is None:
                pooled = grad[:, column : column + dim]
            else:
                pooled = grad[flat : flat + size * dim].view(size, dim)
                flat += size * dim
            length = lengths[bag : bag + size]
            value = pooled.float()
            if layout.pooling == "mean":
                value = value / length.clamp(min=1).unsqueeze(1)
            value = value.repeat_interleave(length, dim=0, output_size=n)
            if weights is not None:
                value = value * weights.detach()[lo:hi].unsqueeze(1)
        rows[table].append(indices[lo:hi].long())
        values[table].append(value)
        bag += size
        column += dim
        lo = hi
    return [
        _sparse(weight, torch.cat(row), torch.cat(value)) if wanted else None
        for weight, row, value, wanted in zip(tables.weights, rows, values, needed, strict=True)
    ]


def _sparse(weight: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    dtype = getattr(weight, "grad_dtype", None) or weight.dtype
    return torch.sparse_coo_tensor(
        rows.unsqueeze(0), values.to(dtype), weight.shape, check_invariants=False
    )
