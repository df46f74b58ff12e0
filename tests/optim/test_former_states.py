"""States that earlier versions saved go on as they began, or are refused."""

import copy
import warnings

import pytest
import torch
from named_parameters import make, run

from hf_osd import OSD


FORMER = {"residual_scaling": None, "residual_limit": None, "projection_schedule": None}


@pytest.mark.parametrize(
    ("options", "former"),
    [
        ({}, FORMER),
        ({"residual": "scaled"}, {"residual_scaling": "column", "residual_limit": 1.01, "projection_schedule": "lr"}),
        ({"residual": "scaled", "side": "two_sided"}, FORMER | {"residual_scaling": "matrix"}),
    ],
)
def test_a_state_with_options_that_are_gone_continues(options: dict, former: dict):
    params, optimizer = make(**options)
    run(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group.update(former | {"lambda_": 0.1})  # what once was the default, and is left to the rule now
    _, other = make(**options)
    other.load_state_dict(saved)  # a warning would be an error
    assert not FORMER.keys() & other.param_groups[0].keys()


@pytest.mark.parametrize(
    ("name", "value"), [("residual_scaling", "matrix"), ("residual_limit", 0.0), ("projection_schedule", "constant")]
)
def test_a_state_that_needs_an_option_that_is_gone_is_refused(name: str, value):
    params, optimizer = make(residual="scaled")
    run(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= FORMER | {name: value}
    _, other = make(residual="scaled")
    with pytest.raises(ValueError, match=f"saved with {name}={value!r}, which hf_osd no longer has"):
        other.load_state_dict(saved)
    assert not other.state
    pickled = optimizer.__getstate__()
    pickled["param_groups"] = saved["param_groups"]
    with pytest.raises(ValueError, match=f"saved with {name}={value!r}"):
        OSD.__new__(OSD).__setstate__(pickled)


def test_a_saved_default_is_the_default():
    params, optimizer = make(subspace="svd", update_interval=200)
    run(params, optimizer, range(2))
    _, other = make(subspace="svd")
    other.load_state_dict(optimizer.state_dict())  # a warning would be an error
    _, other = make(subspace="svd", seed=3)
    with pytest.warns(UserWarning, match=r"seed=0 \(checkpoint\) instead of 3"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("given", [{}, {"projection_sample": 1}], ids=str)
def test_a_state_of_before_samples_goes_on_with_whole_gradients(given: dict):
    params, optimizer = make(projection_sample=1)
    run(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["projection_sample"]
    others, other = make(**given)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    if given:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(saved)
    else:
        with pytest.warns(UserWarning, match=r"restored: projection_sample=1 \(checkpoint\) instead of 4\.$"):
            other.load_state_dict(saved)
    run(params, optimizer, range(2, 6)), run(others, other, range(2, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{"subspace": "random"}, {"side": "two_sided"}, {"subspace": "power"}], ids=str)
def test_a_state_of_before_samples_has_none_where_there_is_nothing_to_sample(options: dict):
    params, optimizer = make(**options)
    run(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["projection_sample"]
    make(**options)[1].load_state_dict(saved)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("options", "same"), [({}, 4), ({"subspace": "power"}, 1)], ids=str)
def test_a_default_sample_is_its_number(options: dict, same: int):
    for saved, own in ((None, same), (same, None)):
        params, optimizer = make(projection_sample=saved, **options)
        run(params, optimizer, range(2))
        make(projection_sample=own, **options)[1].load_state_dict(optimizer.state_dict())
