"""What the server behind `warm_process` imports once. Only modules that start no thread and read no environment."""

import contextlib
import importlib

import torch

for _name in ("numpy", "torch", "transformers", "safetensors.torch", "httpx", "uvicorn", "starlette", "rich"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

torch.set_num_threads(1)
