"""Numbers at the edge: the longest gap, policies without bounds, tables and batches past 2**31, and the
smallest tables and numbers there are.

Large arrays are memory that was asked for and never written: the kernel gives it pages when they are
touched, so a table of 4.3 GB costs the few rows that a test names. Where a machine gives no such memory the
test is skipped.
"""

import dataclasses
import mmap

import numpy as np
import pytest
import torch
from support import Reference, Table64, check_step, exact_grad

import coldrow
from coldrow import _core
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.policies import compiled

LAST = 2**31 - 1
MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on
OPTIMIZERS = [
    coldrow.SGD(),
    coldrow.RowwiseRMSprop(ema_beta=0.75),
    coldrow.RowwiseAdagrad(),
    coldrow.Adagrad(),
    coldrow.Adam(beta1=0.5, beta2=0.75, bias_correction="clock"),
    coldrow.Adam(beta1=0.5, beta2=0.75, bias_correction="row"),
    coldrow.PartialRowwiseAdam(beta1=0.5, beta2=0.75, bias_correction="row"),
]


def factor(decay, gap_end, step, lr=1.0):
    update = compiled(coldrow.RowUpdate(decay=decay))
    return _core.factor(update, gap_end, step, lr, 0, False)


def untouched(shape, dtype):
    """An array of zeros whose pages exist once they are written; or skip."""
    try:
        pages = mmap.mmap(
            -1,
            int(np.prod(shape)) * np.dtype(dtype).itemsize,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
        )
    except OSError as error:
        pytest.skip(f"this machine gives no {np.prod(shape)} x {dtype}: {error}")
    return np.frombuffer(pages, dtype=dtype).reshape(shape)


# ------------------------------------------------------------------------------------------ long gaps

DECAYS = [
    coldrow.NoDecay(),
    coldrow.LinearClipped(1e-3, 0.125),
    coldrow.LinearClipped(1e-12, 0.0),
    coldrow.CumulativeLinear(1e-3),
    coldrow.CumulativeLinear(1e-18),
    coldrow.Exponential(1e-9),
    coldrow.Exponential(half_life=1e9),
    coldrow.Constant(0.25),
]


@pytest.mark.parametrize("decay", DECAYS, ids=repr)
def test_the_longest_gap(decay):
    """A row touched at step 1 and then at the last there is."""
    update = coldrow.RowUpdate(coldrow.SGD(), decay)
    want = {
        "LinearClipped": lambda d: max(d.min_shrinkage, 1 - min(1.0, d.alpha * (LAST - 1))),
        "CumulativeLinear": lambda d: np.exp(-d.alpha * (LAST - 2) * (LAST - 1) / 2),
        "Exponential": lambda d: (
            2.0 ** -((LAST - 1) / d.half_life)
            if d.half_life
            else np.exp((LAST - 1) * np.log1p(-d.weight_decay))
        ),
        "Constant": lambda d: 1 - d.weight_decay,
        "NoDecay": lambda d: 1.0,
    }[type(decay).__name__](decay)
    assert factor(decay, 1, LAST) == pytest.approx(want, rel=2e-6, abs=1e-9)

    weight = np.ones((2, 3), np.float32)
    state = coldrow.init_state(update, 2, 3, like=weight)
    state["prev_iter"][:] = 1
    coldrow.apply_(
        update, weight, np.zeros((1, 3), np.float32), np.array([1]), state, step=LAST, lr=1.0
    )
    np.testing.assert_array_equal(weight[1], factor(decay, 1, LAST))
    np.testing.assert_array_equal(state["prev_iter"], [1, LAST])
    np.testing.assert_array_equal(weight[0], 1.0)


@pytest.mark.parametrize("decay", DECAYS, ids=repr)
def test_a_clock_written_by_hand_gives_the_longest_gap_there_is(decay):
    """prev_iter below 0 would make a gap past int32: it counts as 2**31 - 1."""
    update = coldrow.RowUpdate(coldrow.SGD(), decay)
    weight = np.ones((3, 1), np.float32)
    state = coldrow.init_state(update, 3, 1, like=weight)
    state["prev_iter"][:] = [1, -1, -(2**31)]
    coldrow.apply_(
        update, weight, np.zeros((3, 1), np.float32), np.arange(3), state, step=LAST, lr=1.0
    )
    assert weight[0] >= weight[1] == weight[2] >= 0.0
    np.testing.assert_allclose(weight[1], weight[0], rtol=2e-6, atol=1e-9)


# --------------------------------------------------------------------------------- bounds of policies


@pytest.mark.parametrize(
    "decay",
    [
        coldrow.LinearClipped(0.0),
        coldrow.LinearClipped(1e30, 1.0),
        coldrow.CumulativeLinear(0.0),
        coldrow.Exponential(0.0),
        coldrow.Exponential(half_life=1e30),
        coldrow.Constant(0.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_no_decay_at_all_is_the_plain_optimizer_bit_for_bit(optimizer, decay):
    after = []
    for d in (decay, coldrow.NoDecay()):
        rng = np.random.default_rng(0)
        update = coldrow.RowUpdate(optimizer, d, decay_state=True)
        weight = rng.normal(size=(5, 19)).astype(np.float32)
        state = coldrow.init_state(update, 5, 19, like=weight)
        for step in (1, 2, 2**24 + 1, LAST):
            grad = rng.normal(size=(8, 19)).astype(np.float32)
            coldrow.apply_(update, weight, grad, rng.integers(0, 4, 8), state, step=step)
        after.append([weight.tobytes(), *(a.tobytes() for a in state.values())])
    assert after[0] == after[1]


@pytest.mark.parametrize(
    ("decay", "want"),
    [
        (coldrow.LinearClipped(1e30), np.float32(0.1)),
        (coldrow.LinearClipped(3.4e38, 0.0), 0.0),
        (coldrow.CumulativeLinear(1e30), 0.0),
        (coldrow.CumulativeLinear(half_life=1e-10), 0.0),
        (coldrow.Exponential(1e30), 0.0),
        (coldrow.Exponential(half_life=1e-30), 0.0),
        (coldrow.Constant(1e30), 0.0),
    ],
    ids=repr,
)
def test_decay_without_bounds(decay, want):
    for prev, step in [(1, 3), (1, LAST), (LAST - 2, LAST)]:
        assert factor(decay, prev, step) == want
    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(), decay, decay_state=True)
    weight = np.ones((1, 4), np.float32)
    state = coldrow.init_state(update, 1, 4, like=weight)
    for step in (1, 3, 2000):
        coldrow.apply_(
            update, weight, np.ones((1, 4), np.float32), np.array([0]), state, step=step, lr=1.0
        )
        assert np.isfinite(weight).all()
        assert np.isfinite(state["momentum1"]).all()


@pytest.mark.parametrize("touches", [-1.0, -5.0, -1e30, 3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", [coldrow.Adam, coldrow.PartialRowwiseAdam])
def test_spoiled_touches_count_as_not_finite(kind, touches):
    """Somebody wrote over the state: no row is trained by a bias correction that means nothing."""
    update = coldrow.RowUpdate(kind(bias_correction="row"))
    weight = np.ones((2, 3), np.float32)
    state = coldrow.init_state(update, 2, 3, like=weight)
    state["touches"][0] = touches
    grad, indices = np.ones((2, 3), np.float32), np.array([0, 1])
    coldrow.apply_(update, weight, grad, indices, state, step=1, on_nonfinite="skip")
    assert np.isfinite(weight).all()
    assert (weight[1] != 1.0).all()
    if touches != 3e38:  # so many touches are as good as any
        np.testing.assert_array_equal(weight[0], 1.0)
        assert state["prev_iter"].tolist() == [0, 1]


# ------------------------------------------------------------------------- the smallest tables, and none


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (9, 1)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_one_row_or_one_column(optimizer, shape):
    rng = np.random.default_rng(1)
    update = coldrow.RowUpdate(optimizer, coldrow.LinearClipped(1.0, 0.125))
    weight = rng.normal(size=shape).astype(np.float32)
    state = coldrow.init_state(update, *shape, like=weight)
    for step in (1, 2, 7, LAST):
        grad = exact_grad(rng, (12, shape[1])).astype(np.float32)
        indices = rng.integers(0, shape[0], 12)
        before = Table64(weight, state)
        coldrow.apply_(update, weight, grad, indices, state, step=step)
        check_step(update, before, Table64(weight, state), grad, indices, step=step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_table_without_rows_and_batch_without_indices(optimizer):
    update = coldrow.RowUpdate(optimizer)
    for rows in (0, 3):
        weight = np.zeros((rows, 4), np.float32)
        state = coldrow.init_state(update, rows, 4, like=weight)
        none = np.zeros(0, np.int64)
        coldrow.apply_(update, weight, np.zeros((0, 4), np.float32), none, state, step=1)
        coldrow.read_(np.zeros((0, 4), np.float32), update, weight, none, state, step=1)
        assert not any(a.any() for a in (weight, *state.values()))
        with pytest.raises(IndexError, match=f"indices: got {rows} at position 0, accepted: "):
            coldrow.apply_(
                update, weight, np.ones((1, 4), np.float32), np.array([rows]), state, step=1
            )


def test_an_index_into_a_table_without_rows_says_that_it_has_none():
    update = coldrow.RowUpdate()
    weight = np.zeros((0, 4), np.float32)
    state = coldrow.init_state(update, 0, 4, like=weight)
    with pytest.raises(IndexError, match=r"indices: got 0 .* accepted: none \(.* no rows\)"):
        coldrow.apply_(update, weight, np.ones((1, 4), np.float32), np.array([0]), state, step=1)


def test_table_without_columns_or_rows_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"weight: got float32\[3, 0\], accepted: dim of at least 1"
    ):
        coldrow.apply_(
            coldrow.RowUpdate(coldrow.SGD()),
            np.zeros((3, 0), np.float32),
            np.zeros((1, 0), np.float32),
            np.array([0]),
            {"prev_iter": np.zeros(3, np.int32)},
            step=1,
        )
    for name in ("num_rows", "dim"):
        with pytest.raises(ValueError, match=f"{name}: got 0, accepted"):
            Table("a", **{"num_rows": 1, "dim": 1, name: 0})


def test_batch_without_bags_ticks_the_clock():
    emb = TableBatchedEmbeddingBags([Table("a", 1, 1), Table("b", 2, 3)])
    out = emb(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert out.shape == (0, 4)
    out.sum().backward()
    assert emb.clock == 1


# ------------------------------------------------------------------------------------ subnormal numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_subnormal_weights_are_kept(optimizer, dtype):
    """Nothing is flushed to zero: without decay and gradient every bit of a weight stays."""
    tiny = torch.finfo(dtype).smallest_normal
    weight = (torch.arange(1, 36, dtype=torch.float64).view(1, 35) * tiny / 64).to(dtype)
    assert weight.double().min() > 0
    update = coldrow.RowUpdate(optimizer)
    state = coldrow.init_state(update, 1, 35, like=weight)
    want = weight.clone()
    coldrow.apply_(
        update, weight, torch.zeros(1, 35, dtype=dtype), torch.tensor([0]), state, step=1
    )
    assert torch.equal(weight, want)
    out = torch.zeros(1, 35, dtype=dtype)
    coldrow.read_(out, update, weight, torch.tensor([0]), state, step=2)
    assert torch.equal(out, want)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_subnormal_numbers_follow_the_reference(optimizer):
    rng = np.random.default_rng(2)
    if hasattr(
        optimizer, "eps"
    ):  # a small one would multiply the roundings, which are absolute here
        optimizer = dataclasses.replace(optimizer, eps=1.0)
    update = coldrow.RowUpdate(optimizer, coldrow.Constant(0.5))
    weight = (rng.normal(size=(3, 21)) * 1e-39).astype(np.float32)
    state = coldrow.init_state(update, 3, 21, like=weight)
    for name, array in state.items():
        if name not in ("prev_iter", "touches"):
            array[...] = np.abs(rng.normal(size=array.shape)) * 1e-40
    for step in (1, 2, 9):
        grad = (exact_grad(rng, (5, 21)) * 2.0**-130).astype(np.float32)
        indices = rng.integers(0, 2, 5)
        before = Table64(weight, state)
        coldrow.apply_(update, weight, grad, indices, state, step=step)
        check_step(update, before, Table64(weight, state), grad, indices, step=step)


# ----------------------------------------------------------------------------------------- past 2**31


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64], ids=lambda d: d.__name__)
def test_table_of_more_than_two_to_the_31_elements(index_dtype):
    """bfloat16 [2**21 + 3, 1024], 4.3 GB, against the same rows in a small table."""
    rows, dim = 2**21 + 3, 1024
    update = coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=0.5), coldrow.Constant(0.5), coldrow.Stochastic(3)
    )
    weight = torch.from_numpy(untouched((rows, dim), np.int16)).view(torch.bfloat16)
    assert weight.numel() > 2**31
    state = coldrow.init_state(update, rows, dim, like=np.zeros(0))
    named = np.array([0, 1, rows - 1, rows - 2, rows - 1, 2**20], index_dtype)
    rng = np.random.default_rng(3)
    grad = torch.from_numpy(exact_grad(rng, (len(named), dim))).float()
    start = torch.from_numpy(rng.normal(size=(rows - named.min(), 1))[:6]).bfloat16()
    for r, value in zip(named, start, strict=True):
        weight[int(r)] = value
    before = weight[torch.from_numpy(named).long()].double()
    coldrow.apply_(update, weight, grad, named, state, step=1, lr=0.5)

    for r in np.unique(named):
        small = torch.zeros(1, dim, dtype=torch.bfloat16)
        small[0] = before[int(np.flatnonzero(named == r)[0])]
        of_row = named == r
        small_state = coldrow.init_state(update, 1, dim, like=small)
        coldrow.apply_(
            update,
            small,
            grad[torch.from_numpy(of_row)],
            torch.zeros(int(of_row.sum()), dtype=torch.int64),
            small_state,
            step=1,
            lr=0.5,
            row_offset=int(r),
        )
        assert torch.equal(weight[int(r)], small[0]), r
        assert state["momentum1"][r] == small_state["momentum1"][0]
    touched = np.flatnonzero(state["prev_iter"])
    np.testing.assert_array_equal(touched, np.unique(named))
    for r in (2, rows - 3, 2**20 - 1, 2**20 + 1):
        assert not weight[r].any()

    out = torch.zeros(len(named), dim, dtype=torch.bfloat16)
    coldrow.read_(out, update, weight, named, state, step=1)
    assert torch.equal(out, weight[torch.from_numpy(named).long()])


def test_module_with_a_table_of_more_than_two_to_the_31_elements():
    rows, dim = 2**21 + 3, 1024
    big = untouched((rows, dim), np.int16)
    emb = TableBatchedEmbeddingBags(
        [
            Table("small", 5, dim, dtype=torch.bfloat16, features=["x"], init=torch.nn.init.zeros_),
            Table(
                "big",
                rows,
                dim,
                dtype=torch.bfloat16,
                features=["y"],
                storage=torch.from_numpy(big).view(torch.bfloat16),
            ),
        ],
        coldrow.RowUpdate(coldrow.SGD(lr=1.0)),
    )
    last = rows - 1
    for step in range(2):
        out = emb(torch.tensor([4, 0, last, last, 7]), torch.tensor([0, 1, 2, 4, 5]))
        want = torch.tensor([[-1.0 * step, -2.0 * 4 * step], [-1.0 * step, -2.0 * step]])
        assert torch.equal(out[:, [0, dim]].detach(), want)
        grad = torch.ones(2, 2 * dim)
        grad[:, dim:] = 2.0
        out.backward(grad)
    assert emb.weights["big"][last].unique().tolist() == [-8.0]
    assert emb.weights["big"][7].unique().tolist() == [-4.0]
    assert not emb.weights["big"][[0, 6, 8, last - 1]].any()


def test_gradients_of_more_than_two_to_the_31_elements():
    """bfloat16 [2**21 + 3, 1024] of zeros, all for row 0, but the last, which is of ones and for row 2."""
    n, dim = 2**21 + 3, 1024
    grad = torch.from_numpy(untouched((n, dim), np.int16)).view(torch.bfloat16)
    grad[-1] = 1.0
    indices = np.zeros(n, np.int32)
    indices[-1] = 2
    update = coldrow.RowUpdate(coldrow.SGD(lr=1.0))
    weight = torch.zeros(3, dim)
    state = coldrow.init_state(update, 3, dim, like=weight)
    coldrow.apply_(update, weight, grad, indices, state, step=1, on_nonfinite="skip")
    assert not weight[:2].any()
    assert weight[2].unique().tolist() == [-1.0]
    assert state["prev_iter"].tolist() == [1, 0, 1]


def test_two_to_the_31_indices_are_refused():
    """Before anything is read: no page of the array exists afterwards."""
    indices = untouched((2**31,), np.int32)
    update = coldrow.RowUpdate(coldrow.SGD())
    weight = np.ones((1, 1), np.float32)
    says = r"indices: got int32\[2147483648\], accepted: at most 2\*\*31 - 1 in one batch"
    state = coldrow.init_state(update, 1, 1, like=weight)
    with pytest.raises(ValueError, match=says):
        coldrow.apply_(update, weight, weight.copy(), indices, state, step=1)
    with pytest.raises(ValueError, match=says):
        coldrow.read_(weight.copy(), update, weight, indices, state, step=1)
    emb = TableBatchedEmbeddingBags([Table("a", 1, 1)])
    with pytest.raises(ValueError, match=says):
        emb(torch.from_numpy(indices), torch.tensor([0, 2**31]))
    assert emb.clock == 0


def test_two_to_the_31_bags_are_refused():
    """Output rows are numbered in 32 bits; before anything is read, as above."""
    offsets = untouched((2**31 + 1,), np.int64)
    batch = _core.TableBatch(["a"], [0], [0])
    weight = np.ones((1, 1), np.float32)
    update = compiled(coldrow.RowUpdate(coldrow.SGD()))
    says = r"offsets: got int64\[2147483649\], accepted: at most 2\*\*31 - 1 bags in one batch"
    none = np.zeros(0, np.int64)
    with pytest.raises(ValueError, match=says):
        batch.lookup(
            [weight], [], [update], [0.1], none, offsets, None, None, "sum", False, 1, 0, weight
        )


def test_batch_sizes_whose_sum_overflows_are_refused():
    """2**63 - 1 twice and 5 more are 3 in 64 bits."""
    batch = _core.TableBatch(["a"], [0], [0, 0, 0])
    weight = np.ones((1, 1), np.float32)
    update = compiled(coldrow.RowUpdate(coldrow.SGD()))
    out = np.zeros((3, 1), np.float32)
    offsets, none = np.zeros(4, np.int64), np.zeros(0, np.int64)
    for sizes in ([2**63 - 1, 2**63 - 1, 5], [2**63 - 1, 0, 4], [4, 0, 0]):
        with pytest.raises(ValueError, match=r"batch_sizes: got .*accepted: "):
            batch.lookup(
                [weight], [], [update], [0.1], none, offsets, None, sizes, "sum", False, 1, 0, out
            )


@pytest.mark.parametrize(("pooling", "n"), [("sum", 10**7), ("mean", 2**23)])
def test_ten_million_times_the_same_row(pooling, n):
    """Sums of ones are exact in float32 up to 2**24, and those of 2**-23."""
    emb = TableBatchedEmbeddingBags(
        [Table("a", 3, 1, init=torch.nn.init.ones_)],
        coldrow.RowUpdate(coldrow.SGD(lr=1.0)),
        pooling=pooling,
    )
    out = emb(torch.ones(n, dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32))
    want = float(n) if pooling == "sum" else 1.0
    assert out.item() == want
    out.sum().backward()
    assert emb.weights["a"].flatten().tolist() == [1.0, 1.0 - want, 1.0]


def test_ten_million_gradients_of_one_row():
    n = 10**7
    update = coldrow.RowUpdate(coldrow.SGD(lr=1.0))
    weight = np.zeros((5, 1), np.float32)
    state = coldrow.init_state(update, 5, 1, like=weight)
    coldrow.apply_(update, weight, np.ones((n, 1), np.float32), np.full(n, 4), state, step=1)
    assert weight[:, 0].tolist() == [0.0, 0.0, 0.0, 0.0, -float(n)]
    assert state["prev_iter"].tolist() == [0, 0, 0, 0, 1]


def test_reference_of_the_longest_gap_ends():
    """Without decay the reference's product of 2**31 factors is not worked out one by one."""
    reference = Reference(
        coldrow.RowUpdate(coldrow.SGD(), coldrow.CumulativeLinear(0.0)), np.ones((1, 1))
    )
    reference.prev_iter[:] = 1
    reference.apply(np.zeros((1, 1)), [0], step=LAST, lr=1.0)
    assert reference.weight[0, 0] == 1.0
