"""Pictures in one folder for each class, as ImageNet is kept, to score the channels of a classifier.

Recipes name ``graphwright.tools.image_folders:calibration``:

    calibration:
      factory: graphwright.tools.image_folders:calibration
      options: {folder: imagenet/train, count: 50, batch: 64}

A class is the place of its folder among the sorted names, as in torchvision's ImageFolder. Pictures are made as for an
evaluation: the shorter side scaled, the centre cut out, channels normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph.errors import PreconditionError
from .digits import require_at_least

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp"})
# Of ImageNet's train split, which models of torchvision, timm and transformers are trained with.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(NamedTuple):
    """Pictures ``[n, 3, size, size]`` and their classes ``[n]`` int64."""

    images: Tensor
    labels: Tensor


def calibration(
    folder: str,
    count: int = 50,
    batch: int = 64,
    size: int = 224,
    scaled: int = 256,
    mean: Sequence[float] = MEAN,
    deviation: Sequence[float] = DEVIATION,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Return what a gradient-based importance score needs, as a recipe's ``calibration`` wants it.

    Args:
        folder: Holds a folder of pictures for each class.
        count: Number of batches.
        batch: Pictures in each.
        size: Side of a picture.
        scaled: Length of the shorter side before the centre is cut out.
        mean: Of the channels, in [0, 1].
        deviation: Of the channels.
        seed: Of the choice of pictures.

    Returns:
        ``(loss, batches, split)``: the cross entropy, batches that are read when they are asked for, and what takes one
        of them apart into samples.

    Raises:
        ValueError: A number is too small.
        PreconditionError: There is no folder with pictures, or there are too few.
    """
    require_at_least(count=(count, 1), batch=(batch, 1), size=(size, 1), scaled=(scaled, size))
    found = _files(Path(folder))
    if len(found) < count * batch:
        raise PreconditionError(f"{folder} has {len(found)} pictures, and {count} batches of {batch} were asked for")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[: count * batch]
    chosen = [found[i] for i in order.tolist()]
    read = _reader(size, scaled, torch.tensor(mean)[:, None, None], torch.tensor(deviation)[:, None, None])
    return cross_entropy, _Batches(chosen, batch, read), samples_of


def cross_entropy(program: Callable[..., Any], batch: Pictures) -> Tensor:
    """Return the mean cross entropy, a scalar, of what an image classifier of transformers says of a batch."""
    out = program(pixel_values=batch.images)
    return nn.functional.cross_entropy(out.logits if hasattr(out, "logits") else out[0], batch.labels)


def samples_of(batch: Pictures) -> list[Pictures]:
    """Return the pictures of a batch one by one."""
    return [Pictures(batch.images[i : i + 1], batch.labels[i : i + 1]) for i in range(len(batch.labels))]


class _Batches(Sequence[Pictures]):
    """Batches of files, read each time one is asked for: all of them would be gigabytes."""

    def __init__(self, files: list[tuple[Path, int]], batch: int, read: Callable[[Path], Tensor]) -> None:
        self.files, self.batch, self.read = files, batch, read

    def __len__(self) -> int:
        return len(self.files) // self.batch

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        part = self.files[place * self.batch : (place + 1) * self.batch]
        return Pictures(torch.stack([self.read(file) for file, _ in part]), torch.tensor([label for _, label in part]))


def _files(folder: Path) -> list[tuple[Path, int]]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    found = [
        (file, label)
        for label, entry in enumerate(classes)
        for file in sorted(entry.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise PreconditionError(f"{folder} has no pictures in folders of their class; give calibration.options.folder")
    return found


def _reader(size: int, scaled: int, mean: Tensor, deviation: Tensor) -> Callable[[Path], Tensor]:
    def read(file: Path) -> Tensor:
        import numpy as np
        from PIL import Image

        with Image.open(file) as picture:
            width, height = picture.size
            factor = scaled / min(width, height)
            whole = picture.convert("RGB").resize(
                (max(scaled, round(width * factor)), max(scaled, round(height * factor))), Image.Resampling.BICUBIC
            )
        left, top = (whole.width - size) // 2, (whole.height - size) // 2
        pixels = np.asarray(whole.crop((left, top, left + size, top + size)))
        return (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / deviation

    return read
