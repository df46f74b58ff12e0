"""What only a CUDA device can show: no synchronisation, and the same numbers as on the CPU."""

import pytest
import torch
from torch import nn

from hf_osd import OSD
from hf_osd.update_rules import RULES


pytestmark = pytest.mark.gpu


def make(rule: str, device: str, dtype: torch.dtype, **options) -> tuple[list[nn.Parameter], OSD]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(96, 160), (160, 96), (3, 96, 160), (160,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    groups = [{"params": params[:3], "rank": 48}, {"params": params[3:]}]
    return params, OSD(groups, lr=1e-3, weight_rule=rule, weight_decay=0.1, **options)


def step(params: list[nn.Parameter], optimizer: OSD, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim == 3 and seed:
            p.grad[seed % 3] = 0  # an expert without tokens
    optimizer.step()


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_no_synchronisation_in_a_step(rule: str, rounding: bool):
    params, optimizer = make(rule, "cuda", torch.bfloat16, stochastic_rounding=rounding)
    step(params, optimizer, 0)  # the first step initialises P
    step(params, optimizer, 1)
    gradients = [torch.randn_like(p) for p in params]
    gradients[2][1] = 0  # an expert without tokens
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p, G in zip(params, gradients, strict=True):
            p.grad = G
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clipping", ["parameter", "previous_norm"])
def test_no_synchronisation_in_a_layerwise_step(clipping: str):
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in ((96, 160), (160, 96), (160,))]
    groups = [{"params": params[:2], "rank": 48}, {"params": params[2:]}]
    optimizer = OSD(groups, layerwise=True, layerwise_clipping=clipping, max_grad_norm=1.0)
    gradients = [torch.randn_like(p) for p in params]

    def train() -> None:
        sum((p * G).sum() for p, G in zip(params, gradients, strict=True)).backward()
        optimizer.step()

    train(), train()  # P starts
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "adafactor", "sgd"])
def test_same_numbers_as_on_the_cpu(rule: str):
    (on_gpu, a), (on_cpu, b) = make(rule, "cuda", torch.float32), make(rule, "cpu", torch.float32)
    for seed in range(5):
        step(on_gpu, a, seed)
        step(on_cpu, b, seed)
    for p, q in zip(on_gpu, on_cpu, strict=True):
        # Both sum the same float32 products in another order; a step is 1e-3, so 1e-4 is a tenth of one step
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=1e-4)


def test_a_state_saved_on_the_cpu_reaches_the_device():
    params, optimizer = make("adamw8bit", "cuda", torch.bfloat16)
    step(params, optimizer, 0)
    saved = optimizer.state_dict()
    saved["state"] = {k: {name: v.cpu() for name, v in entries.items()} for k, entries in saved["state"].items()}
    optimizer.load_state_dict(saved)
    assert {v.device.type for entries in optimizer.state.values() for v in entries.values()} == {"cuda"}
    step(params, optimizer, 1)


def test_stochastic_rounding_repeats_and_resumes():
    (first, a), (second, b) = (make("adamw", "cuda", torch.bfloat16, stochastic_rounding=True) for _ in range(2))
    for seed in range(6):
        step(first, a, seed)
        torch.randn(7, device="cuda")  # the global generator must not matter
        if seed == 3:
            b = make_again(second, b)
        step(second, b, seed)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def make_again(params: list[nn.Parameter], optimizer: OSD) -> OSD:
    groups = [{"params": params[:3], "rank": 48}, {"params": params[3:]}]
    other = OSD(groups, lr=1e-3, weight_decay=0.1, stochastic_rounding=True)
    other.load_state_dict(optimizer.state_dict())
    return other
