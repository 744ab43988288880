"""benchmarks/gpu.py, tried out on the CPU: what was measured stays, whatever comes after."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import gpu


def test_a_result_outlives_what_fails_later(tmp_path, monkeypatch):
    target = tmp_path / "result.json"
    options = (
        "--device cpu --quick --workloads W1z W1u --dtypes fp32 --repeats 2 --batches 1 --json"
    )
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options.split(), str(target)])
    measured, measure = [], gpu.measure

    def fails_twice(work, contestant, *rest):
        measured.append(contestant.name)
        if len(measured) == 2:
            raise torch.cuda.OutOfMemoryError("too large")
        if len(measured) == 6:  # the second workload's second
            raise KeyboardInterrupt
        return measure(work, contestant, *rest)

    monkeypatch.setattr(gpu, "measure", fails_twice)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu.main()
    finally:
        torch.set_num_threads(threads)
    result = json.loads(target.read_text())
    names = [(t["workload"], t["contestant"]) for t in result["timings"] if t["phase"] == "forward"]
    assert names == [
        *[("W1z", name) for i, name in enumerate(measured[:4]) if i != 1],
        ("W1u", measured[4]),
    ]
    assert result["notes"] == [
        f"{measured[1]} on W1z: does not fit into the device's memory, left out"
    ]
    assert all(len(t["samples"]) == 2 for t in result["timings"])
    text = gpu.render(result)  # without torch.sort of the workload that was cut off
    assert text.count("torch.sort of the same ids") == 1
    assert "W1u" in text
