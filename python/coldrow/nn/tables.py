"""Tables, their state, clock and options as an ``nn.Module``: all of a module but its forward.

The module owns the *clock*: the number of optimizer steps done. It ticks once per step, never on a
forward, so an evaluation pass ages nothing. Clock, epoch start, learning rates and the state of the rows are
buffers, so torch's tools see, copy, move and save them.
"""

from __future__ import annotations

import copy
import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coldrow._backends.protocol import Counters
from coldrow._backends.registry import kernels_on, require_device
from coldrow._checks import ON_NONFINITE, listed, one_of
from coldrow._described import described
from coldrow.nn import state_dict as checkpoint
from coldrow.nn.clock import Clocked
from coldrow.nn.learning_rates import LearningRates
from coldrow.nn.optimizer import TablesOptimizer
from coldrow.nn.table import (
    DTYPES,
    States,
    Table,
    TableState,
    Weights,
    in_table_memory,
    moved,
)
from coldrow.nn.table_batch import Layout, TableBatch, TableLayout
from coldrow.policies import RowUpdate, is_epoch_aware

# Buffers of the module itself, and of them those that are saved.
_SAVED = ("clock", "epoch_start", "lr")
_COUNTERS = (*_SAVED, "_nonfinite_rows", "_grad_scale")


class TablesModule(Clocked):
    """What :class:`coldrow.nn.TableBatchedEmbeddingBags` says of tables, without a forward."""

    #: Device types that tables may be on; None: those that coldrow has kernels for.
    devices: tuple[str, ...] | None = None

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
        feature_order: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        update = RowUpdate() if update is None else update
        if not isinstance(update, RowUpdate):
            raise TypeError(f"update: got {update!r}, accepted: a coldrow.RowUpdate")
        tables = listed("tables", tables, "a non-empty list of Table")
        if not tables or not all(isinstance(t, Table) for t in tables):
            raise TypeError(f"tables: got {tables!r}, accepted: a non-empty list of Table")
        of_feature = {f: i for i, t in enumerate(tables) for f in t.features or ()}
        features = [f for t in tables for f in t.features or ()]
        for what, named in (("table", [t.name for t in tables]), ("feature", features)):
            name, times = Counter(named).most_common(1)[0]
            if times > 1:
                raise ValueError(f"tables: {what} {name!r} is given twice, accepted: once")
        self.features = features if feature_order is None else list(feature_order)
        if sorted(self.features) != sorted(features):
            raise ValueError(
                f"feature_order: got {self.features}, accepted: each of {features} once"
            )
        one_of("validate", validate, ("deferred", "sync"))
        one_of("state_layout", state_layout, ("record", "split"))
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"device: got {device!r}, accepted: 'cpu' or 'cuda'") from None
        self._require_device(device)
        if not isinstance(fused, bool):
            raise TypeError(f"fused: got {fused!r}, accepted: True or False")
        self.tables = [copy.copy(t) for t in tables]  # dtype follows conversions
        for table in self.tables:
            table.storage = None
        self._fixed = {"fused": fused, "validate": validate, "state_layout": state_layout}
        updates = [t.update or update for t in tables]
        # One group per distinct update, in order of the tables: its tables share a learning rate.
        groups = {u: g for g, u in enumerate(dict.fromkeys(updates))}
        self._update = update
        self.layout = Layout(
            tuple(
                TableLayout(t.name, t.dim, u, groups[u], t.origin)
                for t, u in zip(tables, updates, strict=True)
            ),
            tuple([of_feature[f] for f in self.features]),
            one_of("pooling", pooling, ("sum", "mean", "none")),
            one_of("charge", charge, ("touch", "read")),
            one_of("output_dtype", output_dtype, DTYPES),
            one_of("on_nonfinite", on_nonfinite, ON_NONFINITE),
        )
        self.strict_policies = True
        self._epoch_checked = self.epoch_declared = False
        self._load_strict: bool | None = None
        self._handle: TablesOptimizer | None = None

        self.weights = Weights(
            {t.name: nn.Parameter(t.memory(device), requires_grad=not fused) for t in tables}
        )
        self.state = States(
            {
                t.name: TableState(u.state_shapes(t.num_rows, t.dim), state_layout, device)
                for t, u in zip(tables, updates, strict=True)
            }
        )
        lrs = [u.optimizer.lr for u in groups]
        zero = torch.zeros((), dtype=torch.int64, device=device)
        for name, value in zip(
            _COUNTERS,
            (
                zero,
                zero.clone(),
                torch.tensor(lrs, dtype=torch.float64, device=device),
                zero.clone(),
                torch.ones((), dtype=torch.float64, device=device),
            ),
            strict=True,
        ):
            self._buffers[name] = value  # (register_buffer refuses the names of properties)
        self._non_persistent_buffers_set |= set(_COUNTERS) - set(_SAVED)
        self._rates = LearningRates(self._buffers["lr"], self.layout.groups)  # type: ignore[arg-type]
        self.register_load_state_dict_post_hook(_after_load)
        self.rebind()

    # ------------------------------------------------------------------------------------- build

    def _require_device(self, device: torch.device) -> None:
        """Raise unless tables can be there."""
        if self.devices is not None and device.type not in self.devices:
            accepted = " or ".join(map(repr, self.devices))
            raise ValueError(
                f"device: got {str(device)!r}, accepted: {accepted} (shards live there)"
            )
        require_device(device)

    def __setattr__(self, name: str, value: Any) -> None:
        known = getattr(type(self), name, None)
        if not isinstance(known, property):
            super().__setattr__(name, value)
        elif known.fset is None:
            raise AttributeError(
                f"{name}: is fixed when the module is built, accepted: no assignment"
            )
        else:  # (nn.Module would take clock and lr for buffers)
            known.fset(self, value)

    def rebind(self) -> None:
        """Make :attr:`table_batch` anew. To be called by whoever put other memory in the place of arrays.

        (The module itself calls it where it moves, loads or converts, and notices replaced tables.)
        """
        weights = self.weights.tensors()
        if any(p.is_inference() for p in weights):
            raise RuntimeError(
                "tables made under torch.inference_mode() could never be trained; make them outside"
            )
        device = weights[0].device
        kernels = self.__dict__.get("_kernels")
        if kernels is None or kernels.device != device:
            # (Else kept: a captured CUDA graph reports to these.)
            kernels = self._kernels = kernels_on(device, sync=self.validate == "sync")
            # What makes autograd call the fused backward.
            self.anchor = torch.empty(0, requires_grad=True, device=device)
        state = [arrays.tensors() for arrays in self.state.values()]
        self._batch = TableBatch(self.layout, kernels, weights, state, self._counters())
        # The dicts that arrays may be replaced in, and what was in them.
        dicts: list[dict[str, Any]] = [self.weights._parameters, self._buffers]
        dicts += [arrays._buffers for arrays in self.state.values()]
        self.__dict__.update(_dicts=dicts, _bound=[*_values(dicts)])
        self._rates.follow(self._batch.counters.lr, weights)
        self.spec = self.layout.spec(kernels.token)
        read = self.charge == "read"
        for p in weights:
            if not self.fused and getattr(p, "grad_dtype", torch.float32) != torch.float32:
                p.grad_dtype = torch.float32  # 16-bit tables accumulate gradients in float32
            p.coldrow_fused = self.fused  # type: ignore[attr-defined]
            p.coldrow_read_charged = read  # type: ignore[attr-defined]
        if self._handle is not None:
            self._handle.follow(self._batch)

    def _counters(self) -> Counters:
        buffers = self._buffers
        return Counters(
            buffers["clock"],  # type: ignore[arg-type]
            buffers["epoch_start"],  # type: ignore[arg-type]
            buffers["_nonfinite_rows"],  # type: ignore[arg-type]
            buffers["_grad_scale"],  # type: ignore[arg-type]
            buffers["lr"],  # type: ignore[arg-type]
            self._rates.of_table,
        )

    def rewritten(self) -> None:
        """Declare that rows were replaced: a backward whose forward came before is then refused."""
        batch = self._batch
        self._batch = batch.over(list(batch.weights), batch.state_by_table, batch.counters)

    @property
    def table_batch(self) -> TableBatch:
        """What the kernels work on, as things are now: see docs/architecture.md."""
        own = self.__dict__
        if all(map(operator.is_, _values(own["_dicts"]), own["_bound"])):
            return own["_batch"]  # type: ignore[no-any-return]
        return self._bound_anew()

    def _bound_anew(self) -> TableBatch:
        """Return the tables over the arrays that somebody has put in the place of others."""
        batch, own = self._batch, self.__dict__
        weights = self.weights.tensors()
        replaced = all(isinstance(p, nn.Parameter) for p in weights)
        if replaced and _same([*_values(own["_dicts"][1:])], own["_bound"][len(weights) :]):
            for table, weight in zip(self.tables, weights, strict=True):
                if list(weight.shape) != [table.num_rows, table.dim]:
                    raise ValueError(
                        f"weights.{table.name}: got {list(weight.shape)}, accepted: "
                        f"[{table.num_rows}, {table.dim}], as its state has; build another module"
                    )
            self.rebind()  # tables are others for good
            return self._batch
        # torch.func.functional_call and the like: other arrays for one call.
        self._require_like(weights, self.state.tensors())
        by_table = [arrays.tensors() for arrays in self.state.values()]
        return batch.over(weights, by_table, self._counters())

    def _require_like(self, weights: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        own = self._batch
        if len(weights) != len(own.weights) or len(state) != len(own.state):
            raise TypeError("weights: got another number of tables, accepted: one per table")
        for given, mine in zip((*weights, *state), (*own.weights, *own.state), strict=True):
            if given.shape != mine.shape or given.dtype != mine.dtype:
                raise ValueError(
                    f"weights: got {given.dtype} {list(given.shape)} in the place of a table or its "
                    f"state, accepted: {mine.dtype} {list(mine.shape)}"
                )
        require_own(weights, fused=self.fused, train=self.training)

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

    # ----------------------------------------------------------------------------------- options

    def _change(self, **options: Any) -> None:
        """Change what a lookup returns: a backward whose forward came before is refused."""
        self.layout = replace(self.layout, **options)
        self.rebind()

    def _change_training(self, **options: Any) -> None:
        """Change how the tables are trained: it holds for a backward whose forward came before too."""
        batch = self._batch
        self.layout = replace(self.layout, **options)
        self._batch = TableBatch(
            self.layout, batch.kernels, batch.weights, batch.state_by_table, batch.counters
        )
        self.spec = self.layout.spec(batch.kernels.token)

    @property
    def pooling(self) -> str:
        """How the rows of a bag become one: "sum", "mean" or "none"."""
        return self.layout.pooling

    @pooling.setter
    def pooling(self, value: str) -> None:
        self._change(pooling=one_of("pooling", value, ("sum", "mean", "none")))

    @property
    def charge(self) -> str:
        """When decay is charged: "touch" or "read"."""
        return self.layout.charge

    @charge.setter
    def charge(self, value: str) -> None:
        self._change(charge=one_of("charge", value, ("touch", "read")))

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of what a lookup returns."""
        return self.layout.output_dtype

    @output_dtype.setter
    def output_dtype(self, value: torch.dtype) -> None:
        self._change(output_dtype=one_of("output_dtype", value, DTYPES))

    @property
    def on_nonfinite(self) -> str:
        """What becomes of rows whose update would not be finite: "skip", "raise" or "propagate"."""
        return self.layout.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, value: str) -> None:
        self._change_training(on_nonfinite=one_of("on_nonfinite", value, ON_NONFINITE))

    @property
    def update(self) -> RowUpdate:
        """What a touch does, in tables that have no update of their own."""
        return self._update

    @update.setter
    def update(self, value: RowUpdate) -> None:
        if not isinstance(value, RowUpdate):
            raise TypeError(f"update: got {value!r}, accepted: a coldrow.RowUpdate")
        tables = [
            layout if table.update else replace(layout, update=value)
            for table, layout in zip(self.tables, self.layout.tables, strict=True)
        ]
        for old, new in zip(self.layout.tables, tables, strict=True):
            if old.update.state_names != new.update.state_names:
                raise ValueError(
                    f"update: got one with state {list(new.update.state_names)}, accepted: one with the "
                    f"state of table {new.name!r}, {list(old.update.state_names)}; build another module"
                )
        self._update = value
        self._change_training(tables=tuple(tables))

    @property
    def fused(self) -> bool:
        """Whether the backward updates the tables. Fixed when the module is built."""
        return bool(self._fixed["fused"])

    @property
    def validate(self) -> str:
        """When bad values are raised on a CUDA device. Fixed when the module is built."""
        return str(self._fixed["validate"])

    @property
    def state_layout(self) -> str:
        """How state lies in memory. Fixed when the module is built."""
        return str(self._fixed["state_layout"])

    @property
    def param_groups(self) -> list[Any]:
        """One group per distinct update; ``group["lr"]`` is a live 0-dim tensor, assignable to a number.

        For torch's schedulers pass :attr:`optimizer`.
        """
        return self._rates.param_groups

    @property
    def optimizer(self) -> TablesOptimizer:
        """A ``torch.optim.Optimizer`` over :attr:`param_groups`, for LR schedulers and checkpoints.

        Its ``step()`` is :meth:`step` where ``fused=False`` and does nothing where the backward has
        already updated the tables. Its ``state`` are the live state arrays of the tables.
        """
        return TablesOptimizer(self) if self._handle is None else self._handle

    def attach(self, optimizer: TablesOptimizer) -> None:
        """Let an optimizer follow what becomes of the tables; it becomes :attr:`optimizer`."""
        self._handle = optimizer

    # -------------------------------------------------------------------------- what changes tables

    def owns(self, tables: TableBatch) -> bool:
        """Return whether these are the tables of this module, and no arrays put there for one call."""
        return tables is self._batch

    def current(self, tables: TableBatch) -> TableBatch:
        """Return the tables as they are trained now: with the policies of today.

        Raises:
            RuntimeError: if the arrays or what a lookup returns have become others than those of ``tables``.
        """
        if tables.weights is not self._batch.weights:
            raise RuntimeError(
                "the tables were loaded, evicted from, converted or moved between forward and "
                "backward, so this gradient no longer belongs to them"
            )
        return self._batch

    def step(self) -> None:
        """Apply gradients that backwards left on the tables."""
        raise NotImplementedError("step(): these tables have no backward")

    def stepping(self) -> None:
        """Say what is to be said before the first step. (A warning may be made an error.)"""
        if self._epoch_checked:
            return
        aware = any(is_epoch_aware(t.update) for t in self.layout.tables)
        at = self._batch.counters
        if aware and not self.epoch_declared and self._kernels.no_epoch(at.epoch_start):
            warnings.warn(
                "an epoch-aware decay is in use and new_epoch() was never called: until it is, "
                "nothing decays",
                stacklevel=2,
            )
        self._epoch_checked = True

    def stepped(self) -> None:
        """Take note of a step that was done; the kernels have set the clock."""
        if self._handle is not None:
            self._handle.mark_stepped()

    # -------------------------------------------------------------------------------- conversions

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=torch.float32, device=self._batch.device))
        self._require_device(probe.device)
        if probe.dtype not in DTYPES:
            raise TypeError(
                f"dtype: got {probe.dtype}, accepted: float32, float16, bfloat16 for the tables"
            )
        self._batch.check()  # what the kernels found stays behind
        weights = self.weights.tensors()
        # Gradients that wait for step() keep their dtype; they only follow to another device.
        waiting = [(i, p.grad) for i, p in enumerate(weights) if p.grad is not None]
        for i, _ in waiting:
            weights[i].grad = None
        counters = {name: self._buffers.pop(name) for name in _COUNTERS}
        try:
            super()._apply(in_table_memory(fn), recurse)
            counters = {name: moved(t, fn) for name, t in counters.items()}  # type: ignore[arg-type]
        finally:
            self._buffers.update(counters)
            for table in self.tables:
                table.dtype = self.weights[table.name].dtype
            self.rebind()
            for i, grad in waiting:
                parameter = self.weights.tensors()[i]
                dtype = getattr(
                    parameter, "grad_dtype", parameter.dtype
                )  # (torch < 2.10: the table's)
                parameter.grad = grad.to(parameter.device, dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_kernels", "anchor", "_batch", "_dicts", "_bound", "spec", "_handle")
        return {k: v for k, v in self.__dict__.items() if k not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = None
        self.rebind()

    # --------------------------------------------------------------------------------- state_dict

    def get_extra_state(self) -> Tensor:
        """Return the policies as text in a tensor, for ``state_dict``."""
        return described(self._policies())

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: policies were compared before anything was loaded."""

    def _policies(self) -> dict[str, Any]:
        updates = {t.name: t.update.to_dict() for t in self.layout.tables}
        return {"update": updates, "charge": self.charge}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a checkpoint, all of it or nothing; see :mod:`coldrow.nn.state_dict`.

        Raises:
            TypeError: what is no mapping.
            RuntimeError: listing all that is missing, unexpected or does not fit.
        """
        if not isinstance(state_dict, Mapping):
            got = type(state_dict).__name__
            raise TypeError(
                f"state_dict: got {got}, accepted: a mapping, as state_dict() returns it"
            )
        self._load_strict = bool(strict)
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._load_strict = None

    def _load_from_state_dict(  # all or nothing, see nn/state_dict.py
        self,
        given: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {
            f"state.{table}.{name}": tensor
            for table, arrays in self.state.items()
            for name, tensor in arrays.items()
        }
        counters = {n: b for n, b in self._buffers.items() if n in _SAVED}
        target = checkpoint.Target(
            weights={f"weights.{name}": p.detach() for name, p in self.weights.items()},
            own={**own, **counters},  # type: ignore[dict-item]
            policies=self._policies(),
            compare_policies=self.strict_policies and self._load_strict is not False,
        )
        # None: part of a larger model. Then torch loads what is there and raises for the rest if strict.
        fits = checkpoint.load(
            target,
            given,
            prefix,
            missing_keys,
            unexpected_keys,
            error_msgs,
            strict=self._load_strict is True,
            assign=bool((local_metadata or {}).get("assign_to_params_buffers", False)),
        )
        if not fits:
            return
        self.epoch_declared = self.epoch_start != 0
        # What is left for torch is the extra state; the buffers were loaded above.
        buffers, self._buffers = self._buffers, {}
        try:
            super()._load_from_state_dict(
                given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._buffers = buffers


def _after_load(module: TablesModule, _: Any) -> None:
    """Take in the tables that a load with ``assign=True`` put in place of the old ones."""
    module.rebind()


def _values(dicts: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, dicts))


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def require_own(tables: Iterable[Tensor], *, fused: bool, train: bool) -> None:
    """Refuse arrays that torch.func.functional_call has put in the place of fused tables, but for reading.

    A training step would write to them behind the back of whoever gave them, or lose their gradient.
    """
    if not fused or not torch.is_grad_enabled():
        return
    for table in tables:
        if not isinstance(table, nn.Parameter) and (train or table.requires_grad):
            raise TypeError(
                "weights: got tables that are not Parameters of their own (functional_call or a "
                "parametrization?), accepted: one nn.Parameter per table; or, in eval mode, tensors that "
                "do not require grad; or build the module with fused=False"
            )
