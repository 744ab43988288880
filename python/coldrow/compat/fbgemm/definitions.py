"""The enums and small records that callers of FBGEMM construct, with FBGEMM's names and values.

Members that coldrow has no counterpart for are here too, so that the refusal comes from the constructor
and names the argument, not from an import. Members of FBGEMM's own enums are accepted wherever these are.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

E = TypeVar("E", bound=enum.Enum)


class EmbOptimType(enum.Enum):
    """Optimizers by FBGEMM's names."""

    SGD = "sgd"
    EXACT_SGD = "exact_sgd"
    LAMB = "lamb"
    ADAM = "adam"
    EXACT_ADAGRAD = "exact_adagrad"
    EXACT_ROWWISE_ADAGRAD = "exact_row_wise_adagrad"
    LARS_SGD = "lars_sgd"
    PARTIAL_ROWWISE_ADAM = "partial_row_wise_adam"
    PARTIAL_ROWWISE_LAMB = "partial_row_wise_lamb"
    ROWWISE_ADAGRAD = "row_wise_adagrad"
    ROWWISE_RMSPROP_AR = "row_wise_rmsprop_ar"
    SHAMPOO = "shampoo"
    SHAMPOO_V2 = "shampoo_v2"
    MADGRAD = "madgrad"
    EXACT_ROWWISE_WEIGHTED_ADAGRAD = "exact_row_wise_weighted_adagrad"
    ENSEMBLE_ROWWISE_ADAGRAD = "ensemble_row_wise_adagrad"
    EMAINPLACE_ROWWISE_ADAGRAD = "ema_in_place_row_wise_adagrad"
    NONE = "none"

    def __str__(self) -> str:
        return self.value


class SparseType(enum.Enum):
    """Number types by FBGEMM's names."""

    FP32 = "fp32"
    FP16 = "fp16"
    FP8 = "fp8"
    NFP8 = "nfp8"
    INT8 = "int8"
    INT4 = "int4"
    INT2 = "int2"
    BF16 = "bf16"
    MX4 = "mx4"

    def __str__(self) -> str:
        return self.value

    def as_int(self) -> int:
        """Return FBGEMM's number of the type, as its modules keep it in ``output_dtype``."""
        order = ("fp32", "fp16", "int8", "int4", "int2", "bf16", "fp8", "mx4", "nfp8")
        return order.index(self.value)

    def as_dtype(self) -> torch.dtype:
        """Return the torch dtype, for the types that coldrow stores."""
        if self not in _DTYPES:
            raise ValueError(f"got {self!r}, accepted: {', '.join(map(str, _DTYPES))}")
        return _DTYPES[self]

    @staticmethod
    def from_dtype(dtype: torch.dtype) -> SparseType:
        """Return the type of a torch dtype, for the types that coldrow stores."""
        for member, own in _DTYPES.items():
            if own == dtype:
                return member
        raise ValueError(f"dtype: got {dtype}, accepted: {', '.join(map(str, _DTYPES.values()))}")


_DTYPES = {
    SparseType.FP32: torch.float32,
    SparseType.FP16: torch.float16,
    SparseType.BF16: torch.bfloat16,
}


class PoolingMode(enum.IntEnum):
    """How the rows of a bag become one."""

    SUM = 0
    MEAN = 1
    NONE = 2

    def do_pooling(self) -> bool:
        """Return whether bags are pooled at all."""
        return self is not PoolingMode.NONE


class EmbeddingLocation(enum.IntEnum):
    """Where a table lives."""

    DEVICE = 0
    MANAGED = 1
    MANAGED_CACHING = 2
    HOST = 3
    MTIA = 4


class ComputeDevice(enum.IntEnum):
    """What does the lookup."""

    CPU = 0
    CUDA = 1
    MTIA = 2


class CacheAlgorithm(enum.Enum):
    """Which row leaves a GPU cache first."""

    LRU = 0
    LFU = 1


class BoundsCheckMode(enum.IntEnum):
    """What happens to an index outside its table; in coldrow always an IndexError."""

    FATAL = 0
    WARNING = 1
    IGNORE = 2
    NONE = 3
    V2_IGNORE = 4
    V2_WARNING = 5
    V2_FATAL = 6


class WeightDecayMode(enum.IntEnum):
    """How ``weight_decay`` enters."""

    NONE = 0
    L2 = 1
    DECOUPLE = 2
    COUNTER = 3
    COWCLIP = 4
    DECOUPLE_GLOBAL = 5


class CounterWeightDecayMode(enum.IntEnum):
    """A field of :class:`CounterBasedRegularizationDefinition` and :class:`CowClipDefinition`."""

    NONE = 0
    L2 = 1
    DECOUPLE = 2
    ADAGRADW = 3


class StepMode(enum.IntEnum):
    """A field of :class:`EnsembleModeDefinition`."""

    NONE = 0
    USE_COUNTER = 1
    USE_ITER = 2


class LearningRateMode(enum.IntEnum):
    """A field of :class:`CounterBasedRegularizationDefinition`."""

    EQUAL = -1
    TAIL_ID_LR_INCREASE = 0
    TAIL_ID_LR_DECREASE = 1
    COUNTER_SGD = 2


class GradSumDecay(enum.IntEnum):
    """A field of :class:`CounterBasedRegularizationDefinition`."""

    NO_DECAY = -1
    CTR_DECAY = 0


@dataclass(frozen=True)
class TailIdThreshold:
    """A field of :class:`CounterBasedRegularizationDefinition`."""

    val: float = 0
    is_ratio: bool = False


@dataclass(frozen=True)
class CounterBasedRegularizationDefinition:
    """Weight decay by counts of touches. Refused."""

    counter_weight_decay_mode: CounterWeightDecayMode = CounterWeightDecayMode.NONE
    counter_halflife: int = -1
    adjustment_iter: int = -1
    adjustment_ub: float = 1.0
    learning_rate_mode: LearningRateMode = LearningRateMode.EQUAL
    grad_sum_decay: GradSumDecay = GradSumDecay.NO_DECAY
    tail_id_threshold: TailIdThreshold = field(default_factory=TailIdThreshold)
    max_counter_update_freq: int = 1000


@dataclass(frozen=True)
class CowClipDefinition:
    """Gradient clipping by counts of touches. Refused."""

    counter_weight_decay_mode: CounterWeightDecayMode = CounterWeightDecayMode.NONE
    counter_halflife: int = -1
    weight_norm_coefficient: float = 0.0
    lower_bound: float = 0.0


@dataclass(frozen=True)
class GlobalWeightDecayDefinition:
    """Weight decay of rows between touches. Refused; the nearest is ``decay=coldrow.Exponential(...)``."""

    start_iter: int = 0
    lower_bound: float = 0.0


@dataclass(frozen=True)
class UserEnabledConfigDefinition:
    """Options outside the signature; of these coldrow has ``use_rowwise_bias_correction`` (for ADAM)."""

    use_rowwise_bias_correction: bool = False
    use_writeback_bwd_prehook: bool = False
    writeback_first_feature_only: bool = False
    precompute_writeback: bool = False


@dataclass(frozen=True)
class EnsembleModeDefinition:
    """Options of ENSEMBLE_ROWWISE_ADAGRAD. Refused."""

    step_ema: float = 10000
    step_swap: float = 10000
    step_start: float = 0
    step_ema_coef: float = 0.6
    step_mode: StepMode = StepMode.USE_ITER


@dataclass(frozen=True)
class EmainplaceModeDefinition:
    """Options of EMAINPLACE_ROWWISE_ADAGRAD. Refused."""

    step_ema: float = 10
    step_start: float = 0
    step_ema_coef: float = 0.6


class RecordCacheMetrics(NamedTuple):
    """What to record of a GPU cache; there is none, so only what records nothing is accepted."""

    record_cache_miss_counter: bool
    record_tablewise_cache_miss: bool


class MultiPassPrefetchConfig(NamedTuple):
    """How to prefetch into a GPU cache. Refused."""

    num_passes: int = 12
    min_splitable_pass_size: int = 6 * 1024 * 1024


@dataclass
class RESParams:
    """Parameters of raw embedding streaming, which is refused; TorchRec hands them over regardless."""

    res_server_port: int = 0
    res_store_shards: int = 1
    table_names: list[str] = field(default_factory=list)
    table_offsets: list[int] = field(default_factory=list)
    table_sizes: list[int] = field(default_factory=list)


def member(name: str, given: Any, kind: type[E]) -> E:
    """Return ``given`` as a member of ``kind``, also where it is the one of FBGEMM's own enum.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(given, kind):
        return given
    of = type(given)
    if (
        isinstance(given, enum.Enum)
        and of.__name__ == kind.__name__
        and given.name in kind.__members__
    ):
        return kind[given.name]
    raise TypeError(f"{name}: got {given!r}, accepted: a {kind.__name__}")
