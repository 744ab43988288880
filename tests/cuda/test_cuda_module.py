"""What else a user does with a module, with torch's embeddings and with arrays, on a GPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import DTYPES, LINEAR, Batches, assert_same, both, contents, module, using
from torch import nn

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer


def step(emb, batches, **draw):
    batch = batches.draw(**draw)
    out = emb(*batch)
    out.backward(batches.grad_for(out))


@pytest.mark.cuda_only
def test_is_available(device):
    assert coldrow.cuda.is_built()
    assert coldrow.cuda.is_available()


@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
def test_empty_batches(device, pooling):
    """No bags, empty bags, one index: the clock ticks, nothing else moves."""
    emb = module(device, pooling=pooling)
    before = contents(emb)
    none = torch.empty(0, dtype=torch.int64, device=device)
    for bags in (1, 40):
        out = emb(none, torch.zeros(4 * bags + 1, dtype=torch.int64, device=device))
        assert not out.detach().any()
        out.sum().backward()
    emb.check()
    assert_same(contents(emb), before)
    assert emb.clock == 2


def test_one_index(device):
    """The last row of the last table, and no other."""
    found = []
    for place in both():
        emb = module(place)
        offsets = torch.zeros(4 * 3 + 1, dtype=torch.int64, device=place)
        offsets[-1] = 1
        out = emb(torch.full((1,), 59, dtype=torch.int64, device=place), offsets)
        out.backward(torch.full_like(out, 0.25))
        emb.check()
        found.append({"out": out.detach().cpu(), **contents(emb)})
        assert emb.state["c"]["prev_iter"].cpu().nonzero().tolist() == [[59]]
        assert not emb.state["a"]["prev_iter"].any()
    assert_same(*found)


def test_batch_sizes_that_vary(device):
    found = []
    for place in both():
        emb = module(place)
        sizes = [3, 0, 5, 1]
        indices = torch.arange(18, device=place) % 7
        out = emb(indices, torch.arange(0, 19, 2, device=place), None, sizes)
        out.backward(torch.full_like(out, 0.25))
        emb.check()
        found.append({"out": out.detach().cpu(), **contents(emb)})
    assert_same(*found)


def test_gradient_of_per_sample_weights(device):
    found = []
    for place in both():
        emb = module(place, charge="read")
        batches = Batches(emb)
        for _ in range(3):
            indices, offsets, weights = batches.draw(weighted=True)
            weights.requires_grad_()
            out = emb(indices, offsets, weights)
            out.backward(batches.grad_for(out))
            found.append(weights.grad.cpu())
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_unfused_steps(device):
    """Gradients of two forwards accumulate; clipping; then one step."""
    found = []
    for place in both():
        emb = module(place, fused=False)
        batches = Batches(emb)
        for _ in range(3):
            for _ in range(2):
                step(emb, batches)
            for p in emb.weights.values():
                p.grad = p.grad * 0.5
            emb.step()
            emb.zero_grad()
        assert emb.clock == 3
        found.append(contents(emb))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


def test_rows_and_state(device):
    """read, cold_rows, evict, live views."""
    found = []
    for place in both():
        emb = module(place, charge="read", update=coldrow.RowUpdate(decay=LINEAR))
        batches = Batches(emb)
        for _ in range(4):
            step(emb, batches)
        emb.state["c"]["momentum1"][0] = 7.0
        emb.weights["c"].data[0] = 1.0
        emb.clock += 5
        emb.check()
        cold = emb.cold_rows("a", 6)
        read = {"a": emb.read("a"), "c": emb.read("c", [5, 3, 5]), "cold": cold}
        found.append({name: array.cpu() for name, array in read.items()})
        assert emb.state_bytes() == 8 * (300 + 7 + 60)
    assert_same(*found)
    emb = module(device)
    for _ in range(2):
        step(emb, Batches(emb))
    emb.evict("c", [0, 2])
    assert not emb.state["c"]["momentum1"][[0, 2]].any()
    assert not emb.state["c"]["prev_iter"][[0, 2]].any()
    with pytest.raises(IndexError):
        emb.read("c", [60])


@pytest.mark.parametrize("layout", ["record", "split"])
def test_checkpoints_move_between_devices(device, layout):
    """Saved on one device, loaded on the other, trained on: the bits of a run that never moved."""
    runs = []
    for first, second in ((device, "cpu"), ("cpu", device), (device, device)):
        with using(first):
            emb = module(first, charge="read", state_layout=layout)
            batches = Batches(emb)
            for _ in range(3):
                step(emb, batches)
            saved = copy.deepcopy(emb.state_dict())
        with using(second):
            emb = module(second, charge="read", state_layout=layout)
            emb.load_state_dict(saved)
            batches.device = second
            for _ in range(3):
                step(emb, batches)
        assert emb.clock == 6
        runs.append(contents(emb))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.cuda_only
def test_to_and_back(device):
    emb = module("cpu")
    before = contents(emb)
    emb.to(device)
    assert all(t.is_cuda for t in (*emb.weights.values(), emb.state["a"]["prev_iter"]))
    assert_same(contents(emb), before)
    batches = Batches(emb)
    step(emb, batches)
    emb.check()
    assert emb.clock == 1
    emb.cpu()
    batches.device = "cpu"
    step(emb, batches)
    assert emb.clock == 2


@pytest.mark.cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device(device):
    """While the first is the current one: modules, functions, a schedule's table, refusals."""
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.125), coldrow.CumulativeLinear(half_life=8.0))
    found = []
    for place in ("cuda:1", "cuda:0"):
        emb = module(place, update, charge="read")
        batches = Batches(emb)
        for _ in range(3):
            step(emb, batches)
        emb.check()
        weight = torch.ones(6, 8, device=place)
        state = coldrow.init_state(update, 6, 8, like=weight)
        grad, rows = torch.ones(2, 8, device=place), torch.tensor([1, 5], device=place)
        coldrow.apply_(update, weight, grad, rows, state, step=4)
        with pytest.raises(IndexError, match="6"):
            coldrow.apply_(update, weight, grad, rows + 1, state, step=5)
        found.append({"weight": weight.cpu(), "read": emb.read("a").cpu(), **contents(emb)})
        assert torch.cuda.current_device() == 0
    assert_same(*found)
    emb = module("cuda:1")
    with pytest.raises(ValueError, match=r"(?s)(?=.*cuda:0)(?=.*cuda:1)"):
        emb(*Batches(module("cuda:0")).draw())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtypes(device, dtype):
    found = []
    for place in both():
        emb = module(place, dtype=torch.bfloat16, output_dtype=dtype)
        batches = Batches(emb)
        out = emb(*batches.draw())
        out.backward(batches.grad_for(out))
        found.append({"out": out.detach().cpu(), **contents(emb)})
    assert_same(*found)


def test_schedulers_and_lr(device):
    """A scheduler writes lr; the kernels read it at the next step."""
    found = []
    for place in both():
        emb = module(place)
        batches = Batches(emb)
        for s in range(4):
            emb.lr = 0.5 / (s + 1)
            step(emb, batches)
        found.append(contents(emb))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.cuda_only
def test_more_than_2_to_31_bytes(device):
    """Rows beyond 2^32 bytes and 2^31 elements of one table."""
    rows, dim = 40_000_000, 64  # 5.1 GB in bfloat16
    free, _ = torch.cuda.mem_get_info()
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of device memory, {free >> 30} are free")
    emb = TableBatchedEmbeddingBags(
        [Table("big", rows, dim, dtype=torch.bfloat16, init=nn.init.ones_)],
        coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5), coldrow.Constant(0.5)),
        device=device,
    )
    picked = torch.tensor([0, 1, 33_554_431, 33_554_432, rows - 2, rows - 1], device=device)
    offsets = torch.arange(len(picked) + 1, device=device)
    out = emb(picked, offsets)
    assert (out == 1).all()
    out.backward(torch.zeros_like(out))
    emb.check()
    touched = emb.state["big"]["prev_iter"].nonzero().squeeze(1)
    assert torch.equal(touched, picked)
    assert (emb.weights["big"][picked] == 0.75).all()
    around = torch.tensor([2, 33_554_430, 33_554_433, rows - 3], device=device)
    assert (emb.weights["big"][around] == 1).all()
    assert (emb(picked, offsets).detach() == 0.75).all()
    small = [torch.float32, torch.int32]
    assert [emb.state["big"][n].dtype for n in ("momentum1", "prev_iter")] == small


# ------------------------------------------------------------------------------------- torch's own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", ["embedding", "bag"])
def test_optim_on_torch_embeddings(device, layer, dtype):
    found = []
    for place in both():
        torch.manual_seed(0)
        kind = nn.Embedding if layer == "embedding" else nn.EmbeddingBag
        options = {} if layer == "embedding" else {"mode": "sum"}
        model = kind(50, 24, sparse=True, **options).to(dtype).to(place)
        optimizer = RowwiseRMSpropAR(model.parameters(), lr=0.125, ar_alpha=0.5)
        rng = np.random.default_rng(1)
        for _ in range(3):
            optimizer.zero_grad()
            indices = torch.from_numpy(rng.integers(0, 50, (8, 4))).to(place)
            out = model(indices)
            grad = rng.integers(-2, 3, tuple(out.shape)) / 4.0
            out.backward(torch.from_numpy(grad).to(place, out.dtype))
            optimizer.step()
        state = next(iter(optimizer.state.values()))
        found.append(
            {
                "weight": model.weight.detach().cpu(),
                **{k: v.cpu() for k, v in state.items() if isinstance(v, torch.Tensor)},
            }
        )
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-6)


def test_optim_adam_follows_sparse_adam(device):
    """coldrow's Adam beside torch.optim.SparseAdam on the same device."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Embedding(40, 16, sparse=True).to(device))
    optimizers = [
        SparseOptimizer(models[0].parameters(), coldrow.RowUpdate(coldrow.Adam(lr=0.01))),
        torch.optim.SparseAdam(models[1].parameters(), lr=0.01),
    ]
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        indices = torch.randint(40, (30,), generator=generator).to(device)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(indices).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-4, atol=1e-5)


def test_from_torch(device):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(30, 16, mode="sum").to(device)
    emb = TableBatchedEmbeddingBags.from_torch(bag, coldrow.RowUpdate(), charge="read")
    indices = torch.arange(12, device=device)
    offsets = torch.arange(0, 13, 3, device=device)
    want = bag(indices, offsets[:-1])
    torch.testing.assert_close(emb(indices, offsets).detach(), want.detach())


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"), reason="needs torch.compiler.is_compiling"
)
@pytest.mark.filterwarnings("ignore")  # torch's own, about its own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(device, mode):
    """The same as eager, in one graph; with reduce-overhead through CUDA graphs, which replay."""
    if mode == "reduce-overhead" and device != "cuda":
        pytest.skip("means nothing without a GPU")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.emb = module(device, charge="read")
            self.dense = nn.Linear(256, 1).to(device)

        def forward(self, indices, offsets):
            return self.dense(torch.relu(self.emb(indices, offsets)))

    torch.compiler.reset()
    eager, compiled = Model(), Model()
    options = {} if mode == "default" else {"mode": mode}
    run = torch.compile(compiled, fullgraph=True, **options)
    batches = Batches(eager.emb)
    for s in range(6):
        lengths = [2] * (4 * batches.bags)
        batch = batches.draw(lengths=lengths)[:2]
        if s == 3:
            eager.emb.lr = compiled.emb.lr = 0.01
        for call in (eager, run):
            call(*batch).sum().backward()
    for e in (eager.emb, compiled.emb):
        e.check()
        assert e.clock == 6
    one, other = contents(eager.emb), contents(compiled.emb)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


# --------------------------------------------------------------------------------------- other arrays


@pytest.mark.cuda_only
def test_cupy(device):
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.125), LINEAR)
    start = rng.normal(size=(20, 24)).astype(np.float32)
    grad = (rng.integers(-2, 3, (50, 24)) / 4).astype(np.float32)
    indices = rng.integers(0, 20, 50)
    weight = cupy.asarray(start)
    state = coldrow.init_state(update, 20, 24, like=weight)
    assert all(isinstance(a, cupy.ndarray) for a in state.values())
    coldrow.apply_(update, weight, cupy.asarray(grad), cupy.asarray(indices), state, step=1)
    expected = start.copy()
    expected_state = coldrow.init_state(update, 20, 24, like=expected)
    coldrow.apply_(update, expected, grad, indices, expected_state, step=1)
    np.testing.assert_array_equal(cupy.asnumpy(weight), expected)
    for name in state:
        np.testing.assert_array_equal(cupy.asnumpy(state[name]), expected_state[name])
    indices[3] = 20
    with pytest.raises(IndexError, match="20"):
        coldrow.apply_(update, weight, cupy.asarray(grad), cupy.asarray(indices), state, step=2)
    np.testing.assert_array_equal(cupy.asnumpy(weight), expected)


@pytest.mark.cuda_only
def test_deep_copies_and_pickles(device):
    emb = module(device)
    batches = Batches(emb)
    step(emb, batches)
    twin = copy.deepcopy(emb)
    assert_same(contents(twin), contents(emb))
    state = batches.rng.bit_generator.state
    step(emb, batches)
    batches.rng.bit_generator.state = state
    step(twin, batches)
    assert_same(contents(twin), contents(emb))
