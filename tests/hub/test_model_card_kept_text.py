"""Around our section of a model card text, keys and values stay as others wrote them."""

import dataclasses
import datetime

import pytest
from card_reading import HEADED, head, rows

from hf_osd.hub.card.model_card import PICTURE_NAME, update_card
from hf_osd.hub.card.section import END, START


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_is_kept_to_the_letter_and_metadata_key_by_key(line_break, mark, run, tmp_path):
    path, before = tmp_path / "README.md", mark + HEADED.replace("\n", line_break)
    path.write_bytes(before.encode())
    update_card(tmp_path, run(facts={"dataset": ["two/data", "one/data"]}).facts)
    text = path.read_bytes().decode()
    body = before.split("---" + line_break, 2)[2]
    assert text.startswith("---" + line_break)
    assert text.split("---" + line_break, 2)[2].startswith(body + line_break + START)
    assert text.endswith(END + line_break) and (line_break == "\n" or "\n" not in text.replace("\r\n", ""))
    found = head(text)
    assert list(found) == ["license", "tags", "language", "datasets", "metrics", "library_name", "model-index"]
    assert found["license"] == "mit" and found["language"] == "no"  # to YAML 1.1, not to the Hub, `no` is false
    assert found["tags"] == ["text", "no", "online-subspace-descent", "hf_osd"]
    assert found["datasets"] == ["one/data", "two/data"] and found["metrics"] == ["accuracy", "perplexity"]
    assert found["library_name"] == "transformers"


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


@pytest.mark.parametrize("index", ["[{name: a}, {name: b}]", "[a]", "[{name: a, results: [{odd: [1]}], more: 2}]"])
def test_a_model_index_of_another_form_keeps_it(index, run, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nmodel-index: {index}\n---\n# Mine\n")
    before = head((tmp_path / "README.md").read_text())["model-index"]
    text = update_card(tmp_path, run(facts={"dataset": "a/b"}).facts).read_text()
    found = head(text)["model-index"]
    if index.endswith("more: 2}]"):
        assert found[0].pop("results")[:1] == before[0].pop("results")
    assert found == before and START in text


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("a: no", "no"),
        ("a: [on, off, yes]", ["on", "off", "yes"]),
        ("a: true", True),
        ("a: 2024-01-02", datetime.date(2024, 1, 2)),
        ("a: 'null'", "null"),
        ("a: {b: [1, 2.5], c: é}", {"b": [1, 2.5], "c": "é"}),
        ("a: |\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_values_of_any_kind_are_kept(line, value, run, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{line}\nz: 1\n---\n# Mine\n")
    for _ in range(2):
        found = head(update_card(tmp_path, run().facts).read_text())
        assert found["a"] == value and list(found)[:2] == ["a", "z"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\ntags: [a\n---\n# Mine\n", "is no YAML mapping: .*expected ',' or ']'"),
        (b"---\njust text\n---\n# Mine\n", "is no YAML mapping: "),
        (b"---\ntags: {a: b}\n---\n# Mine\n", "'tags' .* must be a list, not dict"),
        (b"---\n1: a\n---\n# Mine\n", "is no YAML mapping: "),
        (f"# Mine\n{START}\n".encode(), "once each.*it has 1 and 0"),
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


def test_a_card_from_nothing_has_a_title_and_our_section(run, tmp_path):
    facts = run().facts
    text = update_card(tmp_path, facts).read_text()
    assert text.count("\n---\n\n# model\n\n" + START) == 1 and text.endswith(END + "\n")
    text = update_card(tmp_path, dataclasses.replace(facts, steps=99, base_model="some/base")).read_text()
    assert text.count(START) == text.count("# model\n") == 1 and head(text)["base_model"] == "some/base"
    assert "Fine-tuned from [some/base](https://huggingface.co/some/base) with [Online" in text


def test_metadata_that_a_push_names_is_added_where_it_is_not_set(run, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n")
    text = update_card(tmp_path, run().facts, tags=["given"], license="apache-2.0", language="en").read_text()
    found = head(text)
    assert found["license"] == "mit" and found["language"] == "en"
    assert found["tags"] == ["mine", "online-subspace-descent", "hf_osd", "given"]
