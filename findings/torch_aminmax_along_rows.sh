#!/usr/bin/env bash
# torch 2.13.0 on a CPU: the largest and smallest entry of each row from one call take ten times as long as from two.
#
# `torch.aminmax(X, dim=1)` reads X once where `X.amax(1)` and `X.amin(1)` read it twice, so it looks like the faster way
# to the range of each row, as quantisers need it. But its kernel along a dimension is not vectorised, and theirs are.
# The largest size, `torch.linalg.vector_norm(X, inf, dim=1)`, which makes no temporary, loses in the same way to
# `X.abs().amax(1)`, which makes one as large as X. Over all entries at once `torch.aminmax(X)` is fast.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy

"$folder/env/bin/python" - <<'PYTHON'
import time

import torch

print("torch", torch.__version__)
torch.set_num_threads(1)
X = torch.randn(1024, 1024)


def fastest(call):
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


both, one_each = fastest(lambda: torch.aminmax(X, dim=1)), fastest(lambda: (X.amax(1), X.amin(1)))
norm, size = fastest(lambda: torch.linalg.vector_norm(X, float("inf"), dim=1)), fastest(lambda: X.abs().amax(1))
print(f"rows of (1024, 1024): aminmax {both:.2f} ms, amax and amin {one_each:.2f} ms, all entries at once {fastest(X.aminmax):.2f} ms")
print(f"rows of (1024, 1024): vector_norm of order inf {norm:.2f} ms, abs and amax {size:.2f} ms")
assert both > 3 * one_each and norm > 3 * size, "one call is no longer slower: the finding no longer holds"
PYTHON
