"""The layers that a task adds to a pretrained model, of which it is only the last ones that must be new."""

import re
from typing import TYPE_CHECKING

from torch import nn

from .adapters import module_names
from .blocks import OF_CLASSES, told


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Their heads come with the pretrained model.
PRETRAINING = re.compile(r"\w+For(PreTraining|NextSentencePrediction)")
SPANS = re.compile(r"\w+ForQuestionAnswering\w*")


def task_outputs(model: nn.Module) -> set[nn.Parameter]:
    """What gives out the classes or values of a task: `classifier`, `score`, `qa_outputs`.

    In a model of timm's that is what it calls its classifier, in one of transformers' the linear layers around its
    base model, or right in one that knows of no base, with an output for each label or else with one. Pretrained
    models do not have it yet. A model that gives out tokens has none. What tokens are looked up in is none, either.
    """
    from transformers import PreTrainedModel

    names = module_names(model).plain
    models = {name: module for name in names if isinstance(module := model.get_submodule(name), PreTrainedModel)}
    found = {p for module in told(model, OF_CLASSES) for p in module.parameters(recurse=False)}
    for name, module in models.items():
        if not any(name.startswith(f"{other}.") or not other for other in models if other != name):
            found |= _outputs(module)
    return found - {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}


def _outputs(model: "PreTrainedModel") -> set[nn.Parameter]:
    """Those of one model of transformers'."""
    if model.get_output_embeddings() is not None or PRETRAINING.fullmatch(type(model).__name__):
        return set()
    names, base = module_names(model).plain, model.base_model
    inside = set() if base is model else set(base.modules())
    around = [
        layer
        for name, plain in names.items()
        if isinstance(layer := model.get_submodule(name), nn.Linear)
        and layer not in inside
        and (base is not model or "." not in plain)
    ]
    spans = [2] if SPANS.fullmatch(type(model).__name__) else []  # a start and an end, whatever the labels
    for width in (_labels(model), *spans, 1):
        outputs = [layer for layer in around if layer.out_features == width]
        if outputs:
            return {p for layer in outputs for p in layer.parameters()}
    return set()


def _labels(model: "PreTrainedModel") -> int:
    """How many labels a model has, of which its configuration may have no names."""
    try:
        return model.config.num_labels or 1
    except TypeError:  # it is to count names that are not there
        return 1
