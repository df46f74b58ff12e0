"""Shared by all tests."""

import gc
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent))  # tests import `reference`

# Tiny tensors: more threads only wait for each other, and results would depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = tempfile.TemporaryDirectory(prefix="hf_osd_tests_")  # not the user's, for results to depend on or to fill
os.environ["HF_HOME"] = CACHE.name
torch.set_num_threads(1)

# One server imports these and forks the processes that tests start: importing takes longer than what they do.
multiprocessing.set_forkserver_preload(
    ["hf_osd", "torch.distributed.fsdp", "torch.distributed.checkpoint", "transformers.trainer"]
)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="module")
def imported():
    """Modules are frozen: collecting garbage, as each training of a Trainer does, then takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def main_module(monkeypatch):
    """A script that `hf-osd run` made `__main__` does not stay: processes of a later test would run it anew."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
