"""The nine tasks of GLUE (Wang et al. 2018, arXiv 1804.07461): their columns, labels and metrics, and their data.

Data comes from `nyu-mll/glue` on the Hub, or from a folder with `<task>/<split>.jsonl` (`.json`, `.parquet`, or
compressed as `.gz`) of the same columns.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset


HUB_DATASET = "nyu-mll/glue"
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        columns (`tuple[str, ...]`): One or two columns of text.
        labels (`tuple[str, ...]`): Names of the classes by id; empty for regression.
        metrics (`tuple[str, ...]`): What the benchmark reports, under the names that `evaluate` uses. The score of a
            task is their mean.
        validation (`tuple[str, ...]`): Validation splits.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier; one for regression."""
        return len(self.labels) or 1


NLI = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), (), ("pearson", "spearmanr")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": Task(("question", "sentence"), NLI),
    "rte": Task(("sentence1", "sentence2"), NLI),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def load_task(
    name: str, data_dir: str | None, validation_split: str | None, max_train_samples: int | None
) -> tuple[Dataset, dict[str, Dataset]]:
    """The training split and the validation splits by name.

    Args:
        name (`str`): One of `TASKS`.
        data_dir (`str`, *optional*): Folder with a folder for each task, instead of the Hub.
        validation_split (`str`, *optional*): Another labelled split to validate on.
        max_train_samples (`int`, *optional*): Train on a random subset, the same in every run.

    Raises:
        ValueError: For a split, column or label that is not there.
    """
    task = TASKS[name]
    splits = (validation_split,) if validation_split else task.validation
    train = _load_split(name, data_dir, "train")
    if max_train_samples is not None:
        train = train.shuffle(seed=0).select(range(min(max_train_samples, len(train))))
    return train, {split: _load_split(name, data_dir, split) for split in splits}


def _load_split(name: str, data_dir: str | None, split: str) -> Dataset:
    if data_dir is None:
        data = load_dataset(HUB_DATASET, name, split=split)
    else:
        file = _find_file(Path(data_dir, name), split)
        data = load_dataset(SUFFIXES[Path(file.name.removesuffix(".gz")).suffix], data_files=str(file), split="train")
    task = TASKS[name]
    missing = {*task.columns, "label"} - set(data.column_names)
    if missing:
        raise ValueError(f"{name}/{split} has no column {', '.join(sorted(missing))}; it has {data.column_names}.")
    if task.labels and not set(data.unique("label")) <= set(range(task.num_labels)):
        raise ValueError(
            f"{name}/{split} has labels {sorted(data.unique('label'))}, expected 0 to {task.num_labels - 1}. The "
            "benchmark's test splits carry no labels: validate on another one."
        )
    return data.select_columns([*task.columns, "label"])


def _find_file(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        for name in (split + suffix, split + suffix + ".gz"):
            if (folder / name).is_file():
                return folder / name
    found = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    raise ValueError(
        f"There is no {folder / split}.jsonl, .json or .parquet. {folder} has: {', '.join(found) or 'nothing'}. "
        "Name another split to validate on with --validation_split."
    )
