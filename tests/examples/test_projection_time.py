import json
import sys
from pathlib import Path

import torch


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import projection_time  # noqa: E402
from hf_osd import OSD  # noqa: E402


CPU = torch.device("cpu")


def test_shapes_are_two_for_each_model():
    assert projection_time.model_shapes(["60m", "7b"]) == [(512, 512), (512, 1376), (4096, 4096), (4096, 11008)]


def test_the_closed_form_is_the_optimizers_own_step():
    torch.manual_seed(0)
    for m, n, side in ((12, 20, "left"), (20, 12, "right")):
        W = torch.nn.Parameter(torch.zeros(m, n))
        P = torch.linalg.qr(torch.randn(12, 4)).Q.contiguous()
        # alpha lr = 5e-3; the first step with a P that is given moves it
        options = {"alpha": 5.0, "lambda_": 0.1, "projection_sample": 1}
        optimizer = OSD([{"params": [W], "rank": 4}], lr=1e-3, init=[P.clone()], **options)
        step = projection_time.ClosedForm(P.clone(), side)
        for _ in range(5):
            W.grad = torch.randn(m, n)
            step(W.grad)
            optimizer.step()
        torch.testing.assert_close(step.P, optimizer.state[W]["projection"])
        assert not torch.allclose(step.P, P)


def test_nothing_longer_than_the_limit_is_tried_and_ranks_stay_below_the_sides():
    rows = list(projection_time.measure([(16, 24), (8, 8)], [4, 8, 16], 2, 10.0, CPU, torch.bfloat16))
    assert [(row["shape"], row["rank"]) for row in rows] == [([8, 8], 4), ([16, 24], 4), ([16, 24], 8)]
    assert all(seconds > 0 for row in rows for seconds in row["seconds"].values())
    short = list(projection_time.measure([(8, 8), (64, 96)], [4], 2, 1e-12, CPU, torch.float32))
    assert all(seconds is None for seconds in short[1]["seconds"].values())
    assert "| 64 x 96, float32 | 4 |" + " - |" * 8 in projection_time.table(short)


def test_a_run_writes_result_table_and_picture(tmp_path: Path):
    asked = ["--shapes", "16x24", "16x16", "--ranks", "4", "8", "--rounds", "2", "--device", "cpu"]
    projection_time.main([*asked, "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "projection_time.json").read_text())
    assert {row["dtype"] for row in result["rows"]} == {"float32", "bfloat16"} and len(result["rows"]) == 8
    assert result["environment"]["packages"]["torch"] and result["limit"] == 8
    assert (tmp_path / "projection_time.md").read_text() == projection_time.table(result["rows"])
    assert (tmp_path / "projection_time.png").stat().st_size > 10_000
