"""The pictures in the documents show what the library computes now."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "docs"))
import plots


def test_pictures_are_not_stale():
    assert plots.stale() == [], "run: make plots"


def test_a_change_of_numbers_or_labels_is_noticed():
    lines = plots.decays()
    before = plots.mark(lines)
    changed = {**lines, "gap": np.nextafter(lines["gap"], np.float32(9))}
    renamed = {f"{label} ": values for label, values in lines.items()}
    assert len({before, plots.mark(changed), plots.mark(renamed)}) == 3
