"""Random batches of every shape against the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROUND, Reference, Table64, check_step, exact_grad, pool, unpool, within

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

pytestmark = pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BETA32 = float(
    np.float32(0.99)
)  # RowwiseRMSprop computes 1 - beta in float32: of 0.99, 1e-6 too little

LRS = st.sampled_from([0.0, 0.02, 0.3])
EPS = st.sampled_from([1e-8, 1e-3, 0.25])
# A second moment that forgets at once needs a larger eps: without gradient it is 0, and what is left
# of the first is divided by eps.
ADAM = [(0.9, 0.999), (0.0, 0.9), (0.5, 0.5), (0.9, 0.0), (0.999, 0.99999)]


def adams(kind):
    def build(lr, betas, eps, bias_correction):
        return kind(lr, *betas, max(eps, 0.25 if betas[1] == 0.0 else 0.0), bias_correction)

    return st.builds(build, LRS, st.sampled_from(ADAM), EPS, st.sampled_from(["clock", "row"]))


OPTIMIZERS = st.one_of(
    st.builds(coldrow.SGD, LRS),
    st.builds(coldrow.RowwiseRMSprop, LRS, EPS, st.sampled_from([0.0, 0.5, BETA32])),
    st.builds(coldrow.RowwiseAdagrad, LRS, EPS),
    st.builds(coldrow.Adagrad, LRS, EPS),
    adams(coldrow.Adam),
    adams(coldrow.PartialRowwiseAdam),
)
# LinearClipped: such that with LRS no factor between 0 and 0.1 comes about, see support.check_step.
DECAYS = st.one_of(
    st.just(coldrow.NoDecay()),
    st.builds(
        coldrow.LinearClipped,
        st.sampled_from([0.0, 0.5, 15.0]),
        st.sampled_from([0.0, 0.1, 1.0]),
    ),
    st.builds(coldrow.CumulativeLinear, st.sampled_from([0.0, 1e-9, 1e-3, 0.05, 1.0])),
    st.builds(coldrow.Exponential, st.sampled_from([0.0, 1e-3, 0.3])),
    st.just(coldrow.Exponential(half_life=3.0)),
    st.builds(coldrow.Constant, st.sampled_from([0.0, 0.2, 60.0])),
    st.just(coldrow.EpochGated(coldrow.CumulativeLinear(half_life=3.0))),
    st.just(coldrow.EpochGated(coldrow.LinearClipped(0.5, 0.0))),
    st.just(coldrow.EpochReset()),
)
ROUNDINGS = st.sampled_from([coldrow.Nearest(), coldrow.Stochastic(11)])
UPDATES = st.builds(coldrow.RowUpdate, OPTIMIZERS, DECAYS, ROUNDINGS, st.booleans())
DIMS = st.one_of(
    st.integers(1, 70), st.sampled_from([96, 127, 128, 129, 255, 256, 260, 512, 1023, 1024, 1030])
)


APPLY = {
    "update": UPDATES,
    "dim": DIMS,
    "rows": st.integers(1, 60),
    "dtype": st.sampled_from(DTYPES),
    "grad_dtype": st.sampled_from(DTYPES),
    "index_dtype": st.sampled_from([torch.int32, torch.int64]),
    "sizes": st.lists(st.integers(0, 200), min_size=1, max_size=4),
    "seed": st.integers(0, 2**32),
}


def check_apply(device, update, dim, rows, dtype, grad_dtype, index_dtype, sizes, seed):
    """Some steps of one table through the function, each against the reference."""
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.normal(size=(rows, dim))).to(dtype).to(device)
    state = coldrow.init_state(update, rows, dim, like=weight)
    step, epoch_start = 0, 0
    for n in sizes:
        step += int(rng.integers(1, 9))
        if rng.integers(2):
            epoch_start = step
        grad = exact_grad(rng, (n, dim))
        indices = rng.integers(0, rows, n)
        before = Table64(weight, state)
        coldrow.apply_(
            update,
            weight,
            torch.from_numpy(grad).to(grad_dtype).to(device),
            torch.from_numpy(indices).to(index_dtype).to(device),
            state,
            step=step,
            epoch_start=epoch_start,
        )
        now = {"step": step, "epoch_start": epoch_start}
        check_step(update, before, Table64(weight, state), grad, indices, **now)


@settings(max_examples=200, deadline=None)
@given(**APPLY)
def test_apply(**case):
    check_apply("cpu", **case)


# Powers of two: then a mean is exact too.
LENGTHS = [0, 0, 1, 2, 2, 4, 8]


MODULE = {
    "updates": st.lists(UPDATES, min_size=1, max_size=4),
    "pooling": st.sampled_from(["sum", "weighted", "mean", "none"]),
    "charge": st.sampled_from(["touch", "read"]),
    "layout": st.sampled_from(["record", "split"]),
    "fused": st.booleans(),
    "vary": st.booleans(),
    "index_dtype": st.sampled_from([torch.int32, torch.int64]),
    "bags": st.integers(0, 12),
    "data": st.data(),
    "seed": st.integers(0, 2**32),
}


def check_module(
    device, updates, pooling, charge, layout, fused, vary, index_dtype, bags, data, seed
):
    """Three steps of forward and backward of tables of all kinds; the first serves two features."""
    rng = np.random.default_rng(seed)
    # In older releases of torch unfused gradients pass through the tables' dtype.
    table_dtypes = DTYPES if fused or hasattr(torch.Tensor, "grad_dtype") else [torch.float32]
    dims = [data.draw(DIMS) for _ in updates]
    tables = [
        Table(
            f"t{i}",
            num_rows=int(rng.integers(1, 30)),
            dim=dim,
            dtype=data.draw(st.sampled_from(table_dtypes)),
            features=["a", "b"] if i == 0 else [],
            update=update,
        )
        for i, (dim, update) in enumerate(zip(dims, updates, strict=True))
    ]
    kind = "sum" if pooling == "weighted" else pooling
    emb = TableBatchedEmbeddingBags(
        tables, pooling=kind, charge=charge, fused=fused, state_layout=layout, device=device
    )
    for p in emb.weights.values():
        p.data.copy_(torch.from_numpy(rng.normal(size=p.shape)))
    of_feature = [0, 0, *range(1, len(dims))]

    for _ in range(3):
        emb.clock += int(rng.integers(0, 6))
        if rng.integers(2):
            emb.new_epoch()
        step = emb.clock + 1
        before = [Table64(emb.weights[t.name], emb.state[t.name]) for t in tables]
        sizes = [int(rng.integers(0, bags + 1)) if vary else bags for _ in of_feature]
        lengths = [rng.choice(LENGTHS, b) for b in sizes]
        parts = [
            (rng.integers(0, tables[t].num_rows, n.sum()), np.cumsum([0, *n]))
            for t, n in zip(of_feature, lengths, strict=True)
        ]
        ends = np.cumsum([0] + [len(i) for i, _ in parts])
        indices = np.concatenate([i for i, _ in parts])
        offsets = np.concatenate(
            [[0], *(o[1:] + e for (_, o), e in zip(parts, ends, strict=False))]
        )
        psw = None
        if pooling == "weighted":
            psw = (rng.integers(-8, 9, len(indices)) / 4).astype(np.float32)
        out = emb(
            torch.from_numpy(indices).to(index_dtype).to(device),
            torch.from_numpy(offsets).to(index_dtype).to(device),
            None if psw is None else torch.from_numpy(psw).to(device),
            sizes if vary else None,
        )

        grads, wants, errors, updates_of = [], [], [], [([], []) for _ in dims]
        for f, (t, (i, o)) in enumerate(zip(of_feature, parts, strict=True)):
            p = None if psw is None else psw[ends[f] : ends[f + 1]]
            table = before[t].weight
            if charge == "read":
                reference = Reference(updates[t], table)
                reference.prev_iter[...] = before[t].state["prev_iter"]
                lr = updates[t].optimizer.lr
                table = reference.read(step=step, lr=lr, epoch_start=emb.epoch_start)
            # A sum of n numbers errs by at most n roundings of the sum of their absolute values; the
            # factor of a read by 5 of the row (see support.check_step).
            size = np.abs(before[t].weight)
            if kind == "none":
                want, error = table[i], 6 * ROUND * size[i]
            else:
                want = pool(table[i], o, kind, p)
                most = max(lengths[f], default=0) + 8
                error = most * ROUND * pool(size[i], o, kind, None if p is None else np.abs(p))
            grad = exact_grad(rng, want.shape)
            grads.append(torch.from_numpy(grad).float().to(device))
            wants.append(want)
            errors.append(error + 1e-38)
            updates_of[t][0].append(i)
            updates_of[t][1].append(grad if kind == "none" else unpool(grad, o, kind, p))

        if kind == "none" and len(set(dims)) > 1:
            got = [x.detach().cpu().numpy() for x in out]
        elif kind == "none":
            got = np.split(out.detach().cpu().numpy(), ends[1:-1])
        elif vary:
            cuts = np.cumsum([w.size for w in wants])[:-1]
            got = [
                g.reshape(w.shape)
                for g, w in zip(np.split(out.detach().cpu().numpy(), cuts), wants, strict=True)
            ]
        else:
            cuts = np.cumsum([w.shape[1] for w in wants])[:-1]
            got = np.split(out.detach().cpu().numpy(), cuts, axis=1)
        for g, want, error in zip(got, wants, errors, strict=True):
            within(g, want - error, want + error, "out")

        if isinstance(out, list):
            torch.autograd.backward(out, grads)
        elif kind == "none":
            out.backward(torch.cat(grads))
        elif vary:
            out.backward(torch.cat([g.reshape(-1) for g in grads]))
        else:
            out.backward(torch.cat(grads, dim=1))
        if not fused:
            emb.step()
            emb.zero_grad()
        assert emb.clock == step
        for t, (i, g) in enumerate(updates_of):
            after = Table64(emb.weights[f"t{t}"], emb.state[f"t{t}"])
            i, g = np.concatenate(i), np.concatenate(g)
            now = {"step": step, "epoch_start": emb.epoch_start}
            check_step(updates[t], before[t], after, g, i, **now)
    emb.check()


@settings(max_examples=150, deadline=None)
@given(**MODULE)
def test_module(**case):
    check_module("cpu", **case)


def test_a_row_with_zero_gradient_is_touched_and_others_are_not_written():
    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5), coldrow.Constant(0.5))
    weight = np.ones((4, 3), dtype=np.float32)
    state = coldrow.init_state(update, 4, 3, like=weight)
    state["momentum1"][:] = 1.0
    coldrow.apply_(update, weight, np.zeros((2, 3), np.float32), np.array([1, 3]), state, step=7)
    np.testing.assert_array_equal(weight[:, 0], np.float32([1, 0.75, 1, 0.75]))
    np.testing.assert_array_equal(state["prev_iter"], [0, 7, 0, 7])
    np.testing.assert_array_equal(state["momentum1"], np.float32([1, 0.99, 1, 0.99]))
