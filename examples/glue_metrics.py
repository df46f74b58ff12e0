"""GLUE's metrics: those of `evaluate`, or the same computed here where its script cannot be loaded."""

from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from glue_tasks import TASKS


Metric = Callable[[np.ndarray, np.ndarray], float]

# predictions, references -> value; f1 is that of class 1
METRICS: dict[str, Metric] = {
    "accuracy": lambda predictions, references: accuracy_score(references, predictions),
    "f1": lambda predictions, references: f1_score(references, predictions),
    "matthews_correlation": lambda predictions, references: matthews_corrcoef(references, predictions),
    "pearson": lambda predictions, references: pearsonr(predictions, references).statistic,
    "spearmanr": lambda predictions, references: spearmanr(predictions, references).statistic,
}


def local_metrics(task: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The metrics of a task from scikit-learn and scipy, under `evaluate`'s names."""
    return {name: float(METRICS[name](predictions, references)) for name in TASKS[task].metrics}


def metric_function(task: str) -> tuple[Callable[[EvalPrediction], dict[str, float]], str]:
    """What a Trainer computes of its predictions, and where the metrics come from.

    Returns:
        `tuple`: A function for `compute_metrics`, whose result also has `score`, the mean of the task's metrics; and
        `"evaluate"` or `"scikit-learn"`.
    """
    compute, source = _evaluate_metric(task) or (
        lambda predictions, references: local_metrics(task, predictions, references),
        "scikit-learn",
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predictions = logits.argmax(axis=-1) if TASKS[task].labels else logits.reshape(-1)
        values = {name: float(value) for name, value in compute(predictions, prediction.label_ids).items()}
        return values | {"score": float(np.mean([values[name] for name in TASKS[task].metrics]))}

    return compute_metrics, source


def _evaluate_metric(task: str) -> tuple[Callable[[np.ndarray, np.ndarray], dict[str, float]], str] | None:
    try:
        import evaluate

        metric = evaluate.load("glue", task)
    except (ImportError, OSError) as error:  # OSError: no network, or the script is not to be had
        print(f"GLUE's metrics of `evaluate` cannot be loaded ({error}); scikit-learn's are used, which are the same.")
        return None
    return (
        lambda predictions, references: metric.compute(predictions=predictions, references=references),
        "evaluate",
    )
