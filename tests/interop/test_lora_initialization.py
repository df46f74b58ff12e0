"""LoRA starts in P's subspace, on the right side of the layer, and the model's output does not change."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_osd import ProjectionState, create_osd_optimizer, init_lora_from_projection
from hf_osd.hub import Projection


peft = pytest.importorskip("peft")


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=32))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))


def loss_of(model):
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


def learned(model, side="auto") -> ProjectionState:
    optimizer = create_osd_optimizer(model, rank=4, lr=1e-3, side=side)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return ProjectionState.from_optimizer(optimizer)


def with_lora(model, rank=4, target_modules="all-linear", **options):
    config = peft.LoraConfig(
        r=rank, target_modules=target_modules, fan_in_fan_out=isinstance(model, GPT2LMHeadModel), **options
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("side", ["left", "right", "auto"])
@pytest.mark.parametrize("rank", [4, 2])
def test_a_or_b_is_p_and_the_output_is_unchanged(make, side, rank):
    model = make()
    state = learned(model, side)
    # The shapes say which factor P is: read from the layer, not from the code under test.
    peft_model = with_lora(model, rank)
    before = loss_of(peft_model.eval()).detach()
    names = init_lora_from_projection(peft_model, state)
    assert [f"{name}.weight" for name in names] == list(state)
    assert torch.equal(loss_of(peft_model), before)
    sides = set()
    for name in names:
        layer, entry = peft_model.base_model.model.get_submodule(name), state[f"{name}.weight"]
        A, B, P = layer.lora_A["default"].weight, layer.lora_B["default"].weight, entry.projection[:, :rank]
        x = torch.randn(3, A.shape[1])
        W_out = layer.base_layer(x) - layer.base_layer(torch.zeros_like(x))  # works for Linear and Conv1D
        assert (x.shape[1], W_out.shape[1]) == (A.shape[1], B.shape[0])
        # GPT-2 stores (in, out): there P's left side is the input's.
        inputs = (entry.side == "left") == (make is gpt2)
        sides.add(inputs)
        if inputs:
            assert torch.equal(A.mT, P) and not B.any()
        else:
            assert torch.equal(B, P) and not A.any()
    assert sides == ({True, False} if side == "auto" else {(side == "left") == (make is gpt2)})


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_step_of_training_stays_in_p(make):
    model = make()
    state = learned(model)
    peft_model = with_lora(model).train()
    names = init_lora_from_projection(peft_model, state)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    before = loss_of(peft_model)
    before.backward()
    optimizer.step()
    assert loss_of(peft_model) < before
    for name in names:
        entry = state[f"{name}.weight"]
        # dW as the base stores it; P's side of it lies in P's span after the first step, whichever factor moved.
        dW = peft_model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()
        X, P = dW if entry.side == "left" else dW.mT, entry.projection.double()
        outside = X - P @ torch.linalg.lstsq(P, X).solution
        assert dW.norm() > 0 and outside.norm() < 1e-5 * dW.norm()  # P and factors are float32


def test_a_folder_and_some_layers_only(tmp_path):
    model = llama()
    state = learned(model)
    state.save_pretrained(tmp_path)
    peft_model = with_lora(model, target_modules=["q_proj", "down_proj"])
    assert len(init_lora_from_projection(peft_model, tmp_path)) == 4
    layer = "model.layers.1.mlp.down_proj"
    B = peft_model.base_model.model.get_submodule(layer).lora_B["default"].weight
    assert state[f"{layer}.weight"].side == "left" and torch.equal(B, state[f"{layer}.weight"].projection)


def test_another_adapter_and_layers_without_p():
    model = llama()
    state = learned(model)
    peft_model = with_lora(model, target_modules=["q_proj"])
    peft_model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    first = {key: value.clone() for key, value in peft_model.state_dict().items() if "lora_" in key}
    with pytest.raises(ValueError, match="There is no P for lm_head; .*strict=False"):
        init_lora_from_projection(peft_model, state, "second")
    names = init_lora_from_projection(peft_model, state, "second", strict=False)
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    for key, value in peft_model.state_dict().items():
        if "lora_" in key and ("default" in key or "lm_head" in key):
            assert torch.equal(value, first.get(key, value))


def test_bf16_p_and_weights():
    model = llama().bfloat16()
    state = learned(model)
    peft_model = with_lora(model)
    assert len(init_lora_from_projection(peft_model, state)) == 14


def test_what_does_not_fit_is_refused():
    model = llama()
    state = learned(model)
    q = "model.layers.0.self_attn.q_proj"
    peft_model = with_lora(model, 8, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=rf"The adapter has rank 8 at {q}, P only 4: use LoraConfig\(r=4\)"):
        init_lora_from_projection(peft_model, state)
    with pytest.raises(ValueError, match="has no LoRA adapter 'other'; it has default"):
        init_lora_from_projection(peft_model, state, "other")
    with pytest.raises(ValueError, match="has no LoRA adapter 'default'"):
        init_lora_from_projection(llama(), state)
    small = ProjectionState({f"{q}.weight": Projection(torch.eye(5, 4), "left", 4, (5, 16))})
    with pytest.raises(ValueError, match=r"learned for a weight of shape \(5, 16\), the layer's is \(16, 16\)"):
        init_lora_from_projection(peft_model, small, strict=False)
    elsewhere = ProjectionState({"x.weight": Projection(torch.eye(5, 4), "left", 4, (5, 16))})
    with pytest.raises(ValueError, match="There is no P for .*; P was learned for x.weight. .*have a P.$"):
        init_lora_from_projection(peft_model, elsewhere, strict=False)
    trained = with_lora(llama(), target_modules=["q_proj"], init_lora_weights=False)
    kept = {key: value.clone() for key, value in trained.state_dict().items()}
    with pytest.raises(ValueError, match="is not fresh"):
        init_lora_from_projection(trained, state)
    assert all(torch.equal(value, kept[key]) for key, value in trained.state_dict().items())
    embedding = with_lora(llama(), target_modules=["embed_tokens"])
    P = Projection(torch.eye(16, 4), "right", 4, (32, 16))
    with pytest.raises(ValueError, match="model.embed_tokens is Embedding: P belongs to linear layers only"):
        init_lora_from_projection(embedding, ProjectionState({"model.embed_tokens.weight": P}))
