"""coldrow.compat.fbgemm: what it trains, by formula and beside torch.

Beside FBGEMM itself it is run by `make test-fbgemm` (tests/fbgemm); nothing here needs fbgemm_gpu.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from fbgemm_cases import ADAM, AR, EFFECTS, OPTIONS, make, ones, random_batch, step, touch  # noqa: E402

import coldrow  # noqa: E402
from coldrow.compat.fbgemm import (  # noqa: E402
    EmbOptimType,
    PoolingMode,
    SparseType,
)

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
