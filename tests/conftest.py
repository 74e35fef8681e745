"""What all tests share: one core a process, and examples that are the same in every run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch or NumPy: tests run side by side

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "bdpo", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("bdpo")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs all tests of a file, which share models and browsers; each chapter goes where there is time."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileOrChapter(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, test = nodeid.split("::", 1)
            return nodeid if test.startswith("test_runs_at_its_smallest_parameters") else file

    return ByFileOrChapter(config, log)
