"""Processes that run a test's functions together, as the ranks of a gloo process group."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

# Long enough for a loaded machine, short enough that a hang is a failure and not a lost hour.
PATIENCE = 60


def _serve(rank: int, world: int, folder: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE - 30),
    )
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            torch.manual_seed(0)
            answer = ("returned", function(rank, world, *arguments))
        except Exception as error:
            answer = ("raised", type(error).__name__, str(error), traceback.format_exc())
        pipe.send(answer)


class Workers:
    """``world`` processes; started at the first use, replaced after a hang."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.processes: list[Any] = []

    def start(self) -> None:
        self.folder = tempfile.mkdtemp()
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.pipes = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, self.folder, theirs), daemon=True
            )
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)
        self.collect(120)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.processes = []

    def collect(self, patience: float = PATIENCE) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(patience):
                    raise TimeoutError(f"rank {rank} of {self.world} hangs")
                answers.append(pipe.recv())
            except (EOFError, TimeoutError):
                self.stop()
                raise
        return answers

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, world, *arguments)`` came to on each rank.

        ("returned", value) or ("raised", type's name, message, traceback).
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        return self.collect()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return the values by rank, or fail with what the ranks raised."""
        outcomes = self.outcomes(function, *arguments)
        raised = [f"rank {r}:\n{o[-1]}" for r, o in enumerate(outcomes) if o[0] == "raised"]
        if raised:
            self.stop()  # the others may wait in a collective
            raise AssertionError("\n".join(raised))
        return [value for _, value in outcomes]
