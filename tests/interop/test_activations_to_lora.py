"""LoRA from a model trained with `source="activations"`, and started from its P."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hf_osd
from hf_osd import ProjectionState, create_osd_optimizer, extract_lora, init_lora_from_projection
from reference.tiny_models import tiny_llama


pytest.importorskip("peft")


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()


def trained(make, **options):
    model = make()
    optimizer = create_osd_optimizer(model, lr=1e-2, rank=3, source="activations", **options)
    ids = torch.randint(0, 64, (2, 8))
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
@pytest.mark.parametrize("unloaded", [False, True])
def test_what_a_prepared_model_has_learned_is_extracted(make, unloaded, tmp_path):
    from peft import PeftModel

    model, optimizer = trained(make, subspace="static", init="orthonormal")
    base = make()
    if unloaded:
        hf_osd.unload(model)
    adapter = extract_lora(model, base, rank=3, carry="all")
    # every change is D Pᵀ with a P that stays
    names = [name.removesuffix(".weight") for name in ProjectionState.from_optimizer(optimizer)]
    assert all(adapter.layers[name].kept > 0.9999 for name in names) and not adapter.dropped
    adapter.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    for name in names:
        weights = (model_.get_submodule(name).weight for model_ in (merged, model))
        assert torch.allclose(*weights, atol=1e-5)
    assert optimizer.layers.installed != unloaded  # extracting has changed nothing


@pytest.mark.parametrize("make", [tiny_llama, gpt2])
def test_an_adapter_starts_from_p_of_the_inputs(make):
    from peft import LoraConfig, get_peft_model

    model, optimizer = trained(make)
    state = ProjectionState.from_optimizer(optimizer)
    names = [name.removesuffix(".weight") for name in state]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, target_modules=names, fan_in_fan_out=make is gpt2))
    assert init_lora_from_projection(adapted, state) == names
    for name in names:
        layer = adapted.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, state[f"{name}.weight"].projection.T)
        assert not layer.lora_B["default"].weight.any()


def test_unload_leaves_no_trace():
    model, optimizer = trained(tiny_llama)
    plain = tiny_llama()
    assert hf_osd.unload(model) is model and hf_osd.unload(plain) is plain
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))
    assert all(
        vars(module).keys() == vars(other).keys()
        for module, other in zip(model.modules(), plain.modules(), strict=True)
    )
    with pytest.raises(ValueError, match="plain again"):
        optimizer.step()
