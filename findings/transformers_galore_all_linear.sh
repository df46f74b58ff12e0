#!/usr/bin/env bash
# transformers 5.24.0, GaLore and APOLLO: `optim_target_modules="all-linear"` leaves GPT-2 and mixtures of experts alone.
#
# What it takes are modules of the class `nn.Linear`. GPT-2's layers are of transformers' own `Conv1D`, and since
# transformers 5 the experts of a mixture are stacked in parameters of three dimensions. So the first trains by plain
# AdamW, with two full-size moments for every weight, and the second keeps the moments of all experts, most of the model.
# Neither is refused nor told of. On the other hand the output layer is projected where it is a weight of its own, which
# peft's "all-linear" leaves out.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 galore-torch==1.0 \
    apollo-torch==1.0.3

cd "$folder"
"$folder/env/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import logging

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import MixtralConfig, MixtralForCausalLM, PrinterCallback, Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.set_num_threads(1)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (8, 16))]
ids = dict(vocab_size=64, bos_token_id=1, eos_token_id=2)
sizes = ids | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
models = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=32, **ids)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **sizes)),
}


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.of_targets = []

    def emit(self, record):
        if "target" in record.getMessage() or "linear" in record.getMessage().lower():
            self.of_targets.append(record.getMessage())


for optim in ("galore_adamw", "apollo_adamw"):
    for name, make in models.items():
        told, model = Warnings(), make()
        logging.getLogger("transformers").addHandler(told)
        args = TrainingArguments(
            "out", optim=optim, optim_target_modules="all-linear", optim_args="rank=4", max_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logging.getLogger("transformers").removeHandler(told)
        groups = trainer.optimizer.optimizer.param_groups
        taken = {id(p) for group in groups if "rank" in group for p in group["params"]}
        projected = {name: p for name, p in model.named_parameters() if id(p) in taken}
        share = sum(p.numel() for p in projected.values()) / model.num_parameters()
        print(f"{optim}, {name}: {len(projected)} weights are projected, {share:.0%} of the model; output layer: "
              f"{'lm_head.weight' in projected}; warnings: {told.of_targets}")
        assert told.of_targets == [], "it is told of now: the finding no longer holds"
        if name == "llama":
            assert len(projected) == 15 and "lm_head.weight" in projected
        elif name == "gpt2":
            assert not projected, "Conv1D is projected now: the finding no longer holds"
        else:
            assert share < 0.25 and not any("experts" in one for one in projected), "experts are projected now"
PYTHON
