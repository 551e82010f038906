"""Updates of clients whose adapters have a smaller rank than those of the run (`edgefed.protocol.ranks`).

Before a round is aggregated, such an update is written anew with adapters of the run's rank. What the client lacks has
the value of the model that it was trained from, so whatever is measured of its change measures what it trained.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from edgefed.aggregator.blobs import BlobStore
from edgefed.aggregator.repair import blob_problem
from edgefed.aggregator.staleness import BaseLost
from edgefed.disk import disk_errors
from edgefed.kernels.compression import CODECS, decode
from edgefed.protocol.frames import (
    TensorEntry,
    array_bytes,
    encode_header,
    map_tensor,
    narrow,
    read_header,
    split_update_name,
    storage_dtype,
    update_name,
    widen,
)
from edgefed.protocol.messages import TensorInfo, UnitInfo
from edgefed.protocol.ranks import is_factor, leading_part, leading_shape


def widen_update(
    path: Path, target: Path, rank: int, base: Sequence[UnitInfo] | None, blobs: BlobStore, checked: Collection[str],
    left_out: Collection[str] = (),
) -> None:  # fmt: skip
    """Write the update at ``path`` of a client of ``rank`` to ``target`` with adapters of the run's rank.

    ``base``: the units that it was trained from, None if they are not stored any more. ``checked``: hashes of blobs
    that need no check. Units of ``left_out`` are not aggregated; 0 fills their adapters. Takes the memory of a few
    adapters. Raises BaseLost, DiskFull, StorageError.
    """
    if base is None:
        raise BaseLost("the model that it was trained from is not stored any more")
    units, header = {unit.key: unit for unit in base}, read_header(path)
    whole: dict[str, TensorInfo] = {}
    for name in header:
        key, tensor, _ = split_update_name(name)
        if is_factor(tensor):
            info = next(info for info in units[key].tensors if info.name == tensor)
            whole[name] = TensorInfo(name=update_name(key, tensor), dtype=info.dtype, shape=info.shape)
    blob = ""
    places: dict[str, TensorEntry] = {}
    with disk_errors(f"write {target}"), target.open("wb") as file:
        file.write(encode_header([whole.get(name, entry.info) for name, entry in header.items()]))
        for name, entry in header.items():
            if name not in whole:
                file.write(array_bytes(map_tensor(path, entry)))
                continue
            key, tensor, codec = split_update_name(name)
            info, unit = whole[name], units[key]
            if key in left_out:
                values = np.zeros(info.shape, dtype=storage_dtype(info.dtype))
            else:
                if unit.sha256 != blob:
                    blob = unit.sha256
                    problem = None if blob in checked else blob_problem(blobs.path(blob), blob, unit.size_bytes)
                    if problem:
                        raise BaseLost(f"{key!r} of the model that it was trained from {problem}")
                    places = read_header(blobs.path(blob))
                values = np.array(map_tensor(blobs.path(blob), places[tensor]))
            part = leading_part(tensor, rank)
            if codec:
                change = np.empty(math.prod(leading_shape(info, rank)), dtype=np.float32)
                decode(CODECS[codec], np.array(map_tensor(path, entry)), change)
                values[part] = narrow(
                    widen(values[part], info.dtype) + change.reshape(values[part].shape), info.dtype
                )  # fmt: skip
            else:
                values[part] = map_tensor(path, entry)
            file.write(array_bytes(values))
