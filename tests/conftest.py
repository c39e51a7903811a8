"""Settings that hold for all tests."""

import os
from collections.abc import Iterator

# As in pwopt.cli; the test processes share the machine. Before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None, database=None)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither recall what other versions measured, nor leave anything behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PWOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
