"""What every benchmark needs: its experiment, where it was made (device, versions, commit), and where results go."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("torch", "transformers", "bitsandbytes", "galore-torch", "apollo-torch", "peft", "hf_osd")


def describe() -> dict[str, object]:
    """Device, cores, versions of the libraries compared, and the commit (with `+` where files are changed)."""
    return {
        "device": device_name(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def device_name() -> str:
    """A name that makes a folder: the GPU's, or `cpu_2_cores`."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "_").lower()
    return f"cpu_{os.cpu_count()}_cores"


def results_folder() -> Path:
    """`results/<device>/` beside this file, made if missing."""
    folder = Path(__file__).parent / "results" / device_name()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/hf_osd")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def load_experiment(name: str) -> dict[str, Any]:
    """experiments/<name>.json."""
    file = Path(__file__).parent / "experiments" / f"{name}.json"
    if not file.is_file():
        raise SystemExit(
            f"There is no {file}; known: {', '.join(sorted(f.stem for f in file.parent.glob('*.json')))}."
        )
    return json.loads(file.read_text())
