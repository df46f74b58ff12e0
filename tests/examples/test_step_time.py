import json
import sys
import time
from pathlib import Path

import pytest
import torch


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import contenders  # noqa: E402
import shapes  # noqa: E402
import step_report  # noqa: E402
import step_time  # noqa: E402
import stopwatch  # noqa: E402
from hf_osd.subspace import Left, Right  # noqa: E402


CPU = torch.device("cpu")
# torchao compiles for a minute
QUICK = [name for name in contenders.CONTENDERS if not name.startswith("torchao")]


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}))
    return str(path)


@pytest.fixture
def row(tiny: str) -> dict:
    return step_time.measure(tiny, 4, 3, QUICK, CPU, torch.float32)


def test_every_contender_is_measured_or_said_to_be_left_out(row: dict):
    assert row["seconds"].keys() | row["left_out"].keys() == set(QUICK) and not row["seconds"].keys() & row["left_out"]
    assert row["left_out"]["galore-torch 8-bit"].endswith("GPUs only") and row["blocks"] == 3
    for name, found in row["seconds"].items():
        assert found["median"] <= found["amortised"] or contenders.CONTENDERS[name].period > 1
        assert 0 < found["median"] <= found["worst"] and found["first"] > 0 and found["launches"] is None


def test_no_ordinary_step_of_ours_reads_a_value(row: dict):
    ours = {name: found["waits"] for name, found in row["seconds"].items() if name.startswith("osd_")}
    assert len(ours) >= 10 and set(ours.values()) == {0}


def test_steps_of_several_kinds_are_averaged(tiny: str, monkeypatch):
    name = "osd_adamw, projection_interval 4"
    monkeypatch.setattr(step_time, "in_turn", lambda steps, rounds, *_: dict.fromkeys(steps, [8.0, 1.0, 2.0, 1.0] * 3))
    row = step_time.measure(tiny, 4, 12, [name], CPU, torch.float32)
    assert row["seconds"][name]["amortised"] == 3.0
    assert row["seconds"]["three products"]["amortised"] == row["seconds"][name]["median"] == 1.5
    ordinary = step_time.measure(tiny, 4, 4, ["osd_adamw"], CPU, torch.float32)["seconds"]["osd_adamw"]
    assert row["seconds"][name]["operators"] == ordinary["operators"]  # of the step that moves P


def test_presets_and_subspace_rules_are_all_there():
    for name in ("osd_adamw", "osd_adamw8bit", "osd_lion", "osd_lion8bit", "osd_adafactor", "osd_sgd"):
        assert name in contenders.CONTENDERS
    assert contenders.CONTENDERS["osd_adamw, subspace svd"].renews
    assert not contenders.CONTENDERS["osd_adamw, subspace power"].renews


def test_operators_that_compute_are_counted(row: dict):
    x = torch.ones(3, 2)
    assert stopwatch.operators(lambda: (x @ x.mT)[0].add_(1)) == 2
    ours, peer = (row["seconds"][name]["operators"] for name in ("osd_adamw", "galore-torch"))
    assert row["seconds"]["three products"]["operators"] == 3 * 7 < ours
    assert row["seconds"]["torch AdamW fused"]["operators"] < 5 and peer > 7 * 8


def test_reads_are_counted():
    x = torch.ones(3, 2)
    calls = (x.sum().item, lambda: bool(x[0, 0]), lambda: torch.equal(x, x), x.nonzero, lambda: torch.linalg.svd(x))
    assert [stopwatch.waits(call, CPU) for call in calls] == [1, 1, 1, 1, 1]
    assert stopwatch.waits(lambda: x @ x.mT + 1, CPU) == 0


def test_turns_are_fair_and_end_at_the_budget():
    calls: list[str] = []
    times = stopwatch.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 6, CPU)
    assert all(len(taken) == 6 for taken in times.values())
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(0, 12, 2)) and calls != ["a", "b"] * 6
    assert len(stopwatch.in_turn({"a": lambda: None}, 5, CPU, budget=0.0)["a"]) == 0


def test_laps_are_times_of_calls_in_a_row():
    calls: list[str] = []
    times = stopwatch.laps([lambda: calls.append("a"), lambda: time.sleep(0.01), lambda: calls.append("b")], CPU)
    assert calls == ["a", "b"] and len(times) == 3 and times[1] >= 0.01 > times[0] >= 0


class KeepGradient(torch.optim.SGD):
    """Keeps the gradient that it is to step with."""

    def step(self, closure=None):
        self.seen = self.param_groups[0]["params"][0].grad.clone()


def test_the_autograd_step_has_the_gradient_of_the_closed_form():
    for m, n, op in ((6, 10, Left), (10, 6, Right)):
        G, P = torch.randn(m, n, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
        keep = KeepGradient([P.requires_grad_()], lr=0.1)
        contenders.autograd_pca_step(P, G, keep)
        A = op.correlate(G, op.down(G, P.detach()))
        torch.testing.assert_close(keep.seen, op.pca_gradient(P.detach(), A, 1 / G.norm() ** 2, 0.0))
        assert P.grad is None


def test_the_shapes_are_those_of_the_model():
    assert shapes.sizes("7b") == (4096, 11008, 32)
    assert shapes.block_shapes("60m") == [(512, 512)] * 4 + [(1376, 512)] * 2 + [(512, 1376)]
    with pytest.raises(SystemExit, match="known: .*60m"):
        shapes.sizes("8b")


def test_a_run_writes_result_tables_and_picture(tiny: str, tmp_path: Path, capsys):
    names = ["osd_adamw", "torch AdamW fused"]
    asked = ["--cases", f"{tiny}:4:2", "--device", "cpu", "--contenders", *names, "--output_dir", str(tmp_path)]
    step_time.main(asked)
    result = json.loads((tmp_path / "step_time.json").read_text())
    assert result["environment"]["commit"] and result["dtype"] == "float32" and result["rows"][0]["rounds"] == 2
    assert (tmp_path / "step_time.md").read_text() == step_report.summary(result["rows"], result["table"])
    assert step_report.table(result["rows"][0]) in (tmp_path / "step_time_all.md").read_text()
    assert (tmp_path / "step_time.png").stat().st_size > 5_000
    assert "three products" in capsys.readouterr().out


def test_a_wrong_case_is_refused():
    with pytest.raises(SystemExit):
        step_time.main(["--cases", "60m:128"])


@pytest.mark.gpu
def test_on_a_gpu_launches_and_synchronisations_are_counted(tiny: str):
    cuda = torch.device("cuda")
    row = step_time.measure(tiny, 4, 3, ["osd_adamw"], cuda, torch.bfloat16)
    assert row["seconds"]["osd_adamw"]["waits"] == 0 and row["seconds"]["osd_adamw"]["launches"] > 0
    assert stopwatch.waits(torch.ones(1, device=cuda).item, cuda) == 1
