"""||G||² without a copy of G, in any precision and order of memory."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_osd.optim.step import gradients
from hf_osd.optim.step.gradients import squared_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", [None, "transposed", "channels_last", "strided"])
def test_no_copy_of_a_gradient_is_made(dtype: torch.dtype, order: str | None, monkeypatch):
    monkeypatch.setattr(gradients, "PIECE", 1000)
    G = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    if order == "transposed":
        G = G.t()
    elif order == "channels_last":
        G = G.view(4, 10, 15, 20).to(memory_format=torch.channels_last)
    elif order == "strided":  # fills no piece of memory, so it has to be copied once
        G = G[:, ::2]
    expected = G.double().square().sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = squared_norm(G, False)
    # float32 sums of 12,000 squares
    assert found.dtype == torch.float32 and float(found) == pytest.approx(float(expected), rel=1e-5)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= (G.numel() * G.element_size() if order == "strided" else 4 * 1000)
