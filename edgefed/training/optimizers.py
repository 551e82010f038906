"""Learning-rate schedules, and gradient clipping and AdamW beyond torch's: for offloaded experts and for 16 bits.

**Schedules** run over the whole run and not over one round, since a round is a few steps only (`learning_rate_at`).

**Offloaded experts**: one tensor after the other, each released behind it. Both compute what torch computes; only the
order in which memory is touched differs.

**16 bits**: bfloat16 numbers near w are about w / 128 apart, so updates below w / 256 are rounded away. In float16,
AdamW's epsilon of 1e-8 is zero, and so are the squares of most gradients. `AdamW` therefore computes such updates in
float32 and rounds the weight at random to one of its two neighbors, so that the mean is right (stochastic rounding:
Gupta et al., arXiv 1502.02551; Zamirai et al., arXiv 2010.06192). It stores the root of the second moment instead of
the moment. Unlike float32 master weights this takes no memory but one tensor's float32 copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, overload

import torch
from torch import nn
from torch.optim.adamw import adamw

from edgefed.moe.offloading import offloaded, release
from edgefed.protocol.messages import TrainingConfig

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 mantissa that a dtype does not have."""

_LEAST_UPDATE_ULPS = 1.0
"""A learning rate below this many steps of a tensor's typical weight is too small for plain rounding."""


def is_offloaded(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of ``parameters`` is of an `edgefed.moe.offloading.OffloadSpace`."""
    return any(offloaded(parameter) is not None for parameter in parameters)


def needs_stochastic_rounding(parameter: torch.Tensor, learning_rate: float) -> bool:
    """Whether plain rounding loses AdamW's updates of ``parameter``: always in float16, in bfloat16 at small rates.

    An update of AdamW is about as large as the learning rate. It is compared with the spacing of bfloat16 numbers at
    the root mean square of the tensor.
    """
    if parameter.dtype == torch.float16:
        return True
    if parameter.dtype != torch.bfloat16 or not parameter.numel():
        return False
    typical = float(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float32)) / math.sqrt(parameter.numel())
    return learning_rate < _LEAST_UPDATE_ULPS * typical * torch.finfo(torch.bfloat16).eps


def learning_rate_at(training: TrainingConfig, rounds: int, server_round: int, step_share: float) -> float:
    """The learning rate of a step of a run of ``rounds`` rounds; ``training.learning_rate`` is its largest value.

    With t = server_round - 1 + step_share the rounds that are over, W the rounds of warm-up and R all rounds:

        rate(t) / rate = t / W                                   t < W
                       = 1, (1 + cos(pi x)) / 2, or 1 - x        t >= W,  x = (t - W) / (R - W)

    for the schedules "constant", "cosine" (Loshchilov and Hutter, arXiv 1608.03983, without restarts) and "linear".
    ``step_share``, 0..1, is the middle of the step as a share of the device's steps in this round. So the schedule is
    the same for devices that take different numbers of steps, and the rate is never 0.
    """
    time, warmup = server_round - 1 + step_share, training.warmup_rounds
    if time < warmup:
        return training.learning_rate * time / warmup
    done = min(1.0, (time - warmup) / (rounds - warmup))
    factor = {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[training.schedule]
    return training.learning_rate * factor


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_`, without all offloaded gradients in memory at once; ``max_norm`` 0: no limit."""
    if not max_norm:
        return
    if not is_offloaded(parameters):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    # In torch's order, on which the last bit of a sum depends.
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
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


class StochasticRounding:
    """Rounds float32 values up or down at random so that the mean is right. ``seed`` decides how."""

    def __init__(self, seed: int):
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def copy(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Copy float32 ``values``, which it overwrites, to ``target`` in 16 bits."""
        bits, device = DROPPED_BITS[target.dtype], values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        noise = torch.empty(values.shape, dtype=torch.int32, device=device)
        noise.random_(0, 1 << bits, generator=self._generators[device])
        rounded = values.contiguous().view(torch.int32).add_(noise).bitwise_and_(-1 << bits)
        target.copy_(rounded.view(torch.float32))


def with_stochastic_rounding(optimizer: Any, seed: int) -> Any:
    """Return a subclass of one of bitsandbytes' optimizers that rounds weights as `AdamW` does, where a dtype needs it.

    Such a weight is updated in a float32 copy, one tensor at a time; the optimizer's own state stays as it is.
    """
    rounding, rounded = StochasticRounding(seed), dict[nn.Parameter, bool]()

    class Rounded(optimizer):  # type: ignore[misc]  # a class that is known at run time only
        def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
            """Update one parameter."""
            if p not in rounded:
                rounded[p] = needs_stochastic_rounding(p, group["lr"])
            if not rounded[p]:
                super().update_step(group, p, gindex, pindex)
                return
            weight, gradient = p.data, p.grad
            assert gradient is not None, "the optimizer skips parameters without a gradient"
            p.grad, p.data = None, weight.float()
            p.grad = gradient.float()
            try:
                super().update_step(group, p, gindex, pindex)
                rounding.copy(p.data, weight)
            finally:
                p.grad, p.data = None, weight
                p.grad = gradient

    return Rounded


class AdamW(torch.optim.AdamW):
    """torch's AdamW, a tensor at a time, with stochastic rounding where a dtype needs it.

    Moments of offloaded parameters lie where their experts are. For a parameter without stochastic rounding: on a CPU
    bit for bit what ``torch.optim.AdamW(foreach=False)`` computes; beside a GPU fused, on either side. ``seed``
    decides how weights are rounded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, seed: int = 0, **options: Any):
        super().__init__(parameters, **options)
        self._rounding = StochasticRounding(seed)
        self._rounded: set[torch.Tensor] = set()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update each parameter that has a gradient."""
        loss = None if closure is None else closure()
        fused = any(p.device.type == "cuda" for group in self.param_groups for p in group["params"])
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter] or self.begin(parameter, group["lr"])
                if parameter in self._rounded:
                    self._step_in_float32(parameter, state, group)
                else:
                    adamw(
                        [parameter], [parameter.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                        foreach=False, fused=fused, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                    )  # fmt: skip
                release((parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
        return loss

    def is_rounded(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter that has moments is rounded stochastically."""
        return parameter in self._rounded

    def begin(self, parameter: nn.Parameter, learning_rate: float) -> dict[str, Any]:
        """Give a parameter moments of 0, and return its state."""
        place = offloaded(parameter)
        if place is None or place.moments is None:
            first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
        else:
            first, second = (moment.zero_() for moment in place.moments)
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        if needs_stochastic_rounding(parameter, learning_rate):
            self._rounded.add(parameter)
        state = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.state[parameter] = state
        return state

    def _step_in_float32(self, parameter: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Take a step of AdamW in float32; ``exp_avg_sq`` has the root of the second moment."""
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        state["step"] += 1
        steps = int(state["step"].item())
        gradient = parameter.grad.float()
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        root = state["exp_avg_sq"].float()
        root.square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
        weight = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        scale = math.sqrt(1 - beta2**steps)
        weight.addcdiv_(first, (root / scale).add_(group["eps"]), value=-group["lr"] / (1 - beta1**steps))
        for target, values in ((state["exp_avg"], first), (state["exp_avg_sq"], root), (parameter, weight)):
            self._rounding.copy(values, target)


class KeptMoments(Protocol):
    """Moments of the optimizer that stay from round to round."""

    def load(self, optimizer: torch.optim.Optimizer) -> int:
        """Give a new optimizer the moments with which the round begins; returns how many parameters have some."""

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the moments after the round."""


_ROOT = "exp_avg_root"
"""Name of a kept root of the second moment."""


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """The moments of a parameter in AdamW, to be kept: ``exp_avg``, ``exp_avg_sq`` or its root, and ``step``.

    Empty for a parameter that has none yet, and for optimizers with 8-bit moments.
    """
    state = optimizer.state.get(parameter)
    if not state or "exp_avg" not in state:
        return {}
    second = _ROOT if isinstance(optimizer, AdamW) and optimizer.is_rounded(parameter) else "exp_avg_sq"
    return {"exp_avg": state["exp_avg"], second: state["exp_avg_sq"], "step": state["step"]}


def resume_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: Mapping[str, torch.Tensor]) -> bool:
    """Give a parameter without moments those that `moments_of` returned; False, and nothing done, if they do not fit.

    They do not fit another shape or dtype, another way of rounding, and optimizers with 8-bit moments.
    """
    second = kept.get("exp_avg_sq", kept.get(_ROOT))
    if second is None or not kept.keys() >= {"exp_avg", "step"} or not isinstance(optimizer, torch.optim.AdamW):
        return False
    if any(value.shape != parameter.shape or value.dtype != parameter.dtype for value in (kept["exp_avg"], second)):
        return False
    rate = optimizer.param_groups[0]["lr"]
    rounded = isinstance(optimizer, AdamW) and needs_stochastic_rounding(parameter, rate)
    if rounded != (_ROOT in kept):
        return False
    if isinstance(optimizer, AdamW):
        state = optimizer.begin(parameter, rate)
    else:
        step = torch.zeros((), dtype=torch.float32, device=parameter.device if _is_fused(optimizer) else "cpu")
        state = {"step": step, "exp_avg": torch.empty_like(parameter), "exp_avg_sq": torch.empty_like(parameter)}
        optimizer.state[parameter] = state
    with torch.no_grad():
        state["step"].copy_(kept["step"])
        state["exp_avg"].copy_(kept["exp_avg"])
        state["exp_avg_sq"].copy_(second)
    release((state["exp_avg"], state["exp_avg_sq"]))
    return True


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))
