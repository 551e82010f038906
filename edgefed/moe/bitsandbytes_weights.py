"""Weights that bitsandbytes quantized, in the layout of its checkpoints, read without the package.

4 bits (NF4 and FP4, arXiv 2305.14314): code i of a flattened weight is a nibble, the high one of a byte first, and

    weight[i] = quant_map[code[i]] absmax[i // blocksize]

where ``absmax`` may be quantized, too: nested_quant_map[absmax[j]] nested_absmax[j // nested_blocksize] +
nested_offset.
8 bits (LLM.int8, arXiv 2208.07339): weight[n, k] = codes[n, k] SCB[n] / 127.

Values are those of bitsandbytes bit for bit (`tests/moe/test_checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from edgefed.errors import CheckpointError

_STATE = ".quant_state.bitsandbytes__"
_STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INT8_STEP = 7.874015718698502e-3  # 1 / 127, in the digits of bitsandbytes
_PACKABLE = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)  # what bitsandbytes keeps packed codes in

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
ReadBytes = Callable[[str, int, int], torch.Tensor]
"""(name, start, stop) -> these bytes of a tensor in a file, (stop - start,) uint8."""


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight in 4 or 8 bits, by the names of its parts in the checkpoint.

    Attributes:
        shape: that of the weight before it was quantized.
        dtype: dtype that the weight had; float32 for 8 bits, which does not record it.
        blocksize: elements for one ``absmax``; 0 for 8 bits.
        nested_blocksize: elements of ``absmax`` for one ``nested_absmax``; 0 if absmax is not quantized.
        nested_offset: added to a dequantized ``absmax``.

    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int = 0
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors beside the codes."""
        if not self.blocksize:
            return (_scale_of(self.name),)
        return tuple(self.name + part for part in (_STATE_PARTS if self.nested_blocksize else _STATE_PARTS[:2]))

    def dequantize(self, read: ReadBytes, row: int | None = None) -> torch.Tensor:
        """Return the weight (*shape), or with ``row`` only this row, as (1, *shape[1:]), in `dtype`."""
        start, stop = 0, math.prod(self.shape)
        shape = self.shape
        if row is not None:
            size = math.prod(self.shape[1:])
            if self.blocksize and size % self.blocksize:  # a block is in two rows
                return self.dequantize(read)[row : row + 1]
            start, stop, shape = row * size, (row + 1) * size, (1, *self.shape[1:])
        if not self.blocksize:
            width = self.shape[-1]
            codes = read(self.name, start, stop).view(torch.int8).reshape(shape)
            scale = _floats(read, self.parts[0], start // width, stop // width).reshape(*shape[:-1], 1)
            return codes.float() * scale * _INT8_STEP
        code = _floats(read, self.name + ".quant_map", 0, 16)
        pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # (256, 2): the values of a byte
        packed = read(self.name, start // 2, -(-stop // 2))
        values = torch.nn.functional.embedding(packed.int(), pairs).reshape(-1)[: stop - start]
        absmax = self._absmax(read, start // self.blocksize, -(-stop // self.blocksize))
        whole = (stop - start) // self.blocksize
        values[: whole * self.blocksize].view(whole, self.blocksize).mul_(absmax[:whole, None])
        if whole < len(absmax):  # the last block is shorter
            values[whole * self.blocksize :].mul_(absmax[whole])
        return values.reshape(shape).to(self.dtype)

    def _absmax(self, read: ReadBytes, start: int, stop: int) -> torch.Tensor:
        """Largest magnitudes of the blocks from ``start`` to ``stop``, float32."""
        if not self.nested_blocksize:
            return _floats(read, self.name + ".absmax", start, stop)
        table = _floats(read, self.name + ".nested_quant_map", 0, 256)
        codes = read(self.name + ".absmax", start, stop)
        first, last = start // self.nested_blocksize, -(-stop // self.nested_blocksize)
        scales = _floats(read, self.name + ".nested_absmax", first, last)
        of_block = torch.arange(start, stop) // self.nested_blocksize - first
        return table[codes.int()] * scales[of_block] + self.nested_offset


def find_quantized(shapes: Shapes, read: ReadBytes) -> tuple[dict[str, QuantizedWeight], set[str]]:
    """Find the weights that bitsandbytes quantized among the tensors of a checkpoint, and the names of their parts.

    Raises CheckpointError if the parts of one are missing or do not fit each other.
    """
    found: dict[str, QuantizedWeight] = {}
    others: set[str] = set()
    for key in shapes:
        name, is_four_bit, _ = key.partition(_STATE)
        if is_four_bit:
            found[name] = _four_bit(name, shapes, read(key, 0, _num_bytes(shapes[key])))
            others |= {key, *found[name].parts}
        elif shapes[key][0] == torch.int8 and key.endswith("weight") and _scale_of(key) in shapes:
            found[key] = _eight_bit(key, shapes, read)
            others |= {_scale_of(key), key + "_format"} & shapes.keys()
    return found, others


def _four_bit(name: str, shapes: Shapes, state: torch.Tensor) -> QuantizedWeight:
    try:
        settings: dict[str, Any] = json.loads(bytes(state.tolist()))
        nested = "nested_blocksize" in settings
        weight = QuantizedWeight(
            name, tuple(int(size) for size in settings["shape"]), _DTYPES[settings["dtype"]],
            int(settings["blocksize"]), int(settings["nested_blocksize"]) if nested else 0,
            float(settings["nested_offset"]) if nested else 0.0,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the state of the 4-bit weight {name!r} cannot be read: {error!r}") from error
    num_elements = math.prod(weight.shape)
    if weight.blocksize < 2 or weight.blocksize % 2 or (nested and weight.nested_blocksize < 1) or num_elements < 1:
        raise CheckpointError(f"the state of the 4-bit weight {name!r} is invalid: {settings}")
    blocks = -(-num_elements // weight.blocksize)
    float32, uint8 = (torch.float32,), (torch.uint8,)
    expected = {name: (-(-num_elements // 2), _PACKABLE), f"{name}.quant_map": (4 * 16, float32)}
    if nested:
        nested_bytes = 4 * -(-blocks // weight.nested_blocksize)
        expected |= {f"{name}.absmax": (blocks, uint8), f"{name}.nested_quant_map": (4 * 256, float32)}
        expected |= {f"{name}.nested_absmax": (nested_bytes, float32)}
    else:
        expected |= {f"{name}.absmax": (4 * blocks, float32)}
    for part, (num_bytes, dtypes) in expected.items():
        if part not in shapes:
            raise CheckpointError(f"the 4-bit weight {name!r} lacks {part!r}")
        dtype, found = shapes[part][0], _num_bytes(shapes[part])
        if dtype not in dtypes or not num_bytes <= found < num_bytes + dtype.itemsize:
            raise CheckpointError(
                f"{part!r} must have {num_bytes} bytes for a 4-bit weight of shape {weight.shape}; found {found} "
                f"bytes of {dtype}"
            )
    return weight


def _eight_bit(name: str, shapes: Shapes, read: ReadBytes) -> QuantizedWeight:
    shape = shapes[name][1]
    scale = _scale_of(name)
    if len(shape) != 2 or shapes[scale][0] != torch.float32 or math.prod(shapes[scale][1]) != shape[0]:
        raise CheckpointError(
            f"{scale!r} must be float32 with {shape[0] if shape else 1} values; found {shapes[scale][0]} of shape "
            f"{shapes[scale][1]}"
        )
    layout = shapes.get(name + "_format")
    if layout is not None and layout[0] == torch.uint8 and int(read(name + "_format", 0, 1)[0]):
        raise CheckpointError(
            f"the 8-bit weight {name!r} is in the order of one GPU's tensor cores",
            remedy="Save the model again with bitsandbytes 0.45 or newer, or use an unquantized version of it.",
        )
    return QuantizedWeight(name, shape, torch.float32)


def _scale_of(name: str) -> str:
    return name.removesuffix("weight") + "SCB"


def _num_bytes(tensor: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return tensor[0].itemsize * math.prod(tensor[1])


def _floats(read: ReadBytes, name: str, start: int, stop: int) -> torch.Tensor:
    return read(name, 4 * start, 4 * stop).view(torch.float32)
