"""Where a push fails, training goes on and loses nothing; the next push makes it good."""

import pytest
from huggingface_hub.errors import HfHubHTTPError
from pushed_runs import CHECKPOINT_FILES, REPO, ROOT_FILES, At, Record, check_set, folder_of, make_trainer, on_disk


def test_a_wrong_token_is_refused_before_training(hub, client, tmp_path):
    with pytest.raises(HfHubHTTPError) as stock:
        make_trainer(tmp_path, optim="adamw_torch", optim_args=None, push_to_hub=True, hub_token="hf_wrong")
    with pytest.raises(HfHubHTTPError) as ours:
        make_trainer(tmp_path, push_to_hub=True, hub_token="hf_wrong")
    assert ours.value.response.status_code == stock.value.response.status_code == 401
    assert type(ours.value) is type(stock.value)


def test_a_wrong_token_at_the_end_loses_nothing(hub, client, tmp_path):
    record = Record()
    trainer = make_trainer(tmp_path / "out", callbacks=[record])
    trainer.train()
    with pytest.raises(HfHubHTTPError, match="401"):
        trainer.push_to_hub(token="hf_wrong")
    assert hub.repos == {}
    assert check_set(on_disk(tmp_path / "out" / "checkpoint-4"), record, tmp_path, CHECKPOINT_FILES) == 4
    trainer.push_to_hub()
    assert check_set(hub.files(REPO), record, tmp_path, ROOT_FILES) == 4


@pytest.mark.parametrize("failure", ["busy", "cut"])
@pytest.mark.parametrize("request_", ["preupload", "PUT /lfs", "/commit/"])
def test_a_push_that_fails_is_made_good_by_the_next(request_, failure, hub, client, tmp_path, client_waits_little):
    def break_down():
        (hub.fail_next if failure == "busy" else hub.cut_connection)(n=1000, match=request_)

    record = Record()
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "callbacks": [record, At(1, break_down)]}
    trainer = make_trainer(tmp_path / "out", **options)
    trainer.add_callback(At(3, hub.heal))  # after the wait for the push of step 2
    result = trainer.train()
    assert result.global_step == 4 and sorted(record.weights) == [1, 2, 3, 4]
    assert sum(request_ in request for request in hub.requests) >= 2
    files = hub.files(REPO)
    pushed = [commit.title for commit in hub.commits(REPO) if commit.title != "initial commit"]
    assert pushed == ["Training in progress, step 4, checkpoint", "Training in progress, step 4"]
    assert check_set(folder_of(files), record, tmp_path, ROOT_FILES) == 4
    assert check_set(folder_of(files, "checkpoint-4"), record, tmp_path, CHECKPOINT_FILES) == 4
    assert check_set(on_disk(tmp_path / "out" / "checkpoint-2"), record, tmp_path, CHECKPOINT_FILES) == 2
