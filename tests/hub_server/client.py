"""Client code in its own process: huggingface_hub reads its environment (endpoint, token, cache) at import."""

import os
import subprocess
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .server import HubServer


def run_client(code: str, hub: "HubServer", **env: str) -> str:
    """
    Runs Python `code` as the user of `hub` and returns what it prints; fails with its output if it fails. `env` adds
    to the environment, for example `HF_HUB_DISABLE_XET="1"` or `HF_TOKEN=""`. The clients of one hub share their
    working directory and, below it, HF_HOME.
    """
    directory = hub.directory / "client"
    directory.mkdir(exist_ok=True)
    ours = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(directory / "hf_home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **ours, **env}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"the client failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout
