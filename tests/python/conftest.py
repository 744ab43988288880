"""``--stand-in FOLDER``: run tests through the CUDA module on the stand-in for a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import stand_in

# Their assertions say as much as those of a test.
pytest.register_assert_rewrite(
    "array_cases", "every_optimizer", "fbgemm_cases", "module_cases", "refusals", "sources"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stand-in", metavar="FOLDER", help="run through the stand-in for a device")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--stand-in"):
        config.stash[ENGINE] = stand_in.load(folder)


ENGINE = pytest.StashKey[stand_in.StandIn]()


@pytest.fixture(autouse=True)
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    engine = request.config.stash.get(ENGINE, None)
    if engine is None:
        yield
    elif request.node.get_closest_marker("host_only"):
        pytest.skip("about the processor's memory")
    else:
        with stand_in.in_use(engine, always_sync=True):
            yield
