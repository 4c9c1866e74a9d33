"""The pictures that mini is trained from: crops for the autoencoder, and a cache of latents for the U-Net.

Encoding costs far more than a training step, so every picture is encoded once, at one size, and training crops
windows out of the cached latents. The edges are cached beside them as packed bits, so that a window of latents
[4, n, n] and its edges [8n, 8n] stay aligned.
"""

import hashlib
import json
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save
from tqdm import tqdm

from lsast_engines.errors import PictureError, TrainingError
from lsast_engines.files import replace_file
from lsast_engines.images import canny_edges, find_pictures, read_picture
from lsast_train.base.base import autocast

log = logging.getLogger("lsast.train.mini")

PAINTED_SIDE = 512
"""Pictures are cached with about this number of pixels squared, the size that mini paints at. A work of 300 pixels is
enlarged: at its own size its brush strokes are finer than the autoencoder can carry, and a base that was trained there
paints pictures of 512² without any."""

READ_AHEAD = 64
"""Pictures that threads read and fit while the first of them is encoded."""

SMALLEST = 96
"""Pictures with a shorter side below this many pixels are left out: enlarged, they would only teach blur."""


LARGEST_SCALE = 1.5
"""Crops are enlarged at most so many times."""


@dataclass(frozen=True)
class Window:
    """A batch of aligned crops out of the cache."""

    latents: torch.Tensor
    """[B, 4, n, n], in the units of the U-Net."""
    other: torch.Tensor
    """[B, 4, n, n]: another crop of the same picture, from which style can be read but not this content."""
    edges: torch.Tensor
    """[B, 3, 8n, 8n] of 0 and 1."""
    labels: torch.Tensor
    """[B] index of the picture's folder."""


def is_held_out(name: str) -> bool:
    """Whether the picture of this name, one of 25, is held out: by the hash of its name, so it never moves."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big") < 0.04 * 2**32


def fit_picture(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Crop the centre to at most 2:1 and resize to about `PAINTED_SIDE`², in multiples of 8: [H, W, 3] → [h, w, 3]."""
    height, width = rgb.shape[:2]
    limit = 2 * min(height, width)
    cut_h, cut_w = min(height, limit), min(width, limit)
    top, left = (height - cut_h) // 2, (width - cut_w) // 2
    rgb = rgb[top : top + cut_h, left : left + cut_w]
    scale = PAINTED_SIDE / math.sqrt(cut_h * cut_w)
    size = (max(round(cut_w * scale / 8), 1) * 8, max(round(cut_h * scale / 8), 1) * 8)
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


def _fit(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None:
    """A picture as `fit_picture` makes it, and its edges; None if it is unreadable or smaller than `SMALLEST`."""
    try:
        rgb = read_picture(path).rgb
    except PictureError:
        return None
    if min(rgb.shape[:2]) < SMALLEST:
        return None
    rgb = fit_picture(rgb)
    return rgb, canny_edges(rgb)


def build_cache(folders: list[Path], encoder: torch.nn.Module, out: Path, device: torch.device | str = "cpu") -> None:
    """Encode every picture under `folders`, a label each by its name, and write the safetensors file `out`, whole.

    Args:
        encoder: image [1, 3, H, W] in [-1, 1] → latent [1, 4, H/8, W/8] in the units of the U-Net.
        device: where `encoder` runs; it comes back on the CPU.
    """
    device = torch.device(device)
    encoder = encoder.to(device)
    rows: list[tuple[Any, ...]] = []
    skipped: list[str] = []
    jobs = [(index, path) for index, folder in enumerate(folders) for path in find_pictures(folder)]
    with tqdm(total=len(jobs), desc="encode", unit="picture") as bar, ThreadPoolExecutor() as pool:
        for begin in range(0, len(jobs), READ_AHEAD):
            some = jobs[begin : begin + READ_AHEAD]
            for (label, path), fitted in zip(some, pool.map(_fit, [path for _, path in some]), strict=True):
                bar.update()
                if fitted is None:
                    skipped.append(path.name)
                    continue
                rgb, edge = fitted
                image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1  # [1, 3, H, W]
                image = image.to(device, memory_format=torch.channels_last)
                with torch.no_grad(), autocast(device, "auto"):
                    latent = encoder(image)[0].float().cpu().numpy()
                bits = np.packbits(edge, axis=1)  # [H, W/8]
                held = is_held_out(f"{path.parent.name}/{path.name}")
                rows.append((latent.astype(np.float16).ravel(), bits.ravel(), latent.shape[1:], label, held))
    encoder.to("cpu")
    if skipped:
        log.warning("%d pictures unreadable or smaller than %d px, left out: %s", len(skipped), SMALLEST, skipped[:8])
    if not rows:
        raise TrainingError(f"found no usable one of {len(jobs)} pictures; expected some of {SMALLEST} pixels and more")
    latents, edges, sizes, labels, held_out = zip(*rows, strict=True)
    data = save(
        {
            "latents": np.concatenate(latents),
            "edges": np.concatenate(edges),
            "sizes": np.array(sizes, dtype=np.int32),
            "labels": np.array(labels, dtype=np.int32),
            "held_out": np.array(held_out, dtype=np.uint8),
        },
        metadata={"labels": json.dumps([folder.name for folder in folders])},
    )
    with replace_file(out) as handle:
        handle.write(data)


class LatentDataset:
    """The cache in memory, cut into random windows.

    Args:
        device: where latents and edges lie, and the windows.
        side: of a window in latents; pictures that hold none are left out.

    Raises:
        TrainingError: there is no cache, or nothing in it to train on or to hold out.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", side: int = 1) -> None:
        if not path.is_file():
            raise TrainingError(f"found no latent cache {path}; make it with: python -m benchmarks.mini.training base")
        with safe_open(str(path), "numpy") as file:
            self.label_names: list[str] = json.loads(file.metadata()["labels"])
            self.sizes: npt.NDArray[np.int64] = file.get_tensor("sizes").astype(np.int64)
            self.labels = file.get_tensor("labels")
            held = file.get_tensor("held_out").astype(bool)
            flat, packed = file.get_tensor("latents"), file.get_tensor("edges")
        self._latents, self._edges = torch.from_numpy(flat).to(device), torch.from_numpy(packed).to(device)
        # Where a picture begins, in positions: it has 4 latents and 8 bytes of edges at each.
        self._begins = np.cumsum(self.sizes.prod(axis=1)) - self.sizes.prod(axis=1)
        fits = self.sizes.min(axis=1) >= side
        self.train, self.held_out = np.flatnonzero(fits & ~held), np.flatnonzero(fits & held)
        if not len(self.train) or not len(self.held_out):
            raise TrainingError(
                f"found {fits.sum()} pictures in {path} that hold a window of {side} latents, {len(self.held_out)} of "
                "them held out; expected some of either kind: give a hundred pictures or more, or a smaller --side"
            )

    @property
    def device(self) -> torch.device:
        """Where the windows are."""
        device: torch.device = self._latents.device
        return device

    def window(self, indices: npt.NDArray[np.int64], side: int, rng: np.random.Generator) -> Window:
        """Random crops of `side` latents out of the pictures `indices`, which hold them, mirrored half of the time."""
        sizes, count, device = self.sizes[indices], len(indices), self.device
        corners = rng.integers(0, sizes[:, None] - side + 1, (count, 2, 2))  # of own and other: y, x
        mirrored = rng.random((count, 1)) < 0.5  # a fair approximation of mirroring the picture (docs/mini.md)
        columns = np.where(mirrored, np.arange(side)[::-1], np.arange(side))
        begins, heights, widths = (array.reshape(-1, 1, 1) for array in (self._begins[indices], *sizes.T))

        def cut(flat: torch.Tensor, planes: int, rows: int, corner: npt.NDArray[np.int64]) -> torch.Tensor:
            """[B, planes, rows · side, side] of pictures that lie in `flat` as planes, `rows` rows for a latent."""
            y = corner[:, :1, None] * rows + np.arange(rows * side)
            y = begins * planes * rows + (np.arange(planes)[:, None] * heights * rows + y) * widths
            x = corner[:, 1:] + columns
            return flat[torch.from_numpy(y).to(device)[..., None] + torch.from_numpy(x).to(device)[:, None, None]]

        own, other = corners.swapaxes(0, 1)
        bits = torch.from_numpy(np.where(mirrored, np.arange(8), np.arange(7, -1, -1)).astype(np.uint8)).to(device)
        edges = (cut(self._edges, 1, 8, own)[..., None] >> bits[:, None, None, None] & 1).flatten(3).float()
        labels = torch.from_numpy(self.labels[indices].astype(np.int64)).to(device)
        latents, others = (cut(self._latents, 4, 1, corner).float() for corner in (own, other))
        return Window(latents, others, edges.expand(-1, 3, -1, -1), labels)

    def sampling_weights(self, share: dict[str, float]) -> npt.NDArray[np.float64]:
        """Probability of each picture of `train`: a label's pictures weigh `share` (default 1)."""
        weights: npt.NDArray[np.float64] = np.array(
            [share.get(self.label_names[label], 1.0) for label in self.labels[self.train]]
        )
        weights /= weights.sum()
        return weights


class Crops:
    """Random crops of pictures at about the scale that mini paints at. Decoded pictures stay in memory.

    Args:
        side: side of a crop in pixels.
        memory: decoded pictures are kept up to this many bytes; the others are read again each time.

    Raises:
        TrainingError: no picture to train on, or none that is held out.
    """

    def __init__(self, folders: list[Path], side: int, memory: int = 2 << 30) -> None:
        paths = [path for folder in folders for path in find_pictures(folder)]
        held = [is_held_out(f"{path.parent.name}/{path.name}") for path in paths]
        self.train = [path for path, out in zip(paths, held, strict=True) if not out]
        self.held_out = [path for path, out in zip(paths, held, strict=True) if out]
        if not self.train or not self.held_out:
            raise TrainingError(
                f"found {len(paths)} pictures, {len(self.held_out)} of them held out by a hash of the name; expected "
                "some of either kind: give a hundred pictures or more"
            )
        self.side = side
        self._free = memory
        self._decoded: dict[Path, npt.NDArray[np.uint8] | None] = {}

    def batch(self, paths: list[Path], count: int, rng: np.random.Generator) -> torch.Tensor:
        """`count` crops [B, 3, side, side] in [-1, 1]; pictures that are unreadable or too small are drawn again.

        Raises:
            TrainingError: 1 000 draws gave no crop.
        """
        crops: list[npt.NDArray[np.uint8]] = []
        draws = 0
        while len(crops) < count:
            draws += 1
            if draws > 1000 and not crops:
                raise TrainingError(
                    f"found no readable picture of at least {SMALLEST} pixels a side that holds a crop of {self.side} "
                    f"among {len(paths)}; expected pictures at least that large"
                )
            rgb = self._read(paths[rng.integers(len(paths))])
            if rgb is None or min(rgb.shape[:2]) < SMALLEST:
                continue
            height, width = (min(n, 2 * min(rgb.shape[:2])) for n in rgb.shape[:2])
            # Side in pixels of the picture; only that part of it is resized. A crop enlarged more teaches blur.
            scale = min(PAINTED_SIDE * rng.uniform(0.85, 1.2) / math.sqrt(height * width), LARGEST_SCALE)
            cut = self.side / scale
            if cut > min(height, width):
                continue
            top, left = (
                (n - m) / 2 + rng.uniform(0, m - cut) for n, m in zip(rgb.shape, (height, width), strict=False)
            )
            crop = Image.fromarray(rgb).resize(
                (self.side, self.side), Image.Resampling.LANCZOS, (left, top, left + cut, top + cut)
            )
            crops.append(np.asarray(crop)[:, ::-1] if rng.random() < 0.5 else np.asarray(crop))
        stack = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return stack.contiguous(memory_format=torch.channels_last)

    def pictures(self, count: int) -> list[torch.Tensor]:
        """Up to `count` held-out pictures, evenly drawn, whole: [1, 3, H, W] in [-1, 1] at the painted scale."""
        found = [
            rgb
            for path in self.held_out[:: max(1, len(self.held_out) // count)]
            if (rgb := self._read(path)) is not None
        ]
        fitted = [fit_picture(rgb) for rgb in found[:count]]
        return [torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for rgb in fitted]

    def _read(self, path: Path) -> npt.NDArray[np.uint8] | None:
        if path in self._decoded:
            return self._decoded[path]
        try:
            rgb = read_picture(path).rgb
        except PictureError:
            rgb = None
        size = 0 if rgb is None else rgb.nbytes
        if size <= self._free:
            self._free -= size
            self._decoded[path] = rgb
        return rgb
