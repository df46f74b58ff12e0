import json
import math
import re

import pytest

import pretrain_llama
import share_on_the_hub
from hf_osd.hub import ProjectionState
from hub_server import HubServer, run_client


REPO = "tester/shared"
SCRIPT = """
import runpy, sys
sys.argv = [{script!r}, *{options!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture
def tiny_config(tmp_path):
    """The path of a model of about 15,000 parameters."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64, "vocab_size": 300, **sizes}))
    return path


@pytest.fixture
def options(tmp_path, tiny_config, documents, write_jsonl):
    """A command line of six steps, after which five are compared."""
    data = write_jsonl(tmp_path / "text.jsonl", documents)
    given = {
        **{"repo_id": REPO, "dataset": data, "validation_fraction": 0.3, "model": tiny_config, "train_tokenizer": 300},
        **{"sequence_length": 32, "per_device_train_batch_size": 2, "max_steps": 6, "continue_steps": 5},
        **{"optim": "osd_adamw", "osd_rank": 4, "learning_rate": 0.02, "output_dir": tmp_path / "run"},
        **{"use_cpu": "true", "disable_tqdm": "true", "report_to": "none"},
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def test_it_shares_and_a_new_process_continues(options, tmp_path):
    script = share_on_the_hub.__file__
    with HubServer(tmp_path / "hub") as hub:
        code = SCRIPT.format(script=script, options=options)
        # Two processes: a Xet storage of this server can be opened by one at a time.
        printed = run_client(code, hub, HF_HUB_DISABLE_XET="1", PYTHONPATH=str(pretrain_llama.CONFIG_FOLDER.parent))
        files = hub.files(REPO)
        assert hub.commits(REPO)[0].title == "End of training"  # the new process has pushed nothing
    assert {"model.safetensors", "tokenizer.json", "osd_projection.safetensors", "osd_config.json"} <= set(files)
    assert not {path for path in files if "continued" in path or path.endswith(".pt")}

    results = json.loads((tmp_path / "run" / "continued.json").read_text())
    losses = {name: run["loss"] for name, run in results["runs"].items()}
    assert list(losses) == ["hub", "svd", "random"]
    assert all(len(values) == 5 and all(map(math.isfinite, values)) for values in losses.values())
    assert len({values[0] for values in losses.values()}) == 1  # the same weights and the same batch
    assert len({tuple(values) for values in losses.values()}) == 3
    for run in results["runs"].values():
        assert len(run["pca_loss"]) == 5 and all(0 < value < 1.2 for value in run["pca_loss"])
    # Of all subspaces the SVD's holds the most of the gradient that it was made from.
    first = {name: run["pca_loss"][0] for name, run in results["runs"].items()}
    assert first["svd"] < min(first["hub"], first["random"])

    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name in ("osd_projection.safetensors", "osd_config.json"):
        (pushed / name).write_bytes(files[name])
    state = ProjectionState.from_pretrained(pushed)
    assert results["projection"] == {"step": 6, "rank": 4, "sha256": share_on_the_hub.fingerprint(state)}

    assert re.search(r"step +P from the Hub +SVD of 1st gradient +random P\n1 ", printed)
    assert f"{losses['hub'][-1]:.4f}" in printed and "continued.png" in printed
    assert (tmp_path / "run" / "continued.png").stat().st_size > 10_000


def test_the_other_text_was_not_trained_on(options, tmp_path, documents, write_jsonl):
    other = write_jsonl(tmp_path / "other.jsonl", [f"entirely other words, number {i}" for i in range(100)])
    own, rest = share_on_the_hub.parse_arguments(options)
    args, _ = share_on_the_hub.run_arguments(own, rest, None)
    texts = pretrain_llama.load_text(args.dataset, validation_fraction=args.validation_fraction)
    tokenizer = pretrain_llama.prepare_tokenizer(args, texts)

    def text_of(own, blocks):
        found = share_on_the_hub.other_text(own, args, tokenizer, blocks)
        assert len(found) == blocks and all(len(block) == 32 for block in found["input_ids"])
        return tokenizer.decode([token for block in found["input_ids"] for token in block])

    # Every document ends with a number of its own; the text begins with whole documents.
    held_out = text_of(own, 10).split("</s>")[:-1]
    assert len(held_out) > 3 and set(held_out) <= set(documents) - set(texts.train["text"])
    own, _ = share_on_the_hub.parse_arguments([*options, "--continue_dataset", str(other)])
    assert "entirely other words, number" in text_of(own, 10)
    with pytest.raises(ValueError, match=r"has \d+ blocks of 32 tokens, 1000 are needed: lower --continue_steps"):
        share_on_the_hub.other_text(own, args, tokenizer, 1000)


def test_wrong_options_are_refused_before_training(options, monkeypatch):
    monkeypatch.setattr(pretrain_llama, "main", lambda argv: pytest.fail("it has begun to train"))
    with pytest.raises(ValueError, match="osd_init, osd_rank need an OSD optimizer"):
        share_on_the_hub.share([*options, "--optim", "adamw_torch"])
    with pytest.raises(ValueError, match="'init' is given twice"):
        share_on_the_hub.share([*options, "--optim_args", "init=svd"])
    with pytest.raises(ValueError, match="--continue_steps must be at least 1"):
        share_on_the_hub.share([*options, "--continue_steps", "0"])


def test_only_what_is_compared_differs(options):
    own, rest = share_on_the_hub.parse_arguments([*options, "--continue_learning_rate", "0.01"])
    first, *others = [
        share_on_the_hub.run_arguments(own, rest, init)[1].to_dict() for init, _, _ in share_on_the_hub.RUNS.values()
    ]
    assert (first["osd_init"], first["learning_rate"], first["push_to_hub"]) == (REPO, 0.01, False)
    for other in others:
        assert {key for key, value in first.items() if other[key] != value} == {"osd_init"}
