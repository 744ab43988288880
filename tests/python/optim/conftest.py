"""Threads of the tests of optimizers."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """The tables here are tiny: on a busy machine torch would spend its time waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
