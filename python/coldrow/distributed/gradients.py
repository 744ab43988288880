"""How gradients reach the ranks that own the rows: by bag, or summed by row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coldrow._backends.protocol import Counters
from coldrow.distributed.exchange import Ranks
from coldrow.distributed.request import Placement, Plan, Request, labels_of, starts_of
from coldrow.nn.table_batch import Layout, TableBatch


class Arrived(NamedTuple):
    """What a rank is to update: lookups summed by bag, as ``TableBatch.update`` takes them."""

    rows: Tensor
    offsets: Tensor
    weights: Tensor | None
    sizes: list[int]
    grad: Tensor


def _by_feature(layout: Layout, request: Request, grad: Tensor) -> list[Tensor]:
    """Views of the gradient of the output: ``[bags or indices, D]`` of each feature."""
    dims, sizes = layout.dims, request.sizes
    if layout.pooling == "none":
        sizes = request.counts
    elif request.moment.batch_sizes is None:
        return list(grad.split(list(dims), dim=1))
    parts = grad.view(-1).split([n * d for n, d in zip(sizes, dims, strict=True)])
    return [part.view(-1, d) for part, d in zip(parts, dims, strict=True)]


def by_bag(
    ranks: Ranks,
    placement: Placement,
    request: Request,
    plan: Plan,
    weights: Tensor | None,
    grad: Tensor,
) -> Arrived:
    """Exchange gradients by bag: what to update here, in the order of the joined batch."""
    layout, world, dims = placement.layout, ranks.world, placement.layout.dims
    order, first, bag = request.pairs(layout.pooling)
    to = torch.bincount(request.owner, minlength=world).tolist()
    get = plan.lookups.sum(1)

    # The lookups: which of the rows asked of that rank, and whether a new bag begins.
    asked = request.wanted.sum(1)
    code = 2 * (request.slot - starts_of(asked)[request.owner])[order] + first
    code = ranks.send("gradients", code.int(), to, get.tolist()).long()
    scales = None
    if weights is not None:
        scales = weights.detach()[order]
    elif layout.pooling == "mean":
        lengths = request.offsets.diff()[bag].float()
        scales = torch.ones_like(lengths) / lengths
    if scales is not None:
        scales = ranks.send("gradients", scales, to, get.tolist())

    # From (rank, feature) order to that of the joined batch, (feature, rank).
    lookup_feature = labels_of(plan.lookups)
    by_feature = torch.argsort(lookup_feature, stable=True)
    lookup_feature = lookup_feature[by_feature]
    serves = torch.tensor(plan.serves).sum(1)
    key = plan.served[(code // 2 + torch.repeat_interleave(starts_of(serves), get))[by_feature]]
    rows = key - placement.feature_base[lookup_feature]
    begins = (code % 2)[by_feature].nonzero().squeeze(1)
    offsets = torch.cat([begins, torch.tensor([len(code)])])
    if scales is not None:
        scales = scales[by_feature]

    # The gradients of the bags, features of one width at a time.
    parts = _by_feature(layout, request, grad)
    starts = starts_of(torch.tensor([len(part) for part in parts]))
    pair_feature = request.feature[order][first]
    pair_row = bag[first] - starts[pair_feature]
    pair_owner = request.owner[order][first]
    bags = plan.bags.sum(0).tolist()
    ends = list(itertools.accumulate((n * d for n, d in zip(bags, dims, strict=True)), initial=0))
    grads = torch.empty(ends[-1], dtype=grad.dtype)
    for width in dict.fromkeys(dims):
        of_width = [f for f, d in enumerate(dims) if d == width]
        chosen = torch.tensor([d == width for d in dims])[pair_feature]
        feature, row = pair_feature[chosen], pair_row[chosen]
        out = torch.empty(len(row), width, dtype=grad.dtype)
        for f in of_width:
            here = (feature == f).nonzero().squeeze(1)
            out[here] = parts[f][row[here]]
        counts = plan.bags[:, of_width]
        back = ranks.send(
            "gradients",
            out,
            torch.bincount(pair_owner[chosen], minlength=world).tolist(),
            counts.sum(1).tolist(),
        )
        position = torch.argsort(labels_of(counts), stable=True)
        for f, here in zip(of_width, position.split(counts.sum(0).tolist()), strict=True):
            grads[ends[f] : ends[f + 1]].view(-1, width).copy_(back[here])
    return Arrived(rows, offsets, scales, bags, grads)


def by_row(
    ranks: Ranks,
    placement: Placement,
    summing: TableBatch,
    request: Request,
    plan: Plan,
    weights: Tensor | None,
    grad: Tensor,
) -> Arrived:
    """Exchange gradients summed by row: what to update here, rank after rank.

    ``summing`` are the groups of tables under SGD: a step of it with lr 1 on zeros is minus the sum.
    """
    asked = request.wanted.sum(0).tolist()
    layout = summing.layout
    sums = [torch.zeros(n, t.dim) for n, t in zip(asked, layout.tables, strict=True)]
    untouched = [[torch.zeros(len(s), dtype=torch.int32)] for s in sums]
    scales = None if weights is None else weights.detach()
    summing.over(sums, untouched, first_step(layout)).update(
        request.moment.batch_sizes, plan.slot, request.offsets, scales, grad
    )
    tables = len(placement.whole)
    local: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * tables
    values: list[Tensor] = [torch.empty(0)] * tables
    served = placement.by_group(plan.served)
    for g, (group, part) in enumerate(zip(placement.groups, served, strict=True)):
        to, get = [a[g] for a in plan.asked], [s[g] for s in plan.serves]
        back = ranks.send("gradients", sums[g].neg_(), to, get)
        keys = plan.served[part]
        for t in group.tables:
            here = placement.of_table(keys, t)
            local[t] = keys[here] - placement.base[t]
            values[t] = back[here].flatten()
    rows = torch.cat(local)
    sizes = [len(r) for r in local]
    return Arrived(rows, torch.arange(len(rows) + 1), None, sizes, torch.cat(values))


def first_step(layout: Layout, lrs: Sequence[float] = (1.0,)) -> Counters:
    """Return counters before the first step, with these learning rates by group."""
    zero = torch.zeros((), dtype=torch.int64)
    one = torch.ones((), dtype=torch.float64)
    lr = torch.tensor(lrs, dtype=torch.float64)
    return Counters(zero, zero.clone(), zero.clone(), one, lr, layout.groups)
