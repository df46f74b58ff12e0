"""The section of a model card on a run with forward passes alone, with the lines that make it again from its log."""

from typing import Any

from torch import nn

from ..hub.card.facts import base_model_of, is_causal_lm, library_of, model_class
from ..hub.card.section import END, START
from .log import SubZeroLog
from .log_file import FILE
from .optimizer import SubZero
from .options import Options


SUBZERO, MEZO = ("SubZero", "2410.08989"), ("MeZO", "2305.17333")


def forward_only_metadata(model: nn.Module, repo_id: str, base_model: str | None = None, **given: Any) -> dict:
    """What the head of the card has, where nobody has set it; `given` as `ModelCardData` takes it."""
    from huggingface_hub import ModelCardData

    tags = ["hf_osd", *(given.pop("tags", None) or [])]
    base_model = base_model or base_model_of(model, repo_id)
    return ModelCardData(library_name=library_of(model), base_model=base_model, tags=tags, **given).to_dict()


def forward_only_section(optimizer: SubZero, log: SubZeroLog | None, repo_id: str) -> str:
    """What the run was, and of its log the lines that make its weights again, markers included.

    Args:
        optimizer ([`SubZero`]): Of the run.
        log ([`SubZeroLog`], *optional*): Of the model that goes with the card, if there is one.
        repo_id (`str`): Where log and model will be found.
    """
    model, options = optimizer.model, optimizer.options.plain()
    lr, steps = (optimizer.history()[1], optimizer.steps) if log is None else (log.lr, len(log.rho))
    name, paper = SUBZERO if optimizer.weights.low_rank else MEZO
    base = base_model_of(model, repo_id)
    start = f"Fine-tuned from [{base}](https://huggingface.co/{base})" if base else "Fine-tuned"
    rates = f"{lr.min():g}" if lr.min() == lr.max() else f"{lr.min():g} to {lr.max():g}"
    named = ("rank", "update_interval") if optimizer.weights.low_rank else ()
    told = ", ".join(f"{key} {options.get(key, getattr(Options(), key))}" for key in (*named, "queries", "eps"))
    text = f"""{START}
## Training with forward passes alone

{start} with [{name}](https://huggingface.co/papers/{paper}): {steps:,} steps without a backward pass, at learning \
rates of {rates}; {told}.
"""
    if log is not None:
        text += f"""
### The run in kilobytes

`{FILE}` holds all that the steps did. Of the weights that the run started from it makes these, bit for bit on
a machine of the same kind:

```python
{_code(log, model, base, repo_id)}
```
"""
    return text + END


def _code(log: SubZeroLog, model: nn.Module, base: str | None, repo_id: str) -> str:
    """Of a language model that has been loaded; others may have been given a new head since."""
    kinds = sorted({entry["dtype"] for entry in log.config["parameters"].values()})
    init = ", init=..." if log.config["options"]["init"] else ""  # the P that the run was given
    lines = ["from hf_osd.subzero import replay", "", f'replay(model, "{repo_id}"{init})']
    kind = model_class(model)
    if kind is None or base is None or len(kinds) > 1 or kind.startswith("peft.") or not is_causal_lm(model):
        return "\n".join([*lines[:2], f"model = ...  # as it was before the run, in {' and '.join(kinds)}", lines[2]])
    module, name = kind.split(".")
    loaded = f'model = {name}.from_pretrained("{base}", dtype="{kinds[0]}")  # if nothing changed it before the run'
    return "\n".join([f"from {module} import {name}", *lines[:2], loaded, lines[2]])
