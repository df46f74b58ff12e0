import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
sys.path[:0] = [str(EXAMPLES), str(BENCHMARKS)]

import compare_pretraining  # noqa: E402
import comparison_plot  # noqa: E402
import run  # noqa: E402
from q_galore_weights import FLAG  # noqa: E402


EXPERIMENT = {
    "seeds": [1, 2],
    "common": ["--max_steps", "10"],
    "methods": {
        "a": {"learning_rates": [0.1, 0.2], "arguments": ["--optim", "a"]},
        "b": {
            "label": "B",
            "learning_rates": [1, 2, 3, 4, 5],
            "options": {"scale": [0.25, 0.5, 1]},
            "starts": [{"learning_rate": 2, "scale": 1}, {"learning_rate": 5, "scale": 1}],
            "arguments": ["--optim", "b", "--optim_args", "rank=4,scale={scale}"],
        },
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


def test_a_setting_is_one_command():
    a, b = compare_pretraining.read_methods(EXPERIMENT, None, ["--x"])
    assert a.grid == {"learning_rate": [0.1, 0.2]} and a.starts == ()
    one = b.run((3, 0.5), seed=2)
    assert one.name == "b-learning_rate3-scale0.5-seed2" and one.program == "pretrain_llama"
    assert " ".join(one.command) == (
        "--max_steps 10 --x --optim b --optim_args rank=4,scale=0.5 --learning_rate 3 --seed 2"
    )
    with pytest.raises(SystemExit, match="Unknown methods c"):
        compare_pretraining.read_methods(EXPERIMENT, ["c"], [])


def test_neighbours_differ_in_one_option_by_one_value():
    grid = {"x": [1, 2, 3], "y": [10, 20]}
    assert compare_pretraining.neighbours((2, 10), grid) == [(1, 10), (3, 10), (2, 20)]
    assert compare_pretraining.neighbours((3, 20), grid) == [(2, 20), (3, 10)]


def test_a_walk_ends_where_no_neighbour_is_better():
    grid = {"x": list(range(9)), "y": list(range(9))}
    losses = compare_pretraining.search(grid, ((0, 8), (8, 8)), lambda s: (s[0] - 5) ** 2 + (s[1] - 2) ** 2)
    best = min(losses, key=losses.get)
    assert (1, 8) not in losses  # (8, 8) is the better start
    assert best == (5, 2) and set(compare_pretraining.neighbours(best, grid)) < losses.keys()
    assert len(losses) < 81 == len(compare_pretraining.search(grid, (), sum))


def test_the_grid_takes_the_first_seed_and_the_best_setting_all():
    runs = []

    def run(run: compare_pretraining.Run) -> dict:
        runs.append(run.name)
        rate, scale = dict(run.options)["learning_rate"], dict(run.options).get("scale", 0)
        return result(5 + (rate - 3) ** 2 + scale + run.seed / 10 if rate != 4 else math.nan)

    (b,) = compare_pretraining.read_methods(EXPERIMENT, ["b"], [])
    row = compare_pretraining.compare(b, run)
    assert row["best"] == {"learning_rate": 3, "scale": 0.25} and row["perplexity"]["4 × 0.25"] == math.inf
    assert row["seeds"] == pytest.approx([math.exp(5.35), math.exp(5.45)])
    assert row["best_perplexity"] == pytest.approx(sum(row["seeds"]) / 2)
    assert row["spread"] == pytest.approx((row["seeds"][1] - row["seeds"][0]) / math.sqrt(2))
    assert [name for name in runs if "seed2" in name] == ["b-learning_rate3-scale0.25-seed2"]
    table = compare_pretraining.table([row])
    assert f"{len(row['perplexity'])} of 15; at the edge: scale | " in table and "50%" in table
    assert "| learning rate 3, scale 0.25 |" in table


def test_a_seed_that_diverges_is_not_averaged_away():
    (a,) = compare_pretraining.read_methods(EXPERIMENT, ["a"], [])
    row = compare_pretraining.compare(a, lambda run: result(math.inf if run.seed == 2 else 4.0))
    assert row["best_perplexity"] == math.inf and row["spread"] is None


def test_the_picture_takes_many_methods_and_ones_that_diverged(tmp_path):
    methods = compare_pretraining.read_methods(EXPERIMENT, None, [])
    rows = [compare_pretraining.compare(method, lambda run: result(4.0 + run.seed)) for method in methods]
    rows.append(rows[0] | {"label": "diverged", "seeds": [math.inf], "best_perplexity": math.inf})
    comparison_plot.draw(rows * 6, "title", tmp_path / "plot.png", ["b"])
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_picture_shows_perplexity_against_an_option(monkeypatch, tmp_path):
    grid = {"learning_rate": [0.1], "alpha": [1.0, 2.0, 4.0]}
    row = {"method": "moves", "grid": grid, "best": {"learning_rate": 0.1, "alpha": 2.0}, "label": "moves"}
    row |= {
        "seeds": [4.0, 4.2],
        "best_perplexity": 4.1,
        "perplexity": {"0.1 × 1": 5.0, "0.1 × 2": 4.0, "0.1 × 4": 6.0},
    }
    stays = {
        "method": "stays",
        "grid": {"learning_rate": [0.1]},
        "label": "stays",
        "seeds": [7.0],
        "best_perplexity": 7,
    }
    drawn = []
    monkeypatch.setattr(comparison_plot.Figure, "savefig", lambda self, path: drawn.append(self.axes[1]))
    comparison_plot.draw([row, stays], "title", tmp_path / "plot.png", against="alpha")
    moves, line = drawn[0].lines
    assert moves.get_xydata().tolist() == [[1, 5], [2, 4], [4, 6]] and set(line.get_ydata()) == {7}
    assert drawn[0].get_xlabel() == "alpha"


def committed() -> dict[str, dict[str, Any]]:
    experiments = {file.stem: json.loads(file.read_text()) for file in (BENCHMARKS / "experiments").glob("*.json")}
    return {name: own for name, own in experiments.items() if run.script_of(own) == "compare_pretraining"}


@pytest.mark.parametrize("name", sorted(committed()))
def test_committed_experiments_are_complete(name: str, tmp_path: Path):
    experiment = committed()[name]
    assert experiment.keys() >= {"title", "seeds", "common", "methods"}
    for method in compare_pretraining.read_methods(experiment, None, []):
        assert "--learning_rate" not in method.arguments and "--dataset" not in method.arguments
        assert all(values == sorted(set(values)) for values in method.grid.values())
        for setting in method.starts or [tuple(values[0] for values in method.grid.values())]:
            assert all(value in values for value, values in zip(setting, method.grid.values(), strict=True))
            one = method.run(setting, seed=1)
            script = importlib.import_module(one.program)
            command = [argument for argument in one.command if argument != FLAG]
            script.parse_arguments([*command, "--output_dir", str(tmp_path), "--use_cpu", "true"])
