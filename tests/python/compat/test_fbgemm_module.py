"""coldrow.compat.fbgemm: clock, learning rate, copies, names, and the calls that TorchRec makes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")
from fbgemm_cases import (  # noqa: E402
    ADAM,
    AR,
    HOST,
    assert_equal,
    make,
    ones,
    random_batch,
    step,
    tensors,
    touch,
)

import coldrow  # noqa: E402
from coldrow.compat import fbgemm  # noqa: E402
from coldrow.compat.fbgemm import (  # noqa: E402
    EmbeddingLocation,
    EmbOptimType,
    PoolingMode,
    SparseType,
    SplitTableBatchedEmbeddingBagsCodegen,
)

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
