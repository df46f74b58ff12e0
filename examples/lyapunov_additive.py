"""The additive operator of the paper's section 4.3, P X + X Q: which the optimizer does not offer.

    up(X)   = P X + X Q
    down(G) = Pᵀ G + G Qᵀ

It saves no memory: X, and so every moment, is as large as the weight, and P (m, m) and Q (n, n) come on top. What it
shows is that the theorem needs an adjoint pair and nothing else. Letters and shapes otherwise as in
`hf_osd.subspace.operators`.
"""

from torch import Tensor


class Additive:
    """The adjoint pair of P X + X Q, with P (m, m), Q (n, n) and full-size X (m, n).

    A step of gradient descent with it is G -> P (PᵀG + G Qᵀ) + (PᵀG + G Qᵀ) Q.

    Example:
    ```python
    >>> import torch
    >>> from lyapunov_additive import Additive

    >>> P, Q, G = torch.randn(4, 4), torch.randn(6, 6), torch.randn(4, 6)
    >>> X = Additive.down(G, P, Q)  # (4, 6), no smaller than G
    >>> update = Additive.up(X, P, Q)  # (4, 6)
    ```
    """

    @staticmethod
    def down(
        G: Tensor,  # (m, n) gradient, not modified
        P: Tensor,  # (m, m)
        Q: Tensor,  # (n, n)
    ) -> Tensor:
        """Pᵀ G + G Qᵀ (m, n): the adjoint of `up`, <down(G), X> = <G, up(X)>."""
        return P.mT @ G + G @ Q.mT

    @staticmethod
    def up(
        X: Tensor,  # (m, n) direction, not modified
        P: Tensor,  # (m, m)
        Q: Tensor,  # (n, n)
    ) -> Tensor:
        """P X + X Q (m, n)."""
        return P @ X + X @ Q
