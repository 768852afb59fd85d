"""Pictures as a vision model wants them.

B: pictures     C: channels     H, W: height and width
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.training.batches import Batch
from surgery.training.examples import Examples


@dataclass(frozen=True)
class Pictures:
    """Makes batches of pictures: scaled to the model's size, from 0 to 1, then (x - mean) / std.

    Attributes:
        channels, height, width: what the model takes.
        mean, std: of each channel; what `preprocessor_config.json` says, 0.5 where there is none.
        label: the number of a stored label.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label: Callable[[Any], float]

    @classmethod
    def of(cls, folder: Path, config: Any, label: Callable[[Any], float]) -> Pictures:
        """For the checkpoint in a folder."""
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        place = folder / "preprocessor_config.json"
        stored = json.loads(place.read_bytes()) if place.is_file() else {}
        mean = tuple(stored.get("image_mean") or [0.5] * config.num_channels)
        std = tuple(stored.get("image_std") or [0.5] * config.num_channels)
        return cls(config.num_channels, height, width, mean, std, label)

    def batch(self, examples: Examples, items: Sequence[int]) -> Batch:
        """`pixel_values` float32 [B, C, H, W] and `labels` int64 [B]."""
        import torch

        rows = [examples.encoded[int(examples.pieces[examples.items[item][0], 0])] for item in items]
        pixels = torch.from_numpy(np.stack([self.pixels(row["image"]) for row in rows]))
        return {"pixel_values": pixels, "labels": torch.tensor([int(self.label(row["label"])) for row in rows])}

    def pixels(self, image: Any) -> np.ndarray:
        """One picture, float32 [C, H, W], of Pillow's or of [H, W], [H, W, C] or [C, H, W], bytes or 0.0 to 1.0."""
        if hasattr(image, "convert"):
            image = image.convert("L" if self.channels == 1 else "RGB")
            if image.size != (self.width, self.height):
                image = image.resize((self.width, self.height), resample=2)  # bilinear
        array = np.asarray(image)
        array = array[..., None] if array.ndim == 2 else array
        if array.shape[-1] != self.channels and array.shape[0] == self.channels:
            array = array.transpose(1, 2, 0)
        if array.dtype.kind in "iu":
            array = array / np.float32(255)
        if array.shape[-1] == 1 and self.channels > 1:
            array = array.repeat(self.channels, axis=-1)
        if array.shape != (self.height, self.width, self.channels):
            array = _resized(array, self.height, self.width)
        normal = (array.astype(np.float32) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def _resized(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, C] to [height, width, C], bilinear."""
    import torch
    from torch.nn import functional

    tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))[None]
    made = functional.interpolate(tensor, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return made[0].permute(1, 2, 0).numpy()
