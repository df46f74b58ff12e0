import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import EXAMPLES


sys.path.insert(0, str(EXAMPLES / "benchmarks"))
import rso_activations
from hf_osd.rso import create_rso_model


def test_tensors_without_contents_are_counted_as_real_ones(tmp_path, monkeypatch):
    settings = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "vocab_size": 128, "tie_word_embeddings": False}
    monkeypatch.setattr(rso_activations, "CONFIGS", tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(settings))
    rows = rso_activations.activations("tiny", 8, [48])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    ids = torch.randint(128, (1, 48))
    full = rso_activations.saved_bytes(model, ids)
    rso = rso_activations.saved_bytes(create_rso_model(model, 8), ids)
    assert [{key: row[key] for key in ("blocks", "outside")} for row in rows] == [full, rso]
    assert rso["outside"] == full["outside"]
    # Of each block: the inputs of q, k, v (one tensor), of gate and up (one) and of down go, in bfloat16; the input of
    # o is a view of what the attention keeps for itself, or a copy of its size. What comes is x P of seven layers.
    gone, come = 48 * 2 * (2 * 64 + 160), 48 * 2 * 7 * 8
    assert (full["blocks"] - rso["blocks"]) / 2 in (gone - come, gone + 48 * 2 * 64 - come)
