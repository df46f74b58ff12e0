"""What RSO keeps and exchanges: x P, not x, for the backward pass, r m gradients, not m n, and one P an input."""

import pytest
import torch
from torch import nn

import hf_osd
from hf_osd.optim import predicted_state_bytes, state_bytes
from reference.tiny_models import tiny_llama


TOKENS, N, M, R = 40, 24, 16, 5


def saved_by(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What autograd keeps from a forward pass, without parameters."""
    saved: list[torch.Tensor] = []
    own = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return saved


def test_the_backward_of_a_layer_keeps_x_p_and_not_x():
    x, model = torch.randn(TOKENS, N, requires_grad=True), nn.Sequential(nn.Linear(N, M))
    (kept,) = saved_by(model, x)
    assert kept.shape == (TOKENS, N)
    optimizer = hf_osd.create_osd_optimizer(model, "rso_adamw", rank=R, target_modules=["0"])
    (kept,) = saved_by(model, x)
    assert kept.shape == (TOKENS, R)
    torch.testing.assert_close(kept, x @ optimizer.weight_of(model[0].weight).input.P)


def test_bytes_of_gradients_and_state_are_those_of_the_formulas():
    model = tiny_llama()
    optimizer = hf_osd.create_osd_optimizer(model, "rso_adamw", rank=8)
    matrices = [p for g in optimizer.trained_groups if g["rank"] for p in g["params"]]
    full_size = [p for g in optimizer.trained_groups if not g["rank"] for p in g["params"]]
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    low_rank, outside = sum(8 * p.shape[0] for p in matrices), sum(p.numel() for p in full_size)
    assert len(matrices) == 14 and all(p.grad is None for p in matrices)
    assert sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) == 4 * (low_rank + outside)
    optimizer.step()
    counters = 4 * (3 * len(matrices) + 2 * len(full_size))
    # of each block's 4 inputs a seed, which is saved, and P, which is not
    inputs = 2 * (4 * 8 + 4 * 8 * (3 * 32 + 48))
    assert state_bytes(optimizer) == 8 * (low_rank + outside) + counters + inputs
    assert predicted_state_bytes(optimizer) == state_bytes(optimizer)


@pytest.mark.gpu
def test_the_peak_of_a_step_is_lower():
    def peak(rso: bool) -> int:
        model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=4).cuda()
        if rso:
            optimizer: torch.optim.Optimizer = hf_osd.create_osd_optimizer(model, "rso_adamw", rank=32)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(64, (8, 512), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()

    assert peak(rso=True) < 0.9 * peak(rso=False)
