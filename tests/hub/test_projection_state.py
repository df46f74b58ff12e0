"""P goes to files and back exactly, with the moments or without, and what makes no sense is refused."""

import json

import pytest
import torch
from projection_sets import assert_same, projection, some_state

from hf_osd import OSD, create_osd_optimizer
from hf_osd.hub import Projection, ProjectionState, projection_bytes
from hf_osd.hub.analysis import orthogonality, orthonormal_basis, share_of_change
from reference.tiny_models import tiny_llama


def train(model, optimizer, steps=3):
    ids = torch.randint(0, 32, (2, 8))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (6, 6)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_round_trip_is_exact(m, n, side, dtype, max_shard_size, tmp_path):
    moments = {"exp_avg": torch.randn((3, n) if side == "left" else (m, 3)), "step": torch.tensor(4.0)}
    state = ProjectionState(
        {"a.weight": projection(m, n, 3, side, dtype, **moments), "b.weight": projection(m, n, 2, side, dtype)}
    )
    names = state.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert ("osd_projection.safetensors" in names) == (max_shard_size == "5GB")
    assert_same(state, ProjectionState.from_pretrained(tmp_path))


@pytest.mark.parametrize("include_moments", [False, True])
@pytest.mark.parametrize("optim", ["osd_adamw", "osd_adafactor", "osd_lion"])
def test_what_an_optimizer_holds_comes_back(optim, include_moments, tmp_path):
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, optim, rank=4, weight_decay=0.1)
    train(model, optimizer)
    state = ProjectionState.from_optimizer(optimizer, include_moments)
    state.save_pretrained(tmp_path)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))
    parameters = dict(model.named_parameters())
    assert len(state) == 14 and "lm_head.weight" not in state
    for name, entry in state.items():
        held = dict(optimizer.state[parameters[name]])
        assert torch.equal(entry.projection, held.pop("projection")) and entry.shape == parameters[name].shape
        assert entry.moments.keys() == (held.keys() if include_moments else set())
        assert all(torch.equal(value, held[moment]) for moment, value in entry.moments.items())
    config = json.loads((tmp_path / "osd_config.json").read_text())
    wanted = {"format_version": 1, "optim": optim, "subspace": "online_pca", "rank": 4, "alpha": 5.0, "lambda": 0.1}
    assert wanted.items() <= config.items() and config["weight_decay"] == 0.1 and config["step"] == 3
    size = projection_bytes([entry.shape for entry in state.values()], 4, include_moments, weight_rule=optim[4:])
    assert size == sum(
        value.numel() * value.element_size()
        for entry in state.values()
        for value in (entry.projection, *entry.moments.values())
    )


def test_it_is_a_copy_and_starts_another_run(tmp_path):
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4)
    train(model, optimizer)
    state = ProjectionState.from_optimizer(optimizer)
    before = {name: P.clone() for name, P in state.initial_projections().items()}
    train(model, optimizer)
    assert all(torch.equal(P, before[name]) for name, P in state.initial_projections().items())
    state.save_pretrained(tmp_path)
    initial = ProjectionState.from_pretrained(tmp_path).initial_projections()
    ids = torch.randint(0, 32, (2, 8))
    another = tiny_llama()
    again = create_osd_optimizer(another, init=initial, subspace="static")
    another(input_ids=ids, labels=ids).loss.backward()
    again.step()
    for name, P in ProjectionState.from_optimizer(again).initial_projections().items():
        assert torch.equal(P, before[name])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("options", [{}, {"source": "activations"}, {"side": "two_sided"}], ids=str)
@pytest.mark.parametrize("pattern", [None, "q_proj:2;layers.0.*:3", "mlp.*:40"])
def test_its_ranks_are_the_default(pattern: str | None, options: dict, wrapped: bool):
    """Of each P its own: they may be several by pattern, or where some matrices are smaller than the rank."""
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, rank_pattern=pattern, **options)
    train(model, optimizer), train(model, optimizer)
    state = ProjectionState.from_optimizer(optimizer)
    given = {f"module.{name}": P for name, P in state.initial_projections().items()} if wrapped else state
    again = create_osd_optimizer(tiny_llama(), init=given, **options)
    ranks = {name: entry.projection.shape[-1] for name, entry in state.items()}
    groups = [group for group in again.trained_groups if group["rank"]]
    assert {name: group["rank"] for group in groups for name in group["param_names"]} == ranks
    assert len(set(ranks.values())) == (1 if pattern is None else 2 if "mlp" in pattern else 3)


def test_a_rank_that_is_asked_for_counts():
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, rank_pattern="q_proj:2")
    train(model, optimizer)
    state = ProjectionState.from_optimizer(optimizer)
    create_osd_optimizer(tiny_llama(), init=state, rank=4, rank_pattern="q_proj:2")
    for asked in ({"rank": 4}, {"rank_pattern": "k_proj:3"}):
        with pytest.raises(ValueError, match="give the rank and side that it was learned with"):
            create_osd_optimizer(tiny_llama(), init=state, **asked)


def test_8bit_codes_are_kept_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(64, 600))
    optimizer = OSD([{"params": [("w.weight", weight)], "rank": 8}], weight_rule="adamw8bit")
    for _ in range(3):
        weight.grad = torch.randn(64, 600)
        optimizer.step()
    state = ProjectionState.from_optimizer(optimizer, include_moments=True)
    codes = state["w.weight"].moments["exp_avg"]
    assert codes.dtype == torch.uint8 and len(codes.unique()) > 10 and "exp_avg_absmax" in state["w.weight"].moments
    state.save_pretrained(tmp_path)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))
    size = projection_bytes([(64, 600)], 8, include_moments=True, weight_rule="adamw8bit")
    assert size == sum(v.numel() * v.element_size() for v in optimizer.state[weight].values())


def test_without_moments_they_are_left_out(tmp_path):
    state = ProjectionState({"a": projection(step=torch.tensor(2.0))})
    state.save_pretrained(tmp_path, include_moments=False)
    assert ProjectionState.from_pretrained(tmp_path)["a"].moments == {}


def test_it_is_a_mapping_that_does_not_change():
    state = some_state()
    assert len(state) == 4 and list(state) == [f"layers.{i}.weight" for i in range(4)] and "x" not in state
    assert state["layers.1.weight"].side == "right" and state.get("x") is None
    assert repr(state) == "ProjectionState(4 projections, rank 3)"
    state.config["weight_rule"] = "lion"
    assert state.config["weight_rule"] == "adamw"
    with pytest.raises(TypeError):
        state["x"] = projection()
    with pytest.raises(AttributeError):
        state["layers.0.weight"].rank = 5
    with pytest.raises(KeyError):
        state["x"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "at least one"),
        ({"../a": projection()}, "has `..` or control characters"),
        ({"__metadata__": projection()}, "is reserved"),
        ({"a": projection(rank=7)}, "rank 7, larger than its matrix"),
        ({"a": Projection(torch.zeros(6, 3), "up", 3, (6, 10))}, "side 'up', expected left or right"),
        ({"a": Projection(torch.zeros(10, 3), "left", 3, (6, 10))}, r"must have the shape \(6, 3\), got \(10, 3\)"),
        ({"a": projection(dtype=torch.float16)}, "got torch.float16"),
        ({"a": projection(exp_avg=torch.zeros(6, 10))}, r"exp_avg of a cannot be torch.float32 of shape \(6, 10\)"),
        ({"a": projection(step=torch.tensor(1))}, r"step of a cannot be torch.int64 of shape \(\)"),
        (
            {"a": Projection(torch.full((6, 3), torch.nan), "left", 3, (6, 10))},
            "P of a has values that are not finite",
        ),
        (
            {"a": projection(exp_avg=torch.zeros(3, 10)), "a::exp_avg": projection()},
            "has two tensors called 'a::exp_avg'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(entries, message):
    with pytest.raises(ValueError, match=message):
        ProjectionState(entries)


def test_names_that_modules_may_have(tmp_path):
    names = ["tasks.user/model.weight", "tasks.a::b.weight", "/etc/a.weight", "a\\b", "~"]
    state = ProjectionState({name: projection(exp_avg=torch.zeros(3, 10)) for name in names})
    files = state.save_pretrained(tmp_path / "set")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == set(files)
    assert_same(ProjectionState.from_pretrained(tmp_path / "set"), state)


def test_from_optimizer_says_what_it_needs():
    weight = torch.nn.Parameter(torch.randn(6, 10))
    with pytest.raises(ValueError, match="needs an OSD optimizer, got SGD"):
        ProjectionState.from_optimizer(torch.optim.SGD([weight], lr=1.0))
    with pytest.raises(ValueError, match="projects nothing"):
        ProjectionState.from_optimizer(OSD([weight]))
    with pytest.raises(ValueError, match="have no names.*create_osd_optimizer"):
        ProjectionState.from_optimizer(OSD([weight], rank=2))
    optimizer = OSD([("a", weight), ("b", torch.nn.Parameter(torch.randn(6, 10)))], rank=2)
    with pytest.raises(ValueError, match="No projected parameter has been stepped yet"):
        ProjectionState.from_optimizer(optimizer)
    weight.grad = torch.zeros(6, 10)  # a zero gradient starts no P
    optimizer.step()
    with pytest.raises(ValueError, match="No projected parameter has been stepped yet"):
        ProjectionState.from_optimizer(optimizer)
    weight.grad = torch.randn(6, 10)
    optimizer.step()
    assert list(ProjectionState.from_optimizer(optimizer)) == ["a"]  # b has had no gradient


def test_options_that_groups_do_not_share_are_null():
    groups = []
    for name, rank in (("a", 2), ("b", 3)):
        weight = torch.nn.Parameter(torch.randn(6, 10))
        weight.grad = torch.randn(6, 10)
        groups.append({"params": [(name, weight)], "rank": rank})
    optimizer = OSD(groups, subspace="svd", update_interval=7)
    optimizer.step()
    state = ProjectionState.from_optimizer(optimizer)
    assert state.config["rank"] is None and state.config["update_interval"] == 7
    assert state.config["alpha"] is None and state.config["projection_rule"] is None  # an SVD does not learn
    assert [entry["rank"] for entry in state.config["parameters"].values()] == [2, 3]


def test_tensors_that_share_memory_are_written_each(max_shard_size, tmp_path):
    P = torch.randn(3, 6).mT  # not contiguous either
    state = ProjectionState({name: Projection(P, "left", 3, (6, 10)) for name in "abcd"})
    state.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_same(state, ProjectionState.from_pretrained(tmp_path))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_share_of_a_change_in_the_subspace(side):
    m, n, r = 8, 12, 3
    s = m if side == "left" else n
    Q = torch.linalg.qr(torch.randn(s, s)).Q
    P = Q[:, :r] @ torch.randn(r, r)  # far from orthonormal: only what it spans counts
    entry = Projection(P, side, r, (m, n))
    inside, outside = torch.randn(r, n if side == "left" else m), torch.randn(s - r, n if side == "left" else m)
    change = Q @ torch.cat([inside, outside])
    expected = float(inside.square().sum() / change.square().sum())
    # float32 sums of 96 numbers: 1e-5 is generous
    assert share_of_change(entry, change if side == "left" else change.mT) == pytest.approx(expected, abs=1e-5)
    assert share_of_change(entry, torch.zeros(m, n)) is None
    assert orthogonality(Q[:, :r]) == pytest.approx(0, abs=1e-6) and orthogonality(torch.zeros(s, r)) == 1
    assert orthonormal_basis(torch.cat([P, P[:, :1]], dim=1)).shape == (s, r)


def test_the_size_follows_from_shapes():
    assert projection_bytes([(4096, 11008), (32, 16)], rank=128) == 4 * (4096 * 128 + 16 * 16)
    assert projection_bytes([(8, 12)], rank=2, side="right", projection_dtype="bfloat16") == 2 * 12 * 2
    saved_as_floats = projection_bytes([(8, 12)], rank=2, projection_dtype="int8", include_moments=True)
    assert saved_as_floats == projection_bytes([(8, 12)], rank=2, include_moments=True)
    assert projection_bytes([], rank=2) == 0
    with pytest.raises(ValueError, match="`rank` of projection_bytes must be an integer >= 1"):
        projection_bytes([(8, 12)], rank=0)
    with pytest.raises(ValueError, match=r"\(m, n\) or \(E, m, n\)"):
        projection_bytes([(8,)], rank=2)
