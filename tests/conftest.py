"""What all tests share: one core a process, and examples that are the same in every run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch or NumPy: tests run side by side

from pathlib import Path

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
