"""What ranks do together: refuse, initialise, evict, take part in DDP."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_row_sharded import (
    AR,
    STOCHASTIC,
    Case,
    assert_close,
    bits,
    call,
    joined,
    make_tables,
    own_rows,
    set_weights,
    tables_of,
)
from torch import nn

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags
from coldrow.nn.table import Origin

CASE = Case(make_tables())


def make(case=CASE, **options):
    from coldrow.distributed import RowShardedEmbeddingBags

    return RowShardedEmbeddingBags(
        case.tables, case.update, **case.options, **case.sharded, **options
    )


OTHER = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1, ema_beta=0.5), coldrow.Exponential(half_life=3.0)
)
# "b" has from the beginning the update that the others are given later.
ASSIGNED = Case(make_tables(own=OTHER, equal=True))


def with_assigned(emb, case: Case, batches):
    """Train; assign an update between a forward and its backward, and options between steps."""
    seen = [call(emb, case, batches[0])]
    features = batches[2]
    lengths = torch.tensor([0, *(n for f in features for n in f["lengths"])])
    out = emb(torch.cat([f["indices"] for f in features]), lengths.cumsum(0))
    emb.update = OTHER
    emb.param_groups[0]["lr"] = 0.03
    out.backward(torch.cat([f["grad"] for f in features], dim=1))
    emb.charge = "read"
    seen.append(call(emb, case, batches[4]))
    emb.pooling = "mean"
    seen.append(call(emb, case, batches[0]))
    return seen, tables_of(emb)


def assigned(rank, world, sharded):
    case = replace(ASSIGNED, sharded=sharded)
    emb = make(case)
    set_weights(emb, case)
    seen, _ = with_assigned(emb, case, [step[rank] for step in case.batches(world)])
    return seen, own_rows(emb)


@pytest.mark.parametrize("summed_by", ["owner", "sender"])
def test_what_is_assigned_holds_on_the_owners_too(summed_by, workers):
    emb = TableBatchedEmbeddingBags(ASSIGNED.tables, ASSIGNED.update)
    set_weights(emb, ASSIGNED)
    batches = [joined(step) for step in ASSIGNED.batches(workers.world)]
    seen, arrays = with_assigned(emb, ASSIGNED, batches)
    ranks = workers.run(assigned, {"sum_gradients": summed_by})
    tolerance = 0.0 if summed_by == "owner" else 1e-5
    for step, (parts, _) in enumerate(seen):
        for f, want in enumerate(parts):
            got = torch.cat([r[0][step][0][f] for r in ranks])
            assert_close(f"output of feature {f}, call {step}", got, want, tolerance)
    for key, want in arrays.items():
        assert_close(key, torch.cat([r[1][key] for r in ranks]), want, tolerance)


# ------------------------------------------------------------------------------------------ refusals


def misbehave(rank, world, how: str, culprit: int, options):
    """One rank does something wrong in step 2; what it says; then a step as if nothing had been."""
    emb = make(**options)
    batches = [step[rank] for step in CASE.batches(world)]
    call(emb, CASE, batches[0])
    before, clock = own_rows(emb), emb.clock
    features = [dict(f) for f in batches[2]]
    indices = torch.cat([f["indices"] for f in features])
    offsets = torch.tensor([0, *(n for f in features for n in f["lengths"])]).cumsum(0)
    weights = None
    mine = rank == culprit
    if how == "index" and mine:
        indices[-1] = 50
    if how == "negative index" and mine:
        indices[0] = -1
    if how == "offsets fall" and mine:
        offsets[1] = offsets[-1] + 1
    if how == "offsets end" and mine:
        offsets[-1] += 1
    if how == "dtype" and mine:
        indices = indices.float()
    if how == "not a tensor" and mine:
        indices = indices.tolist()
    if how == "length" and mine:
        offsets = offsets[:-1]
    if how == "weights of one rank" and mine:
        weights = torch.ones(len(indices))
    if how == "eval" and mine:
        emb.eval()
    if how == "clock" and mine:
        emb.clock = 7
    if how == "lr" and mine:
        emb.lr = 0.5
    if how == "epoch" and mine:
        emb.new_epoch()
    if how == "a table replaced" and mine:
        kept = emb.weights["a"]
        emb.weights.replace("a", nn.Parameter(torch.zeros(3, 3), requires_grad=False))
    if how == "update" and mine:
        emb.update = coldrow.RowUpdate(AR.optimizer, coldrow.NoDecay())
    if how == "output_dtype" and mine:
        emb.output_dtype = torch.bfloat16
    said, stage = None, "forward"
    try:
        out = emb(indices, offsets, weights)
        stage = "backward"
        if how == "grad_scale" and mine:
            emb.grad_scale = 2.0
        if how == "on_nonfinite" and mine:
            emb.on_nonfinite = "propagate"
        if how == "evicted" and mine:
            emb.evict("a", [emb.shard("a").start])
        grad = torch.ones_like(out)
        if how == "gradient" and mine:
            grad.fill_(float("nan"))
        out.backward(grad)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if how == "a table replaced" and mine:
        emb.weights.replace("a", kept)
    same = how == "evicted" or all(bits(before[k]) == bits(v) for k, v in own_rows(emb).items())
    ticked = emb.clock - (7 if how == "clock" and mine else clock)
    emb.discard_forward()
    emb.train()
    emb.grad_scale, emb.lr, emb.clock = 1.0, 0.1, 8
    emb.update, emb.output_dtype = CASE.update, torch.float32
    emb.on_nonfinite = options.get("on_nonfinite", "skip")
    if how == "epoch" and not mine:
        emb.table_batch.counters.epoch_start.fill_(2)
    call(emb, CASE, batches[4])
    return said, same, ticked, emb.clock, stage


REFUSED = {
    "index": ("IndexError: indices: got 50 at position", "table 'c', accepted: 0 to 49"),
    "negative index": ("IndexError: indices: got -1 at position 0 of table 'a'",),
    "offsets fall": ("ValueError: offsets: falls",),
    "offsets end": ("ValueError: offsets: goes from 0 to",),
    "dtype": ("TypeError: indices: got torch.float32",),
    "not a tensor": ("TypeError: indices: got list",),
    "length": ("ValueError: offsets: got length",),
    "evicted": ("RuntimeError: the tables were loaded, evicted from",),
    "gradient": ("ValueError: grad: the update of row", "is not finite"),
    "a table replaced": ("ValueError: weights.a: got [3, 3], accepted: [",),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_one_rank_refuses_raises_everywhere(how, workers):
    culprit = workers.world - 1
    options = {"on_nonfinite": "raise"} if how == "gradient" else {}
    outcomes = workers.run(misbehave, how, culprit, options)
    # A gradient that is not finite is refused where the row is.
    first = [s for s, *_ in outcomes if not s.startswith("RuntimeError: rank")]
    for part in REFUSED[how]:
        assert all(part in s for s in first)
        assert all(part in s for s, *_ in outcomes)  # also in what the others say
    assert first
    if how != "gradient":
        assert [s.startswith("RuntimeError: rank") for s, *_ in outcomes] == [
            r != culprit for r in range(workers.world)
        ]
        assert f"rank {culprit} raised, so no rank goes on" in outcomes[0][0]
    stage = "backward" if how in ("evicted", "gradient") else "forward"
    assert all(o[1:] == (True, 0, 9, stage) for o in outcomes)


LATE = ["grad_scale", "on_nonfinite"]  # what only the backward asks
DIFFER = ["weights of one rank", "eval", "clock", "lr", "epoch", "update", "output_dtype", *LATE]


@pytest.mark.parametrize("how", DIFFER)
def test_ranks_that_differ_raise_everywhere(how, workers):
    outcomes = workers.run(misbehave, how, 0, {})
    assert all(o[0].startswith("ValueError: the ranks differ in clock, lr") for o in outcomes)
    stage = "backward" if how in LATE else "forward"
    assert all(o[1:] == (True, 0, 9, stage) for o in outcomes)


def test_a_second_forward(pools):
    outcomes = pools[2].run(misbehave_twice)
    assert all("is waiting for its backward" in said for said in outcomes)


def misbehave_twice(rank, world):
    emb = make()
    batch = CASE.batches(world)[0][rank]
    indices = torch.cat([f["indices"] for f in batch])
    offsets = torch.tensor([0, *(n for f in batch for n in f["lengths"])]).cumsum(0)
    kept = emb(indices, offsets)
    with pytest.raises(RuntimeError) as refused:
        emb(indices, offsets)
    kept.sum().backward(retain_graph=True)
    assert emb.clock == 1
    with pytest.raises(RuntimeError, match="this forward has had its backward"):
        kept.sum().backward()
    return str(refused.value)


def test_different_tables_are_refused(pools):
    outcomes = pools[2].outcomes(make_differing)
    assert all(o[:2] == ("raised", "ValueError") for o in outcomes)
    assert all("tables: rank 1 has" in o[2] for o in outcomes)


def some_assign(rank, world):
    """With the update of rank 0 all tables are trained alike."""
    emb = make(ASSIGNED)
    if rank == 0:
        emb.update = OTHER
    call(emb, ASSIGNED, ASSIGNED.batches(world)[0][rank])


def test_an_update_assigned_on_one_rank_is_refused(pools):
    for outcome in pools[2].outcomes(some_assign):
        assert outcome[:2] == ("raised", "ValueError")
        assert "the ranks differ in clock, lr, epoch, grad_scale, policies" in outcome[2]


@pytest.mark.parametrize("given", [{"storage": torch.zeros(10, 4)}, {"origin": Origin("whole")}])
def test_parts_of_tables_are_refused(given, pools):
    for outcome in pools[2].outcomes(make_of, Table("a", 10, 4, **given)):
        assert outcome[:2] == ("raised", "ValueError")
        assert "tables: got one with storage or origin" in outcome[2]


def make_of(rank, world, table):
    make(Case([table]))


def make_differing(rank, world):
    make(Case([Table("a", 10 + rank, 4)]))


def test_without_a_process_group():
    from coldrow.distributed import RowShardedEmbeddingBags

    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        RowShardedEmbeddingBags([Table("a", 4, 2)])


# ------------------------------------------------------------------------------------ rows and shards


def initial_rows(rank, world, dtype):
    torch.manual_seed(rank)  # of no consequence but on rank 0
    random = torch.get_rng_state()
    tables = [Table("big", 9001, 3, dtype=dtype), Table("few", 3, 5, init=nn.init.normal_)]
    emb = make(Case(tables), seed=5)
    assert torch.equal(random, torch.get_rng_state())
    rows = own_rows(emb)
    shards = [emb.shard(t.name) for t in tables]
    mine = [r for r in (0, 4095, 4096, 8999) if r in shards[0]]
    emb.evict("big", mine)
    with pytest.raises(IndexError, match="rows: got 9001, accepted"):
        emb.evict("big", [9001])
    evicted = emb.read("big", [0, 4095, 4096, 8999, 1])
    return rows, [(s.start, s.stop) for s in shards], evicted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_rows_do_not_depend_on_the_number_of_ranks(dtype, pools):
    seen = []
    for pool in pools.values():
        ranks = pool.run(initial_rows, dtype)
        assert [r[1][0] for r in ranks] == [
            (min(i * c, 9001), min((i + 1) * c, 9001))
            for c in [-(-9001 // pool.world)]
            for i in range(pool.world)
        ]
        whole = {k: torch.cat([r[0][k] for r in ranks]) for k in ranks[0][0]}
        seen.append((whole, ranks[0][2]))
        assert all(torch.equal(r[2], ranks[0][2]) for r in ranks)
    for whole, evicted in seen[1:]:
        assert all(bits(whole[k]) == bits(v) for k, v in seen[0][0].items())
        assert torch.equal(evicted, seen[0][1])
    rows, evicted = seen[0][0]["weights.big"].float(), seen[0][1]
    assert rows.abs().max() <= 3**-0.5 + 1e-2
    assert rows.std() > 0.3
    assert len(rows.unique(dim=0)) > 8990  # not the same block again and again
    assert not torch.equal(evicted[:4], rows[[0, 4095, 4096, 8999]])
    assert torch.equal(evicted[4], rows[1])


def cold_and_evicted(rank, world):
    emb = make()
    for step in CASE.batches(world)[:3]:
        call(emb, CASE, step[rank])
    cold = {t.name: emb.cold_rows(t.name, 2).tolist() for t in CASE.tables}
    emb.evict("a", cold["a"])
    view = emb.state["a"]["prev_iter"]
    fresh = [int(view[r - emb.shard("a").start]) for r in cold["a"]]
    return cold, fresh, emb.state_bytes()


def test_cold_rows_and_eviction(workers):
    emb = TableBatchedEmbeddingBags(CASE.tables, CASE.update)
    for step in CASE.batches(workers.world)[:3]:
        call(emb, CASE, joined(step))
    ranks = workers.run(cold_and_evicted)
    for table in CASE.tables:
        want = emb.cold_rows(table.name, 2).tolist()
        assert want or table.name == "b"
        assert [row for r in ranks for row in r[0][table.name]] == want
    assert all(v == 0 for r in ranks for v in r[1])
    assert sum(r[2] for r in ranks) >= emb.state_bytes()


def read_some(rank, world):
    emb = make(Case(make_tables(), STOCHASTIC, {"charge": "read"}))
    for step in CASE.batches(world)[:3]:
        call(emb, CASE, step[rank])
    everything = emb.read("c")
    some = torch.arange(rank, 50, 7, dtype=torch.int32)
    assert torch.equal(emb.read("c", some), everything[some.long()])
    assert emb.read("c", []).shape == (0, 4)
    assert emb.clock == 3
    try:
        emb.read("c", [50] if rank == 0 else [1])
    except (IndexError, RuntimeError) as error:
        return str(error)


def test_reads_ask_what_each_rank_likes(workers):
    assert all("rows: got 50, accepted: 0 to 49" in said for said in workers.run(read_some))


def in_a_subgroup(rank, world):
    import torch.distributed as dist

    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return None
    emb = make(process_group=group)
    call(emb, CASE, CASE.batches(2)[0][dist.get_rank(group)])
    with pytest.raises(TypeError, match="pickling"):
        emb.__getstate__()
    return own_rows(emb)["weights.a"]


def test_a_process_group_of_some_ranks(pools):
    some = [rows for rows in pools[4].run(in_a_subgroup) if rows is not None]
    whole = pools[2].run(one_step)
    assert torch.equal(torch.cat(some), torch.cat(whole))


def one_step(rank, world):
    emb = make()
    call(emb, CASE, CASE.batches(world)[0][rank])
    return own_rows(emb)["weights.a"]


def pickled(rank, world):
    import copy
    import pickle

    emb = make()
    batches = CASE.batches(world)
    call(emb, CASE, batches[0][rank])
    for twin in (copy.deepcopy(emb), pickle.loads(pickle.dumps(emb))):
        call(twin, CASE, batches[2][rank])
    call(emb, CASE, batches[2][rank])
    assert all(bits(v) == bits(own_rows(twin)[k]) for k, v in own_rows(emb).items())


def test_copies(pools):
    pools[2].run(pickled)


# -------------------------------------------------------------------------------------------- models


class Model(nn.Module):
    def __init__(self, emb) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.emb = emb
        self.dense = nn.Linear(36, 1)

    def forward(self, features):
        lengths = torch.tensor([0, *(n for f in features for n in f["lengths"])])
        return self.dense(self.emb(torch.cat([f["indices"] for f in features]), lengths.cumsum(0)))


def equal_batches(world: int):
    """Batches of four bags for each of ``world`` ranks."""
    g = torch.Generator().manual_seed(8)
    return [
        [
            [
                {"lengths": [2] * 4, "indices": torch.randint(n, (8,), generator=g)}
                for n, _ in CASE.rows_and_dims()
            ]
            for _ in range(world)
        ]
        for _ in range(3)
    ]


def train_model(model, batches, dense) -> None:
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for features in batches:
        model(features).sigmoid().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def with_ddp(rank, world):
    from coldrow.distributed import ignore_in_ddp

    torch.manual_seed(rank)
    model = Model(make(seed=1))
    model.emb.grad_scale = float(world)
    before = own_rows(model.emb)
    ignore_in_ddp(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    assert all(bits(before[k]) == bits(v) for k, v in own_rows(model.emb).items())
    train_model(ddp, [step[rank] for step in equal_batches(world)], model.dense)
    return before, own_rows(model.emb), model.dense.weight.detach()


def test_inside_ddp(workers):
    """The mean of the ranks' mean losses, as one process would have it."""
    ranks = workers.run(with_ddp)
    emb = TableBatchedEmbeddingBags(CASE.tables, CASE.update)
    for table in CASE.tables:
        key = f"weights.{table.name}"
        emb.weights[table.name].data.copy_(torch.cat([r[0][key] for r in ranks]))
    model = Model(emb)
    batches = [
        [
            {
                "lengths": [n for p in parts for n in p["lengths"]],
                "indices": torch.cat([p["indices"] for p in parts]),
            }
            for parts in zip(*step, strict=True)
        ]
        for step in equal_batches(workers.world)
    ]
    train_model(model, batches, model.dense)
    for table in CASE.tables:
        got = torch.cat([r[1][f"weights.{table.name}"] for r in ranks])
        torch.testing.assert_close(got, emb.weights[table.name].detach(), rtol=2e-5, atol=2e-5)
    assert all(torch.equal(r[2], ranks[0][2]) for r in ranks)
    torch.testing.assert_close(ranks[0][2], model.dense.weight.detach())


def test_bytes_are_counted(pools):
    owner, sender = (pools[2].run(counted_by_hand, s) for s in ("owner", "sender"))
    header = (2 + 1 + 2) * 8  # status, mark, one group, one feature's lookups and bags
    # Rank 0 asks rank 1 for rows 5 and 7 (of 8), rank 1 asks rank 0 for row 0.
    assert owner[0] == {
        "header": header,
        "rows asked": 2 * 4,
        "rows sent": 1 * 12,
        "status": 24,
        # rows 5, 7, 5 in two bags: three codes, two gradients
        "gradients": 3 * 4 + 2 * 12,
    }
    assert owner[1]["gradients"] == 4 + 12
    assert sender[0]["gradients"] == 2 * 12
    assert sender[1]["gradients"] == 12


def counted_by_hand(rank, world, summed_by):
    emb = make(Case([Table("t", 8, 3)], AR, sharded={"sum_gradients": summed_by}))
    indices = [[1, 5, 7, 5], [4, 0, 6]][rank]
    offsets = [[0, 3, 4], [0, 3]][rank]
    emb(torch.tensor(indices), torch.tensor(offsets)).sum().backward()
    return {k: v for k, v in emb.wire_bytes.items() if v}
