"""Table-batched embedding bags for torch: the lookup, and how it trains."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coldrow._checks import LAST_STEP, integer, one_of, require_dense
from coldrow.nn import ops
from coldrow.nn.autograd import Asked, FusedLookup, SparseLookup, Ticket, plain
from coldrow.nn.table import Table
from coldrow.nn.table_batch import TableBatch
from coldrow.nn.tables import TablesModule, require_own
from coldrow.policies import RowUpdate


class TableBatchedEmbeddingBags(TablesModule):
    """Several embedding tables looked up and trained together.

    Calling it returns ``[B, sum of D over features]`` (pooling "sum" or "mean"); with ``batch_sizes``
    a flat tensor, feature after feature, each ``[B_f, D_f]``; with pooling "none" ``[indices, D]``, or
    one such tensor per feature where the tables differ in D. Empty bags give zeros.

    With ``fused=True`` the backward updates the rows it reaches (no ``.grad``, no ``step()``): one
    training forward may be outstanding, and each takes one backward. With ``fused=False`` the backward
    leaves sparse gradients on the tables until :meth:`step`, so gradients can accumulate over several
    forwards. In eval mode and under ``no_grad`` nothing is ever updated; ``requires_grad`` of a fused
    table is always False and freezes nothing.

    Args:
        tables: :class:`Table` objects; names and features are unique.
        update: what a touch does; a table's own ``update`` overrides it.
        pooling: "sum", "mean" or "none".
        charge: "touch": the forward reads stored rows and decay is paid when a row is updated.
            "read": the forward reads each row with the decay it owes; the update pays.
        device: where the tables live: "cpu", or a CUDA device where :func:`coldrow.cuda.is_available`.
        output_dtype: torch.float32, torch.float16 or torch.bfloat16.
        fused: see above.
        on_nonfinite: rows whose update would not be finite: "skip" (left alone and counted in
            ``nonfinite_rows``; the clock ticks), "raise" (nothing is written) or "propagate".
        validate: when what is wrong with a batch's values is raised on a CUDA device: "deferred", by
            :meth:`check`, so that nothing waits; or "sync", at once. Such a batch reads zeros and changes
            nothing, whichever. A CPU module always raises at once.
        state_layout: "record" (one record per row) or "split" (contiguous arrays).
        feature_order: the names of all features, in the order in which a batch has them; default: that of
            the tables.

    ``pooling``, ``charge``, ``output_dtype``, ``on_nonfinite`` and ``update`` may be assigned and hold from the
    next call on; a new ``update`` needs the same state. ``fused``, ``validate`` and ``state_layout`` are fixed.

    Attributes:
        weights: tables by name, ``[E, D]``, live and writable.
        state: live, writable views of the optimizer state by table and name: ``state["user"]["momentum1"]``;
            float32 ``[rows]``, or ``[rows, dim]`` where it is element-wise; ``prev_iter`` int32 ``[rows]``.
        strict_policies: refuse a checkpoint whose policies differ from the module's.
    """

    _outstanding: weakref.ref[Ticket] | None = None  # the training forward that waits

    @classmethod
    def from_torch(
        cls, module: nn.EmbeddingBag | nn.Embedding, update: RowUpdate | None = None, **kwargs: Any
    ) -> TableBatchedEmbeddingBags:
        """Return a module of one table, "weight", with a copy of an nn.EmbeddingBag's weights.

        Args:
            module: its ``mode`` becomes the pooling ("none" for nn.Embedding); the table is on its device.
            update: what a touch does.
            **kwargs: passed on, e.g. ``charge="read"``.

        Raises:
            ValueError: for ``mode="max"``, ``max_norm``, ``padding_idx`` or
                ``scale_grad_by_freq=True``, which have no counterpart.
        """
        if not isinstance(module, (nn.EmbeddingBag, nn.Embedding)):
            raise TypeError(f"module: got {module!r}, accepted: an nn.EmbeddingBag or nn.Embedding")
        pooling = module.mode if isinstance(module, nn.EmbeddingBag) else "none"
        one_of("mode", pooling, ("sum", "mean", "none"))
        for option in ("max_norm", "padding_idx", "scale_grad_by_freq"):
            given = getattr(module, option, None)
            if given is not None and given is not False:  # padding_idx=0 counts
                raise ValueError(f"{option}: got {given!r}, accepted: none")
        source = module.weight.detach()
        rows, dim = source.shape
        emb = cls(
            [Table("weight", rows, dim, dtype=source.dtype, init=nn.init.zeros_)],
            update,
            **{"pooling": pooling, "device": source.device, **kwargs},
        )
        emb.tables[0].init = None  # rows evicted later are drawn anew, not zeroed
        with torch.no_grad():
            emb.weights["weight"].copy_(source)
        return emb

    # ------------------------------------------------------------------------------------ forward

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        batch_sizes: Sequence[int] | None = None,
    ) -> Any:
        """Look up a batch.

        Args:
            indices: int32 or int64 ``[N]``: rows within each feature's table, features one after
                another.
            offsets: dtype of ``indices``, ``[features * B + 1]``: bag b is
                ``indices[offsets[b]:offsets[b + 1]]``; never decreasing, from 0 to N.
            per_sample_weights: float ``[N]``, with pooling "sum" only; differentiable.
            batch_sizes: bags of each feature, where they differ; ``offsets`` then has
                ``sum(batch_sizes) + 1`` entries.

        Returns:
            The pooled rows; see the class.

        Raises:
            IndexError: an index outside its table.
            TypeError, ValueError: other bad input.
            RuntimeError: a second training forward before the backward of the first (``fused=True``).
        """
        for name, value in (("indices", indices), ("offsets", offsets)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, accepted: a torch tensor")
            require_dense(name, value)
            if value.dim() != 1:
                raise ValueError(
                    f"{name}: got shape {list(value.shape)}, accepted: one dimension (concatenate "
                    "the features; 2-D input is not supported)"
                )
        if offsets.numel() == 0:
            raise ValueError("offsets: got no elements, accepted: number of bags + 1")
        weights = per_sample_weights
        if weights is not None:
            if not isinstance(weights, Tensor) or not weights.is_floating_point():
                raise TypeError(f"per_sample_weights: got {weights!r}, accepted: a float tensor")
            require_dense("per_sample_weights", weights)
            weights = weights.float()
        layout = self.layout
        sizes = None if batch_sizes is None else layout.batch_sizes(batch_sizes, offsets)
        if not ops.is_traced():
            return self._eager(indices, offsets, weights, sizes)
        one_tensor = self.pooling != "none" or layout.width is not None
        sparse = not self.fused and torch.is_grad_enabled()
        if one_tensor and not (sparse and (self.training or torch.compiler.is_compiling())):
            return self._traced(indices, offsets, weights, sizes)
        if torch.compiler.is_compiling():
            return self._untraced(indices, offsets, weights, sizes)
        raise NotImplementedError(
            "a traced forward of these tables would leave sparse gradients (fused=False) or return several "
            "tensors (pooling='none' with tables of different D), accepted: trace in eval mode or under "
            "no_grad, tables of one D"
        )

    def _traced(
        self,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        sizes: tuple[int, ...] | None,
    ) -> Any:
        """Look up through an operator, for torch.compile, torch.export, torch.jit.trace and make_fx."""
        train = self.training and torch.is_grad_enabled()
        if weights is not None:
            weights = weights.resolve_neg().contiguous()  # plain() asks what cannot be traced
        # The module's own parameters and buffers as they are when the program runs, or what
        # functional_call has put there.
        tables = self.weights.tensors()
        require_own(tables, fused=self.fused, train=train)
        buffers = self._buffers
        out = torch.ops.coldrow.lookup(
            self.anchor if train else buffers["_grad_scale"],  # (any that asks for no gradient)
            [p.detach() for p in tables],
            self.state.tensors() if train or self.charge == "read" else [],
            buffers["lr"],
            buffers["clock"],
            buffers["epoch_start"],
            buffers["_nonfinite_rows"],
            buffers["_grad_scale"],
            indices.resolve_neg().contiguous(),
            offsets.resolve_neg().contiguous(),
            weights,
            sizes,
            train,
            self.spec,
        )
        return self.layout.shaped(out, offsets, sizes)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _untraced(self, *args: Any) -> Any:
        """Look up outside the graph that is being traced."""
        return self._eager(*args)

    def _eager(
        self,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        sizes: tuple[int, ...] | None,
    ) -> Any:
        tables = self.table_batch
        indices, offsets = plain(indices), plain(offsets)
        weights = None if weights is None else plain(weights)
        layout = tables.layout
        learns = weights is not None and weights.requires_grad
        # The gradient of per_sample_weights is that of the rows as they are read now.
        moment = tables.moment(sizes, keep=learns and tables.operands.read)
        if torch.is_grad_enabled() and (self.training or learns or not self.fused):
            out = self._recorded(tables, moment, indices, offsets, weights)
        else:
            out = tables.lookup(moment, indices, offsets, weights)
        if layout.pooling != "none":
            return out
        if layout.width is None:
            self.check()  # sizes are asked of the device, so this waits anyway
        return layout.shaped(out, offsets, sizes)

    def _recorded(
        self,
        tables: TableBatch,
        moment: Any,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        """Look up in a way that autograd knows of."""
        owner = self if self.owns(tables) else None  # None: arrays put there for one call
        asked: Asked
        if not self.fused:
            asked = (owner, tables, None, moment, indices, offsets)
            out: Tensor = SparseLookup.apply(asked, weights, *tables.weights)
            return out
        ticket = self.begin_forward() if self.training else None
        asked = (owner, tables, ticket, moment, indices, offsets)
        anchor = self.anchor if self.training else self.anchor.detach()
        out = FusedLookup.apply(anchor, weights, asked)
        self.hold(ticket)
        return out

    # ------------------------------------------------------------------------------------ training

    def begin_forward(self) -> Ticket:
        """Return the ticket of a training forward, or raise where another waits for its backward."""
        outstanding = self._outstanding() if self._outstanding is not None else None
        if outstanding is None or outstanding.used:
            return Ticket()
        if torch._C._current_graph_task_id() != -1:
            # Activation checkpointing runs the forward again, inside its backward.
            return outstanding
        raise RuntimeError(
            "a training forward of these tables is waiting for its backward, which will update them; "
            "a fused module takes one forward per step. Build it with fused=False for several "
            "forwards per step, run forwards that need no gradient in eval mode or under no_grad, or "
            "call discard_forward() if the backward of the first will not come."
        )

    def hold(self, ticket: Ticket | None) -> None:
        """Let a training forward wait for its backward, as long as something refers to its result."""
        if ticket is not None:
            self.__dict__["_outstanding"] = weakref.ref(ticket)  # nn.Module's way costs 2 us

    def discard_forward(self) -> None:
        """Give up a training forward whose backward will not come, so that another may begin.

        (A result that nothing refers to any more is given up by itself.) Its backward then raises.
        """
        outstanding = self._outstanding() if self._outstanding is not None else None
        if outstanding is not None and not outstanding.used:
            outstanding.take()

    def step(self) -> None:
        """Apply the gradients that backwards left on the tables (``fused=False``), and tick the clock.

        Gradients stay where they are until :meth:`zero_grad`, as with torch's optimizers. A table
        without a gradient is not touched.

        Raises:
            RuntimeError: if the module is fused.
            TypeError: a gradient that is not sparse.
            ValueError: a non-finite update under ``on_nonfinite="raise"``; no table was written.
        """
        if self.fused:
            raise RuntimeError(
                "step(): these tables are updated by backward; build with fused=False"
            )
        tables = self.table_batch
        self.stepping()
        tables.step([p.grad for p in tables.weights])
        self.stepped()

    # ------------------------------------------------------------------------------ rows and state

    def read(self, name: str, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return rows as a forward would read them now, changing nothing.

        Args:
            name: the table.
            rows: int32 or int64 ``[n]``; default all.

        Returns:
            ``[n, D]`` of ``output_dtype``; with ``charge="read"`` the decay owed is charged.
        """
        tables = self.table_batch
        table = tables.index_of(name)
        return tables.read(table, tables.rows(table, rows))

    def cold_rows(self, name: str, min_gap: int) -> Tensor:
        """Return the rows (int64 ``[n]``, ascending) untouched for at least ``min_gap`` steps.

        A row never touched counts as untouched since step 0.
        """
        min_gap = integer("min_gap", min_gap, 0, LAST_STEP)
        tables = self.table_batch
        prev_iter = tables.operands.prev_iters[tables.index_of(name)]
        return (prev_iter <= self.clock - min_gap).nonzero().squeeze(1)

    def evict(self, name: str, rows: Tensor | Sequence[int]) -> None:
        """Re-initialise rows with the table's initialiser and zero their state.

        Raises:
            RuntimeError: if the table has a gradient waiting for :meth:`step`.
        """
        tables = self.table_batch
        table = tables.index_of(name)
        rows = tables.rows(table, rows).long()
        if tables.weights[table].grad is not None:
            raise RuntimeError(
                f"evict: table {name!r} has a gradient that waits for step(), which would train the new "
                "rows with what belongs to the old; call step() or zero_grad() first"
            )
        weight = tables.weights[table].detach()
        fresh = torch.empty(rows.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.tables[table].fill(fresh)
        with tables.held(write=True):
            weight[rows] = fresh
            for view in self.state[name].values():
                view[rows] = 0
            self.rewritten()

    def state_bytes(self) -> int:
        """Bytes of optimizer state of all tables (weights not counted)."""
        return sum(state.num_bytes() for state in self.state.values())

    def check(self) -> None:
        """Raise what was found on a CUDA device since the last check; waits for torch's current stream.

        It is the first batch that was refused, and why: with which table, position and value. A CPU
        module has raised already: does nothing.

        Raises:
            IndexError: an index outside its table.
            ValueError: other values: offsets, a non-finite update under ``on_nonfinite="raise"``, or a
                clock at its end.
        """
        self.table_batch.check()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_outstanding"}
