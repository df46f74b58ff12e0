"""Shapes of the weights of the LLaMA family in `llama_configs/`, which the paper, GaLore and ReLoRA share."""

import json
from pathlib import Path


CONFIGS = Path(__file__).parents[1] / "llama_configs"


def config_file(model: str) -> Path:
    """`llama_<model>.json`, by either name, or another such file."""
    path = Path(model) if model.endswith(".json") else CONFIGS / f"llama_{model.removeprefix('llama_')}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem.removeprefix("llama_") for file in CONFIGS.glob("*.json")))
        raise SystemExit(f"There is no {path}; known: {known}.")
    return path


def sizes(model: str) -> tuple[int, int, int]:
    """Hidden size, intermediate size and number of blocks of a model."""
    config = json.loads(config_file(model).read_text())
    return config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]


def block_shapes(model: str) -> list[tuple[int, int]]:
    """Shapes of the seven matrices of one block: q, k, v, o; gate, up; down."""
    hidden, intermediate, _ = sizes(model)
    return [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
