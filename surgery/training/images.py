"""Pictures as a vision model wants them.

B: pictures     C: channels     H, W: height and width
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import InputError, first_line
from surgery.training.batches import Batch
from surgery.training.examples import Examples
from surgery.training.text import transformers_package


@dataclass(frozen=True)
class Pictures:
    """Makes batches of pictures, as the checkpoint's image processor does it.

    Without `preprocessor_config.json` a picture is scaled to the model's size, from 0 to 1, and then (x - 0.5) / 0.5.

    Attributes:
        channels, height, width: what the model takes.
        processor: transformers' own, for the checkpoint; None where it has no settings for one.
        label: the number of a stored label.
    """

    channels: int
    height: int
    width: int
    processor: Any
    label: Callable[[Any], float]

    @classmethod
    def of(cls, folder: Path, config: Any, label: Callable[[Any], float]) -> Pictures:
        """For the checkpoint in a folder. Raises `InputError` for settings that transformers cannot use."""
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        place = folder / "preprocessor_config.json"
        if not place.is_file():
            return cls(config.num_channels, height, width, None, label)
        try:
            processor = transformers_package().AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise InputError(
                f"{place} cannot be used ({first_line(error)}); mend it, or remove it to have pictures scaled to "
                f"{height} x {width} and to -1 to 1."
            ) from error
        return cls(config.num_channels, height, width, processor, label)

    def batch(self, examples: Examples, items: Sequence[int]) -> Batch:
        """`pixel_values` float32 [B, C, H, W] and `labels` int64 [B]."""
        import torch

        rows = [examples.encoded[int(examples.pieces[examples.items[item][0], 0])] for item in items]
        made = []
        for item, row in zip(items, rows, strict=True):
            try:
                made.append(self.pixels(row["image"]))
            except ValueError as error:
                (place,) = examples.places([item])
                raise InputError(f"The picture of {place} does not suit the model: {first_line(error)}.") from error
        pixels = torch.from_numpy(np.stack(made))
        return {"pixel_values": pixels, "labels": torch.tensor([int(self.label(row["label"])) for row in rows])}

    def pixels(self, image: Any) -> np.ndarray:
        """One picture, float32 [C, H, W], of Pillow's or of [H, W], [H, W, C] or [C, H, W], bytes or 0.0 to 1.0."""
        if hasattr(image, "convert"):
            image = image.convert("L" if self.channels == 1 else "RGB")
            if self.processor is None and image.size != (self.width, self.height):
                image = image.resize((self.width, self.height), resample=2)  # bilinear
        array = np.asarray(image)
        array = array[..., None] if array.ndim == 2 else array
        if array.ndim == 3 and array.shape[-1] != self.channels and array.shape[0] == self.channels:
            array = array.transpose(1, 2, 0)
        if array.ndim == 3 and array.shape[-1] == 1:
            array = array.repeat(self.channels, axis=-1)
        if array.ndim != 3 or array.shape[-1] != self.channels:
            raise ValueError(f"its shape is {list(array.shape)}, expected {self.channels} channels")
        if self.processor is not None:
            return self._processed(array)
        if array.dtype.kind in "iu":
            array = array / np.float32(255)
        if array.shape != (self.height, self.width, self.channels):
            array = _resized(array, self.height, self.width)
        normal = (array.astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
        return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)

    def _processed(self, array: np.ndarray) -> np.ndarray:
        """What transformers makes of [H, W, C]; numbers that are not bytes are from 0.0 to 1.0 already."""
        given = {} if array.dtype.kind in "iu" else {"do_rescale": False}
        if not given:
            array = array.astype(np.uint8)
        made = self.processor(images=[array], input_data_format="channels_last", return_tensors="np", **given)
        found = np.asarray(made["pixel_values"][0], dtype=np.float32)
        if found.shape != (self.channels, self.height, self.width):
            raise ValueError(
                f"preprocessor_config.json makes {list(found.shape)} of it, and the model takes "
                f"{[self.channels, self.height, self.width]}"
            )
        return found


def _resized(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w, C] to [height, width, C], bilinear."""
    import torch
    from torch.nn import functional

    tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))[None]
    made = functional.interpolate(tensor, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return made[0].permute(1, 2, 0).numpy()
