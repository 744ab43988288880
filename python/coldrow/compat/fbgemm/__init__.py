"""FBGEMM's ``SplitTableBatchedEmbeddingBagsCodegen``, built on coldrow: change the import, keep the call.

All names that FBGEMM 1.9 spreads over ``fbgemm_gpu.split_table_batched_embeddings_ops_training``,
``.split_table_batched_embeddings_ops_common``, ``.split_embedding_configs`` and ``.tbe.config`` and that
occur in constructor calls are here. An argument that coldrow does not support is accepted at FBGEMM's
default and refused by name otherwise; ``docs/from-fbgemm.md`` lists all of them. Imports torch, not
fbgemm_gpu.
"""

from coldrow.compat.fbgemm.definitions import (
    BoundsCheckMode,
    CacheAlgorithm,
    ComputeDevice,
    CounterBasedRegularizationDefinition,
    CounterWeightDecayMode,
    CowClipDefinition,
    EmainplaceModeDefinition,
    EmbeddingLocation,
    EmbOptimType,
    EnsembleModeDefinition,
    GlobalWeightDecayDefinition,
    GradSumDecay,
    LearningRateMode,
    MultiPassPrefetchConfig,
    PoolingMode,
    RecordCacheMetrics,
    RESParams,
    SparseType,
    StepMode,
    TailIdThreshold,
    UserEnabledConfigDefinition,
    WeightDecayMode,
)
from coldrow.compat.fbgemm.module import SplitTableBatchedEmbeddingBagsCodegen
from coldrow.compat.fbgemm.state import FbgemmState, export_state, import_state

__all__ = [
    "BoundsCheckMode",
    "CacheAlgorithm",
    "ComputeDevice",
    "CounterBasedRegularizationDefinition",
    "CounterWeightDecayMode",
    "CowClipDefinition",
    "EmainplaceModeDefinition",
    "EmbOptimType",
    "EmbeddingLocation",
    "EnsembleModeDefinition",
    "FbgemmState",
    "GlobalWeightDecayDefinition",
    "GradSumDecay",
    "LearningRateMode",
    "MultiPassPrefetchConfig",
    "PoolingMode",
    "RESParams",
    "RecordCacheMetrics",
    "SparseType",
    "SplitTableBatchedEmbeddingBagsCodegen",
    "StepMode",
    "TailIdThreshold",
    "UserEnabledConfigDefinition",
    "WeightDecayMode",
    "export_state",
    "import_state",
]
