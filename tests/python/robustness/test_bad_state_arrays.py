"""Bad arrays of one value per element, and of a read: one exception each, and not a byte changes."""

from __future__ import annotations

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")
from refusals import (  # noqa: E402
    ARRAY,
    DIM,
    FLOATS,
    INTS,
    NAN,
    NUMBER,
    ROWS,
    UPDATE,
    OnDevice,
    bits,
    bits_as,
    both_libraries,
    call_read,
    cast,
    column_major,
    expanded,
    ints,
    make_arrays,
    make_read_arrays,
    refused,
    spread,
)

# State that is element-wise, beside one that is not.
BY_ELEMENT = coldrow.RowUpdate(coldrow.Adam(bias_correction="row"), UPDATE.decay, UPDATE.rounding)


def make_adam_arrays(library: str = "numpy") -> dict:
    rng = np.random.default_rng(1)
    made = make_arrays()
    made["touches"] = np.array([0, 2, 1, 0, 4, 1], np.float32)
    for name in ("momentum1", "momentum2"):
        made[name] = rng.random((ROWS, DIM), dtype=np.float32)
    return made if library == "numpy" else {k: torch.from_numpy(v) for k, v in made.items()}


def call_adam(arrays: dict, state: object = None, **options) -> None:
    names = ("prev_iter", "touches", "momentum1", "momentum2")
    rest = {k: v for k, v in arrays.items() if k not in names}
    if state is None:
        state = {k: v for k, v in arrays.items() if k in names}
    coldrow.apply_(BY_ELEMENT, **rest, state=state, **{"step": 7, **options})


def transposed(x):
    return x.T.copy() if isinstance(x, np.ndarray) else x.T.contiguous()


OF_A_ROW, OF_AN_ELEMENT = "accepted: shape [6] (one per row)", "accepted: shape [6, 4] (one per el"
ELEMENT_WISE = {
    f"momentum1: got float32[6] ... {OF_AN_ELEMENT}": (
        ValueError,
        lambda x: x[:, 0],
    ),
    f"momentum1: got float32[24] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x.reshape(-1)),
    f"momentum1: got float32[4, 6] ... {OF_AN_ELEMENT}": (ValueError, transposed),
    f"momentum1: got float32[5, 4] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x[:5]),
    f"momentum2: got float32[6, 3] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x[:, :3]),
    f"momentum2: got float32[1, 6, 4] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x[None]),
    f"touches: got float32[6, 1] ... {OF_A_ROW}": (ValueError, lambda x: x[:, None]),
    f"touches: got float32[5] ... {OF_A_ROW}": (ValueError, lambda x: x[1:]),
    "momentum1: got dtype float64 ... accepted: float32": (TypeError, lambda x: cast(x, "float64")),
    "momentum2: got dtype float16 ... accepted: float32": (TypeError, lambda x: cast(x, "float16")),
    "momentum2: got dtype int32 ... accepted: float32": (TypeError, lambda x: cast(x, "int32")),
    "touches: got dtype int32 ... accepted: float32": (TypeError, lambda x: cast(x, "int32")),
    "momentum1: float32[6, 4] is not contiguous ... row-major": (ValueError, column_major),
    "momentum1: float32[6, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "momentum2: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    f"momentum2: got <class 'list'> ... {ARRAY}": (TypeError, lambda x: x.tolist()),
    "momentum2: got ... None ... accepted": (TypeError, lambda x: None),
}


@both_libraries
@pytest.mark.parametrize("says", ELEMENT_WISE)
def test_element_wise_state_that_is_not_accepted(library, says):
    kind, change = ELEMENT_WISE[says]
    name = says.partition(":")[0]
    arrays = make_adam_arrays(library)
    given = arrays | {name: change(arrays[name])}
    with refused(kind, says, unchanged=[*arrays.values(), *given.values()]):
        call_adam(given)
    call_adam(arrays)  # as they were they are accepted


def overlapping(arrays: dict, one: str, other: str) -> dict:
    """Both in one memory: the last element of one is the first of the other."""
    parts = [arrays[one], arrays[other]]
    library = np if isinstance(parts[0], np.ndarray) else torch
    flat, n = library.concatenate(parts).reshape(-1), ROWS * DIM
    return {
        one: flat[:n].reshape(ROWS, DIM),
        other: flat[n - 1 : 2 * n - 1].reshape(ROWS, DIM),
    }


SHARED_BY_ELEMENT = {
    "weight and momentum1": lambda a: {"momentum1": a["weight"]},
    "weight and momentum2": lambda a: overlapping(a, "weight", "momentum2"),
    "momentum2 and weight": lambda a: overlapping(a, "momentum2", "weight"),
    "momentum1 and momentum2": lambda a: {"momentum2": a["momentum1"]},
    "momentum2 and momentum1": lambda a: overlapping(a, "momentum2", "momentum1"),
    "momentum1 and grad": lambda a: {"grad": a["momentum1"][2:5]},
    "momentum2 and touches": lambda a: {"touches": a["momentum2"][:, 1]},
    "momentum1 and prev_iter": lambda a: {"prev_iter": bits_as(a["momentum1"], "int32")[:, 3]},
    "touches and prev_iter": lambda a: {"prev_iter": bits_as(a["touches"], "int32")},
}


@both_libraries
@pytest.mark.parametrize("names", SHARED_BY_ELEMENT)
def test_element_wise_state_that_shares_memory(library, names):
    arrays = make_adam_arrays(library)
    given = arrays | SHARED_BY_ELEMENT[names](arrays)
    with refused(ValueError, "", [*arrays.values(), *given.values()]) as caught:
        call_adam(given)
    assert "share memory, accepted: arrays that do not overlap" in str(caught.value)
    assert set(str(caught.value).partition(":")[0].split(" and ")) == set(names.split(" and "))


@pytest.mark.parametrize("name", ["touches", "momentum1", "momentum2"])
def test_read_only_element_wise_state(name):
    arrays = make_adam_arrays()
    arrays[name].flags.writeable = False
    says = f"{name}: is read-only ... accepted: a writable array"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_adam(arrays)


def test_neighbours_in_one_memory_are_accepted():
    """What touches without overlapping: moments one after the other, scalars in one record."""
    arrays, memory = make_adam_arrays(), np.zeros((2, ROWS, DIM), np.float32)
    records = np.zeros((ROWS, 2), np.int32)
    given = dict(arrays)
    for name, view in (
        ("momentum1", memory[0]),
        ("momentum2", memory[1]),
        ("prev_iter", records[:, 0]),
        ("touches", records.view(np.float32)[:, 1]),
    ):
        view[...] = arrays[name]
        given[name] = view
    call_adam(given | {"weight": arrays["weight"].copy()})
    call_adam(arrays)
    for name in ("momentum1", "momentum2", "prev_iter", "touches"):
        assert bits(given[name].copy()) == bits(arrays[name])


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"momentum2": None}, "['momentum1', 'prev_iter', 'touches']"),
        ({"touches": None}, "['momentum1', 'momentum2', 'prev_iter']"),
        ({"prev_iter": None}, "['momentum1', 'momentum2', 'touches']"),
        ({"momentum3": 0}, "['momentum1', 'momentum2', 'momentum3', 'prev_iter', 'touches']"),
        ({"momentum2": None, "Momentum2": 0}, "['Momentum2', 'momentum1', 'prev_iter', 'touches']"),
    ],
)
def test_element_wise_state_with_missing_or_extra_arrays(change, got):
    arrays = make_adam_arrays()
    state = {k: arrays[k] for k in ("prev_iter", "touches", "momentum1", "momentum2")}
    for name, array in change.items():
        if array is None:
            del state[name]
        else:
            state[name] = arrays["momentum1"].copy()
    names = "['momentum1', 'momentum2', 'prev_iter', 'touches']"
    says = f"state: got {got} ... accepted: a dict with {names}"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_adam(arrays, state=state)


@pytest.mark.host_only
@pytest.mark.parametrize("name", ["touches", "momentum1", "momentum2"])
def test_element_wise_state_on_another_device_than_weight(name):
    arrays = make_adam_arrays()
    says = f"{name}: is on cuda:0 ... accepted: cpu"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_adam(arrays | {name: OnDevice(arrays[name])})


READ_ARRAYS = {
    f"out: got dtype float64 ... {FLOATS}": (TypeError, lambda x: cast(x, "float64")),
    "out: got float32[2, 4] ... accepted: shape [3, 4]": (ValueError, lambda x: x[:2]),
    "out: float32[3, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "out: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    f"weight: got dtype float64 ... {FLOATS}": (TypeError, lambda x: cast(x, "float64")),
    "weight: float32[6, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    f"indices: got dtype int16 ... {INTS}": (TypeError, lambda x: cast(x, "int16")),
    "indices: got -2 at position 1 ... accepted: 0 to 5": (IndexError, lambda x: ints(x, 0, -2, 9)),
    "prev_iter: got dtype int64 ... accepted: int32": (TypeError, lambda x: cast(x, "int64")),
    "prev_iter: got int32[2] ... accepted: shape [6]": (ValueError, lambda x: x[:2]),
}


@both_libraries
@pytest.mark.parametrize("says", READ_ARRAYS)
def test_read_of_an_array_that_is_not_accepted(library, says):
    kind, change = READ_ARRAYS[says]
    name = says.partition(":")[0]
    arrays = make_read_arrays(library)
    given = arrays | {name: change(arrays[name])}
    with refused(kind, says, unchanged=[*arrays.values(), *given.values()]):
        call_read(given)


def test_read_into_the_table_itself_or_a_read_only_array():
    arrays = make_read_arrays()
    given = arrays | {"out": arrays["weight"][:3]}
    with refused(ValueError, "out and weight: share memory ... accepted", arrays.values()):
        call_read(given)
    arrays["out"].flags.writeable = False
    with refused(ValueError, "out: is read-only ... accepted: a writable", arrays.values()):
        call_read(arrays)


@pytest.mark.parametrize(
    ("says", "value"),
    [
        ("step: got 0 ... accepted: an integer from 1", 0),
        ("step: got 2147483649 ... accepted: an integer from 1 to 2147483648", 2**31 + 1),
        (f"lr: got nan ... {NUMBER}", NAN),
        ("epoch_start: got -1 ... accepted: an integer from 0", -1),
        ("state: got no prev_iter ... accepted: a dict with 'prev_iter'", {}),
    ],
)
def test_read_option_that_is_not_accepted(says, value):
    arrays = make_read_arrays()
    with refused(ValueError, says, unchanged=arrays.values()):
        call_read(arrays, **{says.partition(":")[0]: value})


@pytest.mark.parametrize(
    ("says", "kind", "value"),
    [
        ("num_rows: got -1 ... accepted: an integer from 0", ValueError, -1),
        ("num_rows: got 2.5 ... accepted: an integer from 0", TypeError, 2.5),
        ("dim: got 0 ... accepted: an integer from 1", ValueError, 0),
        ("like: got list ... accepted: a torch, NumPy or CuPy array", TypeError, [0.0]),
    ],
)
def test_init_state_of_something_else(says, kind, value):
    arguments = {"num_rows": ROWS, "dim": DIM, "like": np.zeros(1)}
    with refused(kind, says):
        coldrow.init_state(UPDATE, **arguments | {says.partition(":")[0]: value})
