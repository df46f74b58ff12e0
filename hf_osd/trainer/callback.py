"""What every Trainer does for our optimizer: check its arguments, say what is projected, log how P fares."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, SaveStrategy

from ..hub import ProjectionState
from ..hub.collect import gathers
from ..hub.config import CONFIG_NAME
from ..hub.projection_state import refuse_names
from ..layers import unload
from ..optim import OSD, adamw_state_bytes, predicted_state_bytes
from ..optim.arrival.hooks import release
from ..optim.options.table import LR_MULTIPLE
from ..optim.osd import osd_of
from ..optim.statistics import summarize_each
from ..optim.step.full_weight import FullWeight
from ..optim.summary import announce_summary
from ..subzero import SubZero, SubZeroLog, subzero_of
from ..subzero.log_file import FILE as SUBZERO_LOG
from .checkpoints import written_checkpoint
from .forward_only import begin_training, check_subzero, save_log
from .gathered import gather_projections, gathered_projections
from .push import OF_OSD, refresh_card, set_aside
from .settings import check_arguments, refuse_ignored_by_mode
from .statistics_file import StatisticsFile


TRAINING_KEYS = {"loss", "learning_rate"}  # a training step's log has one: some trainers rename the loss


logger = logging.getLogger("hf_osd")


class OSDCallback(TrainerCallback):
    """Added to every Trainer by `import hf_osd`; silent unless the optimizer is [`OSD`] or [`SubZero`].

    Logs, at each logging step, `osd/pca_loss` (mean share of the gradients' energy outside their subspaces, or with
    `source="activations"` of the energy of the layers' inputs), `osd/orthogonality` (mean ||PᵀP - I|| / sqrt(r)) and
    `osd/skipped_steps` (parameter steps skipped for gradients that were not finite). They are computed in steps that
    are logged only, and read in one transfer. The first two of each layer go into `_osd_statistics.jsonl` in
    `output_dir`, which is not uploaded; `hf-osd report` draws them.
    """

    def __init__(self) -> None:
        self._saved: dict[Path, int] = {}  # step of the P that was last written into a folder
        self._best: Path | None = None  # the checkpoint whose weights the model was given at the end
        self._statistics: StatisticsFile | None = None  # of the main process

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs: Any
    ) -> None:
        """Refuse wrong arguments before any data is read."""
        if not isinstance(args, TrainingArguments):  # some trainers show callbacks arguments of another class
            return
        check_arguments(args)
        check_subzero(args, optimizer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs: Any,
    ) -> None:
        """Print the one summary line, open the file with the layers' statistics, and put hooks on, ours alone."""
        self._saved.clear()  # a second training counts its steps anew
        self._best = self._statistics = None
        osd = osd_of(optimizer)
        if isinstance(model, nn.Module):
            release(model.parameters(), keep=None if osd is None else osd.stream)
            if osd is None or osd.layers is None:
                unload(model)  # another optimizer's: this one would get no gradients
        begin_training(subzero_of(optimizer))
        if osd is None:
            return
        refuse_ignored_by_mode(osd, args)
        if args.should_save:
            folder = getattr(state, "run_folder", _output_dir(args))
            self._statistics = StatisticsFile(folder, state.global_step, _state_bytes(osd))
        if args.should_save and (args.save_strategy != SaveStrategy.NO or args.push_to_hub):
            with _may_fail():  # said now, and not at the first save
                refuse_names(group for group in osd.trained_groups if group["rank"] is not None)
        announce_summary(osd, model)
        osd.attach()  # a second training: the first has taken the hooks off at its end
        osd.begin_loop()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs: Any
    ) -> None:
        """Observe the coming step if it will be logged."""
        osd = osd_of(optimizer)
        if osd is not None:
            osd.collect_statistics = _will_log(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs=None,
        optimizer=None,
        **kwargs,
    ) -> None:
        """Add the statistics to a training step's log, for the callbacks that follow and for the log history."""
        osd = osd_of(optimizer)
        if osd is None or not logs or not TRAINING_KEYS & logs.keys():
            return
        means, layers = summarize_each(osd.weights)
        values = {f"osd/{name}": value for name, value in means.items()}
        if osd.grad_norm is not None and "grad_norm" in logs:  # Trainer has seen no gradients, or some
            values["grad_norm"] = osd.grad_norm.item()
        multiple = osd.param_groups[0].get(LR_MULTIPLE)
        if multiple is not None and "learning_rate" in logs:  # Trainer's is the first group's
            values["learning_rate"] = logs["learning_rate"] / multiple
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
        if self._statistics is not None and osd.collect_statistics:  # else they are of an earlier step
            self._statistics.append(state.global_step, layers)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs: Any
    ) -> None:
        """Put P beside the model into the checkpoint that has just been written."""
        osd, subzero = osd_of(optimizer), subzero_of(optimizer)
        if osd is None and subzero is None:
            return
        folder = written_checkpoint(state) or _checkpoint(args, state)  # this of a subclass that saves by itself
        with _may_fail():
            save_log(subzero, folder, args)
        if osd is not None:
            gather_projections(state, osd, args.should_save)  # of a subclass that saves by itself, only now
            self._save_projections(folder, args, state, osd)

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs: Any,
    ) -> None:
        """Put P and news in the model card into what is about to be uploaded: `on_save` would be too late."""
        osd, subzero = osd_of(optimizer), subzero_of(optimizer)
        if subzero is not None:
            self._push_log(args, state, subzero)
        if osd is None:
            return
        if args.should_save:
            with _may_fail():
                set_aside(_output_dir(args), [SUBZERO_LOG])
        folder = written_checkpoint(state)
        if folder is not None:  # else one of that name is another training's
            self._save_projections(folder, args, state, osd)
        if self._best is None:
            self._save_projections(_output_dir(args), args, state, osd)
        elif args.should_save and (self._best / CONFIG_NAME).is_file():
            with _may_fail():
                ProjectionState.from_pretrained(self._best).save_pretrained(_output_dir(args))
        if args.should_save:
            refresh_card(osd, args, state, model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs: Any,
    ) -> None:
        """Note whose weights the model has now: what is pushed from here on needs the P of that checkpoint.

        Hooks of a layerwise optimizer are taken off: a backward pass after the training must not train on.
        """
        osd, subzero = osd_of(optimizer), subzero_of(optimizer)
        if subzero is not None:
            subzero.note_end()
        if osd is not None:
            osd.remove()
            gather_projections(state, osd, args.should_save)  # a push that comes now is the main process's alone
        elif subzero is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._best = Path(state.best_model_checkpoint)

    def _push_log(self, args: TrainingArguments, state: TrainerState, optimizer: SubZero) -> None:
        """As P: into the checkpoint that goes with it, and into the folder of the run."""
        with _may_fail():
            folder = written_checkpoint(state)
            if folder is not None:
                save_log(optimizer, folder, args)
            if self._best is None:
                save_log(optimizer, _output_dir(args), args)
            elif args.should_save and (self._best / SUBZERO_LOG).is_file():
                SubZeroLog.from_pretrained(self._best).save_pretrained(_output_dir(args))
        if not args.should_save:
            return
        with _may_fail():
            untold = optimizer.weights.following or (self._best is None and optimizer.replaced)
            set_aside(_output_dir(args), [*OF_OSD, *([SUBZERO_LOG] if untold else [])])
        if optimizer.steps:
            refresh_card(optimizer, args, state, optimizer.model)

    def _save_projections(self, folder: Path, args: TrainingArguments, state: TrainerState, osd: OSD) -> None:
        if not args.should_save or not folder.is_dir() or self._saved.get(folder) == state.global_step:
            return
        if gathers(osd) or has_started(osd):
            with _may_fail():
                gathered_projections(state, osd).save_pretrained(folder)
            self._saved[folder] = state.global_step


@contextmanager
def _may_fail() -> Iterator[None]:
    """P beside the model must not cost a training its model, whatever is wrong with names, values or disk."""
    try:
        yield
    except (OSError, ValueError) as error:
        logger.warning("P is not saved beside the model: %s", error)


def has_started(optimizer: OSD) -> bool:
    """Whether any P has been initialised."""
    return any(not isinstance(weight, FullWeight) and weight.started for weight in optimizer.weights)


def _state_bytes(optimizer: OSD) -> dict[str, int]:
    return {
        "optimizer_state_bytes": predicted_state_bytes(optimizer),
        "adamw_state_bytes": adamw_state_bytes(optimizer),
    }


def _output_dir(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # TrainingArguments has put its default there
    return Path(args.output_dir)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return _output_dir(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _will_log(args: TrainingArguments, state: TrainerState) -> bool:
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.EPOCH:  # which step ends the epoch is not known beforehand
        return True
    return args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
