"""docs/errors.md, made of what the tests of bad input were refused: ``make errors``."""

from __future__ import annotations

import os
import pathlib
import re
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[3]
PAGE = ROOT / "docs" / "errors.md"
FOLDER = "tests/python/robustness"
# The headings of the page, and the files whose tests are below them.
SECTIONS = {
    "Functional": ["test_bad_arrays.py", "test_bad_state_arrays.py"],
    "Policies": ["test_bad_policies.py"],
    "Module": ["test_bad_modules.py"],
    "Optimizer": ["test_bad_optimizers.py"],
    "Memory": ["test_bad_memory.py"],
    "Own policies": ["test_bad_own_policies.py"],
}

HEAD = f"""\
# Errors

<!-- Written by `make errors` from what the tests were refused. Do not edit. -->

What coldrow says to bad input, word for word: one exception that names the argument, what was given and what is
accepted, raised before anything is written. Every line was raised by a case of
[test_bad_*.py](../{FOLDER}), which compare every byte of every array, table, state and
counter before and after; the last column is how many bytes those were (none where there is nothing yet, as when
a policy is made). A test fails when this page is not what the tests were told.

What no library can see is not refused: memory that its owner moved under an array (`numpy.ndarray.resize` with
`refcheck=False`), a torch tensor made of read-only memory (torch keeps no such flag), arrays changed by other
code during a call. A storage resized to nothing is refused wherever it is met; one that was only made smaller, by
the functions (the module trusts its own tables).
"""


@dataclass
class Refusal:
    """One exception that a test expected and got."""

    test: str
    kind: str
    message: str
    bytes: int


refusals: list[Refusal] = []


def record(kind: str, message: str, compared: int) -> None:
    """Keep what the running test was refused."""
    name = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2]
    test = re.match(r"\w+", name).group()
    # What a workspace takes is tuned now and then.
    message = re.sub(r"no memory for \d+ bytes", "no memory for N bytes", message)
    refusals.append(Refusal(test, kind, " ".join(message.split()), compared))


def sections() -> dict[str, str]:
    """The section of each test, in the order of the page."""
    return {
        test: section
        for section, files in SECTIONS.items()
        for file in files
        for test in re.findall(r"^def (test_\w+)", (ROOT / FOLDER / file).read_text(), re.MULTILINE)
    }


def render() -> str:
    """The page."""
    lines, section, test = [HEAD], None, None
    of = sections()
    merged: dict[tuple, list[int]] = {}
    for r in refusals:
        merged.setdefault((r.test, r.kind, r.message), []).append(r.bytes)
    for found in (k for name in of for k in merged if k[0] == name):
        name, kind, message = found
        if of[name] != section:
            section = of[name]
            lines.append(f"## {section}\n")
        if name != test:
            if test is not None and lines[-1].startswith("|"):
                lines.append("")
            test = name
            title = name.removeprefix("test_").replace("_", " ")
            lines.append(f"### {title[0].upper()}{title[1:]}\n")
            lines += ["| exception | message | bytes compared |", "|---|---|---|"]
        most = max(merged[found])
        escaped = message.replace("|", "\\|").replace("`", "'")
        if len(escaped) > 400:
            escaped = f"{escaped[:190]} ... {escaped[-190:]}"
        lines.append(f"| `{kind}` | `{escaped}` | {most or 'none'} |")
    text = "\n".join(lines) + "\n"
    return re.sub(r"(\|\n)(#)", r"\1\n\2", text)
