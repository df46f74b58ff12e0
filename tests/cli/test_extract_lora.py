"""`hf-osd extract-lora`: a table that agrees with what is written, and one sentence where it cannot be."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_osd import create_osd_optimizer, extract_lora
from hf_osd.cli.main import main


peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=32))
    model.save_pretrained(folder / "base")
    optimizer = create_osd_optimizer(model, rank=4, lr=1e-2)
    for _ in range(3):
        model(input_ids=torch.randint(0, 32, (2, 8)), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "tuned")
    return {path.name: str(path) for path in folder.iterdir()}


def run(capsys, *words: str) -> list[str]:
    main(["extract-lora", *words])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("energy", [False, True])
def test_the_table_is_what_is_written(folders, capsys, tmp_path, energy):
    words = ("--energy", "0.7", "--max_rank", "3") if energy else ("--rank", "2")
    lines = run(capsys, folders["tuned"], "--base", folders["base"], *words, "--output", str(tmp_path))
    assert lines[0].split() == ["layer", "shape", "rank", "kept"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[2 : lines.index("")]}
    options = {"rank": "auto", "energy": 0.7, "max_rank": 3} if energy else {"rank": 2}
    with pytest.warns(UserWarning, match="leaves out"):
        adapter = extract_lora(folders["tuned"], folders["base"], **options)
    assert rows == {
        name: [str(layer.shape[0]), "x", str(layer.shape[1]), str(layer.rank), f"{100 * layer.kept:.1f}%"]
        for name, layer in adapter.layers.items()
    }
    assert len(rows) == 13 and lines[-1] == f"written to {tmp_path}"
    base = BertForSequenceClassification.from_pretrained(folders["base"])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    for name in rows:
        assert loaded.base_model.model.get_submodule(name).r["default"] == max(int(row[3]) for row in rows.values())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == folders["base"]
    text = "\n".join(lines)
    assert text.count("vLLM refuses") == 1  # said in the text, and warned of no more
    assert "carried in full, with the relative change: " in text and "bert.embeddings.word_embeddings (" in text
    size = re.search(
        r"13 layers keep ([\d.]+)% of their change, stored at rank \d; ([\d.]+) MB for .*, whose weights have "
        r"([\d.]+) MB",
        text,
    )
    assert size and float(size[1]) == pytest.approx(100 * adapter.kept, abs=0.06)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert float(size[2]) == pytest.approx(written / 1e6, abs=0.02)  # less the header
    assert float(size[3]) == pytest.approx(sum(p.numel() for p in base.parameters()) * 4 / 1e6, abs=0.1)


def test_nothing_is_written_unless_asked(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = run(capsys, folders["tuned"], "--base", folders["base"], "--carry", "all")
    assert " 16 " in lines[2] and "left out" not in "\n".join(lines) and not list(tmp_path.iterdir())


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("place", ["base", "tuned", "other", "link"])
def test_an_adapter_never_lands_beside_a_model(place, folders, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_osd.interop.extract_lora", lambda *_, **__: pytest.fail("computed"))
    shutil.copytree(folders["tuned"], tmp_path / "other")
    (tmp_path / "link").symlink_to(folders["tuned"])
    places = {"other": str(tmp_path / "other"), "link": str(tmp_path / "link")} | folders
    before = {name: contents(folder) for name, folder in places.items()}
    message = "holds a model \\(config.json" if place == "other" else "is the folder of a model that is read"
    with pytest.raises(SystemExit, match=f"^hf-osd extract-lora: .*{message}.*Choose another folder"):
        main(["extract-lora", folders["tuned"], "--base", folders["base"], "--output", places[place]])
    assert not capsys.readouterr().out
    assert {name: contents(folder) for name, folder in places.items()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{base}", "--base", "{base}"), "No matrix of a linear layer differs"),
        (("{tuned}", "--base", "{base}", "--rank", "0"), "`rank` must be a positive integer"),
        (("{tuned}", "--base", "{base}", "--max_rank", "4"), "--max_rank is for --energy"),
        (("{tuned}", "--base", "{base}", "--private"), "--private is for --push"),
        (("no/such/folder", "--base", "{base}"), "no/such/folder"),
    ],
)
def test_what_cannot_be_is_said(words, message, folders, capsys):
    with pytest.raises(SystemExit, match=f"^hf-osd extract-lora: .*{message}"):
        main(["extract-lora", *(word.format(**folders) for word in words)])
    assert not capsys.readouterr().out
