"""Q-GaLore's format of weights, simulated: the quantiser, and that a run leaves its projected weights so."""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "benchmarks"))

import q_galore_weights  # noqa: E402
from hf_osd import create_osd_optimizer  # noqa: E402


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_quantiser():
    """256 values of each group of 256, the mean right inside of it; a last group of 44."""
    W = torch.randn(10, 30, generator=noise())
    drawn = torch.stack([q_galore_weights.quantised(W, noise(seed)) for seed in range(400)])
    for part in (slice(0, 256), slice(256, 300)):
        w, found = W.flatten()[part], drawn.flatten(1)[:, part]
        s = (w.max() - w.min()) / 255
        assert ((found - w).abs() <= 2 * s).all()
        steps = found / s
        assert (steps - steps.round()).abs().max() < 1e-3
        inside = (w > w.min() + s) & (w < w.max() - s)
        assert ((found.mean(0) - w)[inside].abs() < 5 * s / 2 / 20).all()


def test_an_optimizer_of_ours_leaves_projected_weights_so(monkeypatch):
    made, quantised = [], q_galore_weights.quantised
    monkeypatch.setattr(q_galore_weights, "quantised", lambda W, noise: made.append(quantised(W, noise)) or made[-1])
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
    optimizer = create_osd_optimizer(net, "osd_adamw", lr=1e-2, rank=4, source="activations")
    end = q_galore_weights.keep_weights()
    for _ in range(3):
        net(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    end()
    optimizer.step()  # nobody rounds any more
    assert len(made) == 6 and all(torch.equal(net[i].weight, W) for i, W in enumerate(made[-2:]))


def test_the_flag_is_for_this_process():
    assert q_galore_weights.obeyed(["--seed", "1"]) == ["--seed", "1"]
