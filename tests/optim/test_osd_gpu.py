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
    return params, OSD(groups, **{"lr": 1e-3, "weight_rule": rule, "weight_decay": 0.1, **options})


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


def assert_near(rule: str, params, others, start) -> None:
    """The same but for a last bit of other kernels and a code of another encoder, measured by the way from `start`."""
    for p, q, before in zip(params, others, start, strict=True):
        assert (p - q).norm() <= (0.05 if rule.endswith("8bit") else 1e-3) * (q - before).norm()


CAPTURED = [(rule, {}) for rule in RULES]
CAPTURED += [("adamw", {"residual": "scaled"}), ("lion", {"residual": "sign"}), ("adamw", {"side": "two_sided"})]
CAPTURED += [(rule, {"projection_stream": True}) for rule in ("adamw", "adamw8bit")]


@pytest.mark.parametrize(("rule", "options"), CAPTURED, ids=str)
def test_a_captured_step_is_every_step(rule: str, options: dict):
    options = {"capturable": True, **options}
    (params, a), (others, b) = (
        make(rule, "cuda", torch.float32, lr=torch.tensor(1e-3, device="cuda"), **options) for _ in range(2)
    )
    for seed in range(3):
        step(params, a, seed)
        step(others, b, seed)
    start = [p.detach().clone() for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for seed in range(3, 9):
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
            if p.ndim == 3:
                p.grad[seed % 3] = 0
        if seed == 5:
            params[0].grad[3, 4] = torch.inf
            others[0].grad = params[0].grad.clone()
        for optimizer in (a, b):
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-3 / seed)
        graph.replay()
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        b.step()
    assert a.statistics() == b.statistics() == {"skipped_steps": 1}
    assert_near(rule, params, others, start)


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "adafactor"])
def test_p_on_a_stream_of_its_own_is_p_in_its_turn(rule: str):
    (params, a), (others, b) = (make(rule, "cuda", torch.float32, projection_stream=on) for on in (True, False))
    for seed in range(6):
        step(params, a, seed)
        step(others, b, seed)
        sums = [(p.detach() * 2).sum() for p in params]  # reuses what the step has freed
    assert torch.stack(sums).isfinite().all()
    assert_near(rule, params, others, make(rule, "cuda", torch.float32)[0])
    pairs = [(a.state[p]["projection"], b.state[q]["projection"]) for p, q in zip(params[:3], others[:3], strict=True)]
    assert_near(rule, *zip(*pairs, strict=True), [torch.zeros(()).cuda()] * 3)


def test_8_bit_moments_on_another_stream():
    """Where bitsandbytes' encoder would not wait for what it is given."""
    (params, a), (others, b) = (make("adamw8bit", "cuda", torch.float32) for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for seed in range(4):
            step(params, a, seed)
    torch.cuda.synchronize()
    for seed in range(4):
        step(others, b, seed)
    assert_near("adamw8bit", params, others, make("adamw8bit", "cuda", torch.float32)[0])


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
