"""Clipping and AdamW for a model whose experts are offloaded: one tensor after the other, each released behind it.

Both compute what torch computes; only the order in which memory is touched differs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

from edgefed.moe.offloading import offloaded, release


def is_offloaded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of ``parameters`` is of an `edgefed.moe.offloading.OffloadSpace`."""
    return any(offloaded(parameter) is not None for parameter in parameters)


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, without all offloaded gradients in memory at once."""
    if not is_offloaded(parameters):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    alike: dict[tuple, list[torch.Tensor]] = {}  # in torch's order, on which the last bit of a sum depends
    for parameter in parameters:
        if parameter.grad is not None:
            alike.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    gradients = [gradient for group in alike.values() for gradient in group]
    if not gradients:
        return
    norms = []
    for gradient in gradients:
        norms.append(torch.linalg.vector_norm(gradient).to(gradients[0].device))
        release((gradient,))
    total = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    factors = {device: factor.to(device) for device, _ in alike}
    for gradient in gradients:
        gradient.mul_(factors[gradient.device])
        release((gradient,))


class OffloadedAdamW(torch.optim.AdamW):
    """torch's AdamW where the parameters lie, with the moments of offloaded ones where their experts are.

    On a CPU bit for bit what ``AdamW(foreach=False)`` computes; beside a GPU fused, on either side.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each parameter that has a gradient."""
        fused = any(p.device.type == "cuda" for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self._begin(parameter)
                adamw(
                    [parameter], [parameter.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    foreach=False, fused=fused, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                    lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip
                release((parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))

    def _begin(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        place = offloaded(parameter)
        if place is None or place.moments is None:
            first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        else:
            first, second = (moment.zero_() for moment in place.moments)
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.state[parameter] = state
        return state
