import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import stochastic_rounding  # noqa: E402


def test_the_matrix_travels_with_stochastic_rounding_only():
    def end(dtype: torch.dtype, stochastic: bool) -> float:
        return stochastic_rounding.travel(dtype, stochastic, steps=40)[-1][1]

    assert end(torch.float32, False) == pytest.approx(40 * stochastic_rounding.STEP, rel=1e-3)
    # W0 is of rank 8 up to its own rounding, so a few weights near zero get steps that are not tiny
    assert abs(end(torch.bfloat16, False)) < 1e-9
    # standard deviation of the mean over 24,576 weights: about 1 % after 40 steps
    assert end(torch.bfloat16, True) == pytest.approx(40 * stochastic_rounding.STEP, rel=0.08)


def test_the_committed_result_says_so_too(tmp_path):
    result = json.loads((BENCHMARKS / "results" / "cpu_2_cores" / "stochastic_rounding.json").read_text())
    ends = {key: {name: points[-1][1] for name, points in result[key].items()} for key in ("travel", "loss")}
    assert abs(ends["travel"]["bfloat16"]) < 1e-9
    full, random = (ends["loss"][name] for name in ("float32", "bfloat16, stochastic rounding"))
    gain = result["loss"]["float32"][0][1] - full
    assert abs(random - full) < 0.02 * gain < 0.5 * gain < ends["loss"]["bfloat16"] - full
    stochastic_rounding.render(result, tmp_path / "picture")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
