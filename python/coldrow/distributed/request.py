"""Which rank has which row, and what a batch asks of whom."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coldrow._backends.protocol import Moment
from coldrow.nn.autograd import plain
from coldrow.nn.table_batch import Layout
from coldrow.policies import RowUpdate


@dataclass(frozen=True)
class Group:
    """Tables of equal width and dtype that are trained alike: their rows travel together."""

    tables: tuple[int, ...]
    begin: int  # their part of a rank's keys
    end: int


class Placement:
    """Where the rows of some tables are: rank ``k`` owns rows ``k*chunk`` to ``(k+1)*chunk`` of each.

    A rank numbers its rows through all tables, group after group; a table takes as many numbers on each rank.

    Args:
        layout: of the tables.
        whole: rows of each whole table.
        dtypes: of each table.
        own: the update of each table that has one of its own. (What is assigned to a module does not change
            which tables are trained alike by it, so ranks agree on groups before they agree on updates.)
        world: number of ranks.
        rank: of this process.
    """

    def __init__(
        self,
        layout: Layout,
        whole: Sequence[int],
        dtypes: Sequence[torch.dtype],
        own: Sequence[RowUpdate | None],
        world: int,
        rank: int,
    ) -> None:
        self.layout, self.whole, self.world, self.rank = layout, tuple(whole), world, rank
        self.chunks = [chunk_of(n, world) for n in whole]
        shards = [shard_of(n, world, rank) for n in whole]
        self.first = [shard.start for shard in shards]
        self.own = [len(shard) for shard in shards]
        kinds = [(t.dim, d, u) for t, d, u in zip(layout.tables, dtypes, own, strict=True)]
        self.groups: list[Group] = []
        self.base = [0] * len(kinds)  # the first number of each table
        at = 0
        for kind in dict.fromkeys(kinds):
            of_kind = tuple(t for t, k in enumerate(kinds) if k == kind)
            begin = at
            for t in of_kind:
                self.base[t] = at
                at += self.chunks[t]
            self.groups.append(Group(of_kind, begin, at))
        self.span = at  # numbers on each rank
        self.group_of = {t: g for g, group in enumerate(self.groups) for t in group.tables}
        by_feature = [(self.whole[t], self.chunks[t], self.base[t]) for t in layout.features]
        self.feature_rows, self.feature_chunk, self.feature_base = torch.tensor(by_feature).T

    def by_group(self, keys: Tensor) -> list[Tensor]:
        """Return the positions of the keys of each group, in order."""
        if len(self.groups) == 1:
            return [torch.arange(len(keys))]
        ends = torch.tensor([g.end for g in self.groups])
        group = torch.bucketize(keys, ends, right=True)
        return [(group == g).nonzero().squeeze(1) for g in range(len(self.groups))]

    def of_table(self, keys: Tensor, table: int) -> Tensor:
        """Return which of the keys are rows of a table."""
        return (keys >= self.base[table]) & (keys < self.base[table] + self.chunks[table])

    def gather(self, group: Group, keys: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        """Return what the tables of a group hold for each key; ``arrays`` by table, one row each."""
        if len(group.tables) == 1:
            t = group.tables[0]
            return arrays[t].index_select(0, keys - self.base[t])
        like = arrays[group.tables[0]]
        out = torch.empty(len(keys), *like.shape[1:], dtype=like.dtype)
        for t in group.tables:
            here = self.of_table(keys, t).nonzero().squeeze(1)
            out[here] = arrays[t].index_select(0, keys[here] - self.base[t])
        return out


@dataclass
class Request:
    """A batch as this rank was given it, checked, and where its rows are."""

    moment: Moment  # with lrs by group of tables
    sizes: list[int]  # bags of each feature
    counts: list[int]  # indices of each feature
    offsets: Tensor  # int64 [bags + 1]
    feature: Tensor  # [N]: of each index
    owner: Tensor  # [N]: rank
    keys: Tensor  # [U]: the distinct rows, by rank, then as the rank numbers its rows
    slot: Tensor  # [N]: index into keys
    wanted: Tensor  # [W, G]: of keys, how many of each rank and group

    def pairs(self, pooling: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the lookups by owner, whether each is the first of its bag there, and their bags.

        Within an owner they keep the order of the batch. (The gradient of a bag goes once to each rank that
        owns rows of it.)
        """
        order = torch.argsort(self.owner, stable=True)
        if pooling == "none":
            return order, torch.ones_like(order, dtype=torch.bool), order
        lengths = self.offsets.diff()
        bag = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[order]
        owner = self.owner[order]
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = (bag[1:] != bag[:-1]) | (owner[1:] != owner[:-1])
        return order, first, bag


@dataclass
class Plan:
    """Who sends how much of what to whom in one step, known to this rank."""

    asked: list[list[int]]  # [W][G] rows this rank asks of each
    serves: list[list[int]]  # [W][G] rows each asks of this one
    lookups: Tensor  # [W, F] indices of each rank and feature that reach rows here
    bags: Tensor  # [W, F] bags, likewise (both zero unless gradients are summed here)
    served: Tensor  # int64 [n]: the rows asked of this rank, by rank asking
    slot: Tensor  # int64 [N]: rows in the buffers below
    rows: list[Tensor]  # by group: the rows asked for, [n, D]
    prev_iters: list[Tensor]  # by group: int32 [n]; with charge="read"


def request_of(
    placement: Placement,
    moment: Moment,
    indices: Tensor,
    offsets: Tensor,
) -> Request:
    """Check a batch, and find where its rows are. ``moment`` has its batch sizes."""
    for name, value in (("indices", indices), ("offsets", offsets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, accepted: a torch tensor")
        if value.dim() != 1 or value.device.type != "cpu":
            raise ValueError(
                f"{name}: got shape {list(value.shape)} on {value.device}, accepted: one "
                "dimension, on the CPU"
            )
        if value.dtype not in (torch.int32, torch.int64) or value.dtype != indices.dtype:
            raise TypeError(
                f"{name}: got {value.dtype}, accepted: int32 or int64, the same for indices and "
                "offsets"
            )
    features = len(placement.layout.features)
    sizes = moment.batch_sizes
    bags, count = offsets.numel() - 1, indices.numel()
    if count >= 2**30:
        raise ValueError(f"indices: got {count}, accepted: fewer than 2**30 in one batch")
    if bags < 0 or (sizes is None and bags % features):
        raise ValueError(
            f"offsets: got length {bags + 1}, accepted: {features} features * batch + 1"
        )
    offsets = offsets.long()
    if int(offsets[0]) != 0 or int(offsets[-1]) != count:
        raise ValueError(
            f"offsets: goes from {int(offsets[0])} to {int(offsets[-1])}, accepted: from 0 to the "
            f"number of indices, {count}"
        )
    if bool((offsets.diff() < 0).any()):
        raise ValueError("offsets: falls, accepted: offsets that never decrease")
    each = list(sizes) if sizes is not None else [bags // features] * features
    ends = torch.tensor(list(itertools.accumulate(each, initial=0)))
    counts = offsets[ends].diff()
    feature = torch.repeat_interleave(torch.arange(features), counts)
    return located(placement, moment, indices.long(), feature, each, counts.tolist(), offsets)


def located(
    placement: Placement,
    moment: Moment,
    rows: Tensor,
    feature: Tensor,
    sizes: list[int],
    counts: list[int],
    offsets: Tensor,
) -> Request:
    """Find where rows are, int64 ``[N]`` of the tables of ``feature`` ``[N]``, or raise IndexError."""
    outside = (rows < 0) | (rows >= placement.feature_rows[feature])
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        table = placement.layout.features[int(feature[at])]
        raise IndexError(
            f"indices: got {int(rows[at])} at position {at} of table "
            f"'{placement.layout.tables[table].name}', accepted: 0 to {placement.whole[table] - 1}"
        )
    chunk = placement.feature_chunk[feature]
    owner = rows // chunk
    key = owner * placement.span + placement.feature_base[feature] + rows - owner * chunk
    keys, slot = torch.unique(key, return_inverse=True)
    world, groups = placement.world, placement.groups
    starts = torch.tensor(
        [r * placement.span + g.begin for r in range(world) for g in groups]
        + [world * placement.span]
    )
    wanted = torch.searchsorted(keys, starts).diff().view(world, len(groups))
    return Request(moment, sizes, counts, offsets, feature, owner, keys, slot, wanted)


def checked_weights(weights: Tensor | None, indices: Tensor, pooling: str) -> Tensor | None:
    """Return per_sample_weights as contiguous float32, or raise."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"per_sample_weights: got {weights!r}, accepted: a float tensor")
    if pooling != "sum":
        raise ValueError(
            f"per_sample_weights: given with pooling={pooling!r}, accepted: with pooling='sum' only"
        )
    if weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights: got shape {list(weights.shape)}, accepted: one per index, "
            f"{list(indices.shape)}"
        )
    return plain(weights.float())


def chunk_of(rows: int, world: int) -> int:
    """Return how many rows of a table a rank owns."""
    return -(-rows // world)


def shard_of(rows: int, world: int, rank: int) -> range:
    """Return which rows of a table a rank owns."""
    chunk = chunk_of(rows, world)
    return range(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


def starts_of(counts: Tensor) -> Tensor:
    """Return where each of several consecutive parts begins."""
    return counts.cumsum(0) - counts


def labels_of(counts: Tensor) -> Tensor:
    """Return the column of each element of consecutive parts, ``counts[row, column]`` long."""
    rows, columns = counts.shape
    return torch.repeat_interleave(torch.arange(columns).repeat(rows), counts.flatten())


def histogram(cell: Tensor, world: int, features: int) -> Tensor:
    """Return how often each cell of ``[world, features]`` occurs."""
    return torch.bincount(cell, minlength=world * features).view(world, features)
