"""edgefed: fine-tune Mixture-of-Experts language models across the devices that people already own.

    import edgefed

    plan = edgefed.plan("OLMoE-1B-7B", memory="8GiB")                    # experts, predicted peak, savings
    profile = edgefed.profile("tiny", "my.jsonl")                        # router statistics
    with edgefed.experts(model, plan, lora=8): ...                       # an ordinary torch loop
    edgefed.Client("http://127.0.0.1:8470", data="my.jsonl").run(on_event=print)
    edgefed.Server(model="tiny", method="flux").serve()
    edgefed.simulate("fleet.toml"); edgefed.export("edgefed-run", "model")

These names are imported on first use: importing the package reads no environment, queries no device and loads neither
torch nor transformers.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgefed.api.chat import load_chat as load_chat
    from edgefed.api.client import Client as Client
    from edgefed.api.events import ClientEvent as ClientEvent
    from edgefed.api.mixture import load_mixture as load_mixture
    from edgefed.api.models import Plan as Plan
    from edgefed.api.models import experts as experts
    from edgefed.api.models import plan as plan
    from edgefed.api.models import profile as profile
    from edgefed.api.runs import comparisons as comparisons
    from edgefed.api.runs import export as export
    from edgefed.api.runs import simulate as simulate
    from edgefed.api.server import Server as Server
    from edgefed.methods.registry import register as register_method

_PLACES = {
    "Client": "edgefed.api.client:Client",
    "ClientEvent": "edgefed.api.events:ClientEvent",
    "Plan": "edgefed.api.models:Plan",
    "Server": "edgefed.api.server:Server",
    "experts": "edgefed.api.models:experts",
    "comparisons": "edgefed.api.runs:comparisons",
    "export": "edgefed.api.runs:export",
    "load_chat": "edgefed.api.chat:load_chat",
    "load_mixture": "edgefed.api.mixture:load_mixture",
    "plan": "edgefed.api.models:plan",
    "profile": "edgefed.api.models:profile",
    "register_method": "edgefed.methods.registry:register",
    "simulate": "edgefed.api.runs:simulate",
}

__all__ = [
    "Client", "ClientEvent", "Plan", "Server", "comparisons", "experts", "export", "load_chat", "load_mixture",
    "plan", "profile",
    "register_experts", "register_method", "simulate",
]  # fmt: skip

# In a checkout, profiles/ and triton_kernels/ lie beside this folder; installed, they lie in it. `python -m edgefed`
# started in a checkout uses this folder, whatever is installed.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "triton_kernels").is_dir():
    __path__.append(str(_root))


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'edgefed' has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _PLACES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register_experts() -> None:
    """Make ``model.set_experts_implementation("edgefed")`` work on any transformers model. Idempotent.

    The model keeps its experts and its router; only the computation changes (`edgefed.kernels.masked_experts`).
    """
    from edgefed.moe.layer_runtime import register_implementation

    register_implementation()
