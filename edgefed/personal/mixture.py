"""The local mixture of experts that a client trains (paper, Section III).

    R = a_G * P(G(x; theta)) + a_F * extractor_k(x),   [a_G, a_F] = H(x; phi_k),   y = header_k(R)

    paper      here
    G, theta   ``shared``, the only part that leaves the device
    F_k        ``own``: ``own.extractor`` and ``own.header``
    H, phi_k   ``gate``
    R          `LocalMixture.mix`

Ours: P, a linear map of the client's own, where the widths of the two extractors differ (the paper wants equal ones);
it is the identity where they are equal. And for next-token prediction the gate weighs each token, by the text up to it:
weights of the whole text would tell what comes next.
"""

from __future__ import annotations

from torch import Tensor, nn

from edgefed.personal.batches import Batch
from edgefed.personal.extractors import SharedExtractor
from edgefed.personal.networks import PersonalModel


class LocalMixture(nn.Module):
    """One client's mixture. ``gate``: `Gate` or `FixedGate`."""

    def __init__(self, shared: SharedExtractor, own: PersonalModel, gate: nn.Module):
        super().__init__()
        self.shared = shared
        self.own = own
        self.gate = gate
        same = shared.width == own.width
        self.projection = nn.Identity() if same else nn.Linear(shared.width, own.width)

    def weights(self, batch: Batch) -> Tensor:
        """[a_G, a_F] of each example, (B, 2), or of each token, (B, T, 2); rows sum to 1."""
        seen = self.shared.gate_features(batch.shared)
        return self.gate(seen.flatten(0, -2)).view(*seen.shape[:-1], 2)

    def expert_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P(G(x)), F(x)), each (B, width) or (B, T, width)."""
        shared = self.projection(self.shared(batch.shared))
        own = self.own.extractor(batch.own)
        return shared.to(own.dtype), own

    def mix(self, shared: Tensor, own: Tensor, weights: Tensor) -> Tensor:
        """R, shaped as the features."""
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
