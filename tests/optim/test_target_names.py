"""Names and patterns of `target_modules` and `exclude_modules`: they match as in peft, and mistakes are refused."""

import re
from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from target_models import LLAMA_LAYERS, MODELS, layers
from torch import nn

from hf_osd import create_osd_optimizer
from hf_osd.optim.selection.targets import linear_classes, parse_modules, select
from reference.tiny_models import tiny_llama


@pytest.mark.parametrize("spelling", ["all-linear", "all_linear", "ALL-Linear", ["all-linear"], ["all_linear"]])
def test_all_linear_in_every_spelling(spelling):
    model = tiny_llama()
    assert select(model, spelling).projected.keys() == select(model).projected.keys()


# Several wildcards, names and suffixes; each matches something in one of the models at least.
PATTERNS = [
    ["q_proj", "v_proj"],
    ["layers.0.self_attn.q_proj"],
    ["model.layers.1.mlp.down_proj", "o_proj"],
    ["proj"],
    ["0"],
    ["attn", "c_fc"],
    ["dense"],
    ["query", "classifier"],
    ["lm_head"],
    ["SelfAttention.q", "wo"],
    ["first", "head"],
    r".*_proj",
    r".*\.(q|v)_proj",
    r"model\.layers\.0\..*",
    r".*(query|key|c_attn|q)$",
    r"lm_head|classifier|head",
    r"(?!.*mlp).*",
]


def ours(model: nn.Module, wanted, unwanted=None) -> set[str] | None:
    """Names of the modules that `select` matched, or `None` where it refused."""
    try:
        with_weights = select(model, wanted, unwanted)
    except ValueError:
        return None
    chosen = {id(p) for p in with_weights.projected.values()}
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, linear_classes()) and id(module.weight) in chosen
    }
    return linear | set(with_weights.ignored)


@pytest.mark.parametrize("exclude", [None, ["o_proj", "0.mlp.up_proj"], r".*layers\.1.*"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5"])
def test_names_match_as_in_peft(model, exclude):
    model = MODELS[model]()
    names = [name for name, _ in model.named_modules() if name]
    known = exclude if exclude is None or isinstance(exclude, str) else [e for e in exclude if suffix(e, names)]
    compared = 0
    for wanted in PATTERNS:
        theirs = chosen_by_peft(names, wanted, known)
        entries = [known] if isinstance(known, str) else [[entry] for entry in known or []]
        every = chosen_by_peft(names, wanted, None)
        if any(chosen_by_peft(names, wanted, entry) == every for entry in entries):
            assert ours(model, wanted, known) is None  # stricter than peft: every entry must leave something out
            continue
        linear = [name for name in names if isinstance(model.get_submodule(name), linear_classes())]
        if isinstance(wanted, list) and not all(suffix(entry, linear) for entry in wanted):
            assert ours(model, wanted, known) is None  # stricter than peft: every entry must match a linear layer
            continue
        if theirs.isdisjoint(linear):
            assert ours(model, wanted, known) is None
            continue
        matched = ours(model, wanted, known)
        assert matched is not None, wanted
        tied = {"lm_head"} if hasattr(model, "lm_head") else set()  # GPT-2's and T5's share the embedding
        assert matched - tied == theirs - tied, wanted
        compared += 1
    assert compared >= 3 or exclude is not None


def chosen_by_peft(names: list[str], wanted, unwanted) -> set[str]:
    config = SimpleNamespace(
        target_modules=wanted, exclude_modules=unwanted, modules_to_save=None, target_parameters=None
    )
    return {name for name in names if check_target_module_exists(config, name)}


def suffix(entry: str, names: list[str]) -> bool:
    return any(name == entry or name.endswith("." + entry) for name in names)


def test_exclude_takes_names_away_again():
    model = tiny_llama()
    assert layers(select(model, exclude_modules=["q_proj", "mlp.up_proj"]).projected) == LLAMA_LAYERS - {
        "q_proj",
        "up_proj",
    }
    first = select(model, exclude_modules=r"model\.layers\.1\..*")
    assert all(name.startswith("model.layers.0.") for name in first.projected) and len(first.projected) == 7
    assert (
        select(model, ["q_proj", "k_proj"], ["k_proj"]).projected.keys() == select(model, ["q_proj"]).projected.keys()
    )


def test_modules_that_match_but_are_not_linear_are_reported():
    model = tiny_llama()
    pattern = r".*\.(q_proj|embed_tokens|mlp)"
    selection = select(model, pattern)
    assert layers(selection.projected) == {"q_proj"}
    assert selection.ignored == ["model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp"]
    with pytest.warns(UserWarning, match="3 modules match but are not projected.*model.embed_tokens"):
        create_osd_optimizer(model, rank=4, target_modules=pattern)


@pytest.mark.parametrize("pattern", [r".*\.(self_attn|mlp)\..*", r".*layers.*", r"model\.layers\.1\b.*"])
def test_what_a_pattern_takes_in_without_a_matrix_that_is_left_out_is_not_reported(pattern, recwarn):
    create_osd_optimizer(tiny_llama(), rank=4, target_modules=pattern)  # it matches activations, norms, whole blocks
    assert not [str(told.message) for told in recwarn if "not projected" in str(told.message)]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["q_proj", "mlp"],
            "'mlp' in .* projects nothing, for it is no linear layer. Name .* such as 'mlp.gate_proj'",
        ),
        ("mlp,q_proj", "'mlp' in .* projects nothing"),
        (["q_proj", "embed_tokens"], "for it is no linear layer. Name what is in it, such as 'embed_tokens.weight'"),
        (["q_proj", "model.norm"], "'model.norm' in .* for it is no linear layer. Leave it out"),
        (["q_proj", "act_fn"], "'act_fn' in .* for it is no linear layer. Leave it out"),
        (["q_proj", "v_proj"], "'v_proj' in .* for it is frozen. Leave it out"),
    ],
)
def test_a_name_in_a_list_that_projects_nothing_is_refused(wanted, message):
    model = tiny_llama()
    for block in model.model.layers:
        block.self_attn.v_proj.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.requires_grad_(False)  # the others are not
    with pytest.raises(ValueError, match=message):
        create_osd_optimizer(model, rank=4, target_modules=wanted)
    assert len(select(model, r".*\.(q_proj|v_proj|mlp|embed_tokens)").projected) == 1


def test_a_name_may_mean_linear_and_other_modules():
    model = nn.ModuleDict(
        {"0": nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)}), "1": nn.ModuleDict({"proj": nn.Linear(8, 9)})}
    )
    with pytest.warns(UserWarning, match="1 modules match but are not projected.*: 0.proj"):
        create_osd_optimizer(model, rank=4, target_modules=["proj"])


@pytest.mark.parametrize(
    ("wanted", "unwanted", "message"),
    [
        (["q_porj"], None, "'q_porj' in `target_modules` matches no module or matrix. Did you mean 'q_proj'"),
        (
            [".*.attn.*", ".*.mlp.*"],
            None,
            r"A list has names; write patterns as one text .* '\.\*\.attn\.\*\|\.\*\.mlp",
        ),
        (["zzz"], None, "'zzz' in `target_modules` matches no module or matrix. The model has: .*q_proj"),
        ("all-linear", ["v_porj"], "'v_porj' in `exclude_modules` matches no module or matrix. Did you mean 'v_proj'"),
        (["q_proj"], ["q_proj"], "Nothing to project"),
        (["module.model.layers.0.mlp"], None, r"Did you mean 'model\.layers\.0\.mlp'"),
        ("base_model.model.lm_head.weight", None, "Did you mean 'lm_head.weight'"),
        (5, None, "given as a text or a list of texts, got 5"),
        (None, None, "given as a text or a list of texts, got None"),
        ([["q_proj"]], None, "given as a text or a list of texts"),
        ("all-linear", ["q_proj", 1], "given as a text or a list of texts"),
        ([], None, "Nothing to project"),
        (
            "nothing_like_it",
            None,
            "'nothing_like_it' in `target_modules` matches no module or matrix. The model has: .*q_proj",
        ),
        ("q_proj,v_porj", None, "'v_porj' in `target_modules` matches no module or matrix. Did you mean 'v_proj'"),
        ("q_.*", None, r"\(this string is a regular expression for the whole name of a module\)"),
        ("q_proj,all-linear", None, "stands alone"),
        (["embed_tokens"], None, "model.embed_tokens matched but are no linear layers"),
        ("(unclosed", None, r"`target_modules` '\(unclosed' is not a regular expression"),
        ("all-linear", "*_proj", r"`exclude_modules` '\*_proj' is not a regular expression"),
        (["all-linear", "lm_head"], None, "stands alone"),
        (["lm_head", "all_linear"], None, "stands alone"),
    ],
)
def test_a_mistake_is_refused_with_a_telling_message(wanted, unwanted, message):
    with pytest.raises(ValueError, match=message):
        select(tiny_llama(), wanted, unwanted)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, mlp.up_proj", ["q_proj", "mlp.up_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (("q.*",), ["q.*"]),  # a list holds names
        ("All_Linear", "all-linear"),
        (["all-linear"], "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("q_proj|v_proj", "q_proj|v_proj"),
        (".*_pro[jk]{1,2}", ".*_pro[jk]{1,2}"),
    ],
)
def test_a_text_is_read_in_one_place(text, meant):
    assert parse_modules(text) == meant == parse_modules(meant)


@pytest.mark.parametrize("text", ["q_proj,k_proj", "q_proj", r".*\.q_proj"])
def test_targets_and_exclusions_are_read_alike(text):
    model = tiny_llama()
    wanted, others = select(model, text).projected, select(model, exclude_modules=text).projected
    assert wanted.keys() | others.keys() == select(model).projected.keys() and not wanted.keys() & others.keys()
    optimizer = create_osd_optimizer(model, rank=4, target_modules=text)
    assert set(optimizer.param_groups[0]["param_names"]) == set(wanted)


def test_modules_with_numbers_are_told_too():
    with pytest.raises(
        ValueError, match="'zzz' in `target_modules` matches no module or matrix. The model has: 0, 0.wei"
    ):
        select(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "zzz")


def test_names_in_patterns_are_not_regular_expressions():
    # A list holds names: the dot of a regular expression must not match there.
    with pytest.raises(ValueError, match=re.escape("'q.proj' in `target_modules` matches no module")):
        select(tiny_llama(), ["q.proj"])


@pytest.mark.parametrize(
    ("unwanted", "left"),
    [(["mlp"], 8), ("mlp", 8), (["layers.0"], 7), (["model.layers.0.mlp"], 11), (["self_attn"], 6)],
)
def test_a_name_of_a_container_leaves_out_what_is_inside(unwanted, left: int):
    assert len(select(tiny_llama(), exclude_modules=unwanted).projected) == left


@pytest.mark.parametrize("unwanted", [["lm_head"], r".*layers\.7.*", ["q_proj", "embed_tokens"]])
def test_what_leaves_nothing_out_is_refused(unwanted):
    with pytest.raises(ValueError, match="leaves nothing out of what is projected"):
        select(tiny_llama(), exclude_modules=unwanted)


ATTENTION = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)


@pytest.mark.parametrize(
    ("wanted", "unwanted", "left"),
    [
        ("all-linear", ["layers.0.linear1.weight"], 5),
        ("all-linear", "linear1.weight,linear2", 2),
        ("all-linear", r".*linear1\.weight", 4),
        (["linear1", "in_proj_weight"], ["0.linear1.weight"], 3),
        (["linear1.weight"], ["0.linear1"], 1),
        (r".*weight", r".*layers\.0\.linear1.*", 7),
        (r".*weight", r".*self_attn.*", 4),
        ("in_proj_weight", r"(?!.*layers\.0).*", 1),
    ],
)
def test_a_parameters_name_stands_for_it_as_its_layers_does(wanted, unwanted, left: int):
    assert len(select(ATTENTION, wanted, unwanted).projected) == left


def test_what_one_of_the_names_of_a_shared_weight_leaves_out_is_out():
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), "third": nn.Linear(8, 8)})
    model["second"].weight = model["first"].weight
    for name in ("first", "second", "first.weight", "second.weight"):
        assert list(select(model, exclude_modules=[name]).projected) == ["third.weight"]


@pytest.mark.parametrize(
    ("wanted", "unwanted", "kinds"),
    [
        (r"(?!.*(lm_head|q_proj)$).*", None, LLAMA_LAYERS - {"q_proj"}),
        (r"model\.(?!.*q_proj$).*", None, LLAMA_LAYERS - {"q_proj"}),
        (r".*(?<!_proj)", None, {"lm_head"}),
        (r".*\.\w*t", None, None),
        ("all-linear", r"(?!.*q_proj$).*", {"q_proj"}),
        ("all-linear", r".*(mlp|q_proj)", {"k_proj", "v_proj", "o_proj"}),
        ("all-linear", r".*\.m\w*", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_a_pattern_for_modules_does_not_match_by_the_names_of_their_weights(wanted, unwanted, kinds):
    # `q_proj.weight` does not end in `q_proj`, and ends in t.
    if kinds is None:
        with pytest.raises(ValueError, match="Nothing to project"):
            select(tiny_llama(), wanted, unwanted)
    else:
        assert layers(select(tiny_llama(), wanted, unwanted).projected) == kinds


@pytest.mark.parametrize("wanted", ["embed_tokens", ["model.embed_tokens"], r".*embed_tokens"])
def test_an_embedding_is_asked_for_by_the_name_that_the_message_tells(wanted):
    hint, model = "their matrices have names: model.embed_tokens.weight", tiny_llama()
    with pytest.raises(ValueError, match=f"model.embed_tokens matched but are no linear layers; {hint}"):
        select(model, wanted)
    with pytest.warns(UserWarning, match=f"1 modules match .*: model.embed_tokens; {hint}"):
        create_osd_optimizer(model, rank=4, target_modules=r".*(q_proj|embed_tokens)")
    assert list(select(model, ["model.embed_tokens.weight"]).projected) == ["model.embed_tokens.weight"]
