"""What a fine-tuning run on GLUE reports: scores, parameters, optimizer state, memory and time."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer

from glue_tasks import TASKS
from run_report import (
    TrainingClock,
    describe_environment,
    optimizer_settings,
    optimizer_state_bytes,
    parameter_groups,
    peak_memory_bytes,
)


@dataclass
class GlueRun:
    """One task and seed.

    Attributes:
        metrics (`dict[str, float]`): Of the last evaluation, as Trainer names them.
        score (`float`): Mean of the task's metrics over its validation splits, times 100.
        seconds (`float`): Training time, without evaluation.
        extracted (`list[dict]`): What `evaluate_adapters` found, with scores.
    """

    task: str
    seed: int
    score: float
    metrics: dict[str, float]
    metrics_from: str
    steps: int
    seconds: float
    parameters: int
    trained_parameters: int
    optimizer_state_bytes: int
    parameter_groups: list[dict[str, Any]]
    log_history: list[dict[str, float]]
    extracted: list[dict[str, Any]] = field(default_factory=list)


def finished_run(trainer: Trainer, clock: TrainingClock, task: str, seed: int, metrics_from: str) -> GlueRun:
    """Gathers the results of a trainer after training, evaluating it if its last weights were not."""
    state = trainer.state
    evaluated = [entry for entry in state.log_history if entry["step"] == state.global_step]
    metrics = {key: value for entry in evaluated for key, value in entry.items() if key.startswith("eval_")}
    if not any(key.endswith("score") for key in metrics) or trainer.args.load_best_model_at_end:
        metrics = trainer.evaluate()
    return GlueRun(
        task=task,
        seed=seed,
        score=score_of(metrics),
        metrics={key: value for key, value in metrics.items() if isinstance(value, float)},
        metrics_from=metrics_from,
        steps=state.global_step,
        seconds=clock.seconds,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        trained_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        optimizer_state_bytes=optimizer_state_bytes(trainer.optimizer),
        parameter_groups=parameter_groups(trainer.optimizer),
        log_history=list(state.log_history),
    )


def score_of(metrics: dict[str, float]) -> float:
    """Mean score over the validation splits, times 100."""
    return 100 * statistics.fmean(value for key, value in metrics.items() if key.endswith("score"))


def table(runs: list[GlueRun]) -> str:
    """Markdown: one row a task, mean and standard deviation over seeds."""
    lines = [
        "| task | score | metrics | seeds | trained parameters | optimizer state | time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        cells = (
            task,
            mean_and_spread([run.score for run in own]),
            ", ".join(TASKS[task].metrics),
            str(len(own)),
            f"{own[0].trained_parameters:,}",
            f"{own[0].optimizer_state_bytes / 2**20:.1f} MiB",
            f"{statistics.fmean(run.seconds for run in own):.0f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    by_task = {task: [run for run in runs if run.task == task] for task in dict.fromkeys(run.task for run in runs)}
    adapters = {task: ([run.score for run in own], [run.extracted for run in own]) for task, own in by_task.items()}
    return "\n".join(filter(None, ("\n".join(lines) + "\n", adapter_table(adapters))))


def adapter_table(tasks: dict[str, tuple[list[float], list[list[dict[str, Any]]]]]) -> str:
    """Markdown: the models and the adapters made of them, mean and standard deviation over seeds; empty without.

    Args:
        tasks (`dict`): For each task the models' scores and what was extracted of each.
    """
    if not any(extracted for _, found in tasks.values() for extracted in found):
        return ""
    lines = [
        "| task | model | adapter of rank | with embeddings | score | kept (worst layer) | size |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, (scores, found) in tasks.items():
        for entries in zip(*found, strict=True):
            kept, worst = (
                statistics.fmean(entry[key] for entry in entries) for key in ("kept", "kept_in_worst_layer")
            )
            cells = (
                task,
                mean_and_spread(scores),
                str(entries[0]["rank"]),
                "yes" if entries[0]["carry"] == "all" else "no",
                mean_and_spread([entry["score"] for entry in entries]),
                f"{kept:.1%} ({worst:.1%})",
                f"{entries[0]['bytes'] / 1e6:.1f} MB",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_spread(values: list[float]) -> str:
    """Mean and, of several, their standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def write_report(runs: list[GlueRun], args: Any, training_args: Any) -> dict[str, Any]:
    """Writes `results.json` and `results.md` to the output folder, prints the table and returns the results."""
    results = {
        "model": args.model_name_or_path,
        "arguments": asdict(args),
        "settings": optimizer_settings(training_args),
        "epochs": training_args.num_train_epochs,
        "peak_memory_bytes": peak_memory_bytes(),
        "runs": [asdict(run) for run in runs],
        "environment": describe_environment(),
    }
    folder = Path(training_args.output_dir)
    if training_args.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        peak = f"{args.method}, peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB"
        (folder / "results.md").write_text(f"{peak}\n\n{table(runs)}", encoding="utf-8")
        print(f"\n{peak}\n\n{table(runs)}")
        print(f"all figures  {folder / 'results.json'}", flush=True)
    return results
