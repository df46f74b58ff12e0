import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]

from long_runs import EXPERIMENT, keep  # noqa: E402

import compare_long  # noqa: E402
from pretraining_runs import Run, finished  # noqa: E402


class Place:
    """A work_dir with the two runs of method b, beside a folder of results."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.work, self.file = tmp_path / "work", tmp_path / "results" / "here" / "few.json"
        self.experiment = json.loads(json.dumps(EXPERIMENT | {"title": "title"}))
        self.monkeypatch, self.capsys, self.data = monkeypatch, capsys, []
        monkeypatch.setattr(compare_long, "load_experiment", lambda name: self.experiment)
        monkeypatch.setattr(compare_long, "results_folder", lambda: self.file.parent)
        monkeypatch.setattr(compare_long, "execute", None)
        monkeypatch.setattr(compare_long, "in_turns", lambda runs, work_dir: None)  # each is left to `execute`

    def run(self, stage: str, seed: int = 1, rate: int = 1, method: str = "b") -> Run:
        steps = {"search": "10", "long": "100"}[stage]
        return Run(method, (("learning_rate", rate),), seed, ("--model", "m", "--max_steps", steps, *self.data))

    def keep(self, name: str = "few", made: dict[str, Any] | None = None) -> None:
        for stage in ("search", "long"):
            keep(self.work / name, stage, self.run(stage), 2.0, made)

    def call(self, *words: str) -> str:
        """What it prints; `words` may have another --work_dir."""
        argv = ["compare_long.py", "few", "--work_dir", str(self.work), *words]
        self.monkeypatch.setattr(sys, "argv", argv)
        compare_long.main()
        return self.capsys.readouterr().out

    def refused(self, message: str, *words: str) -> None:
        """And nothing of the results changes."""
        before = {file: file.read_bytes() for file in self.file.parent.glob("*")}
        with pytest.raises(SystemExit) as refused:
            self.call(*words)
        assert re.search(message, str(refused.value) + self.capsys.readouterr().err)
        assert {file: file.read_bytes() for file in self.file.parent.glob("*")} == before

    @property
    def there(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    def put(self, result: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(result))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Place:
    return Place(tmp_path, monkeypatch, capsys)


def test_finished_runs_alone_can_be_written(place: Place, tmp_path: Path):
    """A method without its long run has no row, and nothing is run."""
    place.keep()
    assert "A: a-learning_rate1-seed1 has not finished" in place.call("--finished")
    table = place.file.with_suffix(".md").read_text()
    assert "| B | 7.39 (one seed) | 7.39 (one seed) | learning rate 1 |" in table and "| A |" not in table
    assert place.file.with_suffix(".png").is_file()
    for more, message in (
        (["--work_dir", str(tmp_path / "other")], "other/few has no finished runs of b: give another --work_dir"),
        (["--methods", "b"], "leave --methods out"),
        (["--status"], "not allowed with argument"),
        (["--times"], "not allowed with argument"),
    ):
        place.refused(message, "--finished", *more)
    there = place.there
    for seeds in ("short_seeds", "seeds"):  # one that is not here
        lost = json.loads(json.dumps(there))
        lost["rows"][0][seeds].append(7.0)
        place.put(lost)
        place.refused("has no finished runs of b: .* or keep them by --add", "--finished")


def test_times_of_other_settings_are_forgotten(place: Place):
    place.keep()
    place.call("--finished")
    timed = place.there | {"times": {"seconds_per_step": {"b": 0.5}}}
    place.put(timed)
    place.call("--finished")
    assert place.there == timed
    timed["rows"][0] |= {"best": {"learning_rate": 3}, "seeds": [8.0]}
    place.put(timed)
    place.call("--finished")
    assert place.there["times"]["seconds_per_step"] == {}
    for key, other in (("common", ["--model", "larger"]), ("arguments", ["--osd_source", "activations"])):
        timed = place.there | {"times": {"seconds_per_step": {"b": 0.5}}}
        (timed if key == "common" else timed["rows"][0])[key] = other
        place.put(timed)
        place.call("--finished")
        assert not place.there.get("times", {}).get("seconds_per_step")
    place.put(timed | {"common": place.there["common"], "long": timed["long"] | {"save_steps": 6}})
    place.refused("measured with another long: leave --add out", "--add", "--finished")


def test_a_result_that_changes_meanwhile_stays(place: Place):
    """As by another machine's runs, or by --finished beside --times, which takes minutes."""
    place.keep()
    place.call("--finished")
    first = place.there
    more = json.loads(json.dumps(first))
    more["rows"][0]["seeds"].append(7.0)

    def execute(run: Run, work_dir: Path, **options: Any) -> dict[str, Any]:
        place.put(more)
        return {"log_history": [{"step": 100, "train_cpu_seconds": 7.0}]}

    place.monkeypatch.setattr(compare_long, "execute", execute)
    with pytest.raises(SystemExit, match="has changed since this began, and stays as it is"):
        place.call("--times")
    assert place.there == more
    place.call("--times")  # from the start
    assert place.there["rows"] == more["rows"] and place.there["times"]["seconds_per_step"] == {"b": 0.07}


def test_a_seed_that_diverged_is_counted(place: Place):
    place.keep()
    keep(place.work / "few", "long", place.run("long", seed=2), math.nan)
    place.call("--finished")
    assert "| nan (2 seeds) | 7.39 (one seed) |" in place.file.with_suffix(".md").read_text()


def test_a_run_whose_note_was_broken_off_has_not_finished(place: Place):
    place.keep()
    (place.work / "few" / "long" / place.run("long").name / "command.json").write_text("")
    assert "b-learning_rate1-seed1 has not finished" in place.call("--status")


OLD = {"commit": "old", "processor": "first", "packages": {"apollo-torch": "1.0", "torch": "2.0"}}
NEW = {"commit": "new", "processor": "second", "packages": {"torch": "2.1"}}


def test_rows_keep_what_their_runs_were_made_with(place: Place):
    """Wherever the result is written again, and without a byte where nothing is new."""
    place.keep(made=OLD)
    place.call("--finished")
    (row,) = place.there["rows"]
    assert (row["commits"], row["processors"], row["packages"]) == (["old"], ["first"], [OLD["packages"]])
    before = place.file.read_bytes()
    for words in (["--finished"], ["--add", "--finished"]):
        place.monkeypatch.setattr(compare_long, "describe", lambda: NEW)
        assert f"Nothing new: {place.file} stays as it is." in place.call(*words)
        assert place.file.read_bytes() == before
    shutil.rmtree(place.work)
    there = place.there | {"environment": OLD}
    for key in ("processors", "packages"):  # as rows were written once
        del there["rows"][0][key]
    place.put(there)
    for stage in ("search", "long"):
        keep(place.work / "few", stage, place.run(stage), 3.0, NEW | {"commit": "of runs that the result has"})
    keep(place.work / "few", "long", place.run("long", seed=2), 2.5, NEW)
    assert "Written: " in place.call("--add", "--finished")
    (row,) = place.there["rows"]
    assert row["seeds"] == [math.exp(2.0), math.exp(2.5)] and place.there["environment"]["commit"] == "new"
    assert (row["commits"], row["processors"]) == (["new", "old"], ["first", "second"])
    assert row["packages"] == [OLD["packages"], NEW["packages"]]


def test_a_result_is_of_one_text(place: Place, tmp_path: Path):
    for folder, words in (("one", "some words"), ("two", "other words")):
        (tmp_path / folder / "text").mkdir(parents=True)
        (tmp_path / folder / "text" / "train.txt").write_text(words)
    (tmp_path / "one" / "text" / "notes.md").write_text("not read")
    one, two = (["--data", str(tmp_path / folder / "text")] for folder in ("one", "two"))
    place.file = place.file.with_name("few_text.json")
    place.data = ["--dataset", one[1]]
    place.keep("few_text")
    place.call("--finished", *one)
    assert place.there["data"]["files"] == ["train.txt"] and str(tmp_path) not in json.dumps(place.there["data"])
    (tmp_path / "one" / "text" / "notes.md").write_text("nor is this")
    place.call("--finished", "--add", *one)
    for words in (["--add"], ["--add", "--finished"], ["--finished"], ["--times"], ["--add", "--status"]):
        place.refused("was measured on another text: give that --data", *words, *two)
    place.refused("nowhere: there is no such file or folder", "--status", "--data", str(tmp_path / "nowhere"))
    told = place.there["data"]
    place.put({key: value for key, value in place.there.items() if key != "data"})
    place.refused("does not tell which text it was measured on", "--add", "--finished", *one)
    shutil.rmtree(place.work)
    place.keep("few_text", made={"data": told})
    (tmp_path / "one" / "text" / "train.txt").write_text("words of later")
    place.file.unlink()  # as one is told
    with pytest.raises(SystemExit, match="no finished runs of any method"):
        place.call("--finished", *one)
    assert "few_text/search/b-learning_rate1-seed1 is of another text: delete it" in place.capsys.readouterr().out


def test_what_a_grid_that_has_grown_lacks_is_told(place: Place):
    place.keep()
    place.call("--finished")
    place.experiment["methods"]["b"]["learning_rates"] = [1, 2]
    message = (
        "Of b neither the result nor .* all runs that the experiment asks for now.*: run them by --add --methods b"
    )
    place.refused(message, "--add", "--finished")
    del place.experiment["methods"]["b"]
    for words in (["--add", "--finished"], ["--finished"], ["--times"]):
        place.refused("few.json has rows of b, which the experiment does not have any more", *words)


def test_times_of_all_or_the_result_keeps_those_it_has(place: Place):
    """What has been timed is not timed again once what failed runs."""
    for method in ("a", "b"):
        place.experiment["methods"][method]["learning_rates"] = [1]
        for stage in ("search", "long"):
            keep(place.work / "few", stage, place.run(stage, method=method), 2.0)
    place.call("--finished")
    place.put(place.there | {"times": {"seconds_per_step": {"a": 0.5, "b": 0.5}}})
    made: list[str] = []

    def execute(run: Run, work_dir: Path, missing: str = "") -> dict[str, Any]:
        if finished(run, work_dir) is None:
            made.append(run.method)
            if run.method == missing:
                raise SystemExit("no such library")
            keep(work_dir.parent, work_dir.name, run, 2.0)
        return {"log_history": [{"step": 100, "train_cpu_seconds": 7.0}]}

    place.monkeypatch.setattr(compare_long, "execute", lambda run, work_dir: execute(run, work_dir, "a"))
    place.refused("few.json stays as it is, for there is no time of a. .* once that runs, --times goes on", "--times")
    assert made == ["a", "b"]
    place.monkeypatch.setattr(compare_long, "execute", execute)
    place.call("--times")
    assert made == ["a", "b", "a"] and place.there["times"]["seconds_per_step"] == {"a": 0.07, "b": 0.07}
    place.call("--times")
    assert made[3:] == ["a", "b"]  # a new measurement
    untimed = {key: value for key, value in place.there.items() if key != "times"}
    place.put(untimed)
    place.monkeypatch.setattr(compare_long, "execute", lambda run, work_dir: execute(run, work_dir, "a"))
    assert "a: no such library" in place.call("--times") and place.there["times"]["seconds_per_step"] == {"b": 0.07}
    shutil.rmtree(place.work)
    place.put(untimed | {"rows": untimed["rows"][:1]})
    place.refused("there is no time of any method", "--times")


@pytest.mark.parametrize(
    ("more", "message"), [([], "There is no .*few.json, whose rows"), (["--add"], "leave --add out")]
)
def test_times_are_those_of_a_result(more: list[str], message: str, place: Place):
    """Without one nothing is written."""
    place.refused(message, "--times", *more)
    assert not place.work.exists()
