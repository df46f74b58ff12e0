#!/usr/bin/env bash
# torch 2.13.0: under `torch.autocast`, freezing a weight makes it be cast anew every time it is used.
#
# Autocast keeps the low-precision copies of weights until its context ends, but only of those with `requires_grad`. So
# a model that is frozen for inference, or the frozen part of one that is fine-tuned, casts every weight again in each
# forward pass of one context (each token of a generation), and each use of layers that share a weight. The same model
# not frozen casts each weight once, under `torch.no_grad()` as well.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy

"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode

print("torch", torch.__version__)
FORWARDS = 20


class Casts(TorchDispatchMode):
    """Counts the copies of float32 matrices in another dtype."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32 and args[0].ndim == 2:
            self.count += 1
        return function(*args, **(kwargs or {}))


def casts(frozen):
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(3))).requires_grad_(not frozen)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Casts() as counted:
        for _ in range(FORWARDS):
            layers(x)
    return counted.count


for frozen in (False, True):
    print(f"3 linear layers, {FORWARDS} forward passes in one context, {'' if frozen else 'not '}frozen: {casts(frozen)} casts")
assert casts(frozen=False) == 3
assert casts(frozen=True) == 3 * FORWARDS, "frozen weights are kept now: the finding no longer holds"
PYTHON
