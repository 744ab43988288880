"""Writing into somebody else's memory: it lands in the memory given, or is refused.

Lost writes, and arrays whose memory is not what it seems.
"""

from __future__ import annotations

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")
from array_cases import DIM, ROWS, UPDATE, make_arrays, make_tensors, train  # noqa: E402

NAMES = ["weight", "grad", "indices", "momentum1", "prev_iter"]


@pytest.fixture
def want() -> dict[str, np.ndarray]:
    """The result, from plain contiguous NumPy arrays."""
    arrays = make_arrays()
    train(arrays)
    before = make_arrays()
    assert (arrays["weight"] != before["weight"]).any(1).tolist() == [0, 1, 0, 0, 1, 0]
    assert arrays["prev_iter"].tolist() == [0, 7, 2, 0, 7, 1]
    return arrays


def assert_same(given: dict, want: dict) -> None:
    """Bit for bit the arrays of ``want``."""
    for name, array in want.items():
        one = given[name]
        one = one.detach().numpy() if isinstance(one, torch.Tensor) else np.asarray(one)
        assert one.dtype == array.dtype
        np.testing.assert_array_equal(one, array, err_msg=name)


def assert_refused(arrays: dict, changes: dict, kind, *parts: str) -> None:
    """``train`` with the changes raises, naming all parts, and ``arrays`` stay as they are."""
    before = {name: np.asarray(array).copy() for name, array in arrays.items()}
    with pytest.raises(kind) as caught:
        train(arrays | changes)
    for part in parts:
        assert part in str(caught.value)
    assert_same(arrays, before)


# ------------------------------------------------------------------------------ writes are not lost


def test_writes_land_in_the_memory_given(want):
    arrays = make_arrays()
    pointers = {name: array.ctypes.data for name, array in arrays.items()}
    assert train(arrays) is None
    assert_same(arrays, want)
    assert {name: array.ctypes.data for name, array in arrays.items()} == pointers


def test_torch_tensors_share_the_memory_of_the_numpy_arrays_they_came_from(want):
    arrays = make_arrays()
    train({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert_same(arrays, want)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_rows_of_a_larger_table(want, library):
    arrays = make_arrays()
    large = np.full((ROWS + 4, DIM), 9, np.float32)
    large[3:-1] = arrays["weight"]
    given = arrays | {"weight": large[3:-1]}
    if library == "torch":
        whole = torch.from_numpy(large)
        given["weight"] = whole[3:-1]
    train(given)
    np.testing.assert_array_equal(large[3:-1], want["weight"])
    assert (large[:3] == 9).all()
    assert (large[-1:] == 9).all()


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("stride", [2, 3, -1, -2])
def test_strided_state(want, library, stride):
    arrays = make_arrays()
    memory, views = {}, {}
    for name in ("momentum1", "prev_iter"):
        memory[name] = np.full(4 * ROWS, 9, arrays[name].dtype)
        start = 1 if stride > 0 else 3 * ROWS
        views[name] = memory[name][start : start + stride * ROWS : stride]
        views[name][:] = arrays[name]
    if library == "torch":
        if stride < 0:
            pytest.skip("torch has no negative strides")
        views = {
            name: torch.from_numpy(array)[1 : 1 + stride * ROWS : stride]
            for name, array in memory.items()
        }
    train(arrays | views)
    for name, view in views.items():
        np.testing.assert_array_equal(np.asarray(view), want[name])
        assert (memory[name] == 9).sum() == 3 * ROWS  # the gaps between


def test_interleaved_record_as_two_torch_views(want):
    tensors = make_tensors()
    record = torch.empty(ROWS, 2, dtype=torch.int32)
    views = {"prev_iter": record[:, 0], "momentum1": record[:, 1].view(torch.float32)}
    for name, view in views.items():
        view.copy_(tensors[name])
    train(tensors | views)
    assert_same(tensors | views, want)


def test_interleaved_record_as_fields_of_a_structured_numpy_array(want):
    arrays = make_arrays()
    record = np.zeros(ROWS, [("momentum1", "f4"), ("prev_iter", "i4")])
    views = {name: record[name] for name in record.dtype.names}
    for name, view in views.items():
        view[:] = arrays[name]
    train(arrays | views)
    assert_same(arrays | views, want)


def test_interleaved_state_that_does_overlap():
    tensors = make_tensors()
    record = torch.zeros(ROWS, 2, dtype=torch.int32)
    tensors["prev_iter"] = record[:, 0]
    tensors["momentum1"] = record[:, 0].view(torch.float32)
    with pytest.raises(ValueError, match="share memory"):
        train(tensors)
    assert not record.any()


def test_numpy_view_that_numpy_does_not_call_writable():
    """A converting binding would train a temporary copy of a read-only view."""
    arrays = make_arrays()
    arrays["weight"] = np.broadcast_to(arrays["weight"], arrays["weight"].shape)
    assert not arrays["weight"].flags.writeable
    assert_refused(arrays, {}, ValueError, "weight: is read-only", "accepted: a writable array")


def test_buffers_without_numpy(want):
    """Anything that exports a writable buffer: here Python's own memoryview."""
    arrays = make_arrays()
    store = bytearray(arrays["weight"].tobytes())
    train(arrays | {"weight": memoryview(store).cast("f", (ROWS, DIM))})
    assert bytes(store) == want["weight"].tobytes()


def test_read_only_buffer():
    arrays = make_arrays()
    store = arrays["weight"].tobytes()
    given = arrays | {"weight": memoryview(store).cast("f", (ROWS, DIM))}
    with pytest.raises(ValueError, match="weight: is read-only, accepted: a writable array"):
        train(given)
    assert store == make_arrays()["weight"].tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scalar", [np.datetime64("2020"), np.timedelta64(1, "s")])
def test_buffer_without_strides(name, scalar):
    """NumPy exports one where strides are asked for: following them ended the process."""
    assert_refused(
        make_arrays(), {name: scalar}, (TypeError, ValueError), f"{name}: ", "accepted: "
    )


def test_empty_buffer_at_any_address():
    """As an empty ``array.array``'s may be."""
    odd = memoryview(bytearray(2))[1:1].cast("q")
    assert np.asarray(odd).ctypes.data % 8
    nothing = {"grad": np.zeros((0, DIM), np.float32), "indices": odd}
    arrays = make_arrays()
    train(arrays | nothing)
    assert_same(arrays, make_arrays())


def test_read_writes_into_the_array_given():
    arrays = make_arrays()
    out = np.zeros((5, DIM), np.float32)
    coldrow.read_(
        out[1:4],
        UPDATE,
        arrays["weight"],
        arrays["indices"],
        {"prev_iter": arrays["prev_iter"]},
        step=7,
    )
    factor = 1 - np.float32(0.1) * np.float32(0.1) * np.array([7 - 1 - 3, 7 - 1 - 5, 7 - 1 - 3])
    want = factor[:, None] * arrays["weight"][arrays["indices"]]
    np.testing.assert_allclose(out[1:4], want, rtol=1e-6)
    assert not out[[0, 4]].any()


# ------------------------------------------------------- arrays whose memory is not what it seems


@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_read_only_array(name):
    arrays = make_arrays()
    arrays[name].flags.writeable = False
    assert_refused(arrays, {}, ValueError, f"{name}: is read-only", "accepted: a writable array")


def test_tensor_that_requires_grad(want):
    tensors = make_tensors()
    tensors["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"^weight: requires grad .* accepted: .*\.detach\(\)"):
        train(tensors)
    np.testing.assert_array_equal(tensors["weight"].detach(), make_arrays()["weight"])
    with torch.no_grad():
        train(tensors)
    assert_same(tensors, want)


def test_tensor_that_requires_grad_detached(want):
    tensors = make_tensors()
    parameter = torch.nn.Parameter(tensors["weight"])
    train(tensors | {"weight": parameter.detach()})
    assert_same(tensors | {"weight": parameter}, want)


def test_gradient_that_requires_grad_is_only_read(want):
    tensors = make_tensors()
    tensors["grad"].requires_grad_()
    train(tensors)
    assert_same(tensors, want)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensor(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = make_tensors()
    fake = FakeTensorMode().from_tensor(tensors[name])
    parts = (f"{name}: got a FakeTensor", "accepted: a plain tensor")
    assert_refused(tensors, {name: fake}, TypeError, *parts)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensor(name):
    tensors = make_tensors()
    parts = (f"{name}: ", "accepted: ")  # (what it says it got depends on the release of torch)
    assert_refused(tensors, {name: tensors[name].to("meta")}, (TypeError, ValueError), *parts)


@pytest.mark.parametrize("name", ["weight", "grad", "momentum1"])
def test_negated_view(name):
    tensors = make_tensors()
    parts = (f"{name}: is a lazily negated", "accepted: a plain tensor", "resolve_neg()")
    assert_refused(tensors, {name: torch._neg_view(tensors[name])}, ValueError, *parts)


def test_negated_view_resolved(want):
    tensors = make_tensors()
    tensors["grad"] = torch._neg_view(-tensors["grad"]).resolve_neg()
    train(tensors)
    assert_same(tensors, want)


@pytest.mark.parametrize("name", ["weight", "grad"])
def test_conjugated_view(name):
    tensors = make_tensors()
    view = torch.complex(tensors[name], tensors[name]).conj()
    parts = (f"{name}: is a lazily negated or conjugated view", "resolve_conj()")
    assert_refused(tensors, {name: view}, ValueError, *parts)


@pytest.mark.parametrize("name", ["weight", "grad"])
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_tensor(name, layout):
    tensors = make_tensors()
    view = tensors[name].to_sparse(layout=getattr(torch, layout))
    parts = (f"{name}: got a tensor of layout torch.{layout}", "accepted: a dense tensor")
    assert_refused(tensors, {name: view}, TypeError, *parts)


@pytest.mark.parametrize("name", ["weight", "grad"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensor(name):
    """Its layout is torch.strided too."""
    tensors = make_tensors()
    view = torch.nested.nested_tensor(list(tensors[name]))
    parts = (f"{name}: got a tensor of layout nested", "accepted: a dense tensor")
    assert_refused(tensors, {name: view}, TypeError, *parts)


class Wrapper(torch.Tensor):
    """A subclass whose values live in another tensor."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*[a.inner if isinstance(a, cls) else a for a in args], **(kwargs or {}))


class Labelled(torch.Tensor):
    """A subclass that is a plain tensor but for its type."""


@pytest.mark.parametrize("name", NAMES)
def test_tensor_subclass_with_its_own_dispatch(name):
    tensors = make_tensors()
    parts = (f"{name}: got a Wrapper", "its own dispatch", "accepted: a plain tensor")
    assert_refused(tensors, {name: Wrapper(tensors[name])}, TypeError, *parts)


def test_tensor_subclass_that_is_a_plain_tensor(want):
    tensors = make_tensors()
    train({name: tensor.as_subclass(Labelled) for name, tensor in tensors.items()})
    assert_same(tensors, want)


def test_tensor_without_memory():
    tensors = make_tensors()
    zeros = torch._efficientzerotensor(3, DIM)
    parts = ("grad: has no memory behind it", "accepted: an array in CPU memory")
    assert_refused(tensors, {"grad": zeros}, ValueError, *parts)


@pytest.mark.parametrize("name", NAMES)
def test_expanded_tensor(name):
    tensors = make_tensors()
    view = tensors[name][:1].expand(tensors[name].shape)
    parts = (f"{name}: has stride 0 in dimension 0", "accepted: an array whose elements are")
    assert_refused(tensors, {name: view}, ValueError, *parts)


@pytest.mark.parametrize("name", NAMES)
def test_misaligned_array(name):
    arrays = make_arrays()
    good = arrays[name]
    memory = bytearray(good.nbytes + 1)
    odd = np.frombuffer(memory, good.dtype, good.size, offset=1).reshape(good.shape)
    odd[...] = good
    assert not odd.flags.aligned
    parts = (f"{name}: is not aligned", "accepted: ")
    assert_refused(arrays, {name: odd}, ValueError, *parts)
    assert memory[1:] == good.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_array_of_the_other_byte_order(name):
    arrays = make_arrays()
    swapped = arrays[name].astype(arrays[name].dtype.newbyteorder())
    assert_refused(arrays, {name: swapped}, (TypeError, ValueError), f"{name}: ", "accepted: ")


@pytest.mark.parametrize("name", ["momentum1", "prev_iter"])
def test_state_in_a_packed_record(name):
    arrays = make_arrays()
    record = np.zeros(ROWS, [("flag", "i1"), (name, arrays[name].dtype)])  # 5 bytes
    record[name] = arrays[name]
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*accepted: "):
        train(arrays | {name: record[name]})
    np.testing.assert_array_equal(record[name], arrays[name])


def make_jax_array(array: np.ndarray):
    """An array of a type from a module named as JAX's are: immutable, but exported over DLPack."""
    methods = {
        "__init__": lambda self, array: setattr(self, "array", array),
        "__dlpack__": lambda self, **options: self.array.__dlpack__(),
        "__dlpack_device__": lambda self: self.array.__dlpack_device__(),
        "__module__": "jaxlib._jax",
    }
    return type("ArrayImpl", (), methods)(array)


@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_jax_array_is_never_written(name):
    arrays = make_arrays()
    given = arrays | {name: make_jax_array(arrays[name])}
    with pytest.raises(
        TypeError, match=rf"^{name}: got .*jaxlib.* immutable, accepted: a writable"
    ):
        train(given)
    assert_same(arrays, make_arrays())


@pytest.mark.parametrize("name", ["grad", "indices"])
def test_jax_array_may_be_read(want, name):
    arrays = make_arrays()
    train(arrays | {name: make_jax_array(arrays[name])})
    assert_same(arrays, want)


def test_array_of_jax_itself():
    jnp = pytest.importorskip("jax.numpy")
    arrays = make_arrays()
    weight = jnp.asarray(arrays["weight"])
    with pytest.raises(TypeError, match=r"^weight: got .* immutable, accepted: a writable"):
        train(arrays | {"weight": weight})
    np.testing.assert_array_equal(weight, arrays["weight"])


def test_ml_dtypes_bfloat16_is_updated_in_place():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays, tensors = make_arrays(), make_tensors()
    arrays["weight"] = arrays["weight"].astype(ml_dtypes.bfloat16)
    arrays["grad"] = arrays["grad"].astype(ml_dtypes.bfloat16)
    tensors["weight"], tensors["grad"] = tensors["weight"].bfloat16(), tensors["grad"].bfloat16()
    before = arrays["weight"].copy()
    train(arrays)
    train(tensors)
    bits = tensors["weight"].view(torch.int16).numpy()
    np.testing.assert_array_equal(arrays["weight"].view(np.int16), bits)
    assert (arrays["weight"] != before).any(1).tolist() == [0, 1, 0, 0, 1, 0]


def test_ml_dtypes_bfloat16_that_is_not_accepted():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = make_arrays()
    arrays["weight"] = arrays["weight"].astype(ml_dtypes.bfloat16)
    parts = ("weight: got dtype uint16", "accepted: float32, float16, bfloat16")
    assert_refused(arrays, {"weight": arrays["weight"].view(np.uint16)}, TypeError, *parts)
    arrays["weight"].flags.writeable = False
    assert_refused(arrays, {}, ValueError, "weight: is read-only", "accepted: a writable array")
