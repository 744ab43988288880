"""Bad input raises one exception that says what was wrong, what was given and what is accepted, and
not a byte of any array changes.

The tables of cases in test_bad_*.py are keyed by what the message must say: " ... " stands for anything.
"""

from __future__ import annotations

import contextlib
import ctypes

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")
import errors_page  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402
from coldrow.optim import SparseOptimizer  # noqa: E402

NAN, INF = float("nan"), float("inf")
LAST = 2**31 - 1
FLOATS = "accepted: float32, float16, bfloat16"
INTS = "accepted: int32, int64"
NUMBER = "accepted: a number >= 0 and finite"
FRACTION = "accepted: a number >= 0 and <= 1"
STEPS = "accepted: an integer from 1 to 2147483647"
AN_UPDATE = "accepted: a coldrow.RowUpdate"
ARRAY = "accepted: a torch tensor, or a NumPy, CuPy or other DLPack array"
UPDATE = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.1), coldrow.Stochastic(seed=3)
)


def bits(thing) -> bytes:
    """Every byte that training ``thing`` could change."""
    if isinstance(thing, TableBatchedEmbeddingBags):
        tensors = [p for _, p in thing.weights.items()]
        tensors += [view for views in thing.state.values() for view in views.values()]
        counters = [thing.clock, thing.epoch_start, thing.lr, thing.nonfinite_rows]
        return b"".join(map(bits, tensors)) + repr(counters).encode()
    if isinstance(thing, SparseOptimizer):
        params = [p for group in thing.param_groups for p in group["params"]]
        states = [s for p in params for s in thing.state[p].values()]
        return b"".join(map(bits, params + states)) + repr([thing.clock]).encode()
    if isinstance(thing, np.ndarray):
        return thing.tobytes()
    if isinstance(thing, torch.Tensor) and (thing.is_sparse or thing.is_nested):
        return bits(thing._values() if thing.is_sparse else thing.values())
    if isinstance(thing, torch.Tensor):
        dense = thing.detach().clone(memory_format=torch.contiguous_format)
        return dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(thing).encode()


@contextlib.contextmanager
def refused(kind, says: str, unchanged=()):
    """The body raises ``kind``, the message has the parts of ``says`` in order, nothing changes."""
    before = [bits(thing) for thing in unchanged]
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value.args[0])
    errors_page.record(type(caught.value).__name__, message, sum(map(len, before)))
    first, *rest = says.split(" ... ")
    assert message.startswith(first)
    at = len(first)
    for part in rest:
        at = message.find(part, at)
        assert at >= 0, f"{part!r} is not where it should be in {message!r}"
    assert [bits(thing) for thing in unchanged] == before


# -------------------------------------------------------------------------------------- functional

ROWS, DIM = 6, 4


def make_arrays(library: str = "numpy") -> dict:
    """Arguments that are accepted, for step 7: three gradients for two rows."""
    rng = np.random.default_rng(0)
    made = {
        "weight": rng.standard_normal((ROWS, DIM), dtype=np.float32),
        "grad": rng.standard_normal((3, DIM), dtype=np.float32),
        "indices": np.array([1, 4, 1]),
        "momentum1": rng.random(ROWS, dtype=np.float32),
        "prev_iter": np.array([0, 3, 2, 0, 5, 1], np.int32),
    }
    return made if library == "numpy" else {k: torch.from_numpy(v) for k, v in made.items()}


def call_rowwise(arrays: dict, **options) -> None:
    coldrow.rowwise_rmsprop_ar_(**arrays, **{"step": 7, "lr": 0.1, **options})


def call_apply(arrays: dict, update=UPDATE, **options) -> None:
    rest = dict(arrays)
    state = {name: rest.pop(name) for name in ("momentum1", "prev_iter")}
    coldrow.apply_(update, **{**rest, "state": state, "step": 7, **options})


def call_read(arrays: dict, update=UPDATE, **options) -> None:
    rest = {name: arrays[name] for name in ("out", "weight", "indices")}
    state = {"prev_iter": arrays["prev_iter"]}
    coldrow.read_(update=update, **{**rest, "state": state, "step": 7, **options})


def make_read_arrays(library: str = "numpy") -> dict:
    arrays = make_arrays(library)
    return {"out": arrays.pop("grad"), **arrays}


both_libraries = pytest.mark.parametrize("library", ["numpy", "torch"])
both_calls = pytest.mark.parametrize("call", [call_rowwise, call_apply])


def cast(x, dtype: str):
    return x.astype(dtype) if isinstance(x, np.ndarray) else x.to(getattr(torch, dtype))


def bits_as(x, dtype: str):
    return x.view(dtype) if isinstance(x, np.ndarray) else x.view(getattr(torch, dtype))


def ints(x, *values: int):
    """An index array of the library of ``x``."""
    return np.array(values) if isinstance(x, np.ndarray) else torch.tensor(values)


def spread(x):
    """The same values in every second element of twice the memory."""
    if isinstance(x, np.ndarray):
        return np.repeat(x, 2, axis=-1)[..., ::2]
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def column_major(x):
    return x.T.copy().T if isinstance(x, np.ndarray) else x.T.contiguous().T


def expanded(x):
    """The first row, repeated with stride 0."""
    if isinstance(x, np.ndarray):
        return np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:]))
    return x[:1].expand(x.shape)


class OnDevice:
    """A NumPy array that claims over DLPack to lie in CUDA memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLTensor: void* data; int32_t device_type; ...
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2
        return capsule


# ------------------------------------------------------------------------------------------ module


def make_module(**options) -> TableBatchedEmbeddingBags:
    """Two tables of two widths and a feature each, trained for one step."""
    torch.manual_seed(0)
    emb = TableBatchedEmbeddingBags([Table("user", 6, 4), Table("item", 5, 2)], UPDATE, **options)
    out = forward(emb)
    sum(part.sum() for part in out).backward()
    if not emb.fused:
        emb.step()
        emb.zero_grad()
    return emb


def batch(**changes) -> dict:
    """Bags [1, 4] and [1] of user, [0] and [2] of item."""
    given = {"indices": torch.tensor([1, 4, 1, 0, 2]), "offsets": torch.tensor([0, 2, 3, 4, 5])}
    return given | changes


def forward(emb, **changes):
    return emb(**batch(**changes))


CLOCKS = {
    f"clock: got 0 ... {STEPS}": (ValueError, 0),  # its clock is at 1
    f"clock: got -1 ... {STEPS}": (ValueError, -1),
    f"clock: got 2147483648 ... {STEPS}": (ValueError, 2**31),
    f"clock: got 2.5 ... {STEPS}": (TypeError, 2.5),
    f"clock: got True ... {STEPS}": (TypeError, True),
}
LRS = {
    f"lr: got -1.0 ... {NUMBER}": (ValueError, -1.0),
    f"lr: got nan ... {NUMBER}": (ValueError, NAN),
    f"lr: got inf ... {NUMBER}": (ValueError, INF),
    f"lr: got '0.1' ... {NUMBER}": (TypeError, "0.1"),
    f"lr: got None ... {NUMBER}": (TypeError, None),
}
fused_or_not = pytest.mark.parametrize("fused", [True, False])
