import gzip
import json

import pytest

from pretraining_data import find_local_files, is_held_out, load_text


def texts_of(documents):
    return [document["text"] for document in documents]


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_with_train_and_validation_files_is_used_as_such(jsonl_folder, documents, streaming):
    split = load_text(str(jsonl_folder), streaming=streaming)
    assert sorted(texts_of(split.train)) == sorted(documents[:250])
    assert texts_of(split.validation) == documents[250:]


def test_held_out_documents_are_disjoint_complete_and_the_same_when_streamed(tmp_path, documents, write_jsonl):
    path = write_jsonl(tmp_path / "all.jsonl", documents + documents[:100])  # copies must not be torn apart
    split = load_text(str(path), validation_fraction=0.2)
    streamed = load_text(str(path), validation_fraction=0.2, streaming=True)
    train, validation = texts_of(split.train), texts_of(split.validation)
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(documents + documents[:100])
    assert texts_of(streamed.validation) == validation
    assert sorted(texts_of(streamed.train)) == sorted(train)
    # binomial(300, 0.2): mean 60, standard deviation 6.9; within four of them
    assert 32 < len(set(validation)) < 88


def test_hash_split_is_the_same_in_every_process_and_release():
    assert [is_held_out(text, 0.5) for text in "abcdefgh"] == [True, False, True, False, True, True, True, True]
    assert is_held_out("anything", 1.0) and not is_held_out("anything", 0.0)


def test_text_files_give_paragraphs_and_gz_is_read(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text("one\ntwo\n\nthree\n\n" + "\n\n".join(map(str, range(60))))
    split = load_text(str(tmp_path / "text"), validation_fraction=0.3)
    assert {"one\ntwo", "three"} <= set(texts_of(split.train)) | set(texts_of(split.validation))

    with gzip.open(tmp_path / "all.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"document {i}"}) + "\n" for i in range(60))
    split = load_text(str(tmp_path / "all.jsonl.gz"), validation_fraction=0.3)
    assert len(split.train) + len(split.validation) == 60


def test_sharded_file_names_are_splits(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation.parquet", "README.md"):
        (tmp_path / name).touch()
    loader, files = find_local_files(tmp_path)
    assert loader == "parquet"
    assert [len(files[split]) for split in ("train", "validation")] == [2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "body"}, "--text_column body: no such column in the train split, it has text"),
        ({"config": "en"}, "--dataset_config en has no meaning for the local data set"),
        ({"validation_fraction": 0.1}, "has the split `validation`"),
        ({"validation_split": "test"}, "has the splits train, validation"),
        ({"validation_split": "train"}, "would validate on the training text"),
    ],
)
def test_bad_options_are_refused(jsonl_folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_text(str(jsonl_folder), **options)


def test_bad_fraction_is_refused(tmp_path, documents, write_jsonl):
    path = write_jsonl(tmp_path / "all.jsonl", documents)
    with pytest.raises(ValueError, match="between 0 and 1, got 1.5"):
        load_text(str(path), validation_fraction=1.5)


def test_column_without_text_is_refused(tmp_path):
    (tmp_path / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match="--text_column text holds int, not text"):
        load_text(str(tmp_path / "numbers.jsonl"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.jsonl", "nowhere/train.txt.gz"])
def test_missing_local_path_is_refused(name):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_text(name)


def test_folder_without_data_and_with_mixed_data_is_refused(tmp_path):
    (tmp_path / "README.md").touch()
    with pytest.raises(ValueError, match="found no such file"):
        load_text(str(tmp_path))
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match="files of several kinds: json, text"):
        load_text(str(tmp_path))


def test_name_unknown_to_the_hub_is_refused(monkeypatch):
    def not_found(*args, **kwargs):
        raise FileNotFoundError("no such data set")

    monkeypatch.setattr("pretraining_data.load_dataset", not_found)
    with pytest.raises(ValueError, match="no such local file or folder, and it could not be loaded from the Hub"):
        load_text("someone/something")


def test_c4_is_streamed_in_english_by_default(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return {"test": None}

    monkeypatch.setattr("pretraining_data.load_dataset", load_dataset)
    for name in ("allenai/c4", "someone/something"):
        with pytest.raises(ValueError, match="has no split `train`, it has test"):
            load_text(name)
    assert calls == [(("allenai/c4", "en"), {"streaming": True}), (("someone/something", None), {"streaming": False})]


def test_streaming_docstrings_is_refused():
    with pytest.raises(ValueError, match="--streaming has no meaning for --dataset docstrings"):
        load_text("docstrings", streaming=True)
