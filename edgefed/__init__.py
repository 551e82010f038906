"""edgefed: fine-tune Mixture-of-Experts language models across the GPUs that people already own.

Importing this package reads no environment, queries no device and loads neither torch nor transformers.
"""

__version__ = "0.1.0"
