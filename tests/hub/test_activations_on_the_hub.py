"""P that layers with one input share (`source="activations"`): stored once, shown, started from, told of in cards."""

import json
import re

import pytest
import torch
from card_reading import code, rows
from projection_sets import assert_same, projection
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_osd import create_osd_optimizer
from hf_osd.cli.main import main
from hf_osd.hub import Projection, ProjectionState, projection_bytes
from hf_osd.hub.card.model_card import update_card
from reference.tiny_models import tiny_llama


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))


def trained(make=tiny_llama, steps=3, **options):
    model = make()
    optimizer = create_osd_optimizer(model, **{"rank": 4, "source": "activations", **options})
    ids = torch.randint(0, 32, (2, 8))
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def holders(state):
    return {name.removeprefix("model.layers.0."): entry.holder for name, entry in state.items() if ".0." in name}


@pytest.mark.parametrize("include_moments", [False, True])
def test_a_shared_p_is_stored_once(include_moments, max_shard_size, tmp_path):
    model, optimizer = trained()
    state = ProjectionState.from_optimizer(optimizer, include_moments)
    state.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    read = ProjectionState.from_pretrained(tmp_path)
    assert_same(state, read)
    q, gate = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"
    wanted = dict.fromkeys(["self_attn.k_proj.weight", "self_attn.v_proj.weight"], q) | {"mlp.up_proj.weight": gate}
    for found in (state, read):
        assert {name: holder for name, holder in holders(found).items() if holder} == wanted
        assert len({id(entry.projection) for entry in found.values()}) == 8 and len(found) == 14
    for name, p in model.named_parameters():
        if name in state:
            held = dict(optimizer.state[p])
            own = optimizer.state[model.get_parameter(state[name].holder or name)]["projection"]
            assert torch.equal(state[name].projection, own) and state[name].side == "right"
            held.pop("projection", None)
            assert state[name].moments.keys() == (held.keys() if include_moments else set())
    stored = set()
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= set(tensors.keys())
    assert {key for key in stored if "::" not in key} == {name for name in state if state[name].holder is None}
    config = json.loads((tmp_path / "osd_config.json").read_text())
    assert config["source"] == "activations" and config["format_version"] == 2
    assert (
        config["parameters"][gate.replace("gate", "up")]["holder"] == gate and "holder" not in config["parameters"][q]
    )


def test_what_shares_nothing_is_written_as_ever(tmp_path):
    ProjectionState({"a": projection()}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "osd_config.json").read_text())
    assert config["format_version"] == 1 and "holder" not in config["parameters"]["a"]


def test_a_shared_p_is_one():
    entry, other = projection(seed=0), projection(seed=1)
    shared = Projection(other.projection, "left", 3, (6, 10), {}, "a")
    with pytest.raises(ValueError, match="P of b is another than that of its holder a"):
        ProjectionState({"a": entry, "b": shared})
    with pytest.raises(ValueError, match="has the holder 'a', which is no parameter there"):
        ProjectionState({"b": shared})


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_another_run_starts_from_it_with_either_source(make, tmp_path):
    state = ProjectionState.from_optimizer(trained(make)[1])
    state.save_pretrained(tmp_path)
    state = ProjectionState.from_pretrained(tmp_path)
    again = ProjectionState.from_optimizer(trained(make, steps=1, init=state, subspace="static")[1])
    side = {"source": "gradients", "side": "right" if make is tiny_llama else "left"}
    plain = ProjectionState.from_optimizer(trained(make, steps=1, init=state, subspace="static", **side)[1])
    assert list(state) == list(again) == list(plain)
    for name, entry in state.items():
        assert torch.equal(again[name].projection, entry.projection) and again[name].holder == entry.holder
        assert torch.equal(plain[name].projection, entry.projection) and plain[name].holder is None


def test_p_learned_from_gradients_starts_activations_each_by_itself():
    state = ProjectionState.from_optimizer(trained(source="gradients", side="right")[1])
    again = ProjectionState.from_optimizer(trained(steps=1, init=state, subspace="static")[1])
    for name, entry in state.items():
        assert torch.equal(again[name].projection, entry.projection) and again[name].holder is None


def test_p_of_the_other_side_is_refused():
    """Of a square matrix it would fit, and mean nothing."""
    of_inputs = ProjectionState.from_optimizer(trained()[1])
    square = {"target_modules": "o_proj"}
    with pytest.raises(ValueError, match=r"o_proj.* is of the right side, .* on the left. Give side='right'."):
        create_osd_optimizer(tiny_llama(), rank=4, init=of_inputs, side="left", **square)
    of_outputs = ProjectionState.from_optimizer(trained(source="gradients", side="left", **square)[1])
    with pytest.raises(ValueError, match="is of the left side, .* on the right. Use source='gradients' for it."):
        create_osd_optimizer(tiny_llama(), rank=4, init=of_outputs, source="activations", **square)


def test_the_size_of_what_is_stored(tmp_path):
    state = ProjectionState.from_optimizer(trained()[1])
    shapes = [entry.shape for entry in state.values() if entry.holder is None]
    state.save_pretrained(tmp_path)
    with safe_open(tmp_path / "osd_projection.safetensors", "pt") as file:
        size = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 - not a dict
    assert projection_bytes(shapes, 4, side="right") == size


def test_show_tells_whose_p_it_is(tmp_path, capsys):
    model, optimizer = trained()
    tiny_llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    state = ProjectionState.from_optimizer(optimizer)
    state.save_pretrained(tmp_path / "model")
    main(["show", str(tmp_path / "model"), "--json", "--base", str(tmp_path / "base")])
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["source"] == "activations"
    assert [row["holder"] for row in report["parameters"]] == [entry.holder for entry in state.values()]
    assert report["bytes"] == sum(entry.projection.nbytes for entry in state.values() if entry.holder is None)
    # A step of its own P before each move of it: nearly all of the change is where it ended
    assert all(row["share"] > 0.9 for row in report["parameters"])
    main(["show", str(tmp_path / "model")])
    text = capsys.readouterr().out
    assert "8 projections of 14 matrices" in text and "source activations" in text
    (line,) = [line for line in text.splitlines() if line.startswith("model.layers.1.self_attn.v_proj")]
    assert line.split()[5:] == ["right", "self_attn.q_proj", line.split()[-1]]


def test_show_without_sharing_has_no_such_column(tmp_path, capsys):
    ProjectionState({"a": projection()}).save_pretrained(tmp_path)
    main(["show", str(tmp_path)])
    text = capsys.readouterr().out
    assert "1 projections, " in text and "P of" not in text


def test_the_card_tells_it_and_its_code_runs(run, llama, tmp_path):
    made = run(source="activations", facts={"repo_id": str(tmp_path)})
    assert (made.facts.matrices, made.facts.from_activations, made.facts.projections) == (14, 14, 8)
    llama.save_pretrained(tmp_path)
    ProjectionState.from_optimizer(made.optimizer).save_pretrained(tmp_path)
    text = update_card(tmp_path, made.facts).read_text()
    shown = rows(text)
    assert shown["what P learns from"] == "`activations`" and shown["P"] == "8, shared by layers with one input"
    assert "side" not in shown and "Of 14 of them no gradient of full size was ever formed" in text
    assert f'optim_args="rank=4,source=activations,init={tmp_path}"' in text
    found = {}
    exec(code(text), found)
    ids = torch.randint(0, 32, (2, 8))
    found["model"](input_ids=ids, labels=ids).loss.backward()
    found["optimizer"].step()
    again = ProjectionState.from_optimizer(found["optimizer"])
    assert holders(again) == holders(ProjectionState.from_optimizer(made.optimizer))


@pytest.mark.parametrize("model", [{}, {"target_modules": ["q_proj", "up_proj"]}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"source": "activations"},
        {"lr_pattern": "q_proj:2", "residual": "scaled"},
        {"projection_optim": "sgd", "momentum": 0.0, "scale": 0.123456789, "projection_weight_decay": 0.01},
    ],
    ids=str,
)
def test_what_the_card_says_of_a_trainer_sets_it_as_the_run_was(options, model, run, llama, tmp_path):
    made = run(preset="pretrain", facts={"repo_id": str(tmp_path)}, **options, **model)
    llama.save_pretrained(tmp_path)
    ProjectionState.from_optimizer(made.optimizer).save_pretrained(tmp_path)
    text = update_card(tmp_path, made.facts).read_text()
    told = re.search(r'`optim_args="([^"]*)"`(?: with `optim_target_modules=(.*)`)? starts from them', text)
    targets = {"optim_target_modules": eval(told[2])} if told[2] else {}
    args = TrainingArguments(
        str(tmp_path / "next"), optim="osd_adamw", optim_args=told[1], report_to="none", use_cpu=True, **targets
    )
    again = Trainer(tiny_llama(), args, train_dataset=[]).create_optimizer()
    for group, other in zip(made.optimizer.param_groups, again.param_groups, strict=True):
        names = group.keys() - {"params", "init", "lr", "weight_decay", "sides", "seed", "eps", "betas"}
        assert {name: group[name] for name in names} == {name: other[name] for name in names}
    assert [group["init"] for group in again.param_groups if group["rank"] is not None] == ["given"] * sum(
        group["rank"] is not None for group in made.optimizer.param_groups
    )


def test_the_card_says_of_how_many_columns_signs_are(run, tmp_path):
    shown = []
    for options in ({}, {"residual_sample": 2}, {"residual": "none"}, {"source": "gradients"}):
        made = run(**{"source": "activations", "preset": "pretrain", "facts": {"repo_id": str(tmp_path)}} | options)
        shown.append(
            rows(update_card(tmp_path, made.facts).read_text()).get("residual of one column of the gradient in")
        )
    assert shown == ["`4`", "`2`", None, None]


def test_the_card_of_signs_of_all_columns_claims_no_missing_gradients(run, tmp_path):
    made = run(source="activations", residual="sign", residual_sample=1, facts={"repo_id": str(tmp_path)})
    text = update_card(tmp_path, made.facts).read_text()
    assert "Of 14 of them P belongs to the layers' inputs." in text and "no gradient of full size" not in text


def test_a_push_comes_back(client, hub):
    state = ProjectionState.from_optimizer(trained()[1], include_moments=True)
    state.push_to_hub("tester/shared", token=hub.token)
    assert_same(state, ProjectionState.from_pretrained("tester/shared"))


def test_a_state_before_the_first_step_has_what_was_given():
    """As accelerate takes it, and loads it again, before anything is trained: layers still share."""
    state = ProjectionState.from_optimizer(trained()[1])
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, rank=4, source="activations", init=state, subspace="static")
    optimizer.load_state_dict(optimizer.state_dict())
    before = ProjectionState.from_optimizer(optimizer)
    assert holders(before) == holders(state)
    model(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    for name, entry in ProjectionState.from_optimizer(optimizer).items():
        assert torch.equal(entry.projection, state[name].projection) and entry.holder == state[name].holder
