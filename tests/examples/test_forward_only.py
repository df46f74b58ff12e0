"""The benchmarks of forward passes alone, with tiny models."""

import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import forward_only  # noqa: E402
import forward_only_bases  # noqa: E402


def test_a_step_takes_the_memory_of_an_evaluation(tmp_path: Path, monkeypatch):
    words = ["--memory_model", "llama_9m", "--time_model", "llama_500k", "--batch", "1", "--seq", "16"]
    words += ["--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["forward_only.py", *words, "--device", "cpu", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(forward_only, "METHODS", {"SubZero": {"rank": 8}, "MeZO": {"perturbation": "dense"}})
    forward_only.main()
    lines = (tmp_path / "forward_only.md").read_text().splitlines()
    assert len(lines) == 4 and lines[2].startswith("| SubZero |")
    ratios = [float(line.split("|")[4]) for line in lines[2:]]
    assert 1 < ratios[0] < 1.1 and ratios[0] < ratios[1]


def test_v_of_the_inputs_keeps_more_of_the_gradient(tmp_path: Path, monkeypatch):
    words = (
        "--characters 100000 --width 32 --rank 4 --pretraining_steps 3 --steps 5 --batch 2 --rates 1e-5 1e-4 --seeds 2"
    )
    monkeypatch.setattr(sys, "argv", ["forward_only_bases.py", *words.split(), "--output_dir", str(tmp_path)])
    forward_only_bases.main()
    lines = (tmp_path / "forward_only_bases.md").read_text().splitlines()
    cells = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in lines[2:]}
    assert list(cells) == list(forward_only_bases.METHODS)
    kept = {name: row[3] for name, row in cells.items()}
    assert kept.pop("MeZO") == "all" and all("±" in row[1] for row in cells.values())
    random, saved, follows = (int(share.rstrip("%")) for share in kept.values())
    assert random < 40 < min(saved, follows)
