"""Around our section of a model card everything stays as others wrote it."""

import dataclasses

import pytest
from card_reading import HEADED, head, rows

from hf_osd.hub.card.model_card import PICTURE_NAME, update_card
from hf_osd.hub.card.section import END, START, is_generated


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_is_kept_byte_for_byte_and_metadata_key_by_key(line_break, mark, run, tmp_path):
    path, before = tmp_path / "README.md", mark + HEADED.replace("\n", line_break)
    path.write_bytes(before.encode())
    update_card(tmp_path, run(facts={"dataset": ["two/data", "one/data"]}).facts)
    text = path.read_bytes().decode()
    body = before.split("---" + line_break, 2)[2]
    assert text.split("---" + line_break, 2)[2].startswith(body + line_break + START)
    assert text.endswith(END + line_break) and (line_break == "\n" or "\n" not in text.replace("\r\n", ""))
    for line in ("license: mit  # ours to give", "language: no", "# datasets follow", "# and the metrics"):
        assert line + line_break in text
    found = head(text)
    assert found["tags"] == ["text", "no", "online-subspace-descent", "hf_osd"]
    assert found["datasets"] == ["one/data", "two/data"] and found["metrics"] == ["accuracy", "perplexity"]
    assert found["library_name"] == "transformers" and text.startswith(mark + "---" + line_break)


def test_a_second_update_replaces_the_section_and_nothing_else(run, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(HEADED)
    facts = run(facts={"dataset": "two/data"}).facts
    update_card(tmp_path, facts)
    once = path.read_bytes()
    update_card(tmp_path, facts)
    assert path.read_bytes() == once
    path.write_bytes(once + b"\nMore of mine, no line break")
    update_card(tmp_path, dataclasses.replace(facts, steps=99, perplexity=7.0))
    twice = path.read_text()
    assert twice.endswith(END + "\n\nMore of mine, no line break") and twice.count(START) == 1
    assert rows(twice)["steps"] == "99"
    (result,) = head(twice)["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 7.0 and result["dataset"]["type"] == "two/data"
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["README.md", PICTURE_NAME]


def test_what_others_set_stays_set(run, tmp_path):
    before = "library_name: peft\nbase_model: theirs/model\ntags: hf_osd\nmodel-index:\n- name: x\n  results: []\n"
    (tmp_path / "README.md").write_text(f"---\n{before}---\n")
    facts = run(facts={"base_model": "ours/model", "dataset": ["a/b", "not on the hub"]}).facts
    found = head(update_card(tmp_path, facts).read_text())
    assert found["library_name"] == "peft" and found["base_model"] == "theirs/model"
    assert found["tags"] == ["hf_osd", "online-subspace-descent"] and found["datasets"] == ["a/b"]
    assert found["model-index"][0]["name"] == "x" and len(found["model-index"][0]["results"]) == 1


def test_a_model_index_of_another_form_is_left_alone(run, tmp_path):
    before = "---\nmodel-index:\n- {name: a}\n- {name: b}\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(before)
    text = update_card(tmp_path, run(facts={"dataset": "a/b"}).facts).read_text()
    assert "model-index:\n- {name: a}\n- {name: b}\n" in text and START in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\ntags: [a\n---\n# Mine\n", "is no YAML: .*expected ',' or ']'"),
        (b"---\njust text\n---\n# Mine\n", "must be a mapping, not str"),
        (b"---\ntags: {a: b}\n---\n# Mine\n", "'tags' .* must be a list, not dict"),
        (b"---\ntags: [a]\ntags: [b]\n---\n# Mine\n", "cannot be added to"),
        (b"---\n{license: mit}\n---\n# Mine\n", "cannot be added to"),
        (f"# Mine\n{START}\n".encode(), "once each.*found 1 and 0. Remove them"),
        (f"{END}\n# Mine\n{START}\n".encode(), "once each"),
        (b"# M\xffine\n", "README.md is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_added_to_is_explained_and_left(content, message, run, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    facts = run().facts
    with pytest.raises(ValueError, match=message):
        update_card(tmp_path, facts)
    assert (tmp_path / "README.md").read_bytes() == content
    assert not (tmp_path / PICTURE_NAME).exists()


def test_a_card_from_nothing_is_generated_until_it_is_edited(run, tmp_path):
    facts = run().facts
    text = update_card(tmp_path, facts).read_text()
    assert "\n# model\n" in text and is_generated(text)
    text = update_card(tmp_path, dataclasses.replace(facts, steps=99, base_model="some/base")).read_text()
    assert is_generated(text) and head(text)["base_model"] == "some/base"
    assert "Fine-tuned from [some/base](https://huggingface.co/some/base) with [Online" in text
    edited = text.replace("---\n\n#", "license: mit\n---\n\n#")
    assert not is_generated(edited) and is_generated(text.replace("\n", "\r\n"))
    (tmp_path / "README.md").write_text(edited)
    text = update_card(tmp_path, facts).read_text()
    assert not is_generated(text) and "sha256" not in text and head(text)["license"] == "mit"
