"""`hf-osd show`: tables that can be read, JSON that can be parsed, and the same numbers in both."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_osd import create_osd_optimizer
from hf_osd.cli.main import main
from hf_osd.cli.show_report import plot
from hf_osd.hub import ProjectionState


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model before and after three steps, the latter with its P beside it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    # With a P that does not move and no decay, all of the change lies in its subspace.
    optimizer = create_osd_optimizer(model, "osd_adamw", rank=4, subspace="static")
    for _ in range(3):
        ids = torch.randint(0, 32, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "tuned", max_shard_size="5KB")
    ProjectionState.from_optimizer(optimizer).save_pretrained(folder / "tuned")
    ProjectionState.from_optimizer(optimizer).save_pretrained(folder / "only_p")
    return {path.name: str(path) for path in folder.iterdir()}


def show(capsys, *words: str) -> str:
    main(["show", *words])
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["show", *words])
    assert not capsys.readouterr().out
    message = str(caught.value)
    assert message.startswith("hf-osd show: ") and "\n" not in message
    return message


def test_the_table_of_a_saved_p(folders, capsys):
    lines = show(capsys, folders["only_p"]).splitlines()
    assert lines[0] == f"{folders['only_p']}: 14 projections, 0.00 MB in float32"
    assert "optim osd_adamw" in lines[1] and "subspace static" in lines[1] and "step 3" in lines[1]
    assert lines[3].split() == ["parameter", "shape", "rank", "side", "orthogonality"]
    row = next(line for line in lines if "layers.1.self_attn.k_proj" in line)
    assert row.split()[:6] == ["model.layers.1.self_attn.k_proj.weight", "8", "x", "16", "4", "left"]
    rows = lines[3:19]
    assert len({len(line) for line in rows}) == 1 and "orthogonality: mean" in lines[-1]


def test_the_share_of_the_change(folders, capsys):
    words = (folders["tuned"], "--base", folders["base"])
    report = json.loads(show(capsys, *words, "--json"))
    assert report["bytes"] == sum(4 * min(row["shape"]) * row["rank"] for row in report["parameters"])
    for row in report["parameters"]:
        assert row["share"] == pytest.approx(1, abs=1e-4)  # changes of 1e-3 beside weights of 1, in float32
        assert row["random_share"] == 4 / min(row["shape"]) and row["orthogonality"] < 1e-5
    lines = show(capsys, *words).splitlines()
    assert lines[3].split()[-2:] == ["share", "random"] and lines[5].split()[-2:] == ["100.0%", "25.0%"]
    assert lines[-1] == "share of the change in P's subspace: mean 100.0% of 14 weights"
    # the same with the model named, from a folder that holds P only
    other = json.loads(show(capsys, folders["only_p"], *words[1:], "--model", folders["tuned"], "--json"))
    assert other["parameters"] == report["parameters"]


def test_weights_that_did_not_change_have_no_share(folders, capsys):
    words = (folders["only_p"], "--base", folders["base"], "--model", folders["base"])
    assert show(capsys, *words).endswith("mean - of 0 weights; 14 without (unchanged, or not found)\n")
    assert {row["share"] for row in json.loads(show(capsys, *words, "--json"))["parameters"]} == {None}


def test_a_base_saved_without_its_head_is_found(folders, capsys, tmp_path):
    LlamaForCausalLM.from_pretrained(folders["base"]).model.save_pretrained(tmp_path)
    report = json.loads(show(capsys, folders["tuned"], "--base", str(tmp_path), "--json"))
    assert all(row["share"] == pytest.approx(1, abs=1e-4) for row in report["parameters"])


@pytest.mark.parametrize("with_base", [False, True])
def test_the_plot(folders, capsys, tmp_path, with_base):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    output = show(capsys, folders["tuned"], "--plot", str(path), *(["--base", folders["base"]] if with_base else []))
    assert "14 projections" in output and path.read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_each_projection_once(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    rows = [
        {"name": f"h.{layer}.{kind}", "orthogonality": 0.1, "share": 0.5, "holder": holder and f"h.{layer}.{holder}"}
        for layer in range(3)
        for kind, holder in (("k.weight", "q.weight"), ("q.weight", None))
    ]
    plot(rows, str(tmp_path / "out.png"))
    orthogonality, share = drawn[0].axes
    (q,), both = orthogonality.lines, share.lines
    assert list(q.get_xdata()) == [0, 1, 2] and len(both) == 2
    assert q.get_color() == both[1].get_color() != both[0].get_color()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["q", "k"]


def test_names_without_layers_can_be_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("head.weight", "h.0.experts.3.w", "h.1.experts.12.w")
    plot([{"name": name, "orthogonality": 0.1, "holder": None} for name in names], str(tmp_path / "out.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x", "--model", "y"), "--model needs --base"),
        (("no/such/folder",), "'no/such/folder' is neither a folder nor the id of a repository"),
        (("{base}",), "osd_config.json is missing in {base}"),
        (
            ("{only_p}", "--base", "{base}"),
            "{only_p} holds no model: it has no model.safetensors, nor an index. Give the trained",
        ),
        (("{tuned}", "--base", "{only_p}"), "{only_p} holds no model: it has no model.safetensors"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(words, message, folders, capsys):
    assert message.format(**folders) in refused(capsys, *(word.format(**folders) for word in words))


def copy_p(folders, folder, **config) -> str:
    shutil.copytree(folders["only_p"], folder)
    path = folder / "osd_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_what_a_repository_says_cannot_act_on_the_terminal(folders, capsys, tmp_path):
    evil = "\x1b]0;title\x07\x1b[2J\nsecond line \u202e\ud800"
    lines = show(capsys, copy_p(folders, tmp_path / "a", optim=evil, subspace=evil)).split("\n")
    assert lines[1].startswith(r"optim \x1b]0;title\x07\x1b[2J\nsecond line \u202e\ud800, ") and lines[2] == ""
    assert all(line.isprintable() for line in lines)
    message = refused(capsys, copy_p(folders, tmp_path / "b", step=evil))
    assert message.isprintable() and "'step' in osd_config.json in" in message
    report = json.loads(show(capsys, str(tmp_path / "a"), "--json"))
    assert report["config"]["optim"] == evil


@pytest.mark.parametrize("depth", [40, 300, 900, 100_000])
def test_deep_nesting_is_refused(folders, capsys, tmp_path, depth):
    folder = copy_p(folders, tmp_path / "p", more="MORE")
    config = tmp_path / "p" / "osd_config.json"
    config.write_text(config.read_text().replace('"MORE"', '{"a":[' * (depth // 2) + "]}" * (depth // 2)))
    message = refused(capsys, folder)
    assert "nested more than 32 levels" in message or "recursion" in message


def test_a_run_whose_p_is_in_its_checkpoints_is_told_which(folders, capsys, tmp_path):
    for step in (500, 1000):
        copy_p(folders, tmp_path / "out" / f"checkpoint-{step}")
    newest = tmp_path / "out" / "checkpoint-1000"
    assert refused(capsys, str(tmp_path / "out")).endswith(
        f"is missing in {tmp_path}/out: give {newest}, which has one."
    )
    show(capsys, str(newest))
    (newest / "osd_config.json").unlink()
    assert refused(capsys, str(newest)).endswith("(it is written last: a save was interrupted).")
    missing = (
        f"osd_config.json is missing in {folders['base']}: checkpoints have one, and ProjectionState.save_pretrained"
    )
    assert missing in refused(capsys, folders["base"])


def test_a_damaged_file_is_said_in_one_sentence(folders, capsys, tmp_path):
    ProjectionState.from_pretrained(folders["only_p"]).save_pretrained(tmp_path)
    (tmp_path / "osd_projection.safetensors").write_bytes(b"damaged")
    assert "has 7 bytes, osd_config.json says" in refused(capsys, str(tmp_path), "--json")
