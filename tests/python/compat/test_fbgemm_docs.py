"""coldrow.compat.fbgemm: what importing it brings, and that docs/from-fbgemm.md lists all of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from fbgemm_cases import OWN, THEIRS, WITHOUT_EFFECT, ar_states, flat_checkpoint  # noqa: E402

from coldrow.compat import fbgemm  # noqa: E402
from coldrow.compat.fbgemm import (  # noqa: E402
    SplitTableBatchedEmbeddingBagsCodegen,
)
from coldrow.compat.fbgemm.arguments import ONLY_DEFAULT  # noqa: E402

DOCS = Path(__file__).parents[3] / "docs" / "from-fbgemm.md"


# ------------------------------------------------------------------------------- imports and docs


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_imported_only_when_asked_for_and_without_fbgemm():
    show = "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'fbgemm_gpu', 'torchrec'}), 'coldrow.compat' in sys.modules)"
    assert run_python(f"import sys, coldrow; {show}") == "[] False"
    block = "sys.modules['fbgemm_gpu'] = None; sys.modules['torchrec'] = None"
    code = f"import sys; {block}; import coldrow.compat.fbgemm; del sys.modules['fbgemm_gpu'], sys.modules['torchrec']; {show}"
    assert run_python(code) == "['torch'] True"


def test_all_names_are_there():
    assert sorted(fbgemm.__all__) == sorted(set(fbgemm.__all__))
    for name in fbgemm.__all__:
        assert hasattr(fbgemm, name)


def table_rows(heading: str) -> dict[str, str]:
    """First column to the rest of the table under a heading of the docs."""
    section = DOCS.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = {}
    for line in section.splitlines():
        if match := re.match(r"\| `(.+?)` *\|(.+)\|$", line):
            for name in match[1].split("`, `"):
                rows[name] = match[2]
    return rows


def test_the_docs_list_every_argument():
    assert list(table_rows("Constructor arguments")) == list(THEIRS)
    assert list(table_rows("coldrow's own arguments")) == OWN
    for name, row in table_rows("Constructor arguments").items():
        assert ("refused" in row) == (name in ONLY_DEFAULT), name
        assert ("no effect" in row) == (name in WITHOUT_EFFECT), name


def test_the_docs_list_every_method():
    rows = table_rows("Methods and attributes")
    own = {
        name
        for name, value in vars(SplitTableBatchedEmbeddingBagsCodegen).items()
        if not name.startswith("_")
    }
    assert own <= {name.split("(")[0] for name in rows}
    forward = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.forward).parameters
    assert list(table_rows("Arguments of a call")) == [n for n in forward if n != "self"]


def test_the_docs_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(blocks[0], names)
    assert names["tbe"].iter.tolist() == [1]
    checkpoint, weights = flat_checkpoint([(1000, 16)], [0], ar_states([(1000, 16)], 30), 30)
    names["checkpoint"] = checkpoint
    exec(blocks[1], names)
    assert names["tbe"].iter.tolist() == [30]
    assert torch.equal(names["tbe"].split_embedding_weights()[0], weights[0])
    assert torch.equal(names["state"].weights[0], weights[0])
