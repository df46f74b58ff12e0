"""An adapter extracted from an OSD fine-tune is the fine-tune, as far as its rank goes, and says what it is not."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import hf_osd
from hf_osd import create_osd_optimizer, extract_lora


peft = pytest.importorskip("peft")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)),
    "bert_mlm": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT, pad_token_id=1)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, vocab_size=32)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)),
}


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 32, (3, 6), generator=generator)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator).to(next(model.parameters()).dtype)}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def logits(model):
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


def fine_tuned(name: str, dtype: torch.dtype = torch.float64, steps: int = 4):
    """A base, and a copy of it of which OSD has trained all weights."""
    torch.manual_seed(0)
    base = MODELS[name]().to(dtype).eval()
    tuned = copy.deepcopy(base)
    optimizer = create_osd_optimizer(tuned, rank=4, lr=1e-2)
    for _ in range(steps):
        tuned(**inputs(tuned)).logits.float().log_softmax(-1)[..., 0].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(logits(tuned), logits(base), rtol=1e-2)
    return tuned, base


def reloaded(adapter, base, folder):
    adapter.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, autocast_adapter_dtype=False)


@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_it_is_the_tuned_model(name, tmp_path):
    tuned, base = fine_tuned(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    adapter = extract_lora(tuned, base, rank=1000, carry="all")
    assert not adapter.dropped and adapter.kept == pytest.approx(1, abs=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    loaded = reloaded(adapter, base, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-9, atol=1e-9)  # float64, two layers
    with loaded.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if adapter.config.bias == "none":
            assert torch.equal(logits(loaded), logits(base))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(tuned), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": "auto", "energy": 0.8}], ids=["fixed", "auto"])
def test_kept_shares_are_those_of_an_independent_svd(name, options, tmp_path):
    tuned, base = fine_tuned(name)
    adapter = extract_lora(tuned, base, carry="all", **options)
    state, inside, whole = adapter.state, 0.0, 0.0
    assert len(adapter.layers) == (13 if name == "bert" else 8)
    for layer, facts in adapter.layers.items():
        dW = (tuned.get_submodule(layer).weight - base.get_submodule(layer).weight).detach().numpy()
        dW = dW.T if name == "gpt2" else dW
        energies = np.linalg.svd(dW, compute_uv=False) ** 2
        wanted = 2
        if options["rank"] == "auto":
            wanted = 1 + int((np.cumsum(energies) < 0.8 * energies.sum()).sum())
            assert facts.kept >= 0.8
        A, B = (state[f"base_model.model.{layer}.lora_{x}.weight"].numpy() for x in "AB")
        assert (facts.shape, facts.rank) == (dW.shape, wanted) and A.shape == (adapter.rank, dW.shape[1])
        assert not A[wanted:].any() and not B[:, wanted:].any()
        error = ((dW - B @ A) ** 2).sum()
        assert facts.kept == pytest.approx(energies[:wanted].sum() / energies.sum(), abs=1e-9)
        assert error == pytest.approx((1 - facts.kept) * energies.sum(), abs=1e-9 * energies.sum())
        inside, whole = inside + energies.sum() - error, whole + energies.sum()
    assert adapter.kept == pytest.approx(inside / whole, abs=1e-9)
    # What peft loads has one rank, and the scaling 1 everywhere.
    loaded = reloaded(adapter, base, tmp_path).base_model.model
    for layer in adapter.layers:
        module = loaded.get_submodule(layer)
        assert module.r["default"] == adapter.rank and module.scaling["default"] == 1


def test_a_higher_rank_is_nearer(tmp_path):
    tuned, base = fine_tuned("bert")
    errors = []
    for rank in (1, 4, 16):
        loaded = reloaded(extract_lora(tuned, base, rank=rank, carry="all"), base, tmp_path / str(rank))
        errors.append(float((logits(loaded) - logits(tuned)).norm()))
    assert errors[0] > errors[1] > 100 * errors[2]


def test_bf16_models(tmp_path):
    tuned, base = fine_tuned("llama", torch.bfloat16)
    adapter = extract_lora(tuned, base, rank=1000, carry="all")
    assert {value.dtype for key, value in adapter.state.items() if "lora_" in key} == {torch.float32}
    error = (logits(reloaded(adapter, base, tmp_path)) - logits(tuned)).norm() / logits(tuned).norm()
    assert error < 0.02  # a few roundings of 2^-9


CARRIED = {"head": {"classifier"}, "auto": {"classifier", "norms", "biases"}}


@pytest.mark.parametrize("carry", CARRIED)
def test_what_is_carried_and_what_is_left_out(carry, tmp_path):
    tuned, base = fine_tuned("bert")
    with pytest.warns(UserWarning, match="leaves out what changed .*embeddings.word_embeddings"):
        adapter = extract_lora(tuned, base, rank=2, carry=carry)
    kinds = {
        "norms" if "LayerNorm" in name else "biases" if name.endswith(".bias") else name for name in adapter.carried
    }
    assert kinds == CARRIED[carry]
    embeddings = "bert.embeddings.word_embeddings"
    before, after = (model.get_submodule(embeddings).weight for model in (base, tuned))
    assert adapter.dropped[embeddings] == pytest.approx(float((after - before).norm() / before.norm()))
    assert ("bert.pooler.dense.bias" in adapter.dropped) == (carry == "head")
    loaded = reloaded(adapter, base, tmp_path)
    weights = loaded.merge_and_unload().state_dict()
    for name, value in tuned.state_dict().items():
        owner = name.rpartition(".")[0]
        if owner in adapter.carried or name in adapter.carried:
            assert torch.equal(weights[name], value), name
        elif owner not in adapter.layers:
            assert torch.equal(weights[name], base.state_dict()[name]), name
    # Biases that were zero have no relative change.
    assert math.isinf({**adapter.carried, **adapter.dropped}["bert.pooler.dense.bias"])


def test_a_peft_that_loses_biases_is_refused(monkeypatch):
    tuned, base = fine_tuned("bert")
    original = peft.get_peft_model_state_dict

    def without_biases(*args, **kwargs):  # as peft before 0.21
        return {key: value for key, value in original(*args, **kwargs).items() if "base_layer" not in key}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", without_biases)
    with pytest.raises(ValueError, match="would not save bert.*bias: install peft 0.21 or newer, or leave"):
        extract_lora(tuned, base)
    with pytest.warns(UserWarning, match="leaves out"):
        assert extract_lora(tuned, base, carry="head").layers


def test_layers_named_by_hand_are_carried():
    tuned, base = fine_tuned("bert")
    adapter = extract_lora(tuned, base, rank=2, carry="all", modules_to_save=["bert.pooler.dense"])
    assert "bert.pooler.dense" not in adapter.layers and "bert.pooler.dense" in adapter.carried


def test_folders_and_a_base_without_head(tmp_path):
    tuned, base = fine_tuned("bert", torch.float32)
    base.bert.pooler = None  # as a masked language model is saved: no pooler, no classifier
    base.bert.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    adapter = extract_lora(tmp_path / "tuned", tmp_path / "base", rank=1000, carry="all")
    assert {"classifier", "bert.pooler.dense"} <= adapter.carried.keys()  # both are random in the base
    assert len(adapter.layers) == 12 and adapter.config.base_model_name_or_path == str(tmp_path / "base")
    torch.manual_seed(5)  # another random head
    fresh = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    loaded = reloaded(adapter, fresh, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(tuned), rtol=1e-4, atol=1e-5)
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(logits(auto), logits(tuned), rtol=1e-4, atol=1e-5)
    assert f"base_model: {tmp_path / 'base'}" in (tmp_path / "adapter" / "README.md").read_text()
    assert adapter.model_bytes == sum(4 * p.numel() for p in fresh.parameters())
    assert adapter.bytes == sum(value.numel() * value.element_size() for value in adapter.state.values())


def test_only_layers_that_changed_are_in_it():
    base = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 5))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[1].weight.add_(1)
    adapter = extract_lora(tuned, base, rank=1)
    assert list(adapter.layers) == ["1"] and not adapter.carried and not adapter.dropped


def change(model, name="0.weight", value=1.0):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(name).add_(value)
    return changed


BASE = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("tuned", "options", "message"),
    [
        (BASE, {}, "No matrix of a linear layer differs.*nor anything else: are they the same"),
        (change(BASE, "1.weight"), {}, "No matrix of a linear layer differs.*what changed: 1$"),
        (change(BASE, value=math.nan), {}, "0.weight has values that are not finite"),
        (torch.nn.Sequential(torch.nn.Linear(6, 5)), {}, r"0.weight has the shape \(5, 6\), in the base \(4, 6\)"),
        (torch.nn.Sequential(torch.nn.Linear(6, 4)), {}, "1.weight is only in the base"),
        (torch.nn.Sequential(torch.nn.Linear(6, 4), *BASE), {}, r"1.weight has the shape|2.weight is only in the tun"),
        (change(BASE), {"rank": 0}, "`rank` must be a positive integer or 'auto', got 0"),
        (change(BASE), {"rank": True}, "`rank` must be a positive integer"),
        (change(BASE), {"rank": 4, "energy": 0.5}, "are for rank='auto'"),
        (change(BASE), {"rank": "auto", "energy": 1.5}, "`energy` must be above 0 and at most 1"),
        (change(BASE), {"rank": "auto", "max_rank": 0}, "`max_rank` must be a positive integer"),
        (change(BASE), {"carry": "some"}, "`carry` must be one of 'none', 'head', 'auto', 'all', got 'some'"),
        (change(BASE), {"modules_to_save": ["7"]}, "`modules_to_save` names '7', which is no module"),
        (change(BASE), {"modules_to_save": [""]}, "`modules_to_save` names '', a Sequential: name modules inside it"),
    ],
)
def test_what_cannot_be_is_refused(tuned, options, message):
    with pytest.raises(ValueError, match=message):
        extract_lora(tuned, BASE, **options)


MODEL_FILE_NAMES = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("name", MODEL_FILE_NAMES)
def test_no_adapter_is_written_beside_a_model(name, tmp_path):
    adapter = extract_lora(change(BASE), BASE, rank=1)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds a model \({name}\).*Choose another folder"):
        adapter.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_adapter_is_written_over_another_and_beside_folders_of_models(tmp_path):
    adapter = extract_lora(change(BASE), BASE, rank=1)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{}")
    adapter.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # some trainers leave the base's config beside an adapter
    adapter.save_pretrained(tmp_path)


def test_folders_of_other_models_are_refused(tmp_path):
    MODELS["bert"]().save_pretrained(tmp_path / "bert")
    MODELS["llama"]().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="The tuned model is a bert, the base .* a llama"):
        extract_lora(tmp_path / "bert", tmp_path / "llama")
    with pytest.raises(ValueError, match="`base` must be a module too: Sequential"):
        extract_lora(BASE, tmp_path / "bert")
    assert hf_osd.extract_lora is extract_lora
