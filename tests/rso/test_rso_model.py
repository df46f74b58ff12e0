"""A prepared model trains the right parameters, saves and loads as the plain one, and can be had back."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_osd.optim import select
from hf_osd.rso import create_rso_model, outer_loop, rso_param_groups, trained_parameters, unload_rso_model
from reference.tiny_models import tiny_llama


IDS = torch.arange(24).view(2, 12)


def with_random_b(model: nn.Module) -> nn.Module:
    loop = outer_loop(model)
    assert loop is not None
    with torch.no_grad():
        for _, B in loop.factors():
            B.normal_(std=0.1)
    return model


def test_the_matrices_of_osd_are_targeted_and_the_rest_is_trained_as_before():
    plain = tiny_llama()
    plain.model.norm.weight.requires_grad_(False)
    selection = select(plain, rank=8)
    model = create_rso_model(tiny_llama(), 8)
    loop = outer_loop(model)
    assert loop is not None
    assert {f"{name}.weight" for name in loop.layers} == selection.projected.keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == selection.full_size.keys() | {"model.norm.weight"}
    assert {name for name in trained if "lora_" in name} == {f"{name}.lora_B.rso.weight" for name in loop.layers}
    shapes = {name.replace(".base_layer", ""): p.shape for name, p in trained_parameters(model)}
    assert shapes == {name: p.shape for name, p in plain.named_parameters()}
    frozen = create_rso_model(plain, 8)
    assert "model.norm.weight" not in {name for name, p in frozen.named_parameters() if p.requires_grad}


def test_a_fresh_model_computes_what_it_did():
    plain, model = tiny_llama().eval(), create_rso_model(tiny_llama(), 8).eval()
    assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_saved_models_are_plain_and_loadable(make, tmp_path):
    model = with_random_b(create_rso_model(make(), 8).eval())
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(input_ids=IDS).logits
    assert not torch.allclose(logits, make().eval()(input_ids=IDS).logits)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())  # the live model is unchanged
    assert model.state_dict().keys() == make().state_dict().keys()
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    # W + P B rounded once to float32, against W x + B (P x)
    torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)

    other = with_random_b(create_rso_model(make(), 8, seed=3).eval())
    assert not any(other.load_state_dict(loaded.state_dict()))  # strict
    assert torch.equal(other(input_ids=IDS).logits, loaded(input_ids=IDS).logits)


def test_unloading_gives_the_plain_model_back():
    model = with_random_b(create_rso_model(tiny_llama(), 8))
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    unload_rso_model(model)
    assert isinstance(model, LlamaForCausalLM) and outer_loop(model) is None
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    create_rso_model(model, 4)
    with pytest.raises(ValueError, match="nothing to unload"):
        unload_rso_model(tiny_llama())


def test_what_rso_cannot_do_is_refused():
    from peft import LoraConfig, get_peft_model

    model = create_rso_model(tiny_llama(), 8)
    with pytest.raises(ValueError, match="already prepared"):
        create_rso_model(model, 8)
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="cannot be combined with the model's adapters"):
        create_rso_model(adapted, 8)
    with pytest.raises(ValueError, match="must be below the 32 inputs of .*q_proj"):
        create_rso_model(tiny_llama(), 32)
    moe = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    mixtral = MixtralForCausalLM(MixtralConfig(hidden_size=32, intermediate_size=48, vocab_size=64, **moe))
    with pytest.raises(ValueError, match="stack of experts"):
        create_rso_model(mixtral, 8)
    create_rso_model(mixtral, 8, exclude_modules=["experts"])
    shared = nn.Sequential(*[nn.Linear(9, 9), nn.Linear(9, 9)])
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="share weights"):
        create_rso_model(shared, 3)
    quantised = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantised[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        create_rso_model(quantised, 3)
    with pytest.raises(ValueError, match="lacks B of 14 layers"):
        outer_loop(model).before_step(torch.optim.AdamW([model.model.norm.weight]), 0)
    with pytest.raises(ValueError, match="call `create_rso_model` first"):
        rso_param_groups(tiny_llama(), 1e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"rank": 0}, "`rank` of RSO must be an integer >= 1, got 0"),
        ({"interval": 2.5}, "`interval` of RSO must be an integer"),
        ({"seed": -1}, "`seed` of RSO"),
        ({"eta": 0.0}, "`eta` of RSO must be a number above 0"),
        ({"eta": float("inf")}, "Leave it out for no proximal term"),
        ({"sampling": "haar"}, "`sampling` of RSO must be one of gaussian, orthonormal"),
    ],
)
def test_wrong_options_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_rso_model(tiny_llama(), **wrong)
