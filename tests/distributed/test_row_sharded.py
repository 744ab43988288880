"""RowShardedEmbeddingBags on 2 and 4 gloo processes against one process on the joined batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

RMSPROP = coldrow.RowwiseRMSprop(lr=0.1, ema_beta=0.9)
AR = coldrow.RowUpdate(RMSPROP, coldrow.LinearClipped(alpha=0.5))
READ = coldrow.RowUpdate(RMSPROP, coldrow.CumulativeLinear(half_life=2.0), decay_state=True)
GATED = coldrow.RowUpdate(
    coldrow.Adam(lr=0.05), coldrow.EpochGated(coldrow.CumulativeLinear(half_life=2.0))
)
STOCHASTIC = coldrow.RowUpdate(
    RMSPROP, coldrow.Exponential(half_life=5.0), coldrow.Stochastic(seed=9)
)


def make_tables(dtype=torch.float32, own=None, equal=False) -> list[Table]:
    """Shared tables, several widths; "b" has fewer rows than four ranks."""
    return [
        Table("a", 37, 4, dtype=dtype, features=["a1", "a2"]),
        Table("b", 3, 4 if equal else 20, dtype=dtype, update=own),
        Table("c", 50, 4, dtype=dtype, features=["c1", "c2"]),
    ]


@dataclass
class Case:
    """A training run: what each rank is given, step by step."""

    tables: list[Table]
    update: coldrow.RowUpdate = AR
    options: dict[str, Any] = field(default_factory=dict)
    sharded: dict[str, Any] = field(default_factory=dict)  # options of the sharded module alone
    weighted: bool = False
    ragged: bool = False  # batch sizes per feature
    integers: bool = False  # gradients and weights that any order sums exactly
    poison: bool = False  # a gradient that is not finite, in step 2
    steps: int = 5
    index_dtype: torch.dtype = torch.int64

    def rows_and_dims(self) -> list[tuple[int, int]]:
        return [(t.num_rows, t.dim) for t in self.tables for _ in t.features]

    def weights(self) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(1)
        return {
            t.name: (
                torch.randint(-4, 5, (t.num_rows, t.dim), generator=g).float()
                if self.integers
                else torch.randn(t.num_rows, t.dim, generator=g)
            ).to(t.dtype)
            for t in self.tables
        }

    def batches(self, world: int) -> list[list[dict[str, Any]]]:
        """By step and rank: bags of each feature as lists, their weights, gradients of their rows."""
        g = torch.Generator().manual_seed(2)

        def number(high: int) -> int:
            return int(torch.randint(high, (), generator=g))

        def draw(*shape: int) -> torch.Tensor:
            if self.integers:
                return torch.randint(-3, 4, shape, generator=g).float()
            return torch.randn(*shape, generator=g)

        steps = []
        for step in range(self.steps):
            ranks = []
            for rank in range(world):
                # Rank 1 sits out step 1, and everybody step 3.
                bags = 0 if step == 3 or (step == 1 and rank == 1) else 1 + number(4)
                features = []
                for rows, dim in self.rows_and_dims():
                    size = number(4) * (bags > 0) if self.ragged else bags
                    lengths = [number(4) for _ in range(size)]
                    n = sum(lengths)
                    out_rows = n if self.options.get("pooling") == "none" else size
                    features.append(
                        {
                            "lengths": lengths,
                            # Squared: low rows come often, on several ranks.
                            "indices": (torch.rand(n, generator=g) ** 2 * rows).long(),
                            "weights": draw(n),
                            "grad": draw(out_rows, dim),
                        }
                    )
                ranks.append(features)
            steps.append(ranks)
        if self.poison:
            steps[2][-1][0]["grad"].fill_(float("inf"))
        return steps


def joined(ranks: list[list[dict]]) -> list[dict]:
    """One batch of the batches of all ranks."""
    out = []
    for parts in zip(*ranks, strict=True):
        one = {"lengths": [n for p in parts for n in p["lengths"]]}
        for key in ("indices", "weights", "grad"):
            one[key] = torch.cat([p[key] for p in parts])
        out.append(one)
    return out


def call(emb, case: Case, features: list[dict]):
    """Forward and backward of one batch: outputs by feature, gradients of the weights."""
    lengths = torch.tensor([n for f in features for n in f["lengths"]], dtype=torch.long)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(case.index_dtype)
    indices = torch.cat([f["indices"] for f in features]).to(case.index_dtype)
    psw = torch.cat([f["weights"] for f in features]) if case.weighted else None
    if psw is not None:
        psw.requires_grad_()
    sizes = [len(f["lengths"]) for f in features]
    out = emb(indices, offsets, psw, sizes if case.ragged else None)
    dims = [d for _, d in case.rows_and_dims()]
    if emb.pooling == "none":
        counts = [len(f["indices"]) for f in features]
        parts = out if isinstance(out, list) else list(out.split(counts))
    elif case.ragged:
        flat = out.split([s * d for s, d in zip(sizes, dims, strict=True)])
        parts = [p.view(-1, d) for p, d in zip(flat, dims, strict=True)]
    else:
        parts = list(out.split(dims, dim=1))
    grads = [f["grad"].to(p.dtype) for p, f in zip(parts, features, strict=True)]
    if emb.training:
        torch.autograd.backward(parts, grads)
    return [p.detach() for p in parts], None if psw is None else psw.grad


def train(emb, case: Case, batches: list[list[dict]]):
    """Train on each; change lr and declare an epoch on the way."""
    seen = []
    for step, features in enumerate(batches):
        if step == 2:
            emb.new_epoch()
            emb.lr = 0.05
        seen.append(call(emb, case, features))
    return seen


def tables_of(emb) -> dict[str, torch.Tensor]:
    """Rows and state of all tables, live."""
    arrays = {f"weights.{n}": w.detach() for n, w in emb.weights.items()}
    for name, views in emb.state.items():
        arrays |= {f"state.{name}.{k}": v for k, v in views.items()}
    return arrays


def set_weights(emb, case: Case) -> None:
    for name, full in case.weights().items():
        own = emb.shard(name) if hasattr(emb, "shard") else range(len(full))
        emb.weights[name].data[: len(own)].copy_(full[own.start : own.stop])


def own_rows(emb) -> dict[str, torch.Tensor]:
    return {k: v[: len(emb.shard(k.split(".")[1]))].clone() for k, v in tables_of(emb).items()}


def run_sharded(rank, world, case: Case):
    from coldrow.distributed import RowShardedEmbeddingBags

    emb = RowShardedEmbeddingBags(case.tables, case.update, **case.options, **case.sharded)
    set_weights(emb, case)
    seen = train(emb, case, [step[rank] for step in case.batches(world)])
    emb.eval()
    before = own_rows(emb)
    seen.append(call(emb, case, case.batches(world)[0][rank]))
    assert all(torch.equal(before[k], v) for k, v in own_rows(emb).items())  # read only
    reads = {t.name: emb.read(t.name) for t in case.tables}
    return seen, own_rows(emb), (emb.clock, emb.epoch_start, emb.lr), reads, emb.nonfinite_rows


def run_single(case: Case, world: int):
    emb = TableBatchedEmbeddingBags(case.tables, case.update, **case.options)
    set_weights(emb, case)
    batches = [joined(step) for step in case.batches(world)]
    seen = train(emb, case, batches)
    emb.eval()
    seen.append(call(emb, case, batches[0]))
    reads = {t.name: emb.read(t.name) for t in case.tables}
    return seen, tables_of(emb), (emb.clock, emb.epoch_start, emb.lr), reads, emb.nonfinite_rows


def bits(tensor: torch.Tensor) -> bytes:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return dense.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_close(what: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    if tolerance == 0:
        assert bits(got) == bits(want), f"{what}: {(got.float() - want.float()).abs().max()}"
    else:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=what)


def check(pool, case: Case, tolerance: float = 0.0) -> None:
    """All that ranks return and hold, against one process. Tolerance 0: bit for bit."""
    seen, arrays, clock, reads, nonfinite = run_single(case, pool.world)
    ranks = pool.run(run_sharded, case)
    for step, (parts, psw_grads) in enumerate(seen):
        for f, want in enumerate(parts):
            got = torch.cat([r[0][step][0][f] for r in ranks])
            assert_close(f"output of feature {f}, step {step}", got, want, tolerance)
        if psw_grads is not None:
            lengths = [
                [len(f["indices"]) for f in r] for r in case.batches(pool.world)[step % case.steps]
            ]
            got = [r[0][step][1].split(n) for r, n in zip(ranks, lengths, strict=True)]
            got = torch.cat([torch.cat(parts) for parts in zip(*got, strict=True)])
            assert_close(f"gradient of weights, step {step}", got, psw_grads, tolerance)
    for key, want in arrays.items():
        assert_close(key, torch.cat([r[1][key] for r in ranks]), want, tolerance)
    for name, want in reads.items():
        for r in ranks:
            assert_close(f"read {name}", r[3][name], want, tolerance)
    assert all(r[2] == clock for r in ranks)
    assert sum(r[4] for r in ranks) == nonfinite


CASES = {
    "touch, sum": Case(make_tables()),
    "mean": Case(make_tables(), options={"pooling": "mean"}),
    "none": Case(make_tables(), options={"pooling": "none"}),
    "none, one width": Case(make_tables(equal=True), options={"pooling": "none"}),
    "weighted": Case(make_tables(), weighted=True),
    "batch sizes": Case(make_tables(), ragged=True, index_dtype=torch.int32),
    "read": Case(make_tables(), READ, {"charge": "read"}),
    "read, mean": Case(make_tables(), READ, {"charge": "read", "pooling": "mean"}),
    "read, weighted, batch sizes": Case(
        make_tables(), READ, {"charge": "read"}, weighted=True, ragged=True
    ),
    "read, none": Case(make_tables(), READ, {"charge": "read", "pooling": "none"}, ragged=True),
    "gated Adam, own update": Case(make_tables(own=AR), GATED, {"charge": "read"}),
    "bfloat16, stochastic": Case(make_tables(torch.bfloat16), STOCHASTIC),
    "bfloat16, stochastic, read": Case(
        make_tables(torch.bfloat16), STOCHASTIC, {"charge": "read", "output_dtype": torch.bfloat16}
    ),
    "float16": Case(make_tables(torch.float16), AR, {"output_dtype": torch.float16}),
    "split state": Case(make_tables(), AR, {"state_layout": "split"}),
}


@pytest.mark.parametrize("name", CASES)
def test_bits_of_one_process(name, workers):
    check(workers, CASES[name])


OPTIMIZERS = [
    coldrow.SGD(lr=0.1),
    coldrow.RowwiseAdagrad(lr=0.1),
    coldrow.Adagrad(lr=0.1),
    coldrow.Adam(lr=0.1, bias_correction="row"),
    coldrow.PartialRowwiseAdam(lr=0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_every_optimizer(optimizer, workers):
    update = coldrow.RowUpdate(optimizer, coldrow.LinearClipped(alpha=0.5), decay_state=True)
    check(workers, Case(make_tables(), update))
    check(workers, Case(make_tables(), update, sharded={"sum_gradients": "sender"}), 1e-5)


SENDER = ["touch, sum", "mean", "none", "weighted", "batch sizes", "read, weighted, batch sizes"]


@pytest.mark.parametrize("name", SENDER)
def test_summed_by_the_sender(name, workers):
    case = CASES[name]
    options = {"sum_gradients": "sender"}
    case = Case(case.tables, case.update, case.options, options, case.weighted, case.ragged)
    check(workers, case, 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_summed_by_the_sender_where_sums_are_exact(weighted, workers):
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.125))
    options = {"sum_gradients": "sender"}
    check(workers, Case(make_tables(), update, {}, options, weighted, integers=True, steps=2))


@pytest.mark.parametrize("summed_by", ["owner", "sender"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "propagate"])
def test_not_finite(on_nonfinite, summed_by, workers):
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.125))  # one rounding, whoever sums
    options = {"on_nonfinite": on_nonfinite}
    case = Case(
        make_tables(), update, options, {"sum_gradients": summed_by}, poison=True, integers=True
    )
    assert (run_single(case, workers.world)[4] > 0) == (on_nonfinite == "skip")
    check(workers, case)


def test_one_rank(pools):
    check(pools[1], CASES["read, weighted, batch sizes"])
