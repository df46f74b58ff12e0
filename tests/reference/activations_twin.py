"""A readable twin of `source="activations"`: gradients by autograd, P learned from recorded inputs.

Independent of the package, and of its layers: it trains a plain net.
"""

import torch

from .twin import adamw, autograd, pca_loss


class ActivationsTwin:
    """Algorithm 1 on the side of the inputs, with the inputs in the place of the gradient in Eq. 6.

    Args:
        net (`nn.Module`): A plain net.
        shared (`list[list[str]]`): Names of the modules that are given one tensor, the first of which says P's seed.
        sketches (`dict[str, Tensor]`): Ω of each of these lists, by the first name.
        transposed (`set[str]`): Modules that store their weight as (in, out).
        scale (`float` or `"auto"`): As the option.
        signs (`float`, *optional*): The residual's scale, `None` for none, of one column in `sample` at a step.
    """

    def __init__(
        self,
        net,
        shared,
        sketches,
        transposed=(),
        lr=1e-2,
        alpha=5.0,
        lambda_=0.1,
        every=4,
        scale=1.0,
        signs=None,
        sample=8,
    ):
        self.net, self.shared, self.P = net, shared, dict(sketches)
        self.transposed, self.lr, self.alpha, self.lambda_ = transposed, lr, alpha, lambda_
        self.every, self.scale, self.started, self.steps = every, scale, False, 0
        self.states, self.inputs, self.signs, self.sample = {}, {}, signs, sample
        for group in shared:
            module = net.get_submodule(group[0])
            module.register_forward_pre_hook(lambda module, args, name=group[0]: self.record(name, args[0]))

    def record(self, name, x):
        self.inputs.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]))

    def residual(self, G, P):
        """Signs of every k-th column of the rest of G, from another one on at each step."""
        S = torch.zeros_like(G)
        if self.signs is not None:
            k = min(self.sample, G.shape[1])
            chosen = range((self.steps - 1) % k, G.shape[1], k)
            S[:, chosen] = self.signs * k**0.5 * torch.sign((G - G @ P @ P.T)[:, chosen])
        return S

    def step(self):
        turn = (self.steps - 1) % self.every if self.started else 0
        stepped = set()
        for group in self.shared:
            P = self.P[group[0]]
            for name in group:
                module = self.net.get_submodule(name)
                stepped.add(module.weight)
                if self.started:
                    G = module.weight.grad.T if name in self.transposed else module.weight.grad
                    D = adamw(self.states.setdefault(name, {}), G @ P)
                    inside, outside = self.scale, self.scale
                    if self.scale == "auto":
                        inside, outside = (len(P) / P.shape[1]) ** 0.5, 1.0
                    dW = -self.lr * (inside * D @ P.T + outside * self.residual(G, P))
                    module.weight.data += dW.T if name in self.transposed else dW
        for name, p in self.net.named_parameters():
            if p not in stepped:
                p.data -= self.lr * adamw(self.states.setdefault(name, {}), p.grad)
        for group in self.shared:
            X = torch.cat([x[turn :: self.every] for x in self.inputs[group[0]]]).T
            P = self.P[group[0]]
            if not self.started:
                P = torch.linalg.qr(X @ (X.T @ P)).Q
            else:
                gP = autograd(pca_loss, P, X, self.lambda_)
                P = P - self.alpha * self.lr * adamw(self.states.setdefault("P of " + group[0], {}), gP)
            self.P[group[0]] = P
        self.inputs.clear()
        self.net.zero_grad()
        self.started = True
        self.steps += 1
