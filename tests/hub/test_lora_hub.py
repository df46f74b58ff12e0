"""Adapters and P meet on the Hub: an extracted adapter is pushed and loaded by peft, a P from there starts another."""

import pytest

from hub_server import run_client


pytest.importorskip("peft")

SETUP = """
import warnings
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from hf_osd import ProjectionState, create_osd_optimizer, extract_lora, init_lora_from_projection
from hf_osd.cli.main import main

torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))
model.push_to_hub("tester/base")
optimizer = create_osd_optimizer(model, rank=4, lr=1e-2)
ids = torch.randint(0, 32, (2, 8))
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
state = ProjectionState.from_optimizer(optimizer)
"""

EXTRACT = """
words = "tester/tuned --base tester/base --rank 24 --carry all --push tester/adapter"
main(["extract-lora", *words.split()])
base = LlamaForCausalLM.from_pretrained("tester/base")
loaded = PeftModel.from_pretrained(base, "tester/adapter")
with torch.no_grad():
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)

HfApi().upload_file(path_or_fileobj=b"# Mine\\n", path_in_repo="README.md", repo_id="tester/adapter")
adapter = extract_lora(model, "tester/base", rank=2, carry="all")
adapter.push_to_hub("tester/adapter")
adapter.push_to_hub("tester/private", private=True, revision="other")
assert HfApi().repo_info("tester/private").private
PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("tester/base"), "tester/private", revision="other")
"""

BESIDE_A_MODEL = """
import hf_osd.interop

made_by = hf_osd.interop.extract_lora
model.push_to_hub("tester/tuned")
adapter = extract_lora(model, "tester/base", rank=2, carry="all")
HfApi().create_repo("tester/empty")

def refused(push, *words):
    try:
        push(*words)
    except (SystemExit, ValueError) as error:
        print(error)
        return True

hf_osd.interop.extract_lora = lambda *_, **__: 1 / 0  # nothing is computed
for name in ("tester/tuned", "tuned", "tester/base", "base"):
    assert refused(main, f"extract-lora tester/tuned --base tester/base --push {name}".split()), name
for options in ({}, {"revision": "new"}, {"create_pr": True}):
    assert refused(lambda: adapter.push_to_hub("tester/tuned", **options)), options
hf_osd.interop.extract_lora = made_by
adapter.push_to_hub("tester/empty")
adapter.push_to_hub("new")
"""

START = """
state.push_to_hub("tester/base")
base = LlamaForCausalLM.from_pretrained("tester/base")
peft_model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
names = init_lora_from_projection(peft_model, "tester/base")
assert len(names) == 7
A = peft_model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight
assert torch.equal(A.mT, state["model.layers.0.mlp.up_proj.weight"].projection)
"""


def test_adapters_and_p_on_the_hub(hub):
    """In one process, whose imports take longer than all of it."""
    output = run_client(SETUP + BESIDE_A_MODEL + EXTRACT + START, hub)
    for name, commits in (("tester/tuned", 2), ("tester/base", 3)):  # created, the model, to the base later P
        assert f"hf-osd extract-lora: {name} is the repository of a model that is read: " in output
        assert len(hub.commits(name)) == commits and "adapter_config.json" not in hub.files(name)
    assert "tester/tuned holds a model (config.json, model.safetensors): " in output
    assert "adapter_config.json" in hub.files("tester/empty") and "adapter_config.json" in hub.files("tester/new")
    assert "pushed to tester/adapter: " in output
    files = hub.files("tester/adapter")
    assert files.keys() - {".gitattributes"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].decode()
    assert (
        "base_model: tester/base" in card and "library_name: peft" in card and "# Mine" in card
    )  # as peft updates it
    assert len(hub.commits("tester/adapter")) == 4  # created, the command's push, the words of the user, the next push
