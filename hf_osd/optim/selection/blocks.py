"""Where a model's blocks and its heads are: what `all-linear` goes by."""

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping

from torch import nn


CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)
# Names that heads have in transformers, timm and torchvision; DETR's are the embeddings of classes and boxes.
HEAD = re.compile(r"(\w*_)?(heads?|classifiers?|predictors?|(bbox|class)_embed)")
OF_TOKENS, OF_CLASSES = "get_output_embeddings", "get_classifier"  # of transformers, of timm
LAST = re.compile(r"fc|out|outputs?|logits")  # names that other layers have as well


def block_prefixes(modules: Mapping[str, nn.Module], is_layer: Callable[[str], bool]) -> tuple[str, ...]:
    """`model.layers.0.` and so on: what the names of all that is inside of blocks begin with.

    A block is an element of a container that has parts of its own: of any `nn.ModuleList`, and of an `nn.Sequential`
    or `nn.ModuleDict` that has another one of its class, for these also hold the different parts of a whole model.
    What is in a container of heads is none, nor is what ends the model, see `_ends_model`.

    Args:
        modules (`dict[str, nn.Module]`): The modules of the model by name.
        is_layer (`Callable`): Whether the module of a name is one layer, whatever it is made of.
    """
    found, heads, taken = [], [], _taken_widths(modules)
    for name, module in modules.items():
        if not isinstance(module, CONTAINERS):
            continue
        elements = {_join(name, key): child for key, child in module.named_children()}
        if HEAD.fullmatch(name.rpartition(".")[2]) or any(map(_is_head_class, elements.values())):
            heads.append(f"{name}.")
        kinds = Counter(map(_kind, elements.values()))
        found += [
            f"{element}."
            for element, child in elements.items()
            if element in modules
            and not is_layer(element)
            and next(child.children(), None) is not None
            and (isinstance(module, nn.ModuleList) or kinds[_kind(child)] > 1)
            and not _ends_model(child, taken)
        ]
    outermost: list[str] = []
    for prefix in sorted(found):  # what is inside of a block comes right after it
        if not outermost or not prefix.startswith(outermost[-1]):
            outermost.append(prefix)
    return tuple(prefix for prefix in outermost if not prefix.startswith(tuple(heads)))


def head_prefixes(modules: Mapping[str, nn.Module], plain: Mapping[str, str]) -> tuple[str, ...]:
    """The same for the heads of a model without blocks: what is called so, and `fc` if it is the last of several."""
    taken, found = _taken_widths(modules), []
    for name, module in modules.items():
        last = plain[name].rpartition(".")[2]
        if HEAD.fullmatch(last):
            found.append(f"{name}.")
        elif LAST.fullmatch(last) and _ends_model(module, taken):
            first = next(layer for layer in module.modules() if isinstance(layer, nn.Linear))
            before = [layer for key, layer in modules.items() if not f"{key}.".startswith(f"{name}.")]
            if any(isinstance(layer, nn.Linear) and layer.out_features == first.in_features for layer in before):
                found.append(f"{name}.")
    return tuple(found)


def given_heads(model: nn.Module) -> set[nn.Module]:
    """The heads that a model, or a model inside of it, tells of, and all that is inside of them."""
    return told(model, OF_TOKENS) | told(model, OF_CLASSES)


def told(model: nn.Module, tell: str) -> set[nn.Module]:
    """What a method of this name tells of in a model, or a model inside of it, and all that is inside of that."""
    tellers = [module for module in model.modules() if hasattr(type(module), tell)]
    heads = [head for module in tellers for head in _flat(getattr(module, tell)())]
    return {part for head in heads for part in head.modules()}


def embeddings(model: nn.Module) -> set[nn.Parameter]:
    """The matrices that tokens and positions are looked up in, and those of heads, see `_heads`."""
    heads = _heads(model)
    return {
        p
        for module in model.modules()
        if isinstance(module, LOOKED_UP) or module in heads
        for p in module.parameters(recurse=False)
        if p.ndim == 2
    }


def _heads(model: nn.Module) -> set[nn.Module]:
    """What a model tells of; in plain torch linear layers that are called so, or have an output for each token."""
    if any(hasattr(type(module), tell) for module in model.modules() for tell in (OF_TOKENS, OF_CLASSES)):
        return given_heads(model)
    tokens = max((module.num_embeddings for module in model.modules() if isinstance(module, LOOKED_UP)), default=0)
    return {
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (HEAD.fullmatch(name.rpartition(".")[2]) or module.out_features == tokens)
    }


def _flat(found: object) -> Iterator[nn.Module]:
    if isinstance(found, nn.Module):
        yield found
    elif isinstance(found, Iterable):
        for one in found:
            yield from _flat(one)


def _ends_model(module: nn.Module, taken: Container[int]) -> bool:
    """Whether a linear layer that ends a module gives out a width that no layer takes, as of classes.

    What comes last is known of an `nn.Sequential` and of a module around one; of a list or dictionary each has to.
    """
    if isinstance(module, nn.Linear):
        return module.out_features not in taken
    parts = [child for child in module.children() if next(child.parameters(), None) is not None]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return bool(parts) and all(_ends_model(part, taken) for part in parts)
    known = isinstance(module, nn.Sequential) or (len(parts) == 1 and not isinstance(parts[0], nn.Linear))
    return known and bool(parts) and not module._parameters and _ends_model(parts[-1], taken)


def _taken_widths(modules: Mapping[str, nn.Module]) -> set[int]:
    """The widths that layers take. A single number tells nothing, and convolutions take channels, as of colours."""
    return {p.shape[1] for module in modules.values() for p in module.parameters(recurse=False) if p.ndim == 2} - {1}


def _kind(module: nn.Module) -> type:
    return type(getattr(module, "_orig_mod", module))  # compiled blocks are all of one class


def _is_head_class(module: nn.Module) -> bool:
    return _kind(module).__name__.endswith(("Head", "Classifier"))


def _join(owner: str, name: str) -> str:
    return f"{owner}.{name}".removeprefix(".")
