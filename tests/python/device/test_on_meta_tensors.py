"""Modules whose tables are in other memory than the processor's, without a device: meta tensors take the
place of a device's, and the kernels write down what they are given. A tensor made in the wrong place, or a value
read on the host, fails here; on the stand-in, whose memory is the processor's, both go unnoticed.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import stand_in
import torch

import coldrow
from coldrow import __main__, nn
from coldrow._backends import cuda
from coldrow.nn import Table, TableBatchedEmbeddingBags

pytestmark = pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use")
CALLS: list[str] = []


def tensors_in(args):
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from tensors_in(a)


class Native:
    """In the place of coldrow._cuda: refuses what is not on the device, as it does."""

    report_size = 12
    Update = staticmethod(lambda **options: options)
    DeviceUpdate = staticmethod(lambda update, number: (update, number))

    def devices(self):
        return 1, ""

    class TableBatch:
        def __init__(self, *layout):
            self.layout = layout

        def check(self, report, rows, stream):
            assert report.is_meta

        def __getattr__(self, name):
            if name not in ("lookup", "weight_gradients", "update"):
                raise AttributeError(name)

            def call(*args):
                *args, allocate = args
                assert allocate(300).is_meta
                assert all(t.is_meta for t in tensors_in(args)), name
                CALLS.append(name)

            return call


class Elsewhere(cuda.Cuda):
    torch_type = "meta"

    def stream(self, array):
        return 7


@pytest.fixture(autouse=True)
def calls():
    with stand_in.in_use(Elsewhere(Native())):
        CALLS.clear()
        yield CALLS


def small(**options):
    """Tables "a" (two features) and "b"."""
    tables = [Table("a", 6, 4, features=["f", "g"]), Table("b", 5, 4)]
    update = coldrow.RowUpdate(coldrow.Adam(0.1), coldrow.EpochGated(coldrow.LinearClipped(0.5)))
    return TableBatchedEmbeddingBags(tables, update, **{"device": "meta", **options})


def batch(index_dtype=torch.int64):
    return (
        torch.empty(6, dtype=index_dtype, device="meta"),
        torch.empty(7, dtype=index_dtype, device="meta"),
    )


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("pooling", ["sum", "mean", "none", "weighted"])
def test_a_fused_step_stays_on_the_device(calls, charge, pooling):
    emb = small(pooling="sum" if pooling == "weighted" else pooling, charge=charge)
    emb.lr = 0.5
    emb.grad_scale = 4.0
    emb.new_epoch()
    weights = None
    if pooling == "weighted":
        weights = torch.empty(6, device="meta", requires_grad=True)
    for sizes in (None, [2, 1, 3]):
        out = emb(*batch(), weights, sizes)
        assert out.is_meta
        out.sum().backward()
    emb.check()
    extra = ["weight_gradients"] if pooling == "weighted" else []
    assert calls == 2 * ["lookup", *extra, "update"]
    with torch.no_grad():
        emb(*batch(torch.int32))
    with pytest.raises(RuntimeError, match="meta"):  # and a value read would have been noticed
        _ = emb.clock


def test_a_module_copied_and_converted_stays_on_the_device():
    emb = copy.deepcopy(small())
    emb.half()
    tensors = [*emb.parameters(), *emb.buffers(), emb.anchor, *emb.table_batch.counters.lrs()]
    assert all(t.is_meta for t in tensors)
    assert emb.table_batch.kernels.device.type == "meta"
    emb(*batch()).sum().backward()


def test_torchs_layers_keep_their_device():
    """As torch's own: where the weights are, or torch's default device."""
    bag = torch.nn.EmbeddingBag(6, 4, mode="sum", device="meta")
    emb = TableBatchedEmbeddingBags.from_torch(bag)
    assert emb.weights["weight"].is_meta
    assert nn.Embedding.from_pretrained(bag.weight.detach(), freeze=False).weight.is_meta
    assert nn.EmbeddingBag(6, 4, _weight=bag.weight.detach()).weight.is_meta
    with torch.device("meta"):
        assert nn.Embedding(6, 4).weight.is_meta
        assert nn.Embedding(6, 4, device="cpu").weight.device.type == "cpu"
    assert nn.Embedding(6, 4).weight.device.type == "cpu"


def test_info_says_why_there_is_no_device(monkeypatch, capsys):
    engine = Elsewhere(Native())
    monkeypatch.setattr(engine.native, "devices", lambda: (0, "no driver"), raising=False)
    monkeypatch.setattr(sys, "argv", ["coldrow", "info"])
    with stand_in.in_use(engine):
        __main__.main()
    assert "cuda      built: True, available: False (no driver)\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- other libraries


class Array:
    """As a CuPy array: on a device that need not be the current one."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype, self.made_on = shape, dtype, FakeCuPy.current
        self.device = FakeCuPy.Device(self.made_on)

    def __dlpack_device__(self):
        return 2, self.made_on


class FakeCuPy:
    """The little of CuPy that is used."""

    current = 0

    class Device(contextlib.AbstractContextManager):
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            self.before, FakeCuPy.current = FakeCuPy.current, self.number
            return self

        def __exit__(self, *_):
            FakeCuPy.current = self.before

    cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=100 + FakeCuPy.current))
    empty_like = zeros_like = staticmethod(lambda array, shape, dtype: Array(shape, dtype))


def test_cupy_works_on_the_arrays_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", FakeCuPy)
    monkeypatch.setattr(Array, "__module__", "cupy")
    with FakeCuPy.Device(1):
        array = Array((3, 4), "float32")
    engine = cuda.Cuda(Native())
    assert FakeCuPy.current == 0
    assert engine.stream(array) == 101
    assert engine.report(array).made_on == 1
    assert engine.allocator(array)(10).made_on == 1
    assert engine.number(array) == 1
    assert FakeCuPy.current == 0
    assert engine.stream(np.zeros(3)) == 100  # (without a device that can be made current)
