"""What an adapter holds and what it leaves out are together the tuned model, in every family of models."""

import copy
import json
import re
import warnings

import pytest
import torch
from families import FAMILIES, FLOAT32, outputs, pair
from safetensors.torch import load_file
from torch import nn

from hf_osd import extract_lora


peft = pytest.importorskip("peft")

CARRY = ["none", "head", "auto", "all"]


def extracted(tuned, base, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The adapter leaves out")
        return extract_lora(tuned, base, **options)


def loaded(adapter, base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="vLLM refuses")
        adapter.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)


def within(name: str, names) -> bool:
    return any(name == other or name.startswith(other + ".") for other in names)


def with_dropped(adapter, tuned, base):
    """The base with what the adapter says that it leaves out."""
    model, ours = copy.deepcopy(base), tuned.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if within(name, adapter.dropped):
                value.copy_(ours[name])
    return model


@pytest.mark.parametrize("carry", CARRY)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_adapter_and_what_it_leaves_out_are_the_tuned_model(name, carry, tmp_path):
    tuned, base = pair(name)
    adapter = extracted(tuned, base, rank=1000, carry=carry)
    change = (outputs(tuned) - outputs(base)).norm()
    model = loaded(adapter, with_dropped(adapter, tuned, base), tmp_path)
    # one rounding in each of a few layers, of float64 or float32; some compute a part in float32 always
    assert (outputs(model) - outputs(tuned)).norm() < 1e-6 * change
    for weight in tuned.state_dict():
        layer = weight.endswith(".weight") and weight.removesuffix(".weight") in adapter.layers
        # a weight that two modules share may be carried under one name and left out under the other
        places = [layer, within(weight, adapter.carried), within(weight, adapter.dropped)]
        assert sum(places) == 1, (weight, places)
    assert carry != "none" or not adapter.carried
    norms = [module for module in dict(tuned.named_modules()) if re.search(r"norm\w*$", module.lower())]
    norms = [norm for norm in norms if next(tuned.get_submodule(norm).parameters(recurse=False), None) is not None]
    assert carry not in ("auto", "all") or all(within(norm, adapter.carried) for norm in norms)


def test_what_is_left_out_of_everything_that_can_be_carried():
    """With carry="all": weights of the model itself, and of modules that hold LoRA layers."""
    left = {"beit": r"beit.layers.\d.lambda_[12]", "clip": "logit_scale", "xlnet": "transformer.mask_emb"}
    for name, pattern in left.items():
        tuned, base = pair(name)
        with pytest.warns(UserWarning, match="leaves out"):
            dropped = extract_lora(tuned, base, carry="all").dropped
        assert dropped and all(re.fullmatch(pattern, part) for part in dropped), dropped


@pytest.mark.parametrize("name", ["bert_mlm", "roberta_mlm"])
@pytest.mark.parametrize("carry", ["head", "auto"])
def test_the_trained_part_of_a_language_models_head_is_carried(name, carry):
    adapter = extracted(*pair(name), rank=2, carry=carry)
    parts = {
        "bert_mlm": {"cls.predictions.transform"},
        "roberta_mlm": {"lm_head.dense", "lm_head.layer_norm"},
    }[name]
    assert parts <= adapter.carried.keys() and not any("decoder" in part for part in adapter.carried)


def folded(base, folder):
    """The base with the adapter as programs with one scale read it: every tensor A or B, alpha / r of the config."""
    config, state = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    scale, model = config["lora_alpha"] / config["r"], copy.deepcopy(base)
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        A, B = state.pop(key), state.pop(key.replace("lora_A", "lora_B"))
        assert A.shape[0] == B.shape[1] == config["r"] == config["lora_alpha"]
        with torch.no_grad():
            model.get_submodule(name).weight.add_(scale * (B @ A))
    assert not state and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["bias"] == "none" and not config["modules_to_save"]
    return model


@pytest.mark.parametrize("options", [{"rank": 12}, {"rank": "auto", "energy": 0.6}], ids=["clipped", "auto"])
@pytest.mark.parametrize("name", ["llama", "glm4_moe", "llama4"])
def test_one_rank_and_one_alpha_for_all_layers(name, options, tmp_path):
    tuned, base = pair(name)
    adapter = extracted(tuned, base, carry="none", **options)
    ranks = {layer: facts.rank for layer, facts in adapter.layers.items()}
    if name != "llama" or options["rank"] == "auto":
        assert len(set(ranks.values())) > 1
    assert adapter.rank == max(ranks.values()) and not adapter.limits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.save_pretrained(tmp_path)
    approximated = copy.deepcopy(base)  # by an independent SVD of each change
    with torch.no_grad():
        for layer, r in ranks.items():
            weight = approximated.get_submodule(layer).weight
            U, s, Vh = torch.linalg.svd(tuned.get_submodule(layer).weight.double() - weight.double())
            weight.add_(U[:, :r] * s[:r] @ Vh[:r])
    wanted, change = outputs(approximated), (outputs(approximated) - outputs(base)).norm()
    assert (outputs(folded(base, tmp_path)) - wanted).norm() < 1e-5 * change  # factors are float32 where the base is
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert (outputs(model) - wanted).norm() < 1e-5 * change
    merged = model.merge_and_unload()
    assert (outputs(merged) - wanted).norm() < 1e-5 * change


def test_what_other_programs_cannot_read_is_said_when_it_is_written(tmp_path):
    tuned, base = pair("llama")
    with pytest.warns(UserWarning, match="vLLM refuses .*llama.cpp drops norms.*carry='none'"):
        extracted(tuned, base, rank=2).save_pretrained(tmp_path)


class Scaled(nn.Linear):
    """A linear layer that is none: B A x would be added at the wrong scale."""

    def forward(self, x):
        return 2 * super().forward(x)


class Odd(nn.Module):
    """Everything that has to be carried, named or adapted in an unusual way."""

    def __init__(self):
        super().__init__()
        self.norm, self.input_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.scaled, self.only_bias, self.frozen = Scaled(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.steps = nn.ParameterList([nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))])
        self.block = nn.ModuleDict({"0": nn.Linear(8, 8), "frozen": nn.Linear(8, 8)})
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.scaled(self.norm(x)) + self.only_bias(self.input_norm(x)) * self.gain
        x = self.again(torch.tanh(self.shared(x) * self.steps[0])) * self.steps[1]
        return self.block["frozen"](self.frozen(torch.tanh(self.block["0"](x))))


def test_layers_that_are_no_plain_targets(tmp_path):
    torch.manual_seed(0)
    base = Odd().double()
    tuned, x = copy.deepcopy(base), torch.randn(4, 8, dtype=torch.float64)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if name not in ("only_bias.weight", "frozen.bias", "block.frozen.weight", "block.frozen.bias"):
                p.add_(0.1 * torch.randn_like(p))
    adapter = extracted(tuned, base, rank=8)
    assert adapter.layers.keys() == {"scaled", "only_bias", "frozen", "block.0"}
    assert adapter.config.target_parameters == ["scaled.weight"]
    assert adapter.carried.keys() >= {"norm", "input_norm", "only_bias.bias", "scaled.bias", "block.0.bias"}
    assert adapter.dropped.keys() == {"shared", "again", "steps.0", "steps.1", "gain"}
    model = loaded(adapter, with_dropped(adapter, tuned, base), tmp_path)
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-9, atol=1e-9)  # float64
    everything = extracted(tuned, base, rank=8, carry="all")
    assert everything.dropped.keys() == {"steps.0", "steps.1", "gain"}
    model = loaded(everything, with_dropped(everything, tuned, base), tmp_path / "all")
    torch.testing.assert_close(model(x), tuned(x), rtol=1e-9, atol=1e-9)


def test_a_layer_whose_weight_is_read_is_no_target():
    """Mamba multiplies with dt_proj's weight itself: an adapter there would have no effect."""
    adapter = extracted(*pair("mamba"), rank=2, carry="auto")
    assert not any("dt_proj" in layer or "out_proj" in layer for layer in adapter.layers)  # the latter peft refuses
    assert {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.out_proj"} <= adapter.dropped.keys()
    assert "mamba" not in FLOAT32
