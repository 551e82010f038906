"""The gate of the local mixture: how much of the shared and of the own extractor each example gets (Section III).

    x -> flatten -> norm -> Linear(in, m) -> BatchNorm -> Sigmoid -> Linear(m, 2) -> BatchNorm -> Softmax -> [a_G, a_F]

BatchNorm stands before the softmax: after it the two weights would not sum to 1. ``norm`` is SwitchNorm (Luo et al.,
arXiv 1806.10779): means and variances of the example and of the batch, mixed by learned weights. With ``kind="layer"``
every normalisation is over the example alone, which also works for batches of one.

Ours: every gate begins at half and half for all examples (the last scale is zero) and learns to depart. With the usual
scale of one, the last BatchNorm spreads the weights of a gate that knows nothing over 0.1 to 0.9 at random, and what
follows learns from that: on CIFAR-10, ten clients with two classes each, 16 rounds, accuracy was 73 % instead of 77 %.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GATE_NORMS = ("switch", "layer")


class SwitchNorm(nn.Module):
    """SwitchNorm of flat examples (B, F): statistics over F (layer) and over B (batch), mixed.

    At evaluation the batch's statistics are running means. Raises ValueError when it trains on one example.
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.mean_mix = nn.Parameter(torch.ones(2))
        self.var_mix = nn.Parameter(torch.ones(2))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor) -> Tensor:
        layer_var, layer_mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)  # (B, 1)
        if self.training:
            if len(x) < 2:
                raise ValueError("SwitchNorm needs at least two examples in a batch to train")
            batch_var, batch_mean = torch.var_mean(x, dim=0, correction=0)  # (F,)
            with torch.no_grad():
                self.running_mean.lerp_(batch_mean, self.momentum)
                self.running_var.lerp_(batch_var * (len(x) / (len(x) - 1)), self.momentum)
        else:
            batch_mean, batch_var = self.running_mean, self.running_var
        of_mean, of_var = self.mean_mix.softmax(0), self.var_mix.softmax(0)
        mean = of_mean[0] * layer_mean + of_mean[1] * batch_mean
        var = of_var[0] * layer_var + of_var[1] * batch_var
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


class Gate(nn.Module):
    """(B, in) flat raw inputs -> (B, 2) weights [a_G, a_F] that sum to 1. ``width``: m of the paper, 64 or 128."""

    def __init__(self, in_features: int, width: int = 64, kind: str = "switch"):
        super().__init__()
        if kind not in GATE_NORMS:
            raise ValueError(f"gate norm {kind!r}, known are {', '.join(GATE_NORMS)}")
        batch = kind == "switch"
        self.norm = SwitchNorm(in_features) if batch else nn.LayerNorm(in_features)
        self.hidden = nn.Linear(in_features, width)
        self.hidden_norm = nn.BatchNorm1d(width) if batch else nn.LayerNorm(width)
        self.out = nn.Linear(width, 2)
        # Two numbers normalised by themselves are always +1 and -1: without a batch the logits stay as they are.
        self.out_norm = nn.BatchNorm1d(2) if batch else nn.Identity()
        nn.init.zeros_(self.out_norm.weight if batch else self.out.weight)
        nn.init.zeros_(self.out_norm.bias if batch else self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.hidden_norm(self.hidden(self.norm(x))))
        return self.out_norm(self.out(hidden)).softmax(-1)


class FixedGate(nn.Module):
    """The same weights for every example: (.5, .5) is static mixing, (1, 0) the shared model, (0, 1) standalone."""

    def __init__(self, shared_weight: float):
        super().__init__()
        self.shared_weight = shared_weight

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.tensor([self.shared_weight, 1 - self.shared_weight], dtype=x.dtype, device=x.device)
        return pair.expand(len(x), 2)
