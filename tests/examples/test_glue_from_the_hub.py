import json

import pytest
from datasets import Dataset
from huggingface_hub import HfApi

from finetune_glue import __file__ as script
from hub_server import HubServer, run_client


CARD = """---
configs:
{configs}
---
"""
CONFIG = """- config_name: {name}
  data_files:
{files}"""
CODE = """
import json, sys
sys.path.insert(0, {examples!r})
import glue_tasks
found = {{}}
for task in {tasks!r}:
    train, validation = glue_tasks.load_task(task, None, None, None)
    found[task] = {{"train": train.to_list(), **{{split: data.to_list() for split, data in validation.items()}}}}
print("FOUND" + json.dumps(found))
"""


@pytest.fixture
def glue(tmp_path, monkeypatch):
    """Two tasks of `nyu-mll/glue` in the layout of the Hub: Parquet files and a card that names them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    splits = {
        "rte": ("train", "validation", "test"),
        "mnli": ("train", "validation_matched", "validation_mismatched", "test_matched"),
    }
    columns = {"rte": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}
    with HubServer(tmp_path / "hub") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.add_user("nyu-mll"))
        api.create_repo("nyu-mll/glue", repo_type="dataset")
        configs = []
        for name, own in splits.items():
            lines = []
            for split in own:
                label = -1 if split.startswith("test") else 1
                rows = [dict.fromkeys(columns[name], f"{split} {i}") | {"label": label, "idx": i} for i in (0, 1)]
                file = tmp_path / "rows.parquet"
                Dataset.from_list(rows).to_parquet(file)
                path = f"{name}/{split}-00000-of-00001.parquet"
                api.upload_file(path_or_fileobj=file, path_in_repo=path, repo_id="nyu-mll/glue", repo_type="dataset")
                lines.append(f"  - split: {split}\n    path: {name}/{split}-*")
            configs.append(CONFIG.format(name=name, files="\n".join(lines)))
        card = CARD.format(configs="\n".join(configs)).encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="nyu-mll/glue", repo_type="dataset")
        yield hub


def test_tasks_are_read_from_the_hub(glue):
    examples = str(script.rsplit("/", 1)[0])
    printed = run_client(CODE.format(examples=examples, tasks=["rte", "mnli"]), glue, HF_HUB_DISABLE_XET="1")
    found = json.loads(printed.split("FOUND")[1])
    assert list(found["rte"]) == ["train", "validation"]
    assert list(found["mnli"]) == ["train", "validation_matched", "validation_mismatched"]
    assert found["rte"]["validation"][1] == {"sentence1": "validation 1", "sentence2": "validation 1", "label": 1}
    assert found["mnli"]["validation_mismatched"][0]["premise"] == "validation_mismatched 0"
