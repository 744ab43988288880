"""coldrow inside TorchRec on 2 and 4 gloo processes against one process on the joined batch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from test_row_sharded import AR, GATED, READ, STOCHASTIC, assert_close, bits

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

pytest.importorskip("torchrec")

BAGS = 4  # of each feature and rank
ADAGRAD = coldrow.RowUpdate(coldrow.Adagrad(lr=0.1), coldrow.LinearClipped(alpha=0.5))
FADING = replace(STOCHASTIC, optimizer=coldrow.Adagrad(lr=0.1))


@dataclass
class Case:
    """A training run of one sharded collection."""

    plan: dict[str, str]  # table -> how it is sharded
    update: coldrow.RowUpdate = AR
    pooling: str = "sum"  # "none": EmbeddingCollection
    fused: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    weighted: bool = False
    steps: int = 4

    def tables(self) -> list[Table]:
        # Four ranks row-wise: one of them has no rows of "b".
        dims = (8, 8, 8) if self.pooling == "none" else (8, 4, 16)
        sizes = {"a": (37, ["a1", "a2"]), "b": (6, ["b1"]), "c": (50, ["c1", "c2"])}
        return [
            Table(name, rows, dim, dtype=self.dtype, features=features)
            for (name, (rows, features)), dim in zip(sizes.items(), dims, strict=True)
            if name in self.plan
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(1)
        return {
            t.name: torch.randn(t.num_rows, t.dim, generator=g).to(t.dtype) for t in self.tables()
        }

    def batches(self, world: int) -> list[list[list[dict[str, Any]]]]:
        """By step, rank and feature."""
        g = torch.Generator().manual_seed(2)
        specs = [(t.num_rows, t.dim) for t in self.tables() for _ in t.features]

        def feature(rows: int, dim: int) -> dict[str, Any]:
            lengths = torch.randint(4, (BAGS,), generator=g)
            n = int(lengths.sum())
            return {
                "lengths": lengths,
                "indices": (torch.rand(n, generator=g) ** 2 * rows).long(),
                "weights": torch.randn(n, generator=g),
                "grad": torch.randn(n if self.pooling == "none" else BAGS, dim, generator=g),
            }

        return [
            [[feature(*spec) for spec in specs] for _ in range(world)] for _ in range(self.steps)
        ]


def joined(ranks: list[list[dict]]) -> list[dict]:
    return [
        {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
        for parts in zip(*ranks, strict=True)
    ]


def single(case: Case, world: int, steps: int | None = None):
    options = {k: v for k, v in case.fused.items() if k in ("charge", "on_nonfinite")}
    emb = TableBatchedEmbeddingBags(case.tables(), case.update, pooling=case.pooling, **options)
    for name, full in case.weights().items():
        emb.weights[name].data.copy_(full)
    outputs = []
    for step, ranks in enumerate(case.batches(world)[:steps]):
        if step == 2:
            emb.new_epoch()
        features = joined(ranks)
        lengths = torch.cat([f["lengths"] for f in features])
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        weights = torch.cat([f["weights"] for f in features]) if case.weighted else None
        out = emb(torch.cat([f["indices"] for f in features]), offsets, weights)
        if case.pooling == "none":
            parts = out.split([len(f["indices"]) for f in features])
        else:
            parts = out.split([f["grad"].shape[1] for f in features], dim=1)
        torch.autograd.backward(parts, [f["grad"] for f in features])
        outputs.append([p.detach() for p in parts])
    return outputs, emb


# ------------------------------------------------------------------------------------ in the processes


def quiet() -> None:
    import logging

    os.environ.setdefault("LOCAL_WORLD_SIZE", "2")
    logging.getLogger("torchrec").setLevel(logging.ERROR)


def build(rank: int, world: int, case: Case):
    """The sharded model."""
    quiet()
    import torchrec
    from torchrec.distributed import DistributedModelParallel, comm_ops
    from torchrec.distributed import sharding_plan as plans
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.modules.embedding_configs import DataType, PoolingType

    from coldrow import torchrec as ours

    comm_ops.set_gradient_division(False)  # gradients of all ranks are summed
    types = {torch.float32: DataType.FP32, torch.bfloat16: DataType.BF16}
    common = [
        {
            "num_embeddings": t.num_rows,
            "embedding_dim": t.dim,
            "name": t.name,
            "feature_names": t.features,
            "data_type": types[t.dtype],
        }
        for t in case.tables()
    ]
    if case.pooling == "none":
        module = torchrec.EmbeddingCollection([torchrec.EmbeddingConfig(**c) for c in common])
        sharder_type = ours.EmbeddingCollectionSharder
    else:
        pooling = PoolingType.MEAN if case.pooling == "mean" else PoolingType.SUM
        configs = [torchrec.EmbeddingBagConfig(**c, pooling=pooling) for c in common]
        module = torchrec.EmbeddingBagCollection(configs, is_weighted=case.weighted)
        sharder_type = ours.EmbeddingBagCollectionSharder
    sharder = sharder_type(ours.fused_params(case.update, **case.fused))
    hosts = max(world // 2, 1)
    how = {
        "row": plans.row_wise(compute_kernel="fused"),
        "column": plans.column_wise(ranks=[0, world - 1], compute_kernel="fused"),
        "table row": plans.table_row_wise(host_index=hosts - 1),
        "data": plans.data_parallel(),
        **{f"table {r}": plans.table_wise(rank=r, compute_kernel="fused") for r in range(world)},
    }
    plan = plans.construct_module_sharding_plan(
        module,
        {name: how[case.plan[name]] for name in case.plan},
        sharder=sharder,
        local_size=min(world, 2),
        world_size=world,
        device_type="cpu",
    )
    for name, kind in case.plan.items():
        if kind == "table row":  # whose helper takes no compute_kernel
            plan[name].compute_kernel = "fused"
    import torch.distributed as dist

    return DistributedModelParallel(
        torch.nn.Sequential(module),
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        plan=ShardingPlan({"0": plan}),
        sharders=[sharder],
        device=torch.device("cpu"),
    )


def sharded(model):
    return model.module[0]


def local(value) -> list[tuple[list[int], torch.Tensor]]:
    """Shards on this rank with their offsets."""
    if not hasattr(value, "local_shards"):
        return [([0] * value.dim(), value)]
    return [(list(s.metadata.shard_offsets), s.tensor) for s in value.local_shards()]


def set_weights(model, case: Case) -> None:
    for key, value in model.state_dict().items():
        name = key.split(".")[-2] if key.endswith(".weight") else None
        if name in case.weights():
            full = case.weights()[name]
            for (row, col), tensor in local(value):
                rows, cols = tensor.shape
                tensor.copy_(full[row : row + rows, col : col + cols])


def contents(model) -> dict[str, list]:
    found = {
        f"weights.{key.split('.')[-2]}": [(o, t.clone()) for o, t in local(value)]
        for key, value in model.state_dict().items()
        if key.endswith(".weight")
    }
    for states in model.fused_optimizer.state_dict()["state"].values():
        for key, value in states.items():
            found[f"state.{key}"] = [(o, t.clone()) for o, t in local(value)]
    return found


def forward(model, case: Case, features: list[dict]) -> list[torch.Tensor]:
    from torchrec import KeyedJaggedTensor

    keys = [f for t in case.tables() for f in t.features]
    kjt = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([f["indices"] for f in features]),
        lengths=torch.cat([f["lengths"] for f in features]),
        weights=torch.cat([f["weights"] for f in features]) if case.weighted else None,
    )
    out = model(kjt)
    if case.pooling == "none":
        return [out[key].values() for key in keys]
    return [out.to_dict()[key] for key in keys]


def step_on(model, case: Case, features: list[dict]):
    parts = forward(model, case, features)
    torch.autograd.backward(parts, [f["grad"] for f in features])
    return [p.detach().clone() for p in parts]


def run(rank, world, case: Case, steps=None):
    model = build(rank, world, case)
    set_weights(model, case)
    outputs = []
    for step, ranks in enumerate(case.batches(world)[:steps]):
        if step == 2:
            sharded(model).new_epoch()
        outputs.append(step_on(model, case, ranks[rank]))
        assert int(sharded(model).clock) == step + 1
    before = contents(model)
    model.eval()
    features = case.batches(world)[0][rank]
    kept = forward(model, case, features)
    after = contents(model)
    assert all(
        bits(a[1]) == bits(b[1]) for k in before for a, b in zip(before[k], after[k], strict=True)
    )
    assert int(sharded(model).clock) == len(outputs)
    model.train()
    step_on(model, case, features)  # what was read above waits for no backward
    assert len(kept) == len(features)
    assert int(sharded(model).clock) == len(outputs) + 1
    return outputs, before


# --------------------------------------------------------------------------------------------- checks


def assemble(ranks, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole arrays from the shards of all ranks."""
    whole = {key: torch.empty_like(want) for key, want in like.items()}
    for found in ranks:
        for key, shards in found.items():
            if key not in whole:
                continue
            for offsets, tensor in shards:
                if tensor.dim() == 1:  # one copy for each column shard, one after another
                    offsets = [offsets[0] % len(whole[key])]
                ranges = [slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True)]
                whole[key][tuple(ranges)] = tensor
    return whole


def arrays(emb) -> dict[str, torch.Tensor]:
    out = {f"weights.{n}": w.detach().clone() for n, w in emb.weights.items()}
    for name, views in emb.state.items():
        out |= {f"state.{name}.{k}": v.clone() for k, v in views.items()}
    return out


def check(pool, case: Case, outputs: float, rows: float) -> None:
    """Tolerances of what comes out and of what is trained; 0: bit for bit."""
    want_outputs, emb = single(case, pool.world)
    ranks = pool.run(run, case)
    for step, parts in enumerate(want_outputs):
        for f, want in enumerate(parts):
            got = torch.cat([r[0][step][f] for r in ranks])
            assert_close(f"output of feature {f}, step {step}", got, want, outputs)
    want = arrays(emb)
    got = assemble([r[1] for r in ranks], want)
    assert {k for r in ranks for k in r[1]} == set(want)
    for key in want:
        assert_close(key, got[key], want[key], rows)


ROW = {"a": "row", "b": "row", "c": "row"}
TABLE = {"a": "table 0", "b": "table 1", "c": "table 0"}
MIXED = {"a": "row", "b": "table 1", "c": "table row"}

# Row-wise, TorchRec sums the pooled parts of a bag over ranks: outputs agree to rounding. The rows
# are given the same gradients in the same order, so they are the same bits.
CASES = {
    "row-wise": (Case(ROW), 1e-6, 0),
    "table-wise": (Case(TABLE), 0, 0),
    # Over several hosts a batch arrives host by host: the same sums in another order.
    "mixed with table-row-wise": (Case(MIXED), 1e-6, 1e-6),
    "row-wise, read": (Case(ROW, READ, fused={"charge": "read"}), 1e-6, 0),
    "table-wise, read, gated Adam": (Case(TABLE, GATED, fused={"charge": "read"}), 0, 0),
    "row-wise, mean": (Case(ROW, pooling="mean"), 1e-6, 1e-5),
    "table-wise, mean": (Case(TABLE, pooling="mean"), 0, 0),
    "row-wise, weighted": (Case(ROW, weighted=True), 1e-6, 0),
    "row-wise, bfloat16, stochastic": (Case(ROW, STOCHASTIC, dtype=torch.bfloat16), 1e-5, 0),
    "column-wise": (Case({"a": "column", "b": "table 1", "c": "column"}, ADAGRAD), 0, 0),
    "column-wise, bfloat16, stochastic": (
        Case({"c": "column"}, FADING, dtype=torch.bfloat16),
        0,
        0,
    ),
    "sequences, row-wise": (Case(ROW, pooling="none"), 0, 0),
    "sequences, table-wise, read": (
        Case(TABLE, READ, pooling="none", fused={"charge": "read"}),
        0,
        0,
    ),
    "sequences, column-wise": (Case({"a": "column"}, ADAGRAD, pooling="none"), 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_one_process(name, workers):
    case, outputs, rows = CASES[name]
    check(workers, case, outputs, rows)


# ----------------------------------------------------------------------------------------- checkpoints


def share(case: Case, step: int, rank: int, world: int):
    """The part of rank ``rank`` of ``world`` in the batch of four ranks."""
    each = 4 // world
    return joined(case.batches(4)[step][rank * each : (rank + 1) * each])


def advance(rank, world, model, case: Case, steps: range) -> None:
    for step in steps:
        if step == 2:
            sharded(model).new_epoch()
        step_on(model, case, share(case, step, rank, world))


def save(rank, world, case: Case, path: str):
    import torch.distributed.checkpoint as dcp

    from coldrow.torchrec import checkpoint_state

    model = build(rank, world, case)
    set_weights(model, case)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.07
    model.fused_optimizer.step()  # hands lr to the kernels
    advance(rank, world, model, case, range(3))
    dcp.save(checkpoint_state(model), checkpoint_id=path)
    advance(rank, world, model, case, range(3, case.steps))
    return contents(model), int(sharded(model).clock), int(sharded(model).epoch_start)


def resume(rank, world, case: Case, path: str):
    import torch.distributed.checkpoint as dcp

    from coldrow.torchrec import checkpoint_state

    model = build(rank, world, case)
    for group in model.fused_optimizer.param_groups:
        group["lr"] = 0.07
    model.fused_optimizer.step()
    dcp.load(checkpoint_state(model), checkpoint_id=path)
    assert int(sharded(model).clock) == 3
    advance(rank, world, model, case, range(3, case.steps))
    return contents(model), int(sharded(model).clock), int(sharded(model).epoch_start)


CHECKPOINTED = {
    "row-wise": (Case(ROW, steps=5), (2, 1)),
    "row-wise, sequences": (Case(ROW, GATED, "none", {"charge": "read"}, steps=5), (2,)),
    "row-wise, bfloat16": (Case(ROW, STOCHASTIC, dtype=torch.bfloat16, steps=5), (2,)),
    "table-wise": (Case(TABLE, READ, fused={"charge": "read"}, steps=5), (2,)),
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_resumed_on_fewer_ranks(name, pools, tmp_path):
    case, worlds = CHECKPOINTED[name]
    done = pools[4].run(save, case, str(tmp_path))
    _, emb = single(case, 1)
    whole = assemble([d[0] for d in done], arrays(emb))
    for world in (4, *worlds):
        again = replace(case, plan={**case.plan} if world > 1 else dict.fromkeys(case.plan, "row"))
        ranks = pools[world].run(resume, again, str(tmp_path))
        got = assemble([r[0] for r in ranks], arrays(emb))
        for key, want in whole.items():
            assert bits(got[key]) == bits(want), (world, key)
        assert {r[1:] for r in ranks} == {(5, 3)}


# --------------------------------------------------------------------------------------------- the rest


def beside_data_parallel(rank, world):
    """A data-parallel table is TorchRec's own, and does not disturb the others."""
    case = Case({"a": "row", "b": "data", "c": "table 0"})
    model = build(rank, world, case)
    set_weights(model, case)
    dense = [p for n, p in model.named_parameters() if ".b." in n]
    assert len(dense) == 1
    step_on(model, case, case.batches(world)[0][rank])
    assert dense[0].grad is not None
    assert int(sharded(model).clock) == 1
    assert not any(".b." in k for k in contents(model) if k.startswith("state"))
    return contents(model)


def test_beside_data_parallel(pools):
    case = Case({"a": "row", "b": "data", "c": "table 0"})
    _, emb = single(case, 2, 1)
    want = {k: v for k, v in arrays(emb).items() if ".b" not in k}
    got = assemble(pools[2].run(beside_data_parallel), want)
    assert all(bits(got[k]) == bits(v) for k, v in want.items())


def knobs(rank, world, params):
    quiet()
    from torchrec.distributed import comm_ops

    from coldrow import torchrec as ours

    case = Case({"a": "row"})
    given = {"coldrow": True, **params}
    original, ours.fused_params = ours.fused_params, lambda *_, **__: given
    try:
        model = build(rank, world, case)
    finally:
        ours.fused_params = original
    comm_ops.set_gradient_division(True)  # TorchRec's default: the mean of the ranks
    set_weights(model, case)
    for step in case.batches(world)[:2]:
        step_on(model, case, [{**f, "grad": f["grad"] * world} for f in step[rank]])
    return contents(model)


def test_adaptive_regularization_by_knobs(pools):
    params = {
        "learning_rate": 0.1,
        "ema_beta": 0.9,
        "ar_alpha": 0.5,
        "min_shrinkage": 0.1,
        "eps": 1e-8,
    }
    case = Case({"a": "row"}, coldrow.RowUpdate(AR.optimizer, coldrow.LinearClipped(0.5, 0.1)))
    _, emb = single(case, 2, 2)
    got = assemble(pools[2].run(knobs, params), arrays(emb))
    assert all(bits(got[k]) == bits(v) for k, v in arrays(emb).items())


def refusals(rank, world):
    quiet()
    import torchrec
    from torchrec.distributed import sharding_plan as plans
    from torchrec.distributed.types import ShardingEnv

    from coldrow import torchrec as ours

    said = []

    def attempt(rows: int, kernel: str | None, params: dict[str, Any]) -> None:
        config = torchrec.EmbeddingBagConfig(
            num_embeddings=rows, embedding_dim=4, name="t", feature_names=["f"]
        )
        module = torchrec.EmbeddingBagCollection([config])
        sharder = ours.EmbeddingBagCollectionSharder(params)
        plan = plans.construct_module_sharding_plan(
            module,
            {"t": plans.row_wise(compute_kernel=kernel)},
            sharder=sharder,
            local_size=world,
            world_size=world,
            device_type="cpu",
        )
        import torch.distributed as dist

        try:
            sharder.shard(
                module, plan, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu")
            )
        except (TypeError, ValueError) as error:
            said.append(str(error))

    good = ours.fused_params(AR)
    attempt(8, None, good)
    attempt(3, "fused", good)
    attempt(8, "fused", {})
    attempt(8, "fused", {**good, "optimizer": 1})
    attempt(8, "fused", {**good, "ar_alpha": 1.0})
    attempt(8, "fused", {"coldrow": True, "update": 3})
    attempt(8, "fused", good)  # accepted
    return said


def test_refused(pools):
    for said in pools[2].run(refusals):
        dense, one_row, stock, unknown, both, no_update = said
        assert "compute_kernel: got 'dense', accepted: 'fused'" in dense
        assert "table 't': 3 rows make a shard of one row" in one_row
        assert "fused_params: accepted: {'coldrow': True" in stock
        assert (
            "fused_params: got 'optimizer' beside 'coldrow', accepted: coldrow, update" in unknown
        )
        assert "got ['ar_alpha'] beside 'update'" in both
        assert "update: got 3, accepted: a coldrow.RowUpdate" in no_update
