#!/usr/bin/env bash
# transformers 5.24.0: a resumed Trainer ignores another `learning_rate` and `weight_decay`, but follows `max_steps`.
#
# The checkpoint's schedule has the learning rates that it began with, and the optimizer's groups have their weight
# decay: both come back over what the arguments say, without a word. The shape of the schedule is not saved. So whoever
# resumes with a tenth of the learning rate and twice the steps goes on at the old rate, drawn out over the new length,
# with a jump at the point where it goes on.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0

cd "$folder"
"$folder/env/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (64, 16), generator=generator)]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


def train(resume=None, **options):
    torch.manual_seed(0)
    args = TrainingArguments(
        "out", per_device_train_batch_size=4, save_steps=4, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="linear", **options,
    )
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(**sizes)), args, train_dataset=data)
    trainer.log = lambda logs, *rest: trainer.state.log_history.append(logs)
    trainer.train(resume_from_checkpoint=resume)
    rates = [logs["learning_rate"] for logs in trainer.state.log_history if "learning_rate" in logs]
    return rates, trainer.optimizer.param_groups[0]["weight_decay"]


before, _ = train(max_steps=8, learning_rate=1e-2, weight_decay=0.1)
same, _ = train(resume="out/checkpoint-4", max_steps=8, learning_rate=1e-3, weight_decay=0.5)
longer, decay = train(resume="out/checkpoint-4", max_steps=16, learning_rate=1e-3, weight_decay=0.5)
for name, rates in (("first run, 0.01", before), ("resumed, 0.001", same), ("resumed, 0.001, twice the steps", longer)):
    print(f"{name}: learning rate of the 4th step {rates[3]:.5f}, of the 6th {rates[5]:.5f}")
print(f"weight_decay=0.5 was asked for, {decay} is used")
assert same[4:8] == before[4:8], "the learning rate is followed now: the finding no longer holds"
assert decay == 0.1, "weight decay is followed now"
assert abs(longer[5] - 1e-2 * (1 - 5 / 16)) < 1e-9, "the old rate is no longer drawn out over the new length"
PYTHON
