"""Columns of G that R comes with, from which a residual is made where there is no G.

The gradient of some of a weight's columns needs as many entries of the inputs. With x_S = x[:, S], S every k-th entry
from another one on at each step, the layers make

    [R  G_S] = dYᵀ [x P  x_S]                    of a layer that stores Wᵀ, of its rows: [x P  x_S]ᵀ dY

in the place of R = dYᵀ (x P). It goes wherever R goes: it adds up, is clipped, exchanged, and stepped with.
"""

import torch.nn.functional as F
from torch import Tensor


def columns_at_once(n: int, k: int) -> int:
    """The most that are in S, for which there is room beside R."""
    return -(-n // min(k, n))


def columns(n: int, k: int, turn: int) -> slice:
    """S, of a turn, which counts on and on: each column has its own once in k of them."""
    k = min(k, n)
    return slice(turn % k, n, k)


def filled(part: Tensor, n: int, k: int, dim: int) -> Tensor:
    """Those of a matrix, with zeros where there is more room along `dim`."""
    missing = columns_at_once(n, k) - part.shape[dim]
    return F.pad(part, (0, missing) if dim else (0, 0, 0, missing)) if missing else part
