"""The tests that docs/reliability.md names exist, and its figures say where they come from."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.compile(r"`(tests/[\w./-]+)?::(\w+)`")


def named() -> list[tuple[str, str]]:
    """(file, test) of each; ``::test`` is of the file named last."""
    found, file = [], ""
    for match in NAMED.finditer(TEXT):
        file = match[1] or file
        found.append((file, match[2]))
    return sorted(set(found))


@pytest.mark.parametrize(("file", "test"), named())
def test_named_test_exists(file, test):
    source = (ROOT / file).read_text()
    defined = rf"^def {test}\(" if file.endswith(".py") else rf"^TEST(_F|_P)?\(\w+, {test}\)"
    assert re.search(defined, source, re.MULTILINE), f"{file} has no {test}"


def test_every_cell_of_determinism_is_shown():
    section = TEXT.partition("## Determinism")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][
        1:
    ]
    assert len(rows) >= 8
    for row in rows:
        shown = NAMED.search(row[-1]) or "](" in row[-1] or row[-2].strip().startswith("no")
        assert shown, f"nothing shows that {row[0]}"


def test_figures_name_their_commit():
    for section in ("Faults", "Soak"):
        text = TEXT.partition(f"## {section}")[2].partition("\n## ")[0]
        assert re.search(r"`make \w+", text)
        assert re.search(r"at `[0-9a-f]{7,}`", text), f"{section} does not say what it ran on"
