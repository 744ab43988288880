"""CUDA graphs and streams: replays advance the clock, follow lr and epochs; no call waits."""

from __future__ import annotations

import pytest
import torch
from cases import Batches, assert_same, contents, module

import coldrow

pytestmark = [
    pytest.mark.cuda_only,
    pytest.mark.filterwarnings("ignore:an epoch-aware decay is in use"),
]
UPDATES = {
    "linear": None,
    "adam": coldrow.RowUpdate(
        coldrow.Adam(lr=0.01), coldrow.EpochGated(coldrow.CumulativeLinear(half_life=2.0))
    ),
    "exponential": coldrow.RowUpdate(
        coldrow.RowwiseAdagrad(lr=0.1), coldrow.Exponential(weight_decay=0.5)
    ),
}


class Captured:
    """A forward and backward of fixed buffers, captured once."""

    def __init__(self, emb, batch, grad) -> None:
        self.emb, self.grad = emb, grad.clone()
        self.batch = [None if t is None else t.clone() for t in batch]
        start = {k: v.clone() for k, v in emb.state_dict().items() if isinstance(v, torch.Tensor)}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # torch asks for a warm-up outside
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.step()
        self.restore(start)

    def restore(self, start) -> None:
        whole = {**self.emb.state_dict(), **start}
        self.emb.load_state_dict(whole)

    def step(self):
        out = self.emb(*self.batch)
        out.backward(self.grad)
        return out.detach()

    def replay(self, batch, grad):
        for own, new in zip(self.batch, batch, strict=True):
            if own is not None:
                own.copy_(new)
        self.grad.copy_(grad)
        self.graph.replay()
        return self.out


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("update", UPDATES)
def test_replays_equal_eager_steps(device, update, charge):
    """Indices, gradients, lr, clock and epochs all change between replays."""
    graph, eager = (module(device, UPDATES[update], charge=charge) for _ in range(2))
    batches = Batches(eager, longest=3)
    lengths = [2] * (4 * batches.bags)
    first = batches.draw(lengths=lengths)
    with torch.no_grad():
        grad = batches.grad_for(eager(*first))
    captured = Captured(graph, first, grad)
    assert_same(contents(graph), contents(eager))
    for s in range(8):
        if s in (3, 6):
            graph.new_epoch()
            eager.new_epoch()
        if s == 4:
            graph.lr = eager.lr = 0.03
        if s == 5:
            graph.clock = eager.clock = eager.clock + 10
        batch = batches.draw(lengths=lengths)
        out = eager(*batch)
        grad = batches.grad_for(out)
        out.backward(grad)
        assert torch.equal(captured.replay(batch, grad), out.detach()), s
        assert_same(contents(graph), contents(eager))
        assert graph.clock == eager.clock
    graph.check()


def test_a_bad_batch_in_a_replay(device):
    graph = module(device)
    batches = Batches(graph)
    lengths = [2] * (4 * batches.bags)
    batch = batches.draw(lengths=lengths)
    with torch.no_grad():
        grad = batches.grad_for(graph(*batch))
    captured = Captured(graph, batch, grad)
    captured.replay(batch, grad)
    before = contents(graph)
    bad = batch[0].clone()
    bad[5] = -9
    captured.replay((bad, *batch[1:]), grad)
    assert_same(contents(graph), before)
    assert graph.clock == 1
    captured.replay(batch, grad)
    assert graph.clock == 2
    with pytest.raises(IndexError, match=r"(?s)(?=.*\b5\b)(?=.*-9)"):
        graph.check()


def test_side_streams(device):
    """The current stream is what a call runs on, and its autograd too."""
    emb, eager = module(device), module(device)
    batches = Batches(emb)
    stream = torch.cuda.Stream()
    kept = []  # the other stream is behind: torch must not give their memory to what is drawn next
    for _ in range(5):
        batch = batches.draw()
        out = eager(*batch)
        grad = batches.grad_for(out)
        kept.append((batch, grad))
        out.backward(grad)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)  # what did not wait for this stream would come too early
            emb(*batch).backward(grad)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(contents(emb), contents(eager))


def test_two_streams_at_once(device):
    """Two modules share nothing, the workspace included."""
    pairs = [(module(device), module(device), torch.cuda.Stream()) for _ in range(2)]
    batches = Batches(pairs[0][0], bags=2000)
    torch.cuda.synchronize()
    for _ in range(10):
        batch = batches.draw()
        grad = torch.from_numpy(batches.rng.normal(size=(2000, 256))).float().to(device)
        torch.cuda.synchronize()
        for emb, _, stream in pairs:
            with torch.cuda.stream(stream):
                emb(*batch).backward(grad)
        torch.cuda.synchronize()
        for _, eager, _ in pairs:
            eager(*batch).backward(grad)
    for emb, eager, _ in pairs:
        assert_same(contents(emb), contents(eager))


def test_nothing_waits_in_a_step(device):
    """torch's own detector: an error wherever the host would wait for the device."""
    emb = module(device, charge="read")
    batches = Batches(emb)
    drawn = [batches.draw(weighted=True) for _ in range(4)]
    grad = torch.ones(batches.bags, 256, device=device)
    emb(*drawn[0]).backward(grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in drawn[1:]:
            emb(*batch).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    emb.check()
    assert emb.clock == 4


def test_nothing_waits_behind_a_long_kernel(device):
    """What the detector does not see: the host is done long before the device is."""
    emb = module(device)
    batches = Batches(emb)
    batch = batches.draw()
    grad = torch.ones(batches.bags, 256, device=device)
    emb(*batch).backward(grad)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done = torch.cuda.Event()
    emb(*batch).backward(grad)
    done.record()
    assert not done.query(), "the step had waited for the device"
    torch.cuda.synchronize()
