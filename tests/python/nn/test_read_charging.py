"""Read charging, and the epoch policies, against brute-force dense loops over every row and step."""

import numpy as np
import pytest
import torch
from support import pool, unpool

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

ROWS, DIM, BAGS, STEPS, EPOCHS = 40, 6, 9, 25, 3
LR, EPS, BETA = 0.05, 1e-8, 0.9
RMSPROP = coldrow.RowwiseRMSprop(lr=LR, eps=EPS, ema_beta=BETA)
ALPHA, WEIGHT_DECAY = 4e-3, 0.4


def batches(seed):
    """EPOCHS x STEPS random batches of (indices, offsets, target)."""
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        epoch = []
        for _ in range(STEPS):
            lengths = rng.integers(0, 3, BAGS)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            # few rows per batch, so that gaps are long
            indices = rng.integers(0, ROWS, offsets[-1])
            epoch.append((indices, offsets, rng.normal(size=(BAGS, DIM))))
        yield epoch


class Dense:
    """A table whose every row is visited at every step, in float64."""

    def __init__(self, weight):
        self.w = weight.astype(np.float64)
        self.v = np.zeros(len(weight))
        self.since = np.full(len(weight), -1)  # steps since the last touch, -1: never touched
        self.last = np.zeros(len(weight), dtype=int)
        self.step = 0
        self.epoch_start = 0

    def update(self, indices, grad, untouched, touched, shrink_state=False):
        """One step. untouched(row) and touched(row): factors for rows outside and in the batch."""
        self.step += 1
        in_batch = np.zeros(len(self.w), dtype=bool)
        in_batch[indices] = True
        total = np.zeros_like(self.w)
        np.add.at(total, indices, grad)
        for r in range(len(self.w)):
            seen = self.since[r] >= 0
            if not in_batch[r]:
                if seen:
                    self.w[r] *= untouched(r)
                    self.since[r] += 1
                continue
            factor = touched(r) if seen else 1.0
            if shrink_state:
                self.v[r] *= factor
            self.v[r] = BETA * self.v[r] + (1 - BETA) * (total[r] ** 2).mean()
            self.w[r] = factor * self.w[r] - LR / (np.sqrt(self.v[r]) + EPS) * total[r]
            self.since[r] = 0
            self.last[r] = self.step


def module(update, weight, charge="read"):
    emb = TableBatchedEmbeddingBags(
        [Table("t", ROWS, DIM, init=lambda w: w.copy_(torch.from_numpy(weight)))],
        update,
        charge=charge,
    )
    return emb


def train_both(emb, dense, step_dense, on_epoch=None, atol=1e-5):
    """Train on the same batches; both forwards must agree at every step."""
    for epoch in batches(7):
        emb.new_epoch()
        dense.epoch_start = dense.step + 1
        if on_epoch is not None:
            on_epoch()
        for indices, offsets, target in epoch:
            want = pool(dense.w[indices], offsets, "sum")
            out = emb(torch.from_numpy(indices), torch.from_numpy(offsets))
            np.testing.assert_allclose(out.detach().numpy(), want, atol=atol)
            grad = want - target  # of a squared error, so that the forward matters
            out.backward(torch.from_numpy(grad).float())
            step_dense(indices, unpool(grad, offsets, "sum"))
    np.testing.assert_allclose(emb.read("t").numpy(), dense.w, atol=atol)
    np.testing.assert_array_equal(emb.state["t"]["prev_iter"].numpy(), dense.last)


@pytest.fixture
def weight():
    return np.random.default_rng(3).normal(size=(ROWS, DIM)).astype(np.float32)


def test_cumulative_linear_equals_the_dense_loop(weight):
    emb = module(coldrow.RowUpdate(RMSPROP, coldrow.CumulativeLinear(alpha=ALPHA)), weight)
    dense = Dense(weight)

    def factor(r):
        return 1 - min(1, ALPHA * dense.since[r])

    train_both(emb, dense, lambda i, g: dense.update(i, g, factor, factor))


def test_exponential_equals_the_dense_loop(weight):
    """Every step multiplies every row seen by 1 - lr*weight_decay, as AdamW would."""
    emb = module(coldrow.RowUpdate(RMSPROP, coldrow.Exponential(weight_decay=WEIGHT_DECAY)), weight)
    dense = Dense(weight)

    def factor(r):
        return 1 - LR * WEIGHT_DECAY

    def step(indices, grad):
        # The first touch charges one step too: the row was stored undecayed until then.
        first = np.unique(indices[dense.since[indices] < 0])
        dense.w[first] *= factor(None)
        dense.update(indices, grad, factor, factor)

    train_both(emb, dense, step)


def test_epoch_reset_equals_really_re_initialising():
    zeros = np.zeros((ROWS, DIM), dtype=np.float32)
    update = coldrow.RowUpdate(RMSPROP, coldrow.EpochReset(), decay_state=True)
    emb = module(update, zeros)
    dense = Dense(zeros)

    def re_initialise():
        dense.w[:] = 0.0
        dense.v[:] = 0.0

    train_both(
        emb, dense, lambda i, g: dense.update(i, g, lambda r: 1.0, lambda r: 1.0), re_initialise
    )


@pytest.mark.parametrize("decay_state", [False, True])
def test_epoch_gated_equals_its_own_loop(weight, decay_state):
    """A row last touched before the running epoch has faded by all steps since; others not at all."""
    inner = coldrow.CumulativeLinear(alpha=ALPHA)
    update = coldrow.RowUpdate(RMSPROP, coldrow.EpochGated(inner), decay_state=decay_state)
    emb = module(update, weight)
    stored = Dense(weight)  # rows as they were left, never faded in place

    def owed(r, steps):
        """prod over the dense steps since the last touch, if the gate is open for the row."""
        if stored.since[r] < 0 or stored.last[r] >= stored.epoch_start:
            return 1.0
        return np.prod([1 - min(1, ALPHA * j) for j in range(steps)])

    for epoch in batches(11):
        emb.new_epoch()
        stored.epoch_start = stored.step + 1
        for indices, offsets, target in epoch:
            seen = np.array([owed(r, stored.since[r]) for r in range(ROWS)])[:, None] * stored.w
            want = pool(seen[indices], offsets, "sum")
            out = emb(torch.from_numpy(indices), torch.from_numpy(offsets))
            np.testing.assert_allclose(out.detach().numpy(), want, atol=1e-5)
            grad = want - target
            out.backward(torch.from_numpy(grad).float())
            stored.update(
                indices,
                unpool(grad, offsets, "sum"),
                lambda r: 1.0,
                lambda r: owed(r, stored.since[r] + 1),
                shrink_state=decay_state,
            )
    np.testing.assert_allclose(emb.weights["t"].numpy(), stored.w, atol=1e-5)
    np.testing.assert_allclose(emb.state["t"]["momentum1"].numpy(), stored.v, rtol=1e-5, atol=1e-7)


def test_touch_charging_reads_the_stored_row(weight):
    emb = module(
        coldrow.RowUpdate(RMSPROP, coldrow.Exponential(half_life=5.0)), weight, charge="touch"
    )
    indices, offsets = torch.arange(ROWS), torch.arange(ROWS + 1)
    emb(indices, offsets).sum().backward()
    emb.clock += 50
    stored = emb.weights["t"].clone()
    assert torch.equal(emb(indices, offsets).detach(), stored)
    assert torch.equal(emb.read("t"), stored)


def test_reading_changes_nothing_and_eval_reads_the_same(weight):
    emb = module(coldrow.RowUpdate(RMSPROP, coldrow.Exponential(half_life=5.0)), weight)
    indices, offsets = torch.arange(ROWS), torch.arange(ROWS + 1)
    emb(indices, offsets).sum().backward()
    emb.clock += 20
    before = {k: v.clone() for k, v in emb.state_dict().items() if isinstance(v, torch.Tensor)}
    reads = [emb.read("t"), emb(indices, offsets).detach()]
    with torch.no_grad():
        reads.append(emb(indices, offsets))
    emb.eval()
    reads.append(emb(indices, offsets))
    for r in reads:
        assert torch.equal(r, reads[0])
    np.testing.assert_allclose(
        reads[0].numpy(), emb.weights["t"].numpy() * 2 ** (-20 / 5.0), rtol=1e-6
    )
    after = emb.state_dict()
    for k, v in before.items():
        assert torch.equal(after[k], v), k


def test_read_function_equals_the_module(weight):
    update = coldrow.RowUpdate(RMSPROP, coldrow.CumulativeLinear(half_life=8.0))
    emb = module(update, weight)
    for indices, offsets, _ in next(batches(5)):
        emb(torch.from_numpy(indices), torch.from_numpy(offsets)).sum().backward()
    rows = np.array([3, 3, 0, ROWS - 1], dtype=np.int32)
    out = np.full((4, DIM), np.nan, dtype=np.float32)
    state = {k: v.numpy() for k, v in emb.state["t"].items()}
    coldrow.read_(out, update, emb.weights["t"].numpy(), rows, state, step=emb.clock + 1)
    np.testing.assert_array_equal(out, emb.read("t", torch.from_numpy(rows)).numpy())


def test_the_last_step_can_be_read_after_and_not_passed(weight):
    emb = module(coldrow.RowUpdate(RMSPROP, coldrow.Exponential(half_life=4.0)), weight)
    indices, offsets = torch.arange(ROWS), torch.arange(ROWS + 1)
    emb.clock = 2**31 - 3
    emb(indices, offsets).sum().backward()
    emb.clock = 2**31 - 1
    stored = emb.weights["t"].clone()
    np.testing.assert_allclose(emb.read("t").numpy(), stored.numpy() * 2**-0.25, rtol=1e-6)
    out = emb(indices, offsets)
    with pytest.raises(ValueError, match=r"clock: is at 2147483647, accepted: steps up to"):
        out.sum().backward()
    assert torch.equal(emb.weights["t"], stored)
