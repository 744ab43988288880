"""Memory that is gone, read-only or not to be had: one exception each, and not a byte changes."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
import resource

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from refusals import (  # noqa: E402
    DIM,
    bits,
    both_calls,
    both_libraries,
    call_apply,
    forward,
    fused_or_not,
    make_arrays,
    make_module,
    refused,
)

RESIZED = {
    0: "has no memory behind it ... accepted: an array",
    8: "its storage has 8 bytes ... accepted: a tensor whose storage was not freed or resized",
}


@both_calls
@pytest.mark.parametrize("size", RESIZED)
@pytest.mark.parametrize("name", ["weight", "grad", "indices", "momentum1", "prev_iter"])
def test_tensor_whose_storage_was_resized(call, name, size):
    arrays = make_arrays("torch")
    given = arrays | {name: arrays[name].clone()}
    given[name].untyped_storage().resize_(size)
    others = [array for key, array in given.items() if key != name]
    says = f"{name}: {RESIZED[size]}" if size else f"{name}: "
    with refused(ValueError, says, unchanged=[*arrays.values(), *others]):
        call(given)


@fused_or_not
def test_module_whose_table_was_freed(fused):
    emb = make_module(fused=fused)
    storage = emb.weights["item"].untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    others = [emb.weights["user"], *emb.state["user"].values(), *emb.state["item"].values()]
    with refused(ValueError, "weight: has no memory behind it ... accepted", unchanged=others):
        forward(emb)
    storage.resize_(size)
    emb.weights["item"].data.zero_()
    assert torch.isfinite(forward(emb)).all()  # and the module goes on


@both_libraries
def test_arrays_whose_owner_is_gone_are_accepted(library):
    """A view keeps its memory alive, whatever became of the names it had."""
    arrays, same = make_arrays(library), make_arrays(library)
    given = {name: array[:] for name, array in arrays.items()}
    del arrays
    gc.collect()
    call_apply(given)
    call_apply(same)
    for name, array in same.items():
        assert bits(given[name]) == bits(array)


@both_calls
@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_memory_mapped_for_reading(call, name, tmp_path):
    arrays = make_arrays()
    file = tmp_path / "array"
    arrays[name].tofile(file)
    mapped = np.memmap(file, arrays[name].dtype, "r", shape=arrays[name].shape)
    says = f"{name}: is read-only ... accepted: a writable array"
    with refused(ValueError, says, unchanged=[*arrays.values(), mapped]):
        call(arrays | {name: mapped})
    assert file.read_bytes() == arrays[name].tobytes()


@contextlib.contextmanager
def short_of_memory(spare: int):
    """No more than ``spare`` bytes of address space beyond what the process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.host_only
@pytest.mark.parametrize("where", ["function", "module"])
def test_no_memory_for_the_workspace(where):
    many = 4_000_000
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if where == "function":
            arrays = make_arrays() | {
                "grad": np.ones((many, DIM), np.float32),
                "indices": np.zeros(many, np.int32),
            }
            unchanged = [arrays[name] for name in ("weight", "momentum1", "prev_iter")]
            call, after, rest = (lambda: call_apply(arrays)), call_apply, make_arrays()
        else:
            emb = make_module(pooling="sum")  # its workspace is kept, and is small
            zeros = torch.zeros(2 * many, dtype=torch.int32)
            offsets = torch.tensor([0, many, many, many, 2 * many], dtype=torch.int32)
            out = emb(zeros, offsets)
            unchanged = [emb]
            call, after, rest = (lambda: out.sum().backward()), forward, emb
        says = "workspace: no memory for ... bytes ... accepted: a batch that fits"
        with refused(MemoryError, says, unchanged=unchanged), short_of_memory(48 << 20):
            call()
        after(rest)  # a smaller one still goes
    finally:
        torch.set_num_threads(threads)
