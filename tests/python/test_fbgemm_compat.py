"""coldrow.compat.fbgemm: every constructor argument, what it trains, and state to and from FBGEMM.

Beside FBGEMM itself it is run by `make test-fbgemm` (tests/fbgemm); nothing here needs fbgemm_gpu.
"""

from __future__ import annotations

import copy
import enum
import inspect
import io
import itertools
import pickle
import re
import subprocess
import sys
from pathlib import Path

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
    FbgemmState,
    PoolingMode,
    SparseType,
    SplitTableBatchedEmbeddingBagsCodegen,
    UserEnabledConfigDefinition,
    WeightDecayMode,
    export_state,
    import_state,
)
from coldrow.compat.fbgemm.arguments import ONLY_DEFAULT, READS  # noqa: E402
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "from-fbgemm.md"
HOST = (EmbeddingLocation.HOST, ComputeDevice.CPU)
AR = EmbOptimType.ROWWISE_RMSPROP_AR
SIGNATURE = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
PARAMETERS = [name for name in SIGNATURE if name != "self"]
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


def test_the_signature_is_fbgemms():
    positional = [
        p for p in SIGNATURE.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert {p.name: p.default for p in positional if p.name != "self"} == THEIRS
    assert [p.name for p in positional if p.name != "self"] == list(THEIRS)
    assert [n for n, p in SIGNATURE.items() if p.kind is inspect.Parameter.KEYWORD_ONLY] == OWN


def test_the_signature_of_forward_is_fbgemms():
    parameters = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.forward).parameters
    assert list(parameters) == [
        "self",
        "indices",
        "offsets",
        "per_sample_weights",
        "feature_requires_grad",
        "batch_size_per_feature_per_rank",
        "total_unique_indices",
        "hash_zch_identities",
        "hash_zch_runtime_meta",
        "vbe_output",
        "vbe_output_offsets",
    ]
    assert all(p.default is None for p in list(parameters.values())[3:])


SPEC = (4, 4, *HOST)
# For each parameter: values that are refused (others in a dict beside it), by what kind of exception.
REFUSED = {
    "embedding_specs": [
        ([], TypeError),
        (7, TypeError),
        ("ab", TypeError),
        ([(4, 4)], TypeError),
        ([(0, 4, *HOST)], ValueError),
        ([(4, 0, *HOST)], ValueError),
        ([(4.5, 4, *HOST)], TypeError),
        ([(4, 4, 3, 0)], TypeError),
        ([(4, 4, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)], ValueError),
        ([(4, 4, EmbeddingLocation.MANAGED, ComputeDevice.CUDA)], ValueError),
        ([(4, 4, EmbeddingLocation.MANAGED_CACHING, ComputeDevice.CUDA)], ValueError),
        ([(4, 4, EmbeddingLocation.HOST, ComputeDevice.CUDA)], ValueError),
        ([(4, 4, EmbeddingLocation.HOST, ComputeDevice.MTIA)], ValueError),
        ([(4, 4, EmbeddingLocation.DEVICE, ComputeDevice.CPU)], ValueError),
    ],
    "feature_table_map": [([0, 2], ValueError), ([1], ValueError), (["a"], TypeError)],
    "cache_algorithm": [(CacheAlgorithm.LFU, ValueError), (0, ValueError)],
    "cache_load_factor": [(0.5, ValueError)],
    "cache_sets": [(8, ValueError)],
    "cache_reserved_memory": [(1.0, ValueError)],
    "cache_precision": [(SparseType.FP16, ValueError), ("fp32", TypeError)],
    "weights_precision": [(SparseType.INT8, ValueError), (torch.float32, TypeError)],
    "output_dtype": [(SparseType.FP8, ValueError), (torch.float32, TypeError)],
    "enforce_hbm": [(True, ValueError)],
    "optimizer": [
        *(({"optimizer": kind}, ValueError) for kind in EmbOptimType if kind not in READS),
        ("exact_sgd", TypeError),
    ],
    "record_cache_metrics": [(fbgemm.RecordCacheMetrics(True, False), ValueError), (7, ValueError)],
    "gather_uvm_cache_stats": [(True, ValueError)],
    "stochastic_rounding": [(1, TypeError), (None, TypeError)],
    "gradient_clipping": [(1, TypeError)],
    "max_gradient": [
        (2.0, ValueError),
        ({"max_gradient": -1.0, "gradient_clipping": True}, ValueError),
        ({"max_gradient": NAN, "gradient_clipping": True}, ValueError),
    ],
    "max_norm": [(1.0, ValueError)],
    "learning_rate": [(-0.1, ValueError), (NAN, ValueError), ("0.1", TypeError)],
    "eps": [
        (1e-3, ValueError),
        ({"eps": -1.0, "optimizer": AR}, ValueError),
        ({"eps": 0.0, "optimizer": EmbOptimType.ADAM}, ValueError),
    ],
    "momentum": [(0.5, ValueError)],
    "weight_decay": [
        (0.1, ValueError),
        ({"weight_decay": 0.1, "optimizer": AR}, ValueError),
        ({"weight_decay": 0.1, "optimizer": EmbOptimType.EXACT_ADAGRAD}, ValueError),
        ({"weight_decay": 0.1, "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}, ValueError),
        ({"weight_decay": -0.1, "optimizer": EmbOptimType.ADAM}, ValueError),
        (
            {
                "weight_decay": 0.1,
                "optimizer": EmbOptimType.ADAM,
                "decay": coldrow.Exponential(half_life=9.0),
            },
            ValueError,
        ),
    ],
    "weight_decay_mode": [
        (WeightDecayMode.DECOUPLE, ValueError),
        *(
            ({"weight_decay_mode": mode, "optimizer": kind}, ValueError)
            for mode in (
                WeightDecayMode.L2,
                WeightDecayMode.COUNTER,
                WeightDecayMode.COWCLIP,
                WeightDecayMode.DECOUPLE_GLOBAL,
            )
            for kind in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.ADAM, AR)
        ),
        (1, TypeError),
    ],
    "ar_alpha": [
        (0.1, ValueError),
        ({"ar_alpha": -0.1, "optimizer": AR}, ValueError),
        ({"ar_alpha": 0.1, "optimizer": AR, "decay": coldrow.NoDecay()}, ValueError),
    ],
    "ema_beta": [(0.5, ValueError), ({"ema_beta": 1.5, "optimizer": AR}, ValueError)],
    "min_shrinkage": [
        (0.5, ValueError),
        ({"min_shrinkage": 1.5, "optimizer": AR}, ValueError),
        ({"min_shrinkage": 0.5, "optimizer": AR, "decay": coldrow.NoDecay()}, ValueError),
    ],
    "eta": [(0.5, ValueError)],
    "beta1": [(0.5, ValueError), ({"beta1": 1.0, "optimizer": EmbOptimType.ADAM}, ValueError)],
    "beta2": [(0.5, ValueError), ({"beta2": 1.0, "optimizer": EmbOptimType.ADAM}, ValueError)],
    "ensemble_mode": [(fbgemm.EnsembleModeDefinition(), ValueError)],
    "emainplace_mode": [(fbgemm.EmainplaceModeDefinition(), ValueError)],
    "counter_based_regularization": [(fbgemm.CounterBasedRegularizationDefinition(), ValueError)],
    "cowclip_regularization": [(fbgemm.CowClipDefinition(), ValueError)],
    "pooling_mode": [("sum", TypeError)],
    "device": [
        ("cuda", ValueError),
        ("meta", ValueError),
        (torch.device("cuda:0"), ValueError),
        ("nowhere", TypeError),
        ([], TypeError),
    ],
    "bounds_check_mode": [
        (BoundsCheckMode.IGNORE, ValueError),
        (BoundsCheckMode.V2_IGNORE, ValueError),
        (0, TypeError),
    ],
    "uvm_non_rowwise_momentum": [(True, ValueError)],
    "use_experimental_tbe": [(True, ValueError)],
    "prefetch_pipeline": [(True, ValueError)],
    "stats_reporter_config": [(object(), ValueError)],
    "table_names": [
        (["a", "b"], ValueError),
        ("a", TypeError),
        ([7], TypeError),
        ([""], TypeError),
    ],
    "optimizer_state_dtypes": [({"momentum1": SparseType.FP16}, ValueError), (7, TypeError)],
    "multipass_prefetch_config": [(fbgemm.MultiPassPrefetchConfig(), ValueError)],
    "global_weight_decay": [(fbgemm.GlobalWeightDecayDefinition(), ValueError)],
    "uvm_host_mapped": [(True, ValueError)],
    "extra_optimizer_config": [
        (UserEnabledConfigDefinition(use_rowwise_bias_correction=True), ValueError),
        (UserEnabledConfigDefinition(use_writeback_bwd_prehook=True), ValueError),
        (UserEnabledConfigDefinition(writeback_first_feature_only=True), ValueError),
        (UserEnabledConfigDefinition(precompute_writeback=True), ValueError),
        ({"use_rowwise_bias_correction": True}, TypeError),
    ],
    "tbe_input_multiplexer_config": [(object(), ValueError)],
    "embedding_table_index_type": [(torch.int16, ValueError), ("int32", ValueError)],
    "embedding_table_offset_type": [(torch.int16, ValueError)],
    "embedding_shard_info": [
        ([(4, 4, 1, 0)], ValueError),
        ([(4, 4, 0, 1)], ValueError),
        ([(8, 4, -1, 0)], ValueError),
        ([(4, 4, 0)], ValueError),
        ([], ValueError),
        (7, TypeError),
    ],
    "enable_raw_embedding_streaming": [(True, ValueError)],
    "res_params": [(7, TypeError)],
    "is_qr_tbe": [(True, ValueError)],
    "preallocated_host_buffers": [({"weights": torch.zeros(16)}, ValueError)],
    "decay": [("none", TypeError)],
    "charge": [("late", ValueError)],
    "on_nonfinite": [("ignore", ValueError)],
    "state_layout": [("rows", ValueError)],
}


def refused_cases():
    for name, cases in REFUSED.items():
        for given, kind in cases:
            options = given if isinstance(given, dict) and name in given else {name: given}
            yield pytest.param(name, options, kind, id=f"{name}-{options[name]!r}"[:60])


def test_each_parameter_is_refused_something():
    assert list(REFUSED) == PARAMETERS


@pytest.mark.parametrize(("name", "options", "kind"), list(refused_cases()))
def test_refusals_name_the_argument(name, options, kind):
    call = {"embedding_specs": [SPEC], **options}
    with pytest.raises(kind, match=r"accepted: ") as caught:
        SplitTableBatchedEmbeddingBagsCodegen(**call)
    assert re.match(rf"{name}\b", str(caught.value)), str(caught.value)


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


def fingerprint(**options) -> bytes:
    """All that some training steps show of a shim."""
    options.setdefault("embedding_specs", [(9, 4, *HOST), (7, 8, *HOST)])
    tbe = SplitTableBatchedEmbeddingBagsCodegen(**options)
    for weight in tbe.split_embedding_weights():
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
    shown = []
    for s in range(5):
        shown.append(step(tbe, s).detach())
    broken = tbe(
        *random_batch(9, [3] * len(tbe.feature_table_map), [2] * len(tbe.feature_table_map))
    )
    broken.backward(torch.full_like(broken, NAN))
    shown += tensors(tbe)
    described = [(t.shape, t.dtype, t.stride()) for t in shown]
    dense = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in shown)
    return dense + repr([described, list(tbe.state_dict())]).encode()


def test_each_parameter_has_an_effect_or_is_known_to_have_none():
    assert sorted([*ONLY_DEFAULT, *WITHOUT_EFFECT, *EFFECTS]) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", [n for n in EFFECTS if n != "weight_decay_mode"])
def test_parameters_with_an_effect(name):
    options, value = EFFECTS[name]
    assert fingerprint(**options) == fingerprint(**options)
    assert fingerprint(**{**options, name: value}) != fingerprint(**options)


def test_weight_decay_mode_decides_whether_rows_decay():
    # With NONE a weight_decay is refused (see REFUSED); the Adams decay in either mode, as in FBGEMM.
    both = [{"weight_decay": 0.5, "weight_decay_mode": m} for m in (0, 2)]
    assert (
        len(
            {
                fingerprint(
                    **ADAM, **{**o, "weight_decay_mode": WeightDecayMode(o["weight_decay_mode"])}
                )
                for o in both
            }
        )
        == 1
    )
    assert make(**DECOUPLED, weight_decay=0.5).emb.update.decay == coldrow.Constant(0.5)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_parameters_without_an_effect(name):
    assert fingerprint(**{name: WITHOUT_EFFECT[name]}) == fingerprint()


@pytest.mark.parametrize("mode", ["FATAL", "WARNING", "NONE", "V2_WARNING", "V2_FATAL"])
@pytest.mark.parametrize("bad", [-1, 4])
def test_a_bad_index_raises_in_every_accepted_mode(mode, bad):
    tbe = make([(4, 4)], bounds_check_mode=BoundsCheckMode[mode])
    before = snapshot(tbe)
    with pytest.raises(IndexError, match=r"indices"):
        tbe(torch.tensor([bad]), torch.tensor([0, 1]))
    assert_equal(tensors(tbe), before)


@pytest.mark.parametrize(
    "name",
    [
        "total_unique_indices",
        "hash_zch_identities",
        "hash_zch_runtime_meta",
        "vbe_output",
        "vbe_output_offsets",
    ],
)
def test_forward_refuses_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name}: is given, accepted: None"):
        make([(4, 4)])(torch.tensor([1]), torch.tensor([0, 1]), **{name: torch.zeros(1)})


def test_enums_of_the_same_name_are_taken():
    """TorchRec hands over FBGEMM's own."""
    kinds = (EmbOptimType, SparseType, PoolingMode, EmbeddingLocation, ComputeDevice)
    kinds = (*kinds, BoundsCheckMode, CacheAlgorithm, WeightDecayMode)
    other = {k.__name__: enum.Enum(k.__name__, {m.name: m.value for m in k}) for k in kinds}
    place = other["EmbeddingLocation"].HOST, other["ComputeDevice"].CPU
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(4, 4, *place)],
        optimizer=other["EmbOptimType"].EXACT_ROWWISE_ADAGRAD,
        weights_precision=other["SparseType"].FP16,
        cache_precision=other["SparseType"].FP16,
        pooling_mode=other["PoolingMode"].MEAN,
        bounds_check_mode=other["BoundsCheckMode"].FATAL,
        weight_decay=0.1,
        weight_decay_mode=other["WeightDecayMode"].DECOUPLE,
    )
    assert tbe.emb.pooling == "mean"
    assert tbe.emb.update.decay == coldrow.Constant(0.1)
    assert tbe.weights_precision is SparseType.FP16
    assert tbe.embedding_specs == [(4, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]


def test_sparse_types():
    assert [
        SparseType.from_dtype(kind.as_dtype()) for kind in (SparseType.FP32, SparseType.FP16)
    ] == [
        SparseType.FP32,
        SparseType.FP16,
    ]
    assert SparseType.BF16.as_int() == 5
    assert str(SparseType.BF16) == "bf16"
    with pytest.raises(ValueError, match=r"accepted: fp32, fp16, bf16"):
        SparseType.INT8.as_dtype()
    with pytest.raises(ValueError, match=r"torch.int8, accepted"):
        SparseType.from_dtype(torch.int8)


# -------------------------------------------------------------------------- adaptive regularization


def test_decay_is_linear_in_the_gap_and_scaled_by_lr():
    for lr in (1.0, 0.5):
        tbe = ones(ar_alpha=0.1, min_shrinkage=0.0, learning_rate=lr)
        touch(tbe, 0)  # the first touch counts as a gap of 1
        want = 1 - lr * 0.1
        torch.testing.assert_close(tbe.split_embedding_weights()[0][0], torch.full((4,), want))
        touch(tbe, 3, times=5)
        touch(tbe, 0)  # step 7 after step 1
        want *= 1 - lr * 0.1 * 6
        torch.testing.assert_close(tbe.split_embedding_weights()[0][0], torch.full((4,), want))


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.1, 1.0])
def test_decay_stops_at_the_floor(floor):
    tbe = ones(ar_alpha=0.05, min_shrinkage=floor)
    touch(tbe, 0)
    touch(tbe, 1, times=25)
    touch(tbe, 0)  # lr * alpha * gap is 1.3
    want = max(floor, 0.95) * floor
    torch.testing.assert_close(tbe.split_embedding_weights()[0][0], torch.full((4,), want))


def test_without_ar_alpha_nothing_decays():
    tbe = ones(ar_alpha=0.0)
    touch(tbe, 0)
    touch(tbe, 1, times=100)
    touch(tbe, 0)
    assert torch.equal(tbe.split_embedding_weights()[0], torch.ones(4, 4))


def test_momentum_is_an_average_not_a_sum():
    tbe = ones(ema_beta=0.5)
    for _ in range(20):
        tbe.split_embedding_weights()[0].fill_(1.0)
        touch(tbe, 0, grad=1.0)
    momentum1, prev_iter = tbe.split_optimizer_states()[0]
    assert float(momentum1[0]) == pytest.approx(1 - 0.5**20, rel=1e-6)
    torch.testing.assert_close(
        tbe.split_embedding_weights()[0][0], torch.zeros(4), atol=1e-5, rtol=0
    )
    assert prev_iter.tolist() == [20, 0, 0, 0]


def test_states_by_row():
    tbe = make([(5, 4), (3, 8)], optimizer=AR)
    states = tbe.split_optimizer_states()
    assert [[tuple(s.shape) for s in table] for table in states] == [[(5,), (5,)], [(3,), (3,)]]
    assert [s.dtype for s in states[0]] == [torch.float32, torch.int32]
    assert all(s.is_contiguous() for table in states for s in table)


# ----------------------------------------------------------------------- all optimizers beside torch


def formula(kind: EmbOptimType, w, g, state, touched, n, lr):
    """One step of dense float64 tensors: ``g`` summed by row; state starts empty. Touched rows only."""
    eps, beta1, beta2, decay = 1e-4, 0.8, 0.95, 0.2
    rowwise = g.pow(2).mean(1, keepdim=True)
    zeros = torch.zeros_like(g)
    if kind is EmbOptimType.EXACT_SGD:
        return torch.where(touched, w - lr * g, w)
    if kind in (EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD):
        rows = kind is EmbOptimType.EXACT_ROWWISE_ADAGRAD
        state["v"] = state.get("v", zeros) + (rowwise if rows else g.pow(2))
        new = (1 - lr * decay if rows else 1) * w - lr * g / (state["v"].sqrt() + eps)
        return torch.where(touched, new, w)
    if kind is AR:
        last = state.setdefault("last", torch.zeros(len(w), 1, dtype=torch.float64))
        gap = torch.where(last > 0, n - last, 1.0)
        shrink = (1 - (lr * 0.7 * gap).clamp(0, 1)).clamp(min=0.3)
        v = 0.9 * state.get("v", zeros) + 0.1 * rowwise
        state["v"] = torch.where(touched, v, state.get("v", zeros))
        state["last"] = torch.where(touched, torch.full_like(last, n), last)
        return torch.where(touched, shrink * w - lr * g / (v.sqrt() + eps), w)
    second = g.pow(2) if kind is EmbOptimType.ADAM else rowwise
    m = beta1 * state.get("m", zeros) + (1 - beta1) * g
    v = beta2 * state.get("v", zeros) + (1 - beta2) * second
    state["m"] = torch.where(touched, m, state.get("m", zeros))
    state["v"] = torch.where(touched, v, state.get("v", zeros))
    hat = (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + eps)
    return torch.where(touched, w - lr * (hat + decay * w), w)


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


@pytest.mark.parametrize("weights", ["FP32", "FP16"])
@pytest.mark.parametrize("pooling", ["SUM", "MEAN", "NONE", "weighted"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_training_beside_torch(kind, pooling, weights):
    sizes = [(8, 4), (6, 4 if pooling == "NONE" else 12)]
    feature_table_map = [0, 1, 1]
    tbe = make(
        sizes,
        feature_table_map=feature_table_map,
        optimizer=kind,
        learning_rate=0.3,
        pooling_mode=PoolingMode["SUM" if pooling == "weighted" else pooling],
        weights_precision=SparseType[weights],
        stochastic_rounding=False,
        **OPTIONS[kind],
    )
    dense = [w.double() for w in tbe.split_embedding_weights()]
    states = [{} for _ in sizes]
    exact = weights == "FP32"
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 1e-2, "atol": 1e-2}
    for n in range(1, 7):
        indices, offsets = random_batch(n, [8, 6, 6], (3, 3, 3))
        psw = torch.linspace(-1, 1, len(indices)) if pooling == "weighted" else None
        params = [torch.nn.Parameter(w) for w in dense]
        outs = []
        for f, t in enumerate(feature_table_map):
            o = offsets[3 * f : 3 * f + 4]
            part = indices[o[0] : o[-1]]
            if pooling == "NONE":
                outs.append(torch.nn.functional.embedding(part, params[t]))
                continue
            outs.append(
                torch.nn.functional.embedding_bag(
                    part,
                    params[t],
                    o - o[0],
                    mode="mean" if pooling == "MEAN" else "sum",
                    include_last_offset=True,
                    per_sample_weights=None if psw is None else psw[o[0] : o[-1]].double(),
                )
            )
        want = torch.cat(outs, 0 if pooling == "NONE" else 1)
        out = tbe(indices, offsets, psw)
        torch.testing.assert_close(out.double(), want, **tolerance)
        grad = torch.linspace(-1, 2, out.numel()).view(out.shape)
        out.backward(grad)
        want.backward(grad.double())
        for t in range(len(sizes)):
            rows = torch.cat(
                [
                    indices[offsets[3 * f] : offsets[3 * f + 3]]
                    for f in range(3)
                    if feature_table_map[f] == t
                ]
            )
            touched = torch.zeros(sizes[t][0], 1, dtype=torch.bool)
            touched[rows] = True
            gradient = torch.zeros_like(dense[t]) if params[t].grad is None else params[t].grad
            dense[t] = formula(kind, dense[t], gradient, states[t], touched, n, 0.3)
        if not exact:  # what was rounded stays rounded
            for mine, w in zip(tbe.split_embedding_weights(), dense, strict=True):
                torch.testing.assert_close(mine.double(), w, **tolerance)
            dense = [w.double() for w in tbe.split_embedding_weights()]
    for mine, w in zip(tbe.split_embedding_weights(), dense, strict=True):
        torch.testing.assert_close(mine.double(), w, **tolerance)


def test_rowwise_bias_correction_counts_touches():
    tbe = make(**ADAM, extra_optimizer_config=EFFECTS["extra_optimizer_config"][1])
    for s in range(4):
        step(tbe, s)
    state = tbe.get_optimizer_state()[0]
    assert list(state) == ["exp_avg", "exp_avg_sq", "row_counter"]
    assert 0 < state["row_counter"].max() <= 4
    assert tbe.emb.update.optimizer.bias_correction == "row"


@pytest.mark.parametrize("weights", ["FP16", "BF16"])
def test_16_bit_tables_round_stochastically_unless_told_not_to(weights):
    nearest, stochastic = (
        ones(256, 8, ar_alpha=1e-4, weights_precision=SparseType[weights], stochastic_rounding=s)
        for s in (False, True)
    )
    for tbe in (nearest, stochastic):
        touch(tbe, *range(256), times=8)
    assert torch.equal(
        nearest.split_embedding_weights()[0],
        torch.ones(256, 8).to(nearest.emb.weights["table_0"].dtype),
    )
    mean = float(stochastic.split_embedding_weights()[0].double().mean())
    assert mean == pytest.approx((1 - 1e-4) ** 8, abs=2e-4)
    assert ones().emb.update.rounding == coldrow.Nearest()


# ---------------------------------------------------------------------------- features and batches


def test_features_in_any_order():
    tbe = make([(9, 4), (7, 8)], feature_table_map=[1, 0, 1], learning_rate=0.5)
    dense = [torch.nn.Parameter(w.clone()) for w in tbe.split_embedding_weights()]
    indices, offsets = random_batch(3, [7, 9, 7], (2, 2, 2))
    outs = [
        torch.nn.functional.embedding_bag(
            indices[o[0] : o[-1]], dense[t], o - o[0], mode="sum", include_last_offset=True
        )
        for t, o in zip([1, 0, 1], (offsets[2 * f : 2 * f + 3] for f in range(3)), strict=True)
    ]
    want, out = torch.cat(outs, 1), tbe(indices, offsets)
    assert tbe.total_D == out.shape[1] == 20
    torch.testing.assert_close(out, want)
    grad = torch.linspace(-1, 2, out.numel()).view(out.shape)
    out.backward(grad)
    want.backward(grad)
    for mine, other in zip(tbe.split_embedding_weights(), dense, strict=True):
        torch.testing.assert_close(mine, other.detach() - 0.5 * other.grad)


def test_unpooled_features_in_any_order_with_different_dims():
    tbe = make([(9, 4), (7, 8)], feature_table_map=[1, 0], pooling_mode=PoolingMode.NONE)
    parts = tbe(torch.tensor([3, 4, 5]), torch.tensor([0, 2, 3]))
    weights = tbe.split_embedding_weights()
    assert torch.equal(parts[0], weights[1][[3, 4]])
    assert torch.equal(parts[1], weights[0][[5]])


def test_batch_sizes_by_rank_come_out_rank_after_rank():
    sizes = [[2, 0, 1], [1, 3, 2]]
    tbe, plain = make(), make()
    indices, offsets = random_batch(1, [9, 7], [3, 6])
    out = tbe(indices, offsets, batch_size_per_feature_per_rank=sizes)
    flat = plain(indices, offsets, batch_size_per_feature_per_rank=[[3], [6]])
    first, second = flat[: 3 * 4].view(3, 4), flat[3 * 4 :].view(6, 8)
    want = [first[:2], second[:1], first[2:2], second[1:4], first[2:], second[4:]]
    assert torch.equal(out, torch.cat([part.flatten() for part in want]))
    grad = torch.linspace(-1, 2, out.numel())
    out.backward(grad)
    torch.cat([part.flatten() for part in want]).backward(grad)
    assert_equal(tensors(tbe), tensors(plain))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ([[3]], ValueError),
        ([[3], [5]], ValueError),
        ([[3, 1], [5]], ValueError),
        ([[], []], ValueError),
        ([[-1], [10]], ValueError),
        (7, TypeError),
        ([3, 6], TypeError),
    ],
)
def test_wrong_batch_sizes_are_refused(given, kind):
    indices, offsets = random_batch(1, [9, 7], [3, 6])
    with pytest.raises(kind, match=r"^batch_size_per_feature_per_rank: got"):
        make()(indices, offsets, batch_size_per_feature_per_rank=given)
    with pytest.raises(ValueError, match=r"accepted: None with PoolingMode.NONE"):
        make(pooling_mode=PoolingMode.NONE)(
            indices, offsets, batch_size_per_feature_per_rank=[[3], [6]]
        )


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_indices_and_offsets_of_different_kinds(dtypes):
    one, other = make(), make()
    indices, offsets = random_batch(1, [9, 7], [3, 3])
    with torch.no_grad():
        out = one(indices.to(dtypes[0]), offsets.to(dtypes[1]))
        assert torch.equal(out, other(indices, offsets))
    with pytest.raises(TypeError, match=r"indices: got dtype torch.int16|indices: got"):
        one(indices.to(torch.int16), offsets)
    with pytest.raises(TypeError, match=r"^offsets: got list, accepted: a torch tensor"):
        one(indices, offsets.tolist())


def test_gradients_are_clamped_where_they_enter():
    clipped, plain = (
        make(gradient_clipping=c, max_gradient=0.5 if c else 1.0) for c in (True, False)
    )
    indices, offsets = random_batch(1, [9, 7], [3, 3])
    for tbe in (clipped, plain):
        out = tbe(indices, offsets)
        grad = torch.linspace(-2, 3, out.numel()).view(out.shape)
        out.backward(grad if tbe is clipped else grad.clamp(-0.5, 0.5))
    assert_equal(tensors(clipped), tensors(plain))


def test_feature_requires_grad_masks_the_gradient_of_weights():
    grads = []
    for asked in (None, torch.tensor([1, 0]), torch.tensor([False, False])):
        tbe = make()
        indices, offsets = random_batch(1, [9, 7], [3, 3])
        psw = torch.linspace(-1, 1, len(indices)).requires_grad_()
        tbe(indices, offsets, psw, asked).sum().backward()
        grads.append(psw.grad)
        grads.append(tensors(tbe))
    full, trained, first, again, none, _ = grads
    cut = int(offsets[3])
    assert full[cut:].any()
    assert torch.equal(first[:cut], full[:cut])
    assert not first[cut:].any()
    assert not none.any()
    assert_equal(trained, again)  # the tables are trained all the same
    with pytest.raises(
        ValueError, match=r"^feature_requires_grad: got .* accepted: a tensor \[2\]"
    ):
        make()(indices, offsets, psw, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"optimizer": AR, "ar_alpha": 0.1}, {}),
        ({**ADAM}, {}),
        ({"gradient_clipping": True, "max_gradient": 0.5}, {}),
        ({"feature_table_map": [1, 0]}, {}),
        ({}, {"batch_size_per_feature_per_rank": [[2, 0], [1, 3]]}),
    ],
)
def test_compiled_in_one_graph(options, call):
    eager, traced = make(**options), make(**options)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for s in range(4):
        for tbe in (eager, compiled):
            out = (
                tbe(*random_batch(s, [7, 7], [2, 4]), **call)
                if call
                else tbe(*random_batch(s, [7, 7], [3, 3]))
            )
            out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
        if s == 1 and options == ADAM:
            for tbe in (eager, traced):
                tbe.update_hyper_parameters({"eps": 1e-2, "lr": 0.3})
    assert_equal(tensors(traced), tensors(eager))


# --------------------------------------------------------------------------------- clock and knobs


def test_the_clock_counts_backwards_not_forwards():
    tbe = ones(ar_alpha=0.1)
    touch(tbe, 0)
    with torch.no_grad():
        tbe(torch.tensor([0]), torch.tensor([0, 1]))
    tbe.eval()
    tbe(torch.tensor([0]), torch.tensor([0, 1]))
    tbe.train()
    assert tbe.iter.tolist() == [1]
    touch(tbe, 0)
    assert tbe.iter.tolist() == [2]
    assert tbe.split_optimizer_states()[0][1].tolist() == [2, 0, 0, 0]
    assert tbe.iter.dtype == torch.int64


def test_a_second_training_forward_is_refused():
    tbe = make([(4, 4)])
    out = tbe(torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match=r"waiting for its backward"):
        tbe(torch.tensor([0]), torch.tensor([0, 1]))
    del out


def test_optimizer_step_can_be_set():
    tbe = ones(ar_alpha=0.1, min_shrinkage=0.0)
    tbe.set_optimizer_step(4)
    touch(tbe, 0)  # step 5
    tbe.set_optimizer_step(9)
    touch(tbe, 0)  # step 10
    assert float(tbe.split_embedding_weights()[0][0, 0]) == pytest.approx(0.9 * 0.5)
    tbe.set_optimizer_step(20)
    tbe.set_optimizer_step(10)
    for bad in (9, 0, -1, 2**31):
        with pytest.raises(ValueError, match=rf"^step: got {bad}, accepted: "):
            tbe.set_optimizer_step(bad)
    with pytest.raises(TypeError, match=r"^step: got 1.5"):
        tbe.set_optimizer_step(1.5)
    assert tbe.iter.tolist() == [10]


def test_learning_rate():
    tbe = make([(4, 4)], learning_rate=0.25)
    assert tbe.get_learning_rate() == 0.25
    tbe.set_learning_rate(0.1)
    assert tbe.get_learning_rate() == 0.1
    before = tbe.split_embedding_weights()[0].clone()
    touch(tbe, 1, grad=1.0)
    torch.testing.assert_close(tbe.split_embedding_weights()[0][1], before[1] - 0.1)
    with pytest.raises(ValueError, match=r"^lr: got -1"):
        tbe.set_learning_rate(-1)


def test_hyper_parameters_change_all_or_none():
    tbe, fresh = (
        make(**ADAM),
        make(**ADAM, learning_rate=0.5, eps=1e-3, beta1=0.5, weight_decay=0.1),
    )
    tbe.update_hyper_parameters({"lr": 0.5, "eps": 1e-3, "beta1": 0.5, "weight_decay": 0.1})
    assert tbe.get_learning_rate() == 0.5
    for s in range(3):
        step(tbe, s)
        step(fresh, s)
    assert_equal(tensors(tbe), tensors(fresh))
    for bad, says in (
        ({"lr": 1.0, "beta2": 2.0}, "^beta2: got 2.0"),
        ({"lr": 1.0, "ema_beta": 0.5}, "^params_dict: got 'ema_beta', accepted: lr, eps"),
        ({"eps": 1e-2, "lr": -1.0}, "^learning_rate: got -1.0"),
    ):
        with pytest.raises(ValueError, match=says):
            tbe.update_hyper_parameters(bad)
    assert tbe.get_learning_rate() == 0.5
    step(tbe, 7)
    step(fresh, 7)
    assert_equal(tensors(tbe), tensors(fresh))
    with pytest.raises(ValueError, match=r"^eps: got 0.1, accepted: 1e-08"):
        make().update_hyper_parameters({"eps": 0.1})


def test_hyper_parameters_may_change_between_forward_and_backward():
    tbe = make(**ADAM)
    out = tbe(*random_batch(0, [9, 7], [3, 3]))
    tbe.update_hyper_parameters({"eps": 1e-3})
    out.sum().backward()
    assert tbe.iter.tolist() == [1]


def test_views_are_live():
    tbe = make(optimizer=AR)
    tbe.split_embedding_weights()[0].fill_(3.0)
    tbe.split_optimizer_states()[1][0].fill_(2.0)
    tbe.iter[0] = 7
    assert tbe.emb.weights["table_0"].eq(3.0).all()
    assert tbe.emb.state["table_1"]["momentum1"].eq(2.0).all()
    assert tbe.emb.clock == 7
    tbe.init_embedding_weights_uniform(-0.5, 0.25)
    for weight in tbe.split_embedding_weights():
        assert -0.5 <= weight.min() < weight.max() <= 0.25
    tbe.flush()
    tbe.reset_cache_states()


def test_tables_start_at_zero_as_in_fbgemm():
    tbe = SplitTableBatchedEmbeddingBagsCodegen([(4, 4, *HOST)], weights_precision=SparseType.FP16)
    assert not tbe.split_embedding_weights()[0].any()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (EmbOptimType.EXACT_SGD, []),
        (EmbOptimType.SGD, []),
        (EmbOptimType.EXACT_ADAGRAD, ["sum"]),
        (EmbOptimType.EXACT_ROWWISE_ADAGRAD, ["sum"]),
        (EmbOptimType.ADAM, ["exp_avg", "exp_avg_sq"]),
        (EmbOptimType.PARTIAL_ROWWISE_ADAM, ["exp_avg", "exp_avg_sq"]),
        (AR, ["sum", "prev_iter", "iter"]),
    ],
)
def test_optimizer_state_by_torchs_names(kind, names):
    tbe = make(optimizer=kind)
    step(tbe)
    states = tbe.get_optimizer_state()
    assert [list(s) for s in states] == ([names, names] if names else [])
    for named, listed in zip(states, tbe.split_optimizer_states(), strict=True):
        for a, b in zip(named.values(), listed, strict=False):
            assert a.data_ptr() == b.data_ptr()


def test_names():
    assert list(make().emb.weights) == ["table_0", "table_1"]
    tbe = make([(4, 4)] * 4, table_names=["user.id", "item", "item", "user_id"])
    assert list(tbe.emb.weights) == ["user_id", "item", "item_1", "user_id_1"]
    assert tbe.table_names == ["user.id", "item", "item", "user_id"]


def test_copies_and_checkpoints():
    tbe = make(optimizer=AR, ar_alpha=0.1, feature_table_map=[1, 0, 1])
    for s in range(3):
        step(tbe, s)
    other = make(optimizer=AR, ar_alpha=0.1, feature_table_map=[1, 0, 1])
    file = io.BytesIO()
    torch.save(tbe.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for again in (other, copy.deepcopy(tbe), pickle.loads(pickle.dumps(tbe))):
        assert_equal(tensors(again), tensors(tbe))
        step(again, 9)
    step(tbe, 9)
    assert_equal(tensors(other), tensors(tbe))
    assert_equal(tensors(again), tensors(tbe))


def test_read_charging_and_other_decays_are_open():
    decay = coldrow.CumulativeLinear(half_life=2.0)
    tbe = ones(decay=decay, charge="read", ar_alpha=0.0)
    assert tbe.emb.update.decay == decay
    touch(tbe, 0)
    touch(tbe, 1, times=3)
    with torch.no_grad():
        seen = tbe(torch.tensor([0]), torch.tensor([0, 1]))
    assert float(seen[0, 0]) < float(tbe.split_embedding_weights()[0][0, 0])


# ------------------------------------------------------------------------------- TorchRec's call


FUSED = {
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: {"learning_rate": 0.02, "eps": 1e-6},
    EmbOptimType.EXACT_SGD: {"learning_rate": 0.02},
    EmbOptimType.EXACT_ADAGRAD: {"learning_rate": 0.02, "eps": 1e-6},
    EmbOptimType.ADAM: {
        "learning_rate": 0.02,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 1e-4,
    },
    EmbOptimType.PARTIAL_ROWWISE_ADAM: {"learning_rate": 0.02, "beta1": 0.8, "weight_decay": 0.0},
    AR: {"learning_rate": 0.02, "ar_alpha": 1e-3, "ema_beta": 0.99, "min_shrinkage": 0.1},
}


@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
@pytest.mark.parametrize("kind", FUSED)
def test_the_call_of_torchrecs_fused_kernels(kind, pooling, precision):
    """The arguments that torchrec 1.8 passes from batched_embedding_kernel, on a CPU."""
    local_rows, local_cols = [50, 30], [8, 8]
    fused_params = {
        "optimizer": kind,
        "output_dtype": SparseType.FP32,
        "cache_precision": precision,
        "enable_raw_embedding_streaming": False,
        **FUSED[kind],
    }
    res_params = fbgemm.RESParams()
    res_params.res_store_shards = 2
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=list(zip(local_rows, local_cols, *([p] * 2 for p in HOST), strict=True)),
        feature_table_map=[0, 0, 1],
        pooling_mode=pooling,
        weights_precision=precision,
        device=torch.device("cpu"),
        table_names=["t_user", "t_item"],
        embedding_shard_info=[(100, 8, 50, 0), (30, 16, 0, 8)],
        res_params=res_params,
        **fused_params,
    )
    for weight in tbe.split_embedding_weights():
        weight.data.uniform_(-0.1, 0.1)
    indices, offsets = random_batch(0, [50, 50, 30], [4] * 3, torch.int64)
    out = tbe(indices=indices.long(), offsets=offsets.long(), per_sample_weights=None)
    out.sum().backward()
    for t, (rows, dim, location, _) in enumerate(tbe.embedding_specs):
        assert location == EmbeddingLocation.HOST.value
        assert tbe.split_embedding_weights()[t].shape == (rows, dim)
    assert tbe.weights_precision == precision
    assert tbe.get_learning_rate() == 0.02
    for states in tbe.get_optimizer_state():
        assert all(s.is_contiguous() for s in states.values())
    tbe.set_learning_rate(0.01)
    tbe.set_optimizer_step(5)
    tbe.update_hyper_parameters({"lr": 0.03})
    tbe.flush()
    tbe.reset_cache_states()


def test_the_positional_call_of_torchrecs_fused_modules():
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        list(zip([10, 20], [4, 8], *([p] * 2 for p in HOST), strict=True)),
        feature_table_map=[0, 1],
        pooling_mode=PoolingMode.MEAN,
        device=torch.device("cpu"),
        optimizer=EmbOptimType.EXACT_ADAGRAD,
        learning_rate=0.1,
        eps=1e-8,
    )
    out = tbe(
        indices=torch.tensor([1, 2]), offsets=torch.tensor([0, 1, 2]), per_sample_weights=None
    )
    assert out.shape == (1, 12)


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


SIZES = [(9, 4), (7, 8)]
PLACES = [
    None,
    [EmbeddingLocation.DEVICE, EmbeddingLocation.MANAGED],
    [EmbeddingLocation.MANAGED_CACHING] * 2,
]


@pytest.mark.parametrize("prefix", ["", "sparse."])
@pytest.mark.parametrize("places", PLACES)
def test_a_checkpoint_of_fbgemm(places, prefix):
    states = ar_states(SIZES, 30)
    checkpoint, weights = flat_checkpoint(SIZES, [1, 0, 1], states, 30, places)
    checkpoint = {prefix + key: value for key, value in checkpoint.items()}
    tbe = make(SIZES, optimizer=AR, feature_table_map=[1, 0, 1], learning_rate=0.5)
    import_state(tbe, checkpoint, prefix=prefix)
    assert tbe.iter.tolist() == [30]
    assert tbe.get_learning_rate() == 0.5
    want = zip(states["momentum1"], [p.int() for p in states["prev_iter"]], strict=True)
    assert_equal(tensors(tbe)[:-1], [*weights, *itertools.chain(*want)])
    model = torch.nn.Module()
    model.sparse = make(SIZES, optimizer=AR, feature_table_map=[1, 0, 1])
    model.dense = torch.nn.Linear(2, 2)
    dense = {f"dense.{k}": v for k, v in torch.nn.Linear(2, 2).state_dict().items()}
    whole = {f"sparse.{k.removeprefix(prefix)}": v for k, v in checkpoint.items()}
    model.load_state_dict({**dense, **whole})
    assert_equal(tensors(model.sparse), tensors(tbe))


@pytest.mark.parametrize("kind", OPTIONS)
def test_there_and_back_for_each_optimizer(kind):
    tbe, other = make(optimizer=kind, **OPTIONS[kind]), make(optimizer=kind, **OPTIONS[kind])
    for s in range(4):
        step(tbe, s)
    state = export_state(tbe)
    assert isinstance(state.iter, int)
    import_state(other, state)
    assert_equal(tensors(other), tensors(tbe))
    by_name = export_state(other)
    for one, two in zip(
        [*state.weights, *itertools.chain(*state.optimizer_states)],
        [*by_name.weights, *itertools.chain(*by_name.optimizer_states)],
        strict=True,
    ):
        assert one.is_contiguous()
        assert one.dtype == torch.float32
        assert torch.equal(one, two)
    # From a module: whatever has FBGEMM's accessors, this class among them.
    third = make(optimizer=kind, **OPTIONS[kind])
    import_state(third, tbe)
    assert_equal(tensors(third), tensors(tbe))
    # Into a module.
    fourth = make(optimizer=kind, **OPTIONS[kind])
    state.write_to(fourth)
    assert_equal(tensors(fourth), tensors(tbe))


def test_native_modules_too():
    emb = TableBatchedEmbeddingBags(
        [Table("a", 9, 4), Table("b", 7, 8)],
        coldrow.RowUpdate(decay=coldrow.EpochGated.for_epoch(9)),
        charge="read",
    )
    tbe = make(optimizer=AR)
    step(tbe)
    import_state(emb, tbe)
    assert emb.clock == 1
    assert_equal(list(emb.weights.values()), tbe.split_embedding_weights())
    assert_equal(
        [export_state(emb).optimizer_states[0][1]], [tbe.split_optimizer_states()[0][1].float()]
    )


BIG = 2**24


@pytest.mark.parametrize("clock", [BIG - 1, BIG, BIG + 1, BIG + 3, 2**25 + 1, 2**31 - 1])
def test_prev_iter_past_what_float32_can_count(clock):
    """FBGEMM stored float32(prev_iter), to nearest even: which may lie above the clock."""
    exact = [[0, 1, clock // 3, clock - 5, clock - 2, clock - 1, clock, clock, clock]]
    prev_iter = [torch.tensor(exact[0], dtype=torch.float32)]
    state = FbgemmState([torch.zeros(9, 4)], [[torch.zeros(9), prev_iter[0]]], clock)
    tbe = make([(9, 4)], optimizer=AR)
    import_state(tbe, state)
    mine = tbe.split_optimizer_states()[0][1]
    assert mine.dtype == torch.int32
    assert int(mine.max()) <= clock == tbe.emb.clock
    spacing = max(1, int(np.spacing(np.float32(clock))))
    for got, want, stored in zip(mine.tolist(), exact[0], prev_iter[0].tolist(), strict=True):
        assert got == min(int(stored), clock)
        assert abs(got - want) <= spacing // 2
    if clock <= BIG:
        assert mine.tolist() == exact[0]
    # There and back again: what float32 holds stays as it is.
    again = make([(9, 4)], optimizer=AR)
    import_state(again, export_state(tbe))
    twice = make([(9, 4)], optimizer=AR)
    import_state(twice, export_state(again))
    assert_equal(tensors(twice), tensors(again))
    exported = export_state(tbe).optimizer_states[0][1]
    assert torch.equal(exported, mine.float())


def test_the_next_step_after_a_clamped_one_trains():
    clock = BIG + 1  # float32(clock) is BIG, float32(clock + 2) is BIG + 4
    prev_iter = torch.tensor([float(BIG + 3)] * 4)
    assert prev_iter[0] == BIG + 4
    tbe = ones(ar_alpha=1e-3, min_shrinkage=0.0)
    import_state(tbe, FbgemmState([torch.ones(4, 4)], [[torch.zeros(4), prev_iter]], clock + 2))
    assert tbe.split_optimizer_states()[0][1].tolist() == [BIG + 3] * 4
    touch(tbe, 0)
    torch.testing.assert_close(tbe.split_embedding_weights()[0][0], torch.full((4,), 1 - 1e-3))


def changed(index, value):
    def change(state: FbgemmState) -> FbgemmState:
        state.optimizer_states[0][1][index] = value
        return state

    return change


def replaced(**fields):
    def change(state: FbgemmState) -> FbgemmState:
        values = {name: make_(state) for name, make_ in fields.items()}
        return FbgemmState(**{**vars(state), **values})

    return change


BAD_STATES = [
    (changed(0, 5.0), "^prev_iter: got 5.0 in table 'table_0', accepted: .* 4$"),
    (changed(0, -1.0), "^prev_iter: got -1.0"),
    (changed(0, NAN), "^prev_iter: got nan"),
    (changed(0, 1.5), "^prev_iter: got 1.5"),
    (replaced(iter=lambda s: -1), "^iter: got -1"),
    (replaced(iter=lambda s: 2**31), "^iter: got 2147483648"),
    (replaced(weights=lambda s: s.weights[:1]), "^weights: got 1 tables, accepted: 2"),
    (replaced(optimizer_states=lambda s: []), "^optimizer_states: got 0 tables"),
    (
        replaced(optimizer_states=lambda s: [t[:1] for t in s.optimizer_states]),
        "^optimizer_states: got 1 for table 'table_0', accepted: momentum1, prev_iter",
    ),
    (
        replaced(weights=lambda s: [w.half() for w in s.weights]),
        "weights.table_0: got torch.float16",
    ),
    (replaced(weights=lambda s: [w[:-1] for w in s.weights]), "weights.table_0: got .*8, 4"),
]


@pytest.mark.parametrize(("change", "says"), BAD_STATES)
def test_states_that_do_not_fit_change_nothing(change, says):
    source, target = make(optimizer=AR), make(optimizer=AR)
    for s in range(4):
        step(source, s)
    step(target)
    before = snapshot(target)
    state = change(export_state(source))
    with pytest.raises((ValueError, RuntimeError), match=says):
        import_state(target, state)
    assert_equal(tensors(target), before)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("iter", None, "^iter: is missing"),
        ("prev_iter_host", None, "^prev_iter_host: is missing"),
        ("momentum1_offsets", None, "^momentum1_offsets: is missing"),
        ("weights_host", torch.zeros(9), "^weights_host: got 9 numbers, accepted: 36 at least"),
        ("rows_per_table", torch.tensor([7, 9]), "^rows_per_table, D_offsets: got tables of"),
        ("rows_per_table", torch.tensor([9, 7, 7]), "^rows_per_table, D_offsets: got tables of"),
        ("prev_iter_host", torch.full((16,), 31.0), "^prev_iter: got 31.0"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(key, value, says):
    checkpoint, _ = flat_checkpoint(SIZES, [0, 1], ar_states(SIZES, 30), 30)
    if value is None:
        del checkpoint[key]
    else:
        checkpoint[key] = value
    tbe = make(SIZES, optimizer=AR)
    step(tbe)
    before = snapshot(tbe)
    with pytest.raises(ValueError, match=says):
        import_state(tbe, checkpoint)
    with pytest.raises(RuntimeError, match=says.removeprefix("^")):
        tbe.load_state_dict(checkpoint)
    assert_equal(tensors(tbe), before)


def test_checkpoints_without_a_clock():
    """FBGEMM keeps none for the Adagrads."""
    momentum1 = {"momentum1": [torch.rand(9), torch.rand(7)]}
    checkpoint, weights = flat_checkpoint(SIZES, [0, 1], momentum1, None)
    tbe = make(SIZES, **ROWWISE)
    step(tbe)
    import_state(tbe, checkpoint)
    assert tbe.iter.tolist() == [0]
    assert_equal(tensors(tbe)[:-1], [*weights, *momentum1["momentum1"]])
    assert not tbe.emb.state["table_0"]["prev_iter"].any()


def test_16_bit_momentum_is_widened():
    states = {"momentum1": [torch.rand(9, 4).half()], "momentum2": [torch.rand(9).half()]}
    checkpoint, _ = flat_checkpoint([(9, 4)], [0], states, 3)
    tbe = make([(9, 4)], optimizer=EmbOptimType.PARTIAL_ROWWISE_ADAM)
    import_state(tbe, checkpoint)
    assert_equal(
        tbe.split_optimizer_states()[0], [states[n][0].float() for n in ("momentum1", "momentum2")]
    )


def test_what_fbgemm_does_not_have_is_not_exported():
    rows = [Table("a", 4, 4)]
    by_row = coldrow.RowUpdate(coldrow.PartialRowwiseAdam(bias_correction="row"))
    with pytest.raises(ValueError, match=r"bias_correction='row', accepted: with Adam only"):
        export_state(TableBatchedEmbeddingBags(rows, by_row))
    mixed = [*rows, Table("b", 4, 4, update=coldrow.RowUpdate(coldrow.SGD()))]
    with pytest.raises(ValueError, match=r"optimizers are .*RowwiseRMSprop.*SGD"):
        export_state(TableBatchedEmbeddingBags(mixed))
    with pytest.raises(TypeError, match=r"^emb: got Linear, accepted: a coldrow"):
        export_state(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^source: got Linear, accepted: an FbgemmState"):
        import_state(make(), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^tbe: has weights and states of shapes"):
        export_state(make(optimizer=AR)).write_to(make([(9, 4)], optimizer=AR))


# ------------------------------------------------------------------------------- imports and docs


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_imported_only_when_asked_for_and_without_fbgemm():
    show = "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'fbgemm_gpu', 'torchrec'}), 'coldrow.compat' in sys.modules)"
    assert run_python(f"import sys, coldrow; {show}") == "[] False"
    block = "sys.modules['fbgemm_gpu'] = None; sys.modules['torchrec'] = None"
    code = f"import sys; {block}; import coldrow.compat.fbgemm; del sys.modules['fbgemm_gpu'], sys.modules['torchrec']; {show}"
    assert run_python(code) == "['torch'] True"


def test_all_names_are_there():
    assert sorted(fbgemm.__all__) == sorted(set(fbgemm.__all__))
    for name in fbgemm.__all__:
        assert hasattr(fbgemm, name)


def table_rows(heading: str) -> dict[str, str]:
    """First column to the rest of the table under a heading of the docs."""
    section = DOCS.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = {}
    for line in section.splitlines():
        if match := re.match(r"\| `(.+?)` *\|(.+)\|$", line):
            for name in match[1].split("`, `"):
                rows[name] = match[2]
    return rows


def test_the_docs_list_every_argument():
    assert list(table_rows("Constructor arguments")) == list(THEIRS)
    assert list(table_rows("coldrow's own arguments")) == OWN
    for name, row in table_rows("Constructor arguments").items():
        assert ("refused" in row) == (name in ONLY_DEFAULT), name
        assert ("no effect" in row) == (name in WITHOUT_EFFECT), name


def test_the_docs_list_every_method():
    rows = table_rows("Methods and attributes")
    own = {
        name
        for name, value in vars(SplitTableBatchedEmbeddingBagsCodegen).items()
        if not name.startswith("_")
    }
    assert own <= {name.split("(")[0] for name in rows}
    forward = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.forward).parameters
    assert list(table_rows("Arguments of a call")) == [n for n in forward if n != "self"]


def test_the_docs_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    assert names["tbe"].iter.tolist() == [1]
    checkpoint, weights = flat_checkpoint([(1000, 16)], [0], ar_states([(1000, 16)], 30), 30)
    names["checkpoint"] = checkpoint
    exec(blocks[1], names)
    assert names["tbe"].iter.tolist() == [30]
    assert torch.equal(names["tbe"].split_embedding_weights()[0], weights[0])
    assert torch.equal(names["state"].weights[0], weights[0])
