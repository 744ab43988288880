"""Modules, batches and comparisons that the tests of coldrow.compat.fbgemm share."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import coldrow  # noqa: E402
from coldrow.compat import fbgemm  # noqa: E402
from coldrow.compat.fbgemm import (  # noqa: E402
    BoundsCheckMode,
    CacheAlgorithm,
    ComputeDevice,
    EmbeddingLocation,
    EmbOptimType,
    PoolingMode,
    SparseType,
    SplitTableBatchedEmbeddingBagsCodegen,
    UserEnabledConfigDefinition,
    WeightDecayMode,
)

HOST = (EmbeddingLocation.HOST, ComputeDevice.CPU)
AR = EmbOptimType.ROWWISE_RMSPROP_AR
NAN = float("nan")
# FBGEMM 1.9's parameters, in order, with its defaults. (tests/fbgemm compares with the installed one.)
THEIRS = {
    "embedding_specs": inspect.Parameter.empty,
    "feature_table_map": None,
    "cache_algorithm": CacheAlgorithm.LRU,
    "cache_load_factor": 0.2,
    "cache_sets": 0,
    "cache_reserved_memory": 0.0,
    "cache_precision": None,
    "weights_precision": SparseType.FP32,
    "output_dtype": SparseType.FP32,
    "enforce_hbm": False,
    "optimizer": EmbOptimType.EXACT_SGD,
    "record_cache_metrics": None,
    "gather_uvm_cache_stats": False,
    "stochastic_rounding": True,
    "gradient_clipping": False,
    "max_gradient": 1.0,
    "max_norm": 0.0,
    "learning_rate": 0.01,
    "eps": 1e-8,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "weight_decay_mode": WeightDecayMode.NONE,
    "ar_alpha": 0.0,
    "ema_beta": 0.99,
    "min_shrinkage": 0.1,
    "eta": 0.001,
    "beta1": 0.9,
    "beta2": 0.999,
    "ensemble_mode": None,
    "emainplace_mode": None,
    "counter_based_regularization": None,
    "cowclip_regularization": None,
    "pooling_mode": PoolingMode.SUM,
    "device": None,
    "bounds_check_mode": BoundsCheckMode.WARNING,
    "uvm_non_rowwise_momentum": False,
    "use_experimental_tbe": False,
    "prefetch_pipeline": False,
    "stats_reporter_config": None,
    "table_names": None,
    "optimizer_state_dtypes": None,
    "multipass_prefetch_config": None,
    "global_weight_decay": None,
    "uvm_host_mapped": False,
    "extra_optimizer_config": None,
    "tbe_input_multiplexer_config": None,
    "embedding_table_index_type": torch.int64,
    "embedding_table_offset_type": torch.int64,
    "embedding_shard_info": None,
    "enable_raw_embedding_streaming": False,
    "res_params": None,
    "is_qr_tbe": False,
    "preallocated_host_buffers": None,
}
OWN = ["decay", "charge", "on_nonfinite", "state_layout"]


def make(sizes=((9, 4), (7, 8)), **options) -> SplitTableBatchedEmbeddingBagsCodegen:
    """A shim on the CPU, its tables filled with something."""
    tbe = SplitTableBatchedEmbeddingBagsCodegen([(r, d, *HOST) for r, d in sizes], **options)
    values = torch.Generator().manual_seed(0)
    for weight in tbe.split_embedding_weights():
        weight.copy_(torch.randn(weight.shape, generator=values))
    return tbe


def ones(rows=4, dim=4, **options) -> SplitTableBatchedEmbeddingBagsCodegen:
    """One table of ones, trained with lr 1: after a zero gradient it shows the decay alone."""
    tbe = make([(rows, dim)], optimizer=AR, **{"learning_rate": 1.0, **options})
    tbe.split_embedding_weights()[0].fill_(1.0)
    return tbe


def touch(tbe, *rows: int, times: int = 1, grad: float = 0.0) -> None:
    """Steps that give each of the rows the same gradient everywhere."""
    for _ in range(times):
        out = tbe(torch.tensor(rows), torch.arange(len(rows) + 1))
        out.backward(torch.full_like(out, grad))


def random_batch(seed: int, rows, bags, dtype=torch.int64):
    """Indices and offsets of features over tables of so many rows; bags of 0 to 3."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(0, 4, b) for b in bags]
    indices = [rng.integers(0, r, n.sum()) for r, n in zip(rows, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return torch.tensor(np.concatenate(indices), dtype=dtype), torch.tensor(offsets, dtype=dtype)


def step(tbe, seed=0, bags=None, **options) -> torch.Tensor:
    """One step on a random batch, its gradient different everywhere."""
    features = tbe.feature_table_map
    rows = [tbe.embedding_specs[t][0] for t in features]
    out = tbe(*random_batch(seed, rows, bags or [3] * len(features)), **options)
    out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape).to(out.dtype))
    return out


def tensors(tbe) -> list[torch.Tensor]:
    """Tables, states, and the clock."""
    states = itertools.chain.from_iterable(tbe.split_optimizer_states())
    return [*tbe.split_embedding_weights(), *states, tbe.iter]


def snapshot(tbe) -> list[torch.Tensor]:
    return [t.clone() for t in tensors(tbe)]


def assert_equal(one, other) -> None:
    """Bit for bit."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- the signature

# What nothing depends on, with an accepted value other than the default.
WITHOUT_EFFECT = {
    "cache_precision": SparseType.FP32,
    "record_cache_metrics": fbgemm.RecordCacheMetrics(False, False),
    "device": torch.device("cpu"),
    "bounds_check_mode": BoundsCheckMode.FATAL,
    "optimizer_state_dtypes": {"momentum1": SparseType.FP32},
    "embedding_table_index_type": torch.int32,
    "embedding_table_offset_type": torch.int32,
    "embedding_shard_info": [(90, 4, 9, 0), (7, 16, 0, 8)],
    "res_params": fbgemm.RESParams(),
}
# What something depends on: two calls that differ in it alone.
ADAM = {"optimizer": EmbOptimType.ADAM}
ROWWISE = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
HALF = {"weights_precision": SparseType.FP16}
DECOUPLED = {**ROWWISE, "weight_decay_mode": WeightDecayMode.DECOUPLE}
EFFECTS = {
    "embedding_specs": ({}, [(9, 4, *HOST), (8, 8, *HOST)]),
    "feature_table_map": ({}, [0, 0, 1]),
    "weights_precision": ({}, SparseType.BF16),
    "output_dtype": ({}, SparseType.FP16),
    "optimizer": ({}, EmbOptimType.EXACT_ADAGRAD),
    "stochastic_rounding": (HALF, False),
    "gradient_clipping": ({}, True),
    "max_gradient": ({"gradient_clipping": True}, 0.5),
    "learning_rate": ({}, 0.1),
    "eps": (ROWWISE, 0.1),
    "weight_decay": (DECOUPLED, 0.5),
    "weight_decay_mode": ({**ADAM}, None),  # see below
    "ar_alpha": ({"optimizer": AR}, 0.5),
    "ema_beta": ({"optimizer": AR}, 0.5),
    "min_shrinkage": ({"optimizer": AR, "ar_alpha": 99.0}, 0.5),
    "beta1": (ADAM, 0.5),
    "beta2": (ADAM, 0.5),
    "pooling_mode": ({}, PoolingMode.MEAN),
    "table_names": ({}, ["a", "b"]),
    "extra_optimizer_config": (ADAM, UserEnabledConfigDefinition(use_rowwise_bias_correction=True)),
    "decay": ({}, coldrow.Constant(0.5)),
    "charge": ({"optimizer": AR, "decay": coldrow.CumulativeLinear(half_life=1.5)}, "read"),
    "on_nonfinite": ({}, "propagate"),
    "state_layout": ({"optimizer": AR}, "record"),
}


# ----------------------------------------------------------------------- all optimizers beside torch

OPTIONS = {
    EmbOptimType.EXACT_SGD: {},
    EmbOptimType.EXACT_ADAGRAD: {"eps": 1e-4},
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: {
        "eps": 1e-4,
        "weight_decay": 0.2,
        "weight_decay_mode": WeightDecayMode.DECOUPLE,
    },
    AR: {"eps": 1e-4, "ar_alpha": 0.7, "ema_beta": 0.9, "min_shrinkage": 0.3},
    EmbOptimType.ADAM: {"eps": 1e-4, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.2},
    EmbOptimType.PARTIAL_ROWWISE_ADAM: {
        "eps": 1e-4,
        "beta1": 0.8,
        "beta2": 0.95,
        "weight_decay": 0.2,
    },
}


# ------------------------------------------------------------------------------------------- state


def flat_checkpoint(sizes, feature_table_map, states, iter_, places=None, seed=0):
    """What FBGEMM's state_dict holds: flat tensors by place, offsets and placements by feature.

    ``states``: name to (one tensor per table). Returns it, and the weights by table.
    """
    places = places or [EmbeddingLocation.HOST] * len(sizes)
    random = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, generator=random) for size in sizes]
    out = {
        "rows_per_table": torch.tensor([sizes[t][0] for t in feature_table_map]),
        "D_offsets": torch.tensor([0, *np.cumsum([sizes[t][1] for t in feature_table_map])]),
        "placeholder_autograd_tensor": torch.zeros(0),
        "lxu_cache_weights": torch.zeros(0, 0),
    }
    if iter_ is not None:
        out["iter"] = torch.tensor([iter_])
    short = {EmbeddingLocation.HOST: "host", EmbeddingLocation.DEVICE: "dev"}
    for name, tables in {"weights": weights, **states}.items():
        flat = {"host": [], "dev": [], "uvm": []}
        starts = []
        for place, table in zip(places, tables, strict=True):
            parts = flat[short.get(place, "uvm")]
            starts.append(sum(p.numel() for p in parts))
            parts.append(table.flatten())
        for place, parts in flat.items():
            out[f"{name}_{place}"] = torch.cat(parts) if parts else torch.zeros(0)
        out[f"{name}_offsets"] = torch.tensor([starts[t] for t in feature_table_map])
        out[f"{name}_placements"] = torch.tensor(
            [int(places[t]) for t in feature_table_map], dtype=torch.int32
        )
    return out, weights


def ar_states(sizes, clock, seed=1):
    rng = np.random.default_rng(seed)
    momentum1 = [torch.tensor(rng.random(r), dtype=torch.float32) for r, _ in sizes]
    prev_iter = [
        torch.tensor(rng.integers(max(0, clock - 9), clock + 1, r)).float() for r, _ in sizes
    ]
    return {"momentum1": momentum1, "prev_iter": prev_iter}
