import json
import random
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

WORDS = "the optimizer keeps its moments in a subspace of low rank that learns from every gradient it sees".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps what the examples and `datasets` cache out of the user's cache and apart between tests."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def documents():
    """300 documents of 5 to 60 words, the same in every run."""
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) + f" {i}" for i in range(300)]


@pytest.fixture
def write_jsonl():
    """A function that writes JSON lines with the column `text`."""

    def write(path, texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def jsonl_folder(tmp_path, documents, write_jsonl):
    """A data folder with a training and a validation file."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", documents[:250])
    write_jsonl(folder / "validation.jsonl", documents[250:])
    return folder


@pytest.fixture
def tiny_config(tmp_path):
    """The path of a model of about 20,000 parameters."""
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "vocab_size": 32000,
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config))
    return path
