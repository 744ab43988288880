"""Tables whose rows are spread over the ranks of a process group.

:class:`RowShardedEmbeddingBags` needs torch.distributed alone. A step of it, on each rank:

1. the distinct rows that this rank's batch asks for are sent to their owners, which send the rows as
   they are stored (with ``charge="read"`` also when each was last touched);
2. the rank pools them itself, by the kernel that a module with the whole table would use;
3. in backward the gradients go to the owners, which update their rows.

So what comes out, and what is trained, are the bits of one process given the batches of all ranks joined
in rank order (with ``sum_gradients="owner"``), on any number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from coldrow import _core
from coldrow._checks import integer, number, one_of
from coldrow.nn.autograd import Ticket, check_same_tables, plain
from coldrow.nn.kernels import Batch
from coldrow.nn.module import TableBatchedEmbeddingBags
from coldrow.nn.table import Table
from coldrow.policies import SGD, RowUpdate, compiled

__all__ = ["RowShardedEmbeddingBags", "ignore_in_ddp"]

# Rows are initialised in blocks of so many, each with random numbers of its own.
_BLOCK = 4096


def ignore_in_ddp(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave fused tables alone; call it before wrapping ``model``.

    DDP would broadcast rank 0's tables to all ranks, which hold other rows.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    ignored |= {n for n, p in model.named_parameters() if getattr(p, "_coldrow_fused", False)}
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


@dataclass(frozen=True)
class _Group:
    """Tables of equal width, dtype and update: their rows travel together."""

    tables: tuple[int, ...]
    begin: int  # their part of a rank's keys
    end: int


@dataclass
class _Request:
    """A batch as this rank was given it, checked, and where its rows are."""

    batch: Batch
    sizes: list[int]  # bags of each feature
    counts: list[int]  # indices of each feature
    offsets: Tensor  # int64 [bags + 1]
    feature: Tensor  # [N]: of each index
    owner: Tensor  # [N]: rank
    keys: Tensor  # [U]: the distinct rows, by rank, then as the rank numbers its rows
    slot: Tensor  # [N]: index into keys
    wanted: Tensor  # [W, G]: of keys, how many of each rank and group


@dataclass
class _Plan:
    """Who sends how much of what to whom in one step, known to this rank."""

    asked: list[list[int]]  # [W][G] rows this rank asks of each
    serves: list[list[int]]  # [W][G] rows each asks of this one
    lookups: Tensor  # [W, F] indices of each rank and feature that reach rows here
    bags: Tensor  # [W, F] bags, likewise (both zero unless gradients are summed here)
    served: Tensor  # int64 [n]: the rows asked of this rank, by rank asking
    slot: Tensor  # int64 [N]: rows in the buffers below
    rows: list[Tensor]  # by group: the rows asked for, [n, D]
    prev_iters: list[Tensor]  # by group: int32 [n]; with charge="read"


class _Lookup(torch.autograd.Function):
    """Forward: pool the rows that came. Backward: send gradients, update the rows asked of us."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        module: RowShardedEmbeddingBags,
        ticket: Ticket | None,
        request: _Request,
        plan: _Plan,
        weights: Tensor | None,
    ) -> Tensor:
        """Pool; ``anchor`` requires grad so that autograd calls the backward."""
        out = module._pool(request, plan, weights)
        ctx.module, ctx.ticket, ctx.request, ctx.plan = module, ticket, request, plan
        ctx.versions = module._versions()
        ctx.save_for_backward(weights)
        if not ctx.needs_input_grad[5]:
            plan.rows, plan.prev_iters = [], []
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Update the tables of all ranks; return the gradient of per_sample_weights."""
        (weights,) = ctx.saved_tensors
        grad = plain(grad)
        weights_grad = None
        if ctx.needs_input_grad[5]:
            weights_grad = ctx.module._borrowed_weight_gradients(ctx.request, ctx.plan, grad)
        if ctx.ticket is not None:
            ctx.module._backward(ctx.ticket, ctx.versions, ctx.request, ctx.plan, weights, grad)
        return None, None, None, None, None, weights_grad


class RowShardedEmbeddingBags(TableBatchedEmbeddingBags):
    """:class:`coldrow.nn.TableBatchedEmbeddingBags` with the rows of each table spread over ranks.

    Each rank calls it with its own batch and gets the pooled rows of that batch: arguments, shapes and
    results are those of the base class, fused. Rank ``k`` of ``W`` owns rows ``k*c`` to ``(k+1)*c`` of a
    table, ``c = ceil(num_rows / W)`` (:meth:`shard`); ``weights`` and ``state`` are its own rows alone
    (one row that nothing refers to, where a table has none here).

    Forward, backward, :meth:`read` and saving are collective: all ranks of the group call them, in the
    same order, with batches that may be empty and of any sizes. The clock advances on all ranks together.
    What one rank refuses (bad input, a second forward), and ranks that differ in clock, lr, epoch or
    mode, raise on every rank. A rank that never calls, or dies, is for the process group's timeout.

    A step is that of one process on the joined batch: the gradients of all ranks are summed. Where each
    rank's loss is a mean over its own batch, as DistributedDataParallel has it, set ``grad_scale`` to the
    number of ranks. See :func:`ignore_in_ddp` for models wrapped by it.

    ``state_dict()`` holds tables and row state as DTensors, ``Shard(0)``, under the keys of the base
    class: torch.distributed.checkpoint saves them once and loads them on any number of ranks, or into the
    base class. ``load_state_dict`` takes such DTensors, or whole tables.

    Args:
        tables: as for the base class; ``num_rows`` of the whole table. ``init`` is called on blocks of
            at most 4096 rows, seeded by table and block, so that rows do not depend on the number of
            ranks.
        update: as for the base class, with all that follows.
        process_group: default: the default group.
        pooling: "sum", "mean" or "none".
        charge: "touch" or "read".
        output_dtype: torch.float32, torch.float16 or torch.bfloat16.
        on_nonfinite: as for the base class. "raise" writes nothing on any rank. ``nonfinite_rows``
            counts the rows of this rank.
        state_layout: "record" or "split".
        sum_gradients: "owner": gradients are sent by bag and summed where the row is, in the order of
            the joined batch: the bits of one process, on any number of ranks. "sender": each rank sums
            the gradients of its own lookups of a row first. Fewer bytes where rows repeat; the order of
            float32 sums, so their last bits, depends on the ranks.
        seed: of the initial rows; default: rank 0's ``torch.initial_seed()``.

    Attributes:
        wire_bytes: bytes this rank has sent to others, by purpose: "header", "rows asked",
            "rows sent", "state sent", "gradients", "status".

    Raises:
        RuntimeError: if torch.distributed is not initialised.
        ValueError: if ranks were given different tables or options.
    """

    _whole: tuple[int, ...] = ()  # rows of each table

    def __init__(
        self,
        tables: Sequence[Table],
        update: RowUpdate | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        pooling: Literal["sum", "mean", "none"] = "sum",
        charge: Literal["touch", "read"] = "touch",
        output_dtype: torch.dtype = torch.float32,
        on_nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        state_layout: Literal["record", "split"] = "record",
        sum_gradients: Literal["owner", "sender"] = "owner",
        seed: int | None = None,
    ) -> None:
        one_of("sum_gradients", sum_gradients, ("owner", "sender"))
        if seed is not None:
            seed = integer("seed", seed, -(2**63), 2**64 - 1)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call init_process_group() before building "
                "RowShardedEmbeddingBags"
            )
        group = dist.group.WORLD if process_group is None else process_group
        assert group is not None
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        if rank < 0:
            raise ValueError("process_group: this process is not in it, accepted: a group it is in")
        tables = list(tables)
        if not all(isinstance(t, Table) for t in tables):
            raise TypeError(f"tables: got {tables!r}, accepted: a non-empty list of Table")
        chunks = [-(-t.num_rows // world) for t in tables]
        bounds = [
            (min(rank * c, t.num_rows), min((rank + 1) * c, t.num_rows))
            for t, c in zip(tables, chunks, strict=True)
        ]
        super().__init__(
            # Filled below, when the seed is known. A table has one row at least.
            [
                replace(t, num_rows=max(hi - lo, 1), init=nn.init.zeros_)
                for t, (lo, hi) in zip(tables, bounds, strict=True)
            ],
            update,
            pooling=pooling,
            charge=charge,
            output_dtype=output_dtype,
            on_nonfinite=on_nonfinite,
            state_layout=state_layout,
        )
        for own, table in zip(self.tables, tables, strict=True):
            own.init = table.init
        self.sum_gradients = sum_gradients
        self.wire_bytes: Counter[str] = Counter()
        self._group: dist.ProcessGroup = group
        self._default_group = process_group is None
        self._world, self._rank = world, rank
        self._mesh: DeviceMesh | None = None
        self._whole, self._chunks = tuple(t.num_rows for t in tables), chunks
        self._first = [lo for lo, _ in bounds]
        self._own = [hi - lo for lo, hi in bounds]
        self.register_state_dict_post_hook(_shard_state_dict)
        self._prepare()

        described = repr(
            [
                (t.name, n, t.dim, t.dtype, t.features, u.to_dict())
                for t, n, u in zip(self.tables, self._whole, self._updates, strict=True)
            ]
            + [pooling, charge, output_dtype, on_nonfinite, sum_gradients]
        )
        given: list[Any] = [None] * world
        mine = (described, torch.initial_seed() if seed is None else seed)
        dist.all_gather_object(given, mine, group=group)
        for r, (theirs, _) in enumerate(given):
            if theirs != given[0][0]:
                raise ValueError(
                    f"tables: rank {r} has {theirs}, accepted: rank 0's, {given[0][0]}"
                )
        self.seed = int(given[0][1])
        for t, (lo, hi) in enumerate(bounds):
            if lo < hi:
                self._parameters_list[t].data.copy_(self._drawn(t, lo, hi))

    @classmethod
    def from_torch(
        cls, module: nn.EmbeddingBag | nn.Embedding, update: RowUpdate | None = None, **kwargs: Any
    ) -> RowShardedEmbeddingBags:
        """Refuse: build it, then ``load_state_dict`` whole tables."""
        raise NotImplementedError(
            "from_torch: accepted: build RowShardedEmbeddingBags, then load_state_dict() with the "
            "state_dict of TableBatchedEmbeddingBags.from_torch()"
        )

    def _require_device(self, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"device: got {str(device)!r}, accepted: 'cpu' (shards live there)")

    def _prepare(self) -> None:
        super()._prepare()
        if not self._whole:  # the base class is still building
            return
        names = [t.name for t in self.tables]
        kinds = [(t.dim, t.dtype, u) for t, u in zip(self.tables, self._updates, strict=True)]
        # A rank numbers its rows through all tables, group after group; a table takes as many
        # numbers on each rank.
        self._groups: list[_Group] = []
        self._base = [0] * len(names)
        at = 0
        for kind in dict.fromkeys(kinds):
            of_kind = tuple(t for t, k in enumerate(kinds) if k == kind)
            begin = at
            for t in of_kind:
                self._base[t] = at
                at += self._chunks[t]
            self._groups.append(_Group(of_kind, begin, at))
        self._span = at
        group_of = {t: g for g, group in enumerate(self._groups) for t in group.tables}
        features = self._feature_tables
        self._native = _core.TableBatch(names, self._keys, features, self._first)
        self._unshared = _core.TableBatch(names, self._keys, list(range(len(names))), self._first)
        # Rows on loan from their owners: a group's are one table.
        labels = [f"group {g}" for g in range(len(self._groups))]
        self._borrowed = _core.TableBatch(
            labels, [0] * len(labels), [group_of[t] for t in features]
        )
        by_feature = [(self._whole[t], self._chunks[t], self._base[t]) for t in features]
        self._feature_rows, self._feature_chunk, self._feature_base = torch.tensor(by_feature).T

    # ---------------------------------------------------------------------------------- rows

    def shard(self, name: str) -> range:
        """Return the rows of a table that this rank owns."""
        t = self._index_of(name)
        return range(self._first[t], self._first[t] + self._own[t])

    def _drawn(self, t: int, lo: int, hi: int, salt: int = 0) -> Tensor:
        """Return rows [lo, hi) as the initialiser makes them, whatever the number of ranks."""
        table, rows = self.tables[t], self._whole[t]
        out = torch.empty(hi - lo, table.dim, dtype=table.dtype)
        with torch.random.fork_rng(devices=[]):
            for start in range(lo // _BLOCK * _BLOCK, hi, _BLOCK):
                torch.manual_seed(_hash(self.seed, table.name, start, salt))
                block = torch.empty(min(_BLOCK, rows - start), table.dim, dtype=table.dtype)
                table.fill(block)
                first, last = max(lo, start), min(hi, start + _BLOCK)
                out[first - lo : last - lo] = block[first - start : last - start]
        return out

    def cold_rows(self, name: str, min_gap: int) -> Tensor:
        """Return this rank's rows (int64 ``[n]``, numbered through the whole table) untouched so long."""
        t = self._index_of(name)
        cold = super().cold_rows(name, min_gap)
        return cold[cold < self._own[t]] + self._first[t]

    def evict(self, name: str, rows: Tensor | Sequence[int]) -> None:
        """Re-initialise rows of this rank and zero their state; not collective.

        Args:
            name: the table.
            rows: rows of the whole table, each in :meth:`shard`, as :meth:`cold_rows` returns them.
        """
        t = self._index_of(name)
        self._sync()
        rows = _row_numbers(rows, self.shard(name))
        weight = self._parameters_list[t].detach()
        block = rows // _BLOCK
        for b in block.unique().tolist():
            these = rows[block == b]
            first, last = int(these.min()), int(these.max()) + 1
            fresh = self._drawn(t, first, last, self.clock + 1)
            weight[these - self._first[t]] = fresh[these - first]
        for view in self._state_views[name].values():
            view[rows - self._first[t]] = 0
        self._generation += 1

    @torch.no_grad()
    def read(self, name: str, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return rows as a forward would read them now, changing nothing. Collective.

        Args:
            name: the table, the same on all ranks.
            rows: int32 or int64 ``[n]``, of the whole table, what each rank likes; default all.

        Returns:
            ``[n, D]`` of ``output_dtype``.
        """

        def ask() -> _Request:
            self._sync()
            wanted = _row_numbers(
                range(self._whole[t]) if rows is None else rows, range(self._whole[t])
            )
            feature = self._feature_tables.index(t)
            batch = Batch(None, self.clock + 1, self.epoch_start, self._lrs())
            return self._located(
                batch, wanted, torch.full_like(wanted, feature), [], [], torch.zeros(1).long()
            )

        t = self._index_of(name)
        request, plan = self._exchange(f"read {name}", ask, False)
        g = next(g for g, group in enumerate(self._groups) if t in group.tables)
        if self.charge == "touch":
            return plan.rows[g][plan.slot].to(self.output_dtype)
        out = torch.empty(plan.slot.numel(), self.tables[t].dim, dtype=self.output_dtype)
        batch = request.batch
        _core.read(
            self._compiled[t],
            out,
            plan.rows[g],
            plan.slot,
            plan.prev_iters[g],
            batch.step,
            batch.lrs[t],
            batch.epoch_start,
        )
        return out

    # ------------------------------------------------------------------------------- exchange

    def _send(self, purpose: str, data: Tensor, to: Sequence[int], get: Sequence[int]) -> Tensor:
        """Send ``to[r]`` rows of ``data`` to each rank; return the rows that came, by rank."""
        shape, dtype = data.shape[1:], data.dtype
        width = data[:1].numel() if len(data) else int(torch.Size(shape).numel())
        # As bytes: not every backend takes every dtype.
        out = data.contiguous().view(len(data), width).view(torch.uint8)
        back = torch.empty(sum(get), out.shape[1], dtype=torch.uint8)
        dist.all_to_all_single(back, out, list(get), list(to), group=self._group)
        self.wire_bytes[purpose] += (len(data) - to[self._rank]) * out.shape[1]
        return back.view(dtype).view(-1, *shape)

    def _fail_together(self, error: Exception | None) -> None:
        """Called on all ranks when one has failed: raise everywhere."""
        said: list[Any] = [None] * self._world
        mine = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(said, mine, group=self._group)
        if error is not None:
            raise error
        rank = next(r for r, s in enumerate(said) if s is not None)
        raise RuntimeError(f"rank {rank} raised, so no rank goes on: {said[rank]}")

    def _agree(self, error: Exception | None, mark: int = 0) -> None:
        """Raise on every rank if one has an error, or if their marks differ."""
        status = torch.tensor([error is not None, mark, -mark], dtype=torch.int64)
        dist.all_reduce(status, op=dist.ReduceOp.MAX, group=self._group)
        self.wire_bytes["status"] += status.numel() * 8
        failed, high, low = status.tolist()
        if failed:
            self._fail_together(error)
        if high != -low:
            raise ValueError(_DISAGREE)

    def _mark(self, what: str) -> int:
        """What must be the same on all ranks, as a number."""
        return _hash(what, self.clock, self.epoch_start, self._lrs()) >> 1

    def _exchange(
        self, what: str, ask: Callable[[], _Request], training: bool
    ) -> tuple[_Request, _Plan]:
        """Ask all ranks for rows and serve theirs, or raise on every rank."""
        world, groups, features = self._world, len(self._groups), len(self._dims)
        # A header for each rank: whether this rank failed, its mark, and the counts of what follows.
        # All of one size, whatever each rank is about to do.
        ends = [2, 2 + groups, 2 + groups + features, 2 + groups + 2 * features]
        header = torch.zeros(world, ends[-1], dtype=torch.int64)
        request, error, mark = None, None, 0
        try:
            mark = self._mark(what)
            request = ask()
            header[:, ends[0] : ends[1]] = request.wanted
            if training and self.sum_gradients == "owner":
                order, first, _ = self._pairs(request)
                cell = (request.owner * features + request.feature)[order]
                header[:, ends[1] : ends[2]] = _histogram(cell, world, features)
                header[:, ends[2] :] = _histogram(cell[first], world, features)
        except Exception as e:
            error = e
        header[:, 0] = int(error is not None)
        header[:, 1] = mark
        theirs = self._send("header", header, [1] * world, [1] * world)
        if bool(theirs[:, 0].any()):
            self._fail_together(error)
        assert request is not None
        if bool((theirs[:, 1] != mark).any()):
            raise ValueError(_DISAGREE)

        asked = request.wanted.tolist()
        serves = theirs[:, ends[0] : ends[1]].tolist()
        to, get = [sum(a) for a in asked], [sum(s) for s in serves]
        local = request.keys % self._span
        if self._span < 2**31:
            local = local.int()
        served = self._send("rows asked", local, to, get).long()

        rows, prev_iters = [], []
        slot = request.slot
        parts = self._by_group(request.keys % self._span)
        if len(parts) > 1:
            within = torch.empty_like(request.keys)
            for part in parts:
                within[part] = torch.arange(len(part))
            slot = within[slot]
        for g, (group, part) in enumerate(zip(self._groups, self._by_group(served), strict=True)):
            give, take = [s[g] for s in serves], [a[g] for a in asked]
            keys = served[part]
            stored = self._gather(group, keys, [p.detach() for p in self._parameters_list])
            rows.append(self._send("rows sent", stored, give, take))
            if self.charge == "read":
                touched = self._gather(group, keys, self._prev_iters)
                prev_iters.append(self._send("state sent", touched, give, take))
        lookups, bags = theirs[:, ends[1] : ends[2]], theirs[:, ends[2] :]
        return request, _Plan(asked, serves, lookups, bags, served, slot, rows, prev_iters)

    def _by_group(self, keys: Tensor) -> list[Tensor]:
        """Positions of each group's keys, in order."""
        if len(self._groups) == 1:
            return [torch.arange(len(keys))]
        ends = torch.tensor([g.end for g in self._groups])
        group = torch.bucketize(keys, ends, right=True)
        return [(group == g).nonzero().squeeze(1) for g in range(len(self._groups))]

    def _gather(self, group: _Group, keys: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        """Return what the group's tables hold for each key."""
        if len(group.tables) == 1:
            t = group.tables[0]
            return arrays[t].index_select(0, keys - self._base[t])
        like = arrays[group.tables[0]]
        out = torch.empty(len(keys), *like.shape[1:], dtype=like.dtype)
        for t in group.tables:
            of_table = (keys >= self._base[t]) & (keys < self._base[t] + self._chunks[t])
            here = of_table.nonzero().squeeze(1)
            out[here] = arrays[t].index_select(0, keys[here] - self._base[t])
        return out

    # -------------------------------------------------------------------------------- forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        batch_sizes: Sequence[int] | None = None,
    ) -> Any:
        """Look up this rank's batch. Collective.

        Args:
            indices: int32 or int64 ``[N]``: rows of each feature's whole table, features one after
                another.
            offsets: dtype of ``indices``, ``[features * B + 1]``; B is this rank's own and may be 0.
            per_sample_weights: float ``[N]``, with pooling "sum" only; differentiable. All ranks give
                them or none does.
            batch_sizes: bags of each feature, where they differ.

        Returns:
            The pooled rows of this rank's batch, as the base class.

        Raises:
            IndexError, TypeError, ValueError, RuntimeError: as the base class, on the rank with the bad
                input; RuntimeError with its message on the others.
            ValueError: if the ranks differ in clock, lr, epoch, mode or whether weights are given.
        """
        training = torch.is_grad_enabled() and self.training
        weights: Tensor | None = None
        ticket: Ticket | None = None

        def ask() -> _Request:
            nonlocal weights, ticket
            self._sync()
            weights = self._taken_weights(per_sample_weights, indices)
            request = self._request(indices, offsets, batch_sizes)
            if training:
                ticket = self._take_ticket()
            return request

        what = f"{'train' if training else 'look up'}, weights {per_sample_weights is not None}"
        with torch.no_grad():
            request, plan = self._exchange(what, ask, training)
        if training or (torch.is_grad_enabled() and weights is not None and weights.requires_grad):
            anchor = self._anchor if training else self._anchor.detach()
            out = _Lookup.apply(anchor, self, ticket, request, plan, weights)
            if ticket is not None:
                self._outstanding = weakref.ref(ticket)
        else:
            out = self._pool(request, plan, weights)
        return self._shape(out, request.offsets, request.batch.batch_sizes)

    def _taken_weights(self, weights: Tensor | None, indices: Tensor) -> Tensor | None:
        if weights is None:
            return None
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(f"per_sample_weights: got {weights!r}, accepted: a float tensor")
        if self.pooling != "sum":
            raise ValueError(
                f"per_sample_weights: given with pooling={self.pooling!r}, accepted: with "
                "pooling='sum' only"
            )
        if weights.shape != indices.shape:
            raise ValueError(
                f"per_sample_weights: got shape {list(weights.shape)}, accepted: one per index, "
                f"{list(indices.shape)}"
            )
        return plain(weights.float())

    def _request(
        self, indices: Tensor, offsets: Tensor, batch_sizes: Sequence[int] | None
    ) -> _Request:
        """Check a batch, and find where its rows are."""
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
        features = len(self._dims)
        bags, count = offsets.numel() - 1, indices.numel()
        if count >= 2**30:
            raise ValueError(f"indices: got {count}, accepted: fewer than 2**30 in one batch")
        if bags < 0 or (batch_sizes is None and bags % features):
            raise ValueError(
                f"offsets: got length {bags + 1}, accepted: {features} features * batch + 1"
            )
        sizes = None if batch_sizes is None else self._batch_sizes(batch_sizes, offsets)
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
        batch = Batch(sizes, self.clock + 1, self.epoch_start, self._lrs())
        return self._located(batch, indices.long(), feature, each, counts.tolist(), offsets)

    def _located(
        self,
        batch: Batch,
        rows: Tensor,
        feature: Tensor,
        sizes: list[int],
        counts: list[int],
        offsets: Tensor,
    ) -> _Request:
        outside = (rows < 0) | (rows >= self._feature_rows[feature])
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            table = self._feature_tables[int(feature[at])]
            raise IndexError(
                f"indices: got {int(rows[at])} at position {at} of table "
                f"'{self.tables[table].name}', accepted: 0 to {self._whole[table] - 1}"
            )
        chunk = self._feature_chunk[feature]
        owner = rows // chunk
        key = owner * self._span + self._feature_base[feature] + rows - owner * chunk
        keys, slot = torch.unique(key, return_inverse=True)
        starts = torch.tensor(
            [r * self._span + g.begin for r in range(self._world) for g in self._groups]
            + [self._world * self._span]
        )
        wanted = torch.searchsorted(keys, starts).diff().view(self._world, len(self._groups))
        return _Request(batch, sizes, counts, offsets, feature, owner, keys, slot, wanted)

    def _on_loan(
        self, batch: Batch, plan: _Plan
    ) -> tuple[list[Tensor], list[Tensor], list[_core.Update], list[float]]:
        """Return the fetched rows as the tables that the kernels look up in, with their policies."""
        first = [group.tables[0] for group in self._groups]
        return (
            plan.rows,
            plan.prev_iters,
            [self._compiled[t] for t in first],
            [batch.lrs[t] for t in first],
        )

    def _pool(self, request: _Request, plan: _Plan, weights: Tensor | None) -> Tensor:
        batch, dims = request.batch, self._dims
        shape: tuple[int, ...]
        if self.pooling == "none":
            shape = (sum(n * d for n, d in zip(request.counts, dims, strict=True)),)
        elif batch.batch_sizes is not None:
            shape = (sum(b * d for b, d in zip(request.sizes, dims, strict=True)),)
        else:
            shape = (request.sizes[0], sum(dims))
        out = torch.empty(shape, dtype=self.output_dtype)
        self._borrowed.lookup(
            *self._on_loan(batch, plan),
            plan.slot,
            request.offsets,
            None if weights is None else weights.detach(),
            batch.batch_sizes,
            self.pooling,
            self.charge == "read",
            batch.step,
            batch.epoch_start,
            out,
        )
        return out

    # ------------------------------------------------------------------------------- backward

    def _borrowed_weight_gradients(self, request: _Request, plan: _Plan, grad: Tensor) -> Tensor:
        batch = request.batch
        out = torch.empty(plan.slot.numel(), dtype=torch.float32)
        self._borrowed.weight_gradients(
            *self._on_loan(batch, plan),
            plan.slot,
            request.offsets,
            batch.batch_sizes,
            self.pooling,
            self.charge == "read",
            batch.step,
            batch.epoch_start,
            grad,
            out,
        )
        return out

    def _backward(
        self,
        ticket: Ticket,
        versions: tuple[int, ...],
        request: _Request,
        plan: _Plan,
        weights: Tensor | None,
        grad: Tensor,
    ) -> None:
        """Send gradients to the owners of their rows and update the rows owned here."""
        error: Exception | None = None
        step = mark = 0
        try:
            if ticket.used:
                raise RuntimeError(
                    "this forward has had its backward, which updated the tables; each takes one"
                )
            check_same_tables(versions[0], self)
            step = self._next_step()
            mark = self._mark(f"update, scale {self.grad_scale}")
            if self.grad_scale != 1.0:
                grad = grad.float() / number("grad_scale", self.grad_scale, low_open=True)
        except Exception as e:
            error = e
        self._agree(error, mark)
        ticket.used = True
        gradients = self._bag_gradients if self.sum_gradients == "owner" else self._row_gradients
        native, rows, offsets, scales, sizes, grads = gradients(request, plan, weights, grad)

        def update(mode: str, check_only: bool) -> None:
            native.update(
                self._parameters_list,
                self._optimizer_states,
                self._prev_iters,
                self._compiled,
                self._lrs(),
                rows,
                offsets,
                scales,
                sizes,
                "sum",
                step,
                self.epoch_start,
                grads,
                mode,
                check_only,
                self._clock,
                self._nonfinite,
            )

        mode = self.on_nonfinite
        if mode == "raise":  # nothing is written unless every rank can
            try:
                update("raise", True)
            except ValueError as e:
                error = e
            self._agree(error)
            mode = "skip"
        update(mode, False)
        self._stepped()

    def _pairs(self, request: _Request) -> tuple[Tensor, Tensor, Tensor]:
        """Return the lookups by owner, whether each is its bag's first there, and their bags.

        Within an owner they keep the order of the batch. (A bag's gradient goes once to each rank that
        owns rows of it.)
        """
        order = torch.argsort(request.owner, stable=True)
        if self.pooling == "none":
            return order, torch.ones_like(order, dtype=torch.bool), order
        lengths = request.offsets.diff()
        bag = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[order]
        owner = request.owner[order]
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = (bag[1:] != bag[:-1]) | (owner[1:] != owner[:-1])
        return order, first, bag

    def _by_feature(self, request: _Request, grad: Tensor) -> list[Tensor]:
        """Views of the output's gradient: ``[bags or indices, D]`` of each feature."""
        dims, sizes = self._dims, request.sizes
        if self.pooling == "none":
            sizes = request.counts
        elif request.batch.batch_sizes is None:
            return list(grad.split(dims, dim=1))
        parts = grad.view(-1).split([n * d for n, d in zip(sizes, dims, strict=True)])
        return [part.view(-1, d) for part, d in zip(parts, dims, strict=True)]

    def _bag_gradients(
        self, request: _Request, plan: _Plan, weights: Tensor | None, grad: Tensor
    ) -> tuple[Any, ...]:
        """Exchange gradients by bag: what to update here, in the order of the joined batch."""
        world, dims = self._world, self._dims
        order, first, bag = self._pairs(request)
        to = torch.bincount(request.owner, minlength=world).tolist()
        get = plan.lookups.sum(1)

        # The lookups: which of the rows asked of that rank, and whether a new bag begins.
        asked = request.wanted.sum(1)
        code = 2 * (request.slot - _starts(asked)[request.owner])[order] + first
        code = self._send("gradients", code.int(), to, get.tolist()).long()
        scales = None
        if weights is not None:
            scales = weights.detach()[order]
        elif self.pooling == "mean":
            lengths = request.offsets.diff()[bag].float()
            scales = torch.ones_like(lengths) / lengths
        if scales is not None:
            scales = self._send("gradients", scales, to, get.tolist())

        # From (rank, feature) order to that of the joined batch, (feature, rank).
        lookup_feature = _labels(plan.lookups)
        by_feature = torch.argsort(lookup_feature, stable=True)
        lookup_feature = lookup_feature[by_feature]
        serves = torch.tensor(plan.serves).sum(1)
        key = plan.served[(code // 2 + torch.repeat_interleave(_starts(serves), get))[by_feature]]
        rows = key - self._feature_base[lookup_feature]
        begins = (code % 2)[by_feature].nonzero().squeeze(1)
        offsets = torch.cat([begins, torch.tensor([len(code)])])
        if scales is not None:
            scales = scales[by_feature]

        # The gradients of the bags, features of one width at a time.
        parts = self._by_feature(request, grad)
        starts = _starts(torch.tensor([len(part) for part in parts]))
        pair_feature = request.feature[order][first]
        pair_row = bag[first] - starts[pair_feature]
        pair_owner = request.owner[order][first]
        bags = plan.bags.sum(0).tolist()
        ends = list(
            itertools.accumulate((n * d for n, d in zip(bags, dims, strict=True)), initial=0)
        )
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
            back = self._send(
                "gradients",
                out,
                torch.bincount(pair_owner[chosen], minlength=world).tolist(),
                counts.sum(1).tolist(),
            )
            position = torch.argsort(_labels(counts), stable=True)
            for f, here in zip(of_width, position.split(counts.sum(0).tolist()), strict=True):
                grads[ends[f] : ends[f + 1]].view(-1, width).copy_(back[here])
        return self._native, rows, offsets, scales, bags, grads

    def _row_gradients(
        self, request: _Request, plan: _Plan, weights: Tensor | None, grad: Tensor
    ) -> tuple[Any, ...]:
        """Exchange gradients summed by row: what to update here, rank after rank."""
        # A step of SGD with lr 1 on zeros is minus the sum.
        asked = request.wanted.sum(0).tolist()
        dims = [self.tables[group.tables[0]].dim for group in self._groups]
        sums = [torch.zeros(n, dim) for n, dim in zip(asked, dims, strict=True)]
        self._borrowed.update(
            sums,
            [[] for _ in sums],
            [torch.zeros(len(s), dtype=torch.int32) for s in sums],
            [compiled(RowUpdate(SGD()))] * len(sums),
            [1.0] * len(sums),
            plan.slot,
            request.offsets,
            None if weights is None else weights.detach(),
            request.batch.batch_sizes,
            self.pooling,
            1,
            0,
            grad,
            "propagate",
        )
        local: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(self.tables)
        values: list[Tensor] = [torch.empty(0)] * len(self.tables)
        for g, (group, part) in enumerate(
            zip(self._groups, self._by_group(plan.served), strict=True)
        ):
            to, get = [a[g] for a in plan.asked], [s[g] for s in plan.serves]
            back = self._send("gradients", sums[g].neg_(), to, get)
            keys = plan.served[part]
            for t in group.tables:
                here = (keys >= self._base[t]) & (keys < self._base[t] + self._chunks[t])
                local[t] = keys[here] - self._base[t]
                values[t] = back[here].flatten()
        rows = torch.cat(local)
        sizes = [len(r) for r in local]
        return self._unshared, rows, torch.arange(len(rows) + 1), None, sizes, torch.cat(values)

    # ----------------------------------------------------------------------------- checkpoints

    def _device_mesh(self) -> DeviceMesh:
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self._group, "cpu")
        return self._mesh

    def _sharded_keys(self) -> dict[str, int]:
        """Names in the state_dict of what has one entry per row, with their tables."""
        keys = {f"weights.{t.name}": i for i, t in enumerate(self.tables)}
        for i, table in enumerate(self.tables):
            keys |= {f"state.{table.name}.{n}": i for n in self._state_views[table.name]}
        return keys

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key, t in self._sharded_keys().items():
            given = state_dict.get(prefix + key)
            if not isinstance(given, Tensor) or len(given.shape) == 0:
                continue  # reported by the base class
            if len(given) != self._whole[t]:
                continue
            if isinstance(given, DTensor):
                if (
                    tuple(given.placements) != (Shard(0),)
                    or given.device_mesh.size() != self._world
                ):
                    given = given.full_tensor()
                else:
                    state_dict[prefix + key] = self._padded(key, t, given.to_local())
                    continue
            own = given[self._first[t] : self._first[t] + self._own[t]]
            state_dict[prefix + key] = self._padded(key, t, own)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _padded(self, key: str, t: int, own: Tensor) -> Tensor:
        """Return the rows of a table that has none here as it is kept: one that nothing refers to."""
        if self._own[t] > 0 or len(own) > 0:
            return own
        return own.new_zeros(1, *own.shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        if not self._default_group:
            raise TypeError(
                "RowShardedEmbeddingBags: accepted for pickling: the default group only"
            )
        derived = ("_group", "_mesh", "_borrowed", "_unshared")
        return {k: v for k, v in super().__getstate__().items() if k not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["_group"], self.__dict__["_mesh"] = dist.group.WORLD, None
        super().__setstate__(state)


_DISAGREE = (
    "the ranks differ in clock, lr, epoch, grad_scale, in what they are doing (train, evaluate, read) or "
    "in whether per_sample_weights are given; accepted: the same on all ranks"
)


def _shard_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Make DTensors of a state_dict's tables and row state (they share memory with the tables)."""
    assert isinstance(module, RowShardedEmbeddingBags)
    for key, t in module._sharded_keys().items():
        own = state_dict[prefix + key].detach()[: module._own[t]]
        state_dict[prefix + key] = DTensor.from_local(
            own,
            module._device_mesh(),
            [Shard(0)],
            run_check=False,
            shape=torch.Size([module._whole[t], *own.shape[1:]]),
            stride=own.stride(),
        )


def _hash(*values: Any) -> int:
    """Return 64 bits that are the same in every process."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _histogram(cell: Tensor, world: int, features: int) -> Tensor:
    return torch.bincount(cell, minlength=world * features).view(world, features)


def _starts(counts: Tensor) -> Tensor:
    """Return where each of several consecutive parts begins."""
    return counts.cumsum(0) - counts


def _labels(counts: Tensor) -> Tensor:
    """Return the column of each element of consecutive parts, ``counts[row, column]`` long."""
    rows, columns = counts.shape
    return torch.repeat_interleave(torch.arange(columns).repeat(rows), counts.flatten())


def _row_numbers(rows: Any, within: range) -> Tensor:
    """Return ``rows`` as int64 ``[n]``, or raise unless all are in ``within``."""
    if isinstance(rows, range):
        rows = torch.arange(rows.start, rows.stop)
    rows = torch.as_tensor(rows)
    if rows.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
        raise TypeError(
            f"rows: got {rows.dtype} of shape {list(rows.shape)}, accepted: int32 or int64 [n]"
        )
    low, high = int(rows.min()), int(rows.max())
    if low < within.start or high >= within.stop:
        raise IndexError(
            f"rows: got {low if low < within.start else high}, accepted: {within.start} to "
            f"{within.stop - 1}"
        )
    numbers: Tensor = rows.long()
    return numbers
