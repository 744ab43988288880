"""The contestants: coldrow, its peers, and the floor, each behind the same few functions."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import workloads
from torch import Tensor, nn
from workloads import Workload

HERE = Path(__file__).resolve().parent

# One set of hyper-parameters for everything that has them.
LR, EPS, BETA, ALPHA, MIN_SHRINKAGE = 0.01, 1e-8, 0.99, 1e-3, 0.1
HALF_LIFE = 1000.0  # steps, of the read-charged schedule

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOOR, FLOOR_HUGE = "floor", "floor, 2M pages"
FORWARD, BACKWARD = "forward", "backward+update"


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
        return ((FORWARD, self.forward), (BACKWARD, self.backward))

    def forward(self, batch: Batch) -> None:
        """Look the batch up, into ``output()``."""
        raise NotImplementedError

    def backward(self, batch: Batch) -> None:
        """Bring ``batch.grad`` to the tables and update them."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the last forward's output, which is not to fall into the next one's time."""

    def output(self, table: int) -> Tensor:
        """What the last forward gave for one table, [B, D], or [B * L, D] unpooled."""
        raise NotImplementedError

    def weight(self, table: int) -> Tensor:
        """The live weights of one table, [E, D]."""
        raise NotImplementedError


class Fused(Contestant):
    """A table-batched module that updates its tables inside backward."""

    dim: int
    pooled: bool
    module: nn.Module

    def forward(self, batch: Batch) -> None:
        self.out = self.module(batch.indices, batch.offsets)

    def backward(self, batch: Batch) -> None:
        self.out.backward(batch.grad)

    def release(self) -> None:
        del self.out

    def output(self, table: int) -> Tensor:
        if not self.pooled:  # one table
            return self.out
        return self.out[:, table * self.dim : (table + 1) * self.dim]


class Nothing(torch.autograd.Function):
    """Takes part in autograd and does nothing: what no module of torch can go below."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, out: Any) -> Any:
        """Return ``out``."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        """Return no gradients."""
        return None, None


def own(kind: str, name: str, **fields: float) -> Any:
    """A policy of own_policy.hpp, compiled."""
    import coldrow

    try:
        return getattr(coldrow.jit, kind)(name, HERE / "own_policy.hpp", **fields)
    except RuntimeError as error:  # no compiler, or one that refuses
        raise Missing(f"coldrow own ({error})") from error


class Coldrow(Fused):
    """coldrow's module.

    "touch" and "read" are row-wise RMSprop with a decay that is charged then; "own" is an optimizer and
    a decay that are not coldrow's (own_policy.hpp), charged on read.
    """

    def __init__(self, work: Workload, start: list[Tensor], kind: str, dtype: str,
                 rounding: str, **policies: Any) -> None:  # fmt: skip
        try:
            import coldrow
            from coldrow.nn import Table, TableBatchedEmbeddingBags
        except ImportError as error:
            raise Missing(f"coldrow, which does not import ({error})") from error
        optimizer: Any = coldrow.RowwiseRMSprop(lr=LR, eps=EPS, ema_beta=BETA)
        decay: Any
        if kind == "touch":
            decay = coldrow.LinearClipped(alpha=ALPHA, min_shrinkage=MIN_SHRINKAGE)
        elif kind == "read":
            decay = coldrow.CumulativeLinear(half_life=HALF_LIFE)
        else:
            decay = own("decay", "Hyperbola", warmup=2.0, scale=HALF_LIFE)
            optimizer = own("optimizer", "RowwiseMax", lr=LR, eps=EPS, beta=BETA)
        stochastic = rounding == "stochastic" and dtype != "fp32"
        update = coldrow.RowUpdate(
            **{
                "optimizer": optimizer,
                "decay": decay,
                "rounding": coldrow.Stochastic(seed=0) if stochastic else coldrow.Nearest(),
                **policies,
            }
        )
        self.name = f"coldrow {kind} {dtype}"
        self.dim, self.pooled = work.dim, work.pooled
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
        self.module = TableBatchedEmbeddingBags(
            self.tables,
            update,
            pooling="sum" if work.pooled else "none",
            charge="touch" if kind == "touch" else "read",
        )

    def weight(self, table: int) -> Tensor:
        return self.module.weights[f"table{table}"]


class Fbgemm(Fused):
    """FBGEMM's table-batched embedding: "AR" or "Adagrad", which is exact and row-wise."""

    def __init__(self, work: Workload, start: list[Tensor], optimizer: str, dtype: str) -> None:
        try:
            from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
            from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
                BoundsCheckMode,
                EmbeddingLocation,
                PoolingMode,
            )
            from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
                ComputeDevice,
                SplitTableBatchedEmbeddingBagsCodegen,
            )
        except ImportError as error:
            raise Missing(f"FBGEMM, which does not import ({error})") from error
        self.name = f"FBGEMM {optimizer} {dtype}"
        how: dict[str, float] = {}
        kind = EmbOptimType.EXACT_ROWWISE_ADAGRAD
        if optimizer == "AR":
            if not hasattr(EmbOptimType, "ROWWISE_RMSPROP_AR"):
                raise Missing("FBGEMM AR: the FBGEMM installed has none (1.9 has)")
            how = {"ema_beta": BETA, "ar_alpha": ALPHA, "min_shrinkage": MIN_SHRINKAGE}
            kind = EmbOptimType.ROWWISE_RMSPROP_AR
        self.dim, self.pooled = work.dim, work.pooled
        self.tolerance = 1e-5 if dtype == "fp32" else 2e-2
        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, work.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in work.rows],
            optimizer=kind,
            learning_rate=LR,
            eps=EPS,
            weights_precision=SparseType.FP32 if dtype == "fp32" else SparseType.FP16,
            output_dtype=SparseType.FP32,
            pooling_mode=PoolingMode.SUM if work.pooled else PoolingMode.NONE,
            stochastic_rounding=False,
            bounds_check_mode=BoundsCheckMode.FATAL,  # a bad id raises, as it does in coldrow
            **how,
        )
        for weight, source in zip(self.module.split_embedding_weights(), start, strict=True):
            weight.copy_(source)

    def weight(self, table: int) -> Tensor:
        return self.module.split_embedding_weights()[table]


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

    def release(self) -> None:
        del self.pooled

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
            made = target.with_suffix(f".{os.getpid()}")  # another run may have the old one open
            command = [*compiler, *flags, str(HERE / "floor.cpp"), "-o", str(made)]
            built = subprocess.run(command, capture_output=True, text=True, check=False)
            if built.returncode:
                raise Missing(f"floor: {shlex.join(command)} failed\n{built.stderr}")
            made.replace(target)
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
        return ((FORWARD, self.forward), ("sort", self.sort), ("update", self.backward))

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


def candidates(
    work: Workload, dtypes: Sequence[str], rounding: str
) -> Iterator[tuple[str, Callable[[list[Tensor]], Contestant]]]:
    """Name and maker of every contestant of a workload; makers take the weights to start from."""
    for dtype in dtypes:
        for kind in ("touch", "read", "own"):
            yield (
                f"coldrow {kind} {dtype}",
                lambda s, kind=kind, dtype=dtype: Coldrow(work, s, kind, dtype, rounding),
            )
    for dtype in dtypes:
        if dtype != "bf16":  # FBGEMM has no bf16 weights on CPU
            for kind in ("AR", "Adagrad"):
                yield (
                    f"FBGEMM {kind} {dtype}",
                    lambda s, kind=kind, dtype=dtype: Fbgemm(work, s, kind, dtype),
                )
    if not work.pooled:
        return
    for optimizer in ("SparseAdam", "Adagrad"):
        yield f"torch {optimizer} fp32", lambda s, name=optimizer: Torch(work, s, name)
    yield FLOOR, lambda s: Floor(work, s, huge=False)
    yield FLOOR_HUGE, lambda s: Floor(work, s, huge=True)
