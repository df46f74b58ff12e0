#!/usr/bin/env bash
# transformers 5.24.0, `optim="adafactor"` and bfloat16 weights: a resumed run has its second moments in bfloat16.
#
# Adafactor keeps the moments of bfloat16 weights in float32, and the checkpoint has them so. But torch's
# `Optimizer.load_state_dict` casts each floating-point entry of a state, but for `step`, to the dtype of its weight: what
# comes back is rounded to 8 bits, and the resumed run, on the same batches, is not the one that was not interrupted. The
# files are right and nothing is told; every optimizer that keeps its state in another dtype than the weights' and leaves
# loading to torch has it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0

cd "$folder"
"$folder/env/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16), generator=generator)]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


class First(TrainerCallback):
    """Keeps the moments that training begins with."""

    def __init__(self, key):
        self.key = key

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **rest):
        weight = model.model.layers[0].self_attn.q_proj.weight
        self.found = optimizer.state[weight][self.key].clone() if optimizer.state else None


def train(dtype, optim, key, resume=None):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    first = First(key)
    args = TrainingArguments(
        "out", optim=optim, learning_rate=1e-2, max_steps=8, per_device_train_batch_size=4, save_steps=4, report_to=[],
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", logging_steps=100,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[first])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]), first


for dtype, optim, key in (
    (torch.float32, "adafactor", "exp_avg_sq_row"),
    (torch.bfloat16, "adamw_torch", "exp_avg_sq"),
    (torch.bfloat16, "adafactor", "exp_avg_sq_row"),
):
    whole, _ = train(dtype, optim, key)
    resumed, first = train(dtype, optim, key, resume="out/checkpoint-4")
    states = torch.load("out/checkpoint-4/optimizer.pt")["state"].values()
    (saved,) = {state[key].dtype for state in states if key in state}
    differ = (whole != resumed).float().mean()
    print(f"{optim}, weights in {dtype}: second moments saved in {saved}, after the resume in {first.found.dtype}; "
          f"{differ:.0%} of the weights differ from those of the run that was not interrupted")
    if (dtype, optim) == (torch.bfloat16, "adafactor"):
        assert saved == torch.float32
        assert first.found.dtype == torch.bfloat16, "moments come back as they were: the finding no longer holds"
        assert differ > 0
    else:
        assert saved == first.found.dtype == dtype and differ == 0
PYTHON
