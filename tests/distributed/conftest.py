"""One pool of processes for each number of ranks, for all tests."""

import pytest
from workers import Workers


@pytest.fixture(scope="session")
def pools():
    pools = {world: Workers(world) for world in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture(params=[2, 4], ids=["2ranks", "4ranks"])
def workers(request, pools):
    return pools[request.param]
