#!/usr/bin/env bash
# transformers 5.24.0, `optim="galore_adamw_layerwise"` or `"apollo_adamw_layerwise"`: neither schedule nor clipping acts.
#
# The log shows a learning rate that falls as `lr_scheduler_type` says, but every weight is stepped at the full
# `learning_rate` until the end: a run with a linear schedule and one with a constant rate give the same weights bit for
# bit. (The schedule is made when accelerate has wrapped the optimizer, and a layerwise one is not recognised in there: a
# placeholder is scheduled.) Nor does `max_grad_norm` do anything, for the gradients are gone when the Trainer clips; it
# logs their norm as 0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 galore-torch==1.0 \
    apollo-torch==1.0.3

cd "$folder"
"$folder/env/bin/python" - <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
generator = torch.Generator().manual_seed(0)
data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16), generator=generator)]
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


def train(optim, **options):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    if optim != "adamw_torch":
        options |= dict(optim_target_modules=["attn", "mlp"], optim_args="rank=8")
    args = TrainingArguments(
        "out", optim=optim, learning_rate=1e-2, max_steps=8, per_device_train_batch_size=4, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )
    trainer = Trainer(model, args, train_dataset=data)
    trainer.log = lambda logs, *rest: trainer.state.log_history.append(logs)
    trainer.train()
    steps = [logs for logs in trainer.state.log_history if "learning_rate" in logs]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), steps


for optim in ("adamw_torch", "galore_adamw_layerwise", "apollo_adamw_layerwise"):
    linear, steps = train(optim, lr_scheduler_type="linear")
    constant, _ = train(optim, lr_scheduler_type="constant")
    clipped, _ = train(optim, lr_scheduler_type="linear", max_grad_norm=1e-9)
    print(f"\n{optim}: logged learning rates from {steps[0]['learning_rate']} to {steps[-1]['learning_rate']}")
    print(f"  logged gradient norms {sorted({round(float(logs['grad_norm']), 2) for logs in steps})[:3]} ...")
    by_schedule, by_clipping = (linear - constant).abs().max(), (linear - clipped).abs().max()
    print(f"  largest difference of a weight: {by_schedule:.1e} by the schedule, {by_clipping:.1e} by clipping at 1e-9")
    assert steps[-1]["learning_rate"] < steps[0]["learning_rate"] / 2
    if optim == "adamw_torch":
        assert by_schedule > 1e-3 and by_clipping > 1e-3 and all(logs["grad_norm"] > 0 for logs in steps)
    else:
        assert by_schedule == 0 and by_clipping == 0, "one of them acts now: the finding no longer holds"
        assert all(logs["grad_norm"] == 0 for logs in steps)
PYTHON
