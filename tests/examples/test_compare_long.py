import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser


EXAMPLES = Path(__file__).parents[2] / "examples"
BENCHMARKS = EXAMPLES / "benchmarks"
sys.path[:0] = [str(EXAMPLES), str(BENCHMARKS)]

from long_runs import EXPERIMENT, Runner  # noqa: E402

import compare_long  # noqa: E402
import compare_pretraining  # noqa: E402
import long_rows  # noqa: E402
import pretrain_llama  # noqa: E402
import pretraining_runs  # noqa: E402
from hf_osd import OSDCallback  # noqa: E402
from pretraining_runs import Run  # noqa: E402


def test_the_most_telling_runs_come_first(tmp_path: Path):
    names: list[str] = []
    contenders = compare_long.read_contenders(EXPERIMENT, None, ["--x"])
    done = [c.search.name for c in compare_long.contend(contenders, Runner(10, names), Runner(100, names))]
    assert done == ["a", "b"] * 3
    a = "a-learning_rate"
    walk = [f"10: {a}{rate}-seed1" for rate in (1, 2, 3)]
    assert names == [
        *(*walk, f"10: {a}2-seed1", f"100: {a}2-seed1"),  # from disk the second time
        *("10: b-learning_rate1-seed1", "10: b-learning_rate1-seed1", "100: b-learning_rate1-seed1"),
        *(f"100: {a}2-seed2", "100: b-learning_rate1-seed2"),
        *(f"10: {a}2-seed2", "10: b-learning_rate1-seed2"),
    ]
    rows = [contender.row for contender in contenders]
    assert rows[0]["seeds"] == rows[0]["short_seeds"] == pytest.approx([math.exp(2.1), math.exp(2.2)])
    assert not rows[0]["arguments"]  # of the method alone: those of the stages stand in the experiment
    found = {"title": "title", "rows": rows}
    compare_long.render(found, tmp_path / "long")
    table = (tmp_path / "long.md").read_text()
    assert "| A | 8.60 ± 0.61 | 8.60 ± 0.61 | learning rate 2 | 3 of 3 | 0.0 MiB | 50% | - |" in table
    assert "400 tokens, 40.0 for each of 10 parameters." in table
    picture = (tmp_path / "long.png").read_bytes()
    compare_long.render(found | {"times": {"seconds_per_step": {"a": 0.25}}}, tmp_path / "long")
    assert "50% | 250 |" in (tmp_path / "long.md").read_text() and (tmp_path / "long.png").read_bytes() != picture


def either(known: dict[str, dict[str, Any]], run: Runner) -> Callable[[Run], dict[str, Any]]:
    return lambda made: known.get(made.name) or run(made)


def test_a_row_stands_for_the_runs_that_it_was_made_of():
    """So another machine can add to a result: nothing that a row tells is run again, and the row stays as it is."""
    first = compare_long.read_contenders(EXPERIMENT, None, [])
    list(compare_long.contend(first, Runner(10, []), Runner(100, [])))
    rows = {c.search.name: json.loads(json.dumps(c.row)) for c in first}
    for kept, left in ((2, 0), (1, 2)):  # of the seeds
        rows["a"]["seeds"][kept:], rows["a"]["curves"][kept:], rows["a"]["short_seeds"][kept:] = [], [], []
        again = compare_long.read_contenders(EXPERIMENT, None, [])
        found = [long_rows.recalled(contender, rows[contender.search.name]) for contender in again]
        known = {stage: found[0][stage] | found[1][stage] for stage in ("search", "long")}
        names: list[str] = []
        short = either(known["search"], Runner(10, names))
        long = either(known["long"], Runner(100, names))
        list(compare_long.contend(again, short, long))
        assert names == ["100: a-learning_rate2-seed2", "10: a-learning_rate2-seed2"][:left]
        whole = [json.loads(json.dumps(contender.row)) for contender in again]
        assert whole == [json.loads(json.dumps(contender.row)) for contender in first]  # to the last bit
    with pytest.raises(SystemExit, match="a was measured with other arguments: leave --add out"):
        long_rows.recalled(first[0], rows["a"] | {"arguments": ["--optim", "sgd"]})


def test_steps_of_all_rows_are_timed_at_their_settings():
    contenders = compare_long.read_contenders(EXPERIMENT, None, [])
    made: list[Run] = []

    def run(run: Run) -> dict[str, Any]:
        made.append(run)
        return {
            "log_history": [{"step": 400, "eval_loss": 1.0, "train_cpu_seconds": 20.0}, {"step": 400, "loss": 1.0}]
        }

    found = compare_long.measure(compare_long.timed(contenders, [{"method": "b", "best": {"learning_rate": 1}}]), run)
    assert found["seconds_per_step"] == {"b": 0.05} and found["steps"] == 400
    (timed,) = made
    assert timed.name == "b-learning_rate1-seed1" and timed.command.count("--max_steps") == 2
    assert timed.command[timed.command.index("--eval_steps") + 1] == "400"  # the last that is given holds


def test_a_method_that_fails_stops_no_other(capsys):
    contenders = compare_long.read_contenders(EXPERIMENT, None, [])
    runners = Runner(10, [], broken="a"), Runner(100, [], broken="a")
    assert [c.search.name for c in compare_long.contend(contenders, *runners)] == ["b"] * 3
    assert "A: out of memory" in capsys.readouterr().out and not contenders[0].results


def test_the_committed_experiment_is_complete(tmp_path: Path):
    parser = HfArgumentParser((pretrain_llama.PretrainingArguments, pretrain_llama.OSDTrainingArguments))
    experiment = json.loads((BENCHMARKS / "experiments" / "family_long.json").read_text())
    assert experiment["script"] == "compare_long"
    every = experiment["long"]["save_steps"]
    for contender in compare_long.read_contenders(experiment, None, []):
        for stage in (contender.search, contender.long):
            setting = stage.starts[0]
            assert all(value in values for value, values in zip(setting, stage.grid.values(), strict=True))
            command = [*stage.run(setting, seed=1).command, "--output_dir", str(tmp_path), "--use_cpu", "true"]
            _, args = parser.parse_args_into_dataclasses(command)
        assert args.max_steps % args.eval_steps == 0 == every % args.eval_steps  # times are counted between these
        # a chunk between two evaluations has as many SVDs as any other
        assert all(args.eval_steps % interval == 0 for interval in contender.long.grid.get("interval", []))


def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """In the place of a callback's method."""
    raise SystemExit(1)


class Here:
    """In the place of a process: the same call, in this one."""

    exitcode = 0

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self.target, self.args = target, args

    def start(self) -> None:
        try:
            self.target(*self.args)
        except SystemExit as stopped:
            self.exitcode = int(stopped.code)  # type: ignore[call-overload]

    def join(self) -> None:
        pass


def test_a_killed_run_goes_on_from_its_checkpoint_and_is_kept(tmp_path: Path, monkeypatch):
    (tmp_path / "text").mkdir()
    lines = [
        json.dumps({"text": f"a sentence of {n} words and {n * n} letters, said twice. " * 4}) for n in range(200)
    ]
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(lines))
    words = (
        "--model llama_500k --train_tokenizer 300 --sequence_length 16 --per_device_train_batch_size 2 --max_steps 6"
    )
    words += " --max_eval_tokens 256 --eval_steps 2 --logging_steps 2 --use_cpu true --disable_tqdm true"
    arguments = (*words.split(), "--dataset", str(tmp_path / "text"), "--optim", "osd_adamw", "--osd_rank", "4")
    run = Run("osd", (("learning_rate", 0.01),), 1, arguments)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(pretraining_runs.PROCESSES, "Process", lambda target, args: Here(target, args), raising=False)
    monkeypatch.setattr(pretraining_runs, "_train", lambda _, command, log: pretrain_llama.main(command))
    whole = pretraining_runs.execute(run, tmp_path / "whole", 2)
    with monkeypatch.context() as patch:
        patch.setattr(OSDCallback, "on_save", killed)  # once a checkpoint has been written
        with pytest.raises(SystemExit, match="failed"):
            pretraining_runs.execute(run, tmp_path / "cut", 2, {"commit": "first"})
    assert pretraining_runs.finished(run, tmp_path / "cut") is None
    resumed = pretraining_runs.execute(run, tmp_path / "cut", 2, {"commit": "second"})
    assert long_rows.curve(whole) == long_rows.curve(resumed) and len(long_rows.curve(whole)) == 3
    assert all(entry["train_cpu_seconds"] > 0 for entry in resumed["log_history"] if "eval_loss" in entry)
    starts = pretraining_runs.started(run, tmp_path / "cut")
    assert starts == [{"from": None, "commit": "first"}, {"from": "checkpoint-2", "commit": "second"}]
    monkeypatch.setattr(pretraining_runs, "_train", None)
    assert pretraining_runs.execute(run, tmp_path / "cut", 2) == resumed  # kept
    typed = Run("osd", run.options, 1, (*arguments[:-5], str(tmp_path / "txet"), *arguments[-4:]))
    with pytest.raises(SystemExit, match="is of another command: delete it, or give another --work_dir"):
        pretraining_runs.execute(typed, tmp_path / "cut", 2)
    with pytest.raises(SystemExit, match=r"is of another command: .* Only it has: \S*text; only this one: \S*txet"):
        pretraining_runs.finished(typed, tmp_path / "cut")
    assert pretraining_runs.finished(run, tmp_path / "cut") == resumed
    assert compare_pretraining.execute is pretraining_runs.execute
