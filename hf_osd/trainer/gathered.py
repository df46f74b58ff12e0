"""P for the main process, which alone saves and pushes: gathered before, while all processes take part.

Where every process has all of P nothing is done here: the main one takes its own.
"""

import logging
from typing import Any

from transformers import TrainerState

from ..hub import ProjectionState
from ..hub.collect import gathers, projections_of
from ..hub.projection_state import refuse_names
from ..optim import OSD


logger = logging.getLogger("hf_osd")


def gather_projections(state: TrainerState, optimizer: OSD, keep: bool) -> None:
    """Gather P as it is at this step, once. All processes call this.

    Args:
        state (`TrainerState`): Where it is kept; no field of it, so it is not saved.
        optimizer ([`OSD`]): The optimizer.
        keep (`bool`): Whether this process is to keep it.
    """
    holder: Any = state
    if not gathers(optimizer) or getattr(holder, "gathered_projections", (None, None))[0] == state.global_step:
        return
    gathered = None
    try:
        if keep:
            gathered = ProjectionState.from_optimizer(optimizer)
        else:
            refuse_names(group for group in optimizer.trained_groups if group["rank"] is not None)  # as the other does
            for _ in projections_of(optimizer):
                pass
    except ValueError as error:
        logger.warning("P is not saved beside the model: %s", error)
    holder.gathered_projections = (state.global_step, gathered)


def gathered_projections(state: TrainerState, optimizer: OSD) -> ProjectionState:
    """P as it is at this step.

    Raises:
        ValueError: If it is on several processes and was not gathered.
    """
    if not gathers(optimizer):
        return ProjectionState.from_optimizer(optimizer)
    step, gathered = getattr(state, "gathered_projections", (None, None))
    if step != state.global_step or gathered is None:
        raise ValueError("it is on several processes, and not all of them have come to this save.")
    return gathered
