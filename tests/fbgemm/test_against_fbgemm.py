"""coldrow.compat.fbgemm beside the real fbgemm_gpu: the same calls, the same numbers.

Not part of `make test`; `make test-fbgemm` runs it in an environment that has both.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

import torch
from conftest import FIGURES
from fbgemm_gpu import split_embedding_configs as theirs_configs
from fbgemm_gpu import split_table_batched_embeddings_ops_common as theirs_common
from fbgemm_gpu import split_table_batched_embeddings_ops_training as theirs_training

from coldrow.compat import fbgemm as ours

Theirs = theirs_training.SplitTableBatchedEmbeddingBagsCodegen
Ours = ours.SplitTableBatchedEmbeddingBagsCodegen
HAS_AR = hasattr(theirs_configs.EmbOptimType, "ROWWISE_RMSPROP_AR") and (
    "ar_alpha" in inspect.signature(Theirs.__init__).parameters
)

SIZES = [(40, 8), (25, 12), (60, 4)]
STEPS = 8
OPTIMIZERS = {
    "EXACT_SGD": {},
    "EXACT_ADAGRAD": {"eps": 1e-4},
    "EXACT_ROWWISE_ADAGRAD": {"eps": 1e-4},
    "ROWWISE_RMSPROP_AR": {"eps": 1e-4, "ar_alpha": 0.4, "ema_beta": 0.9, "min_shrinkage": 0.2},
}


def enum_of(kind: str):
    """FBGEMM's own enum of that name."""
    for module in (theirs_training, theirs_common, theirs_configs):
        if hasattr(module, kind):
            return getattr(module, kind)
    raise AttributeError(kind)


def make_pair(optimizer: str, sizes=SIZES, **options):
    """The same constructor call for both, and the same weights."""
    if optimizer == "ROWWISE_RMSPROP_AR" and not HAS_AR:
        pytest.skip("this FBGEMM has no ROWWISE_RMSPROP_AR")
    made = []
    for build, names in ((Theirs, enum_of), (Ours, lambda kind: getattr(ours, kind))):
        host = names("EmbeddingLocation").HOST
        cpu = names("ComputeDevice").CPU

        def own(value, names=names):
            return getattr(names(value[0]), value[1]) if isinstance(value, tuple) else value

        made.append(
            build(
                [(rows, dim, host, cpu) for rows, dim in sizes],
                optimizer=names("EmbOptimType")[optimizer],
                learning_rate=0.1,
                **OPTIMIZERS[optimizer],
                **{k: own(v) for k, v in options.items()},
            )
        )
    rng = torch.Generator().manual_seed(1)
    for one, other in zip(*(m.split_embedding_weights() for m in made), strict=True):
        values = torch.randn(one.shape, generator=rng)
        one.copy_(values)
        other.copy_(values)
    return made


def random_batch(seed: int, feature_rows, bags, dtype=torch.int64):
    """Indices and offsets; bags of 0 to 4, with duplicates, few rows in any one step."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(0, 5, b) for b in bags]
    indices = [
        rng.integers(0, rows, n.sum()) // (1 + seed % 3)
        for rows, n in zip(feature_rows, lengths, strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return (
        torch.tensor(np.concatenate(indices), dtype=dtype),
        torch.tensor(offsets, dtype=dtype),
    )


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference over max(1, |value|)."""
    assert one.shape == other.shape
    if one.numel() == 0:
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    return float(((one - other).abs() / other.abs().clamp(min=1.0)).max())


def train_both(pair, feature_rows, bags, steps=STEPS, weighted=False, dtype=torch.int64, **options):
    """Run the same steps on both; the largest differences of what comes out."""
    theirs, mine = pair
    errors = dict.fromkeys(("output", "weight", "state"), 0.0)
    for step in range(steps):
        indices, offsets = random_batch(step, feature_rows, bags, dtype)
        results = []
        for tbe in (theirs, mine):
            weights = torch.linspace(-1, 1, indices.numel()) if weighted else None
            out = tbe(indices.clone(), offsets.clone(), weights, **options)
            grad = torch.linspace(-2, 3, out.numel()).view(out.shape).to(out.dtype)
            out.backward(grad)
            results.append(out)
        errors["output"] = max(errors["output"], relative(results[1], results[0]))
    pairs = zip(mine.split_embedding_weights(), theirs.split_embedding_weights(), strict=True)
    errors["weight"] = max(relative(*pair) for pair in pairs)
    states = [
        list(itertools.chain.from_iterable(t.split_optimizer_states())) for t in (mine, theirs)
    ]
    for one, other in zip(*states, strict=True):
        if one.dtype == torch.int32:
            assert torch.equal(one.float(), other)  # prev_iter: exact
        else:
            errors["state"] = max(errors["state"], relative(one, other))
    return errors


def rows_of(feature_table_map, sizes=SIZES):
    return [sizes[t][0] for t in feature_table_map]


@pytest.mark.parametrize("weights", ["FP32", "FP16"])
@pytest.mark.parametrize("pooling", ["SUM", "MEAN", "NONE", "weighted"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_training(optimizer, pooling, weights):
    sizes = SIZES if pooling != "NONE" else [(r, 8) for r, _ in SIZES]
    pair = make_pair(
        optimizer,
        sizes,
        pooling_mode=("PoolingMode", "SUM" if pooling == "weighted" else pooling),
        weights_precision=("SparseType", weights),
        stochastic_rounding=False,
    )
    rows = rows_of(range(3), sizes)
    errors = train_both(pair, rows, (5, 5, 5), weighted=pooling == "weighted")
    FIGURES[f"{optimizer} {pooling} {weights}"] = errors
    assert errors["output"] <= (2e-6 if weights == "FP32" else 4e-3)
    assert errors["weight"] <= (4e-6 if weights == "FP32" else 2e-3)
    assert errors["state"] <= 2e-6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_shared_tables(optimizer, dtype):
    feature_table_map = [0, 0, 1, 2, 2]
    pair = make_pair(optimizer, feature_table_map=feature_table_map)
    errors = train_both(pair, rows_of(feature_table_map), (4,) * 5, dtype=dtype)
    FIGURES[f"{optimizer} shared tables, {dtype}"] = errors
    assert max(errors.values()) <= 4e-6


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "optimizer", [o for o in OPTIMIZERS if o != "EXACT_ADAGRAD"]
)  # FBGEMM has no more
def test_batch_sizes_by_feature_and_rank(optimizer, ranks):
    sizes = [[2, 0, 3], [1, 4, 2], [3, 3, 1]]
    sizes = sizes if ranks == 3 else [[sum(s)] for s in sizes]
    pair = make_pair(optimizer)
    bags = [sum(s) for s in sizes]
    errors = train_both(pair, rows_of(range(3)), bags, batch_size_per_feature_per_rank=sizes)
    FIGURES[f"{optimizer} batch sizes, {ranks} ranks"] = errors
    assert max(errors.values()) <= 4e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_clipping(optimizer):
    pair = make_pair(optimizer, gradient_clipping=True, max_gradient=0.5)
    errors = train_both(pair, rows_of(range(3)), (4,) * 3)
    FIGURES[f"{optimizer} gradient clipping"] = errors
    assert max(errors.values()) <= 4e-6


@pytest.mark.parametrize("output", ["FP32", "FP16"])  # FBGEMM's CPU kernels have no BF16
def test_output_dtype(output):
    pair = make_pair("EXACT_ROWWISE_ADAGRAD", output_dtype=("SparseType", output))
    assert pair[0].output_dtype == pair[1].output_dtype
    errors = train_both(pair, rows_of(range(3)), (4,) * 3)
    FIGURES[f"output {output}"] = errors
    assert max(errors.values()) <= (4e-6 if output == "FP32" else 2e-3)
    indices, offsets = random_batch(0, rows_of(range(3)), (4,) * 3)
    assert len({tbe(indices, offsets).dtype for tbe in pair}) == 1


@pytest.mark.parametrize("clip", [{}, {"gradient_clipping": True, "max_gradient": 0.5}])
@pytest.mark.parametrize("asked", [None, [1, 0, 1]])
def test_gradient_of_per_sample_weights(asked, clip):
    pair = make_pair("EXACT_SGD", **clip)
    indices, offsets = random_batch(0, rows_of(range(3)), (4,) * 3)
    grads = []
    for tbe in pair:
        weights = torch.linspace(-1, 1, indices.numel()).requires_grad_()
        asked_of = None if asked is None else torch.tensor(asked, dtype=torch.int32)
        out = tbe(indices, offsets, weights, asked_of)
        out.backward(torch.linspace(-2, 3, out.numel()).view(out.shape))
        grads.append(weights.grad)
    FIGURES[f"per_sample_weights.grad, asked {asked}{', clipped' * bool(clip)}"] = {
        "grad": relative(grads[1], grads[0])
    }
    assert relative(grads[1], grads[0]) <= 4e-6


def test_learning_rate_changes_between_steps():
    optimizer = "ROWWISE_RMSPROP_AR" if HAS_AR else "EXACT_ROWWISE_ADAGRAD"
    pair = make_pair(optimizer)
    for lr in (0.1, 0.03, 0.5):
        for tbe in pair:
            tbe.set_learning_rate(lr)
        errors = train_both(pair, rows_of(range(3)), (4,) * 3, steps=3)
        assert max(errors.values()) <= 4e-6
    assert [tbe.get_learning_rate() for tbe in pair] == [0.5, 0.5]


@pytest.mark.parametrize("shared", [True, False])
def test_decoupled_weight_decay(shared):
    """FBGEMM's CPU kernel for fp32 tables of one feature leaves the decay out; with two it has it."""
    feature_table_map = [0, 0, 1, 1, 2, 2] if shared else [0, 1, 2]
    pair = make_pair(
        "EXACT_ROWWISE_ADAGRAD",
        feature_table_map=feature_table_map,
        weight_decay=0.5,
        weight_decay_mode=("WeightDecayMode", "DECOUPLE"),
    )
    features = len(feature_table_map)
    errors = train_both(pair, rows_of(feature_table_map), (4,) * features)
    FIGURES[f"decoupled weight decay, {'two features' if shared else 'one feature'} a table"] = (
        errors
    )
    if shared:
        assert max(errors.values()) <= 4e-6
    else:
        assert errors["weight"] > 0.01


def test_same_signature():
    theirs = inspect.signature(Theirs.__init__).parameters
    mine = inspect.signature(Ours.__init__).parameters
    shared = [p for p in mine.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    ar = {"ar_alpha", "ema_beta", "min_shrinkage"}
    assert [p.name for p in shared if HAS_AR or p.name not in ar] == list(theirs)
    for p in shared:
        if p.name in theirs:
            assert str(p.default) == str(theirs[p.name].default), p.name
    names = [list(inspect.signature(c.forward).parameters) for c in (Ours, Theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "kind",
    [
        "EmbOptimType",
        "SparseType",
        "PoolingMode",
        "EmbeddingLocation",
        "ComputeDevice",
        "CacheAlgorithm",
        "BoundsCheckMode",
        "WeightDecayMode",
        "CounterWeightDecayMode",
        "StepMode",
        "LearningRateMode",
        "GradSumDecay",
    ],
)
def test_same_enums(kind):
    mine = {m.name: m.value for m in getattr(ours, kind)}
    theirs = {m.name: m.value for m in enum_of(kind)}
    if not HAS_AR:
        mine.pop("ROWWISE_RMSPROP_AR", None)
    assert theirs.items() <= mine.items()
    if kind == "SparseType":
        for m in ours.SparseType:
            assert m.as_int() == enum_of(kind)[m.name].as_int()


@pytest.mark.parametrize(
    "kind",
    [
        "CounterBasedRegularizationDefinition",
        "CowClipDefinition",
        "EnsembleModeDefinition",
        "EmainplaceModeDefinition",
        "GlobalWeightDecayDefinition",
        "UserEnabledConfigDefinition",
        "TailIdThreshold",
    ],
)
def test_same_records(kind):
    assert str(getattr(ours, kind)()) == str(enum_of(kind)())


def test_their_enums_are_taken():
    host, cpu = theirs_common.EmbeddingLocation.HOST, theirs_training.ComputeDevice.CPU
    tbe = Ours(
        [(4, 4, host, cpu)],
        optimizer=theirs_configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        weights_precision=theirs_configs.SparseType.FP16,
        cache_precision=theirs_configs.SparseType.FP16,
        output_dtype=theirs_configs.SparseType.FP32,
        pooling_mode=theirs_common.PoolingMode.MEAN,
        cache_algorithm=theirs_common.CacheAlgorithm.LRU,
        bounds_check_mode=theirs_common.BoundsCheckMode.FATAL,
        weight_decay_mode=enum_of("WeightDecayMode").NONE,
        record_cache_metrics=theirs_common.RecordCacheMetrics(False, False),
        extra_optimizer_config=enum_of("UserEnabledConfigDefinition")(),
        res_params=enum_of("RESParams")(),
    )
    assert tbe.emb.weights["table_0"].dtype == torch.float16


# ----------------------------------------------------------------------------- documented differences


def test_their_clock_ticks_on_every_forward_ours_does_not():
    theirs, mine = make_pair("ROWWISE_RMSPROP_AR")
    indices, offsets = random_batch(0, rows_of(range(3)), (4,) * 3)
    for tbe in (theirs, mine):
        tbe(indices, offsets).sum().backward()
        with torch.no_grad():
            tbe(indices, offsets)
    assert int(theirs.iter) == 2
    assert int(mine.iter) == 1


def test_they_replace_a_bad_index_and_we_raise():
    theirs, mine = make_pair("EXACT_SGD", sizes=[(4, 4)])
    indices, offsets = torch.tensor([7]), torch.tensor([0, 1])
    out = theirs(indices.clone(), offsets.clone())
    assert torch.equal(out[0], theirs.split_embedding_weights()[0][0])  # row 0
    with pytest.raises(IndexError, match="indices"):
        mine(indices, offsets)


def test_they_train_in_eval_mode_and_we_do_not():
    for tbe, trains in zip(make_pair("EXACT_SGD"), (True, False), strict=True):
        before = tbe.split_embedding_weights()[0].clone()
        out = tbe.eval()(*random_batch(0, rows_of(range(3)), (4,) * 3))
        assert out.requires_grad == trains
        if trains:
            out.sum().backward()
        assert torch.equal(tbe.split_embedding_weights()[0], before) != trains


@pytest.mark.parametrize("on_nonfinite", ["skip", "propagate"])
def test_they_write_what_is_not_finite(on_nonfinite):
    pair = make_pair("EXACT_ROWWISE_ADAGRAD", sizes=[(4, 4)])
    mine = Ours(
        [(4, 4, ours.EmbeddingLocation.HOST, ours.ComputeDevice.CPU)],
        optimizer=ours.EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        on_nonfinite=on_nonfinite,
    )
    for tbe, writes in ((pair[0], True), (mine, on_nonfinite == "propagate")):
        out = tbe(torch.tensor([1]), torch.tensor([0, 1]))
        out.backward(torch.full_like(out, float("nan")))
        assert bool(tbe.split_embedding_weights()[0][1].isnan().any()) == writes


def test_their_cpu_kernels_round_to_nearest_whatever_was_asked():
    asked, not_asked = (
        make_pair("EXACT_SGD", weights_precision=("SparseType", "FP16"), stochastic_rounding=s)
        for s in (True, False)
    )
    for tbe in (*asked, *not_asked):
        out = tbe(*random_batch(0, rows_of(range(3)), (4,) * 3))
        out.backward(torch.full_like(out, 1e-3))
    same = [
        all(map(torch.equal, a.split_embedding_weights(), b.split_embedding_weights()))
        for a, b in zip(asked, not_asked, strict=True)
    ]
    assert same == [True, False]


# ------------------------------------------------------------------------------- state there and back


@pytest.mark.parametrize("by", ["module", "state_dict"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_here_and_goes_back(optimizer, by):
    feature_table_map = [0, 0, 1, 2]
    rows, bags = rows_of(feature_table_map), (4,) * 4
    theirs, _ = make_pair(optimizer, feature_table_map=feature_table_map)
    _, mine = make_pair(optimizer, feature_table_map=feature_table_map)
    for step in range(5):
        theirs(*random_batch(step, rows, bags)).sum().backward()
    ours.import_state(mine, theirs if by == "module" else theirs.state_dict())
    with contextlib.suppress(KeyError):
        assert mine.emb.clock == int(theirs.state_dict()["iter"])
    errors = train_both((theirs, mine), rows, bags)
    assert max(errors.values()) <= 4e-6
    _, again = make_pair(optimizer, feature_table_map=feature_table_map)
    back, _ = make_pair(optimizer, feature_table_map=feature_table_map)
    ours.export_state(mine).write_to(back)
    ours.import_state(again, back)
    for one, other in zip(
        [*again.split_embedding_weights(), *itertools.chain(*again.split_optimizer_states())],
        [*mine.split_embedding_weights(), *itertools.chain(*mine.split_optimizer_states())],
        strict=True,
    ):
        assert torch.equal(one, other)
    errors = train_both((back, mine), rows, bags)
    assert max(errors.values()) <= 4e-6


def test_their_checkpoint_loads_as_part_of_a_model():
    theirs, mine = make_pair("ROWWISE_RMSPROP_AR")
    rows, bags = rows_of(range(3)), (4,) * 3
    for step in range(5):
        theirs(*random_batch(step, rows, bags)).sum().backward()
    one, other = torch.nn.Module(), torch.nn.Module()
    one.dense, one.sparse = torch.nn.Linear(2, 2), theirs
    other.dense, other.sparse = torch.nn.Linear(2, 2), mine
    other.load_state_dict(one.state_dict())
    assert mine.emb.clock == 5
    errors = train_both((theirs, mine), rows, bags)
    assert max(errors.values()) <= 4e-6
