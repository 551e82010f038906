"""The local mixture of experts that a client trains (paper, Section III), and its gate.

    R = a_G * P(G(x; theta)) + a_F * extractor_k(x),   [a_G, a_F] = H(x; phi_k),   y = header_k(R)

    paper      here
    G, theta   ``shared``, the only part that leaves the device
    F_k        ``own``: ``own.extractor`` and ``own.header``
    H, phi_k   ``gate``
    R          `LocalMixture.mix`

The gate, H:

    x -> flatten -> norm -> Linear(in, m) -> BatchNorm -> Sigmoid -> Linear(m, 2) -> BatchNorm -> Softmax -> [a_G, a_F]

BatchNorm comes before the softmax; after it, the two weights would not sum to 1. ``norm`` is SwitchNorm (Luo et al.,
arXiv 1806.10779): means and variances of the example and of the batch, mixed by learned weights. With ``kind="layer"``
all normalisation is over single examples, which also works for batches of one.

Departs from the paper
    * P is a linear map of the client's own if the widths of the two extractors differ, otherwise the identity. The
      paper requires equal widths.
    * For next-token prediction the gate weighs each token by the text up to it; weights of the whole text would reveal
      later tokens.
    * Every gate starts with equal weights for all examples: the last scale is zero. With the usual scale of one, the
      last BatchNorm of an untrained gate spreads the weights over 0.1 to 0.9 at random, and the other parts train on
      that: on CIFAR-10 with ten clients of two classes each, accuracy after 16 rounds was 73 % instead of 77 %.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgefed.personal.extractors import SharedExtractor
from edgefed.personal.networks import PersonalModel
from edgefed.personal.samples import Batch

GATE_NORMS = ("switch", "layer")


class SwitchNorm(nn.Module):
    """SwitchNorm of flat examples (B, F): a mixture of statistics over F (layer) and over B (batch).

    In evaluation mode, the statistics of the batch are running means.
    """

    running_mean: Tensor
    running_var: Tensor

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
        """Normalised examples (B, F). Raises ValueError for a single example in training mode."""
        layer_var, layer_mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)  # (B, 1)
        if self.training:
            if len(x) < 2:
                raise ValueError("SwitchNorm needs at least two examples per batch in training")
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
    """(B, in) flat inputs -> (B, 2) weights [a_G, a_F] that sum to 1. ``width`` is m of the paper, 64 or 128."""

    def __init__(self, in_features: int, width: int = 64, kind: str = "switch"):
        super().__init__()
        if kind not in GATE_NORMS:
            raise ValueError(f"invalid gate norm {kind!r}, must be one of {', '.join(GATE_NORMS)}")
        batch = kind == "switch"
        self.norm = SwitchNorm(in_features) if batch else nn.LayerNorm(in_features)
        self.hidden = nn.Linear(in_features, width)
        self.hidden_norm = nn.BatchNorm1d(width) if batch else nn.LayerNorm(width)
        self.out = nn.Linear(width, 2)
        # LayerNorm over two numbers always gives +1 and -1, so without a batch the logits are not normalised.
        self.out_norm = nn.BatchNorm1d(2) if batch else nn.Identity()
        last = self.out_norm if isinstance(self.out_norm, nn.BatchNorm1d) else self.out
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Weights [a_G, a_F] of each example."""
        hidden = torch.sigmoid(self.hidden_norm(self.hidden(self.norm(x))))
        logits: Tensor = self.out_norm(self.out(hidden))
        return logits.softmax(-1)


class FixedGate(nn.Module):
    """The same weights for every example: (.5, .5) static mixing, (1, 0) the shared model, (0, 1) standalone."""

    def __init__(self, shared_weight: float):
        super().__init__()
        self.shared_weight = shared_weight

    def forward(self, x: Tensor) -> Tensor:
        """The weights, once per example."""
        pair = torch.tensor([self.shared_weight, 1 - self.shared_weight], dtype=x.dtype, device=x.device)
        return pair.expand(len(x), 2)


class LocalMixture(nn.Module):
    """One client's mixture. ``gate``: `Gate` or `FixedGate`."""

    def __init__(self, shared: SharedExtractor, own: PersonalModel, gate: nn.Module):
        super().__init__()
        self.shared = shared
        self.own = own
        self.gate = gate
        same = shared.width == own.width
        self.projection: nn.Module = nn.Identity() if same else nn.Linear(shared.width, own.width)

    def weights(self, batch: Batch) -> Tensor:
        """[a_G, a_F] of each example, (B, 2), or of each token, (B, T, 2); rows sum to 1."""
        inputs = self.shared.gate_features(batch.shared)
        weights: Tensor = self.gate(inputs.flatten(0, -2)).view(*inputs.shape[:-1], 2)
        return weights

    def expert_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P(G(x)), F(x)), each (B, width) or (B, T, width)."""
        shared = self.projection(self.shared(batch.shared))
        own = self.own.extractor(batch.own)
        return shared.to(own.dtype), own

    def mix(self, shared: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        """R, in the shape of the features."""
        a = weights.to(own.dtype)
        while a.dim() < own.dim():
            a = a.unsqueeze(-2)
        return a[..., :1] * shared + a[..., 1:] * own

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits (B, classes) or (B, T, classes), weights (B, 2) or (B, T, 2))."""
        weights = self.weights(batch)
        return self.own.header(self.mix(*self.expert_features(batch), weights)), weights

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by learning rate: "extractor" (theta), "model" (F_k and P), "gate"."""
        parts = {
            "extractor": self.shared.parameters(),
            "model": [*self.own.parameters(), *self.projection.parameters()],
            "gate": self.gate.parameters(),
        }
        return {name: [p for p in values if p.requires_grad] for name, values in parts.items()}


class Alone(nn.Module):
    """A client's own model, with the outputs of a mixture with a_F = 1."""

    def __init__(self, own: PersonalModel):
        super().__init__()
        self.own = own

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(logits, weights) as of `LocalMixture`."""
        logits = self.own(batch.own)
        return logits, own_only(logits)


def own_only(logits: Tensor) -> Tensor:
    """The weights (B, 2) of answers (B, ...) that the own model gives alone."""
    return torch.tensor([0.0, 1.0], device=logits.device).expand(len(logits), 2)
