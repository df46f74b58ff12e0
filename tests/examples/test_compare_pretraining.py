import json
import math
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import compare_pretraining  # noqa: E402


EXPERIMENT = {
    "seeds": [1, 2],
    "common": ["--max_steps", "10"],
    "methods": {
        "a": {"learning_rates": [0.1, 0.2], "arguments": ["--optim", "a"]},
        "b": {"learning_rates": [0.1], "arguments": []},
    },
}


def result(loss: float) -> dict:
    return {
        "eval_loss": loss,
        "perplexity": math.exp(loss),
        "optimizer_state_bytes": 50,
        "adamw_state_bytes": 100,
        "steps": 10,
        "tokens_seen": 10,
        "log_history": [{"step": 10, "eval_loss": loss}, {"step": 5, "loss": 1.0}],
    }


def test_plan_is_every_method_rate_and_seed():
    runs = compare_pretraining.plan(EXPERIMENT, None, ["--x"])
    assert len({run.name for run in runs}) == len(runs) == 6
    assert runs[0].arguments == ("--max_steps", "10", "--optim", "a", "--x")
    with pytest.raises(SystemExit, match="Unknown methods c"):
        compare_pretraining.plan(EXPERIMENT, ["c"], [])


def test_summary_takes_the_best_mean_over_seeds(tmp_path):
    runs = compare_pretraining.plan(EXPERIMENT, None, [])
    found = [result(loss) for loss in (5.0, 5.2, 4.0, 6.4, math.inf, 4.0)]
    a, b = compare_pretraining.summarise(EXPERIMENT, runs, found)
    assert a["best_learning_rate"] == 0.1 and a["best_perplexity"] == pytest.approx(math.exp(5.1))
    assert a["curve"] == [(10, 5.0)] and b["best_perplexity"] == math.inf  # a diverged seed is not averaged away
    assert "50%" in compare_pretraining.table([a])
    compare_pretraining.draw([a], "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_committed_experiments_are_complete():
    for file in (EXAMPLES / "benchmarks" / "experiments").glob("*.json"):
        experiment = json.loads(file.read_text())
        if "script" in experiment:  # of another benchmark
            continue
        assert experiment.keys() >= {"title", "seeds", "common", "methods"}
        for method in experiment["methods"].values():
            assert len(method["learning_rates"]) >= 1 and "--learning_rate" not in method["arguments"]
