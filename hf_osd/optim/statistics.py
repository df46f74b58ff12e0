"""How P fares: what a logged step saw, read from the device in one transfer."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def summarize(
    states: Iterable[Mapping[str, Tensor]], observations: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """The values of `OSD.statistics`.

    Args:
        states (`Iterable[dict]`): The parameters' states.
        observations (`list[tuple]`): What `param_step.observation` returned for each projected parameter.
    """
    skipped = [state["skipped_steps"] for state in states if "skipped_steps" in state]
    if not skipped:
        return {}
    device = skipped[0].device
    values = {"skipped_steps": torch.stack([value.to(device).sum() for value in skipped]).sum()}
    for i, name in enumerate(("pca_loss", "orthogonality")):
        if observations:
            # not a number where the gradient was broken: that step was skipped and shows nothing
            values[name] = torch.cat(
                [pair[i].to(device, torch.float32).reshape(-1) for pair in observations]
            ).nanmean()
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
