"""Time coldrow's CPU path beside its peers and beside the least that the machine allows.

    python benchmarks/cpu.py [--quick] [--json result.json] [--workloads W1z W4] ...

See README.md here for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import workloads
from torch import Tensor, nn
from workloads import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent

# One set of hyper-parameters for everything that has them.
LR, EPS, BETA, ALPHA, MIN_SHRINKAGE = 0.01, 1e-8, 0.99, 1e-3, 0.1
HALF_LIFE = 1000.0  # steps, of the read-charged schedule

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR, FLOOR_HUGE = "floor", "floor, 2M pages"
BACKWARD = "backward+update"


class Missing(Exception):
    """A contestant cannot run here; the text says why."""


@dataclass(frozen=True)
class Batch:
    """A batch as tensors: see ``workloads.Batch`` for the shapes."""

    indices: Tensor
    offsets: Tensor
    grad: Tensor

    @classmethod
    def of(cls, batch: workloads.Batch) -> Batch:
        """Copy NumPy arrays into tensors that torch has aligned to 64 bytes."""
        arrays = (batch.indices, batch.offsets, batch.grad)
        return cls(*(torch.from_numpy(array).clone() for array in arrays))


Phase = tuple[str, Callable[[Batch], Any]]


class Contestant:
    """One implementation, holding tables of its own that start from the same weights.

    ``phases`` are timed one after another and make one training step.
    """

    name: str
    tolerance = 1e-5  # of the first forward, against torch in float32

    def phases(self) -> Sequence[Phase]:
        """The timed parts of a step, in order."""
        return (("forward", self.forward), (BACKWARD, self.backward))

    def forward(self, batch: Batch) -> None:
        """Pool every bag into ``output()``."""
        raise NotImplementedError

    def backward(self, batch: Batch) -> None:
        """Bring ``batch.grad`` to the tables and update them."""
        raise NotImplementedError

    def output(self, table: int) -> Tensor:
        """Pooled rows of one table from the last forward, [B, D]."""
        raise NotImplementedError

    def weight(self, table: int) -> Tensor:
        """The live weights of one table, [E, D]."""
        raise NotImplementedError


class Coldrow(Contestant):
    """coldrow's module: row-wise RMSprop with AR, charged on touch or on read."""

    def __init__(self, work: Workload, start: list[Tensor], charge: str, dtype: str,
                 rounding: str, **policies: Any) -> None:  # fmt: skip
        try:
            import coldrow
            from coldrow.nn import Table, TableBatchedEmbeddingBags
        except ImportError as error:
            raise Missing(f"coldrow, which does not import ({error})") from error
        decay: Any
        if charge == "touch":
            decay = coldrow.LinearClipped(alpha=ALPHA, min_shrinkage=MIN_SHRINKAGE)
        else:
            decay = coldrow.CumulativeLinear(half_life=HALF_LIFE)
        stochastic = rounding == "stochastic" and dtype != "fp32"
        update = coldrow.RowUpdate(
            **{
                "optimizer": coldrow.RowwiseRMSprop(lr=LR, eps=EPS, ema_beta=BETA),
                "decay": decay,
                "rounding": coldrow.Stochastic(seed=0) if stochastic else coldrow.Nearest(),
                **policies,
            }
        )
        self.name = f"coldrow {charge} {dtype}"
        self.dim = work.dim
        self.tolerance = 1e-5 if dtype == "fp32" else 2e-2
        self.tables = [
            Table(
                f"table{t}",
                num_rows=rows,
                dim=work.dim,
                dtype=DTYPES[dtype],
                features=[f"feature{t}"],
                init=lambda weight, source=source: weight.copy_(source),
            )
            for t, (rows, source) in enumerate(zip(work.rows, start, strict=True))
        ]
        self.module = TableBatchedEmbeddingBags(self.tables, update, pooling="sum", charge=charge)

    def forward(self, batch: Batch) -> None:
        self.pooled = self.module(batch.indices, batch.offsets)

    def backward(self, batch: Batch) -> None:
        self.pooled.backward(batch.grad)

    def output(self, table: int) -> Tensor:
        return self.pooled[:, table * self.dim : (table + 1) * self.dim]

    def weight(self, table: int) -> Tensor:
        return self.module.weights[f"table{table}"]


class Fbgemm(Contestant):
    """FBGEMM's table-batched embedding with its JIT-compiled exact row-wise Adagrad."""

    jit_before: int | None = None

    def __init__(self, work: Workload, start: list[Tensor], dtype: str) -> None:
        try:
            from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
                BoundsCheckMode,
                EmbeddingLocation,
            )
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        except ImportError as error:
            raise Missing(f"FBGEMM, which does not import ({error})") from error
        if Fbgemm.jit_before is None:
            Fbgemm.jit_before = executable_anonymous_bytes()
        self.name = f"FBGEMM Adagrad {dtype}"
        self.dim = work.dim
        self.tolerance = 1e-5 if dtype == "fp32" else 2e-2
        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, work.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in work.rows],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=LR,
            eps=EPS,
            weights_precision=SparseType.FP32 if dtype == "fp32" else SparseType.FP16,
            output_dtype=SparseType.FP32,
            stochastic_rounding=False,
            bounds_check_mode=BoundsCheckMode.FATAL,  # a bad id raises, as it does in coldrow
        )
        for weight, source in zip(self.module.split_embedding_weights(), start, strict=True):
            weight.copy_(source)

    def forward(self, batch: Batch) -> None:
        self.pooled = self.module(batch.indices, batch.offsets)

    def backward(self, batch: Batch) -> None:
        self.pooled.backward(batch.grad)

    def output(self, table: int) -> Tensor:
        return self.pooled[:, table * self.dim : (table + 1) * self.dim]

    def weight(self, table: int) -> Tensor:
        return self.module.split_embedding_weights()[table]

    @classmethod
    def jit_bytes(cls) -> int:
        """Bytes of executable memory made since the first of these was built."""
        return executable_anonymous_bytes() - (cls.jit_before or 0)


class Torch(Contestant):
    """``nn.EmbeddingBag(sparse=True)``, one per table, with one of torch's sparse optimizers."""

    def __init__(self, work: Workload, start: list[Tensor], optimizer: str) -> None:
        self.name = f"torch {optimizer} fp32"
        self.bags = [
            nn.EmbeddingBag(
                rows, work.dim, mode="sum", sparse=True, include_last_offset=True,
                _weight=source.clone(),
            )
            for rows, source in zip(work.rows, start, strict=True)
        ]  # fmt: skip
        parameters = [bag.weight for bag in self.bags]
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default; said, it is silent
        self.optimizer: torch.optim.Optimizer
        if optimizer == "SparseAdam":
            self.optimizer = torch.optim.SparseAdam(parameters, lr=LR, eps=EPS)
        else:
            self.optimizer = torch.optim.Adagrad(parameters, lr=LR, eps=EPS)
        self.inputs: dict[int, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}

    def prepare(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Ids [B * L], offsets [B + 1] and gradient [B, D] of each table, cut up beforehand."""
        if id(batch) not in self.inputs:
            tables = len(self.bags)
            self.inputs[id(batch)] = (
                [part.clone() for part in batch.indices.chunk(tables)],
                [
                    (part - part[0]).clone()
                    for part in batch.offsets.unfold(
                        0, batch.grad.shape[0] + 1, batch.grad.shape[0]
                    )
                ],
                [part.contiguous() for part in batch.grad.chunk(tables, dim=1)],
            )
        return self.inputs[id(batch)]

    def forward(self, batch: Batch) -> None:
        indices, offsets, _ = self.prepare(batch)
        self.pooled = [bag(i, o) for bag, i, o in zip(self.bags, indices, offsets, strict=True)]

    def backward(self, batch: Batch) -> None:
        torch.autograd.backward(self.pooled, self.prepare(batch)[2])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def output(self, table: int) -> Tensor:
        return self.pooled[table]

    def weight(self, table: int) -> Tensor:
        return self.bags[table].weight.detach()


class Floor(Contestant):
    """The floor program: see floor.cpp. Sorting is a phase of its own."""

    library: ctypes.CDLL | None = None

    def __init__(self, work: Workload, start: list[Tensor], huge: bool) -> None:
        self.lib = self.compiled()
        self.name = FLOOR_HUGE if huge else FLOOR
        self.dim, self.tables, self.batch = work.dim, len(work.rows), work.batch
        self.step = 0
        self.base = torch.tensor([0, *itertools.accumulate(work.rows)])
        rows = sum(work.rows)
        huge_before = huge_page_bytes()
        self.weights = self.array(rows * work.dim, torch.float32, huge)
        self.state = self.array(rows * 2, torch.int32, huge)  # {float momentum1, int prev_iter}
        self.weights.view(rows, work.dim).copy_(torch.cat(start))
        self.state.zero_()
        granted = huge_page_bytes() - huge_before
        if huge and granted < 0.9 * self.weights.nbytes:
            raise Missing(f"{FLOOR_HUGE}: the kernel gave {granted:,} bytes of them")
        self.pooled = torch.zeros(work.batch, self.tables * work.dim)
        self.buffers = torch.zeros(2, work.ids, dtype=torch.int64)
        self.segments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def compiled(cls) -> ctypes.CDLL:
        """Build and load floor.cpp, once per run."""
        if cls.library is None:
            compiler = shlex.split(os.environ.get("CXX", "c++"))
            if shutil.which(compiler[0]) is None:
                raise Missing(f"floor, for want of a C++ compiler ({compiler[0]})")
            target = HERE.parent / "build" / "bench" / "floor.so"
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
            command = [*compiler, *flags, str(HERE / "floor.cpp"), "-o", str(target)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode:
                raise Missing(f"floor: {shlex.join(command)} failed\n{built.stderr}")
            cls.library = ctypes.CDLL(str(target))
            cls.library.floor_allocate.restype = ctypes.c_void_p
            cls.library.floor_sort.restype = ctypes.c_void_p
        return cls.library

    def array(self, count: int, dtype: torch.dtype, huge: bool) -> Tensor:
        """A flat tensor over pages of its own, unmapped with the contestant."""
        address = self.lib.floor_allocate(ctypes.c_size_t(count * 4), int(huge))
        if address is None:
            raise Missing(f"{FLOOR}, for want of memory")
        memory = (ctypes.c_char * (count * 4)).from_address(address)
        self.mapped = [*getattr(self, "mapped", []), (address, count * 4)]
        return torch.frombuffer(memory, dtype=dtype)

    def __del__(self) -> None:
        for address, size in getattr(self, "mapped", []):
            self.lib.floor_release(ctypes.c_void_p(address), ctypes.c_size_t(size))

    def phases(self) -> Sequence[Phase]:
        return (("forward", self.forward), ("sort", self.sort), ("update", self.backward))

    def forward(self, batch: Batch) -> None:
        failed = self.lib.floor_forward(
            *pointers(self.weights, self.base, batch.indices, batch.offsets),
            self.tables, self.batch, self.dim,
            *pointers(self.pooled), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise SystemExit(f"floor.cpp is not written for D={self.dim}")

    def sort(self, batch: Batch) -> Tensor:
        address = self.lib.floor_sort(
            *pointers(self.base, batch.indices, batch.offsets),
            self.tables, self.batch, *pointers(*self.buffers),
        )  # fmt: skip
        return self.buffers[0 if address == self.buffers[0].data_ptr() else 1]

    def backward(self, batch: Batch) -> None:
        self.step += 1
        rows, start, source = self.cut(batch)
        scalars = map(ctypes.c_float, (LR, EPS, BETA, ALPHA, MIN_SHRINKAGE))
        self.lib.floor_update(
            *pointers(self.weights, self.state, batch.grad, rows, start, source),
            ctypes.c_int64(len(rows)), self.dim, *scalars, self.step, torch.get_num_threads(),
        )  # fmt: skip

    def cut(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Segments of equal rows, made at a batch's first sight: rows, starts, gradient rows."""
        if id(batch) not in self.segments:
            pairs = self.sort(batch)
            rows, counts = torch.unique_consecutive(pairs >> 32, return_counts=True)
            start = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
            source = pairs & 0xFFFFFFFF
            self.segments[id(batch)] = (rows.int(), start.int(), source.int())
        return self.segments[id(batch)]

    def output(self, table: int) -> Tensor:
        return self.pooled[:, table * self.dim : (table + 1) * self.dim]

    def weight(self, table: int) -> Tensor:
        rows = slice(int(self.base[table]), int(self.base[table + 1]))
        return self.weights.view(-1, self.dim)[rows]


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    """The tensors' addresses as C arguments."""
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def executable_anonymous_bytes() -> int:
    """Executable memory of this process that no file backs: code made at run time."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, *rest = line.split()
        backing = rest[3] if len(rest) > 3 else ""
        if "x" in mode and (not backing or "memfd" in backing):
            low, high = (int(end, 16) for end in span.split("-"))
            total += high - low
    return total


def huge_page_bytes() -> int:
    """Anonymous memory of this process in transparent huge pages."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found.group(1)) * 1024 if found else 0


def l3_bytes() -> int:
    """Size of the last-level cache, as the kernel tells it; 32 MiB where it does not."""
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index3/size")
    ]
    return int(sizes[0].removesuffix("K")) * 1024 if sizes else 32 << 20


class Evictor:
    """Pushes everything else out of the caches and the TLB.

    Reads a buffer of three times the last-level cache, one value per cache line and in random
    order: caches that resist streaming keep part of what they held when the order is sequential.
    """

    def __init__(self) -> None:
        lines = 3 * l3_bytes() // 64
        self.buffer = torch.ones(lines * 16)
        self.order = torch.randperm(lines) * 16
        self.sink = torch.empty(lines)

    def __call__(self) -> None:
        torch.take(self.buffer, self.order, out=self.sink)


@dataclass
class Timing:
    """All samples of one phase of one contestant, in milliseconds."""

    workload: str
    threads: int
    contestant: str
    phase: str
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def summary(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {**asdict(self), "median": self.median, "q1": low, "q3": high}


def candidates(args: argparse.Namespace) -> Iterator[tuple[str, Callable[..., Contestant]]]:
    """Name and maker of every contestant that the command line asks for."""
    for dtype in args.dtypes:
        for charge in ("touch", "read"):
            yield (
                f"coldrow {charge} {dtype}",
                lambda w, s, charge=charge, dtype=dtype: Coldrow(
                    w, s, charge, dtype, args.rounding
                ),
            )
    for dtype in args.dtypes:
        if dtype != "bf16":  # FBGEMM has no bf16 weights on CPU
            yield f"FBGEMM Adagrad {dtype}", lambda w, s, dtype=dtype: Fbgemm(w, s, dtype)
    for optimizer in ("SparseAdam", "Adagrad"):
        yield f"torch {optimizer} fp32", lambda w, s, name=optimizer: Torch(w, s, name)
    yield FLOOR, lambda w, s: Floor(w, s, huge=False)
    yield FLOOR_HUGE, lambda w, s: Floor(w, s, huge=True)


def enter(work: Workload, args: argparse.Namespace, notes: list[str]) -> list[Contestant]:
    """Build the contestants of one workload; those that cannot run leave a note."""
    generator = torch.Generator().manual_seed(0)
    bound = work.dim**-0.5
    start = [
        torch.empty(rows, work.dim).uniform_(-bound, bound, generator=generator)
        for rows in work.rows
    ]
    entered = []
    for name, make in candidates(args):
        if not re.search(args.only, name):
            continue
        try:
            entered.append(make(work, start))
        except Missing as reason:
            note(notes, f"left out: {reason}")
    if not entered:
        raise SystemExit("no contestant left")
    return entered


def note(notes: list[str], text: str) -> None:
    """Print a remark once and keep it for the result file."""
    if text not in notes:
        notes.append(text)
        print(f"note: {text}", flush=True)


def warm_up(work: Workload, contestants: list[Contestant], batches: list[Batch]) -> None:
    """Run every batch once through every contestant, and check that each does its work.

    The first forward must give what torch gives in float32, the rows of a batch must move, and
    the rows of no batch must stay.
    """
    first = batches[0]
    last = len(work.rows) - 1  # the table to look at
    ids = first.indices.chunk(len(work.rows))[last]
    seen = torch.cat([batch.indices.chunk(len(work.rows))[last] for batch in batches]).unique()
    unseen = torch.ones(work.rows[last], dtype=torch.bool)
    unseen[seen] = False
    for contestant in contestants:
        before = contestant.weight(last).detach().float().clone()
        expected = nn.functional.embedding_bag(ids.view(-1, work.bag), before, mode="sum")
        for i, batch in enumerate(batches):
            for phase, run in contestant.phases():
                run(batch)
                if i == 0 and phase == "forward":
                    error = (contestant.output(last) - expected).abs().max().item()
                    if error > contestant.tolerance:
                        raise SystemExit(f"{contestant.name}: forward is off by {error}")
        after = contestant.weight(last).detach().float()
        moved = (after != before).any(dim=1)
        if not moved[seen].all() or moved[unseen].any() or not after.isfinite().all():
            raise SystemExit(f"{contestant.name}: wrong rows changed on {work.name}")
    compare_with_floor(contestants, last)


def compare_with_floor(contestants: list[Contestant], table: int) -> None:
    """The floor computes the same update as coldrow on touch: hold one against the other."""
    by_name = {contestant.name: contestant for contestant in contestants}
    for name in (FLOOR, FLOOR_HUGE):
        if name in by_name and "coldrow touch fp32" in by_name:
            ours = by_name["coldrow touch fp32"].weight(table)
            torch.testing.assert_close(
                by_name[name].weight(table), ours.detach(), rtol=1e-4, atol=1e-4, msg=name
            )


def measure(
    work: Workload,
    contestants: list[Contestant],
    batches: list[Batch],
    threads: int,
    args: argparse.Namespace,
    evict: Evictor,
) -> list[Timing]:
    """Time ``args.repeats`` rounds; in each, all contestants take the same batch in turn."""
    torch.set_num_threads(threads)
    timings: dict[tuple[str, str], Timing] = {}
    for round_ in range(-1, args.repeats):  # round -1 is not counted
        batch = batches[round_ % len(batches)]
        turn = round_ % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            for position, (phase, run) in enumerate(contestant.phases()):
                if position == 0 or args.evict == "phase":
                    evict()
                begin = time.perf_counter_ns()
                run(batch)
                took = (time.perf_counter_ns() - begin) * 1e-6
                if round_ >= 0:
                    key = (contestant.name, phase)
                    timings.setdefault(key, Timing(work.name, threads, *key))
                    timings[key].samples.append(took)
    for name in {name for name, _ in timings} & {FLOOR, FLOOR_HUGE}:
        parts = zip(timings[name, "sort"].samples, timings[name, "update"].samples, strict=True)
        samples = [sort + update for sort, update in parts]
        timings[name, BACKWARD] = Timing(work.name, threads, name, BACKWARD, samples)
    return list(timings.values())


def show(work: Workload, threads: int, timings: list[Timing]) -> None:
    """Print one workload's table."""
    cells = {(timing.contestant, timing.phase): timing for timing in timings}
    columns = ("forward", BACKWARD)
    print(f"\n{work}; {work.ids:,} ids; {threads} thread{'s' * (threads > 1)}")
    print(f"{'ms: median [quartiles], x floor':32}" + "".join(f"{c:>34}" for c in columns))
    for name in dict.fromkeys(timing.contestant for timing in timings):
        line = f"{name:32}"
        for phase in columns:
            timing = cells[name, phase]
            low, high = timing.quartiles
            base = cells.get((FLOOR, phase))
            ratio = f"{timing.median / base.median:6.2f}x" if base else "      -"
            spread = f"[{low:.2f}-{high:.2f}]"
            line += f"{timing.median:10.3f} {spread:>15} {ratio}"
        print(line)
    for name in (FLOOR, FLOOR_HUGE):
        if (name, "sort") in cells:
            sort, update = cells[name, "sort"].median, cells[name, "update"].median
            print(f"  {name}: sort {sort:.3f} + update {update:.3f}")


# What the closing summary compares: title, numerator, denominator.
COMPARISONS = (
    ("FBGEMM Adagrad / coldrow touch, fp32", "FBGEMM Adagrad fp32", "coldrow touch fp32"),
    ("FBGEMM Adagrad / coldrow read, fp32", "FBGEMM Adagrad fp32", "coldrow read fp32"),
    ("FBGEMM Adagrad / coldrow touch, fp16", "FBGEMM Adagrad fp16", "coldrow touch fp16"),
    ("torch Adagrad / coldrow touch, fp32", "torch Adagrad fp32", "coldrow touch fp32"),
    ("torch SparseAdam / coldrow touch, fp32", "torch SparseAdam fp32", "coldrow touch fp32"),
    ("coldrow touch, fp32 / floor", "coldrow touch fp32", FLOOR),
    ("coldrow touch, fp32 / floor, 2M pages", "coldrow touch fp32", FLOOR_HUGE),
    ("coldrow read / coldrow touch, fp32", "coldrow read fp32", "coldrow touch fp32"),
    ("coldrow touch, fp32 / bf16", "coldrow touch fp32", "coldrow touch bf16"),
)


def summarise(timings: list[Timing]) -> list[dict[str, Any]]:
    """Ratios of medians per workload, and their geometric mean; printed and returned."""
    medians = {(t.workload, t.threads, t.contestant, t.phase): t.median for t in timings}
    names = list(dict.fromkeys(timing.workload for timing in timings))
    summary = []
    for threads in dict.fromkeys(timing.threads for timing in timings):
        header = "".join(f"{name:>8}" for name in [*names, "geomean"])
        print(f"\nratios of medians, {threads} thread{'s' * (threads > 1)}")
        print(f"{'':56}{header}")
        for phase, (title, above, below) in itertools.product(("forward", BACKWARD), COMPARISONS):
            ratios = {
                name: medians[name, threads, above, phase] / medians[name, threads, below, phase]
                for name in names
                if (name, threads, above, phase) in medians
                and (name, threads, below, phase) in medians
            }
            if not ratios:
                continue
            mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
            cells = [f"{ratios[n]:8.2f}" if n in ratios else f"{'-':>8}" for n in names]
            print(f"{phase:16}{title:40}{''.join(cells)}{mean:8.2f}")
            summary.append(
                {"threads": threads, "phase": phase, "ratio": title, **ratios, "geomean": mean}
            )
    return summary


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("coldrow", "torch", "fbgemm-gpu-cpu", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "l3_bytes": l3_bytes(),
        "transparent_hugepage": pages.read_text().strip() if pages.exists() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        **versions,
    }


def say_what_fbgemm_is(args: argparse.Namespace, notes: list[str]) -> None:
    """State what stands in for what, from what is installed."""
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
    except ImportError:
        return
    version = importlib.metadata.version("fbgemm-gpu-cpu")
    note(
        notes,
        "FBGEMM runs row-wise Adagrad, its fastest path, and coldrow row-wise RMSprop with "
        "Adaptive Regularization: different optimizers that touch the same cache lines of "
        "weights and state. Only their cost is compared.",
    )
    if not any("RMSPROP" in kind.name for kind in EmbOptimType):
        note(notes, f"fbgemm-gpu-cpu {version} has no Adaptive Regularization (1.9 has, and "
             "needs torch 2.14); it is not measured here.")  # fmt: skip


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: under three minutes")
    parser.add_argument("--json", type=Path, help="write every sample and ratio to this file")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, help="rounds (30; quick: 7)")
    parser.add_argument("--batches", type=int, help="batches taken in rotation (8; quick: 3)")
    parser.add_argument("--only", default="", help="contestants whose name matches this pattern")
    parser.add_argument(
        "--rounding", choices=("nearest", "stochastic"), default="nearest",
        help="of coldrow's 16-bit weights",
    )  # fmt: skip
    parser.add_argument(
        "--evict", choices=("step", "phase"), default="step",
        help="empty the caches before each step, or before its backward too",
    )  # fmt: skip
    args = parser.parse_args()
    args.repeats = args.repeats or (7 if args.quick else 30)
    args.batches = args.batches or (3 if args.quick else 8)
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    notes: list[str] = []
    facts = environment()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    say_what_fbgemm_is(args, notes)
    evict = Evictor()
    timings: list[Timing] = []
    for name in args.workloads:
        work = WORKLOADS[name]
        torch.set_num_threads(max(args.threads))
        batches = [Batch.of(batch) for batch in work.batches(args.batches)]
        contestants = enter(work, args, notes)
        warm_up(work, contestants, batches)
        if any(isinstance(c, Fbgemm) for c in contestants) and Fbgemm.jit_bytes() <= 0:
            note(notes, "FBGEMM made no code at run time: it runs its slow reference kernels")
        gc.collect()
        gc.disable()
        for threads in args.threads:
            measured = measure(work, contestants, batches, threads, args, evict)
            show(work, threads, measured)
            restless = sum(high > 1.5 * low for low, high in (t.quartiles for t in measured))
            if restless > len(measured) // 4:
                note(notes, f"{name}, threads={threads}: a busy machine, do not use these figures")
            timings += measured
        gc.enable()
        del contestants
    summary = summarise(timings)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        result = {
            "environment": facts,
            "settings": settings,
            "notes": notes,
            "timings": [timing.summary() for timing in timings],
            "ratios": summary,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
