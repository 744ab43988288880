"""Where writing into somebody else's memory goes wrong without a sound: each trap is closed.

Lost writes, arrays whose memory is not what it seems, autograd not knowing, two OpenMP runtimes,
threads that do not survive a fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import coldrow

torch = pytest.importorskip("torch")

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

UPDATE = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.1))
ROWS, DIM = 6, 4
NAMES = ["weight", "grad", "indices", "momentum1", "prev_iter"]


def make_arrays() -> dict[str, np.ndarray]:
    """Arguments for step 7: three gradients for rows 1 and 4."""
    rng = np.random.default_rng(0)
    return {
        "weight": rng.standard_normal((ROWS, DIM), dtype=np.float32),
        "grad": rng.standard_normal((3, DIM), dtype=np.float32),
        "indices": np.array([1, 4, 1]),
        "momentum1": rng.random(ROWS, dtype=np.float32),
        "prev_iter": np.array([0, 3, 2, 0, 5, 1], np.int32),
    }


def make_tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in make_arrays().items()}


def train(arrays: dict, step: int = 7) -> None:
    rest = dict(arrays)
    state = {name: rest.pop(name) for name in ("momentum1", "prev_iter")}
    coldrow.apply_(UPDATE, **rest, state=state, step=step)


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


# --------------------------------------------------------------------------------- autograd is told


@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_version_of_what_is_written_is_bumped(name):
    tensors = make_tensors()
    before = {key: tensor._version for key, tensor in tensors.items()}
    train(tensors)
    assert tensors[name]._version > before[name]
    assert [tensors[key]._version for key in ("grad", "indices")] == [
        before[key] for key in ("grad", "indices")
    ]


def test_version_of_a_parameter_is_bumped_under_no_grad():
    tensors = make_tensors()
    parameter = torch.nn.Parameter(tensors["weight"])
    before = parameter._version
    with torch.no_grad():
        train(tensors | {"weight": parameter})
    assert parameter._version > before


def test_version_of_the_output_of_a_read_is_bumped():
    tensors = make_tensors()
    out = torch.zeros(3, DIM)
    state = {"prev_iter": tensors["prev_iter"]}
    coldrow.read_(out, UPDATE, tensors["weight"], tensors["indices"], state, step=7)
    assert out._version == 1
    assert tensors["weight"]._version == 0


@pytest.mark.parametrize("name", ["weight", "momentum1"])
def test_autograd_complains_about_a_tensor_saved_before_the_update(name):
    tensors = make_tensors()
    x = torch.ones(tensors[name].shape, requires_grad=True)
    loss = (x * tensors[name]).sum()  # saves it for the gradient of x
    train(tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def make_module(**options) -> TableBatchedEmbeddingBags:
    torch.manual_seed(0)
    return TableBatchedEmbeddingBags([Table("user", ROWS, DIM)], UPDATE, **options)


def run(emb: TableBatchedEmbeddingBags) -> None:
    """One training step."""
    emb(torch.tensor([1, 4, 1]), torch.tensor([0, 2, 3])).sum().backward()
    if not emb.fused:
        emb.step()
        emb.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_version_of_a_module_is_bumped(fused):
    emb = make_module(fused=fused)
    written = [emb.weights["user"], *emb.state["user"].values()]
    before = [t._version for t in written]
    run(emb)
    assert [now._version > then for now, then in zip(written, before, strict=True)] == [True] * 3


@pytest.mark.parametrize("fused", [True, False])
def test_autograd_complains_about_a_table_saved_before_its_update(fused):
    emb = make_module(fused=fused)
    x = torch.ones(ROWS, DIM, requires_grad=True)
    loss = (x * emb.weights["user"]).sum()
    run(emb)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def weighted(emb: TableBatchedEmbeddingBags):
    """A forward whose weights want a gradient, and what that gradient is."""
    weights = torch.ones(2, requires_grad=True)
    out = emb(torch.tensor([1, 4]), torch.tensor([0, 1, 2]), weights)
    return out.sum(), weights, emb.weights["user"].detach()[[1, 4]].sum(1).clone()


def assert_right_or_refused(loss, weights, want) -> None:
    """The gradient belongs to the rows that the forward read, or there is none."""
    try:
        loss.backward()
    except RuntimeError:
        assert weights.grad is None
    else:
        torch.testing.assert_close(weights.grad, want)


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_of_weights_after_a_step_came_between(fused):
    emb = make_module(fused=fused).eval()
    loss, weights, want = weighted(emb)
    run(emb.train())
    assert_right_or_refused(loss, weights, want)


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_of_weights_after_somebody_wrote_to_the_table(fused):
    emb = make_module(fused=fused)
    loss, weights, want = weighted(emb)
    with torch.no_grad():
        emb.weights["user"].mul_(3)
    assert_right_or_refused(loss, weights, want)


# -------------------------------------------------------------------------- processes and threads


def run_script(script: str, *arguments: str, **environment: str) -> object:
    """Run Python source in a process of its own; returns what it printed, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "2"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_brings_no_torch():
    script = """
        import sys, json
        import coldrow
        print(json.dumps([name for name in ("torch", "numpy", "jax") if name in sys.modules]))
    """
    assert run_script(script) == []


def test_numpy_arrays_are_trained_without_torch():
    script = """
        import sys, json
        import numpy as np, coldrow
        weight = np.ones((4, 2), np.float32)
        update = coldrow.RowUpdate()
        state = coldrow.init_state(update, 4, 2, like=weight)
        coldrow.apply_(update, weight, np.ones((1, 2), np.float32), np.array([2]), state, step=1)
        print(json.dumps(["torch" in sys.modules, (weight != 1).any(1).tolist()]))
    """
    assert run_script(script) == [False, [False, False, True, False]]


IMPORTS = {
    "coldrow first": "import coldrow._core, torch",
    "torch first": "import torch, coldrow._core",
}

# Large enough that two threads share the work.
TRAIN = """
import numpy as np
def train():
    rows, dim = 20_000, 16
    weight = np.ones((rows, dim), np.float32)
    grad = np.ones((rows, dim), np.float32)
    update = coldrow.RowUpdate()
    state = coldrow.init_state(update, rows, dim, like=weight)
    coldrow.apply_(update, weight, grad, np.arange(rows), state, step=1)
    assert (weight != 1).all()
    return float(weight.astype(np.float64).sum())
"""


@pytest.mark.parametrize("imports", IMPORTS)
def test_threads_follow_torch(imports):
    script = f"""
        import json
        {IMPORTS[imports]}
        counts = []
        for n in (1, 3, 2, 1):
            torch.set_num_threads(n)
            counts.append(coldrow._core.threads())
        print(json.dumps(counts))
    """
    assert run_script(script) == [1, 3, 2, 1]


@pytest.mark.parametrize("imports", IMPORTS)
def test_one_openmp_runtime(imports):
    script = f"""
        import json
        {IMPORTS[imports]}
        {TRAIN.replace(chr(10), chr(10) + 8 * " ")}
        train()
        torch.ones(1000, 1000).sum()  # in parallel
        with open("/proc/self/maps") as maps:
            paths = {{line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}}
        names = ("libgomp", "libomp", "libiomp")
        print(json.dumps([p for p in paths if p.rpartition("/")[2].startswith(names)]))
    """
    loaded = run_script(script)
    assert len(loaded) == 1
    assert "libgomp" in loaded[0]


@pytest.mark.parametrize("imports", ["import coldrow._core", *IMPORTS.values()])
def test_forked_child_trains(imports):
    script = f"""
        import json, os, signal
        {imports}
        {TRAIN.replace(chr(10), chr(10) + 8 * " ")}
        assert coldrow._core.threads() == 2
        want = train()  # starts the threads that the child will not have
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(30)  # ends it if it hangs
            os.close(read_end)
            with os.fdopen(write_end, "w") as out:
                json.dump([coldrow._core.threads(), train()], out)
            os._exit(0)
        os.close(write_end)
        with os.fdopen(read_end) as answer:
            threads, got = json.load(answer)
        _, status = os.waitpid(child, 0)
        print(json.dumps([threads, got == want, status, train() == want]))
    """
    assert run_script(script) == [1, True, 0, True]


def test_one_row_of_state_shared_with_stride_0():
    memory = torch.zeros(1)
    momentum1 = memory.as_strided((1,), (0,))
    prev_iter = memory.view(torch.int32).as_strided((1,), (0,))
    with pytest.raises(ValueError, match="share memory"):
        coldrow.rowwise_rmsprop_ar_(
            torch.zeros(1, 4),
            torch.ones(1, 4),
            torch.tensor([0]),
            momentum1,
            prev_iter,
            step=1,
            lr=0.1,
        )
