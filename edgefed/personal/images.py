"""Labelled images of one client."""

from __future__ import annotations

import numpy as np
import torch

from edgefed.personal.batches import Batch


class ImageSamples:
    """``images`` (N, H, W, C) uint8, ``labels`` (N,) int64, in memory. A batch is float32 (B, C, H, W) in [-1, 1]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]):
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        chosen = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).contiguous()
        pixels = chosen.to(torch.float32).div_(127.5).sub_(1.0)
        return Batch(pixels, pixels, torch.from_numpy(self.labels[indices]))

    def subset(self, indices: np.ndarray) -> ImageSamples:
        return ImageSamples(self.images[indices], self.labels[indices], self.classes)
