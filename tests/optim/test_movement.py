"""P of one shape that move together, in batched products, against the same P one by one."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_osd import OSD
from hf_osd.optim.step import algorithm, moments, movement
from hf_osd.optim.step.algorithm import ProjectedWeight
from hf_osd.subspace import OPERATORS, Movement, pca_gradient
from hf_osd.subspace.online_pca import OnlinePCA
from hf_osd.update_rules import RULES
from hf_osd.update_rules.protocol import KeptMoment
from hf_osd.update_rules.storage import BlockWise8bit
from reference.divided_form import divide_moments


RANK = 12
# P is (40, 12) on both sides, but for the last two: (48, 12), and (32, 12) of a stack of two experts
SHAPES = [(40, 64), (64, 40), (40, 56), (48, 80), (2, 32, 72)]


def make(dtype: torch.dtype, **options) -> tuple[list[nn.Parameter], OSD]:
    generator = torch.Generator().manual_seed(7)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]
    return params, OSD([{"params": params, "rank": RANK}], lr=1e-2, weight_decay=0.1, **options)


def run(params: list[nn.Parameter], optimizer: OSD, steps: int = 4, broken: int | None = None) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if step == 2 and i == broken:
                p.grad[..., 3, 5] = torch.nan
        optimizer.step()


def tensors(params: list[nn.Parameter], optimizer: OSD) -> list[Tensor]:
    return [*params, *(value for p in params for value in optimizer.state[p].values())]


@pytest.mark.parametrize("broken", [None, 1])
@pytest.mark.parametrize("rule", RULES)
def test_together_is_one_by_one(rule: str, broken: int | None, monkeypatch):
    dtype = torch.float32 if rule.endswith("8bit") else torch.float64
    together, alone = make(dtype, weight_rule=rule), make(dtype, weight_rule=rule)
    run(*together, broken=broken)
    monkeypatch.setattr(movement, "STACK_LIMIT", 0)
    run(*alone, broken=broken)
    for X, Y in zip(tensors(*together), tensors(*alone), strict=True):
        assert X.isfinite().all()
        torch.testing.assert_close(X, Y, rtol=1e-9, atol=1e-10)
    assert together[1].statistics()["skipped_steps"] == (broken is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "svd"},
        {"residual": "scaled"},
        {"subspace": "random", "restart_moments": True},
        {"capturable": True, "lr": torch.tensor(1e-2)},
    ],
)
@pytest.mark.parametrize("rule", [rule for rule, entry in RULES.items() if entry.eight_bit])
def test_moments_that_are_decoded_together_are_those_of_each(rule: str, options: dict, monkeypatch):
    """As on a GPU, where launches count: bit for bit, also where a first and a later gradient are broken."""

    def trained(together: bool) -> tuple[list[Tensor], list[int]]:
        stacks: list[int] = []
        for module in (moments, algorithm):
            monkeypatch.setattr(module, "launches", lambda X: together)
        load = BlockWise8bit.load_stack
        monkeypatch.setattr(
            BlockWise8bit,
            "load_stack",
            lambda own, states, kept: stacks.append(len(states)) or load(own, states, kept),
        )
        generator = torch.Generator().manual_seed(7)
        shapes = [(256, 320), (256, 320), (256, 320), (2, 256, 320), (24, 30)]
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        groups = [{"params": params, "rank": 16}]
        optimizer = OSD(groups, **{"lr": 1e-2, "weight_decay": 0.1, "weight_rule": rule} | options)
        for step in range(5):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=generator)
                if (step, i) in ((0, 1), (2, 0), (3, 3)):
                    p.grad[..., 3, 5] = torch.nan
            optimizer.step()
        return tensors(params, optimizer), stacks

    (found, stacks), (alone, none) = trained(True), trained(False)
    assert max(stacks) == 5 and not none
    for X, Y in zip(found, alone, strict=True):
        assert X.isfinite().all() and torch.equal(X, Y)


@pytest.mark.parametrize("rule", [rule for rule, entry in RULES.items() if entry.eight_bit])
def test_loaded_moments_are_stacked_with_those_of_their_form(rule: str, monkeypatch):
    """Of one shape some are in flat blocks, some in blocks of rows, one is dense: what a checkpoint may have."""

    def trained(together: bool) -> tuple[list[Tensor], list[list[int]]]:
        stacks: list[list[int]] = []
        for module in (moments, algorithm):
            monkeypatch.setattr(module, "launches", lambda X: together)
        generator = torch.Generator().manual_seed(7)
        shapes = [(320, 256)] * 4 + [(256, 320)] * 3
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = OSD([{"params": params, "rank": 64}], lr=1e-2, weight_rule=rule)
        run(params, optimizer, steps=2)
        saved = copy.deepcopy(optimizer.state_dict())
        for i, dim in ((1, 0), (3, 0), (5, 1)):
            divide_moments(saved["state"][i], optimizer, params[i], dim)
        optimizer.load_state_dict(saved)
        load = BlockWise8bit.load_stack

        def seen(own: BlockWise8bit, states: list[dict[str, Tensor]], kept: tuple[KeptMoment, ...]) -> tuple:
            if kept[0].key == "exp_avg":
                stacks.append([*states[0]["exp_avg_absmax"].shape, len(states)])
            return load(own, states, kept)

        with monkeypatch.context() as patch:
            patch.setattr(BlockWise8bit, "load_stack", seen)
            run(params, optimizer, steps=1)
        assert [optimizer.state[p]["exp_avg"].dtype == torch.uint8 for p in params] == [True] * 5 + [False, True]
        return tensors(params, optimizer), stacks

    (found, stacks), (alone, none) = trained(True), trained(False)
    assert sorted(stacks) == [[80, 2], [80, 2], [320, 1, 2]] and not none
    for X, Y in zip(found, alone, strict=True):
        assert torch.equal(X, Y)


def test_groups_keep_their_options(monkeypatch):
    def trained() -> list[Tensor]:
        params, _ = make(torch.float64)
        groups = [{"params": params[:1], "alpha": 1.0}, {"params": params[1:], "lr": 1e-3, "lambda_": 0.5}]
        optimizer = OSD([group | {"rank": RANK} for group in groups], lr=1e-2)
        run(params, optimizer)
        return tensors(params, optimizer)

    together = trained()
    monkeypatch.setattr(movement, "STACK_LIMIT", 0)
    torch.testing.assert_close(together, trained(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("limit", "stacks"),
    [(1 << 20, [[3, 40, 12], [48, 12], [2, 32, 12]]), (2 * 40 * 12, [[2, 40, 12], [2, 32, 12], [40, 12], [48, 12]])],
)
def test_one_product_for_each_shape(limit: int, stacks: list[list[int]], monkeypatch):
    seen: list[list[int]] = []

    def spy(P: Tensor, *rest) -> Tensor:
        seen.append(list(P.shape))
        return pca_gradient(P, *rest)

    params, optimizer = make(torch.float32)
    run(params, optimizer, steps=1)  # P is stationary at the gradient that it was made of
    for op in OPERATORS.values():
        monkeypatch.setattr(op, "pca_gradient", spy, raising=False)
    monkeypatch.setattr(movement, "STACK_LIMIT", limit)
    run(params, optimizer, steps=1)
    assert sorted(seen) == sorted(stacks)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("exchanged", [0, 1])
def test_a_p_that_somebody_keeps_in_another_dtype_changes_no_other(exchanged: int, dtype: str):
    def trained(*others: int) -> Tensor:
        params = [nn.Parameter(torch.zeros(64, 96, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = OSD([{"params": params, "rank": 16}], lr=1e-5, projection_dtype=dtype)
        run(params, optimizer, steps=2)
        for i in others:
            optimizer.state[params[i]]["projection"] = optimizer.weight_of(params[i]).P.read()
        run(params, optimizer, steps=8)
        return optimizer.state[params[1 - exchanged]]["projection"]

    assert torch.equal(trained(exchanged), trained())


def test_a_rule_with_a_movement_of_its_own_is_not_given_stacks():
    @dataclass(frozen=True)
    class Normalised(OnlinePCA):
        def advance_(self, P: Tensor, move: Movement) -> None:
            super().advance_(P, move)
            P.copy_(torch.linalg.qr(P).Q)

    assert OnlinePCA.stackable and not Normalised.stackable
    params, optimizer = make(torch.float64, subspace=Normalised())
    run(params, optimizer)
    for p in params:
        P = optimizer.state[p]["projection"]
        torch.testing.assert_close(P.mT @ P, torch.eye(RANK, dtype=P.dtype).expand_as(P.mT @ P))


def test_a_step_that_fails_has_moved_the_p_of_the_weights_before(monkeypatch):
    params, optimizer = make(torch.float64)
    run(params, optimizer, steps=2)
    before = [optimizer.state[p]["projection"].clone() for p in params]
    project = ProjectedWeight.project

    def failing(weight: ProjectedWeight, *rest):
        if weight is optimizer.weight_of(params[1]):
            raise RuntimeError("an SVD that does not converge")
        return project(weight, *rest)

    monkeypatch.setattr(ProjectedWeight, "project", failing)
    with pytest.raises(RuntimeError, match="does not converge"):
        run(params, optimizer, steps=1)
    moved = [not torch.equal(P, optimizer.state[p]["projection"]) for P, p in zip(before, params, strict=True)]
    assert moved == [True, False, False, False, False]


class Operators(TorchDispatchMode):
    """Counts the operators that compute."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        self.count += not (func.is_view or name in ("empty", "new_empty", "promote_types"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("subspace", "most"), [("online_pca", 8), ("static", 6)])
def test_operators_for_a_further_matrix(subspace: str, most: int):
    """R, D (a zero tensor and Adam), W, ||G||² and a counter; A and Adam on P. The rest is done for all at once."""

    def operators(matrices: int) -> int:
        params = [nn.Parameter(torch.randn(40, 64)) for _ in range(matrices)]
        optimizer = OSD([{"params": params, "rank": RANK}], lr=1e-2, subspace=subspace)
        run(params, optimizer, steps=2)
        with Operators() as made:
            optimizer.step()
        return made.count

    assert operators(12) - operators(2) == 10 * most


def test_a_gradient_of_a_stack_is_that_of_each():
    P, A = torch.randn(2, 3, 40, 12, dtype=torch.float64)
    inv_norm2 = torch.rand(3, dtype=torch.float64)
    stack = pca_gradient(P, A, inv_norm2[:, None, None], 0.3)
    for own in zip(P, A, inv_norm2, stack, strict=True):
        torch.testing.assert_close(pca_gradient(*own[:3], 0.3), own[3], rtol=1e-12, atol=1e-12)


def largest_singular_value(rows: int, steps: int = 30, **options) -> float:
    """Of any P of a run whose gradients have one leading direction, new at each step."""
    W = nn.Parameter(torch.zeros(rows, rows + 8))
    optimizer = OSD([{"params": [W], "rank": 32}], **options)
    largest = 0.0
    for step in range(steps):
        torch.manual_seed(step)
        W.grad = torch.randn(rows, 1) @ torch.randn(1, rows + 8) + 0.1 * torch.randn_like(W)
        optimizer.step()
        weight = optimizer.weight_of(W)
        for factor in weight.op.split(weight.projection):
            largest = max(largest, float(torch.linalg.matrix_norm(factor, 2)))
    return largest


@pytest.mark.filterwarnings("ignore:lr alpha")
@pytest.mark.parametrize("side", ["auto", "two_sided"])
@pytest.mark.parametrize(
    ("rule", "lr"), [("adamw", 0.01), ("adamw8bit", 0.01), ("lion", 0.01), ("adafactor", 0.01), ("sgd", 1.0)]
)
def test_p_stays_about_orthonormal(rule: str, lr: float, side: str):
    assert largest_singular_value(256, weight_rule=rule, lr=lr, alpha=5.0, side=side) < 1.6


def test_steps_that_are_not_too_long_are_those_of_the_paper(monkeypatch):
    def trained() -> list[Tensor]:
        params, optimizer = make(torch.float32, alpha=2.3)
        run(params, optimizer)
        return tensors(params, optimizer)

    looked_at = []
    shorten_ = movement.shorten_
    monkeypatch.setattr(movement, "shorten_", lambda *given: looked_at.append(1) or shorten_(*given))
    limited = trained()
    assert looked_at  # 0.01 * 2.3 * sqrt(480) = 0.504, if all entries had one size and rank
    monkeypatch.setattr(movement, "shorten_", lambda *given: None)
    torch.testing.assert_close(limited, trained(), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "options"), [(2048, {}), (64, {"projection_rule": "sgd", "alpha": 200.0})])
def test_a_rate_at_which_most_steps_are_too_long_is_told(rows: int, options: dict):
    def make(lr: float) -> OSD:
        return OSD([{"params": [nn.Parameter(torch.zeros(rows, 2 * rows))], "rank": 8}], lr=lr, **options)

    make(1e-3)
    with pytest.warns(UserWarning, match=r"lr alpha.* Lower the learning rate .* Use an alpha of"):
        make(1e-2)
