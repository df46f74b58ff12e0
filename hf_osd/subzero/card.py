"""The section of a model card on a run of which the log lies beside the model."""

from typing import Any

from torch import nn

from ..hub.card.facts import base_model_of, library_of, model_class
from ..hub.card.section import END, START
from .log import SubZeroLog
from .log_file import FILE
from .options import Options


PAPERS = {"subspace": ("SubZero", "2410.08989"), "dense": ("MeZO", "2305.17333")}


def log_metadata(model: nn.Module, repo_id: str) -> dict[str, Any]:
    """What the head of the card has, where nobody has set it."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        library_name=library_of(model), base_model=base_model_of(model, repo_id), tags=["hf_osd"]
    ).to_dict()


def log_section(log: SubZeroLog, model: nn.Module, repo_id: str) -> str:
    """What the run was, and the lines that make its weights again, markers included.

    Args:
        log ([`SubZeroLog`]): Of the run.
        model (`nn.Module`): The trained model.
        repo_id (`str`): Where log and model will be found.
    """
    options, base = log.config["options"], base_model_of(model, repo_id)
    name, paper = PAPERS[options["perturbation"]]
    rates = f"{log.lr.min():g}" if log.lr.min() == log.lr.max() else f"{log.lr.min():g} to {log.lr.max():g}"
    told = ", ".join(f"{key} {value}" for key, value in _told(options).items())
    return f"""{START}
## Training with forward passes alone

{f"Fine-tuned from [{base}](https://huggingface.co/{base})" if base else "Fine-tuned"} with \
[{name}](https://huggingface.co/papers/{paper}): {len(log.rho):,} steps without a backward pass, at learning rates of \
{rates}; {told}.

### The run in kilobytes

`{FILE}` holds all that the steps did. Of the weights that the run started from it makes these, bit for bit on
a machine of the same kind:

```python
{_code(log, model, base, repo_id)}
```
{END}"""


def _told(options: dict[str, Any]) -> dict[str, Any]:
    """Options that say what the run was."""
    named = ("queries", "eps") if options["perturbation"] == "dense" else ("rank", "update_interval", "queries", "eps")
    return {key: options.get(key, getattr(Options(), key)) for key in named}


def _code(log: SubZeroLog, model: nn.Module, base: str | None, repo_id: str) -> str:
    kinds = sorted({entry["dtype"] for entry in log.config["parameters"].values()})
    init = ", init=..." if log.config["options"]["init"] else ""  # the P that the run was given
    lines = ["from hf_osd.subzero import replay", "", f'replay(model, "{repo_id}"{init})']
    kind = model_class(model)
    if kind is None or base is None or kind.startswith("peft.") or len(kinds) > 1:
        return "\n".join([*lines[:2], f"model = ...  # as it was before the run, in {' and '.join(kinds)}", lines[2]])
    module, name = kind.split(".")
    loaded = f'model = {name}.from_pretrained("{base}", dtype="{kinds[0]}")'
    return "\n".join([f"from {module} import {name}", *lines[:2], loaded, lines[2]])
