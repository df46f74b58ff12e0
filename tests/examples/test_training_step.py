"""The benchmark of whole training steps."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import training_step  # noqa: E402
import training_step_report  # noqa: E402
import whole_models  # noqa: E402


CPU = torch.device("cpu")
LAYERS = "osd_adamw:source=activations"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    path.write_text(json.dumps(config | {"num_attention_heads": 4, "vocab_size": 100}))
    return str(path)


def test_every_contender_of_the_experiments_is_compared_with_adamw_beside_it(tiny: str):
    names = {
        name
        for file in BENCHMARKS.glob("experiments/training_step*.json")
        for name in json.loads(file.read_text())["contenders"]
    }
    row = training_step.measure((f"{tiny}@1", 4, 3), sorted(names), (2, 8), 2, CPU, torch.float32)
    assert row["seconds"].keys() == names and not row["left_out"] and (row["blocks"], row["all_blocks"]) == (1, 3)
    for name, entry in row["seconds"].items():
        assert 0 < entry["whole"]["minimum"] <= entry["whole"]["median"] and entry["first"] > 0
        assert sum(entry[part]["minimum"] for part in training_step_report.PARTS) <= entry["whole"]["minimum"]
        assert training_step.renews(name) or entry["renewal"] == 0
    beside = {entry["beside"]["median"] for entry in row["seconds"].values()}
    assert len(beside) == -(-(len(names) - 1) // 2)  # all but AdamW in groups of two


def test_methods_that_renew_their_projection_are_known():
    assert training_step.renews("galore_adamw") and training_step.renews(f"{LAYERS},subspace=random")
    assert not any(map(training_step.renews, (LAYERS, "osd_adamw", "lora", "adamw_torch_fused")))


def test_all_train_the_same_weights_as_their_method_does(tiny: str):
    weights = whole_models.random_model(whole_models.load_config(tiny), torch.float32, "cpu")
    head, q = weights.lm_head.weight, weights.model.layers[0].self_attn.q_proj.weight
    before = q.detach().clone()
    ids = torch.randint(100, (2, 8))
    with ExitStack() as stack:
        names = (LAYERS, "lora", "lora:modules_to_save=embed_tokens+lm_head")
        steps = {name: training_step.TrainingStep(weights, name, 4, ids, stack) for name in names}
        own = {name: [p for p in step.model.parameters() if p.requires_grad] for name, step in steps.items()}
        assert any(p.data_ptr() == q.data_ptr() for p in own[LAYERS])
        assert not any(p.numel() == head.numel() for p in own["lora"])
        assert sum(p.numel() == head.numel() for p in own[names[2]]) == 2
        steps["lora"]()
        assert torch.equal(q, before)
        for _ in range(2):
            steps[LAYERS]()
        assert not torch.equal(q, before) and len(steps[LAYERS].laps) == 2
        assert not hasattr(weights, "osd_stand_ins") and hasattr(steps[LAYERS].model, "osd_stand_ins")


def test_a_loss_that_is_not_finite_is_no_result(tiny: str, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "item", lambda self: float("nan"))
    with pytest.raises(ValueError, match="adamw_torch_fused does not train: its loss is nan"):
        training_step.measure((f"{tiny}@1", 4, 1), [], (2, 8), 2, CPU, torch.float32)


def test_a_run_writes_result_tables_and_picture_and_another_adds_a_case(tiny: str, tmp_path: Path, capsys):
    def run(case: str, *more: str) -> dict:
        asked = ["--cases", case, "--batch", "2", "8", "--device", "cpu", "--contenders", LAYERS, "lora"]
        training_step.main([*asked, "--output_dir", str(tmp_path), *more])
        return json.loads((tmp_path / "training_step.json").read_text())

    run(f"{tiny}@1:4:2")
    result = run(f"{tiny}@2:4:2", "--add")
    assert [row["blocks"] for row in result["rows"]] == [1, 2] and result["environment"]["commit"]
    summary = (tmp_path / "training_step.md").read_text()
    assert summary == training_step_report.summary(result["rows"]) and "rank 4, 2 of 3 blocks |" in summary
    assert training_step_report.table(result["rows"][1]) in (tmp_path / "training_step_all.md").read_text()
    assert (tmp_path / "training_step.png").stat().st_size > 5_000
    assert "forward | backward | optimizer" in capsys.readouterr().out


def test_ratios_spread_what_is_renewed():
    entry = {"whole": {"median": 3.0, "minimum": 2.0}, "renewal": 1.0, "beside": {"median": 2.0, "minimum": 1.5}}
    assert training_step_report.ratio(entry) == 2.0 and training_step_report.ratio(entry, "minimum") == 2.0
