"""What a step costs on many ranks: a model on paper, and the same counted in processes of this machine.

    python benchmarks/scale.py              # the tables of docs/scale.md
    python benchmarks/scale.py --measure    # 2 and 4 gloo processes: bytes at the collectives, times

The model needs numpy and coldrow; measuring needs torch, and for its second half TorchRec (make
test-distributed makes such an environment: build/distributed-venv/bin/python).
"""

from __future__ import annotations

import argparse
import inspect
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

import coldrow

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class Load:
    """Tables of equal size, one feature each; every rank has a batch of ``bags`` of each feature."""

    rows: float  # of all tables
    tables: int
    dim: int
    bags: int
    lengths: tuple[int, ...]  # ids per bag, by table
    zipf: float = 1.05  # 0: uniform
    dtype: str = "float32"
    charge: str = "touch"

    @property
    def item(self) -> int:
        """Bytes of one value of a row."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]


# 26 features, of which six have several ids: 573,440 lookups for each rank and step.
LOAD = Load(1e9, 26, 64, 4096, (1,) * 20 + (20,) * 6)
# Small enough for a test, with every term of the model.
SMALL = Load(400_000, 4, 32, 512, (1, 1, 5, 5))


def distinct(rows: float, draws: float, zipf: float) -> float:
    """Return the expected number of distinct rows among ``draws`` of a Zipf distribution."""
    if zipf == 0:
        return float(-rows * np.expm1(-draws / rows))
    head = np.arange(1, min(rows, 10_000) + 1, dtype=np.float64)
    tail = (
        np.exp(np.linspace(np.log(10_000.5), np.log(rows + 0.5), 20_001)) if rows > 10_000 else None
    )

    def total(f) -> float:
        if tail is None:
            return float(f(head).sum())
        middle = np.sqrt(tail[1:] * tail[:-1])
        return float(f(head).sum() + (f(middle) * np.diff(tail)).sum())

    norm = total(lambda k: k**-zipf)
    return total(lambda k: -np.expm1(-draws * k**-zipf / norm))


def wire(load: Load, world: int, summed_by: str = "owner") -> dict[str, float]:
    """Bytes a rank of RowShardedEmbeddingBags sends to others in a step, by purpose.

    Rows are taken to fall on ranks evenly.
    """
    away = (world - 1) / world
    each = load.rows / load.tables
    lookups = load.bags * sum(load.lengths)
    rows = sum(distinct(each, load.bags * n, load.zipf) for n in load.lengths)
    # A bag's gradient goes once to each rank that owns rows of it.
    pairs = load.bags * sum(world * (1 - (1 - 1 / world) ** n) for n in load.lengths)
    key = 4 if load.tables * -(-each // world) < 2**31 else 8
    sent = {
        "header": (world - 1) * 8 * (2 + 1 + 2 * load.tables),
        "rows asked": away * rows * key,
        "rows sent": away * rows * load.dim * load.item,
        "state sent": away * rows * 4 if load.charge == "read" else 0,
        "gradients": away * (lookups * 4 + pairs * load.dim * 4)
        if summed_by == "owner"
        else away * rows * load.dim * 4,
        "status": 24,
    }
    return {k: float(v) for k, v in sent.items()}


def wire_torchrec(load: Load, world: int, sharding: str) -> dict[str, float]:
    """The same for an EmbeddingBagCollection sharded row-wise or table-wise by TorchRec.

    Row-wise each rank pools what it has of every bag of every rank; these parts are summed
    (reduce-scatter), and in backward each rank is given the gradients of all bags (all-gather).
    """
    away = (world - 1) / world
    lookups, bags = load.bags * sum(load.lengths), load.bags * load.tables
    pooled = bags * load.dim * 4
    by_rows = sharding == "row-wise"
    return {
        "ids": away * lookups * 8,
        "lengths": (world if by_rows else 1) * away * bags * 8,
        "pooled rows": (world if by_rows else 1) * away * pooled,
        "gradients": (world if by_rows else 1) * away * pooled,
    }


def state_bytes(optimizer: coldrow.RowUpdate, dim: int) -> int:
    """Bytes of state for each row."""
    shapes = optimizer.state_shapes(1, dim).values()
    return sum(4 * int(np.prod(shape)) for shape in shapes)


def memory(load: Load, world: int, update: coldrow.RowUpdate) -> tuple[float, float]:
    """Bytes on a rank: tables with their state, and what a step borrows at its widest."""
    held = load.rows / world * (load.dim * load.item + state_bytes(update, load.dim))
    each = load.rows / load.tables
    rows = sum(distinct(each, load.bags * n, load.zipf) for n in load.lengths)
    pairs = load.bags * sum(world * (1 - (1 - 1 / world) ** n) for n in load.lengths)
    lookups = load.bags * sum(load.lengths)
    # Rows on loan and as sent; then gradients as sent, as they came and as they are summed; ids as
    # int64 on their way: key, owner, slot, feature and the sorted copy.
    forward = 2 * rows * load.dim * load.item
    backward = 3 * pairs * load.dim * 4
    return held, max(forward, backward) + 5 * 8 * lookups


OPTIMIZERS = {
    "SGD": coldrow.SGD(),
    "RowwiseRMSprop": coldrow.RowwiseRMSprop(),
    "RowwiseAdagrad": coldrow.RowwiseAdagrad(),
    "PartialRowwiseAdam": coldrow.PartialRowwiseAdam(),
    "Adagrad": coldrow.Adagrad(),
    "Adam": coldrow.Adam(),
}
WORLDS = (8, 64, 256, 1024)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def on_paper() -> Iterator[str]:
    """Yield the tables of docs/scale.md."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name, optimizer in OPTIMIZERS.items():
            update = coldrow.RowUpdate(optimizer)
            cells = [
                f"{memory(replace(LOAD, rows=n, dtype=dtype), w, update)[0] / GIB:,.1f}"
                for n in (1e9, 1e11)
                for w in WORLDS
            ]
            rows.append([dtype, name, str(state_bytes(update, LOAD.dim)), *cells])
    head = ["table", "optimizer", "state, B/row"]
    head += [f"{n}, {w}" for n in ("10^9", "10^11") for w in WORLDS]
    yield table(head, rows)

    rows = []
    for total, label in ((1e9, "10^9"), (1e11, "10^11")):
        for dtype, charge, summed_by in (
            ("float32", "touch", "owner"),
            ("float32", "read", "owner"),
            ("float32", "touch", "sender"),
            ("bfloat16", "touch", "owner"),
            ("bfloat16", "read", "sender"),
        ):
            load = replace(LOAD, rows=total, dtype=dtype, charge=charge)
            cells = [f"{sum(wire(load, w, summed_by).values()) / MIB:,.1f}" for w in WORLDS]
            rows.append([label, f"RowSharded, {dtype}, {charge}, sums by {summed_by}", *cells])
        load = replace(LOAD, rows=total)
        for sharding in ("row-wise", "table-wise"):
            cells = [f"{sum(wire_torchrec(load, w, sharding).values()) / MIB:,.1f}" for w in WORLDS]
            rows.append([label, f"TorchRec, {sharding}", *cells])
    yield table(["rows", "wiring", *(f"{w} ranks" for w in WORLDS)], rows)

    rows = []
    for w in WORLDS:
        parts = wire(replace(LOAD, charge="read"), w)
        borrowed = memory(LOAD, w, coldrow.RowUpdate())[1]
        rows.append([str(w), *(f"{parts[k] / MIB:,.3f}" for k in parts), f"{borrowed / MIB:,.0f}"])
    yield table(["ranks", *wire(LOAD, 8), "borrowed memory, MiB"], rows)


# ------------------------------------------------------------------------------------------ measuring


def count_collectives(world: int, rank: int):
    """Count, at torch.distributed, the bytes this rank hands over for others, and the time it takes."""
    import torch.distributed as dist

    bytes_to_others: Counter[str] = Counter()
    seconds: Counter[str] = Counter()

    def size(x) -> int:
        return sum(map(size, x)) if isinstance(x, list) else x.numel() * x.element_size()

    def all_to_all(call) -> float:
        splits = call.get("input_split_sizes")
        own = splits[rank] / max(sum(splits), 1) if splits else 1 / world
        return size(call["input"]) * (1 - own)

    counted = {
        "all_to_all_single": all_to_all,
        "all_reduce": lambda call: size(call["tensor"]),
        "reduce_scatter": lambda call: size(call["input_list"]) * (world - 1) / world,
        "reduce_scatter_tensor": lambda call: size(call["input"]) * (world - 1) / world,
        "all_gather": lambda call: size(call["tensor"]) * (world - 1),
        "all_gather_into_tensor": lambda call: size(call["input_tensor"]) * (world - 1),
    }
    for name, of in counted.items():
        original = getattr(dist, name)

        def wrapped(*args, _name=name, _of=of, _original=original, **kwargs):
            call = inspect.signature(_original).bind(*args, **kwargs).arguments
            bytes_to_others[_name] += _of(call)
            begin = time.perf_counter()
            result = _original(*args, **kwargs)
            seconds[_name] += time.perf_counter() - begin
            return result

        setattr(dist, name, wrapped)
    return bytes_to_others, seconds


def batch(load: Load, rank: int, step: int):
    """Return this rank's indices and offsets. Ids are scattered over the rows, so over the ranks."""
    import torch

    rng = np.random.default_rng([step, rank])
    each = int(load.rows / load.tables)
    p = np.arange(1, each + 1, dtype=np.float64) ** -load.zipf
    edges = np.cumsum(p / p.sum())
    scattered = np.random.default_rng(7).permutation(each)
    indices, lengths = [], []
    for n in load.lengths:
        ids = np.searchsorted(edges, rng.random(load.bags * n)).clip(max=each - 1)
        indices.append(scattered[ids])
        lengths += [n] * load.bags
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(np.concatenate(indices)), torch.from_numpy(offsets)


def counted_by_hand(load: Load, world: int, step: int, summed_by: str) -> float:
    """The model on this very batch in place of expectations: mean over the ranks."""
    each = int(load.rows / load.tables)
    chunk = -(-each // world)
    total = 0.0
    for rank in range(world):
        indices, offsets = (a.numpy() for a in batch(load, rank, step))
        lengths = np.diff(offsets)
        bag = np.repeat(np.arange(len(lengths)), lengths)
        owner = indices // chunk
        away = owner != rank
        keys = np.unique((bag // load.bags * each + indices)[away])
        pairs = len(np.unique((bag * world + owner)[away]))
        sent = len(keys) * 4 + 24 + (world - 1) * 8 * (3 + 2 * load.tables)
        # Each row asked for is sent by somebody, with prev_iter if charged on read.
        sent += len(keys) * (load.dim * load.item + 4 * (load.charge == "read"))
        if summed_by == "owner":
            sent += int(away.sum()) * 4 + pairs * load.dim * 4
        else:
            sent += len(keys) * load.dim * 4
        total += sent
    return total / world


def row_sharded(rank: int, world: int, load: Load, summed_by: str, steps: int):
    """One rank's bytes and seconds for each step."""
    import torch
    import torch.distributed as dist

    from coldrow.distributed import RowShardedEmbeddingBags
    from coldrow.nn import Table

    dtype = getattr(torch, load.dtype)
    each = int(load.rows / load.tables)
    emb = RowShardedEmbeddingBags(
        [Table(f"t{i}", each, load.dim, dtype=dtype) for i in range(load.tables)],
        coldrow.RowUpdate(),
        charge=load.charge,
        sum_gradients=summed_by,
    )
    batches = [batch(load, rank, step) for step in range(steps)]
    emb(*batches[0]).sum().backward()
    emb.wire_bytes.clear()
    sent, seconds = count_collectives(world, rank)
    dist.barrier()
    begin = time.perf_counter()
    for one in batches:
        emb(*one).sum().backward()
    elapsed = time.perf_counter() - begin
    return (
        sum(sent.values()) / steps,
        sum(emb.wire_bytes.values()) / steps,
        elapsed / steps,
        sum(seconds.values()) / steps,
    )


def torchrec_sharded(rank: int, world: int, load: Load, sharding: str, steps: int):
    """The same, of TorchRec with coldrow's kernel."""
    import torch
    import torch.distributed as dist
    import torchrec
    from torchrec.distributed import sharding_plan as plans
    from torchrec.distributed.types import ShardingEnv

    from coldrow.torchrec import EmbeddingBagCollectionSharder, fused_params

    names = [f"t{i}" for i in range(load.tables)]
    each = int(load.rows / load.tables)
    module = torchrec.EmbeddingBagCollection(
        [
            torchrec.EmbeddingBagConfig(
                num_embeddings=each, embedding_dim=load.dim, name=n, feature_names=[n]
            )
            for n in names
        ]
    )
    sharder = EmbeddingBagCollectionSharder(fused_params(coldrow.RowUpdate(), charge=load.charge))
    how = {
        n: plans.row_wise(compute_kernel="fused")
        if sharding == "row-wise"
        else plans.table_wise(rank=i % world, compute_kernel="fused")
        for i, n in enumerate(names)
    }
    plan = plans.construct_module_sharding_plan(
        module, how, sharder=sharder, local_size=world, world_size=world, device_type="cpu"
    )
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    model = sharder.shard(module, plan, env, torch.device("cpu"))

    def step(indices, offsets) -> None:
        kjt = torchrec.KeyedJaggedTensor(keys=names, values=indices, offsets=offsets)
        model(kjt).wait().values().sum().backward()

    batches = [batch(load, rank, s) for s in range(steps)]
    step(*batches[0])
    sent, seconds = count_collectives(world, rank)
    dist.barrier()
    begin = time.perf_counter()
    for one in batches:
        step(*one)
    elapsed = time.perf_counter() - begin
    total = sum(sent.values()) / steps
    return total, total, elapsed / steps, sum(seconds.values()) / steps


def _process(rank: int, world: int, folder: str, function, arguments, queue) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    queue.put((rank, function(rank, world, *arguments)))
    dist.barrier()


def run(function, world: int, *arguments) -> np.ndarray:
    """Mean over the ranks of what ``function`` returns in ``world`` processes."""
    import multiprocessing
    import tempfile

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(r, world, folder, function, arguments, queue))
            for r in range(world)
        ]
        for p in processes:
            p.start()
        results = [queue.get(timeout=60) for _ in processes]
        for p in processes:
            p.join()
    return np.mean([values for _, values in results], axis=0)


def measured(steps: int = 8) -> Iterator[str]:
    """Yield the model beside what was counted."""
    rows = []
    for world in (2, 4):
        for dtype, charge, summed_by in (
            ("float32", "touch", "owner"),
            ("float32", "read", "owner"),
            ("float32", "touch", "sender"),
            ("bfloat16", "read", "owner"),
        ):
            load = replace(SMALL, dtype=dtype, charge=charge)
            sent, said, step, exchange = run(row_sharded, world, load, summed_by, steps)
            hand = np.mean([counted_by_hand(load, world, s, summed_by) for s in range(steps)])
            assert sent == said, (sent, said)
            model = sum(wire(load, world, summed_by).values())
            label = f"RowSharded, {dtype}, {charge}, sums by {summed_by}"
            rows.append([str(world), label, model, hand, sent, step, exchange])
        try:
            import torchrec  # noqa: F401
        except ImportError:
            continue
        for sharding in ("row-wise", "table-wise"):
            sent, _, step, exchange = run(torchrec_sharded, world, SMALL, sharding, steps)
            model = sum(wire_torchrec(SMALL, world, sharding).values())
            rows.append([str(world), f"TorchRec, {sharding}", model, None, sent, step, exchange])
    head = ["ranks", "wiring", "model, KiB", "model on the batch", "counted", "counted / model"]
    head += ["ms a step", "of it in collectives"]
    yield table(
        head,
        [
            [
                world,
                label,
                f"{model / KIB:,.1f}",
                "" if hand is None else f"{hand / KIB:,.1f}",
                f"{sent / KIB:,.1f}",
                f"{sent / model:.3f}",
                f"{1000 * step:.1f}",
                f"{1000 * exchange:.1f}",
            ]
            for world, label, model, hand, sent, step, exchange in rows
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="count in 2 and 4 processes")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    for part in measured(options.steps) if options.measure else on_paper():
        print(part)
