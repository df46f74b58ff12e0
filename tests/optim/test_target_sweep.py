"""`all-linear` on every model class of transformers, without weights: no head is projected, no block is left out."""

import re
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_osd.optim.selection.targets import linear_classes, select


LABELS = 97  # a number of classes that is no width of any model
LAYERS = re.compile(r"n_layers?|(num_)?((en|de)coder_)?(hidden_)?layers")
# Heads and small MLPs whose layers stand in a row, as blocks do, and are at full size. They end in:
HEADS = (
    r"(lm|order|bbox|class|score|anchor|point|points|position|pos|query|prediction|answer)_heads?\.(\w+\.)*\d+(\.\w+)?",
    r"(class|bbox)_embed\.(\w+\.)*\d+",
    r"(bbox_predictor|labels_classifier|predict_action|classifier)\.(layers\.)?\d+",
)
SMALL = (
    r"(aligner\.hidden_layers|merger\.mlp|projector\.readout|(text|visual)_projection)\.\d+",  # between two models
    r"(prenet\.layers|time_mlp|query_scale\.layers|keypoint_encoder\.encoder|loss_weighting\.layers)\.\d+",
    r"(mask_embedder|hq_mask_mlp|object_pointer_proj)\.(layers\.)?\d+(\.\d+)?",  # of masks
    r"(encoder_vision_features|enc_output)\.\d+",  # of DETR's queries
    r"altup_(unembed_)?projections\.\d+",  # Gemma3n: before and after its layers
)
LEFT = re.compile(rf"(.*[._])?({'|'.join((*HEADS, *SMALL))})")
# Without linear layers in their blocks: convolutions, and I-BERT's, SqueezeBERT's and PoolFormer's own layers.
NOTHING = re.compile(
    "(Bit|Dac|EdgeTamVision|EfficientNet|Encodec|GlmImageVQVAE|HGNetV2|IBert|MobileNet|MobileViTV2|PPLCNet|PPOCR|"
    "PoolFormer|RTDetrResNet|RegNet|ResNet|SLANet|SqueezeBert|SuperPoint|TextNet|TimmWrapper|UVDoc|UnivNet|UperNet|"
    "WavTokenizerEncoder)"
)


def class_names() -> list[str]:
    mappings = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    entries = [entry for table in mappings for entry in table.values()]
    return sorted({name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)})


def shorten(config: PreTrainedConfig) -> PreTrainedConfig:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shorten(value)
        elif LAYERS.fullmatch(name) and isinstance(value, int) and value > 4:
            setattr(config, name, 4)
    return config


def built(name: str) -> PreTrainedModel | None:
    """The model of its default config, or `None` where that has none or a library is missing."""
    kind = getattr(transformers, name, None)
    for change in (shorten, lambda config: config):
        try:
            config = change(kind.config_class())
            config.num_labels = LABELS
            with torch.device("meta"):
                return kind._from_config(config)
        except Exception:  # noqa: S112, transformers' own in all variety
            continue
    return None


def faults(name: str, model: PreTrainedModel) -> list[str]:
    try:
        projected = {id(p) for p in select(model).projected.values()}
    except ValueError as error:
        known = NOTHING.match(name) and re.search("outside of its blocks|it has none", str(error))
        return [] if known else [f"{name}: {error}"]
    vocabulary, found = getattr(model.config, "vocab_size", None), []
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    for where, layer in model.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, linear_classes()) else None
        if weight is None or not weight.requires_grad or id(weight) in embeddings:
            continue
        rows = max(weight.shape) if vocabulary in weight.shape else min(weight.shape)
        head = LABELS in weight.shape or (rows == vocabulary and vocabulary > 10_000)
        if id(weight) in projected and head:
            found.append(f"{name}: the head {where} is projected")
        in_a_row = re.search(r"(^|\.)\d+(\.|$)", where) and min(weight.shape) > 1
        if id(weight) not in projected and in_a_row and not LEFT.fullmatch(where):
            found.append(f"{name}: {where} is not projected")
    return found


@pytest.mark.slow
def test_every_model_class_of_transformers():
    found, count = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in class_names():
            model = built(name)
            if model is not None:
                count += 1
                found += faults(name, model)
    assert count > 400  # of more than a thousand in transformers 5.24
    assert not found, "\n".join(found)
