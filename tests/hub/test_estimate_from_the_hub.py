"""`hf-osd estimate` of a repository: nothing but its config is downloaded, and what cannot be had is said."""

import json

import pytest
from transformers import LlamaConfig

from hf_osd.cli.main import main
from reference.tiny_models import LLAMA


@pytest.fixture
def repository(client, api, hub, tmp_path) -> str:
    """Of a model whose weights are not even there."""
    LlamaConfig(**LLAMA).save_pretrained(tmp_path / "config")
    api.upload_folder(folder_path=tmp_path / "config", repo_id="tester/model")
    return "tester/model"


def refused(*words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", *words])
    return str(caught.value)


def test_a_config_is_all_that_is_needed(repository, capsys, tmp_path):
    main(["estimate", repository, "--rank", "4", "--seq", "16", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == repository and report["matrices"] == 14
    downloaded = {path.name for path in (tmp_path / "hub_cache").rglob("*") if path.is_symlink()}
    assert downloaded == {"config.json"}


def test_an_unknown_repository_and_revision(repository):
    assert "'tester/nothing' has no config that could be read" in refused("tester/nothing")
    assert "has no config that could be read" in refused(repository, "--revision", "nowhere")


def test_a_gated_one_is_told_apart(repository, hub):
    hub.fail_next(9, status=403, match="resolve", code="GatedRepo")
    message = refused(repository)
    assert "'tester/model' is gated: accept its terms" in message and "hf auth login" in message
    assert "\n" not in message
