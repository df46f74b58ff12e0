"""How P_k is drawn: from a seed, the number k of the interval and the number of the matrix, and from nothing else.

Letters: P (n, r) the projection on the input side of a weight W (m, n), n its `in_features`; r the rank.
"""

import hashlib

import torch
from torch import Tensor


SAMPLINGS = ("gaussian", "orthonormal")


def sample(
    shape: tuple[int, int],  # (n, r)
    sampling: str,
    seed: int,
    interval: int,  # k
    matrix: int,  # position of the weight among the targeted ones
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """P_k (n, r) with E[P Pᵀ] = I.

    `gaussian`: entries N(0, 1/r), as in arXiv 2502.07222. `orthonormal`: sqrt(n / r) Q with Q from the QR
    decomposition of a Gaussian matrix, so that Q Qᵀ projects onto a subspace of uniform distribution and PᵀP = (n/r) I
    in every draw; the QR costs n r² per matrix. Entries have variance 1/r in both, so a step of size lr in every entry
    of B moves the entries of W by lr in root mean square, as Adam at full size would.

    The numbers are drawn on the CPU: they are the same on every device and process.
    """
    n, r = shape
    digest = hashlib.sha256(f"{seed}/{interval}/{matrix}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    X = torch.randn(n, r, generator=generator, dtype=precise, device="cpu").to(device)
    if sampling == "gaussian":
        return (X / r**0.5).to(dtype)
    return (torch.linalg.qr(X).Q * (n / r) ** 0.5).to(dtype)
