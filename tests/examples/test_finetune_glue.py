import json
import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import finetune_glue
from glue_tasks import TASKS, load_task


WORDS = "good bad film plot the a and not very actor".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A BERT of two layers with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All nine tasks with random sentences; the label is told by the first word."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, task in TASKS.items():
        (folder / name).mkdir()
        for split in ("train", *task.validation):
            rows = []
            for _ in range(24):
                label = generator.randrange(task.num_labels) if task.labels else generator.random() * 5
                words = [WORDS[int(label)], *generator.choices(WORDS, k=generator.randrange(2, 12))]
                rows.append({column: " ".join(words) for column in task.columns} | {"label": label, "idx": 0})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return str(folder)


@pytest.fixture
def finetune(model_folder, data_dir, tmp_path):
    """Runs the script for three steps, unless told otherwise."""

    def run(**options):
        given = {
            **{"model_name_or_path": model_folder, "data_dir": data_dir, "output_dir": tmp_path / "out"},
            **{"learning_rate": 1e-3, "max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": "true"},
            **{"disable_tqdm": "true", "method": "osd", "task": "rte"},
        } | options
        argv = []
        for name, value in given.items():
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return finetune_glue.main(argv)

    return run


def test_all_tasks_in_one_call(finetune, tmp_path):
    results = finetune(task=list(TASKS), rank=4)
    assert (tmp_path / "out" / "results.json").read_text() == json.dumps(results, indent=1) + "\n"
    table = (tmp_path / "out" / "results.md").read_text()
    for run, (name, task) in zip(results["runs"], TASKS.items(), strict=True):
        found = {key for key in run["metrics"] if key.rsplit("_", 1)[-1] not in ("loss", "runtime", "second")}
        prefixes = [f"eval_{split}_" if len(task.validation) > 1 else "eval_" for split in task.validation]
        assert found == {prefix + metric for prefix in prefixes for metric in (*task.metrics, "score")}
        mean = sum(run["metrics"][prefix + metric] for prefix in prefixes for metric in task.metrics)
        assert run["score"] == pytest.approx(100 * mean / len(prefixes) / len(task.metrics), nan_ok=True)
        assert f"| {name} |" in table


@pytest.mark.parametrize("method", ["osd", "galore", "lora", "full", "head", "subzero", "mezo"])
def test_methods_differ_only_in_what_they_train(finetune, method):
    options = {} if method in ("full", "head", "mezo") else {"rank": 4}
    run = finetune(method=method, seeds=[1, 2], **options)["runs"]
    assert [entry["seed"] for entry in run] == [1, 2]
    assert run[0]["log_history"] != run[1]["log_history"]
    projected = [group for group in run[0]["parameter_groups"] if group.get("rank")]
    if method in ("osd", "galore"):
        assert run[0]["trained_parameters"] == run[0]["parameters"]
        assert sum(group["tensors"] for group in projected) == 12  # six matrices a layer
        assert {group["rank"] for group in projected} == {4}
    if method == "lora":
        # the same layers get A (4, n) and B (m, 4); the classifier is trained too
        layer = 4 * (24 + 24) + (24 + 40) * 2
        assert run[0]["trained_parameters"] == 4 * 2 * layer + 24 * 2 + 2
        assert not projected
    if method == "head":
        assert run[0]["trained_parameters"] == 24 * 2 + 2
    if method in ("subzero", "mezo"):
        options = run[0]["parameter_groups"][-1]
        assert (options["rank"], options["perturbation"]) == (
            (4, "subspace") if method == "subzero" else (24, "dense")
        )
        bases = 4 * 4 * (14 + 24 + 64 + 24 + 2 * (4 * 48 + 2 * 64) + 48)  # every matrix but two of (2, 24)
        assert run[0]["optimizer_state_bytes"] == (bases if method == "subzero" else 0)
    if method == "full":
        full = 2 * 4 * run[0]["trained_parameters"]
        assert full <= run[0]["optimizer_state_bytes"] < 1.01 * full + 4096


@pytest.mark.parametrize("method", ["osd", "galore", "lora"])
def test_one_plain_name_selects_its_layers(finetune, method):
    run = finetune(method=method, rank=4, target_modules="query")["runs"][0]
    if method == "lora":
        assert run["trained_parameters"] == 2 * 4 * (24 + 24) + 24 * 2 + 2  # A and B in both layers; the classifier
    else:
        assert sum(group["tensors"] for group in run["parameter_groups"] if group.get("rank")) == 2


def test_only_parameters_of_these_names_are_trained(finetune, tmp_path):
    options = {"trained": ["classifier", "layer.1.output"], "save_strategy": "steps"}
    run = finetune(method="subzero", rank=4, **options)["runs"][0]
    trained = 24 * 2 + 2 + 24 * 40 + 3 * 24
    assert run["trained_parameters"] == trained
    model = tmp_path / "out" / "rte" / "seed-42"
    head = finetune(method="mezo", trained="classifier", model_name_or_path=model)["runs"][0]
    assert head["trained_parameters"] == 24 * 2 + 2
    osd = finetune(rank=4, **options)["runs"][0]
    assert osd["trained_parameters"] == trained
    assert [group["tensors"] for group in osd["parameter_groups"] if group.get("rank")] == [1]


def test_full_adamw_can_have_another_rate_for_its_classifier(finetune, tmp_path):
    options = {"method": "full", "weight_decay": 0.1, "lr_scheduler_type": "constant", "logging_steps": 1}
    run = finetune(head_lr_ratio=8, **options)["runs"][0]
    groups = [(group["tensors"], group["lr"], group["weight_decay"]) for group in run["parameter_groups"]]
    matrices, vectors = 3 + 2 * 6 + 1, 2 + 2 * (6 + 4) + 1  # of embeddings, two layers and the pooler
    rest = [(matrices, 1e-3, 0.1), (vectors, 1e-3, 0), (1, 8e-3, 0.1), (1, 8e-3, 0)]
    assert sorted(groups) == sorted(rest) and run["log_history"][0]["learning_rate"] == 1e-3
    plain = finetune(**options, output_dir=tmp_path / "plain")["runs"][0]
    same = finetune(head_lr_ratio=1, **options, output_dir=tmp_path / "same")["runs"][0]
    assert same["metrics"]["eval_loss"] == plain["metrics"]["eval_loss"] != run["metrics"]["eval_loss"]
    with pytest.raises(ValueError, match="--head_lr_ratio is for --method full. Of OSD it is --osd_task_head_lr_r"):
        finetune(head_lr_ratio=8, rank=4)


def test_extracted_adapters_are_evaluated(finetune, tmp_path):
    run = finetune(task="stsb", rank=4, extract_lora=[2, 24], learning_rate=1e-2, max_steps=6)["runs"][0]
    found = {(entry["rank"], entry["carry"]): entry for entry in run["extracted"]}
    assert list(found) == [(2, "auto"), (2, "all"), (24, "auto"), (24, "all")]
    # at full rank and with the embeddings, the adapter is the trained model
    assert found[24, "all"]["metrics"]["eval_loss"] == pytest.approx(run["metrics"]["eval_loss"], rel=1e-5)
    assert abs(found[2, "all"]["metrics"]["eval_loss"] - run["metrics"]["eval_loss"]) > 1e-4
    assert found[24, "auto"]["kept"] == pytest.approx(1) and found[2, "auto"]["kept"] < 0.99
    assert found[2, "auto"]["bytes"] < found[24, "auto"]["bytes"] < found[24, "all"]["bytes"]
    assert "| stsb |" in (tmp_path / "out" / "results.md").read_text().split("with embeddings")[1]


def test_seeds_repeat(finetune):
    first, second = (finetune(task="mrpc", rank=4, seed=5)["runs"][0] for _ in range(2))
    assert first["metrics"]["eval_loss"] == second["metrics"]["eval_loss"]


def test_early_stopping_and_best_model(finetune):
    run = finetune(
        rank=4,
        max_steps=40,
        learning_rate=0.0,  # never improves
        early_stopping_patience=2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end="true",
        metric_for_best_model="accuracy",
    )["runs"][0]
    assert run["steps"] == 3  # the first sets the mark, two more do not better it


def test_class_weights_are_inverse_frequencies():
    loss = finetune_glue.balanced_loss([0, 0, 0, 1], 2)
    logits, labels = torch.tensor([[0.3, -0.2], [0.1, 0.7]]), torch.tensor([0, 1])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = (each * torch.tensor([4 / 6, 4 / 2])).sum() / (4 / 6 + 4 / 2)
    torch.testing.assert_close(loss({"logits": logits}, labels), expected)
    with pytest.raises(ValueError, match=r"no training examples for classes \[1\]"):
        finetune_glue.balanced_loss([0, 0], 2)


def test_class_weights_reach_the_trainer(finetune):
    losses = [
        finetune(task="cola", rank=4, class_weights=kind)["runs"][0]["log_history"][-1]["train_loss"]
        for kind in ("none", "balanced")
    ]
    assert losses[0] != losses[1]


def test_max_length_cuts(finetune, model_folder, data_dir):
    train, _ = load_task("rte", data_dir, None, None)
    tokenizer = finetune_glue.AutoTokenizer.from_pretrained(model_folder)
    rows = finetune_glue.tokenize(train, TASKS["rte"].columns, tokenizer, 6)
    assert max(rows["length"]) == 6 == max(map(len, rows["input_ids"]))


def test_the_subset_is_the_same_for_every_run(data_dir):
    first, second = (load_task("sst2", data_dir, None, 10)[0] for _ in range(2))
    assert len(first) == 10 and first.to_list() == second.to_list()
    assert first.to_list() != load_task("sst2", data_dir, None, None)[0].to_list()[:10]


def test_parquet_and_other_splits(tmp_path):
    (tmp_path / "mrpc").mkdir()
    rows = Dataset.from_list([{"sentence1": "a", "sentence2": "b", "label": i % 2} for i in range(4)])
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "mrpc" / f"{split}.parquet")
    _, validation = load_task("mrpc", str(tmp_path), "test", None)
    assert len(validation["test"]) == 4
    with pytest.raises(ValueError, match=r"has: test.parquet, train.parquet. Name another split"):
        load_task("mrpc", str(tmp_path), None, None)


def test_test_splits_without_labels_are_refused(tmp_path):
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        row = {"sentence1": "a", "sentence2": "b", "label": -1 if split == "validation" else 1}
        (tmp_path / "rte" / f"{split}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"rte/validation has labels \[-1\]"):
        load_task("rte", str(tmp_path), None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": ["rte", "rtf"]}, "Unknown --task rtf"),
        ({"method": "qlora"}, "--method must be one of osd, galore, full, lora, head, subzero, mezo, got 'qlora'"),
        ({"method": "full", "rank": 8}, "--rank has no effect with --method full"),
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"method": "lora", "rank": -1}, "--rank must be at least 1, got -1"),
        ({"target_modules": "qery"}, "'qery' in `target_modules` matches no module or matrix. Did you mean 'query'"),
        ({"optim": "galore_adamw"}, "--method osd does not go with --optim galore_adamw"),
        ({"method": "full", "optim": "osd_adamw"}, "--method full does not go with --optim osd_adamw"),
        ({"osd_rank": 8}, "use --rank"),
        ({"trained": "encodr"}, "--trained encodr: no parameter has it in its name, as bert.embeddings"),
        ({"trained": "encoder", "method": "head"}, "--trained has no effect with --method head"),
        ({"lora_alpha": 8}, "--lora_alpha has no effect with --method osd"),
        ({"method": "lora", "osd_alpha": 2}, "osd_alpha"),
        ({"task": "stsb", "class_weights": "balanced"}, "stsb is a regression"),
        ({"class_weights": "inverse"}, "must be none or balanced"),
        ({"seeds": [1, 1]}, "duplicates"),
        ({"method": "lora", "extract_lora": 8}, "--extract_lora is for methods that train the weights"),
    ],
)
def test_mistakes_are_refused(finetune, options, message):
    with pytest.raises(ValueError, match=message):
        finetune(**options)
