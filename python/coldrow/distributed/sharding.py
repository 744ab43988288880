"""The module: what each rank calls with its own batch."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from coldrow._checks import integer, number, one_of
from coldrow.distributed import state_dict
from coldrow.distributed.exchange import DISAGREE, Ranks, hash64
from coldrow.distributed.gradients import by_bag, by_row
from coldrow.distributed.request import (
    Plan,
    Request,
    checked_weights,
    histogram,
    located,
    request_of,
    shard_of,
)
from coldrow.distributed.shards import Shards
from coldrow.nn.autograd import Ticket, once, plain
from coldrow.nn.module import TableBatchedEmbeddingBags
from coldrow.nn.table import Origin, Table
from coldrow.nn.table_batch import row_numbers
from coldrow.policies import RowUpdate

# Rows are initialised in blocks of so many, each with random numbers of its own.
_BLOCK = 4096


class _Lookup(torch.autograd.Function):
    """Forward: pool the rows that came. Backward: send gradients, update the rows asked of us."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        module: RowShardedEmbeddingBags,
        shards: Shards,
        ticket: Ticket | None,
        request: Request,
        plan: Plan,
        weights: Tensor | None,
    ) -> Tensor:
        """Pool; ``anchor`` requires grad so that autograd calls the backward."""
        borrowed = shards.borrowed(plan)
        out = borrowed.lookup(request.moment, plan.slot, request.offsets, weights)
        ctx.module, ctx.shards, ctx.ticket = module, shards, ticket
        ctx.request, ctx.plan = request, plan
        ctx.save_for_backward(weights)
        if not ctx.needs_input_grad[6]:
            plan.rows, plan.prev_iters = [], []
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Update the tables of all ranks; return the gradient of per_sample_weights."""
        (weights,) = ctx.saved_tensors
        grad = plain(grad)
        weights_grad = None
        if ctx.needs_input_grad[6]:
            borrowed, request = ctx.shards.borrowed(ctx.plan), ctx.request
            weights_grad = borrowed.weight_gradients(
                request.moment, ctx.plan.slot, request.offsets, grad
            )
        if ctx.ticket is not None:
            ctx.module.update_rows(ctx.ticket, ctx.shards, ctx.request, ctx.plan, weights, grad)
        return None, None, None, None, None, None, weights_grad


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

    Raises:
        RuntimeError: if torch.distributed is not initialised.
        ValueError: if ranks were given different tables or options.
    """

    devices = ("cpu",)

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
        if dist.get_rank(group) < 0:
            raise ValueError("process_group: this process is not in it, accepted: a group it is in")
        tables = list(tables)
        if not all(isinstance(t, Table) for t in tables):
            raise TypeError(f"tables: got {tables!r}, accepted: a non-empty list of Table")
        if any(t.storage is not None or t.origin is not None for t in tables):
            raise ValueError(
                "tables: got one with storage or origin, accepted: whole tables, whose rows are drawn"
            )
        ranks, whole = Ranks(group), [t.num_rows for t in tables]
        shards = [shard_of(t.num_rows, ranks.world, ranks.rank) for t in tables]
        super().__init__(
            # Filled below, when the seed is known. A table has one row at least.
            [
                replace(
                    t,
                    num_rows=max(len(shard), 1),
                    init=nn.init.zeros_,
                    origin=Origin(t.name, shard.start),
                )
                for t, shard in zip(tables, shards, strict=True)
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
        self._ranks = ranks
        self._whole = whole  # rows of each whole table
        self._shards: Shards | None = None
        self.sum_gradients = sum_gradients
        self._default_group = process_group is None
        self._mesh: DeviceMesh | None = None
        self.register_state_dict_post_hook(_shard_state_dict)

        layouts = self.table_batch.layout.tables
        described = repr(
            [
                (t.name, n, t.dim, t.dtype, t.features, layout.update.to_dict())
                for t, n, layout in zip(self.tables, whole, layouts, strict=True)
            ]
            + [pooling, charge, output_dtype, on_nonfinite, sum_gradients]
        )
        given = ranks.all_of((described, torch.initial_seed() if seed is None else seed))
        for r, (theirs, _) in enumerate(given):
            if theirs != given[0][0]:
                raise ValueError(
                    f"tables: rank {r} has {theirs}, accepted: rank 0's, {given[0][0]}"
                )
        self.seed = int(given[0][1])
        for t, (weight, shard) in enumerate(zip(self.weights.values(), shards, strict=True)):
            if len(shard):
                weight.data.copy_(self._drawn(t, shard.start, shard.stop))

    @classmethod
    def from_torch(
        cls, module: nn.EmbeddingBag | nn.Embedding, update: RowUpdate | None = None, **kwargs: Any
    ) -> RowShardedEmbeddingBags:
        """Refuse: build it, then ``load_state_dict`` whole tables."""
        raise NotImplementedError(
            "from_torch: accepted: build RowShardedEmbeddingBags, then load_state_dict() with the "
            "state_dict of TableBatchedEmbeddingBags.from_torch()"
        )

    @property
    def shards(self) -> Shards:
        """What follows from the tables as they are now, and from what other ranks have."""
        tables = self.table_batch
        if self._shards is None or self._shards.tables is not tables:
            self._shards = Shards(tables, self.tables, self._whole, self._ranks)
        return self._shards

    @property
    def wire_bytes(self) -> Counter[str]:
        """Bytes this rank has sent to others, by purpose.

        "header", "rows asked", "rows sent", "state sent", "gradients", "status".
        """
        return self._ranks.wire_bytes

    # ---------------------------------------------------------------------------------- rows

    def shard(self, name: str) -> range:
        """Return the rows of a table that this rank owns."""
        t, placement = self.table_batch.index_of(name), self.shards.placement
        return range(placement.first[t], placement.first[t] + placement.own[t])

    def _drawn(self, t: int, lo: int, hi: int, salt: int = 0) -> Tensor:
        """Return rows [lo, hi) as the initialiser makes them, whatever the number of ranks."""
        table, rows = self.tables[t], self._whole[t]
        out = torch.empty(hi - lo, table.dim, dtype=table.dtype)
        with torch.random.fork_rng(devices=[]):
            for start in range(lo // _BLOCK * _BLOCK, hi, _BLOCK):
                torch.manual_seed(hash64(self.seed, table.name, start, salt))
                block = torch.empty(min(_BLOCK, rows - start), table.dim, dtype=table.dtype)
                table.fill(block)
                first, last = max(lo, start), min(hi, start + _BLOCK)
                out[first - lo : last - lo] = block[first - start : last - start]
        return out

    def cold_rows(self, name: str, min_gap: int) -> Tensor:
        """Return this rank's rows (int64 ``[n]``, numbered through the whole table) untouched so long."""
        cold = super().cold_rows(name, min_gap)
        shard = self.shard(name)
        return cold[cold < len(shard)] + shard.start

    def evict(self, name: str, rows: Tensor | Sequence[int]) -> None:
        """Re-initialise rows of this rank and zero their state; not collective.

        Args:
            name: the table.
            rows: rows of the whole table, each in :meth:`shard`, as :meth:`cold_rows` returns them.
        """
        tables = self.table_batch
        t, shard = tables.index_of(name), self.shard(name)
        numbers = row_numbers(rows, shard).long()
        weight = tables.weights[t].detach()
        fresh = torch.empty(len(numbers), weight.shape[1], dtype=weight.dtype)
        block = numbers // _BLOCK
        for b in block.unique().tolist():
            here = block == b
            these = numbers[here]
            first, last = int(these.min()), int(these.max()) + 1
            fresh[here] = self._drawn(t, first, last, self.clock + 1)[these - first]
        with tables.held(write=True):  # (the initialiser has not failed)
            weight[numbers - shard.start] = fresh
            for view in self.state[name].values():
                view[numbers - shard.start] = 0
            self.rewritten()

    @torch.no_grad()
    def read(self, name: str, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return rows as a forward would read them now, changing nothing. Collective.

        Args:
            name: the table, the same on all ranks.
            rows: int32 or int64 ``[n]``, of the whole table, what each rank likes; default all.

        Returns:
            ``[n, D]`` of ``output_dtype``.
        """
        t = self.table_batch.index_of(name)

        def ask(shards: Shards) -> Request:
            placement = shards.placement
            every = range(placement.whole[t])
            wanted = row_numbers(every if rows is None else rows, every).long()
            feature = placement.layout.features.index(t)
            nothing = torch.zeros(1, dtype=torch.int64)
            features = torch.full_like(wanted, feature)
            return located(placement, shards.moment(None), wanted, features, [], [], nothing)

        shards, _, plan = self._exchange(f"read {name}", ask, False)
        return shards.borrowed(plan).read(shards.placement.group_of[t], plan.slot)

    # ------------------------------------------------------------------------------- exchange

    def _mark(self, what: str, shards: Shards) -> int:
        """What must be the same on all ranks, as a number."""
        lrs = shards.tables.counters.lr_values()
        return hash64(what, self.clock, self.epoch_start, lrs, shards.agreed) >> 1

    def _exchange(
        self, what: str, ask: Callable[[Shards], Request], training: bool
    ) -> tuple[Shards, Request, Plan]:
        """Ask all ranks for rows and serve theirs, or raise on every rank."""
        ranks = self._ranks
        world, features = ranks.world, len(self.layout.features)
        # A header for each rank: whether this rank failed, its mark, and the counts of what follows.
        # All of one size, whatever each rank is about to do.
        groups = len({(t.dim, t.dtype, t.update) for t in self.tables})
        ends = list(itertools.accumulate((2, groups, features, features)))
        header = torch.zeros(world, ends[-1], dtype=torch.int64)
        shards, request, error, mark = None, None, None, 0
        try:
            shards = self.shards
            placement = shards.placement
            mark = self._mark(what, shards)
            request = ask(shards)
            header[:, ends[0] : ends[1]] = request.wanted
            if training and self.sum_gradients == "owner":
                order, first, _ = request.pairs(placement.layout.pooling)
                cell = (request.owner * features + request.feature)[order]
                header[:, ends[1] : ends[2]] = histogram(cell, world, features)
                header[:, ends[2] :] = histogram(cell[first], world, features)
        except Exception as e:
            error = e
        header[:, 0] = int(error is not None)
        header[:, 1] = mark
        theirs = ranks.send("header", header, [1] * world, [1] * world)
        if bool(theirs[:, 0].any()):
            ranks.fail_together(error)
        assert shards is not None
        assert request is not None
        if bool((theirs[:, 1] != mark).any()):
            raise ValueError(DISAGREE)

        placement = shards.placement
        asked = request.wanted.tolist()
        serves = theirs[:, ends[0] : ends[1]].tolist()
        to, get = [sum(a) for a in asked], [sum(s) for s in serves]
        local = request.keys % placement.span
        if placement.span < 2**31:
            local = local.int()
        served = ranks.send("rows asked", local, to, get).long()

        rows, prev_iters = [], []
        slot = request.slot
        parts = placement.by_group(request.keys % placement.span)
        if len(parts) > 1:
            within = torch.empty_like(request.keys)
            for part in parts:
                within[part] = torch.arange(len(part))
            slot = within[slot]
        tables = shards.tables
        weights = [w.detach() for w in tables.weights]
        for g, (group, part) in enumerate(
            zip(placement.groups, placement.by_group(served), strict=True)
        ):
            give, take = [s[g] for s in serves], [a[g] for a in asked]
            keys = served[part]
            stored = placement.gather(group, keys, weights)
            rows.append(ranks.send("rows sent", stored, give, take))
            if tables.operands.read:
                touched = placement.gather(group, keys, tables.operands.prev_iters)
                prev_iters.append(ranks.send("state sent", touched, give, take))
        lookups, bags = theirs[:, ends[1] : ends[2]], theirs[:, ends[2] :]
        plan = Plan(asked, serves, lookups, bags, served, slot, rows, prev_iters)
        return shards, request, plan

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

        def ask(shards: Shards) -> Request:
            nonlocal weights, ticket
            layout = shards.tables.layout
            weights = checked_weights(per_sample_weights, indices, layout.pooling)
            sizes = None if batch_sizes is None else layout.batch_sizes(batch_sizes, offsets)
            request = request_of(shards.placement, shards.moment(sizes), indices, offsets)
            if training:
                ticket = self.begin_forward()
            return request

        what = f"{'train' if training else 'look up'}, weights {per_sample_weights is not None}"
        with torch.no_grad():
            shards, request, plan = self._exchange(what, ask, training)
        if training or (torch.is_grad_enabled() and weights is not None and weights.requires_grad):
            anchor = self.anchor if training else self.anchor.detach()
            out = _Lookup.apply(anchor, self, shards, ticket, request, plan, weights)
            self.hold(ticket)
        else:
            borrowed = shards.borrowed(plan)
            out = borrowed.lookup(request.moment, plan.slot, request.offsets, weights)
        layout = shards.tables.layout
        return layout.shaped(out, request.offsets, request.moment.batch_sizes)

    # ------------------------------------------------------------------------------- backward

    def update_rows(
        self,
        ticket: Ticket,
        shards: Shards,
        request: Request,
        plan: Plan,
        weights: Tensor | None,
        grad: Tensor,
    ) -> None:
        """Send gradients to the owners of their rows and update the rows owned here. Collective.

        ``shards`` are those of the forward: the batch was cut by them. Policies are those of now.
        """
        ranks, placement, now = self._ranks, shards.placement, shards
        error: Exception | None = None
        mark = 0
        taken = False
        try:
            ticket.take()
            taken = True
            self.current(shards.tables)
            now = self.shards
            now.tables.counters.next_step()
            self.stepping()
            mark = self._mark(f"update, scale {self.grad_scale}", now)
            if self.grad_scale != 1.0:
                grad = grad.float() / number("grad_scale", self.grad_scale, low_open=True)
        except Exception as e:
            error = e
        try:
            ranks.agree(error, mark)
        except Exception:
            if taken:
                ticket.give_back()
            raise
        if self.sum_gradients == "owner":
            served = now.served
            arrived = by_bag(ranks, placement, request, plan, weights, grad)
        else:
            served = now.served_by_row
            arrived = by_row(ranks, placement, shards.summing, request, plan, weights, grad)
        batch = (arrived.sizes, arrived.rows, arrived.offsets, arrived.weights, arrived.grad)
        mode = self.on_nonfinite
        if mode == "raise":  # nothing is written unless every rank can
            try:
                served.update(*batch, on_nonfinite="raise", check_only=True)
            except ValueError as e:
                error = e
            ranks.agree(error)
            mode = "skip"
        served.update(*batch, on_nonfinite=mode)
        self.stepped()

    # ----------------------------------------------------------------------------- checkpoints

    def device_mesh(self) -> DeviceMesh:
        """Return the ranks as a mesh."""
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self._ranks.group, "cpu")
        return self._mesh

    def row_keys(self) -> dict[str, int]:
        """Return the keys of the state_dict for what has one entry per row, with their tables."""
        keys = {f"weights.{t.name}": i for i, t in enumerate(self.tables)}
        for i, table in enumerate(self.tables):
            keys |= {f"state.{table.name}.{n}": i for n in self.state[table.name]}
        return keys

    def _load_from_state_dict(self, given: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.unshard(given, prefix, self.row_keys(), self.shards.placement)
        super()._load_from_state_dict(given, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        if not self._default_group:
            raise TypeError(
                "RowShardedEmbeddingBags: accepted for pickling: the default group only"
            )
        derived = ("_ranks", "_mesh", "_shards")
        return {k: v for k, v in super().__getstate__().items() if k not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = dist.group.WORLD
        assert group is not None
        super().__setstate__(state)
        self._ranks, self._mesh, self._shards = Ranks(group), None, None


def _shard_state_dict(
    module: nn.Module, given: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    assert isinstance(module, RowShardedEmbeddingBags)
    keys, mesh = module.row_keys(), module.device_mesh()
    state_dict.shard(given, prefix, keys, module.shards.placement, mesh)
