import numpy as np
import pytest
from transformers import EvalPrediction

import glue_metrics
from glue_metrics import local_metrics, metric_function
from glue_tasks import TASKS


def counts(predictions, references):
    """True positives, true negatives, false positives, false negatives."""
    pairs = list(zip(predictions.tolist(), references.tolist(), strict=True))
    return (sum(p == a and r == b for p, r in pairs) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))


def correlation(x, y):
    """Pearson's r = cov(x, y) / (s_x s_y)."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())


def average_ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])


DEFINITIONS = {
    "accuracy": lambda p, r: float((p == r).mean()),
    "f1": lambda p, r: (lambda tp, tn, fp, fn: 2 * tp / (2 * tp + fp + fn))(*counts(p, r)),
    # Matthews 1975
    "matthews_correlation": lambda p, r: (
        lambda tp, tn, fp, fn: (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    )(*counts(p, r)),
    "pearson": correlation,
    "spearmanr": lambda p, r: correlation(average_ranks(p), average_ranks(r)),
}


@pytest.mark.parametrize("name", TASKS)
def test_local_metrics_are_the_published_definitions(name):
    generator, task = np.random.default_rng(3), TASKS[name]
    if task.labels:
        references = generator.integers(0, task.num_labels, 200)
        wrong = generator.random(200) < 0.3
        predictions = np.where(wrong, generator.integers(0, task.num_labels, 200), references)
    else:
        references = generator.integers(0, 26, 200) / 5  # with ties, as the scores of STS-B
        predictions = references + generator.normal(size=200)
    expected = {metric: DEFINITIONS[metric](predictions, references) for metric in task.metrics}
    assert local_metrics(name, predictions, references) == pytest.approx(expected, abs=1e-12)


def test_classes_are_the_largest_logits_and_the_score_is_the_mean():
    compute, source = metric_function("mrpc")  # offline, evaluate's script is not to be had
    logits = np.array([[0.1, 0.2], [0.9, 0.2], [0.0, 0.1], [0.5, 0.6]])
    values = compute(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0, 1])))
    assert source == "scikit-learn"
    assert values == pytest.approx({"accuracy": 0.75, "f1": 0.8, "score": 0.775})


def test_regression_takes_the_single_output():
    compute, _ = metric_function("stsb")
    logits = np.array([[1.0], [2.0], [4.0]])
    assert compute(EvalPrediction(predictions=logits, label_ids=np.array([1.0, 2.0, 3.0])))["spearmanr"] == 1.0


def test_evaluate_is_used_where_it_loads(monkeypatch):
    import evaluate

    class Metric:
        def compute(self, predictions, references):
            return {"accuracy": np.float64(0.25)}

    monkeypatch.setattr(evaluate, "load", lambda name, task: Metric() if (name, task) == ("glue", "rte") else None)
    compute, source = metric_function("rte")
    values = compute(EvalPrediction(predictions=np.zeros((2, 2)), label_ids=np.zeros(2)))
    assert (source, values) == ("evaluate", {"accuracy": 0.25, "score": 0.25})


def test_the_fallback_is_announced(capsys):
    assert glue_metrics.metric_function("rte")[1] == "scikit-learn"
    assert "scikit-learn's are used" in capsys.readouterr().out
