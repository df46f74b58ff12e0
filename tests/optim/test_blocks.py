"""Where blocks and heads are, in models of every make; and linear layers that compute their weights."""

import pytest
import torch
from target_models import layers
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from hf_osd import create_osd_optimizer
from hf_osd.optim.selection.targets import select


class Block(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(x).relu())


class Net(nn.Module):
    """Of the parts that a test gives."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        self.parts = list(parts)
        for name, part in parts.items():
            setattr(self, name, part)


class ClassificationHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.out = nn.Linear(16, 16), nn.Linear(16, 3)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


BLOCKS = {
    "list": nn.ModuleList([Block()]),
    "sequential": nn.Sequential(Block(), Block()),
    "dictionary": nn.ModuleDict({"first": Block(), "second": Block()}),
    "nested": nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())),
    "named": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), Block(), Block()),
}
HEADS = {
    "linear": nn.Linear(16, 3),
    "list": nn.ModuleList([nn.Linear(16, 3), nn.Linear(16, 4)]),
    "dictionary": nn.ModuleDict({"a": nn.Linear(16, 3), "b": nn.Linear(16, 3)}),
    "MLP": mlp(),
    "classes": nn.ModuleList([ClassificationHead(), ClassificationHead()]),
    "MLPs": nn.ModuleList([mlp(), mlp()]),
    "dictionary of MLPs": nn.ModuleDict({"a": mlp(), "b": nn.Sequential(mlp()[:2], nn.Linear(16, 5), nn.Softmax(-1))}),
    "sequence of MLPs": nn.Sequential(mlp(), mlp()),
    "dictionaries of MLPs": nn.ModuleDict({"a": nn.ModuleDict({"b": mlp()}), "c": nn.ModuleList([mlp(), mlp()])}),
    "MLPs of a class": nn.ModuleList([Net(net=mlp()), Net(net=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5)))]),
    "one of its own blocks": nn.ModuleDict({"a": nn.Sequential(Block(), nn.Linear(16, 5))}),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_blocks_are_projected_and_heads_are_not_whatever_holds_them(blocks: str, head: str):
    model = Net(embed=nn.Embedding(8, 16), stages=BLOCKS[blocks], tasks=HEADS[head])
    expected = {f"stages.{name}" for name, p in BLOCKS[blocks].named_parameters() if "fc" in name and p.ndim == 2}
    assert select(model).projected.keys() == expected != set()


@pytest.mark.parametrize("name", ["heads", "task_heads", "classifiers", "bbox_embed"])
def test_lists_of_heads_are_known_by_their_name(name: str):
    model = Net(layers=nn.Sequential(Block(), Block()), **{name: nn.ModuleList([mlp(), mlp()])})
    assert all(found.startswith("layers.") for found in select(model).projected)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_an_auxiliary_list_does_not_hide_the_blocks(blocks: str):
    model = Net(stages=BLOCKS[blocks], auxiliary=nn.ModuleList([Block()]))
    owners = {name.split(".")[0] for name in select(model).projected}
    assert owners == {"stages", "auxiliary"}


def test_the_parts_of_a_model_in_a_sequential_are_no_blocks():
    # As sentence-transformers builds them: what is inside of the first part counts.
    class Dense(Net): ...

    transformer = Net(layers=nn.ModuleList([Block()]), pooler=nn.Linear(16, 16))
    model = nn.Sequential(transformer, Dense(linear=nn.Linear(16, 8)))
    assert list(select(model).projected) == ["0.layers.0.fc1.weight", "0.layers.0.fc2.weight"]


@pytest.mark.parametrize("name", ["head", "classifier", "lm_head", "heads"])
def test_without_blocks_all_but_the_heads_are_projected(name: str):
    model = Net(first=nn.Linear(12, 16), second=nn.Linear(16, 16), **{name: HEADS["list"]})
    assert list(select(model).projected) == ["first.weight", "second.weight"]


@pytest.mark.parametrize("name", ["fc", "out", "output", "outputs", "logits"])
def test_without_blocks_the_last_of_several_layers_is_a_head_where_it_is_called_so(name: str):
    first, second = nn.Linear(12, 16), nn.Linear(16, 16)
    for last in (nn.Linear(16, 3), mlp()):
        assert list(select(Net(first=first, second=second, **{name: last})).projected) == [
            "first.weight",
            "second.weight",
        ]
    wide = Net(first=first, **{name: nn.Linear(16, 12)})  # gives out what another takes, as an autoencoder
    assert list(select(wide).projected) == ["first.weight", f"{name}.weight"]
    alone = Net(rnn=nn.LSTM(12, 16), **{name: nn.Linear(16, 4)})
    assert list(select(alone).projected) == [f"{name}.weight"]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_blocks_in_what_ends_the_model_are_blocks(kind: type):
    whole = nn.Sequential(Block(), Block(), nn.Linear(16, 3))
    names = select(Net(norm=nn.LayerNorm(16), parts=kind([whole]) if kind is nn.ModuleList else kind(whole))).projected
    assert list(names) == [f"parts.0.{i}.fc{k}.weight" for i in (0, 1) for k in (1, 2)]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
def test_sequentials_in_a_row_are_blocks_but_for_the_last(kind: type):
    row = [
        nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16)),
        nn.Sequential(nn.Linear(16, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
    ]
    model = Net(row=nn.ModuleList(row) if kind is nn.ModuleList else nn.Sequential(*row))
    assert list(select(model).projected) == ["row.0.0.weight", "row.0.2.weight", "row.1.0.weight"]
    alone = select(nn.ModuleList([mlp(), mlp()])).projected  # of several models, say: no blocks, so all is projected
    assert len(alone) == 4


def test_the_heads_that_a_model_tells_of_are_left():
    class Timm(Net):
        def get_classifier(self):
            return self.fc

    class Several(Net):
        def get_output_embeddings(self):
            return self.outputs

    for model in (
        Timm(first=nn.Linear(12, 16), fc=nn.Linear(16, 3)),
        Several(first=nn.Linear(12, 16), outputs=nn.ModuleList([nn.Linear(16, 3)])),
        Net(first=nn.Linear(12, 16), inner=Timm(fc=nn.Linear(16, 3))),
    ):
        assert list(select(model).projected) == ["first.weight"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Net(stages=nn.ModuleList([mlp()[:1]]), fc=nn.Linear(4, 3)).requires_grad_(False),
            "1 matching layers are fro",
        ),
        (
            Net(stages=nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1)) for _ in "ab")), fc=nn.Linear(4, 3)),
            r"are heads, or outside of its blocks\). Use names such as \['fc'\] or an optimizer that does not project",
        ),
        (nn.Sequential(nn.Conv2d(3, 3, 1)), r"it has none\). Use an optimizer that does not project"),
    ],
)
def test_where_there_is_nothing_to_project_the_way_out_is_none_that_was_taken(model, message: str):
    with pytest.raises(ValueError, match=message) as error:
        select(model)
    assert "Use target_modules" not in str(error.value)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older weight_norm": weight_norm,
    "older spectral_norm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("wanted", ["all-linear", "fc1"])
@pytest.mark.parametrize("computed", COMPUTED)
def test_a_layer_that_computes_its_weight_is_projected(computed: str, wanted: str):
    blocks = nn.Sequential(Block(), Block())
    for block in blocks:
        COMPUTED[computed](block.fc1)
    selection = select(blocks, wanted)
    chosen = [p for name, p in selection.projected.items() if "fc1" in name]
    assert [tuple(p.shape) for p in chosen] == [(32, 16)] * 2 and not selection.ignored
    optimizer = create_osd_optimizer(blocks, rank=4, target_modules=wanted, rank_pattern={"0.fc1": 2}, lr=0.1)
    blocks(torch.ones(2, 16)).square().sum().backward()
    before = blocks[0].fc1.weight.detach().clone()
    optimizer.step()
    assert tuple(optimizer.state[chosen[0]]["projection"].shape) == (16, 2)
    assert not torch.equal(blocks(torch.ones(2, 16)), before) and not torch.equal(blocks[0].fc1.weight, before)


def test_matrices_of_no_linear_layer_are_projected_by_name():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    assert layers(select(model).projected) == {"out_proj", "linear1", "linear2"}
    assert layers(select(model, "in_proj_weight").projected) == {"in_proj_weight"}
    assert layers(select(model, ["in_proj_weight", "linear1"]).projected) == {"in_proj_weight", "linear1"}
    assert layers(select(model, r".*(in_proj_weight|linear\d)").projected) == {"in_proj_weight", "linear1", "linear2"}
    assert layers(select(model, r".*layers\.0\..*").projected) == {"out_proj", "linear1", "linear2"}
    one = select(model, "in_proj_weight", exclude_modules="layers.0")
    assert list(one.projected) == ["layers.1.self_attn.in_proj_weight"]
    with pytest.raises(ValueError, match="Did you mean 'in_proj_weight'"):
        select(model, "in_proj_wieght")
    optimizer = create_osd_optimizer(
        model, rank=4, target_modules="in_proj_weight", rank_pattern={"in_proj_weight": 2}
    )
    model(torch.randn(3, 2, 16)).square().sum().backward()
    optimizer.step()
    assert tuple(optimizer.state[model.layers[0].self_attn.in_proj_weight]["projection"].shape) == (16, 2)


@pytest.mark.parametrize("wanted", ["kernels", "0.q", "embed.weight", "q_proj.weight"])
def test_any_matrix_or_stack_can_be_named_by_its_parameter(wanted: str):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.kernels = nn.Parameter(torch.randn(16, 2, 8)), nn.Parameter(torch.randn(16, 8))
            self.bias, self.q_proj = nn.Parameter(torch.zeros(16)), nn.Linear(16, 16)

    model = Net(embed=nn.Embedding(8, 16), layers=nn.ModuleList([Attention()]))
    (found,) = select(model, wanted).projected
    assert found.endswith(wanted)
    with pytest.raises(ValueError, match="matches no module"):
        select(model, "bias")
