"""Time coldrow's CUDA path beside torch's and beside the least that the GPU's memory allows.

    python benchmarks/gpu.py [--quick] [--json FILE] [--workloads G1u ...]
    python benchmarks/gpu.py --table FILE ...          render results as Markdown
    python benchmarks/gpu.py --device cpu --quick      try the program itself out, without a GPU

See README.md here for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from workloads import LARGE, WORKLOADS, Workload

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {**{name: WORKLOADS[name] for name in ("W1z", "W1u", "W3", "W4")}, **LARGE}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# One set of hyper-parameters for everything that has them.
LR, EPS, BETA, ALPHA, MIN_SHRINKAGE = 0.01, 1e-8, 0.99, 1e-3, 0.1
HALF_LIFE = 1000.0  # steps, of the read-charged schedule

FORWARD, BACKWARD, STEP = "forward", "backward+update", "step, as a graph"


# ------------------------------------------------------------------------------------------- device


class Device:
    """What is timed on, and how."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name.startswith("cuda")
        if not self.cuda:
            return
        self.properties = torch.cuda.get_device_properties(name)
        l2 = getattr(self.properties, "L2_cache_size", 0) or (64 << 20)
        self.sweep = torch.empty(4 * l2, dtype=torch.uint8, device=name)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def evict(self) -> None:
        """Put something else into the L2 cache, and keep the device busy while the host goes ahead."""
        if self.cuda:
            self.sweep.fill_(1)
            torch.cuda._sleep(3_000_000)  # about 2 ms: the launches that follow are waiting by then

    def time(self, run: Callable[[], Any]) -> float:
        """Milliseconds that ``run`` takes on the device, from first to last kernel."""
        if not self.cuda:
            begin = time.perf_counter_ns()
            run()
            return (time.perf_counter_ns() - begin) * 1e-6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def bandwidth(self, repeats: int, quick: bool) -> float:
        """Bytes read and written per second by a copy that no cache holds, median of many."""
        count = (1 << 24) if quick or not self.cuda else (1 << 30)
        source = torch.rand(count // 4, device=self.name)
        target = torch.empty_like(source)
        samples = []
        for _ in range(repeats + 3):
            self.evict()
            samples.append(self.time(lambda: target.copy_(source)))
        return 2 * count / (statistics.median(samples[3:]) * 1e-3)


# ------------------------------------------------------------------------------------------ batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch on the device, and the bytes that no program can do without."""

    indices: Tensor  # [T * B * L], int64
    offsets: Tensor  # [T * B + 1]
    unique: int  # distinct rows, over all tables

    def floor(self, work: Workload, phase: str, size: int, read: bool) -> int:
        """Bytes of a phase with weights, outputs and gradients of ``size`` bytes an element."""
        row = work.dim * size
        shared = self.indices.nbytes + self.offsets.nbytes + len(work.rows) * work.batch * row
        if phase == FORWARD:
            return self.unique * (row + (8 if read else 0)) + shared
        return self.unique * (2 * row + 16) + shared


def batches_of(work: Workload, count: int, device: Device) -> list[Batch]:
    """Draw batches; their rows are distinct enough that rotation leaves little in the caches."""
    base = np.cumsum([0, *work.rows[:-1]])
    out = []
    for batch in work.batches(count):
        indices = torch.from_numpy(batch.indices).to(device.name)
        number = torch.from_numpy(base).to(device.name).repeat_interleave(work.batch * work.bag)
        unique = len(torch.unique(indices + number))
        out.append(Batch(indices, torch.from_numpy(batch.offsets).to(device.name), unique))
    return out


# -------------------------------------------------------------------------------------- contestants


class Contestant:
    """Tables of its own, and the timed parts of a step on them."""

    name: str
    dtype = "fp32"
    read = False
    with_graph = False

    def forward(self, batch: Batch) -> Tensor:
        """Return the pooled rows, [B, T * D]."""
        raise NotImplementedError

    def backward(self, out: Tensor, grad: Tensor) -> None:
        """Bring ``grad`` to the tables and update them."""
        raise NotImplementedError

    def weight(self, table: int) -> Tensor:
        """Return the live weights of one table, [E, D]."""
        raise NotImplementedError


class Coldrow(Contestant):
    """Row-wise RMSprop with AR, charged on touch or on read; outputs of the weights' dtype."""

    with_graph = True

    def __init__(self, work: Workload, device: Device, charge: str, dtype: str) -> None:
        import coldrow
        from coldrow.nn import Table, TableBatchedEmbeddingBags

        self.read = charge == "read"
        self.name, self.dtype = f"coldrow {charge} {dtype}", dtype
        decay: Any = coldrow.LinearClipped(alpha=ALPHA, min_shrinkage=MIN_SHRINKAGE)
        if self.read:
            decay = coldrow.CumulativeLinear(half_life=HALF_LIFE)
        self.module = TableBatchedEmbeddingBags(
            [
                Table(f"t{t}", num_rows=rows, dim=work.dim, dtype=DTYPES[dtype], init=start_of(t))
                for t, rows in enumerate(work.rows)
            ],
            coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=LR, eps=EPS, ema_beta=BETA), decay),
            charge=charge,  # type: ignore[arg-type]
            device=device.name,
            output_dtype=DTYPES[dtype],
        )

    def forward(self, batch: Batch) -> Tensor:
        return self.module(batch.indices, batch.offsets)

    def backward(self, out: Tensor, grad: Tensor) -> None:
        out.backward(grad)

    def weight(self, table: int) -> Tensor:
        return self.module.weights[f"t{table}"].detach()


class Torch(Contestant):
    """One nn.EmbeddingBag(sparse=True) per table, with torch's SparseAdam or Adagrad."""

    def __init__(self, work: Workload, device: Device, optimizer: str) -> None:
        self.name = f"torch {optimizer} fp32"
        self.work = work
        self.bags = []
        for t, rows in enumerate(work.rows):
            weight = torch.empty(rows, work.dim, device=device.name)
            start_of(t)(weight)
            bag = nn.EmbeddingBag(
                rows, work.dim, mode="sum", sparse=True, include_last_offset=True, _weight=weight
            )
            self.bags.append(bag)
        parameters = [bag.weight for bag in self.bags]
        self.optimizer = getattr(torch.optim, optimizer)(parameters, lr=LR)
        self.cut: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def parts(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return indices and offsets per table, cut beforehand."""
        if id(batch) not in self.cut:
            work = self.work
            offsets = batch.offsets[: work.batch + 1].contiguous()
            self.cut[id(batch)] = [
                (part, offsets) for part in batch.indices.view(len(work.rows), -1).unbind()
            ]
        return self.cut[id(batch)]

    def forward(self, batch: Batch) -> Tensor:
        pooled = [bag(*part) for bag, part in zip(self.bags, self.parts(batch), strict=True)]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)

    def backward(self, out: Tensor, grad: Tensor) -> None:
        out.backward(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weight(self, table: int) -> Tensor:
        return self.bags[table].weight.detach()


def start_of(table: int) -> Callable[[Tensor], Any]:
    """Return what fills a table with the same numbers for every contestant, up to rounding."""

    def fill(weight: Tensor) -> None:
        generator = torch.Generator(weight.device).manual_seed(table)
        bound = weight.shape[1] ** -0.5
        rows = 1 << 20  # at a time, in float32, whatever the table's dtype
        for first in range(0, len(weight), rows):
            part = weight[first : first + rows]
            noise = torch.empty(part.shape, device=weight.device)
            part.copy_(noise.uniform_(-bound, bound, generator=generator))

    return fill


Maker = Callable[[Workload, Device], Contestant]


def contestants(args: argparse.Namespace) -> Iterator[tuple[str, Maker]]:
    """Name and maker of each; they are built one at a time, for their tables are large."""
    for dtype in args.dtypes:
        for charge in ("touch", "read"):
            yield (
                f"coldrow {charge} {dtype}",
                functools.partial(Coldrow, charge=charge, dtype=dtype),
            )
    for optimizer in ("SparseAdam", "Adagrad"):
        yield f"torch {optimizer} fp32", functools.partial(Torch, optimizer=optimizer)


# ------------------------------------------------------------------------------------------- checks


def check(work: Workload, contestant: Contestant, batch: Batch, grad: Tensor) -> None:
    """One step: outputs as torch's, rows of the batch updated as the formula says, no other row moved.

    Raises:
        SystemExit: naming what is wrong; nothing is timed then.
    """
    last = len(work.rows) - 1
    ids = batch.indices.view(len(work.rows), -1)[last]
    before = contestant.weight(last).clone()
    out = contestant.forward(batch)
    want = nn.functional.embedding_bag(ids.view(-1, work.bag), before.float(), mode="sum")
    tolerance = 1e-5 if contestant.dtype == "fp32" else 2e-2
    error = (out.detach()[:, -work.dim :].float() - want).abs().max().item()
    if not error <= tolerance:
        raise SystemExit(f"{contestant.name} on {work.name}: forward is off by {error}")
    contestant.backward(out, grad)
    after = contestant.weight(last)
    rows, place = ids.unique(return_inverse=True)
    still = torch.ones(len(before), dtype=torch.bool, device=before.device)
    still[rows] = False
    moved = torch.zeros_like(still)
    for first in range(0, len(before), 1 << 20):
        part = slice(first, first + (1 << 20))
        moved[part] = (before[part] != after[part]).any(1)
    if (moved & still).any() or not after[rows].isfinite().all():
        raise SystemExit(f"{contestant.name} on {work.name}: wrong rows changed")
    if isinstance(contestant, Coldrow):
        g = torch.zeros(len(rows), work.dim, device=before.device, dtype=torch.float64)
        bag = torch.arange(len(ids), device=before.device) // work.bag
        for part in torch.arange(len(ids), device=before.device).split(1 << 19):
            g.index_add_(0, place[part], grad[bag[part], -work.dim :].double())
        root = ((1 - BETA) * g.square().mean(1, keepdim=True)).sqrt()
        shrink = 1.0 if contestant.read else max(MIN_SHRINKAGE, 1 - LR * ALPHA)
        want = shrink * before[rows].double() - LR / (root + EPS) * g
        error = ((after[rows].double() - want).abs() / want.abs().clamp(min=0.05)).max().item()
        if not error <= (1e-4 if contestant.dtype == "fp32" else 2e-2):
            raise SystemExit(f"{contestant.name} on {work.name}: update is off by {error}")
    elif not moved[rows].float().mean().item() > 0.99:
        raise SystemExit(f"{contestant.name} on {work.name}: rows of the batch did not move")


# ------------------------------------------------------------------------------------------ measure


@dataclasses.dataclass
class Timing:
    """All samples of one phase of one contestant, in milliseconds, and its floor."""

    workload: str
    contestant: str
    phase: str
    floor_ms: float | None  # at the copy's bandwidth
    rows: int  # lookups per step
    samples: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def summary(self) -> dict[str, Any]:
        low, _, high = (
            statistics.quantiles(self.samples, n=4, method="inclusive")
            if len(self.samples) > 1
            else self.samples * 3
        )
        return {**dataclasses.asdict(self), "median": self.median, "q1": low, "q3": high}


def measure(
    work: Workload,
    contestant: Contestant,
    batches: list[Batch],
    grads: list[Tensor],
    device: Device,
    bandwidth: float,
    repeats: int,
) -> list[Timing]:
    """Time forward and backward apart, batches in rotation, the cache emptied before each."""
    size = DTYPES[contestant.dtype].itemsize
    samples: dict[str, list[float]] = defaultdict(list)
    for n in range(-3, repeats):  # what is below 0 is not counted
        batch, grad = batches[n % len(batches)], grads[n % len(grads)]
        device.evict()
        out = None

        def forward(batch: Batch = batch) -> None:
            nonlocal out
            out = contestant.forward(batch)

        took = device.time(forward)
        device.evict()
        took_back = device.time(functools.partial(contestant.backward, out, grad))
        if n >= 0:
            samples[FORWARD].append(took)
            samples[BACKWARD].append(took_back)
    unique = statistics.fmean(b.unique for b in batches)
    typical = dataclasses.replace(batches[0], unique=round(unique))
    floors = {
        phase: typical.floor(work, phase, size, contestant.read) / bandwidth * 1e3
        for phase in (FORWARD, BACKWARD)
    }
    if device.cuda and contestant.with_graph:
        samples[STEP] = time_graph(contestant, batches, grads, device, repeats)
        floors[STEP] = floors[FORWARD] + floors[BACKWARD]
    return [
        Timing(work.name, contestant.name, phase, floors.get(phase), work.ids, taken)
        for phase, taken in samples.items()
    ]


def time_graph(
    contestant: Contestant, batches: list[Batch], grads: list[Tensor], device: Device, repeats: int
) -> list[float]:
    """Time whole steps as replays of a CUDA graph: what is left when launches cost nothing."""
    own = Batch(batches[0].indices.clone(), batches[0].offsets.clone(), 0)
    grad = grads[0].clone()

    def step() -> None:
        contestant.backward(contestant.forward(own), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    samples = []
    for n in range(-3, repeats):
        own.indices.copy_(batches[n % len(batches)].indices)
        grad.copy_(grads[n % len(grads)])
        device.evict()
        took = device.time(graph.replay)
        if n >= 0:
            samples.append(took)
    return samples


# What kernels of a step belong to, by their names; the first that fits counts.
PARTS = {
    "sort": r"[Rr]adix[_]?[Ss]ort|[Oo]nesweep|RadixSort",
    "update": r"kernel::apply\b|kernel::apply<",
    "long runs": r"kernel::sum_parts|kernel::sum_slices",
    "runs": r"kernel::(linearise|count_runs|scan_counts|write_runs|find_tables|deal_runs)",
    "lookup": r"kernel::lookup",
    "checks and the rest": r"",
}


def profile(
    contestant: Contestant, batches: list[Batch], grads: list[Tensor], device: Device
) -> dict[str, float]:
    """Device milliseconds per step by part, from torch's profiler; empty where it sees nothing."""
    if not device.cuda:
        return {}
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    steps = 10
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for n in range(steps):
            device.sweep.fill_(1)
            contestant.backward(
                contestant.forward(batches[n % len(batches)]), grads[n % len(grads)]
            )
        torch.cuda.synchronize()
    parts: dict[str, float] = defaultdict(float)
    for event in seen.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or "fill" in event.name.lower():
            continue
        part = next(part for part, names in PARTS.items() if re.search(names, event.name))
        parts[part] += event.time_range.elapsed_us() * 1e-3 / steps
    return dict(parts)


def time_torch_sort(batch: Batch, device: Device, repeats: int) -> list[float]:
    """Time torch.sort of the same keys as int32, a radix sort of pairs over all of their bits."""
    keys = batch.indices.int()
    samples = []
    for n in range(-3, repeats):
        device.evict()
        took = device.time(lambda: torch.sort(keys, stable=True))
        if n >= 0:
            samples.append(took)
    return samples


# ------------------------------------------------------------------------------------------- results


def environment(device: Device, bandwidth: float) -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("coldrow", "torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    facts: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": "CPU (a trial of the program, no figures)",
        "copy_bytes_per_second": bandwidth,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **versions,
    }
    if device.cuda:
        p = device.properties
        facts["device"] = p.name
        facts["capability"] = f"{p.major}.{p.minor}"
        facts["multiprocessors"] = p.multi_processor_count
        facts["l2_bytes"] = getattr(p, "L2_cache_size", None)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem",
            "--format=csv,noheader",
        ]
        try:
            facts["driver_and_clocks"] = subprocess.run(
                query, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            facts["driver_and_clocks"] = None
    return facts


def render(result: dict[str, Any]) -> str:
    """Return a result as Markdown: one table per workload, then the comparisons asked of it."""
    facts = result["environment"]
    rate = facts["copy_bytes_per_second"] / 1e12
    lines = [
        f"{facts['device']}, copy {rate:.2f} TB/s, torch {facts['torch']}, CUDA {facts['cuda']}, "
        f"coldrow {facts['coldrow']}, {facts['time'][:10]}",
    ]
    medians = {}
    for work in dict.fromkeys(t["workload"] for t in result["timings"]):
        lines += ["", f"**{work}** ({result['workloads'][work]})", ""]
        lines += [
            "| | phase | ms | quartiles | x floor | lookups/us |",
            "|---|---|---|---|---|---|",
        ]
        for t in result["timings"]:
            if t["workload"] != work:
                continue
            medians[work, t["contestant"], t["phase"]] = t["median"]
            over = f"{t['median'] / t['floor_ms']:.2f}" if t["floor_ms"] else ""
            lines.append(
                f"| {t['contestant']} | {t['phase']} | {t['median']:.4f} | {t['q1']:.4f} to {t['q3']:.4f} "
                f"| {over} | {t['rows'] / t['median'] / 1e3:.0f} |"
            )
        if alone := result["torch_sort"].get(work):  # (not yet there in a run that was cut off)
            lines.append(
                f"\ntorch.sort of the same ids as int32, ms: {statistics.median(alone):.4f}"
            )
        for name, parts in result["parts"].get(work, {}).items():
            split = ", ".join(f"{part} {ms:.4f}" for part, ms in parts.items())
            lines.append(f"\n{name}, kernels of a step by the profiler, ms: {split}")
    ratios = [
        (f"{above} / {below}, {phase}", above, below, phase)
        for phase in (FORWARD, BACKWARD)
        for above, below in (
            ("torch SparseAdam fp32", "coldrow touch fp32"),
            ("torch Adagrad fp32", "coldrow touch fp32"),
            ("coldrow touch fp32", "coldrow touch fp16"),
            ("coldrow touch fp32", "coldrow touch bf16"),
            ("coldrow read fp32", "coldrow touch fp32"),
        )
    ]
    works = list(result["workloads"])
    lines += [
        "",
        "| ratio of medians | " + " | ".join(works) + " |",
        "|---" * (len(works) + 1) + "|",
    ]
    for title, above, below, phase in ratios:
        cells = []
        for work in works:
            pair = medians.get((work, above, phase)), medians.get((work, below, phase))
            cells.append(f"{pair[0] / pair[1]:.2f}" if None not in pair else "")
        if any(cells):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += [f"\nnote: {text}" for text in result["notes"]]
    return "\n".join(lines)


def smaller(work: Workload) -> Workload:
    """Return a workload that a trial runs in no time."""
    return dataclasses.replace(
        work, rows=tuple(max(10, rows // 200) for rows in work.rows), batch=max(8, work.batch // 64)
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu: a trial of the program itself")
    parser.add_argument(
        "--quick", action="store_true", help="few repeats; on a CPU also small tables"
    )
    parser.add_argument(
        "--json", type=Path, help="result file; default: benchmarks/results/gpu-NAME.json"
    )
    parser.add_argument("--workloads", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", default="", help="contestants whose name matches this pattern")
    parser.add_argument("--repeats", type=int, help="samples per phase (50; quick: 5)")
    parser.add_argument("--batches", type=int, default=6, help="batches taken in rotation")
    parser.add_argument(
        "--table", nargs="+", type=Path, help="render result files and do nothing else"
    )
    args = parser.parse_args()
    args.repeats = args.repeats or (5 if args.quick else 50)
    return args


def run(
    work: Workload,
    make: Maker,
    batches: list[Batch],
    device: Device,
    bandwidth: float,
    repeats: int,
) -> tuple[list[Timing], dict[str, float]]:
    """Build a contestant, check it, and time it; its memory goes with the call."""
    contestant = make(work, device)
    generator = torch.Generator(device.name).manual_seed(7)
    shape = (work.batch, len(work.rows) * work.dim)
    dtype = DTYPES[contestant.dtype]
    grads = [
        torch.randn(shape, device=device.name, generator=generator).to(dtype)
        for _ in range(min(3, len(batches)))
    ]
    check(work, contestant, batches[0], grads[0])
    gc.collect()
    gc.disable()
    try:
        taken = measure(work, contestant, batches, grads, device, bandwidth, repeats)
    finally:
        gc.enable()
    return taken, profile(contestant, batches, grads, device)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result, if it is to be kept."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    if args.table:
        print("\n\n".join(render(json.loads(path.read_text())) for path in args.table))
        return
    if args.device.startswith("cuda"):
        import coldrow

        if not torch.cuda.is_available() or not coldrow.cuda.is_available():
            raise SystemExit(
                "no GPU: torch.cuda.is_available() and coldrow.cuda.is_available() are "
                f"{torch.cuda.is_available()} and {coldrow.cuda.is_available()}. "
                "--device cpu --quick tries the program out."
            )
    if not args.device.startswith("cuda"):
        torch.set_num_threads(1)
    device = Device(args.device)
    bandwidth = device.bandwidth(args.repeats, args.quick)
    facts = environment(device, bandwidth)
    print(" ".join(f"{key}={value}" for key, value in facts.items()), flush=True)
    result: dict[str, Any] = {
        "environment": facts,
        "settings": {key: str(value) for key, value in vars(args).items()},
        "notes": [],
        "workloads": {},
        "timings": [],
        "parts": {},
        "torch_sort": {},
    }
    path = args.json
    if path is None and device.cuda:
        short = re.sub(r"\W+", "-", str(facts["device"]).lower()).strip("-")
        path = RESULTS / f"gpu-{short}.json"
    for name in args.workloads:
        work = SHAPES[name] if device.cuda else smaller(SHAPES[name])
        result["workloads"][name] = str(work).partition(": ")[2]
        batches = batches_of(work, args.batches, device)
        for contestant_name, make in contestants(args):
            if not re.search(args.only, contestant_name):
                continue
            try:
                taken, parts = run(work, make, batches, device, bandwidth, args.repeats)
            except torch.cuda.OutOfMemoryError:
                result["notes"].append(
                    f"{contestant_name} on {name}: does not fit into the device's memory, left out"
                )
                taken, parts = [], {}
            for t in taken:
                over = f"{t.median / t.floor_ms:.2f} x floor" if t.floor_ms else ""
                print(
                    f"{name:4} {t.contestant:22} {t.phase:18} {t.median:9.4f} ms  {over}",
                    flush=True,
                )
            result["timings"] += [t.summary() for t in taken]
            if parts:
                result["parts"].setdefault(name, {})[contestant_name] = parts
            gc.collect()
            if device.cuda:
                torch.cuda.empty_cache()
            write(path, result)  # so far: what was measured stays, should the run be cut off
        result["torch_sort"][name] = time_torch_sort(batches[0], device, args.repeats)
    write(path, result)
    if path is not None:
        print(f"written: {path}")
    print("\n" + render(result))


if __name__ == "__main__":
    main()
