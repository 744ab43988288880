"""Policies: what an update is composed of.

A :class:`RowUpdate` is an optimizer, a decay schedule and a rounding, each a frozen dataclass: equal
by value, hashable, picklable. The formulas are in ``include/coldrow/policy``; nothing is computed
here. With ``I`` the number of optimizer steps since a row was last touched, a touch does::

    shrink = decay(I, lr)
    w      = round(shrink * w - optimizer's step)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from coldrow import _core
from coldrow._checks import item, number

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Constant",
    "CumulativeLinear",
    "Decay",
    "EpochGated",
    "EpochReset",
    "Exponential",
    "LinearClipped",
    "Nearest",
    "NoDecay",
    "Optimizer",
    "PartialRowwiseAdam",
    "Rounding",
    "RowUpdate",
    "RowwiseAdagrad",
    "RowwiseRMSprop",
    "Stochastic",
]

_SMALLEST_FLOAT32 = 1.17549435e-38  # the smallest normal one
_BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1


class _Policy:
    """What all policies share: numbers are checked and turned into floats on construction."""

    _kind: str  # "optimizer", "decay" or "rounding"
    _name = ""  # of the C++ struct, in the list of its kind (include/coldrow/policy)

    def _fields(self) -> dict[str, Any]:
        """Return the values of the C++ struct's fields, by name."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.name != "lr"
        }

    def native(self) -> dict[str, Any]:
        """Return the part of the compiled form's arguments that says which policy it is."""
        return {self._kind: self._name, f"{self._kind}_fields": self._fields()}

    def described(self) -> dict[str, Any]:
        """Return the policy as plain values (for checkpoints)."""
        return _plain(self)

    def _check(self, name: str, **bounds: Any) -> None:
        object.__setattr__(self, name, number(name, getattr(self, name), **bounds))


class Optimizer(_Policy):
    """Base class of optimizers. ``lr`` is the initial learning rate."""

    lr: float
    _kind = "optimizer"


class Decay(_Policy):
    """Base class of decay schedules: a factor in [0, 1] by which a row shrinks after ``gap`` steps."""

    _kind = "decay"


class Rounding(_Policy):
    """Base class of roundings: how a float32 result becomes a stored weight."""

    _kind = "rounding"


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent, without state: ``w -= lr * g``.

    Args:
        lr: learning rate, >= 0.
    """

    lr: float = 0.01

    _name = "sgd"

    def __post_init__(self) -> None:
        self._check("lr")


@dataclass(frozen=True)
class RowwiseRMSprop(Optimizer):
    """Row-wise RMSprop: one float32 second moment (``momentum1``) per row.

    ``v = ema_beta * v + (1 - ema_beta) * mean(g**2)``, ``w -= lr / (sqrt(v) + eps) * g``

    Args:
        lr: learning rate, >= 0.
        eps: added to the square root, >= 0.
        ema_beta: decay of the second moment, in [0, 1].
    """

    lr: float = 0.01
    eps: float = 1e-8
    ema_beta: float = 0.99

    _name = "rowwise_rmsprop"

    def __post_init__(self) -> None:
        self._check("lr")
        self._check("eps")
        self._check("ema_beta", high=1.0)


@dataclass(frozen=True)
class RowwiseAdagrad(Optimizer):
    """Row-wise Adagrad: one float32 sum of squares (``momentum1``) per row.

    ``v += mean(g**2)``, ``w -= lr / (sqrt(v) + eps) * g``; FBGEMM's EXACT_ROWWISE_ADAGRAD.

    Args:
        lr: learning rate, >= 0.
        eps: added to the square root, >= 0.
    """

    lr: float = 0.01
    eps: float = 1e-8

    _name = "rowwise_adagrad"

    def __post_init__(self) -> None:
        self._check("lr")
        self._check("eps")


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad: one float32 sum of squares (``momentum1``) per element.

    ``v += g**2``, ``w -= lr * g / (sqrt(v) + eps)``; as torch.optim.Adagrad. With a decay it is the
    AdagradAR of Li & Lyu.

    Args:
        lr: learning rate, >= 0.
        eps: added to the square root, > 0 (a normal float32).
    """

    lr: float = 0.01
    eps: float = 1e-10

    _name = "adagrad"

    def __post_init__(self) -> None:
        self._check("lr")
        self._check("eps", low=_SMALLEST_FLOAT32)


class _Adam(Optimizer):
    """What the two Adams have in common."""

    beta1: float
    beta2: float
    eps: float
    bias_correction: str

    def __post_init__(self) -> None:
        self._check("lr")
        self._check("beta1", high=_BELOW_ONE)
        self._check("beta2", high=_BELOW_ONE)
        self._check("eps", low=_SMALLEST_FLOAT32)
        given = self.bias_correction
        if not isinstance(given, str) or given not in ("clock", "row"):
            raise ValueError(
                f"bias_correction: got {self.bias_correction!r}, accepted: 'clock', 'row'"
            )

    def native(self) -> dict[str, Any]:
        """Return the name of the struct for this bias correction, and its fields."""
        by_touches = "_by_touches" if self.bias_correction == "row" else ""
        return {
            "optimizer": self._name + by_touches,
            "optimizer_fields": {"eps": self.eps, "beta1": self.beta1, "beta2": self.beta2},
        }


@dataclass(frozen=True)
class Adam(_Adam):
    """Adam: two float32 moments (``momentum1``, ``momentum2``) per element.

    ``m = beta1*m + (1-beta1)*g``, ``v = beta2*v + (1-beta2)*g**2``,
    ``w -= lr * (m / (1-beta1**n)) / (sqrt(v / (1-beta2**n)) + eps)``. Moments age only when the row is
    touched, as with torch.optim.SparseAdam. With a decay it is the AdamAR of Li & Lyu.

    Args:
        lr: learning rate, >= 0.
        beta1: in [0, 1).
        beta2: in [0, 1).
        eps: added to the square root, > 0 (a normal float32).
        bias_correction: what n counts: "clock", the optimizer's steps (torch, FBGEMM), or "row", the
            row's own touches (one more float32 per row, ``touches``).
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    bias_correction: str = "clock"

    _name = "adam"


@dataclass(frozen=True)
class PartialRowwiseAdam(_Adam):
    """Adam with one second moment (``momentum2``) per row; FBGEMM's PARTIAL_ROWWISE_ADAM.

    ``m = beta1*m + (1-beta1)*g``, ``v = beta2*v + (1-beta2)*mean(g**2)``,
    ``w -= lr * (m / (1-beta1**n)) / (sqrt(v / (1-beta2**n)) + eps)``. Moments age only when the row is
    touched.

    Args:
        lr: learning rate, >= 0.
        beta1: in [0, 1).
        beta2: in [0, 1).
        eps: added to the square root, > 0 (a normal float32).
        bias_correction: as for :class:`Adam`.
    """

    lr: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    bias_correction: str = "clock"

    _name = "partial_rowwise_adam"


@dataclass(frozen=True)
class NoDecay(Decay):
    """Factor 1: the plain optimizer."""

    _name = "none"


@dataclass(frozen=True)
class LinearClipped(Decay):
    """``max(min_shrinkage, 1 - clip(lr*alpha*I, 0, 1))``: FBGEMM's adaptive regularization, exactly.

    Args:
        alpha: strength per step and unit of lr, >= 0. With 0 the update is bit for bit the plain one.
        min_shrinkage: the factor never falls below it, in [0, 1]; 0 lets a cold row reset to zero.
    """

    alpha: float
    min_shrinkage: float = 0.1

    _name = "linear_clipped"

    def __post_init__(self) -> None:
        self._check("alpha")
        self._check("min_shrinkage", high=1.0)


@dataclass(frozen=True)
class CumulativeLinear(Decay):
    """``prod_{j=1}^{I-1} (1 - min(1, alpha*j))``, about ``2**-(I/half_life)**2``.

    The paper's adaptive regularization run densely, evaluated lazily: flat for recently touched rows,
    then steep. Neither lr nor a floor enters.

    Args:
        alpha: strength, >= 0. Give this or ``half_life``.
        half_life: steps after which a row has halved, > 0; ``alpha = 2 ln 2 / half_life**2``.
    """

    alpha: float | None = None
    half_life: float | None = None

    _name = "cumulative_linear"

    def __post_init__(self) -> None:
        _exactly_one(self, "alpha", "half_life")

    @classmethod
    def for_epoch(cls, steps_per_epoch: float) -> CumulativeLinear:
        """Return the default without an epoch signal: half-life 0.3 of an epoch."""
        return cls(half_life=0.3 * number("steps_per_epoch", steps_per_epoch, low_open=True))

    def _fields(self) -> dict[str, Any]:
        if self.half_life is not None:
            square = max(self.half_life**2, 1e-300)  # whatever is shorter forgets all at once
            return {"alpha": 2 * math.log(2) / square}
        return {"alpha": self.alpha}

    def __repr__(self) -> str:
        return _repr_given(self)


@dataclass(frozen=True)
class Exponential(Decay):
    """``max(0, 1 - lr*weight_decay)**I``, or ``2**-(I/half_life)``.

    The first form is decoupled (AdamW) weight decay evaluated lazily. It charges a whole gap at the lr
    of the step that pays, so it equals the dense decay while lr is constant.

    Args:
        weight_decay: >= 0. Give this or ``half_life``.
        half_life: steps after which a row has halved, > 0.
    """

    weight_decay: float | None = None
    half_life: float | None = None

    _name = "exponential"

    def __post_init__(self) -> None:
        _exactly_one(self, "weight_decay", "half_life")

    def _fields(self) -> dict[str, Any]:
        return {"weight_decay": self.weight_decay or 0.0, "half_life": self.half_life or 0.0}

    def __repr__(self) -> str:
        return _repr_given(self)


@dataclass(frozen=True)
class Constant(Decay):
    """``max(0, 1 - lr*weight_decay)`` whatever the gap: decoupled weight decay on touched rows only.

    Args:
        weight_decay: >= 0.
    """

    weight_decay: float

    _name = "constant"

    def __post_init__(self) -> None:
        self._check("weight_decay")


@dataclass(frozen=True)
class EpochGated(Decay):
    """``decay`` for rows last touched before the running epoch, else 1.

    The first epoch is left alone; each later one starts from faded rows. An epoch starts where
    ``new_epoch()`` (or ``epoch_start``) says so; if nothing says so, nothing ever decays.

    Args:
        decay: any schedule but another epoch-aware one.
    """

    decay: Decay

    def __post_init__(self) -> None:
        if not isinstance(self.decay, Decay) or isinstance(self.decay, (EpochGated, EpochReset)):
            raise TypeError(
                f"decay: got {self.decay!r}, accepted: a decay that is not epoch-aware itself"
            )

    @classmethod
    def for_epoch(cls, steps_per_epoch: float) -> EpochGated:
        """Return the default with an epoch signal: CumulativeLinear, half-life 0.05 of an epoch."""
        half_life = 0.05 * number("steps_per_epoch", steps_per_epoch, low_open=True)
        return cls(CumulativeLinear(half_life=half_life))

    def native(self) -> dict[str, Any]:
        """Return the inner decay's, with the gate."""
        return {**self.decay.native(), "epoch_gated": True}


@dataclass(frozen=True)
class EpochReset(Decay):
    """0 for rows last touched before the running epoch, else 1.

    Re-initialises tables at each epoch, row by row as they are read or touched. For tables whose
    initial value is zero.
    """

    _name = "epoch_reset"


@dataclass(frozen=True)
class Nearest(Rounding):
    """Round to nearest, ties to even.

    In 16 bits small decay vanishes: in bfloat16 any factor above about 1 - 2**-9 rounds back to the
    same weight. Use :class:`Stochastic` there.
    """

    _name = "nearest"


@dataclass(frozen=True)
class Stochastic(Rounding):
    """Round up with a probability equal to the fraction dropped: unbiased in bfloat16 and float16.

    The random bits are a function of (seed, step, table, global row, global column), so a run repeats
    bit for bit whatever the number of threads. float32 tables are stored exactly as with Nearest.

    Args:
        seed: an integer from 0 to 2**64 - 1.
    """

    seed: int = 0

    _name = "stochastic"

    def __post_init__(self) -> None:
        error = f"seed: got {self.seed!r}, accepted: an integer from 0 to 2**64 - 1"
        try:
            seed = item(self.seed)
            if isinstance(seed, bool):
                raise TypeError(error)
            seed = operator.index(seed)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(error) from None
        if not 0 <= seed < 2**64:
            raise ValueError(error)
        object.__setattr__(self, "seed", seed)


@dataclass(frozen=True)
class RowUpdate:
    """An update: optimizer, decay and rounding composed.

    Args:
        optimizer: an :class:`Optimizer`. Its lr is the initial one; modules, optimizers and the
            ``lr=`` of functions override it.
        decay: a :class:`Decay`.
        rounding: a :class:`Rounding`.
        decay_state: multiply the row's optimizer state by the same factor before it is updated.
    """

    optimizer: Optimizer = RowwiseRMSprop()
    decay: Decay = NoDecay()
    rounding: Rounding = Nearest()
    decay_state: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("optimizer", Optimizer), ("decay", Decay), ("rounding", Rounding)):
            given = getattr(self, name)
            if not isinstance(given, kind):
                raise TypeError(
                    f"{name}: got {given!r}, accepted: an instance of coldrow.{kind.__name__}"
                )
            if not given._name and type(given).native is _Policy.native:
                raise TypeError(
                    f"{name}: got {given!r}, accepted: one of coldrow's or one made by coldrow.jit "
                    "(a subclass in Python has no kernel)"
                )
        if not isinstance(self.decay_state, bool):
            raise TypeError(f"decay_state: got {self.decay_state!r}, accepted: True or False")

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state arrays this update needs: prev_iter and the optimizer's."""
        native = compiled(self)
        return ("prev_iter", *native.scalar_states, *native.vector_states)

    def state_shapes(self, num_rows: int, dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each state array: ``(num_rows,)``, or ``(num_rows, dim)``."""
        by_element = compiled(self).vector_states
        return {
            name: (num_rows, dim) if name in by_element else (num_rows,)
            for name in self.state_names
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the composition as plain values (for checkpoints)."""
        return _plain(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RowUpdate:
        """Return the update that :meth:`to_dict` described."""

        def build(described: Mapping[str, Any]) -> Any:
            restore = _RESTORED_BY.get(described.get("policy", ""))
            if restore is not None:
                return restore(described)
            kind = _BY_NAME.get(described.get("policy", ""))
            if kind is None:
                raise ValueError(
                    f"policy: got {described.get('policy')!r}, accepted: {', '.join(_BY_NAME)}"
                )
            fields = {k: v for k, v in described.items() if k != "policy"}
            return kind(**{k: build(v) if isinstance(v, Mapping) else v for k, v in fields.items()})

        update: RowUpdate = build(values)
        return update


_BY_NAME: dict[str, Any] = {"RowUpdate": RowUpdate} | {
    name: kind
    for name, kind in globals().items()
    if isinstance(kind, type) and issubclass(kind, _Policy) and dataclasses.is_dataclass(kind)
}


# Policies that are no dataclasses of plain fields, and who makes them again (coldrow.jit puts its own here).
_RESTORED_BY: dict[str, Callable[[Mapping[str, Any]], Any]] = {}


def restored_by(name: str, restore: Callable[[Mapping[str, Any]], Any]) -> None:
    """Let :meth:`RowUpdate.from_dict` make policies named ``name`` by ``restore``."""
    _RESTORED_BY[name] = restore


def _plain(dataclass: Any) -> dict[str, Any]:
    """Return the name and the fields of a policy, or of a composition of some."""
    values = {f.name: getattr(dataclass, f.name) for f in dataclasses.fields(dataclass)}
    return {
        "policy": type(dataclass).__name__,
        **{k: v.described() if isinstance(v, _Policy) else v for k, v in values.items()},
    }


def is_epoch_aware(update: RowUpdate) -> bool:
    """Return whether the update's decay depends on where an epoch began."""
    return isinstance(update.decay, (EpochGated, EpochReset))


def _exactly_one(policy: _Policy, rate: str, half_life: str) -> None:
    given = [n for n in (rate, half_life) if getattr(policy, n) is not None]
    if len(given) != 1:
        raise TypeError(
            f"{type(policy).__name__}: got {' and '.join(given) or 'neither'}, "
            f"accepted: exactly one of {rate} and {half_life}"
        )
    policy._check(given[0], low_open=given[0] == half_life)


def _repr_given(policy: Any) -> str:
    given = [
        f"{f.name}={getattr(policy, f.name)!r}"
        for f in dataclasses.fields(policy)
        if getattr(policy, f.name) is not None
    ]
    return f"{type(policy).__name__}({', '.join(given)})"


def native_arguments(update: RowUpdate) -> dict[str, Any]:
    """Return what the compiled form of an update is made of."""
    return {
        **update.optimizer.native(),
        **update.decay.native(),
        **update.rounding.native(),
        "decay_state": update.decay_state,
    }


@functools.lru_cache(maxsize=1024)
def compiled(update: RowUpdate) -> _core.Update:
    """Return the compiled form of an update for the processor (cached by value)."""
    return _core.Update(**native_arguments(update))
