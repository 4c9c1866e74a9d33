"""The latent cache that mini is trained from: whole pictures, encoded once at the size that mini paints at.

Encoding costs far more than a training step, so every picture is encoded once, at one size, and training crops
windows out of the cached latents. The edges are cached beside them as packed bits, so that a window of latents
[4, n, n] and its edges [8n, 8n] stay aligned.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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

log = logging.getLogger("lsast.train.mini")

PAINTED_SIDE = 512
"""Pictures are cached with about this number of pixels squared, the size that mini paints at. A work of 300 pixels is
enlarged: at its own size its brush strokes are finer than the autoencoder can carry, and a base that was trained there
paints pictures of 512² without any."""

READ_AHEAD = 64
"""Pictures that are read, fitted and waiting while others are encoded."""

SMALLEST = 96
"""Pictures with a shorter side below this many pixels are left out: enlarged, they would only teach blur."""


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


def read_fitted(path: Path) -> npt.NDArray[np.uint8] | None:
    """The picture `path` as `fit_picture` makes it; None if it is unreadable or smaller than `SMALLEST`."""
    try:
        rgb = read_picture(path).rgb
    except PictureError:
        return None
    return None if min(rgb.shape[:2]) < SMALLEST else fit_picture(rgb)


def _fitted(jobs: list[tuple[int, Path]]) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None]:
    """Each picture fitted, and its edges, read by threads some pictures ahead; None for one to leave out."""

    def fit(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None:
        rgb = read_fitted(path)
        return None if rgb is None else (rgb, canny_edges(rgb))

    with ThreadPoolExecutor() as pool:
        waiting: deque[Future[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]] | None]] = deque()
        for _, path in jobs:
            waiting.append(pool.submit(fit, path))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def build_cache(folders: list[Path], encoder: torch.nn.Module, out: Path, device: torch.device | str = "cpu") -> None:
    """Encode every picture under `folders` (a label each) and write the cache file `out`.

    Args:
        folders: one folder per label; the label is the folder's name.
        encoder: image [1, 3, H, W] in [-1, 1] → latent [1, 4, H/8, W/8] in the units of the U-Net.
        out: a safetensors file, replaced whole.
        device: where `encoder` runs; it comes back on the CPU.
    """
    device = torch.device(device)
    encoder = encoder.to(device)
    latents: list[npt.NDArray[np.float16]] = []
    edges: list[npt.NDArray[np.uint8]] = []
    sizes: list[tuple[int, int]] = []
    labels: list[int] = []
    held: list[bool] = []
    skipped: list[str] = []
    jobs = [(index, path) for index, folder in enumerate(folders) for path in find_pictures(folder)]
    for (label, path), fitted in zip(tqdm(jobs, desc="encode", unit="picture"), _fitted(jobs), strict=True):
        if fitted is None:
            skipped.append(path.name)
            continue
        rgb, edge = fitted
        image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1  # [1, 3, H, W]
        image = image.to(device, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latent = encoder(image)[0].float().cpu().numpy()
        latents.append(latent.astype(np.float16))
        edges.append(np.packbits(edge, axis=1))  # [H, W/8]
        sizes.append((latent.shape[1], latent.shape[2]))
        labels.append(label)
        held.append(is_held_out(f"{path.parent.name}/{path.name}"))
    encoder.to("cpu")
    if skipped:
        log.warning("%d pictures unreadable or smaller than %d px, left out: %s", len(skipped), SMALLEST, skipped[:8])
    data = save(
        {
            "latents": np.concatenate([x.ravel() for x in latents]),
            "edges": np.concatenate([x.ravel() for x in edges]),
            "sizes": np.array(sizes, dtype=np.int32),
            "labels": np.array(labels, dtype=np.int32),
            "held_out": np.array(held, dtype=np.uint8),
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
            raise TrainingError(f"found no latent cache {path}; train it with: lsast-train mini")
        with safe_open(str(path), "numpy") as file:
            self.label_names: list[str] = json.loads(file.metadata()["labels"])
            self.sizes: npt.NDArray[np.int64] = file.get_tensor("sizes").astype(np.int64)
            self.labels = file.get_tensor("labels")
            held = file.get_tensor("held_out").astype(bool)
            flat, packed = file.get_tensor("latents"), file.get_tensor("edges")
        areas = self.sizes.prod(axis=1)
        self._starts = np.cumsum(areas) - areas
        # Picture by picture: [4, h, w] latents, and edge bits as [8h, w] bytes, so a latent column is one byte wide.
        self._latents, self._edges = torch.from_numpy(flat).to(device), torch.from_numpy(packed).to(device)
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
        return self._latents.device

    def window(self, indices: npt.NDArray[np.int64], side: int, rng: np.random.Generator) -> Window:
        """Random crops of `side` latents out of the pictures `indices`, which hold them, mirrored half of the time."""
        rows = []
        for index in indices:
            height, width = self.sizes[index]
            own, other = (rng.integers(0, [height - side + 1, width - side + 1]) for _ in "ab")
            mirrored = rng.random() < 0.5  # a fair approximation of mirroring the picture (docs/mini.md)
            rows.append([self._starts[index], height, width, *own, *other, mirrored, self.labels[index]])
        table = torch.from_numpy(np.array(rows, dtype=np.int64)).to(self._latents.device)
        start, height, width, y, x, v, u, mirrored, labels = table.T[..., None]  # [B, 1] each

        def places(first: torch.Tensor, cells: int, mirror: bool = False) -> torch.Tensor:
            """[B, cells · side] rows or columns of cells, `cells` to a latent, of the crops that begin at `first`."""
            place = torch.arange(cells * side, device=first.device)[None]
            return cells * first + torch.where((mirrored > 0) & mirror, cells * side - 1 - place, place)

        def crops(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            """[B, 4, side, side]."""
            channels = 4 * start + torch.arange(4, device=start.device) * height * width
            lines = places(y, 1) * width
            columns = places(x, 1, mirror=True)
            return self._latents[channels[..., None, None] + lines[:, None, :, None] + columns[:, None, None]].float()

        lines, columns = 8 * start + places(y, 8) * width, places(x, 8, mirror=True)
        packed = self._edges[lines[..., None] + (columns // 8)[:, None]]
        bits = packed >> (7 - columns % 8).to(torch.uint8)[:, None] & 1
        return Window(crops(y, x), crops(v, u), bits.float()[:, None].expand(-1, 3, -1, -1), labels[:, 0])

    def sampling_weights(self, share: dict[str, float]) -> npt.NDArray[np.float64]:
        """Probability of each picture of `train`: a label's pictures weigh `share` (default 1)."""
        weights: npt.NDArray[np.float64] = np.array(
            [share.get(self.label_names[label], 1.0) for label in self.labels[self.train]]
        )
        weights /= weights.sum()
        return weights
