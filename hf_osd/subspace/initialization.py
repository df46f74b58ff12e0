"""Ways to start P: top singular vectors of a gradient ("proper initialization" in the paper), or orthonormal columns.

Letters and shapes as in `operators`; X is G on the left side and Gᵀ on the right, so that P spans columns of X.
"""

import torch
from torch import Tensor

from .precision import reduced_precision


INITS = ("auto", "svd", "randomized_svd", "orthonormal")

OVERSAMPLING = (
    16  # extra columns of the sketch; Halko et al. 2011 (arXiv 0909.4061), section 4.4, suggest 5 to 10 or r
)
POWER_ITERATIONS = 2  # Halko et al., section 4.5: enough for slowly decaying spectra such as gradients have
EXACT_UP_TO = 512  # an exact SVD below this size costs milliseconds; measured in examples/benchmarks


def choose_init(m: int, n: int, rank: int, init: str = "auto") -> str:
    """How P starts for a weight (m, n): the only place that decides it.

    `"auto"` is the exact SVD where it is cheap (min(m, n) <= 512) or where the sketch would not be smaller than the
    matrix, and the randomized SVD elsewhere, so that the first step of a 7B model does not stall.
    """
    if init != "auto":
        return init
    size = min(m, n)
    return "svd" if size <= EXACT_UP_TO or 2 * (rank + OVERSAMPLING) > size else "randomized_svd"


def initial_projection(
    G: Tensor,  # (m, n) gradient, finite, not modified
    side: str,
    rank: int,
    init: str,
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """P_0, (m, r) on the left side and (n, r) on the right, orthonormal columns, in `dtype`, on G's device.

    Args:
        G (`torch.Tensor`): Gradient (m, n). `"orthonormal"` uses its shape and device only.
        side (`str`): `"left"` or `"right"`.
        rank (`int`): r, at most min(m, n).
        init (`str`): `"svd"`, `"randomized_svd"` or `"orthonormal"`, as `choose_init` answers.
        seed (`int`): Seed of the two random ways. The same seed gives the same P on every process and device.
        dtype (`torch.dtype`): Precision of the computation and of P.
    """
    X = G if side == "left" else G.mT
    if init == "svd":
        U, _, Vh = torch.linalg.svd(G.to(dtype), full_matrices=False)
        return (U[:, :rank] if side == "left" else Vh[:rank].mT).contiguous()
    if init == "randomized_svd":
        return randomized_svd(X.to(dtype), rank, seed)[0]
    return torch.linalg.qr(gaussian(X.shape[0], rank, seed, X.device, dtype)).Q.contiguous()


def singular_vectors(X: Tensor, sketched: int, init: str, seed: int) -> tuple[Tensor, Tensor]:
    """Left singular vectors of X (s, l) and their singular values, descending.

    All of them, min(s, l), from the exact SVD; the top `sketched` with `init="randomized_svd"`.
    """
    if init == "randomized_svd":
        return randomized_svd(X, sketched, seed)
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    return U, S


def randomized_svd(X: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Approximate top-r left singular vectors (s, r) and values (r,) of X (s, l), by subspace iteration.

    Halko et al. 2011 (arXiv 0909.4061), algorithm 4.4.

    Equal to `torch.svd_lowrank` in method; drawn from a generator of its own, so that it neither depends on nor
    disturbs the global random state (which differs between data-parallel processes), and without the SVD of an
    (r, l) matrix.
    """
    q = min(rank + OVERSAMPLING, *X.shape)
    with reduced_precision(X):  # a sketch is random anyway
        Y = X @ gaussian(X.shape[1], q, seed, X.device, X.dtype)
        for _ in range(POWER_ITERATIONS):
            Y = X @ (X.mT @ _roughly_orthonormal(Y))
        Q = torch.linalg.qr(Y).Q
        B = Q.mT @ X
    eigenvalues, eigenvectors = torch.linalg.eigh(B @ B.mT)  # ascending
    return (Q @ eigenvectors[:, -rank:].flip(-1)).contiguous(), eigenvalues[-rank:].flip(-1).clamp(min=0).sqrt()


def _roughly_orthonormal(Y: Tensor) -> Tensor:
    """Columns that span those of Y, of about the same length: Cholesky QR, several times faster than Householder's.

    The shift keeps it from failing; directions a thousand times weaker than the strongest come out short.
    """
    # in float64: rounding must not make K indefinite
    K = Y.mT.double() @ Y.double()
    K.diagonal().add_(1e-6 * K.trace())
    L = torch.linalg.cholesky_ex(K).L.to(Y.dtype)
    return torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)


def gaussian(rows: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, the same on every device."""
    # Drawn on the CPU: generators of different devices give different numbers for one seed.
    generator = torch.Generator("cpu").manual_seed(seed)  # whatever torch.set_default_device says
    return torch.randn(rows, columns, generator=generator, dtype=dtype, device="cpu").to(device)
