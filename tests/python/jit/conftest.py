"""Where the tests of coldrow.jit keep what they compile."""

import pytest


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("jit")


@pytest.fixture(autouse=True)
def cache(monkeypatch, session_cache):
    """A cache that the tests share, and not the user's."""
    monkeypatch.setenv("COLDROW_JIT_CACHE", str(session_cache))
    return session_cache


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache of the test's own, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("COLDROW_JIT_CACHE", str(folder))
    return folder
