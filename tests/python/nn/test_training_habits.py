"""Training loops as people write them: mixed precision, accumulation, clipping, workers that load data."""

from __future__ import annotations

import pytest

import coldrow

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

from coldrow.nn import EmbeddingBag, clip_grad_norm_  # noqa: E402

UPDATE = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.1))


class Model(nn.Module):
    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        torch.manual_seed(0)
        self.bag = EmbeddingBag(20, 8, mode="sum", update=UPDATE, dtype=dtype, **options)
        self.dense = nn.Linear(8, 1)

    def forward(self, x):
        return self.dense(self.bag(x).to(self.dense.weight.dtype))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 20, (6, 3), generator=generator) for _ in range(count)]


def test_scaler_with_float16_outputs():
    """A scale that overflows skips the step, of the tables too; later ones train."""
    model = Model(torch.float16, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-12)
    dense = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    before = model.bag.weight.detach().clone()
    clocks = []
    for x in batches(5):
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        for optimizer in (model.bag.optimizer, dense):
            scaler.step(optimizer)
        scaler.update()
        model.bag.table.zero_grad()
        dense.zero_grad()
        clocks.append(model.bag.clock)
        assert model.bag.weight.isfinite().all()
    assert clocks[0] == 0  # 2**40 is beyond float16
    assert clocks[-1] > 0
    assert not torch.equal(model.bag.weight, before)


def test_autocast_around_the_model():
    """Tables keep their dtype and output; the dense part runs in bfloat16."""
    model = Model()
    model.bag.lr = 0.02
    dense = torch.optim.SGD(model.dense.parameters(), lr=0.01)
    seen = []
    model.bag.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    losses = []
    for _ in range(30):
        for x in batches(1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
                assert out.dtype == torch.bfloat16
            loss = nn.functional.mse_loss(out.float(), torch.ones_like(out, dtype=torch.float32))
            loss.backward()
            dense.step()
            dense.zero_grad()
            losses.append(loss.item())
    assert set(seen) == {torch.float32}
    assert model.bag.clock == 30
    assert losses[-1] < 0.1 * losses[0]


def test_accumulation_with_clipping_is_one_large_batch():
    """Two halves, accumulated and clipped, are the whole batch, clipped."""
    whole, halves = Model(fused=False), Model(fused=False)
    for x in batches(4):
        for model, parts in ((whole, [x]), (halves, x.chunk(2))):
            for part in parts:
                model(part).sum().backward()
            clip_grad_norm_(model.parameters(), 0.5)
            model.bag.step()
            model.bag.table.zero_grad()
            model.dense.zero_grad()
    torch.testing.assert_close(whole.bag.weight, halves.bag.weight)
    assert whole.bag.clock == halves.bag.clock == 4


def test_several_forwards_in_one_step():
    """A query and a document through one table: gradients of both, one step."""
    model = Model(fused=False)
    before = model.bag.weight.detach().clone()
    query, document = batches(2)
    (model.bag(query) * model.bag(document)).sum().backward()
    model.bag.step()
    assert model.bag.clock == 1
    touched = (model.bag.weight != before).any(1)
    assert touched[query].all()
    assert touched[document].all()
    fused = Model()
    kept = fused.bag(query)
    with pytest.raises(RuntimeError, match="fused=False"):
        fused.bag(document)
    del kept


class Clicks(Dataset):
    """Looks its own copy of a table up in the worker, as a sampler of negatives would."""

    def __init__(self, bag):
        self.bag = bag

    def __len__(self):
        return 24

    def __getitem__(self, i):
        with torch.no_grad():
            score = self.bag(torch.tensor([[i % 20, 1]])).sum()
        return torch.tensor([i % 20, (3 * i) % 20, 1]), score


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_data_loader(workers):
    """Forked after the tables were trained by several threads: no hang, and the same training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model, alone = Model(), Model()
        context = {"multiprocessing_context": "fork"} if workers else {}
        for target, count in ((model, workers), (alone, 0)):
            big = torch.randint(0, 20, (4096, 3), generator=torch.Generator().manual_seed(0))
            target(big).sum().backward()  # threads are running now
            loader = DataLoader(
                Clicks(target.bag), batch_size=8, num_workers=count, timeout=60 if count else 0,
                **(context if count else {}),
            )  # fmt: skip
            for x, _ in loader:
                target(x).sum().backward()
    finally:
        torch.set_num_threads(threads)
    assert model.bag.clock == 4
    assert torch.equal(model.bag.weight, alone.bag.weight)
