"""Quantised layers are never selected, by whatever library, and asking for them is refused with the way out."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from hf_osd import create_osd_optimizer
from hf_osd.optim import select


class Codes(torch.Tensor):
    """A tensor as torchao and quanto make them: it says that it is a float tensor of the weight's shape."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: torch.Tensor):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Codes(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Codes(args[0].codes)
        raise NotImplementedError(str(function))


class PackedLinear(nn.Module):
    """As GPTQ's and AWQ's: no `nn.Linear`, the weight a buffer of packed integers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 24, dtype=torch.int32))


class PackedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gate_up_proj_blocks", torch.zeros(3, 4, 24, dtype=torch.uint8))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 4, 24))


def four_bit() -> nn.Module:
    return bnb.nn.Linear4bit(32, 24).to("cpu")  # `to` is what quantises


def eight_bit() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.zeros(24, 32, dtype=torch.int8), requires_grad=False)
    return layer


def of_codes() -> nn.Module:
    layer = nn.Linear(32, 24)
    layer.weight = nn.Parameter(Codes(torch.zeros(24, 32, dtype=torch.int8)))
    return layer


def float8() -> nn.Module:
    layer = nn.Linear(32, 24)
    layer.weight = nn.Parameter(torch.zeros(24, 32).to(torch.float8_e4m3fn), requires_grad=False)
    return layer


LAYERS = {
    "bitsandbytes 4 bit": four_bit,
    "bitsandbytes 4 bit not yet on its device": lambda: bnb.nn.Linear4bit(32, 24),
    "bitsandbytes 8 bit": eight_bit,
    "tensor subclass": of_codes,
    "float8": float8,
    "packed": PackedLinear,
    "packed experts": PackedExperts,
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module, whole: bool):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": layer, "norm": nn.LayerNorm(24)})])
        if whole:
            self.layers[0]["whole"] = nn.Linear(32, 24)


@pytest.mark.parametrize("layer", LAYERS)
def test_all_linear_leaves_them_and_projects_the_rest(layer: str):
    model = Model(LAYERS[layer](), whole=True)
    selection = select(model)
    assert list(selection.projected) == ["layers.0.whole.weight"]
    assert selection.quantised == ["layers.0.proj"]
    create_osd_optimizer(model, rank=4)


@pytest.mark.parametrize("wanted", [["proj"], ["layers.0.proj", "whole"], r".*proj"])
@pytest.mark.parametrize("layer", LAYERS)
def test_naming_one_is_refused(layer: str, wanted):
    with pytest.raises(ValueError, match="quantised layers.*layers.0.proj. To train all weights.*without.*LoRA"):
        select(Model(LAYERS[layer](), whole=True), wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_model_of_nothing_else_is_refused(layer: str):
    with pytest.raises(ValueError, match="Nothing to project: 1 layers are quantised.*To train all weights"):
        select(Model(LAYERS[layer](), whole=False))


def test_eight_bit_layers_that_keep_whole_weights_are_projected():
    layer = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=True)
    assert list(select(Model(layer, whole=False)).projected) == ["layers.0.proj.weight"]
