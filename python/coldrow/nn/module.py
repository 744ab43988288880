"""Table-batched embedding bags for torch.

The module owns the *clock*: the number of optimizer steps done. It ticks once per step, never on a
forward, so an evaluation pass ages nothing. Clock and learning rates are 0-dim tensors.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from coldrow._checks import (
    LAST_STEP,
    ON_NONFINITE,
    integer,
    listed,
    number,
    one_of,
    require_dense,
    table_key,
)
from coldrow._engines import RowStep, engine_of
from coldrow._steps import apply_steps, sparse_rows
from coldrow.nn import checkpoint, ops
from coldrow.nn.autograd import FusedLookup, SparseLookup, Ticket, plain
from coldrow.nn.kernels import (
    Batch,
    Counters,
    DeviceBatch,
    Operands,
    Origin,
    counts_of,
    kernels_on,
    native_tables,
    require_device,
)
from coldrow.nn.table import DTYPES, State, Table, Weights, in_table_memory, moved, table_memory
from coldrow.policies import RowUpdate, is_epoch_aware


class TableBatchedEmbeddingBags(nn.Module):
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

    Attributes:
        weights: tables by name, ``[E, D]``, live and writable.
        strict_policies: refuse a checkpoint whose policies differ from the module's.
    """

    _origins: Sequence[Origin] = ()  # of tables that are shards of others; empty: all are whole

    def __init__(
        self,
        tables: Sequence[Table],
        update: RowUpdate | None = None,
        *,
        pooling: Literal["sum", "mean", "none"] = "sum",
        charge: Literal["touch", "read"] = "touch",
        device: torch.device | str = "cpu",
        output_dtype: torch.dtype = torch.float32,
        fused: bool = True,
        on_nonfinite: Literal["skip", "raise", "propagate"] = "skip",
        validate: Literal["deferred", "sync"] = "deferred",
        state_layout: Literal["record", "split"] = "record",
    ) -> None:
        super().__init__()
        update = RowUpdate() if update is None else update
        if not isinstance(update, RowUpdate):
            raise TypeError(f"update: got {update!r}, accepted: a coldrow.RowUpdate")
        tables = listed("tables", tables, "a non-empty list of Table")
        if not tables or not all(isinstance(t, Table) for t in tables):
            raise TypeError(f"tables: got {tables!r}, accepted: a non-empty list of Table")
        names = [t.name for t in tables]
        self.features = [f for t in tables for f in t.features or ()]
        for what, named in (("table", names), ("feature", self.features)):
            for name in named:
                if named.count(name) > 1:
                    raise ValueError(f"tables: {what} {name!r} is given twice, accepted: once")
        one_of("pooling", pooling, ("sum", "mean", "none"))
        one_of("charge", charge, ("touch", "read"))
        one_of("output_dtype", output_dtype, DTYPES)
        one_of("on_nonfinite", on_nonfinite, ON_NONFINITE)
        one_of("validate", validate, ("deferred", "sync"))
        one_of("state_layout", state_layout, ("record", "split"))
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"device: got {device!r}, accepted: 'cpu' or 'cuda'") from None
        self._require_device(device)
        self.tables = [replace(t) for t in tables]  # dtype follows conversions of the module
        self.update = update
        if not isinstance(fused, bool):
            raise TypeError(f"fused: got {fused!r}, accepted: True or False")
        self.pooling, self.charge, self.fused = pooling, charge, fused
        self.output_dtype, self.on_nonfinite = output_dtype, on_nonfinite
        self.validate, self.state_layout = validate, state_layout
        self.strict_policies = True
        self._epoch_checked = self._epoch_declared = False
        self._load_strict: bool | None = None

        parameters = {}
        for table in tables:
            weight = table_memory((table.num_rows, table.dim), table.dtype, device)
            table.fill(weight)
            parameters[table.name] = nn.Parameter(weight, requires_grad=not fused)
        self.weights = Weights(parameters)
        self._updates = [t.update or update for t in tables]
        self._state = [
            State.zeros(u.state_shapes(t.num_rows, t.dim), state_layout, device)
            for t, u in zip(tables, self._updates, strict=True)
        ]
        self._clock = torch.zeros((), dtype=torch.int64, device=device)
        self._epoch_start = torch.zeros((), dtype=torch.int64, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._grad_scale = torch.ones((), dtype=torch.float64, device=device)
        # One group per distinct update, in order of the tables: its tables share a learning rate.
        groups = list(dict.fromkeys(self._updates))
        self._group_of = [groups.index(u) for u in self._updates]
        self._lr = [
            torch.full((), u.optimizer.lr, dtype=torch.float64, device=device) for u in groups
        ]
        self._param_groups: list[dict[str, Any]] = [{"lr": lr} for lr in self._lr]
        self._feature_tables = [i for i, t in enumerate(tables) for _ in t.features or ()]
        self._dims = [tables[t].dim for t in self._feature_tables]  # by feature
        self._outstanding: weakref.ref[Ticket] | None = None
        self._generation = 0  # moves whenever tables change outside backward and step
        self._optimizer: _Handle | None = None
        self.register_load_state_dict_post_hook(_after_load)
        self._prepare()

    # ------------------------------------------------------------------------------------- build

    def _require_device(self, device: torch.device) -> None:
        """Raise unless tables can be there."""
        require_device(device)

    def _prepare(self) -> None:
        """(Re)build what is derived from tables and state; called whenever their memory moves."""
        origins = self._origins or [Origin(t.name) for t in self.tables]
        self._keys = [table_key(o.name) for o in origins]
        names = [t.name for t in self.tables]
        self._parameters_list = [self.weights[n] for n in names]
        self._device = self._parameters_list[0].device
        kernels = self.__dict__.get("_kernels")
        if kernels is None or kernels.device != self._device:
            # (Else kept: a captured CUDA graph reports to these.)
            self._kernels = kernels_on(self._device, sync=self.validate == "sync")
        self._native = native_tables(self._kernels, origins, self._feature_tables)
        self._compiled = [self._kernels.update_of(u) for u in self._updates]
        # What makes autograd call the fused backward.
        self._anchor = torch.empty(0, requires_grad=True, device=self._device)
        if any(p.is_inference() for p in self._parameters_list):
            raise RuntimeError(
                "tables made under torch.inference_mode() could never be trained; make them outside"
            )
        for g, group in enumerate(self._param_groups):
            group["params"] = [
                p for p, of in zip(self._parameters_list, self._group_of, strict=True) if of == g
            ]
        views = [s.views() for s in self._state]
        self._state_views = dict(zip(names, views, strict=True))
        self._prev_iters = [v["prev_iter"] for v in views]
        self._optimizer_states = [
            [v[n] for n in s.names[1:]] for s, v in zip(self._state, views, strict=True)
        ]
        # What a step writes and autograd should hear of. (Inference tensors have no versions.)
        written = [*self._parameters_list, *(m for s in self._state for m in s.memory)]
        written += [self._clock, self._nonfinite]
        self._written = [t for t in written if not t.is_inference()]
        self._generation += 1
        self._spec = ops.spec_of(self)
        # Made when first asked for, which is after a subclass has had its say.
        self._worked_on: Operands | None = None
        self._counted: Counters | None = None
        for p in self._parameters_list:
            if not self.fused and getattr(p, "grad_dtype", torch.float32) != torch.float32:
                p.grad_dtype = torch.float32  # 16-bit tables accumulate gradients in float32
            p._coldrow_fused = self.fused  # type: ignore[attr-defined]
            p._coldrow_read_charged = self.charge == "read"  # type: ignore[attr-defined]

    def _sync(self) -> None:
        """Notice tables that somebody put in the place of others."""
        current = list(self._modules["weights"]._parameters.values())  # type: ignore[union-attr]
        old = self._parameters_list
        if len(current) == len(old) and all(map(operator.is_, current, old)):
            return
        if len(current) != len(old) or not all(isinstance(p, nn.Parameter) for p in current):
            raise TypeError(
                "weights: got tables that are not Parameters of their own (functional_call or a "
                "parametrization?), accepted: one nn.Parameter per table"
            )
        self._prepare()

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

    def extra_repr(self) -> str:
        """Describe tables and options, one table per line."""
        lines = [
            f"{t.name}: {t.num_rows} x {t.dim} {str(t.dtype).removeprefix('torch.')}, "
            f"features={t.features}" + (f", update={t.update}" if t.update else "")
            for t in self.tables
        ]
        return "\n".join(
            [
                *lines,
                f"update={self.update}",
                f"pooling={self.pooling!r}, charge={self.charge!r}, fused={self.fused}",
            ]
        )

    # ------------------------------------------------------------------------------- clock and lr

    @property
    def clock(self) -> int:
        """Optimizer steps done so far. Assignable to any value from there on, up to 2**31 - 1."""
        return int(self._clock)

    @clock.setter
    def clock(self, value: int) -> None:
        self._clock.fill_(integer("clock", value, self.clock, LAST_STEP))

    def _counters(self) -> Counters:
        self._take_in_lrs()
        counters = self._counted
        if counters is None:
            counters = self.__dict__["_counted"] = Counters(
                self._clock,
                self._epoch_start,
                self._nonfinite,
                self._grad_scale,
                self._lr,
                self._group_of,
            )
        return counters

    def _next_step(self) -> int:
        return self._counters().next_step()

    @property
    def epoch_start(self) -> int:
        """The first step of the running epoch, 0 before the first :meth:`new_epoch`."""
        return int(self._epoch_start)

    def new_epoch(self) -> None:
        """Declare that the next step begins an epoch (for EpochGated and EpochReset)."""
        self._kernels.begin_epoch(self._counters())
        self._epoch_declared = True

    @property
    def nonfinite_rows(self) -> int:
        """Rows skipped so far as non-finite. Assignable."""
        return int(self._nonfinite)

    @nonfinite_rows.setter
    def nonfinite_rows(self, value: int) -> None:
        self._nonfinite.fill_(integer("nonfinite_rows", value, 0, 2**63 - 1))

    @property
    def grad_scale(self) -> float:
        """What fused gradients are divided by (in float32): set it where the loss is scaled."""
        return float(self._grad_scale)

    @grad_scale.setter
    def grad_scale(self, value: float) -> None:
        self._grad_scale.fill_(number("grad_scale", value, low_open=True))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group per distinct update; ``group["lr"]`` is a 0-dim tensor, or whatever was put there.

        For torch's schedulers pass :attr:`optimizer`.
        """
        return self._param_groups

    def _take_in_lrs(self) -> None:
        """Take in what was assigned to a group in the place of its tensor."""
        for tensor, group in zip(self._lr, self._param_groups):  # noqa: B905 (strict takes its time)
            if group["lr"] is not tensor:  # somebody put a number of their own there
                tensor.fill_(number("lr", group["lr"]))
                group["lr"] = tensor

    def _group_lrs(self) -> Tensor:
        """Learning rates by group, float64 ``[groups]``; takes in what was assigned to a group."""
        self._take_in_lrs()
        return torch.stack(self._lr)

    def _set_group_lrs(self, values: Sequence[float]) -> None:
        for value, tensor, group in zip(values, self._lr, self._param_groups, strict=True):
            tensor.fill_(value)
            group["lr"] = tensor

    def _lrs(self) -> tuple[float, ...]:
        """Learning rates by table."""
        self._take_in_lrs()
        values = [lr.item() for lr in self._lr]
        return tuple([values[g] for g in self._group_of])

    @property
    def lr(self) -> float:
        """Learning rate of the next step (of the first group); assigning sets it for all tables."""
        self._take_in_lrs()
        return float(self._lr[0])

    @lr.setter
    def lr(self, value: float) -> None:
        self._set_group_lrs([number("lr", value)] * len(self._lr))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """A ``torch.optim.Optimizer`` over :attr:`param_groups`, for torch's LR schedulers.

        Its ``step()`` is :meth:`step` where ``fused=False`` and does nothing where the backward has
        already updated the tables.
        """
        if self._optimizer is None:
            self._optimizer = _Handle(self)
        return self._optimizer

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
        sizes = None if batch_sizes is None else self._batch_sizes(batch_sizes, offsets)
        if not torch.compiler.is_compiling():
            return self._eager(indices, offsets, weights, sizes)
        one_tensor = self.pooling != "none" or len(set(self._dims)) == 1
        if one_tensor and (self.fused or not torch.is_grad_enabled()):
            return self._traced(indices, offsets, weights, sizes)
        return self._untraced(indices, offsets, weights, sizes)

    def _traced(
        self,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        sizes: tuple[int, ...] | None,
    ) -> Any:
        """Look up through an operator, for torch.compile and torch.export."""
        train = self.training and torch.is_grad_enabled()
        anchor = self._anchor if train else self._anchor.detach()
        if weights is not None:
            weights = weights.resolve_neg().contiguous()  # plain() asks what cannot be traced
        out = torch.ops.coldrow.lookup(
            anchor,
            [p.detach() for p in self._parameters_list],
            [m for s in self._state for m in s.memory] if train or self.charge == "read" else [],
            self._lr,
            self._clock,
            self._epoch_start,
            self._nonfinite,
            self._grad_scale,
            indices.resolve_neg().contiguous(),
            offsets.resolve_neg().contiguous(),
            weights,
            sizes,
            train,
            self._spec,
        )
        return self._shape(out, offsets, sizes)

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
        self._sync()
        indices, offsets = plain(indices), plain(offsets)
        weights = None if weights is None else plain(weights)
        grad_on = torch.is_grad_enabled()
        # The gradient of per_sample_weights is that of the rows as they are read now.
        read = self.charge == "read"
        keep = read and weights is not None and weights.requires_grad
        batch = self._kernels.batch(sizes, self._counters(), read=read, keep=keep)
        if not self.fused and grad_on:
            out = SparseLookup.apply(self, batch, indices, offsets, weights, *self._parameters_list)
        elif grad_on and (self.training or (weights is not None and weights.requires_grad)):
            ticket = self._take_ticket() if self.training else None
            anchor = self._anchor if self.training else self._anchor.detach()
            out = FusedLookup.apply(anchor, weights, (self, ticket, batch, indices, offsets))
            if ticket is not None:
                self.__dict__["_outstanding"] = weakref.ref(ticket)  # nn.Module's way costs 2 us
        else:
            out = self._lookup(batch, indices, offsets, weights)
        return self._shape(out, offsets, sizes)

    def _batch_sizes(self, given: Sequence[int], offsets: Tensor) -> tuple[int, ...]:
        features, bags = len(self._feature_tables), offsets.numel() - 1
        accepted = f"accepted: one per feature ({features}), adding up to len(offsets) - 1 = {bags}"
        if isinstance(given, Tensor) and not given.is_meta:
            with suppress(RuntimeError):  # sparse, nested and quantised tensors have no list
                given = given.tolist()
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"batch_sizes: got {given!r}, {accepted}")
        sizes = tuple([integer("batch_sizes", b, 0, 2**31 - 1) for b in given])
        if len(sizes) != features or sum(sizes) != bags:
            raise ValueError(
                f"batch_sizes: got {len(sizes)} sizes that add up to {sum(sizes)}, {accepted}"
            )
        return sizes

    def _take_ticket(self) -> Ticket:
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

    def discard_forward(self) -> None:
        """Give up a training forward whose backward will not come, so that another may begin.

        (A result that nothing refers to any more is given up by itself.) Its backward then raises.
        """
        outstanding = self._outstanding() if self._outstanding is not None else None
        if outstanding is not None:
            outstanding.used = True

    def _shape(self, out: Tensor, offsets: Tensor, sizes: tuple[int, ...] | None) -> Any:
        if self.pooling != "none":
            return out
        dims = self._dims
        if len(set(dims)) == 1:
            return out.view(-1, dims[0])
        self.check()  # sizes are asked of the device, so this waits anyway
        counts = counts_of(offsets, sizes, len(dims))
        parts = out.split([n * d for n, d in zip(counts, dims, strict=True)])
        return [part.view(-1, d) for part, d in zip(parts, dims, strict=True)]

    def _operands(self) -> Operands:
        operands = self._worked_on
        if operands is None:
            operands = self.__dict__["_worked_on"] = Operands(
                self._native,
                self._parameters_list,
                self._optimizer_states,
                self._prev_iters,
                self._compiled,
                self.pooling,
                self.charge == "read",
            )
        return operands

    def _lookup(
        self,
        batch: Batch | DeviceBatch,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        dims = self._dims
        shape: tuple[int, ...]
        if self.pooling == "none" and len(set(dims)) == 1:
            shape = (indices.numel() * dims[0],)
        elif self.pooling == "none":
            counts = counts_of(offsets, batch.batch_sizes, len(dims))
            total = sum(n * d for n, d in zip(counts, dims, strict=True))
            # Offsets that are wrong ask for any size; the kernels will refuse them.
            least, most = indices.numel() * min(dims), indices.numel() * max(dims)
            shape = (min(max(total, least), most),)
        elif batch.batch_sizes is not None:
            shape = (sum(b * d for b, d in zip(batch.batch_sizes, dims, strict=True)),)
        else:
            shape = ((offsets.numel() - 1) // len(dims), sum(dims))
        out = torch.empty(*shape, dtype=self.output_dtype, device=self._device)  # (a tuple: 0.5 us)
        weights = None if weights is None else weights.detach()
        self._kernels.lookup(self._operands(), batch, indices, offsets, weights, out)
        return out

    # ----------------------------------------------------------------------------------- backward

    def _weight_gradients(
        self, batch: Batch | DeviceBatch, indices: Tensor, offsets: Tensor, grad: Tensor
    ) -> Tensor:
        out = torch.empty(indices.numel(), dtype=torch.float32, device=self._device)
        self._kernels.weight_gradients(self._operands(), batch, indices, offsets, grad, out)
        return out

    def _update(
        self,
        batch: Batch | DeviceBatch,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        grad: Tensor,
    ) -> None:
        self._kernels.update(
            self._operands(),
            self._counters(),
            batch.batch_sizes,
            indices,
            offsets,
            weights,
            grad,
            self.on_nonfinite,
        )
        self._stepped()

    def _stepped(self) -> None:
        """What remains to be said after a step; the kernels have set the clock."""
        if not self._epoch_checked:
            self._epoch_checked = True
            aware = any(is_epoch_aware(u) for u in self._updates)
            if aware and not self._epoch_declared and self._kernels.no_epoch(self._epoch_start):
                warnings.warn(
                    "an epoch-aware decay is in use and new_epoch() was never called: until it is, "
                    "nothing decays",
                    stacklevel=2,
                )
        increment_version(self._written)
        if self._optimizer is not None:
            self._optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at before they warn

    def _versions(self) -> tuple[int, ...]:
        """What changes whenever somebody writes to a table."""
        return (self._generation, *[p._version for p in self._parameters_list])

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
        self._sync()
        step, lrs, epoch_start = self._next_step(), self._lrs(), self.epoch_start
        steps = []
        for i, p in enumerate(self._parameters_list):
            rows = sparse_rows(
                p.grad,
                f"weights.{self.tables[i].name}.grad",
                "sparse gradients, as this module's backward makes them",
            )
            if rows is not None:
                steps.append(
                    RowStep(
                        self._updates[i],
                        p,
                        *rows,
                        self._optimizer_states[i],
                        self._prev_iters[i],
                        lrs[i],
                        self._keys[i],
                    )
                )
        apply_steps(
            steps,
            step=step,
            epoch_start=epoch_start,
            on_nonfinite=self.on_nonfinite,
            clock=self._clock,
            nonfinite=self._nonfinite,
        )
        self._stepped()

    # ------------------------------------------------------------------------------ rows and state

    def _held(self, *, write: bool) -> AbstractContextManager[Any]:
        """Return a context in which no other thread's call writes the tables, or reads them either."""
        return self._kernels.held(self._parameters_list, write=write)

    def _index_of(self, name: str) -> int:
        for i, table in enumerate(self.tables):
            if isinstance(name, str) and table.name == name:
                return i
        raise KeyError(f"table: got {name!r}, accepted: {', '.join(t.name for t in self.tables)}")

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """Live, writable views of the optimizer state: ``state["user"]["momentum1"]``.

        ``[rows]`` each, or ``[rows, dim]`` where the optimizer's state is element-wise.
        """
        return self._state_views

    def _rows(self, table: int, rows: Tensor | Sequence[int] | None) -> Tensor:
        if rows is None:
            return torch.arange(self.tables[table].num_rows, device=self._device)
        try:
            rows = torch.as_tensor(rows, device=self._device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"rows: got {rows!r}, accepted: int32 or int64 [n]") from None
        require_dense("rows", rows)
        if rows.numel() == 0:
            return torch.empty(0, dtype=torch.int64, device=self._device)
        if rows.dtype not in (torch.int32, torch.int64) or rows.dim() != 1:
            raise TypeError(
                f"rows: got {rows.dtype} of shape {list(rows.shape)}, accepted: int32 or int64 [n]"
            )
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self.tables[table].num_rows:
            raise IndexError(
                f"rows: got {low if low < 0 else high}, accepted: 0 to "
                f"{self.tables[table].num_rows - 1}"
            )
        aligned = rows.data_ptr() % rows.element_size() == 0  # not so of every array of NumPy's
        return rows.contiguous() if aligned else rows.clone()

    def read(self, name: str, rows: Tensor | Sequence[int] | None = None) -> Tensor:
        """Return rows as a forward would read them now, changing nothing.

        Args:
            name: the table.
            rows: int32 or int64 ``[n]``; default all.

        Returns:
            ``[n, D]`` of ``output_dtype``; with ``charge="read"`` the decay owed is charged.
        """
        self._sync()
        t = self._index_of(name)
        rows = self._rows(t, rows)
        out = torch.empty(
            rows.numel(), self.tables[t].dim, dtype=self.output_dtype, device=self._device
        )
        if self.charge == "touch":
            with self._held(write=False):
                return out.copy_(self._parameters_list[t].detach().index_select(0, rows))
        weight = self._parameters_list[t]
        engine_of("weight", weight).read(
            self._updates[t],
            out,
            weight,
            rows,
            self._prev_iters[t],
            step=self.clock + 1,
            lr=self._lrs()[t],
            epoch_start=self.epoch_start,
        )
        return out

    def cold_rows(self, name: str, min_gap: int) -> Tensor:
        """Return the rows (int64 ``[n]``, ascending) untouched for at least ``min_gap`` steps.

        A row never touched counts as untouched since step 0.
        """
        min_gap = integer("min_gap", min_gap, 0, LAST_STEP)
        prev_iter = self._prev_iters[self._index_of(name)]
        return (prev_iter <= self.clock - min_gap).nonzero().squeeze(1)

    def evict(self, name: str, rows: Tensor | Sequence[int]) -> None:
        """Re-initialise rows with the table's initialiser and zero their state.

        Raises:
            RuntimeError: if the table has a gradient waiting for :meth:`step`.
        """
        self._sync()
        t = self._index_of(name)
        rows = self._rows(t, rows).long()
        if self._parameters_list[t].grad is not None:
            raise RuntimeError(
                f"evict: table {name!r} has a gradient that waits for step(), which would train the new "
                "rows with what belongs to the old; call step() or zero_grad() first"
            )
        weight = self._parameters_list[t].detach()
        fresh = torch.empty(rows.numel(), weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.tables[t].fill(fresh)
        with self._held(write=True):
            weight[rows] = fresh
            for view in self._state_views[name].values():
                view[rows] = 0
            self._generation += 1

    def state_bytes(self) -> int:
        """Bytes of optimizer state of all tables (weights not counted)."""
        return sum(m.numel() * m.element_size() for s in self._state for m in s.memory)

    def check(self) -> None:
        """Raise what was found on a CUDA device since the last check; waits for torch's current stream.

        It is the first batch that was refused, and why: with which table, position and value. A CPU
        module has raised already: does nothing.

        Raises:
            IndexError: an index outside its table.
            ValueError: other values: offsets, a non-finite update under ``on_nonfinite="raise"``, or a
                clock at its end.
        """
        self._kernels.check(self._native, [t.num_rows for t in self.tables])

    # -------------------------------------------------------------------------------- conversions

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=torch.float32, device=self._device))
        self._require_device(probe.device)
        if probe.dtype not in DTYPES:
            raise TypeError(
                f"dtype: got {probe.dtype}, accepted: float32, float16, bfloat16 for the tables"
            )
        self.check()  # what the kernels found stays behind
        super()._apply(in_table_memory(fn), recurse)
        for state in self._state:
            state.move(in_table_memory(fn))
        for name in ("_clock", "_epoch_start", "_nonfinite", "_grad_scale"):
            setattr(self, name, moved(getattr(self, name), fn))
        self._group_lrs()
        self._lr = [moved(lr, fn) for lr in self._lr]
        for tensor, group in zip(self._lr, self._param_groups, strict=True):
            group["lr"] = tensor
        for table in self.tables:
            table.dtype = self.weights[table.name].dtype
        self._prepare()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._group_lrs()  # takes in what was assigned to a group
        derived = (
            "_kernels",
            "_native",
            "_compiled",
            "_anchor",
            "_parameters_list",
            "_state_views",
            "_prev_iters",
            "_optimizer_states",
            "_written",
            "_worked_on",
            "_counted",
            "_spec",
            "_outstanding",
            "_optimizer",
        )
        return {k: v for k, v in self.__dict__.items() if k not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._outstanding = None
        self._optimizer = None
        for tensor, group in zip(self._lr, self._param_groups, strict=True):
            group["lr"] = tensor
        self._prepare()

    # --------------------------------------------------------------------------------- state_dict

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        checkpoint.save(self, destination, prefix)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the policies, as plain values, for ``state_dict``."""
        return checkpoint.policies(self)

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Do nothing: policies were compared before anything was loaded."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a checkpoint, all of it or nothing; see :mod:`coldrow.nn.checkpoint`.

        Raises:
            RuntimeError: listing all that is missing, unexpected or does not fit.
        """
        self._load_strict = bool(strict)
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._load_strict = None

    def _load_from_state_dict(  # all or nothing, see checkpoint.load
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if checkpoint.load(self, state_dict, prefix, missing_keys, unexpected_keys, error_msgs):
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )


def _after_load(module: TableBatchedEmbeddingBags, _: Any) -> None:
    """Take in the tables that a load with ``assign=True`` put in place of the old ones."""
    module._prepare()


class _Handle(torch.optim.Optimizer):
    """A module's param_groups in the shape that torch's LR schedulers ask for."""

    def __init__(self, module: TableBatchedEmbeddingBags) -> None:
        self._module = weakref.ref(module)
        super().__init__([{"params": g["params"]} for g in module.param_groups], {})
        self.param_groups = module.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups beside the module's own."""
        if len(self.param_groups) == len(getattr(self._module(), "param_groups", [])):
            raise ValueError("param_groups: accepted: the module's own, one per distinct update")
        super().add_param_group(param_group)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Run the module's step where its backward did not update the tables already."""
        if closure is not None:
            raise TypeError("closure: accepted: none")
        module = self._module()
        if module is not None and not module.fused:
            module.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what schedulers keep in the groups, and lr, into the module's own groups."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})
            if isinstance(group["lr"], Tensor):  # its value, not the saved tensor
                group["lr"] = float(group["lr"])
