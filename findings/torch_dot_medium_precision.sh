#!/usr/bin/env bash
# torch 2.13.0 on a CPU with AVX512-BF16: `set_float32_matmul_precision("medium")` makes `torch.dot` many times slower.
#
# The setting is there to make matrix products faster, and on such processors it does, twice. But a dot product of two
# float32 vectors is handed to oneDNN as well then, as a product of a row and a column, for which it has no fast kernel.
# Whoever sums squares by a dot product, as optimizers and gradient clipping do, loses there what the products win.
set -euo pipefail

if ! grep -qm1 avx512_bf16 /proc/cpuinfo; then
    echo "This processor has no AVX512-BF16: torch changes no kernel here."
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy

"$folder/env/bin/python" - <<'PYTHON'
import time

import torch

print("torch", torch.__version__)
torch.set_num_threads(1)
X, P, x = torch.randn(1024, 1024), torch.randn(1024, 128), torch.randn(1 << 20)


def fastest(call):
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


seconds = {}
for precision in ("highest", "medium"):
    torch.set_float32_matmul_precision(precision)
    seconds[precision] = fastest(lambda: X @ P), fastest(lambda: torch.dot(x, x))
(product, dot), (product_medium, dot_medium) = seconds.values()
print(f"a product (1024, 1024) x (1024, 128): {1e3 * product:.2f} ms, at medium {1e3 * product_medium:.2f} ms")
print(f"a dot product of 2**20 numbers:       {1e3 * dot:.2f} ms, at medium {1e3 * dot_medium:.2f} ms")
assert dot_medium > 3 * dot, "the dot product is no longer slower: the finding no longer holds"
PYTHON
