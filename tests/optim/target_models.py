"""Models of several families, built from configs, in which the tests look for layers to project."""

from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from reference.tiny_models import tiny_llama


LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


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
