"""The two ways a lookup takes part in autograd: updating in backward, or leaving sparse gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coldrow.nn.kernels import Batch, DeviceBatch, counts_of

if TYPE_CHECKING:
    from coldrow.nn.module import TableBatchedEmbeddingBags


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor as contiguous memory that means what it says."""
    return (tensor.resolve_neg() if tensor.is_neg() else tensor).contiguous()


class Ticket:
    """One training forward whose backward has not run. It dies with its autograd graph."""

    __slots__ = ("__weakref__", "used")

    def __init__(self) -> None:
        self.used = False


def check_same_tables(generation: int, module: TableBatchedEmbeddingBags) -> None:
    """Refuse a backward to tables that are no longer those of the forward."""
    if generation != module._generation:
        raise RuntimeError(
            "the tables were loaded, evicted from, converted or moved between forward and "
            "backward, so this gradient no longer belongs to them"
        )


def check_unwritten(versions: tuple[int, ...], module: TableBatchedEmbeddingBags) -> None:
    """Refuse a gradient of per_sample_weights that would be computed from other rows than were read."""
    if versions != module._versions():
        raise RuntimeError(
            "the tables were written to between forward and backward, so the gradient of "
            "per_sample_weights can no longer be computed"
        )


# What no gradient flows to, in one argument: for each autograd takes its time.
Asked = tuple["TableBatchedEmbeddingBags", Ticket | None, Batch | DeviceBatch, Tensor, Tensor]


class FusedLookup(torch.autograd.Function):
    """Forward: look rows up. Backward: update them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weights: Tensor | None, asked: Asked) -> Tensor:
        """Look up; ``anchor`` requires grad so that autograd calls the backward."""
        module, ctx.ticket, ctx.batch, indices, offsets = asked
        ctx.module = module
        ctx.generation = module._generation
        ctx.versions = None if weights is None else module._versions()
        ctx.save_for_backward(indices, offsets, weights)
        return module._lookup(ctx.batch, indices, offsets, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Update the tables; return the gradient of per_sample_weights."""
        # (Gradients are off here unless there is create_graph=True; switching them off takes 3 us.)
        return update_once(ctx, grad) if torch.is_grad_enabled() else update(ctx, grad)


def update(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Do the backward of FusedLookup."""
    module, ticket = ctx.module, ctx.ticket
    if ticket is not None and ticket.used:
        raise RuntimeError(
            "this forward has had its backward; a fused module takes one backward per forward, "
            "which updates the tables. Build it with fused=False to accumulate gradients."
        )
    check_same_tables(ctx.generation, module)
    indices, offsets, weights = ctx.saved_tensors
    grad = plain(grad)
    weights_grad = None
    if ctx.needs_input_grad[1]:
        check_unwritten(ctx.versions, module)
        weights_grad = module._weight_gradients(ctx.batch, indices, offsets, grad)
    if ticket is not None:
        ticket.used = True
        module._update(ctx.batch, indices, offsets, weights, grad)
    return None, weights_grad, None


update_once = once_differentiable(update)


class SparseLookup(torch.autograd.Function):
    """Forward: look rows up. Backward: sparse gradients for the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        module: TableBatchedEmbeddingBags,
        batch: Batch | DeviceBatch,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        *tables: Tensor,
    ) -> Tensor:
        """Look up; ``tables`` are what the gradients will be for."""
        ctx.module, ctx.batch, ctx.versions = module, batch, module._versions()
        ctx.save_for_backward(indices, offsets, weights)
        return module._lookup(batch, indices, offsets, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of per_sample_weights and of the tables."""
        module, batch = ctx.module, ctx.batch
        check_same_tables(ctx.versions[0], module)
        indices, offsets, weights = ctx.saved_tensors
        grad = plain(grad)
        weights_grad = None
        if ctx.needs_input_grad[4]:
            check_unwritten(ctx.versions, module)
            weights_grad = module._weight_gradients(batch, indices, offsets, grad)
        needed = ctx.needs_input_grad[5:]
        tables = sparse_gradients(module, batch, indices, offsets, weights, grad, needed)
        return None, None, None, None, weights_grad, *tables


def sparse_gradients(
    module: TableBatchedEmbeddingBags,
    batch: Batch | DeviceBatch,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """One gradient row per index, as sparse tensors of each table's shape and dtype."""
    if isinstance(batch, DeviceBatch):  # sizes are asked of the device, so this waits anyway
        module.check()
    dims = [module.tables[t].dim for t in module._feature_tables]
    count = offsets.numel() - 1
    sizes = batch.batch_sizes or (count // len(dims),) * len(dims)
    indices_of = counts_of(offsets, batch.batch_sizes, len(dims))
    lengths = offsets.diff()
    rows: list[list[Tensor]] = [[] for _ in module.tables]
    values: list[list[Tensor]] = [[] for _ in module.tables]
    bag, column, flat, lo = 0, 0, 0, 0
    for table, size, dim, n in zip(module._feature_tables, sizes, dims, indices_of, strict=True):
        hi = lo + n
        if module.pooling == "none":
            value = grad.reshape(-1)[flat : flat + (hi - lo) * dim].view(-1, dim).float()
            flat += (hi - lo) * dim
        else:
            if batch.batch_sizes is None:
                pooled = grad[:, column : column + dim]
            else:
                pooled = grad[flat : flat + size * dim].view(size, dim)
                flat += size * dim
            length = lengths[bag : bag + size]
            value = pooled.float()
            if module.pooling == "mean":
                value = value / length.clamp(min=1).unsqueeze(1)
            value = value.repeat_interleave(length, dim=0, output_size=n)
            if weights is not None:
                value = value * weights.detach()[lo:hi].unsqueeze(1)
        rows[table].append(indices[lo:hi].long())
        values[table].append(value)
        bag += size
        column += dim
        lo = hi
    out: list[Tensor | None] = []
    for table, (row, value_list) in enumerate(zip(rows, values, strict=True)):
        weight = module._parameters_list[table]
        if not needed[table]:
            out.append(None)
            continue
        out.append(
            torch.sparse_coo_tensor(
                torch.cat(row).unsqueeze(0),
                torch.cat(value_list).to(getattr(weight, "grad_dtype", None) or weight.dtype),
                weight.shape,
                check_invariants=False,
            )
        )
    return out
