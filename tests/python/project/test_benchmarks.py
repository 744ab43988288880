"""The benchmark's own logic: batches, medians, ratios, verdicts. Nothing is timed."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import contestants
import curves
import measuring
import parts
import report
import torch
from measuring import Timing
from workloads import POOLED, WORKLOADS, Workload

SMALL = Workload("small", rows=(500, 300), dim=16, batch=40, bag=3, zipf=1.05)
UNPOOLED = Workload("small", rows=(500,), dim=16, batch=40, bag=3, zipf=None, pooled=False)


@pytest.mark.parametrize("work", [SMALL, UNPOOLED], ids=["pooled", "none"])
def test_batches_have_the_shapes_they_say(work):
    first, second = work.batches(2)
    tables = len(work.rows)
    assert first.indices.shape == (work.ids,)
    assert first.offsets.tolist() == list(range(0, work.ids + 1, work.bag))
    rows = (work.batch, tables * work.dim) if work.pooled else (work.ids, work.dim)
    assert first.grad.shape == rows
    for ids, count in zip(first.indices.reshape(tables, -1), work.rows, strict=True):
        assert 0 <= ids.min() <= ids.max() < count
    assert (first.indices != second.indices).any()
    assert np.array_equal(first.indices, next(work.batches(2)).indices)  # a seed, not the clock


def contestants_of(work, only):
    start = [torch.empty(rows, work.dim).uniform_(-0.1, 0.1) for rows in work.rows]
    entered = []
    for name, make in contestants.candidates(work, ("fp32", "bf16"), "nearest"):
        if name.startswith(only):
            try:
                entered.append(make(start))
            except contestants.Missing:  # no compiler, no huge pages
                if name.startswith(("coldrow touch", "coldrow read", "torch")):
                    raise
    return entered


@pytest.mark.parametrize("work", [SMALL, UNPOOLED], ids=["pooled", "none"])
def test_contestants_pass_the_checks_before_timing(work):
    entered = contestants_of(work, ("coldrow", "torch", "floor"))
    expected = {c.name for c in entered}
    assert len(expected) == len(entered) >= (6 if work.pooled else 4)
    batches = [contestants.Batch.of(batch) for batch in work.batches(3)]
    measuring.warm_up(work, entered, batches, measuring.Notes())
    timings = measuring.measure(work, entered, batches, 1, 2, lambda: None)
    phases = {(t.contestant, t.phase) for t in timings}
    both = (contestants.FORWARD, contestants.BACKWARD)
    assert phases >= {(name, phase) for name in expected for phase in both}
    assert all(len(t.samples) == 2 for t in timings)


@pytest.mark.parametrize("fault", ["forward", "nothing moves", "too much moves"])
def test_a_contestant_that_does_not_do_its_work_is_caught(fault):
    (victim,) = [c for c in contestants_of(SMALL, "coldrow touch fp32")]
    batches = [contestants.Batch.of(batch) for batch in SMALL.batches(2)]
    inner = victim.backward
    if fault == "forward":
        victim.output = lambda table: victim.out[:, : victim.dim] + 0.01
    elif fault == "nothing moves":
        victim.backward = lambda batch: None
        victim.module.eval()
    else:

        def backward(batch):
            inner(batch)
            victim.weight(1).data.add_(1.0)

        victim.backward = backward
    with pytest.raises(SystemExit, match="forward is off" if fault == "forward" else "wrong rows"):
        measuring.warm_up(SMALL, [victim], batches, measuring.Notes())


def test_reference_kernels_of_fbgemm_are_noticed(monkeypatch):
    class Peer(contestants.Fbgemm):
        def __init__(self):
            self.name = "FBGEMM Adagrad fp32"

    monkeypatch.setattr(measuring, "CODE", measuring.defaultdict(int))
    notes = measuring.Notes()
    measuring.say_whether_compiled([Peer()], notes)
    assert len(notes.texts) == 1
    measuring.CODE[Peer().name, contestants.BACKWARD] = 4096
    measuring.say_whether_compiled([Peer()], quiet := measuring.Notes())
    assert not quiet.texts


def timing(workload, contestant, phase, *samples, threads=1):
    return Timing(workload, threads, contestant, phase, list(samples))


def rows_of(timings, title, kind="touch"):
    return [r for r in report.show_figures(timings) if (r["figure"], r["kind"]) == (title, kind)]


def test_medians_ratios_and_means():
    timings = [
        timing("W1z", "FBGEMM AR fp32", "forward", 8.0, 2.0, 9.0),
        timing("W1z", "coldrow touch fp32", "forward", 2.0, 1.0, 90.0),
        timing("W4", "FBGEMM AR fp32", "forward", 9.0),
        timing("W4", "coldrow touch fp32", "forward", 1.0),
        timing("W1z-none", "FBGEMM AR fp32", "forward", 100.0),
        timing("W1z-none", "coldrow touch fp32", "forward", 1.0),
        timing("W2", "FBGEMM AR fp32", "forward", 5.0),
    ]
    (row,) = [r for r in report.show_ratios(timings) if r["ratio"].startswith("FBGEMM AR")]
    assert {k: row[k] for k in ("W1z", "W4", "W1z-none")} == {"W1z": 4, "W4": 9, "W1z-none": 100}
    assert row["geomean"] == pytest.approx(6.0)  # of the pooled ones that have both
    assert "W2" not in row


@pytest.mark.parametrize(
    ("ours", "holds", "bounded"), [(1.0, True, True), (1.2, False, True), (2.0, False, False)]
)
def test_targets_to_be_reached(ours, holds, bounded):
    phase = contestants.BACKWARD
    timings = [timing(name, "FBGEMM AR fp32", phase, 4.6) for name in POOLED]
    timings += [timing(name, "coldrow touch fp32", phase, ours) for name in POOLED]
    (row,) = rows_of(timings, "backward+update, FBGEMM AR")
    assert (row["holds"], row["bound_holds"]) == (holds, bounded)
    assert not row["not_measured"]


def test_targets_not_to_be_passed_and_their_worst_workload(capsys):
    phase = contestants.BACKWARD
    timings = [timing(name, "floor", phase, 1.0) for name in POOLED]
    timings += [timing(n, "coldrow touch fp32", phase, 1.4 if n == "W3" else 1.0) for n in POOLED]
    (row,) = rows_of(timings, "... over floor + sort, 4K pages")
    assert (row["holds"], row["bound_holds"], row["worst_workload"]) == (True, False, "W3")
    assert "1.07 (1.40* W3)" in capsys.readouterr().out


def test_a_figure_says_which_of_its_workloads_were_not_run(capsys):
    phase = contestants.BACKWARD
    timings = [timing("W1u", f"coldrow touch {dtype}", phase, 1.0) for dtype in ("fp32", "bf16")]
    (row,) = rows_of(timings, "bf16 to fp32, rows/s, backward+update")
    assert row["not_measured"] == ["W4"]
    out = capsys.readouterr().out
    assert "1.00* (1.00 W1u)?" in out
    assert "not measured" in out


def test_figures_are_about_contestants_and_workloads_that_exist():
    names = {
        name
        for work in WORKLOADS.values()
        for name, _ in contestants.candidates(work, ("fp32", "fp16", "bf16"), "nearest")
    }
    for figure in report.FIGURES:
        for kind in figure.kinds:
            assert {figure.above.format(kind), figure.below.format(kind)} <= names
        assert set(figure.workloads) <= set(WORKLOADS)
    assert {name for pair in report.comparisons() for name in pair} <= names
    assert set(report.COLOURS) <= names


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    timings = [
        timing(name, contestant, phase, i + 1.0)
        for name in POOLED
        for i, contestant in enumerate((contestants.FLOOR, "coldrow touch fp32"))
        for phase in (contestants.FORWARD, contestants.BACKWARD)
    ]
    report.plot(timings, tmp_path / "plot.svg", "title")
    assert "coldrow touch fp32" in (tmp_path / "plot.svg").read_text()


def test_parts_of_a_step_lie_within_it():
    emptied = []
    found = parts.measure(SMALL, 3, lambda: emptied.append(1))
    assert len(emptied) >= 4 * 2  # before each contestant's step, the uncounted one's too
    for phase in ("forward", "backward+update"):
        assert 0 < found[f"{phase}: kernels"] < found[phase]
        assert found[f"{phase}: a Function that does nothing"] > 0


def test_threads_without_a_processor_are_noticed():
    of = [
        timing("W1z", "floor", "update", 2.0),
        timing("W1z", "floor", "update", 1.9, threads=2),
        timing("W4", "floor", "update", 2.0),
        timing("W4", "floor", "update", 1.1, threads=2),
        timing("W4", "floor", "sort", 1.0),
        timing("W4", "floor", "sort", 1.0, threads=2),  # not divided
        timing("W3", "floor", "update", 1.0, threads=2),  # nothing to compare with
    ]
    assert report.not_more_processors(of) == [("W1z", 2)]


@pytest.mark.parametrize("draw", curves.DRAWS)
def test_ids_of_the_curves(draw):
    rows, generator = 1_000_000, torch.Generator().manual_seed(1)
    drawn = curves.ids(rows, 50_000, draw, generator)
    assert 0 <= drawn.min() <= drawn.max() < rows
    _, counts = drawn.unique(return_counts=True)
    # The integral of x^-1.05 from 1 to 2 is 6.8 percent of that from 1 to 1e6.
    share = counts.max().item() / len(drawn)
    assert 0.04 < share < 0.1 if draw.startswith("Zipf") else share < 0.001
    assert all(math.gcd(2_654_435_761, n) == 1 for n in curves.ROWS)


def test_curves_measure_what_they_say():
    emb, memory = curves.table_of(50_000)
    assert memory["weight_bytes"] == 50_000 * curves.DIM * 2
    assert memory["state_bytes"] == 50_000 * 8
    cases = [({"draw": curves.DRAWS[0], **memory}, emb, 50_000, n) for n in (100, 1000)]
    points = curves.measure(cases, 3, 1, lambda: None)
    assert [p["indices"] for p in points] == [100, 1000]
    assert emb.clock == 2 * 6  # three batches once, then three rounds
    took = [p["forward_ms"] + p["backward_ms"] for p in points]
    assert [p["ns_per_index"] * p["indices"] * 1e-6 for p in points] == pytest.approx(took)


def test_exponents_of_curves():
    def point(rows, ms):
        return {"rows": rows, "forward_ms": ms / 2, "backward_ms": ms / 2}

    points = [point(10, 1.0), point(100, 1.0), point(1000, 10.0)]
    assert curves.exponents(points, "rows") == pytest.approx([0, 1])
