"""Draw the pictures of the documents: decay schedules, and what a forward reads between touches.

Every number is coldrow's own (``coldrow.read_`` and ``coldrow.apply_``); nothing is computed here.

    python docs/plots.py            draw docs/images/*.svg anew
    python docs/plots.py --check    say which are stale: drawn by another script or from other numbers
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

import coldrow

IMAGES = Path(__file__).parent / "images"
Lines = dict[str, np.ndarray]


def factors(decay: coldrow.Decay, gaps: np.ndarray, lr: float) -> np.ndarray:
    """Return the decay's factor for each gap: what rows of ones read so long after their touch."""
    clock = int(gaps.max()) + 1
    state = {"prev_iter": (clock - gaps).astype(np.int32)}
    out = np.empty((len(gaps), 1), np.float32)
    update = coldrow.RowUpdate(coldrow.SGD(lr=lr), decay)
    rows = np.arange(len(gaps))
    coldrow.read_(
        out, update, np.ones_like(out), rows, state, step=clock + 1, epoch_start=clock - 600
    )
    return out[:, 0]


def decays() -> Lines:
    """Return decay schedules, by label, over gaps of 0 to 2000 steps."""
    gaps = np.arange(2001)
    lines = {"gap": gaps.astype(np.float32)}
    for decay in (
        coldrow.NoDecay(),
        coldrow.LinearClipped(alpha=0.1),
        coldrow.CumulativeLinear(half_life=500),
        coldrow.Exponential(half_life=500),
        coldrow.EpochGated(coldrow.CumulativeLinear(half_life=500)),
        coldrow.EpochReset(),
    ):
        lines[repr(decay)] = factors(decay, gaps, lr=0.01)
    return lines


def charges() -> Lines:
    """Return what a forward before each step reads of one row that is touched now and then."""
    decay = coldrow.CumulativeLinear(half_life=50)
    touches = (40, 80, 120, 260)
    steps = np.arange(1, 331)
    lines = {"step": steps.astype(np.float32)}
    for name, schedule, charge in (
        ("no decay", coldrow.NoDecay(), "touch"),
        ('charge="touch"', decay, "touch"),
        ('charge="read"', decay, "read"),
    ):
        update = coldrow.RowUpdate(coldrow.SGD(lr=1.0), schedule)
        weight, out = np.zeros((1, 1), np.float32), np.empty((1, 1), np.float32)
        state = coldrow.init_state(update, 1, 1, like=weight)
        row, push = np.array([0]), np.array([[-1.0]], np.float32)
        values = []
        for step in steps.tolist():
            if charge == "read":
                coldrow.read_(out, update, weight, row, state, step=step)
            values.append((out if charge == "read" else weight)[0, 0].copy())
            if step in touches:
                coldrow.apply_(update, weight, push, row, state, step=step)
        lines[name] = np.array(values, np.float32)
    return lines


DATA = {"decays": decays, "charges": charges}


def mark(lines: Lines) -> str:
    """What a picture was drawn from: this script and the numbers' bits."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for label, values in lines.items():
        digest.update(label.encode() + values.tobytes())
    return digest.hexdigest()


def stale() -> list[str]:
    """Return the names of pictures that are missing or were drawn from something else."""
    files = {name: IMAGES / f"{name}.svg" for name in DATA}
    return [
        name
        for name, file in files.items()
        if not file.exists() or mark(DATA[name]()) not in file.read_text()
    ]


def draw() -> None:
    """Write the pictures."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "font.size": 11,
            "svg.fonttype": "none",
            "svg.hashsalt": "coldrow",
        }
    )
    styles = ["-", "-", "-", "-", "--", ":"]

    def save(name: str, figure: plt.Figure, lines: Lines) -> None:
        metadata = {"Date": None, "Description": mark(lines)}
        figure.savefig(IMAGES / f"{name}.svg", metadata=metadata, bbox_inches="tight")

    lines = decays()
    gap = lines["gap"]
    figure, axes = plt.subplots(figsize=(8.5, 4.2))
    for (label, factor), style in zip(list(lines.items())[1:], styles, strict=True):
        axes.plot(gap, factor, style, label=label, linewidth=2)
    axes.annotate(
        "the running epoch began", (600, 0.62), (720, 0.75), arrowprops={"arrowstyle": "-"}
    )
    axes.set(
        xlabel="steps since the row was touched (lr = 0.01)", ylabel="factor", ylim=(-0.03, 1.05)
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    save("decays", figure, lines)

    lines = charges()
    figure, axes = plt.subplots(figsize=(8.5, 3.6))
    for (label, value), style in zip(list(lines.items())[1:], ["--", "-", "-"], strict=True):
        axes.step(lines["step"], value, style, label=label, linewidth=2, where="post")
    axes.set(
        xlabel="step (the row is touched at 40, 80, 120 and 260)", ylabel="what a forward reads"
    )
    axes.legend(loc="upper left", frameon=False)
    save("charges", figure, lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        found = stale()
        if found:
            sys.exit(f"stale: {', '.join(found)}; run: make plots")
    elif sys.argv[1:]:
        sys.exit("usage: python docs/plots.py [--check]")
    else:
        draw()
