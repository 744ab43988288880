"""Random batches of every shape against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Reference, pool, random_batch, unpool

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

# Relative to max(1, |w|), after a few steps: float32 arithmetic, then the spacing of the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}

DECAYS = st.one_of(
    st.just(coldrow.NoDecay()),
    st.builds(
        coldrow.LinearClipped,
        st.sampled_from([0.0, 1e-3, 0.1, 5.0]),
        st.sampled_from([0.0, 0.1, 1.0]),
    ),
    st.builds(coldrow.CumulativeLinear, st.sampled_from([0.0, 1e-9, 1e-3, 0.05, 1.0])),
    st.builds(coldrow.Exponential, st.sampled_from([0.0, 1e-3, 0.3])),
    st.builds(coldrow.Constant, st.sampled_from([0.0, 0.2])),
    st.just(coldrow.EpochGated(coldrow.CumulativeLinear(half_life=3.0))),
    st.just(coldrow.EpochGated(coldrow.LinearClipped(0.2, 0.0))),
    st.just(coldrow.EpochReset()),
)
DIMS = st.one_of(
    st.integers(1, 70), st.sampled_from([96, 127, 128, 129, 255, 256, 260, 512, 1023, 1024, 1030])
)


@st.composite
def updates(draw):
    return coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(
            lr=draw(st.sampled_from([0.0, 0.01, 0.3])),
            eps=draw(st.sampled_from([1e-8, 1e-3])),
            ema_beta=draw(st.sampled_from([0.0, 0.5, 0.99])),
        ),
        draw(DECAYS),
        decay_state=draw(st.booleans()),
    )


def bounded(got, want, tolerance):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want)
    np.testing.assert_array_less(
        np.abs(got - want), tolerance * np.maximum(1.0, np.abs(want)) + 1e-300
    )


@settings(max_examples=150, deadline=None)
@given(
    update=updates(),
    dim=DIMS,
    rows=st.integers(1, 60),
    dtype=st.sampled_from(list(TOLERANCE)),
    grad_dtype=st.sampled_from(list(TOLERANCE)),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_apply(update, dim, rows, dtype, grad_dtype, index_dtype, sizes, seed):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(rows, dim))).to(dtype)
    state = coldrow.init_state(update, rows, dim, like=weight)
    reference = Reference(update, weight.double().numpy())
    step, epoch_start = 0, 0
    for n in sizes:
        step += int(rng.integers(1, 9))
        if rng.integers(2):
            epoch_start = step
        grad = torch.from_numpy(rng.normal(size=(n, dim))).to(grad_dtype)
        indices = torch.from_numpy(rng.integers(0, rows, n)).to(index_dtype)
        coldrow.apply_(update, weight, grad, indices, state, step=step, epoch_start=epoch_start)
        reference.apply(
            grad.double().numpy(),
            indices.numpy(),
            step=step,
            lr=update.optimizer.lr,
            epoch_start=epoch_start,
        )
    bounded(weight.double().numpy(), reference.weight, len(sizes) * TOLERANCE[dtype])
    bounded(state["momentum1"].numpy(), reference.state["momentum1"], 1e-5)
    np.testing.assert_array_equal(state["prev_iter"].numpy(), reference.prev_iter)


@settings(max_examples=120, deadline=None)
@given(
    update=updates(),
    dims=st.lists(DIMS, min_size=1, max_size=3),
    pooling=st.sampled_from(["sum", "weighted", "mean", "none"]),
    charge=st.sampled_from(["touch", "read"]),
    fused=st.booleans(),
    vary=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    bags=st.integers(0, 12),
    longest=st.integers(0, 6),
    seed=st.integers(0, 2**32),
)
def test_module(
    update, dims, pooling, charge, fused, vary, dtype, index_dtype, bags, longest, seed
):
    """Three steps of forward and backward; the first table serves two features."""
    rng = np.random.default_rng(seed)
    if not fused:  # gradients pass through the tables' dtype
        dtype = torch.float32
    rows = [int(rng.integers(1, 30)) for _ in dims]
    tables = [
        Table(f"t{i}", e, d, dtype=dtype, features=["a", "b"] if i == 0 else [])
        for i, (e, d) in enumerate(zip(rows, dims, strict=True))
    ]
    emb = TableBatchedEmbeddingBags(
        tables,
        update,
        pooling="sum" if pooling == "weighted" else pooling,
        charge=charge,
        fused=fused,
    )
    for p in emb.weights.values():
        p.data.copy_(torch.from_numpy(rng.normal(size=p.shape)))
    refs = [Reference(update, p.detach().double().numpy()) for p in emb.weights.values()]
    of_feature = [0, 0, *range(1, len(dims))]
    lr, tolerance = update.optimizer.lr, TOLERANCE[dtype]

    for step in range(1, 4):
        if rng.integers(2):
            emb.new_epoch()
        sizes = [int(rng.integers(0, bags + 1)) if vary else bags for _ in of_feature]
        parts = [
            random_batch(rng, rows[t], b, longest) for t, b in zip(of_feature, sizes, strict=True)
        ]
        ends = np.cumsum([0] + [len(i) for i, _ in parts])
        indices = np.concatenate([i for i, _ in parts])
        offsets = np.concatenate(
            [[0], *(o[1:] + e for (_, o), e in zip(parts, ends, strict=False))]
        )
        psw = rng.normal(size=len(indices)).astype(np.float32) if pooling == "weighted" else None
        out = emb(
            torch.from_numpy(indices).to(index_dtype),
            torch.from_numpy(offsets).to(index_dtype),
            None if psw is None else torch.from_numpy(psw),
            sizes if vary else None,
        )

        kind = "sum" if pooling == "weighted" else pooling
        grads, wants, updates_of = [], [], [([], []) for _ in dims]
        for f, (t, (i, o)) in enumerate(zip(of_feature, parts, strict=True)):
            p = None if psw is None else psw[ends[f] : ends[f + 1]]
            table = refs[t].weight
            if charge == "read":
                table = refs[t].read(step=step, lr=lr, epoch_start=emb.epoch_start)
            want = table[i] if kind == "none" else pool(table[i], o, kind, p)
            grad = rng.normal(size=want.shape).astype(np.float32)
            grads.append(grad)
            wants.append(want)
            updates_of[t][0].append(i)
            updates_of[t][1].append(grad if kind == "none" else unpool(grad, o, kind, p))

        if kind == "none" and len(set(dims)) > 1:
            got = [x.detach().numpy() for x in out]
        elif kind == "none":
            got = np.split(out.detach().numpy(), ends[1:-1])
        elif vary:
            cuts = np.cumsum([w.size for w in wants])[:-1]
            got = [
                g.reshape(w.shape)
                for g, w in zip(np.split(out.detach().numpy(), cuts), wants, strict=True)
            ]
        else:
            cuts = np.cumsum([w.shape[1] for w in wants])[:-1]
            got = np.split(out.detach().numpy(), cuts, axis=1)
        for g, w in zip(got, wants, strict=True):
            bounded(g, w, 8 * step * tolerance)

        tensors = [torch.from_numpy(g) for g in grads]
        if isinstance(out, list):
            torch.autograd.backward(out, tensors)
        elif kind == "none":
            out.backward(torch.cat(tensors))
        elif vary:
            out.backward(torch.cat([g.reshape(-1) for g in tensors]))
        else:
            out.backward(torch.cat(tensors, dim=1))
        if not fused:
            emb.step()
            emb.zero_grad()
        for ref, (i, g) in zip(refs, updates_of, strict=True):
            ref.apply(
                np.concatenate(g),
                np.concatenate(i),
                step=step,
                lr=lr,
                epoch_start=emb.epoch_start,
            )
        assert emb.clock == step

    for (name, p), ref in zip(emb.weights.items(), refs, strict=True):
        bounded(p.detach().double().numpy(), ref.weight, 12 * tolerance)
        bounded(emb.state[name]["momentum1"].numpy(), ref.state["momentum1"], 1e-4)
        np.testing.assert_array_equal(emb.state[name]["prev_iter"].numpy(), ref.prev_iter)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rounding", [coldrow.Nearest(), coldrow.Stochastic(4)], ids=repr)
def test_alpha_0_is_the_plain_optimizer_bit_for_bit(dtype, rounding):
    rng = np.random.default_rng(2)
    start = torch.from_numpy(rng.normal(size=(50, 33))).to(dtype)
    batches = [
        (
            torch.from_numpy(rng.normal(size=(80, 33))).float(),
            torch.from_numpy(rng.integers(0, 50, 80)),
        )
        for _ in range(20)
    ]
    results = []
    for decay in (
        coldrow.NoDecay(),
        coldrow.LinearClipped(0.0),
        coldrow.CumulativeLinear(alpha=0.0),
        coldrow.Exponential(weight_decay=0.0),
        coldrow.Constant(0.0),
    ):
        update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), decay, rounding)
        weight = start.clone()
        state = coldrow.init_state(update, 50, 33, like=weight)
        for step, (grad, indices) in enumerate(batches, start=1):
            coldrow.apply_(update, weight, grad, indices, state, step=3 * step)
        results.append((weight, state["momentum1"]))
    for weight, momentum1 in results[1:]:
        assert torch.equal(weight, results[0][0])
        assert torch.equal(momentum1, results[0][1])


def test_a_row_with_zero_gradient_is_touched_and_others_are_not_written():
    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5), coldrow.Constant(0.5))
    weight = np.ones((4, 3), dtype=np.float32)
    state = coldrow.init_state(update, 4, 3, like=weight)
    state["momentum1"][:] = 1.0
    coldrow.apply_(update, weight, np.zeros((2, 3), np.float32), np.array([1, 3]), state, step=7)
    np.testing.assert_array_equal(weight[:, 0], np.float32([1, 0.75, 1, 0.75]))
    np.testing.assert_array_equal(state["prev_iter"], [0, 7, 0, 7])
    np.testing.assert_array_equal(state["momentum1"], np.float32([1, 0.99, 1, 0.99]))
