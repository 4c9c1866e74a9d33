"""An artist's pictures: a folder tree becomes training and held-out paintings, and those become latents.

Pictures that cannot be used are listed in one log line and left out; the others are held in memory at the size that
training needs.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from lsast_engines.bundle.style import LatentStatistics
from lsast_engines.errors import PictureError, TrainingError
from lsast_engines.images import canny_edges, find_pictures, read_on_white

from .base.base import Base
from .options import Crop

log = logging.getLogger("lsast.train")

MIN_SIDE = 64
"""Pictures with a shorter side below this many pixels are left out: enlarged, they would only teach blur."""

MAX_SCALE = 1.5
"""Larger paintings are reduced until their shorter side is this many times the size the base paints at, so that a brush
stroke is as large in training as it will be in a painting."""

HELD_OUT_SHARE = 0.125
"""Part of the paintings that training never sees."""

_MAX_LISTED = 20
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Painting:
    """One usable picture, in memory."""

    name: str
    """Path relative to the collection's folder, with forward slashes."""
    pixels: npt.NDArray[np.uint8]
    """[H, W, 3], both sides at least the training size."""


@dataclass(frozen=True, eq=False)
class PaintingDataset:
    """An artist's paintings, split into training and held-out ones."""

    training: tuple[Painting, ...]
    held_out: tuple[Painting, ...]
    digest: str
    """SHA-256 of the split and of all pixels, by which a resumed run knows its paintings."""

    @classmethod
    def load(
        cls,
        folder: Path,
        size: int,
        crop: Crop = "random",
        painted: int = 0,
        progress: bool = True,
        paths: Sequence[Path] | None = None,
    ) -> PaintingDataset:
        """Read every picture under `folder`, at any depth.

        Args:
            size: side of a training picture in pixels.
            painted: native side of the base in pixels; paintings are held at that scale, so that a smaller training
                picture is a part of one and no miniature of it.
            paths: only these, all under `folder`.

        Raises:
            PictureError: no such folder, or no picture file in it.
            TrainingError: fewer than two usable pictures.
        """
        paths = find_pictures(folder) if paths is None else list(paths)
        paintings: list[Painting] = []
        left_out: list[str] = []
        seen: dict[bytes, str] = {}
        held_at = size if crop == "squash" else max(size, painted)
        # Decoding releases Python's lock. As many pictures as threads are decoded at a time.
        with ThreadPoolExecutor(_THREADS) as pool:
            read = pool.map(lambda path: _read(path, held_at, crop), paths)
            shown = tqdm(read, "read", len(paths), unit="picture", disable=not (progress and shows_bars()))
            for path, found in zip(paths, shown, strict=True):
                name = path.relative_to(folder).as_posix()
                if isinstance(found, str):
                    left_out.append(f"{name} ({found})")
                    continue
                digest, pixels = found
                # The same painting in two files could be on both sides of the split.
                if (twin := seen.setdefault(digest, name)) != name:
                    left_out.append(f"{name} (same as {twin})")
                else:
                    paintings.append(Painting(name, pixels))
        if left_out:
            more = f" and {len(left_out) - _MAX_LISTED} more" if len(left_out) > _MAX_LISTED else ""
            log.warning(
                "left out %d of %d pictures: %s%s", len(left_out), len(paths), ", ".join(left_out[:_MAX_LISTED]), more
            )
        if len(paintings) < 2:
            raise TrainingError(
                f"found {len(paintings)} usable pictures under {folder}; expected at least 2, one to learn from and "
                f"one held out (better 20 and more), each with a shorter side of at least {MIN_SIDE} pixels"
            )
        held = held_out_names([painting.name for painting in paintings])
        whole = hashlib.sha256()
        for painting in paintings:
            whole.update(os.fsencode(f"{painting.name}\0{painting.name in held}\0{painting.pixels.shape}"))
            whole.update(painting.pixels.tobytes())
        return cls(
            tuple(painting for painting in paintings if painting.name not in held),
            tuple(painting for painting in paintings if painting.name in held),
            whole.hexdigest(),
        )


def held_out_names(names: Sequence[str]) -> frozenset[str]:
    """Which of at least two pictures are held out: `HELD_OUT_SHARE` of all names, at least one and never all.

    A picture is chosen by the hash of its name alone, so it stays on its side while the collection grows.
    """
    rank = {name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64 for name in names}
    ordered = sorted(rank, key=lambda name: rank[name])
    held = {name for name in ordered if rank[name] < HELD_OUT_SHARE} or {ordered[0]}
    return frozenset(held if len(held) < len(ordered) else held - {ordered[-1]})


def random_crop(painting: Painting, size: int, generator: torch.Generator) -> npt.NDArray[np.uint8]:
    """A random crop [size, size, 3] of a painting; a squashed one is returned whole."""
    height, width = painting.pixels.shape[:2]
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in (height, width))
    return painting.pixels[top : top + size, left : left + size]


def to_images(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pictures [B, H, W, 3] uint8 → images [B, 3, H, W] in [-1, 1] on `device`."""
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.to(device, memory_format=torch.channels_last)


def to_edges(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures [B, H, W, 3] uint8 → their edges for ControlNet, [B, 3, H, W] of 0 and 1, on the CPU."""
    edges = np.stack([canny_edges(picture) for picture in pixels.numpy()])
    return torch.from_numpy(edges).float()[:, None].expand(-1, 3, -1, -1)


class CachedLatents:
    """Latents of crops that were encoded once: mean and standard deviation [N, 4, h, w] of each."""

    def __init__(self, base: Base, mean: torch.Tensor, std: torch.Tensor) -> None:
        self._base, self._mean, self._std = base, mean, std

    def __len__(self) -> int:
        return len(self._mean)

    @classmethod
    def encode(
        cls,
        base: Base,
        paintings: Sequence[Painting],
        size: int,
        count: int,
        generator: torch.Generator,
        mirrored: bool = True,
        progress: bool = False,
    ) -> CachedLatents:
        """Encode `count` crops, of one painting after the other, and with `mirrored` their mirror images too."""
        means, stds = [], []
        for index in tqdm(range(count), desc="encode", unit="crop", disable=not (progress and shows_bars())):
            pixels = random_crop(paintings[index % len(paintings)], size, generator)
            mean, std = encode_pictures(base, [pixels, pixels[:, ::-1]] if mirrored else [pixels])
            means.append(mean)
            stds.append(std)
        return cls(base, torch.cat(means), torch.cat(stds))

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Random latents [count, 4, h, w]: of a random crop, a sample of its posterior."""
        return self.take(torch.randint(len(self), (count,), generator=generator), generator)

    def take(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents of the crops `indices` [B], each a sample of its posterior, [B, 4, h, w]."""
        return sample_posterior(self._base, self._mean[indices], self._std[indices], generator)


def _read(path: Path, size: int, crop: Crop) -> tuple[bytes, npt.NDArray[np.uint8]] | str:
    """SHA-256 and, at the size that it is held at, the pixels of a picture; or why it is left out."""
    try:
        pixels = read_on_white(path)
    except PictureError as error:
        log.debug("%s", error)
        return "unreadable"
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        return f"{width} by {height} pixels, shorter side below {MIN_SIDE}"
    digest = hashlib.sha256(f"{height} {width} ".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest(), _fit(pixels, size, crop)


def shows_bars() -> bool:
    """Whether progress bars are shown: not where errors alone are logged, as with ``--quiet``."""
    return log.isEnabledFor(logging.WARNING)


def _fit(pixels: npt.NDArray[np.uint8], size: int, crop: Crop) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    if crop == "squash":
        # Bicubic, as in the released code (docs/method.md §3).
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    short = min(height, width)
    scale = min(max(short, size), round(MAX_SCALE * size)) / short
    if scale == 1:
        return pixels
    target = (max(round(width * scale), size), max(round(height * scale), size))
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))


def latent_statistics(base: Base, paintings: Sequence[Painting], most: int = 24) -> LatentStatistics:
    """The artist's palette: mean over paintings of each latent channel's mean and standard deviation in a painting.

    Of at most `most` paintings, evenly drawn, a square in the middle is encoded, no larger than the base's size.
    """
    moments = []
    for painting in paintings[:: max(1, len(paintings) // most)][:most]:
        height, width = painting.pixels.shape[:2]
        side = min(height, width, base.config.size) // base.config.multiple * base.config.multiple
        top, left = (height - side) // 2, (width - side) // 2
        mean, _ = encode_pictures(base, [painting.pixels[top : top + side, left : left + side]])
        latent = base.config.latent_scale * mean[0]
        # A channel that does not vary would make the statistics, and with them the prompts, invalid.
        moments.append(torch.stack([latent.mean((1, 2)), latent.std((1, 2)).clamp(min=1e-4)]))
    mean, std = torch.stack(moments).mean(0).tolist()
    return LatentStatistics(tuple(mean), tuple(std))


@torch.no_grad()
def encode_pictures(base: Base, pictures: Sequence[npt.NDArray[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Square pictures [size, size, 3] → mean and deviation [B, 4, h, w] of the unscaled latents, on the CPU."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    mean, std = base.encode(pixels.to(base.device).float() / 127.5 - 1)
    return mean.cpu(), std.cpu()


def sample_posterior(base: Base, mean: torch.Tensor, std: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sample of each posterior, in the units of the U-Net, on the base's device; arguments [B, 4, h, w]."""
    latent = base.config.latent_scale * (mean + std * torch.randn(mean.shape, generator=generator))
    return latent.to(base.device)
