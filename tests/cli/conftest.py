"""Runs that several tests look at, trained once."""

from pathlib import Path

import pytest
from report_runs import train_runs


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory) -> dict[str, Path]:
    return train_runs(tmp_path_factory.mktemp("runs"))
