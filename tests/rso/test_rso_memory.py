"""What RSO keeps and exchanges: x P instead of x for the backward, r m gradients instead of m n."""

import pytest
import torch
from torch import nn

from hf_osd.rso import create_rso_model, gradient_bytes, outer_loop, subspace_bytes, trained_parameters
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
    x = torch.randn(TOKENS, N, requires_grad=True)  # as inside a network: its gradient is wanted
    (kept,) = saved_by(nn.Sequential(nn.Linear(N, M)), x)
    assert kept.shape == (TOKENS, N)
    model = create_rso_model(nn.Sequential(nn.Linear(N, M)), R)
    (kept,) = saved_by(model, x)
    assert kept.shape == (TOKENS, R)
    P = outer_loop(model).layers["0"].lora_A["rso"].weight.mT
    torch.testing.assert_close(kept, x @ P)


def test_the_gradient_of_w_is_never_made():
    model = create_rso_model(tiny_llama(), 8)
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    made = {name for name, p in model.named_parameters() if p.grad is not None}
    assert made == {name for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.grad.nbytes for p in model.parameters() if p.grad is not None) == gradient_bytes(model)


def test_bytes_are_those_of_the_formulas():
    model, plain = create_rso_model(tiny_llama(), 8), tiny_llama()
    matrices = {name: p for name, p in plain.named_parameters() if "layers" in name and p.ndim == 2}
    outside = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in matrices.values())
    assert gradient_bytes(model) == 4 * (outside + sum(8 * p.shape[0] for p in matrices.values()))
    assert subspace_bytes(model) == 4 * sum(8 * (p.shape[0] + p.shape[1]) for p in matrices.values())
    assert sum(p.numel() for _, p in trained_parameters(model)) == sum(p.numel() for p in plain.parameters())
    assert gradient_bytes(plain) == 4 * sum(p.numel() for p in plain.parameters()) and subspace_bytes(plain) == 0


@pytest.mark.gpu
def test_the_peak_of_a_step_is_lower():
    def peak(rso: bool) -> int:
        model = tiny_llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=4).cuda()
        if rso:
            create_rso_model(model, 32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        ids = torch.randint(64, (8, 512), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()

    assert peak(rso=True) < peak(rso=False)
