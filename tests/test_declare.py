"""Checks of options: what each takes and what it refuses, once for every kind; and what a declaration becomes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hf_osd.declare import (
    Check,
    Need,
    betas,
    boolean,
    build,
    check_values,
    integer,
    number,
    one_of,
    option,
    options_of,
    refuse_unknown,
    refuse_without_effect,
)


NOT_A_NUMBER: list[Any] = ["1", None, True, float("nan"), float("inf"), [1.0], torch.tensor(1.0)]
CHECKS: dict[str, tuple[Check, list[Any], list[Any]]] = {
    "a number >= 0": (number(0), [0, 0.0, 0.5, 3, 1e300], [*NOT_A_NUMBER, -1, -1e-9]),
    "a number > 0": (number(0, open_below=True), [1e-9, 0.25, 2], [*NOT_A_NUMBER, 0, 0.0, -1]),
    "a number >= 0 and < 1": (number(0, below=1), [0, 0.5, 0.999], [*NOT_A_NUMBER, 1, 1.0, 1.5, -0.1]),
    "an integer >= 1": (integer(1), [1, 4, 10**6], [0, -5, 2.5, 4.0, "200", True, None]),
    "an integer >= 0 and < 8": (integer(0, below=8), [0, 7], [8, -1, 1.0, "0", None, True]),
    "True or False": (boolean(), [True, False], [0, 1, "true", None]),
    "one of left, right": (one_of(("left", "right")), ["left", "right"], ["both", "", "Left", None, 0, ["left"]]),
    "one of a, b, or a number": (
        one_of("ab", lambda value: isinstance(value, int), "a number"),
        ["a", "b", 3],
        ["c", "", None, 2.0],
    ),
    "two numbers >= 0 and < 1": (
        betas(),
        [(0.9, 0.95), [0, 0]],
        [0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (-0.1, 0.9), ("0.9", 0.9), "ab", (0.9, float("nan")), None],
    ),
}


@pytest.mark.parametrize("text", CHECKS)
def test_each_check_takes_and_refuses(text: str):
    check, good, bad = CHECKS[text]
    assert [value for value in good if check.complaint(value) is not None] == []
    for value in bad:
        complaint = check.complaint(value)
        assert complaint is not None and complaint.startswith(text), value


@pytest.mark.parametrize(("given", "nearest"), [("rigth", "right"), ("lef", "left"), ("up", None)])
def test_a_misspelt_choice_is_answered_with_the_nearest(given: str, nearest: str | None):
    complaint = one_of(("left", "right")).complaint(given)
    assert complaint == "one of left, right" + (f" (did you mean {nearest!r}?)" if nearest else "")


@dataclass(frozen=True)
class Rule:
    """A field that is declared, one whose name is a keyword, and one of the rule's own."""

    share: float = option(0.5, "Share.", check=number(0), card="share")
    lambda_: float | None = option(
        None, "Weight.", check=number(0), needs=(Need(lambda values: values["share"] > 0, "without a `share`"),)
    )
    own: int = 3


def test_a_declaration_becomes_an_option():
    found = options_of(Rule)
    assert list(found) == ["share", "lambda_"]
    assert (found["share"].key, found["share"].default, found["share"].type) == ("share", 0.5, float)
    assert (found["lambda_"].key, found["lambda_"].default) == ("lambda", None)
    assert found["share"].has_default(0.5) and not found["share"].has_default(0.6)


def test_an_instance_takes_what_is_given():
    assert build(Rule, {"share": 0.25, "lambda_": None, "own": 7}) == Rule(share=0.25)
    assert build(Rule, {"lambda_": [1, 2]}).lambda_ == (1, 2)  # rules are hashed


def test_values_are_refused_by_name():
    declared = options_of(Rule)
    check_values(declared, {"share": 1, "lambda_": None}, "a test")
    with pytest.raises(ValueError, match="`share` of a test must be a number >= 0, got None"):
        check_values(declared, {"share": None, "lambda_": None}, "a test")
    with pytest.raises(ValueError, match="`lambda_` of a test has no effect without a `share`. Leave it out."):
        refuse_without_effect(declared, {"share": 0.0, "lambda_": 1.0}, "a test")
    refuse_without_effect(declared, {"share": 0.0, "lambda_": None}, "a test")
    with pytest.raises(ValueError, match="Unknown option `shared` in a test. Did you mean `share`.* Allowed: "):
        refuse_unknown(["shared"], declared, "a test")
