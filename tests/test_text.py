"""Sizes, counts, tables and lists in words; files that are written whole or not at all."""

import logging
import subprocess
import sys

import pytest

from hf_osd.text import announce, format_bytes, format_count, printable, shortened, table, write_text, written_whole


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (625_400, "625.4 kB"),
        (312_449_999, "312.4 MB"),
        (2.5e9, "2.5 GB"),
        (1.25e12, "1,250.0 GB"),
    ],
)
def test_bytes(number, words):
    assert format_bytes(number) == words


def test_bytes_in_a_column_have_one_unit_and_two_digits():
    sizes = [format_bytes(number, 2, "MB") for number in (0, 4_000, 12_345_678, 3_210_000_000)]
    assert sizes == ["0.00 MB", "0.00 MB", "12.35 MB", "3.21 GB"]


@pytest.mark.parametrize(
    ("number", "words", "in_millions"),
    [(0, "0", "0.0M"), (999_999, "999,999", "1.0M"), (25_340_000, "25.3M", "25.3M"), (6.74e9, "6.7B", "6.7B")],
)
def test_counts(number, words, in_millions):
    assert format_count(number) == words and format_count(number, "M") == in_millions


def test_text_of_others_stays_on_its_line_and_does_nothing():
    assert printable("a\n\x1b[1m\x7f\u2028\u202e\ud800é–…") == r"a\n\x1b[1m\x7f\u2028\u202e\ud800é–…"
    assert table(["a"], [["x\ny"]]).splitlines()[-1] == r"x\ny"


def test_lists_are_cut_and_say_so():
    assert shortened([], 2) == ""
    assert shortened(iter("ab"), 2) == "a, b"
    assert shortened({"a": 1, "b": 2, "c": 3, "d": 4}, 2) == "a, b and 2 more"


def test_long_names_keep_the_columns_apart():
    text = table(["name", "n"], [["a" * 90, "1"], ["b", "1000"]], left=("name",))
    assert text.splitlines() == [
        "name" + " " * 91 + "n",
        "-" * 90 + "  ----",
        "a" * 90 + "     1",
        "b" + " " * 91 + "1000",
    ]


def test_a_file_is_replaced_whole_and_with_its_line_breaks(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("ä\r\nb\n", "c"):
        write_text(path, text)
        assert path.read_bytes().decode() == text and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(RuntimeError, match="in the middle"), written_whole(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "before" and temporary.parent == tmp_path
        raise RuntimeError("in the middle")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_line_reaches_whoever_listens_once(caplog):
    caplog.set_level(logging.INFO, logger="hf_osd")
    announce("here we go")
    assert [record.getMessage() for record in caplog.records] == ["here we go"]


PROGRAMS = {  # what a program does about logging before the line, and how often it is to be seen
    "nothing": ("", 1),
    "as the examples of transformers": ("logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])", 1),
    "root at WARNING": ("logging.basicConfig(level=logging.WARNING)", 1),
    "root at INFO": ("logging.basicConfig(level=logging.INFO)", 1),
    "root at ERROR": ("logging.basicConfig(level=logging.ERROR)", 0),
    "ours at WARNING": ("logging.basicConfig(); logging.getLogger('hf_osd').setLevel(logging.WARNING)", 0),
    "ours at WARNING without handlers": ("logging.getLogger('hf_osd').setLevel(logging.WARNING)", 0),
    "a handler of its own": ("logging.getLogger('hf_osd').addHandler(logging.StreamHandler())", 1),
    "set up between two lines": ("announce('first'); logging.basicConfig()", 1),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_line_is_seen_in_every_program_that_did_not_forbid_it(program):
    code, times = PROGRAMS[program]
    code = f"import logging, sys; from hf_osd.text import announce; {code}\nannounce('here we go')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count("here we go") == times
