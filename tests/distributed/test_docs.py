"""The code of docs/distributed.md runs, and docs/scale.md says what benchmarks/scale.py says."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale  # noqa: E402


def run_blocks(rank, world, blocks, path):
    names = {"path": path + "/one", "other_path": path + "/other"}
    for block in blocks:
        exec(block, names)
    return names["emb"].clock


def test_code_of_the_docs(pools, tmp_path):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), re.DOTALL
    )
    assert len(blocks) == 4
    try:
        import torchrec  # noqa: F401
    except ImportError:
        blocks = blocks[:3]
    assert pools[2].run(run_blocks, blocks, str(tmp_path)) == [1, 1]


def test_links():
    for name in ("distributed.md", "scale.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "docs" / name).read_text()):
            assert (ROOT / "docs" / link).exists(), link


def test_tables_are_what_the_model_computes():
    text = (ROOT / "docs/scale.md").read_text()
    for part in scale.on_paper():
        assert part in text


@pytest.mark.parametrize(("world", "summed_by"), [(2, "sender"), (4, "owner")])
def test_model_against_bytes_counted(world, summed_by):
    load = replace(scale.SMALL, charge="read", dtype="bfloat16")
    sent, said, *_ = scale.run(scale.row_sharded, world, load, summed_by, 2)
    assert sent == said  # at the collectives, and as the module counts
    by_hand = np.mean([scale.counted_by_hand(load, world, s, summed_by) for s in range(2)])
    assert sent == by_hand
    assert sent == pytest.approx(sum(scale.wire(load, world, summed_by).values()), rel=0.03)


@pytest.mark.parametrize("sharding", ["row-wise", "table-wise"])
def test_model_of_torchrec_against_bytes_counted(sharding):
    pytest.importorskip("torchrec")
    sent, *_ = scale.run(scale.torchrec_sharded, 2, scale.SMALL, sharding, 2)
    model = sum(scale.wire_torchrec(scale.SMALL, 2, sharding).values())
    assert sent == pytest.approx(model, rel=0.01)
