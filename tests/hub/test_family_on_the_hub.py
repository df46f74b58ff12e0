"""P of every subspace rule and of both sides: saved as what it is, shown, started from; options in files and cards."""

import json
from dataclasses import dataclass

import pytest
import torch
from card_reading import code, rows
from projection_sets import assert_same

from hf_osd import OSD, create_osd_optimizer, extract_lora, init_lora_from_projection
from hf_osd.cli.main import main
from hf_osd.hub import Projection, ProjectionState, projection_bytes
from hf_osd.hub.analysis import random_share, share_of_change
from hf_osd.hub.card.model_card import update_card
from hf_osd.subspace import SubspaceRule
from reference.tiny_models import tiny_llama


@dataclass(frozen=True)
class Flipped(SubspaceRule):
    """A user's rule: P changes its sign after each step."""

    sign: float = -1.0

    def moves_at(self, count):
        return True

    def advance_(self, P, move):
        P.mul_(self.sign)


RULES = {
    "random": {"subspace": "random", "update_interval": 2},
    "gaussian": {"subspace": "random", "distribution": "gaussian"},
    "cosine": {"subspace": "cosine", "update_interval": 2},
    "importance": {"subspace": "importance"},
    "power": {"subspace": "power"},
    "own": {"subspace": Flipped()},
    "two_sided": {"side": "two_sided"},
    "two_sided_cosine": {"side": "two_sided", "subspace": "cosine"},
    "two_sided_random": {"side": "two_sided", "subspace": "random"},
}
SHAPES = {"wide.weight": (6, 10), "tall.weight": (10, 6), "experts": (3, 6, 10)}


def stepped(steps=3, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    named = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    optimizer = OSD([{"params": list(named.items()), "rank": 2}], lr=1e-2, **options)
    for _ in range(steps):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=generator)
            if p.ndim == 3:
                p.grad[2] = 0  # an expert without tokens
        optimizer.step()
    return named, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_p_itself_comes_back_and_starts_another_run(rule, tmp_path):
    named, optimizer = stepped(**RULES[rule])
    state = ProjectionState.from_optimizer(optimizer, include_moments=True)
    state.save_pretrained(tmp_path)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))
    assert state.config["step"] == 3
    code = optimizer.weight_of(named["wide.weight"]).rules.subspace.code
    for name in ("wide.weight", "tall.weight"):
        expected = optimizer.weight_of(named[name]).P.read()
        assert torch.equal(state[name].projection, expected) and expected.any()
        assert "exp_avg" in state[name].moments and not {"projection", code} & set(state[name].moments)
    experts = optimizer.weight_of(named["experts"]).projection
    for e, P in enumerate(state["experts"].projection):
        assert torch.equal(P, experts[e]) and bool(P.any()) == (e < 2)

    side = {"side": "two_sided"} if "side" in RULES[rule] else {}
    again, other = stepped(steps=1, init=state.initial_projections(), subspace="static", **side)
    for name, entry in ProjectionState.from_optimizer(other).items():
        assert torch.equal(entry.projection, state[name].projection)
    for moments in (False, True):
        subspace = RULES[rule].get("subspace", "online_pca")
        sizes = {"side": RULES[rule].get("side", "auto"), "subspace": subspace if rule != "own" else "static"}
        values = [
            v for entry in state.values() for v in (entry.projection, *(entry.moments.values() if moments else ()))
        ]
        assert projection_bytes(SHAPES.values(), 2, moments, **sizes) == sum(v.nbytes for v in values)


@pytest.mark.parametrize("rule", RULES)
def test_what_the_last_step_saw(rule):
    """The share outside the subspace and the orthogonality, against their definitions."""
    named, optimizer = stepped(steps=2, shapes={"w": (6, 10)}, **RULES[rule])
    W = named["w"]
    weight = optimizer.weight_of(W)
    subspace = weight.rules.subspace
    W.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
    G = W.grad.clone()
    optimizer.collect_statistics = True
    before = ProjectionState.from_optimizer(optimizer)["w"]
    optimizer.step()
    if subspace.code is not None and subspace.refresh_due(2):  # the P of this step
        before = ProjectionState.from_optimizer(optimizer)["w"]
    P, op = before.projection, weight.op
    outside = (G - op.up(op.down(G, P), P)).square().sum() / G.square().sum()
    errors = [torch.linalg.matrix_norm(F.mT @ F - torch.eye(2)) / 2**0.5 for F in before.factors]
    seen = optimizer.statistics()
    assert seen["pca_loss"] == pytest.approx(float(outside), abs=1e-5)
    assert seen["orthogonality"] == pytest.approx(float(sum(errors) / len(errors)), abs=1e-5)
    if subspace.code is not None or rule in ("importance", "power", "own"):
        assert (seen["orthogonality"] < 1e-5) == (rule != "gaussian")


def test_two_sides_are_checked_and_their_share_is_the_share():
    P, Q = (torch.linalg.qr(torch.randn(s, 2)).Q for s in (8, 12))
    entry = Projection(torch.cat([P, Q]), "two_sided", 2, (8, 12))
    assert [factor.shape for factor in entry.factors] == [(8, 2), (12, 2)]
    ProjectionState({"w": entry})
    change = torch.randn(8, 12)
    expected = float((P.T @ change @ Q).square().sum() / change.square().sum())
    skewed = Projection(torch.cat([P @ torch.randn(2, 2), Q @ torch.randn(2, 2)]), "two_sided", 2, (8, 12))
    assert share_of_change(skewed, change) == pytest.approx(expected, abs=1e-5)
    assert share_of_change(entry, P @ torch.randn(2, 2) @ Q.T) == pytest.approx(1, abs=1e-5)
    assert random_share(entry) == 2 / 8 * 2 / 12
    with pytest.raises(ValueError, match=r"must have the shape \(20, 2\), got \(8, 2\)"):
        ProjectionState({"w": Projection(P, "two_sided", 2, (8, 12))})
    with pytest.raises(ValueError, match=r"exp_avg of w cannot be torch.float32 of shape \(2, 12\)"):
        ProjectionState({"w": Projection(entry.projection, "two_sided", 2, (8, 12), {"exp_avg": torch.ones(2, 12)})})


def test_lora_starts_from_and_is_extracted_after_both_sides():
    peft = pytest.importorskip("peft")
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(12, 8)) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    optimizer = OSD([{"params": [("0.weight", tuned[0].weight)], "rank": 3}], side="two_sided", subspace="static")
    for _ in range(3):
        tuned(torch.randn(20, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = extract_lora(tuned, base, rank="auto", energy=0.9999)
    assert adapter.layers["0"].rank <= 3  # what changed is P D Qᵀ
    state = ProjectionState.from_optimizer(optimizer)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    assert init_lora_from_projection(model, state) == ["0"]
    layer = model.base_model.model[0]
    assert torch.equal(layer.lora_A["default"].weight, state["0.weight"].factors[1][:, :2].T)
    assert not layer.lora_B["default"].weight.any()


def test_show_tells_of_both_sides_and_codes(capsys, tmp_path):
    for name in ("two_sided", "random"):
        _, optimizer = stepped(**RULES[name], residual="scaled", carry_moments=True)
        ProjectionState.from_optimizer(optimizer).save_pretrained(tmp_path / name)
        main(["show", str(tmp_path / name), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert all(row["orthogonality"] < 0.3 for row in report["parameters"])
        assert report["config"]["residual"] == "scaled" and report["config"]["carry_moments"] is True
        assert "mixing" not in report["config"]
    assert report["config"]["update_interval"] == 2
    main(["show", str(tmp_path / "two_sided")])
    text = capsys.readouterr().out
    assert "two_sided" in text and "residual scaled" in text


def test_options_are_in_the_config_where_they_differ(tmp_path):
    assert not {"residual", "mixing", "moment_dtype"} & set(ProjectionState.from_optimizer(stepped()[1]).config)
    given = {"residual": "scaled", "residual_scale": 0.5, "moment_dtype": "bfloat16"}
    given |= {"subspace": "power", "mixing": 0.5, "projection_interval": 2, "carry_moments": True}
    config = ProjectionState.from_optimizer(stepped(**given)[1]).config
    assert given.items() <= config.items() and "stochastic_rounding" not in config
    with pytest.raises(ValueError, match="'carry_moments' in .* must be of type bool"):
        ProjectionState(ProjectionState.from_optimizer(stepped()[1]), {"carry_moments": 1})
    assert ProjectionState.from_optimizer(stepped(**RULES["own"])[1]).config["subspace"] == "Flipped(sign=-1.0)"
    weights = [torch.nn.Parameter(torch.randn(6, 10)) for _ in range(2)]
    groups = [{"params": [(name, p)], "rank": 2} for name, p in zip("ab", weights, strict=True)]
    groups[1]["residual"] = "sign"
    optimizer = OSD(groups)
    for p in weights:
        p.grad = torch.randn(6, 10)
    optimizer.step()
    config = ProjectionState.from_optimizer(optimizer).config
    assert config["residual"] is None  # groups differ


def test_a_config_with_options_that_are_gone_is_read(tmp_path, capsys):
    ProjectionState.from_optimizer(stepped(residual="scaled")[1]).save_pretrained(tmp_path)
    path = tmp_path / "osd_config.json"
    former = {"residual_scaling": "matrix", "residual_limit": 0.0, "projection_schedule": "constant", "betas": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | former))
    assert former.items() <= ProjectionState.from_pretrained(tmp_path).config.items()
    main(["show", str(tmp_path)])
    assert "residual scaled" in capsys.readouterr().out


CARDS = [
    ({"subspace": "random", "distribution": "gaussian"}, {"distribution of P": "`gaussian`"}, "draws at random"),
    ({"subspace": "cosine"}, {"subspace": "`cosine`, every 200 steps"}, "among those of cosines"),
    (
        {"subspace": "power", "mixing": 0.5, "carry_moments": True, "moment_dtype": "bfloat16"},
        {"share of the momentum in what P follows": "`0.5`", "moments carried into a new basis": "`True`"},
        "by power iteration",
    ),
    (
        {"side": "two_sided", "residual": "scaled", "residual_scale": 0.5},
        {"side": "`two_sided`", "residual": "`scaled`", "factor on the residual": "`0.5`"},
        'optim_args="rank=4,side=two_sided,residual=scaled,residual_scale=0.5,init=',
    ),
    ({"subspace": Flipped(2.0)}, {"subspace": "`Flipped(sign=2.0)`"}, "which a rule of the run's own moves"),
    ({"rank_pattern": {"q_proj": 2}}, {"rank": "2 and 4"}, "in subspaces of ranks 2 to 4"),
    ({"residual": "sign", "residual_scale": 0.1}, {"factor on the residual": "`0.1`"}, 'residual="sign"'),
]


@pytest.mark.parametrize(("options", "shown", "said"), CARDS, ids=[str(list(options)) for options, _, _ in CARDS])
def test_the_card_tells_it_and_its_code_runs(options, shown, said, run, llama, tmp_path):
    folder = tmp_path / "model"
    made = run(facts={"repo_id": str(folder)}, **options)
    llama.save_pretrained(folder)
    ProjectionState.from_optimizer(made.optimizer).save_pretrained(folder)
    text = update_card(folder, made.facts).read_text()
    assert shown.items() <= rows(text).items() and said in text
    found = {"Flipped": Flipped}
    exec(code(text), found)
    for group, other in zip(made.optimizer.param_groups, found["optimizer"].param_groups, strict=True):
        assert group["param_names"] == other["param_names"]
        if group["rank"] is None:
            continue
        same = set(group) - {"params", "init", "lr", "initial_lr", "weight_decay", "update_interval"}
        assert {name: group[name] for name in same} == {name: other[name] for name in same}
    ids = torch.randint(0, 32, (2, 8))
    found["model"](input_ids=ids, labels=ids).loss.backward()
    found["optimizer"].step()
    if "init=projections" in text:
        started = ProjectionState.from_optimizer(made.optimizer)
        held = found["optimizer"].param_groups[0]
        assert held["init"] == "given" and len(started) == 14
    else:
        assert options["subspace"] in ("random", "cosine")


def test_a_card_of_several_ranks_names_no_single_one(run, tmp_path):
    made = run(rank_pattern={"q_proj": 2})
    ProjectionState.from_optimizer(made.optimizer).save_pretrained(tmp_path)
    assert "In a Trainer" not in update_card(tmp_path, made.facts).read_text()
    model = tiny_llama()
    state = ProjectionState.from_pretrained(tmp_path)
    again = create_osd_optimizer(model, rank=4, rank_pattern={"q_proj": 2}, init=state)
    assert {group["rank"] for group in again.param_groups} == {2, 4, None}
