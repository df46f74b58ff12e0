"""The configurations say to accelerate what they are meant to say, and the example runs under the one for DDP."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from conftest import EXAMPLES
from hf_osd import OSDTrainingArguments


CONFIGS = EXAMPLES / "accelerate_configs"


def launch_environment(name: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "pretrain_llama.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == 2
    return prepare_multi_gpu_env(args)


def test_ddp():
    environment = launch_environment("ddp.yaml")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_USE_FSDP", "false") == "false"


def test_fsdp2(monkeypatch, tmp_path):
    for name, value in launch_environment("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading and "SHARDED" in str(plugin.state_dict_type)
    OSDTrainingArguments(output_dir=str(tmp_path), optim="osd_adamw", use_cpu=True)  # not refused
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="FSDP1"):
        OSDTrainingArguments(output_dir=str(tmp_path), optim="osd_adamw", use_cpu=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_pretraining_under_ddp(jsonl_folder, tiny_config, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp.yaml")]
    command += [str(EXAMPLES / "pretrain_llama.py"), "--dataset", str(jsonl_folder), "--model", str(tiny_config)]
    command += ["--output_dir", str(tmp_path / "run"), "--train_tokenizer", "300", "--sequence_length", "32"]
    command += ["--optim", "osd_adamw", "--osd_rank", "4", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    command += ["--use_cpu", "true"]
    subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(tmp_path / "cache")})
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tokens_seen"] == 2 * 2 * 2 * 32  # steps, processes, sequences, tokens
