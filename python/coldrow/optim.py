"""Optimizers for ``nn.Embedding`` and ``nn.EmbeddingBag`` with ``sparse=True``.

Decay is charged on touch. For read charging the forward must know the clock: use :mod:`coldrow.nn`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from coldrow._backends.protocol import RowStep
from coldrow._checks import (
    LAST_STEP,
    ON_NONFINITE,
    integer,
    listed,
    number,
    one_of,
    require_state_dict,
)
from coldrow._steps import apply_steps, bump_versions, sparse_rows
from coldrow.functional import init_state
from coldrow.policies import LinearClipped, Nearest, Rounding, RowUpdate, RowwiseRMSprop

__all__ = ["RowwiseRMSpropAR", "SparseOptimizer"]


def _listed(params: Any) -> Any:
    if isinstance(params, Tensor):  # torch refuses it, or takes it for a group's
        return params
    return listed("params", params, "embedding weights [E, D], or param groups of them")


class SparseOptimizer(torch.optim.Optimizer):
    """Applies a :class:`coldrow.RowUpdate` to the rows that sparse gradients touch.

    The clock ticks once per :meth:`step`. Duplicate rows in a gradient are summed first. Each group's
    ``lr`` and ``update`` may be given per group; torch's LR schedulers work on ``lr``.

    Args:
        params: embedding weights ``[E, D]`` (float32, float16 or bfloat16) or param groups.
        update: what a touch does.
        lr: default ``update.optimizer.lr``.
        on_nonfinite: rows whose update would not be finite: "skip" (counted in ``nonfinite_rows``),
            "raise" (nothing is written) or "propagate".

    Raises:
        TypeError, ValueError: a parameter or option that is not accepted.
    """

    def __init__(
        self,
        params: Iterable[Any],
        update: RowUpdate,
        *,
        lr: float | Tensor | None = None,
        on_nonfinite: str = "skip",
    ) -> None:
        if not isinstance(update, RowUpdate):
            raise TypeError(f"update: got {update!r}, accepted: a coldrow.RowUpdate")
        self._start(on_nonfinite)
        self._lr_of_update = lr is None  # a group's own update then brings its own lr
        super().__init__(
            _listed(params), {"lr": update.optimizer.lr if lr is None else lr, "update": update}
        )

    def _start(self, on_nonfinite: str) -> None:
        self.on_nonfinite = one_of("on_nonfinite", on_nonfinite, ON_NONFINITE)
        self.nonfinite_rows = 0
        self._lr_of_update = False
        self._clock = torch.zeros((), dtype=torch.int64, device="cpu")
        self._epoch_start = torch.zeros((), dtype=torch.int64, device="cpu")

    def _update_of(self, group: dict[str, Any]) -> RowUpdate:
        """Return the update of a group, checked."""
        update = group["update"]
        if not isinstance(update, RowUpdate):
            raise TypeError(f"update: got {update!r}, accepted: a coldrow.RowUpdate")
        return update

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checking its options and parameters."""
        update = self._update_of({**self.defaults, **param_group})
        if "update" in param_group and self._lr_of_update:
            param_group = {"lr": update.optimizer.lr, **param_group}
        number("lr", param_group.get("lr", self.defaults["lr"]))
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else _listed(params)
        for p in params:
            if not isinstance(p, Tensor) or p.dim() != 2:
                shape = list(p.shape) if isinstance(p, Tensor) else type(p).__name__
                raise ValueError(f"params: got {shape}, accepted: embedding weights [E, D]")
            if p.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise TypeError(
                    f"params: got dtype {p.dtype}, accepted: float32, float16, bfloat16"
                )
            if getattr(p, "coldrow_fused", False):
                raise ValueError(
                    "params: got a table of a fused module, whose backward updates it, accepted: "
                    "parameters that get gradients (build the module with fused=False)"
                )
            if getattr(p, "coldrow_read_charged", False):
                raise ValueError(
                    "params: got a table of a read-charged module, accepted: touch charging only; "
                    "the module's own step() knows its clock"
                )
        super().add_param_group({**param_group, "params": params})
        for p in params:
            self._state_of(p, update)

    def _state_of(self, parameter: Tensor, update: RowUpdate) -> dict[str, Tensor]:
        """Return the state of a parameter: zeros to begin with, where the parameter is.

        (Made before the first step, so that torch's tools find it: they step with dense gradients of zeros
        to make state that is not there.)
        """
        state: dict[str, Tensor] = self.state[parameter]
        if set(state) != set(update.state_names):
            if state and bool((state["prev_iter"] != 0).any()):  # another optimizer's
                raise ValueError(
                    f"update: got one with {sorted(update.state_names)}, accepted: one with the "
                    f"state that the parameter has, {sorted(state)}"
                )
            state = init_state(update, parameter.shape[0], parameter.shape[1], parameter)
        elif state["prev_iter"].device != parameter.device:  # the model was moved since
            state = {name: array.to(parameter.device) for name, array in state.items()}
        else:
            return state
        self.state[parameter] = state
        return state

    @property
    def clock(self) -> int:
        """Steps done so far. Assignable to any value from there on, up to 2**31 - 1."""
        return int(self._clock)

    @clock.setter
    def clock(self, value: int) -> None:
        self._clock.fill_(integer("clock", value, self.clock, LAST_STEP))

    def new_epoch(self) -> None:
        """Declare that the next step begins an epoch (for EpochGated and EpochReset)."""
        self._epoch_start.fill_(integer("epoch_start", self.clock + 1, 1, LAST_STEP))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply the gradients; returns the closure's loss, if there is one.

        Raises:
            TypeError: a gradient that is not sparse.
            ValueError: a non-finite update under ``on_nonfinite="raise"``, or a clock at its end.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step = integer("step", self.clock + 1, 1, LAST_STEP)
        steps = []
        key = -1
        for group in self.param_groups:
            update, lr = self._update_of(group), number("lr", group["lr"])
            for p in group["params"]:
                key += 1
                rows = sparse_rows(
                    p.grad,
                    "grad",
                    "sparse gradients (build the nn.Embedding or nn.EmbeddingBag with sparse=True)",
                )
                if rows is None:
                    continue
                state = self._state_of(p, update)
                arrays = [state[n] for n in update.state_names if n != "prev_iter"]
                prev_iter = state["prev_iter"]
                steps.append(RowStep(update, p, *rows, arrays, prev_iter, lr, key))
        self.nonfinite_rows += apply_steps(
            steps,
            step=step,
            epoch_start=int(self._epoch_start),
            on_nonfinite=self.on_nonfinite,
            clock=self._clock,
        )
        bump_versions(*(s.weight for s in steps))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return state and param groups; policies as plain values.

        ``clock`` and ``epoch_start`` stand in each group too, where torch.distributed.checkpoint keeps them.
        """
        saved = super().state_dict()
        for group in saved["param_groups"]:
            for key, value in group.items():
                if isinstance(value, RowUpdate):
                    group[key] = value.to_dict()
                elif isinstance(value, Rounding):
                    group[key] = RowUpdate(rounding=value).to_dict()
            group["clock"], group["epoch_start"] = int(self._clock), int(self._epoch_start)
        saved["clock"] = self._clock.clone()
        saved["epoch_start"] = self._epoch_start.clone()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: state that does not fit the parameters.
        """
        require_state_dict(state_dict)
        saved = dict(state_dict)
        if not saved["param_groups"]:
            raise ValueError("param_groups: got none, accepted: a state_dict of this class")
        counters = {}
        for key, low in (("clock", 0), ("epoch_start", 0)):
            given = saved.pop(key, saved["param_groups"][0].get(key))
            if given is None:
                raise ValueError(f"{key}: got none, accepted: a state_dict of this class")
            counters[key] = integer(key, given, low, LAST_STEP)
        clock, epoch_start = counters["clock"], counters["epoch_start"]
        saved["param_groups"] = [self._revived(group) for group in saved["param_groups"]]
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        updates = {
            i: self._update_of(group) for group in saved["param_groups"] for i in group["params"]
        }
        if len(ids) == len(params):  # else torch says what is wrong
            for i, p in zip(ids, params, strict=True):
                if i in saved["state"]:
                    _check_state(saved["state"][i], updates[i], p, clock)
        super().load_state_dict(saved)
        # torch casts state to the parameter's dtype; ours has its own.
        for i, p in zip(ids, params, strict=True):
            if i in saved["state"]:
                self.state[p] = {n: v.to(p.device, copy=True) for n, v in saved["state"][i].items()}
        self._clock.fill_(clock)
        self._epoch_start.fill_(epoch_start)

    def _revived(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a saved group with its policies as objects again, and its lr checked."""
        group = {k: v for k, v in group.items() if k not in ("clock", "epoch_start")}
        missing = sorted(self.defaults.keys() - group.keys())
        if missing:
            raise ValueError(
                f"param_groups: got no {missing}, accepted: a state_dict of this class"
            )
        for key, value in group.items():
            if isinstance(value, dict) and value.get("policy") == "RowUpdate":
                update = RowUpdate.from_dict(value)
                group[key] = update if key == "update" else update.rounding
        number("lr", group["lr"])
        return group

    def __getstate__(self) -> dict[str, Any]:
        own = ("on_nonfinite", "nonfinite_rows", "_lr_of_update", "_clock", "_epoch_start")
        return {**super().__getstate__(), **{k: self.__dict__[k] for k in own}}


def _check_state(state: dict[str, Any], update: RowUpdate, weight: Tensor, clock: int) -> None:
    """Refuse saved state that is not that of ``update`` for the table ``weight``."""
    shapes = update.state_shapes(weight.shape[0], weight.shape[1])
    if set(state) != set(shapes):
        raise ValueError(f"state: got {sorted(state)}, accepted: {sorted(shapes)}")
    for name, value in state.items():
        want = torch.int32 if name == "prev_iter" else torch.float32
        shape = shapes[name]
        if value.shape != shape or value.dtype != want:
            raise ValueError(
                f"state {name}: got {value.dtype} {list(value.shape)}, accepted: {want} "
                f"{list(shape)}"
            )
    low, high = int(state["prev_iter"].min()), int(state["prev_iter"].max())
    if low < 0 or high > clock:
        raise ValueError(f"state prev_iter: got {low} to {high}, accepted: 0 to the clock, {clock}")


class RowwiseRMSpropAR(SparseOptimizer):
    """Row-wise RMSprop with adaptive regularization, charged on touch (FBGEMM's ROWWISE_RMSPROP_AR).

    ``w = max(min_shrinkage, 1 - min(1, lr*ar_alpha*I)) * w - lr/(sqrt(momentum1)+eps) * g`` with ``I``
    the number of steps since the row was last touched; see :func:`coldrow.rowwise_rmsprop_ar_`. Every
    option may be set per param group.

    Args:
        params: embedding weights ``[E, D]`` or param groups.
        lr: learning rate, >= 0.
        ar_alpha: >= 0; 0 is plain row-wise RMSprop.
        eps: >= 0.
        ema_beta: in [0, 1].
        min_shrinkage: in [0, 1].
        rounding: default :class:`coldrow.Nearest`; use :class:`coldrow.Stochastic` for 16-bit tables.
        on_nonfinite: as for :class:`SparseOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.01,
        ar_alpha: float = 0.0,
        eps: float = 1e-8,
        ema_beta: float = 0.99,
        min_shrinkage: float = 0.1,
        rounding: Rounding | None = None,
        *,
        on_nonfinite: str = "skip",
    ) -> None:
        self._start(on_nonfinite)
        defaults = {
            "lr": lr,
            "ar_alpha": ar_alpha,
            "eps": eps,
            "ema_beta": ema_beta,
            "min_shrinkage": min_shrinkage,
            "rounding": Nearest() if rounding is None else rounding,
        }
        torch.optim.Optimizer.__init__(self, _listed(params), defaults)

    def _update_of(self, group: dict[str, Any]) -> RowUpdate:
        return RowUpdate(
            RowwiseRMSprop(eps=group["eps"], ema_beta=group["ema_beta"]),
            LinearClipped(number("ar_alpha", group["ar_alpha"]), group["min_shrinkage"]),
            group["rounding"],
        )
