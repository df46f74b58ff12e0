"""Which parameters are projected, on models of several families built from configs."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_osd import OSD, create_osd_optimizer
from hf_osd.optim.plan import ProjectedPlan
from hf_osd.optim.targets import linear_classes, select


LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def tiny_llama(tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=80,
            tie_word_embeddings=tied,
        )
    )


def tiny_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=80, n_positions=16))


def tiny_bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=80,
            num_labels=3,
        )
    )


def tiny_t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=80, tie_word_embeddings=True)
    )


class Pair(nn.Module):
    """No `nn.ModuleList`; an output head; two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.second = nn.Linear(12, 20)
        self.second.weight = self.first.weight
        self.head = nn.Linear(20, 6)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5, "pair": Pair}


def layers(names) -> set[str]:
    """`model.layers.0.mlp.up_proj.weight` as `up_proj`."""
    return {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("model", MODELS)
def test_every_trainable_parameter_is_in_one_place(model):
    model = MODELS[model]()
    selection = select(model)
    names = [*selection.projected, *selection.full_size]
    assert sorted(names) == sorted(name for name, p in model.named_parameters())
    assert all(p.ndim == 2 for p in selection.projected.values())
    assert all(model.get_parameter(name) is p for name, p in (selection.projected | selection.full_size).items())
    assert selection.ignored == [] and selection.frozen == []


def test_all_linear_of_llama_is_every_layer_of_the_blocks():
    selection = select(tiny_llama())
    assert len(selection.projected) == 2 * 7
    assert layers(selection.projected) == LLAMA_LAYERS
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= selection.full_size.keys()


def test_all_linear_of_gpt2_finds_conv1d():
    model = tiny_gpt2()
    selection = select(model)
    assert len(selection.projected) == 2 * 4
    assert layers(selection.projected) == {"c_attn", "c_proj", "c_fc"}
    assert tuple(selection.projected["transformer.h.0.attn.c_attn.weight"].shape) == (32, 96)  # (in, out)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= selection.full_size.keys()
    assert "lm_head.weight" not in selection.full_size  # tied to wte


def test_all_linear_of_bert_leaves_pooler_and_classifier():
    selection = select(tiny_bert())
    assert len(selection.projected) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in selection.projected)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= selection.full_size.keys()
    assert {name for name in selection.full_size if "embeddings" in name and name.endswith("s.weight")}


def test_all_linear_of_t5_takes_both_stacks_and_no_embedding():
    selection = select(tiny_t5())
    assert len(selection.projected) == 2 * (4 + 2) + 2 * (8 + 2)  # encoder; decoder with cross-attention
    assert layers(selection.projected) == {"q", "k", "v", "o", "wi", "wo"}
    assert "shared.weight" in selection.full_size
    assert not any("relative_attention_bias" in name for name in selection.projected)


@pytest.mark.parametrize("spelling", ["all-linear", "all_linear", "ALL-Linear", ["all-linear"], ["all_linear"]])
def test_all_linear_in_every_spelling(spelling):
    model = tiny_llama()
    assert select(model, spelling).projected.keys() == select(model).projected.keys()


def test_all_linear_without_blocks_takes_all_but_the_head():
    model = Pair()
    selection = select(model)
    assert list(selection.projected) == ["first.weight"]  # shared with `second`, counted once
    assert selection.full_size.keys() == {"first.bias", "norm.weight", "norm.bias", "second.bias", "head.weight"} | {
        "head.bias"
    }


@pytest.mark.parametrize(("model", "shared"), [(tiny_t5(), "shared.weight"), (tiny_llama(tied=True), None)])
def test_tied_weights_count_once(model, shared):
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    selection = select(model)
    parameters = [*selection.projected.values(), *selection.full_size.values()]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))
    # Asked for by the name of the other module, it is projected under its own.
    named = select(model, ["lm_head"])
    assert list(named.projected) == [shared or "model.embed_tokens.weight"]


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
    r"q_proj",
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
        config = SimpleNamespace(
            target_modules=wanted, exclude_modules=known, modules_to_save=None, target_parameters=None
        )
        theirs = {name for name in names if check_target_module_exists(config, name)}
        if isinstance(wanted, list) and not all(suffix(entry, names) for entry in wanted):
            assert ours(model, wanted, known) is None  # stricter than peft: every entry must match
            continue
        if not any(isinstance(model.get_submodule(name), linear_classes()) for name in theirs):
            assert ours(model, wanted, known) is None
            continue
        matched = ours(model, wanted, known)
        assert matched is not None, wanted
        tied = {"lm_head"} if hasattr(model, "lm_head") else set()  # GPT-2's and T5's share the embedding
        assert matched - tied == theirs - tied, wanted
        compared += 1
    assert compared >= 3


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


def test_frozen_parameters_are_left_out_of_everything():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    model.lm_head.requires_grad_(False)
    selection = select(model)
    assert len(selection.projected) == 7
    assert len(selection.frozen) == 7 and all(name.startswith("model.layers.0.") for name in selection.frozen)
    assert not any(name.startswith("model.layers.0.") for name in selection.full_size)
    assert "lm_head.weight" not in selection.full_size


def test_modules_that_match_but_are_not_linear_are_reported():
    model = tiny_llama()
    selection = select(model, ["q_proj", "embed_tokens", "mlp"])
    assert layers(selection.projected) == {"q_proj"}
    assert selection.ignored == ["model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp"]
    with pytest.warns(UserWarning, match="3 modules match but are not projected.*model.embed_tokens"):
        create_osd_optimizer(model, rank=4, target_modules=["q_proj", "embed_tokens", "mlp"])


@pytest.mark.parametrize(
    ("wanted", "unwanted", "message"),
    [
        (["q_porj"], None, "'q_porj' in `target_modules` matches no module. Did you mean 'q_proj'"),
        (["zzz"], None, "'zzz' in `target_modules` matches no module. The model has: .*q_proj"),
        ("all-linear", ["v_porj"], "'v_porj' in `exclude_modules` matches no module. Did you mean 'v_proj'"),
        (["q_proj"], ["q_proj"], "Nothing to project"),
        ([], None, "Nothing to project"),
        ("nothing_like_it", None, "Nothing to project: target_modules='nothing_like_it'"),
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


def test_a_frozen_selection_is_refused_with_the_reason():
    model = tiny_llama()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match="14 matching layers are frozen"):
        select(model)


@pytest.mark.parametrize("model", MODELS)
def test_weight_decay_goes_to_the_parameters_that_trainer_gives_it_to(model):
    model = MODELS[model]()
    optimizer = create_osd_optimizer(model, lr=1e-3, rank=4, weight_decay=0.1)
    decays = set(Trainer.get_decay_parameter_names(None, model))
    seen = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is p
            seen[name] = group["weight_decay"]
    assert seen == {name: 0.1 if name in decays else 0.0 for name, _ in model.named_parameters()}
    assert set(seen.values()) == {0.0, 0.1}


def test_groups_of_a_llama():
    model = tiny_llama()
    model.model.layers[1].mlp.requires_grad_(False)
    optimizer = create_osd_optimizer(model, "osd_lion", lr=2e-3, rank=6, weight_decay=0.1)
    assert [(g["rank"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (6, 0.1, 14 - 3),
        (None, 0.1, 2),  # embedding and head
        (None, 0.0, 5),  # norms
    ]
    assert all(group["weight_rule"] == "lion" and group["lr"] == 2e-3 for group in optimizer.param_groups)
    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in chosen} == {id(p) for p in model.parameters() if p.requires_grad}
    plans = [optimizer.plan_of(p) for p in optimizer.param_groups[0]["params"]]
    assert all(isinstance(plan, ProjectedPlan) and plan.rank == 6 for plan in plans)


def test_a_projected_group_without_decay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = nn.Linear(12, 20)
            self.my_norm = nn.Linear(20, 12)  # matches Trainer's pattern for norms

    optimizer = create_osd_optimizer(Odd(), rank=4, weight_decay=0.1)
    assert [(g["rank"], g["weight_decay"], g["param_names"]) for g in optimizer.param_groups] == [
        (4, 0.1, ["plain.weight"]),
        (4, 0.0, ["my_norm.weight"]),
        (None, 0.0, ["plain.bias", "my_norm.bias"]),
    ]


def test_the_default_rank_and_the_clipped_one_warn_once():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="is not below min.* for 14 matrices") as caught:
        optimizer = create_osd_optimizer(model)
    assert sum("is not below" in str(one.message) for one in caught) == 1  # not per layer
    assert optimizer.param_groups[0]["rank"] == 128
    ranks = {optimizer.plan_of(p).rank for p in optimizer.param_groups[0]["params"]}
    assert ranks == {16, 32}  # min(m, n) of the key and value layers, and of the others


def test_a_rank_that_fits_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_osd_optimizer(tiny_llama(), rank=8)


def test_a_second_group_does_not_warn_again():
    with pytest.warns(UserWarning, match="is not below min.* for 3 matrices") as caught:
        OSD([{"params": [nn.Parameter(torch.randn(8, 12))], "rank": 8} for _ in range(3)])
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"alhpa": 3.0}, "`alhpa` in create_osd_optimizer. Did you mean `alpha`"),
        ({"lambda": 3.0}, "`lambda` in create_osd_optimizer. Did you mean `lambda_`"),
        ({"weight_rule": "lion"}, "`weight_rule` in create_osd_optimizer"),
        ({"maximize": True}, "`maximize` in create_osd_optimizer"),
        ({"optim": "adamw"}, "'adamw'.*Did you mean 'osd_adamw'"),
        ({"optim": "osd_adam8bit"}, "Did you mean 'osd_adamw8bit'"),
        ({"preset": "refrence"}, "Unknown preset 'refrence'. Known: reference"),
        ({"projection_optim": "adam"}, "must be one of .*did you mean 'adamw'"),
        ({"rank": 0}, "`rank` .* must be an integer >= 1, got 0"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        create_osd_optimizer(tiny_llama(), **{"rank": 4, **call})


def test_the_projection_has_a_rule_of_its_own():
    model = tiny_llama()
    optimizer = create_osd_optimizer(model, "osd_adamw", rank=4, projection_optim="sgd", momentum=0.5)
    assert optimizer.param_groups[0]["projection_rule"] == "sgd"
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert {"exp_avg", "exp_avg_sq", "projection_momentum_buffer"} <= optimizer.state[p].keys()


def test_init_by_name_reaches_the_parameters():
    model = nn.Sequential(nn.Linear(20, 12, bias=False), nn.Linear(12, 30, bias=False))
    given = {"0.weight": torch.eye(12)[:, :4], "1.weight": torch.eye(12)[:, 4:8]}
    optimizer = create_osd_optimizer(model, rank=4, init=given, alpha=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["projection"], given[name])
    with pytest.raises(ValueError, match="`init` has no P for 1.weight"):
        create_osd_optimizer(model, rank=4, init={"0.weight": given["0.weight"]})


def test_names_in_patterns_are_not_regular_expressions():
    # A list holds names: the dot of a regular expression must not match there.
    with pytest.raises(ValueError, match=re.escape("'q.proj' in `target_modules` matches no module")):
        select(tiny_llama(), ["q.proj"])
