#!/usr/bin/env bash
# transformers 5.24.0: a resumed Trainer leaves experts and router of a mixture at the weights that the script has made.
#
# A checkpoint has the weights in the layout of the Hub: one matrix for each expert, under other names. The model has all
# experts of a layer in one tensor. `from_pretrained` converts, but Trainer's own loading, for `resume_from_checkpoint`
# and for `load_best_model_at_end`, does not: what it finds no name for stays as it is. So the run goes on with trained
# attention, the moments of trained experts, and untrained experts; the best model is loaded with the experts of the
# last step. The only sign is a warning about missing keys. Other classes whose layouts differ (ViT) fare likewise.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0

cd "$folder"
"$folder/env/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16), generator=generator)]
sizes = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4,
)


def trainer(**options):
    torch.manual_seed(0)
    args = TrainingArguments(
        "out", learning_rate=1e-2, max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, disable_tqdm=True, **options,
    )
    made = Trainer(MixtralForCausalLM(MixtralConfig(**sizes)), args, train_dataset=data, eval_dataset=data)
    made.log = lambda *rest: None
    return made


def different(a, b):
    names = (name for name in a if not torch.equal(a[name], b[name]))
    return sorted({"mixture" if ".mlp." in name else "others" for name in names})


whole = trainer()
start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
whole.train()
saved = dict(MixtralForCausalLM.from_pretrained("out/checkpoint-2").named_parameters())
print("saved after 2 steps, moved since the start:", different(saved, start))

resumed = trainer()
resumed._load_from_checkpoint("out/checkpoint-2")  # what `train(resume_from_checkpoint=...)` calls
loaded = dict(resumed.model.named_parameters())
left = [name for name in loaded if torch.equal(loaded[name], start[name])]
print("after Trainer's loading, not as saved:", different(loaded, saved), "\n  as at the start:", left)
resumed = trainer()
resumed.train(resume_from_checkpoint="out/checkpoint-2")
ends = [dict(each.model.named_parameters()) for each in (resumed, whole)]
print("at the end, not as in the whole run:", different(*ends))

best = trainer(  # the larger loss is the better one here, so that it is not the last step's
    eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
    greater_is_better=True,
)
best.train()
path = best.state.best_model_checkpoint
reference = dict(MixtralForCausalLM.from_pretrained(path).named_parameters())
mixed = different(dict(best.model.named_parameters()), reference)
print(f"load_best_model_at_end: best is {path[-12:]}, loaded otherwise: {mixed}")

assert different(saved, start) == ["mixture", "others"]
assert {name.rpartition("mlp.")[2] for name in left} == {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}, (
    "the mixture is loaded now: the finding no longer holds"
)
assert path.endswith("checkpoint-2") and "mixture" in mixed, "the best model's mixture is loaded now"
PYTHON
