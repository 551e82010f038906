"""edgefed: fine-tune Mixture-of-Experts language models across the GPUs that people already own.

Importing this package reads no environment, queries no device and loads neither torch nor transformers.
"""

__version__ = "0.1.0"


def register_experts() -> None:
    """Make ``model.set_experts_implementation("edgefed")`` work on any transformers model. Idempotent.

    The model keeps its experts and its router; only the computation changes (`edgefed.kernels.masked_experts`).
    """
    from edgefed.moe.layer_runtime import register_implementation

    register_implementation()
