"""A rule of the user's own: the worked example, and what is said about rules that cannot work."""

import copy
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import hf_osd
from hf_osd import OSD, Movement, Start, SubspaceRule


EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import own_subspace_rule  # noqa: E402
from own_subspace_rule import Oja, train  # noqa: E402


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def optimizer_of(W: nn.Parameter, rule: object, **options) -> OSD:
    return OSD([{"params": [("W", W)], "rank": 4, **options}], lr=1e-2, subspace=rule)


def run(W: nn.Parameter, optimizer: OSD, steps: range) -> None:
    for step in steps:
        W.grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(step), dtype=W.dtype)
        optimizer.step()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_example_is_ojas_rule(side: str):
    W = weight()
    optimizer = optimizer_of(W, Oja(rate=0.3, every=2), side=side)
    for step in range(6):
        before = optimizer.state[W]["projection"].clone() if step else None
        run(W, optimizer, range(step, step + 1))
        P = optimizer.state[W]["projection"]
        X = W.grad if side == "left" else W.grad.T
        if step and step % 2 == 0:
            Q, T = torch.linalg.qr(before + 0.3 / X.square().sum() * X @ X.T @ before)
            torch.testing.assert_close(P, Q * T.diagonal().sign(), rtol=0, atol=1e-12)
        elif step:
            assert torch.equal(P, before)


def test_the_example_learns_and_runs_as_its_docstring_says(monkeypatch: pytest.MonkeyPatch, capsys):
    losses = train(Oja(), steps=30, rank=4, hidden_size=32, lr=5e-3)
    assert losses[-1] < 0.8 * losses[0]
    commands = re.findall(r"python examples/own_subspace_rule\.py (.*)", own_subspace_rule.__doc__)
    assert len(commands) == 2
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["own_subspace_rule.py", *command.split(), "--steps", "2"])
        own_subspace_rule.main()
        names = [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()]
        assert names == ["Oja(rate=0.5, every=1)", "online_pca", "static"]


NEW_PROCESS = """
import sys
sys.path[:0] = {path!r}
import torch
from test_own_rule import Oja, optimizer_of, run, weight
saved = torch.load({saved!r}, weights_only=True)
for rule in ("online_pca", Oja(rate=0.4), Oja(rate=0.3)):
    W = weight()
    optimizer = optimizer_of(W, rule)
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError as error:
        print(error)
W.data.copy_(saved["W"])
run(W, optimizer, range(4, 7))
torch.save(W.detach(), {out!r})
"""


def test_a_new_process_resumes_exactly_with_the_same_rule_only(tmp_path: Path):
    W = weight()
    optimizer = optimizer_of(W, Oja(rate=0.3))
    assert optimizer.param_groups[0]["subspace"] == optimizer.defaults["subspace"] == "Oja(rate=0.3, every=1)"
    run(W, optimizer, range(4))
    torch.save({"W": W.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    run(W, optimizer, range(4, 7))
    paths = [str(Path(__file__).parent), str(EXAMPLES.parent)]
    code = NEW_PROCESS.format(path=paths, saved=str(tmp_path / "saved.pt"), out=str(tmp_path / "out.pt"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "out.pt"), W)
    unknown, other = done.stdout.split("The state was saved by another optimizer")[1:]
    assert re.search(r"subspace: Oja\(rate=0.3, every=1\).* subspace: online_pca", unknown)
    assert re.search(r"subspace: Oja\(rate=0.3, every=1\).* subspace: Oja\(rate=0.4, every=1\)", other)


def test_every_entrance_but_text_takes_a_rule():
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 20))
    optimizer = hf_osd.create_osd_optimizer(model, lr=1e-2, rank=4, target_modules=["0", "1"], subspace=Oja())
    optimizer.add_param_group({"params": [("W", weight())], "rank": 4})
    assert {group["subspace"] for group in optimizer.param_groups} == {"Oja(rate=0.5, every=1)"}
    own = {"params": [("W", weight())], "rank": 4, "subspace": Oja(0.1)}
    assert OSD([dict(own)]).param_groups[0]["subspace"] == "Oja(rate=0.1, every=1)"
    copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match="`alpha` of .* has no effect with subspace='Oja"):
        OSD([dict(own)], alpha=3.0)
    with pytest.raises(ValueError, match="not for side='two_sided'"):
        OSD([dict(own)], side="two_sided")
    with pytest.raises(ValueError, match="or an instance of a SubspaceRule, got <class"):
        OSD([{**own, "subspace": Oja}])


@dataclass(frozen=True)
class Coded(SubspaceRule):
    """P is kept as the numbers of the rows in which it has ones."""

    code: ClassVar[str | None] = "projection_rows"

    shift: int = 1

    def refresh_due(self, count: int) -> bool:
        return count % 2 == 0

    def make(self, G: Tensor, start: Start, old: Tensor | None) -> Tensor:
        return torch.arange(start.rank) if old is None else old + self.shift

    def code_spec(self, rank: int) -> tuple[tuple[int, ...], torch.dtype]:
        return (rank,), torch.int64

    def expand(self, code: Tensor, rows: int, rank: int, dtype: torch.dtype) -> Tensor:
        return torch.eye(rows, dtype=dtype)[:, code % rows]


def test_a_rule_that_keeps_a_code():
    W = weight()
    optimizer = optimizer_of(W, Coded(shift=2))
    before = W.detach().clone()
    run(W, optimizer, range(1))
    moved = (W != before).any(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 2, 3] and "projection" not in optimizer.state[W]
    run(W, optimizer, range(1, 3))
    assert optimizer.state[W]["projection_rows"].tolist() == [2, 3, 4, 5]


@dataclass
class NotFrozen(SubspaceRule):
    pass


class NoDataclass(SubspaceRule):
    pass


@dataclass(frozen=True)
class MovesItsCode(Coded):
    def moves_at(self, count: int) -> bool:
        return True

    def advance_(self, P: Tensor, move: Movement) -> None:
        P.neg_()


@dataclass(frozen=True)
class NeverMoves(SubspaceRule):
    def advance_(self, P: Tensor, move: Movement) -> None:
        P.neg_()


@dataclass(frozen=True)
class NoMovement(SubspaceRule):
    def moves_at(self, count: int) -> bool:
        return True


@dataclass(frozen=True)
class NoExpansion(SubspaceRule):
    code: ClassVar[str | None] = "seed"


@dataclass(frozen=True)
class Unhashable(SubspaceRule):
    steps: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (NotFrozen(), "NotFrozen .* must be a frozen dataclass"),
        (NoDataclass(), "NoDataclass .* must be a frozen dataclass"),
        (MovesItsCode(), "MovesItsCode keeps `code` instead of P, so `advance_` would move what is not kept"),
        (NeverMoves(), "NeverMoves overrides `advance_`, which is nothing without `moves_at`"),
        (NoMovement(), "NoMovement overrides `moves_at`, which is nothing without `advance_`"),
        (NoExpansion(), "NoExpansion must set `code` and override `code_spec` and `expand`, or none"),
        (Unhashable(), "settings of Unhashable must be hashable.*take tuples for lists"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, SubspaceRule) else "",
)
def test_a_rule_that_cannot_work_is_refused_at_construction(rule: SubspaceRule, message: str):
    with pytest.raises(ValueError, match=message):
        optimizer_of(weight(), rule)


@dataclass(frozen=True)
class Descends(SubspaceRule):
    def moves_at(self, count: int) -> bool:
        return True

    def advance_(self, P: Tensor, move: Movement) -> None:
        move.descend(-2 * move.inv_norm2 * move.A)


def test_descending_needs_an_optimizer_of_p():
    optimizer, W = None, weight()
    optimizer = optimizer_of(W, Descends())
    with pytest.raises(ValueError, match="Descends.advance_ calls `descend`.* set `learns = True`"):
        run(W, optimizer, range(2))

    @dataclass(frozen=True)
    class Learns(Descends):
        learns: ClassVar[bool] = True

    W = weight()
    optimizer = OSD([{"params": [W], "rank": 4}], subspace=Learns(), alpha=2.0, projection_rule="sgd")
    run(W, optimizer, range(3))
    assert float(optimizer.state[W]["projection_step"]) == 2  # not by the gradient that it was made from


def test_a_class_that_is_defined_again_replaces_the_first():
    """As in a notebook, where the cell with the rule is run again after a change."""

    def define(sign: float) -> SubspaceRule:
        @dataclass(frozen=True)
        class Again(SubspaceRule):
            def moves_at(self, count: int) -> bool:
                return True

            def advance_(self, P: Tensor, move: Movement) -> None:
                P.mul_(sign)

        return Again()

    found = []
    for sign in (2.0, 3.0):
        W = weight()
        optimizer = optimizer_of(W, define(sign))
        run(W, optimizer, range(2))
        found.append(torch.linalg.matrix_norm(optimizer.state[W]["projection"], 2).item())
    assert found == pytest.approx([2.0, 3.0])
