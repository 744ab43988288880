"""torch.distributed.checkpoint: saved on some ranks, resumed on another number, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_row_sharded import (
    AR,
    GATED,
    STOCHASTIC,
    Case,
    bits,
    call,
    joined,
    make_tables,
    own_rows,
    set_weights,
    tables_of,
)

import coldrow
from coldrow.nn import TableBatchedEmbeddingBags

CASES = {
    "AR": Case(make_tables(), AR),
    "read, gated Adam, own update": Case(make_tables(own=AR), GATED, {"charge": "read"}),
    "bfloat16, stochastic": Case(make_tables(torch.bfloat16), STOCHASTIC),
    "split state": Case(make_tables(), AR, {"state_layout": "split"}),
    "Adagrad": Case(make_tables(), coldrow.RowUpdate(coldrow.Adagrad(lr=0.1))),
}
SAVED_AFTER = 3


def make(case: Case, **options):
    from coldrow.distributed import RowShardedEmbeddingBags

    return RowShardedEmbeddingBags(case.tables, case.update, **case.options, **options)


def share(case: Case, step: int, rank: int, world: int):
    """The part of rank ``rank`` of ``world`` in the batch of four ranks."""
    batches = case.batches(4)[step]
    each = 4 // world
    return joined(batches[rank * each : (rank + 1) * each])


def train_some(emb, case: Case, steps: range, rank=0, world=1) -> None:
    for step in steps:
        if step == 2:
            emb.new_epoch()
            emb.lr = 0.07
        call(emb, case, share(case, step, rank, world))


def save(rank, world, case: Case, path: str):
    emb = make(case)
    set_weights(emb, case)
    train_some(emb, case, range(SAVED_AFTER), rank, world)
    dcp.save({"model": {"emb": emb.state_dict()}}, checkpoint_id=path)
    train_some(emb, case, range(SAVED_AFTER, case.steps), rank, world)
    return own_rows(emb), (emb.clock, emb.epoch_start, emb.lr)


def load(emb, path: str) -> None:
    state = {"model": {"emb": emb.state_dict()}}
    dcp.load(state, checkpoint_id=path)
    emb.load_state_dict(state["model"]["emb"])


def resume(rank, world, case: Case, path: str):
    emb = make(case, seed=99)
    load(emb, path)
    train_some(emb, case, range(SAVED_AFTER, case.steps), rank, world)
    return own_rows(emb), (emb.clock, emb.epoch_start, emb.lr)


def whole(ranks) -> dict[str, bytes]:
    return {k: bits(torch.cat([r[0][k] for r in ranks])) for k in ranks[0][0]}


@pytest.mark.parametrize("name", CASES)
def test_four_two_one(name, pools, tmp_path):
    """Resumed on 4, 2 and 1 ranks and without any, each is the run that was not interrupted."""
    case, path = CASES[name], str(tmp_path)
    done = pools[4].run(save, case, path)
    want, clock = whole(done), done[0][1]
    for world in (4, 2, 1):
        ranks = pools[world].run(resume, case, path)
        assert whole(ranks) == want, world
        assert all(r[1] == clock for r in ranks)
    emb = TableBatchedEmbeddingBags(case.tables, case.update, **case.options)
    load(emb, path)
    train_some(emb, case, range(SAVED_AFTER, case.steps))
    assert {k: bits(v) for k, v in tables_of(emb).items()} == want


def test_one_two(pools, tmp_path):
    case = CASES["AR"]
    want = whole(pools[1].run(save, case, str(tmp_path)))
    assert whole(pools[2].run(resume, case, str(tmp_path))) == want


def load_whole(rank, world, case: Case, state):
    """From a state_dict of one process."""
    emb = make(case, seed=99)
    emb.load_state_dict(state)
    train_some(emb, case, range(SAVED_AFTER, case.steps), rank, world)
    return own_rows(emb), None


def test_whole_tables_are_accepted(workers):
    case = CASES["AR"]
    emb = TableBatchedEmbeddingBags(case.tables, case.update, **case.options)
    set_weights(emb, case)
    train_some(emb, case, range(SAVED_AFTER))
    state = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in emb.state_dict().items()
    }
    train_some(emb, case, range(SAVED_AFTER, case.steps))
    ranks = workers.run(load_whole, case, state)
    assert whole(ranks) == {k: bits(v) for k, v in tables_of(emb).items()}


def keys_and_shapes(rank, world, case: Case):
    from torch.distributed.tensor import DTensor, Shard

    emb = make(case)
    state = emb.state_dict()
    for key, value in state.items():
        if key.startswith(("weights.", "state.")):
            assert isinstance(value, DTensor)
            assert value.placements == (Shard(0),)
            assert len(value.to_local()) == len(emb.shard(key.split(".")[1]))
            assert torch.equal(
                value.full_tensor()[list(emb.shard(key.split(".")[1]))], value.to_local()
            )
    return {k: tuple(v.shape) for k, v in state.items() if isinstance(v, torch.Tensor)}


def test_keys_are_those_of_one_process(workers):
    case = CASES["read, gated Adam, own update"]
    emb = TableBatchedEmbeddingBags(case.tables, case.update, **case.options)
    want = {k: tuple(v.shape) for k, v in emb.state_dict().items() if isinstance(v, torch.Tensor)}
    assert all(got == want for got in workers.run(keys_and_shapes, case))


def refused(rank, world, path):
    """What does not fit is refused, and nothing changes."""
    said = []
    wider = make_tables()
    wider[0].num_rows += 1
    other = coldrow.RowUpdate(AR.optimizer, coldrow.NoDecay())
    for case in (Case(wider), Case(make_tables(), other)):
        emb = make(case)
        before = own_rows(emb)
        state = {"emb": emb.state_dict()}
        if case.update is other:
            # A checkpoint is read into the tables' own memory; policies are compared after that.
            state = {
                "emb": {
                    k: v.clone() if isinstance(v, torch.Tensor) else v
                    for k, v in state["emb"].items()
                }
            }
        try:
            wrapped = {"model": state}
            dcp.load(wrapped, checkpoint_id=path)
            emb.load_state_dict(wrapped["model"]["emb"])
        except BaseException as error:  # CheckpointException is no Exception
            said.append(str(error))
        assert emb.clock == 0
        assert all(bits(v) == bits(before[k]) for k, v in own_rows(emb).items())
    return said


def test_refused(pools, tmp_path):
    pools[2].run(save, CASES["AR"], str(tmp_path))
    for said in pools[2].run(refused, str(tmp_path)):
        size, policy = said
        assert "Size mismatch" in size
        assert "NoDecay" in policy or "alpha" in policy
