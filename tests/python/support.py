"""The float64 reference as tests use it: whole tables, single steps with their error bounds, and pooled
batches expanded to plain lookups.
"""

from __future__ import annotations

import copy
import itertools

import numpy as np

import coldrow
from coldrow import _core
from coldrow.policies import compiled


class Reference:
    """One table in float64, trained by the reference implementation (include/coldrow/reference.hpp)."""

    def __init__(self, update: coldrow.RowUpdate, weight: np.ndarray) -> None:
        self.update = compiled(update)
        self.weight = np.array(weight, dtype=np.float64)
        self.state = {
            name: np.zeros(shape, dtype=np.int64 if name == "prev_iter" else np.float64)
            for name, shape in update.state_shapes(*self.weight.shape).items()
        }
        self.prev_iter = self.state["prev_iter"]

    def apply(self, grad, indices, *, step: int, lr: float, epoch_start: int = 0) -> None:
        """One step: grad [n, D], indices [n]; duplicates are summed first."""
        _core.reference_apply(
            self.update,
            self.weight,
            np.ascontiguousarray(grad, dtype=np.float64),
            np.ascontiguousarray(indices, dtype=np.int64),
            self.state,
            step,
            lr,
            epoch_start,
        )

    def read(self, *, step: int, lr: float, epoch_start: int = 0) -> np.ndarray:
        """The table as a read-charged forward before ``step`` sees it."""
        factors = [
            _core.reference_read_factor(self.update, int(p), step, lr, epoch_start)
            for p in self.prev_iter
        ]
        return np.array(factors)[:, None] * self.weight


def pool(rows: np.ndarray, offsets: np.ndarray, pooling: str, psw=None) -> np.ndarray:
    """Pool rows [n, D] (float64) into bags [B, D]."""
    out = np.zeros((len(offsets) - 1, rows.shape[1]))
    for b, (lo, hi) in enumerate(itertools.pairwise(offsets)):
        scale = 1.0 if psw is None else np.asarray(psw, dtype=np.float64)[lo:hi, None]
        out[b] = (rows[lo:hi] * scale).sum(0)
        if pooling == "mean" and hi > lo:
            out[b] /= hi - lo
    return out


def unpool(grad: np.ndarray, offsets: np.ndarray, pooling: str, psw=None) -> np.ndarray:
    """The gradient of each lookup [n, D] from the gradient of the bags [B, D]."""
    lengths = np.diff(offsets)
    if pooling == "mean":
        grad = grad / np.maximum(lengths, 1)[:, None]
    rows = np.repeat(np.asarray(grad, dtype=np.float64), lengths, axis=0)
    return rows if psw is None else rows * np.asarray(psw, dtype=np.float64)[:, None]


def random_batch(rng: np.random.Generator, rows: int, bags: int, longest: int):
    """Indices int64 [n] and offsets int64 [bags + 1]; some bags are empty, duplicates are likely."""
    lengths = rng.integers(0, longest + 1, bags)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return rng.integers(0, rows, offsets[-1]), offsets


# ------------------------------------------------------------------------------ one step, and no more
#
# A run of several steps would need a tolerance that grows with it. So every step is compared alone:
# the reference starts from what the kernel had stored before it, and what remains are the roundings of
# one step. One float32 operation errs by at most ROUND, relatively:
#
#   factor    5 roundings of numbers up to 1 (LinearClipped: lr, alpha, their product, the charge, 1
#             minus it), so 5 of |w|, or of the old state where it fades that, however small it is
#   state     at most 4 beside the mean of squares (dim/16 + 6: a chain of fma in 16 lanes, their sum,
#             the division) and the factor where it fades the state
#   amount    what is subtracted: two states (the second under a square root), at most 10 of its own;
#             where touches fade, both bias corrections have their error too
#   weight    one of the result, then that of its dtype
#
# Amounts and moments may be differences; their errors are relative to the sums of the parts' absolute
# values. Those are the reference's own results for |momentum1|, |g| and a weight of 0, since squares do
# not know signs. (g itself is exact here: see exact_grad().)

ROUND = 2.0**-24
TINY = 1e-43  # a hundred of the smallest float32: below the normal ones errors are absolute
# Significant bits and least exponent.
FORMATS = {"float32": (24, -126), "float16": (11, -14), "bfloat16": (8, -126)}


def exact_grad(rng: np.random.Generator, shape) -> np.ndarray:
    """Gradients that every dtype holds and whose sums are exact: multiples of 1/64 in [-1, 1]."""
    return rng.integers(-64, 65, shape) / 64.0


def on_grid(x: np.ndarray, dtype: str, to_whole) -> np.ndarray:
    """x rounded to a dtype's numbers; ``to_whole`` (np.rint, np.floor, ...) picks the neighbour."""
    bits, least = FORMATS[dtype]
    unit = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, least) - (bits - 1))
    return to_whole(x / unit) * unit


def within(got, low, high, what: str) -> float:
    """Assert low <= got <= high everywhere; return the largest share of the way from the middle to a
    bound that was used (0 where there is no way).
    """
    bad = ~((low <= got) & (got <= high))
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{what}{list(at)}: got {got[at]!r}, accepted {low[at]!r} to {high[at]!r} "
            f"({int(bad.sum())} of {bad.size})"
        )
    half = (high - low) / 2
    used = np.abs(got - (low + half))
    return float(np.max(used / np.where(half > 0, half, np.inf), initial=0.0))


class Table64:
    """A table and its state as float64 copies; prev_iter int64."""

    def __init__(self, weight, state) -> None:
        def numpy(array):
            if isinstance(array, np.ndarray):
                return array
            return array.detach().cpu().double().numpy()  # NumPy has no bfloat16

        self.dtype = str(weight.dtype).removeprefix("torch.")
        self.weight = np.array(numpy(weight), dtype=np.float64)
        self.state = {
            name: np.array(numpy(a), dtype=np.int64 if name == "prev_iter" else np.float64)
            for name, a in state.items()
        }

    def step(self, update, grad, indices, *, step: int, lr: float, epoch_start: int) -> Table64:
        """What the float64 reference makes of it."""
        reference = Reference(update, self.weight)
        for name, array in self.state.items():
            reference.state[name][...] = array
        reference.apply(grad, indices, step=step, lr=lr, epoch_start=epoch_start)
        after = copy.copy(self)
        after.weight, after.state = reference.weight, reference.state
        return after


def check_step(
    update: coldrow.RowUpdate,
    before: Table64,
    after: Table64,
    grad: np.ndarray,
    indices: np.ndarray,
    *,
    step: int,
    lr: float | None = None,
    epoch_start: int = 0,
) -> dict[str, float]:
    """Assert that one update from ``before`` gave ``after``: touched rows to within the roundings of a
    step, all others bit for bit. The sums of ``grad`` [n, D] by row must be exact in float32.

    Returns the largest shares of the accepted error that "state" and float32 "weight" used.
    """
    rows, dim = before.weight.shape
    now = {
        "step": step,
        "lr": update.optimizer.lr if lr is None else lr,
        "epoch_start": epoch_start,
    }
    want = before.step(update, grad, indices, **now)
    np.testing.assert_array_equal(after.state["prev_iter"], want.state["prev_iter"])

    touched, which = np.unique(indices, return_inverse=True)
    rest = np.setdiff1d(np.arange(rows), touched)
    for name in ("weight", *before.state):
        one, other = (t.weight if name == "weight" else t.state[name] for t in (before, after))
        assert one[rest].tobytes() == other[rest].tobytes(), f"{name} of a row not touched"

    sums = np.zeros((len(touched), dim))
    np.add.at(sums, which, grad)
    magnitude = copy.copy(before)
    magnitude.weight = np.zeros_like(before.weight)
    magnitude.state = {name: np.abs(array) for name, array in before.state.items()}
    magnitude = magnitude.step(update, np.abs(sums), touched, **now)

    of_state = ROUND * (4 + dim / 16 + 6 + (1 if update.decay_state else 0))
    relative = np.full(
        (len(touched), 1), of_state
    )  # the worst of a row's states, or of an element's
    used = {"state": 0.0}
    for name, array in want.state.items():
        if name == "prev_iter":
            continue
        size = magnitude.state[name][touched]
        error = of_state * size + TINY
        if update.decay_state:
            error = error + 5 * ROUND * np.abs(before.state[name][touched])
        got, middle = after.state[name][touched], array[touched]
        used["state"] = max(used["state"], within(got, middle - error, middle + error, name))
        part = error / np.where(size > 0, size, np.inf)
        relative = np.maximum(relative, part if part.ndim == 2 else part[:, None])

    error = (1.5 * relative + 10 * ROUND) * -magnitude.weight[touched]
    error += ROUND * (np.abs(want.weight[touched]) + 5 * np.abs(before.weight[touched])) + TINY
    low, high = want.weight[touched] - error, want.weight[touched] + error
    if before.dtype != "float32":
        drawn = isinstance(update.rounding, coldrow.Stochastic)
        low = on_grid(low, before.dtype, np.floor if drawn else np.rint)
        high = on_grid(high, before.dtype, np.ceil if drawn else np.rint)
    share = within(after.weight[touched], low, high, "weight")
    return {**used, "weight": share if before.dtype == "float32" else 0.0}
