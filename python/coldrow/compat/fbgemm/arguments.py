"""What each constructor argument means in coldrow's terms, and which are refused.

The rule: an argument that coldrow does not support is accepted at FBGEMM's default and refused by name
otherwise, also where FBGEMM would ignore it.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import torch

from coldrow import cuda, policies
from coldrow._checks import integer, number
from coldrow.compat.fbgemm.definitions import (
    BoundsCheckMode,
    CacheAlgorithm,
    ComputeDevice,
    EmbeddingLocation,
    EmbOptimType,
    SparseType,
    WeightDecayMode,
    member,
)

NO_CACHE = "there is no cache in front of the tables"
# Arguments that have one accepted value, and why.
ONLY_DEFAULT: dict[str, tuple[Any, str]] = {
    "cache_algorithm": (CacheAlgorithm.LRU, NO_CACHE),
    "cache_load_factor": (0.2, NO_CACHE),
    "cache_sets": (0, NO_CACHE),
    "cache_reserved_memory": (0.0, NO_CACHE),
    "enforce_hbm": (False, NO_CACHE),
    "gather_uvm_cache_stats": (False, NO_CACHE),
    "max_norm": (0.0, "rows are not renormalised"),
    "momentum": (0.9, "for LARS_SGD, which coldrow does not have"),
    "eta": (0.001, "for LARS_SGD, which coldrow does not have"),
    "ensemble_mode": (None, "for ENSEMBLE_ROWWISE_ADAGRAD, which coldrow does not have"),
    "emainplace_mode": (None, "for EMAINPLACE_ROWWISE_ADAGRAD, which coldrow does not have"),
    "counter_based_regularization": (None, "rows' touches are not counted"),
    "cowclip_regularization": (None, "rows' touches are not counted"),
    "uvm_non_rowwise_momentum": (False, "state lives beside its table"),
    "use_experimental_tbe": (False, "coldrow has one implementation"),
    "prefetch_pipeline": (False, NO_CACHE),
    "stats_reporter_config": (None, "nothing is reported"),
    "multipass_prefetch_config": (None, NO_CACHE),
    "global_weight_decay": (
        None,
        "the nearest is decay=coldrow.Exponential(weight_decay=...), charge='read'",
    ),
    "uvm_host_mapped": (False, "there is no unified memory"),
    "tbe_input_multiplexer_config": (None, "nothing is reported"),
    "enable_raw_embedding_streaming": (False, "rows are not streamed"),
    "is_qr_tbe": (False, "no quotient-remainder tables"),
    "preallocated_host_buffers": (None, "tables and state are allocated here"),
}

_FORWARD_ONLY_NONE = {
    "total_unique_indices": "for EmbOptimType.NONE, which coldrow does not have",
    "hash_zch_identities": "rows are not streamed",
    "hash_zch_runtime_meta": "rows are not streamed",
    "vbe_output": "the output is allocated here",
    "vbe_output_offsets": "the output is allocated here",
}


def _same(given: Any, default: Any) -> bool:
    if isinstance(default, enum.Enum):
        return isinstance(given, enum.Enum) and str(given) == str(default)
    if default is None or isinstance(default, bool):
        return given is default
    return isinstance(given, (int, float)) and not isinstance(given, bool) and given == default


def refuse_unsupported(given: Mapping[str, Any]) -> None:
    """Raise for the first constructor argument that has one accepted value and is given another.

    Raises:
        ValueError: naming it.
    """
    for name, (default, why) in ONLY_DEFAULT.items():
        # None for a flag is what some callers pass on for "not set".
        if not _same(given[name], default) and not (given[name] is None and default is False):
            raise ValueError(f"{name}: got {given[name]!r}, accepted: {default!r} ({why})")
    metrics = given["record_cache_metrics"]
    if metrics is not None and metrics != (False, False):  # a NamedTuple, FBGEMM's or this one
        raise ValueError(
            f"record_cache_metrics: got {metrics!r}, accepted: None, or one that records nothing "
            f"({NO_CACHE})"
        )
    if given["res_params"] is not None and type(given["res_params"]).__name__ != "RESParams":
        raise TypeError(f"res_params: got {given['res_params']!r}, accepted: None or a RESParams")
    for name in ("embedding_table_index_type", "embedding_table_offset_type"):
        if given[name] not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: got {given[name]!r}, accepted: torch.int32, torch.int64")


def refuse_unsupported_inputs(**given: Any) -> None:
    """Raise for an argument of forward that has no meaning here and is not None.

    Raises:
        ValueError: naming it.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: is given, accepted: None ({_FORWARD_ONLY_NONE[name]})")


def check_bounds_check_mode(given: Any) -> BoundsCheckMode:
    """Return the mode, or raise for those that ask for bad indices to be used as if they were 0."""
    mode = member("bounds_check_mode", given, BoundsCheckMode)
    if mode in (BoundsCheckMode.IGNORE, BoundsCheckMode.V2_IGNORE):
        raise ValueError(
            f"bounds_check_mode: got {mode!r}, accepted: FATAL, WARNING, NONE (a bad index always raises "
            "an IndexError here and is never replaced by 0)"
        )
    return mode


def dtype_of(name: str, given: Any) -> torch.dtype:
    """Return the torch dtype of a SparseType that coldrow can store and return."""
    kind = member(name, given, SparseType)
    if kind not in (SparseType.FP32, SparseType.FP16, SparseType.BF16):
        raise ValueError(f"{name}: got {kind!r}, accepted: FP32, FP16, BF16")
    return kind.as_dtype()


def check_cache_precision(given: Any, weights: Any) -> None:
    """Accept what says nothing: None, or the weights' own precision (as TorchRec passes it)."""
    if given is None:
        return
    if member("cache_precision", given, SparseType) != member(
        "weights_precision", weights, SparseType
    ):
        raise ValueError(
            f"cache_precision: got {given!r}, accepted: None or weights_precision, {weights!r} ({NO_CACHE})"
        )


def check_state_dtypes(given: Any) -> None:
    """Accept optimizer states in float32 only."""
    accepted = "accepted: None, or SparseType.FP32 for each state"
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise TypeError(f"optimizer_state_dtypes: got {given!r}, {accepted}")
    for state, kind in given.items():
        if member(f"optimizer_state_dtypes[{state!r}]", kind, SparseType) != SparseType.FP32:
            raise ValueError(f"optimizer_state_dtypes: got {given!r}, {accepted}")


def rowwise_bias_correction(given: Any, optimizer: EmbOptimType) -> bool:
    """Return the one supported option of a UserEnabledConfigDefinition, or raise for the others."""
    if given is None:
        return False
    if type(given).__name__ != "UserEnabledConfigDefinition":
        raise TypeError(
            f"extra_optimizer_config: got {given!r}, accepted: None or a UserEnabledConfigDefinition"
        )
    on = {name for name, value in vars(given).items() if value is not False}
    accepted = {"use_rowwise_bias_correction"} if optimizer is EmbOptimType.ADAM else set()
    if on - accepted:
        raise ValueError(
            f"extra_optimizer_config: got {', '.join(sorted(on))} with optimizer {optimizer.name}, "
            "accepted: use_rowwise_bias_correction, with ADAM"
        )
    return bool(on)


# ----------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Spec:
    """One entry of ``embedding_specs``."""

    rows: int
    dim: int
    location: EmbeddingLocation
    compute: ComputeDevice


def parse_specs(given: Any) -> list[Spec]:
    """Return ``embedding_specs`` checked.

    Raises:
        TypeError: not a list of ``(rows, dim, EmbeddingLocation, ComputeDevice)``.
        ValueError: a size, or a place where coldrow has no tables.
    """
    shape = "accepted: a non-empty list of (rows, dim, EmbeddingLocation, ComputeDevice)"
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(f"embedding_specs: got {given!r}, {shape}")
    specs = []
    for t, entry in enumerate(given):
        name = f"embedding_specs[{t}]"
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 4:
            raise TypeError(f"{name}: got {entry!r}, {shape}")
        spec = Spec(
            integer(f"{name}, rows", entry[0], 1, 2**62),
            integer(f"{name}, dim", entry[1], 1, 2**30),
            member(name, entry[2], EmbeddingLocation),
            member(name, entry[3], ComputeDevice),
        )
        places = [(EmbeddingLocation.HOST, ComputeDevice.CPU)]
        if cuda.is_available():
            places.append((EmbeddingLocation.DEVICE, ComputeDevice.CUDA))
        if (spec.location, spec.compute) not in places:
            accepted = " or ".join(f"{p.name} with {c.name}" for p, c in places)
            raise ValueError(
                f"{name}: got {spec.location.name} with {spec.compute.name}, accepted: {accepted}"
                + ("" if cuda.is_available() else " (this build has no CUDA support)")
            )
        specs.append(spec)
    if not specs:
        raise TypeError(f"embedding_specs: got {given!r}, {shape}")
    if len({spec.compute for spec in specs}) > 1:
        raise ValueError("embedding_specs: got tables on several devices, accepted: one device")
    return specs


def parse_feature_table_map(given: Any, tables: int) -> list[int]:
    """Return the table of each feature; each table has one at least."""
    if given is None:
        return list(range(tables))
    error = f"feature_table_map: got {given!r}, accepted: numbers of tables, 0 to {tables - 1}, each at least once"
    try:
        numbers = [operator.index(t) for t in given]
    except TypeError:
        raise TypeError(error) from None
    if set(numbers) != set(range(tables)):
        raise ValueError(error)
    return numbers


def parse_table_names(given: Any, tables: int) -> list[str]:
    """Return one distinct name per table, without dots: ``table_0``, ... where none are given.

    FBGEMM's names may repeat (shards of one table) and hold dots; coldrow's key checkpoints.
    """
    if given is None:
        return [f"table_{t}" for t in range(tables)]
    accepted = f"accepted: None or a list of {tables} names"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"table_names: got {given!r}, {accepted}")
    given = list(given)
    if not all(isinstance(name, str) and name for name in given):
        raise TypeError(f"table_names: got {given!r}, {accepted}")
    if len(given) != tables:
        raise ValueError(f"table_names: got {given!r}, {accepted}")
    names: list[str] = []
    for name in given:
        plain = name.replace(".", "_")
        numbered = (f"{plain}_{i}" for i in count(1))
        while plain in names:
            plain = next(numbered)
        names.append(plain)
    return names


def check_shard_info(given: Any, specs: Sequence[Spec]) -> None:
    """Check that each ``(rows, dim, first row, first column)`` describes a table that holds the shard."""
    if given is None:
        return
    shape = (
        "accepted: None or, for each table, (rows, dim, first row, first column) of the whole table"
    )
    try:
        entries = [[operator.index(value) for value in entry] for entry in given]
    except TypeError:
        raise TypeError(f"embedding_shard_info: got {given!r}, {shape}") from None
    if len(entries) != len(specs) or any(len(entry) != 4 for entry in entries):
        raise ValueError(f"embedding_shard_info: got {given!r}, {shape}")
    for spec, (rows, dim, row, column) in zip(specs, entries, strict=True):
        if row < 0 or column < 0 or row + spec.rows > rows or column + spec.dim > dim:
            raise ValueError(
                f"embedding_shard_info: got {(rows, dim, row, column)} for a shard of {spec.rows} x "
                f"{spec.dim}, {shape}"
            )


# -------------------------------------------------------------------------------------- row update

_DECAYED = ("weight_decay", "weight_decay_mode")
_ADAM = ("eps", "beta1", "beta2", *_DECAYED)
# The arguments each optimizer reads. SGD, which FBGEMM has retired, means EXACT_SGD.
READS = {
    EmbOptimType.SGD: (),
    EmbOptimType.EXACT_SGD: (),
    EmbOptimType.EXACT_ADAGRAD: ("eps",),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: ("eps", *_DECAYED),
    EmbOptimType.ADAM: _ADAM,
    EmbOptimType.PARTIAL_ROWWISE_ADAM: _ADAM,
    EmbOptimType.ROWWISE_RMSPROP_AR: ("eps", "ar_alpha", "ema_beta", "min_shrinkage"),
}


@dataclass(frozen=True)
class Settings:
    """The arguments that make up the row update, with FBGEMM's defaults."""

    optimizer: EmbOptimType
    learning_rate: float = 0.01
    eps: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_mode: WeightDecayMode = WeightDecayMode.NONE
    ar_alpha: float = 0.0
    ema_beta: float = 0.99
    min_shrinkage: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    bias_by_row: bool = False
    stochastic: bool = False
    decay: policies.Decay | None = None

    def row_update(self) -> policies.RowUpdate:
        """Return coldrow's update.

        Raises:
            TypeError, ValueError: an optimizer that coldrow does not have, an argument that the optimizer
                does not read and that is not at its default, or a value out of range.
        """
        if self.optimizer not in READS:
            raise ValueError(
                f"optimizer: got EmbOptimType.{self.optimizer.name}, accepted: "
                f"{', '.join(kind.name for kind in READS)}"
            )
        reads = READS[self.optimizer]
        for f in fields(self):
            if f.name in ("optimizer", "learning_rate", "bias_by_row", "stochastic", "decay"):
                continue
            given = getattr(self, f.name)
            if f.name not in reads and given != f.default:
                raise ValueError(
                    f"{f.name}: got {given!r}, accepted: {f.default!r} (optimizer "
                    f"{self.optimizer.name} does not read it)"
                )
        lr = number("learning_rate", self.learning_rate)
        rounding = policies.Stochastic(seed=0) if self.stochastic else policies.Nearest()
        return policies.RowUpdate(self._optimizer(lr), self._decay(), rounding)

    def _optimizer(self, lr: float) -> policies.Optimizer:
        kind = self.optimizer
        if kind in (EmbOptimType.SGD, EmbOptimType.EXACT_SGD):
            return policies.SGD(lr)
        if kind is EmbOptimType.EXACT_ADAGRAD:
            return policies.Adagrad(lr, self.eps)
        if kind is EmbOptimType.EXACT_ROWWISE_ADAGRAD:
            return policies.RowwiseAdagrad(lr, self.eps)
        if kind is EmbOptimType.ROWWISE_RMSPROP_AR:
            return policies.RowwiseRMSprop(lr, self.eps, self.ema_beta)
        if kind is EmbOptimType.ADAM:
            by = "row" if self.bias_by_row else "clock"
            return policies.Adam(lr, self.beta1, self.beta2, self.eps, by)
        return policies.PartialRowwiseAdam(lr, self.beta1, self.beta2, self.eps)

    def _decay(self) -> policies.Decay:
        weight_decay = number("weight_decay", self.weight_decay)
        mode = member("weight_decay_mode", self.weight_decay_mode, WeightDecayMode)
        accepted = (WeightDecayMode.NONE, WeightDecayMode.DECOUPLE)
        if mode not in accepted:
            raise ValueError(f"weight_decay_mode: got {mode!r}, accepted: NONE, DECOUPLE")
        ar_alpha = number("ar_alpha", self.ar_alpha)
        if (
            self.optimizer is EmbOptimType.EXACT_ROWWISE_ADAGRAD
            and mode is WeightDecayMode.NONE
            and weight_decay != 0
        ):
            raise ValueError(
                f"weight_decay: got {weight_decay!r} with weight_decay_mode NONE, accepted: 0.0, or "
                "weight_decay_mode=WeightDecayMode.DECOUPLE (with NONE, FBGEMM ignores it)"
            )
        if self.decay is not None:
            for name in ("weight_decay", "weight_decay_mode", "ar_alpha", "min_shrinkage"):
                value, default = getattr(self, name), getattr(Settings, name)
                if value != default:
                    raise ValueError(
                        f"{name}: got {value!r}, accepted: {default!r} where decay is given"
                    )
            return self.decay
        if self.optimizer is EmbOptimType.ROWWISE_RMSPROP_AR:
            return policies.LinearClipped(ar_alpha, self.min_shrinkage)
        return policies.Constant(weight_decay) if weight_decay else policies.NoDecay()
