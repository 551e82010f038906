"""edgefed: fine-tune Mixture-of-Experts language models across the GPUs that people already own.

Importing this package reads no environment, queries no device and loads neither torch nor transformers.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, profiles/ and triton_kernels/ lie beside this folder; installed, they lie in it. `python -m edgefed`
# started in a checkout takes this folder, whatever is installed.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "triton_kernels").is_dir():
    __path__.append(str(_root))


def register_experts() -> None:
    """Make ``model.set_experts_implementation("edgefed")`` work on any transformers model. Idempotent.

    The model keeps its experts and its router; only the computation changes (`edgefed.kernels.masked_experts`).
    """
    from edgefed.moe.layer_runtime import register_implementation

    register_implementation()
