"""docs/compatibility.md: its blocks run where their library is installed, and its versions are those of the tests."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.step.geometry import ProjectedGeometry
from reference.tiny_models import tiny_llama


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^## (\S+)\n\n```(?:python|bash)\n(.*?)```", PAGE, re.M | re.S))
MODULES = {name: name.lower().replace("-", "_") for name in BLOCKS} | {"LLaMA-Factory": "llamafactory"}
VERSIONS = dict(re.findall(r"^\| \[(\S+)\]\(#\S+\) \| (\S+) \|", PAGE, re.M))
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
TEXTS = ["the film is good", "the film is bad", "good and long", "bad and long"] * 2


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def stepped(monkeypatch):
    """Our optimizers that have made steps."""
    found, original = [], OSD.step

    def step(self, *args, **kwargs):
        found.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(OSD, "step", step)
    return found


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 64, (12,), generator=generator) for _ in range(16)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=letters))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<eos>", eos_token="<eos>")


def llama_for(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=0, **sizes))


def sentence_model(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder / "bert")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder / "bert")
    return SentenceTransformer(str(folder / "bert"))


def names_for(library: str, folder: Path) -> dict[str, Any]:
    """What is the reader's own in a block."""
    if library in ("transformers", "peft", "accelerate", "Lightning"):
        return {"model": tiny_llama(), "dataset": rows()}
    if library == "timm":
        return {"dataset": [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1])) for _ in range(2)]}
    from datasets import Dataset

    if library == "trl":
        tokenizer = byte_tokenizer()
        dataset = Dataset.from_dict({"text": TEXTS})
        return {"model": llama_for(tokenizer), "tokenizer": tokenizer, "dataset": dataset}
    body, labels = sentence_model(folder), [int("good" in text) for text in TEXTS]
    if library == "sentence-transformers":
        columns = {"first": TEXTS, "second": TEXTS[::-1], "score": [float(label) for label in labels]}
        return {"model": body, "dataset": Dataset.from_dict(columns)}
    from setfit import SetFitModel
    from sklearn.linear_model import LogisticRegression

    data = Dataset.from_dict({"text": TEXTS, "label": labels})
    return {"model": SetFitModel(model_body=body, model_head=LogisticRegression()), "dataset": data}


@pytest.mark.parametrize("library", sorted(BLOCKS.keys() - {"LLaMA-Factory"}))
def test_a_block_trains_with_our_optimizer(library, folder, stepped):
    pytest.importorskip(MODULES[library])
    block = BLOCKS[library].replace('SFTConfig("out"', 'SFTConfig("out", use_cpu=True')  # it wants bfloat16 on a GPU
    exec(compile(block, f"{library} in compatibility.md", "exec"), names_for(library, folder))
    assert len(stepped) >= 2 and len(set(map(id, stepped))) == 1
    geometries = [weight.geometry for weight in stepped[0].weights]
    assert any(isinstance(geometry, ProjectedGeometry) for geometry in geometries)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_llama_factory(processes, folder):
    pytest.importorskip("llamafactory")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("model")
    llama_for(tokenizer).save_pretrained("model")
    rows = [{"instruction": "how is it?", "input": "", "output": text} for text in TEXTS]
    for name, content in (("films.json", rows), ("dataset_info.json", {"films": {"file_name": "films.json"}})):
        (folder / name).write_text(json.dumps(content))
    settings = {"stage": "sft", "do_train": True, "finetuning_type": "full", "model_name_or_path": "model"}
    settings |= {"dataset": "films", "dataset_dir": ".", "template": "default", "output_dir": "out", "use_cpu": True}
    settings |= {"optim": "osd_adamw8bit", "optim_args": "rank=8", "max_steps": 2, "logging_steps": 1}
    (folder / "train.yaml").write_text(json.dumps(settings))  # which is YAML
    words = [sys.executable, "-m", "hf_osd", *shlex.split(BLOCKS["LLaMA-Factory"])[1:]]
    launch = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"} if processes == 2 else {}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | launch)
    assert done.returncode == 0, done.stderr
    assert '"osd/pca_loss"' in (folder / "out" / "trainer_state.json").read_text()


def test_lightning_trains_the_same_weights_as_a_loop(folder):
    lightning, module = pytest.importorskip("lightning"), BLOCKS["Lightning"].partition("trainer =")[0]
    models, names = [tiny_llama(), tiny_llama()], {}
    models[1].load_state_dict(models[0].state_dict())
    exec(module, names)
    batches = torch.utils.data.DataLoader(rows(), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=2, **quiet).fit(names["Module"](models[0]), batches)
    optimizer = create_osd_optimizer(models[1], "osd_adamw", lr=1e-3, rank=8)
    for batch in [*batches, *batches]:
        models[1](**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_versions_are_those_of_the_tests():
    assert VERSIONS.keys() == BLOCKS.keys() and len(BLOCKS) == 9
    pinned = {name: version for name, version in VERSIONS.items() if name in PINNED}
    assert {"transformers", "trl", "peft", "accelerate"} == pinned.keys()
    assert pinned == {name: PINNED[name] for name in pinned}
