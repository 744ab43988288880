"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

import numpy as np

README = Path(__file__).parents[3] / "README.md"


def test_python_blocks_run(monkeypatch, tmp_path):
    monkeypatch.setenv("COLDROW_JIT_CACHE", str(tmp_path / "jit"))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names = {
        "weight": np.ones((4, 2), np.float32),
        "grad": np.ones((1, 2), np.float32),
        "indices": np.array([3]),
        "momentum1": np.zeros(4, np.float32),
        "prev_iter": np.zeros(4, np.int32),
    }
    for block in blocks:
        exec(block, names)
    assert names["emb"].clock == 1
    assert names["prev_iter"].tolist() == [0, 0, 0, 1]


def test_files_named_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
