"""edgefed inside Flower: a Strategy that runs edgefed's methods, and a ClientApp that trains with them.

    from edgefed.flower import ExpertStrategy, make_client_app

Needs ``pip install 'edgefed[flower]'``. Both names are imported on first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgefed.flower.client_app import make_client_app as make_client_app
    from edgefed.flower.strategy import ExpertStrategy as ExpertStrategy

__all__ = ["ExpertStrategy", "make_client_app"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'edgefed.flower' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"edgefed.flower.{'strategy' if name == 'ExpertStrategy' else 'client_app'}"), name)
