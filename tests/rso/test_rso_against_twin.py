"""`rso_adamw` is the algorithm of the paper, B of W + B Pᵀ trained by torch's AdamW on a plain model, in float64."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hf_osd
from hf_osd.optim.factory import decay_parameter_names
from reference.tiny_models import tiny_llama


RANK, INTERVAL, STEPS, LR, DECAY = 3, 4, 10, 0.02, 0.1


class Added(nn.Module):
    """W -> W + B Pᵀ, with B = 0 at first."""

    def __init__(self, W: Tensor, P: Tensor):
        super().__init__()
        self.P, self.B = P, nn.Parameter(W.new_zeros(W.shape[0], P.shape[1]))

    def forward(self, W: Tensor) -> Tensor:
        return W + self.B @ self.P.mT


class Twin:
    """A plain model. `begin` makes W + B Pᵀ the next W and goes on with another P, B = 0 and a new AdamW of B."""

    def __init__(self, model: nn.Module, names: list[str], scale: float):
        decays = decay_parameter_names(model)
        self.model, self.modules, self.scale = model, [model.get_submodule(name[:-7]) for name in names], scale
        rest = [(name, p) for name, p in model.named_parameters() if name not in names]
        groups = [{"params": [p], "weight_decay": DECAY if name in decays else 0.0} for name, p in rest]
        self.optimizers = [torch.optim.AdamW(groups, lr=LR)]

    def begin(self, projections: list[Tensor]) -> None:
        for module, P in zip(self.modules, projections, strict=True):
            if parametrize.is_parametrized(module):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            parametrize.register_parametrization(module, "weight", Added(module.weight, P.clone()))
        # AdamW's decay of B is lr scale (DECAY / scale), that of W below lr DECAY: together that of W + B Pᵀ
        inner = torch.optim.AdamW(
            [module.parametrizations.weight[0].B for module in self.modules],
            lr=LR * self.scale,
            weight_decay=DECAY / self.scale,
        )
        self.optimizers[1:] = [inner]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for module in self.modules:
            module.parametrizations.weight.original.data.mul_(1 - LR * DECAY)
        self.model.zero_grad()


def mlp() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5, bias=False))
    return model.double(), lambda model: (model(torch.randn(6, 7).double()) - 1).square().mean()


def llama() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def loss(model: nn.Module) -> Tensor:
        ids = torch.randint(64, (2, 12))
        return model(input_ids=ids, labels=ids).loss

    return tiny_llama().double(), loss


@pytest.mark.parametrize("distribution, scale", [("gaussian", 1.0), ("orthonormal", 0.25)])
@pytest.mark.parametrize("make, matrices, inputs", [(mlp, 2, 2), (llama, 14, 8)])
def test_several_intervals_are_those_of_the_twin(make, matrices: int, inputs: int, distribution: str, scale: float):
    model, loss = make()
    plain = copy.deepcopy(model)
    options = {"distribution": distribution, "update_interval": INTERVAL, "scale": scale, "weight_decay": DECAY}
    optimizer = hf_osd.create_osd_optimizer(model, "rso_adamw", lr=LR, rank=RANK, seed=5, **options)
    groups = [group for group in optimizer.trained_groups if group["rank"] is not None]
    weights = {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    assert len(weights) == matrices
    twin, seen = Twin(plain, list(weights), scale), {}
    for step in range(STEPS):
        torch.manual_seed(step)
        loss(model).backward()
        assert all(p.grad is None for p in weights.values())
        # P of the forward pass; the step makes the next
        projections = [optimizer.weight_of(p).layer.input.P for p in weights.values()]
        optimizer.step()
        optimizer.zero_grad()
        if step % INTERVAL == 0:
            twin.begin(projections)
            seen |= {P.data_ptr(): P for P in projections}  # kept, so that addresses differ
        torch.manual_seed(step)
        loss(plain).backward()
        twin.step()
    assert len(seen) == 3 * inputs
    for name, value in model.state_dict().items():
        module, _, last = name.rpartition(".")
        expected = getattr(plain.get_submodule(module), last)
        # x Wᵀ against x (W + B Pᵀ)ᵀ: rounding only, which ten steps of Adam hardly amplify
        torch.testing.assert_close(
            value, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
