"""The picture of a training run: training loss and evaluations against steps."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


TRAIN_COLOR, EVAL_COLOR, MUTED = "#2f5fa8", "#c4442f", "#5a5a5a"


def series(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of all entries with `key`."""
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def optimizer_named(settings: dict[str, Any]) -> str:
    """Returns the optimizer's name with the options that were given: `osd_adamw (rank=48, preset=pretrain)`."""
    given = [f"{key.removeprefix('osd_')}={value}" for key, value in settings.items() if key.startswith("osd_")]
    text = ", ".join(filter(None, [settings.get("optim_args"), *given]))
    return settings["optim"] + (f" ({text})" if text else "")


def save_loss_plot(log_history: list[dict[str, Any]], title: str, subtitle: str, path: Path) -> None:
    """Draws the losses of a run.

    Args:
        log_history (`list[dict[str, Any]]`):
            Trainer's log history.
        title (`str`):
            What was trained.
        subtitle (`str`):
            How, in smaller letters below the title.
        path (`Path`):
            The picture to write; its ending selects the format.
    """
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    steps, losses = series(log_history, "loss")
    axes.plot(steps, losses, color=TRAIN_COLOR, linewidth=1.4, label="training, mean since the last point")
    steps, losses = series(log_history, "eval_loss")
    axes.plot(steps, losses, "o-", color=EVAL_COLOR, markersize=4.5, linewidth=1.2, label="validation")
    for step, loss in list(zip(steps, losses, strict=True))[-1:]:
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 10), textcoords="offset points", ha="right", color=EVAL_COLOR)

    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=24)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color=MUTED)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
