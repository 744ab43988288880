"""coldrow.compat.fbgemm: every constructor argument has an effect, is known to have none, or is refused."""

from __future__ import annotations

import enum
import inspect
import re

import pytest

torch = pytest.importorskip("torch")
from fbgemm_cases import (  # noqa: E402
    ADAM,
    AR,
    DECOUPLED,
    EFFECTS,
    HOST,
    NAN,
    OWN,
    THEIRS,
    WITHOUT_EFFECT,
    assert_equal,
    make,
    random_batch,
    snapshot,
    step,
    tensors,
)

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
from coldrow.compat.fbgemm.arguments import ONLY_DEFAULT, READS  # noqa: E402

SIGNATURE = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
PARAMETERS = [name for name in SIGNATURE if name != "self"]


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
