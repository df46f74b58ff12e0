"""Which parameters are projected by default, on models of several families built from configs."""

import pytest
from target_models import LLAMA_LAYERS, MODELS, Pair, layers, tiny_bert, tiny_gpt2, tiny_t5

from hf_osd.optim.selection.targets import select
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize("model", MODELS)
def test_every_trainable_parameter_is_in_one_place(model):
    model = MODELS[model]()
    selection = select(model)
    names = [*selection.projected, *selection.full_size]
    assert sorted(names) == sorted(name for name, p in model.named_parameters())
    assert all(p.ndim == 2 for p in selection.projected.values())
    assert all(model.get_parameter(name) is p for name, p in (selection.projected | selection.full_size).items())
    assert selection.ignored == [] and selection.frozen == []


def test_all_linear_of_llama_is_every_layer_of_the_blocks():
    selection = select(tiny_llama())
    assert len(selection.projected) == 2 * 7
    assert layers(selection.projected) == LLAMA_LAYERS
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= selection.full_size.keys()


def test_all_linear_of_gpt2_finds_conv1d():
    model = tiny_gpt2()
    selection = select(model)
    assert len(selection.projected) == 2 * 4
    assert layers(selection.projected) == {"c_attn", "c_proj", "c_fc"}
    assert tuple(selection.projected["transformer.h.0.attn.c_attn.weight"].shape) == (32, 96)  # (in, out)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= selection.full_size.keys()
    assert "lm_head.weight" not in selection.full_size  # tied to wte


def test_all_linear_of_bert_leaves_pooler_and_classifier():
    selection = select(tiny_bert())
    assert len(selection.projected) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in selection.projected)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= selection.full_size.keys()
    assert {name for name in selection.full_size if "embeddings" in name and name.endswith("s.weight")}


def test_all_linear_of_t5_takes_both_stacks_and_no_embedding():
    selection = select(tiny_t5())
    assert len(selection.projected) == 2 * (4 + 2) + 2 * (8 + 2)  # encoder; decoder with cross-attention
    assert layers(selection.projected) == {"q", "k", "v", "o", "wi", "wo"}
    assert "shared.weight" in selection.full_size
    assert not any("relative_attention_bias" in name for name in selection.projected)


def test_all_linear_without_blocks_takes_all_but_the_head():
    model = Pair()
    selection = select(model)
    assert list(selection.projected) == ["first.weight"]  # shared with `second`, counted once
    assert selection.full_size.keys() == {"first.bias", "norm.weight", "norm.bias", "second.bias", "head.weight"} | {
        "head.bias"
    }


@pytest.mark.parametrize(
    ("model", "shared"), [(tiny_t5(), "shared.weight"), (tiny_llama(tie_word_embeddings=True), None)]
)
def test_tied_weights_count_once(model, shared):
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    selection = select(model)
    parameters = [*selection.projected.values(), *selection.full_size.values()]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
    # Asked for by the name of the other module, it is projected under its own.
    named = select(model, ["lm_head"])
    assert list(named.projected) == [shared or "model.embed_tokens.weight"]


def test_frozen_parameters_are_left_out_of_everything():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    model.lm_head.requires_grad_(False)
    selection = select(model)
    assert len(selection.projected) == 7
    assert len(selection.frozen) == 7 and all(name.startswith("model.layers.0.") for name in selection.frozen)
    assert not any(name.startswith("model.layers.0.") for name in selection.full_size)
    assert "lm_head.weight" not in selection.full_size


def test_a_frozen_selection_is_refused_with_the_reason():
    model = tiny_llama()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="14 matching layers are frozen"):
        select(model)
