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

    def to(self, device: torch.device) -> Window:
        """The same batch on `device`."""
        return Window(*(x.to(device) for x in (self.latents, self.other, self.edges, self.labels)))


def is_held_out(name: str, share: float = 0.04) -> bool:
    """Whether the picture of this name is held out: by the hash of its name, so it never moves between runs."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:4], "big") < share * 2**32


def fit_picture(rgb: npt.NDArray[np.uint8], side: float = PAINTED_SIDE) -> npt.NDArray[np.uint8]:
    """Crop the centre to at most 2:1 and resize to about side² pixels, in multiples of 8: [H, W, 3] → [h, w, 3]."""
    height, width = rgb.shape[:2]
    limit = 2 * min(height, width)
    cut_h, cut_w = min(height, limit), min(width, limit)
    top, left = (height - cut_h) // 2, (width - cut_w) // 2
    rgb = rgb[top : top + cut_h, left : left + cut_w]
    scale = side / math.sqrt(cut_h * cut_w)
    size = (max(round(cut_w * scale / 8), 1) * 8, max(round(cut_h * scale / 8), 1) * 8)
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))


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
    for label, path in tqdm(jobs, desc="encode", unit="picture"):
        try:
            rgb = read_picture(path).rgb
        except PictureError:
            skipped.append(path.name)
            continue
        if min(rgb.shape[:2]) < SMALLEST:
            skipped.append(path.name)
            continue
        rgb = fit_picture(rgb)
        image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1  # [1, 3, H, W]
        image = image.to(device, memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latent = encoder(image)[0].float().cpu().numpy()
        latents.append(latent.astype(np.float16))
        edges.append(np.packbits(canny_edges(rgb), axis=1))  # [H, W/8]
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
    """The cache in memory, cut into random windows."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise TrainingError(f"found no latent cache {path}; train it with: lsast-train mini")
        with safe_open(str(path), "numpy") as file:
            self.label_names: list[str] = json.loads(file.metadata()["labels"])
            sizes = file.get_tensor("sizes")
            self.labels = file.get_tensor("labels")
            held = file.get_tensor("held_out").astype(bool)
            flat, packed = file.get_tensor("latents"), file.get_tensor("edges")
        areas = sizes.prod(axis=1)
        ends = np.cumsum(areas)
        self._latents = [
            flat[4 * (end - area) : 4 * end].reshape(4, h, w)
            for (h, w), area, end in zip(sizes, areas, ends, strict=True)
        ]
        # Edge bits: [8h, w] bytes, so a latent column is exactly one byte wide.
        self._edges = [
            packed[8 * (end - area) : 8 * end].reshape(8 * h, w)
            for (h, w), area, end in zip(sizes, areas, ends, strict=True)
        ]
        self.train = np.flatnonzero(~held)
        self.held_out = np.flatnonzero(held)
        if not len(self.train) or not len(self.held_out):
            raise TrainingError(
                f"found {len(held)} pictures in {path}, {len(self.held_out)} of them held out; expected some of either "
                "kind: give a hundred pictures or more"
            )

    def window(self, indices: npt.NDArray[np.int64], side: int, rng: np.random.Generator) -> Window:
        """Random crops of `side` latents out of the pictures `indices`, mirrored half of the time."""
        latents, others, edges = [], [], []
        for index in indices:
            latent, bits = self._latents[index], self._edges[index]
            n = min(side, latent.shape[1], latent.shape[2])
            (y, x), (v, u) = (rng.integers(0, [latent.shape[1] - n + 1, latent.shape[2] - n + 1]) for _ in "ab")
            crop, other = latent[:, y : y + n, x : x + n], latent[:, v : v + n, u : u + n]
            edge = np.unpackbits(bits[8 * y : 8 * (y + n), x : x + n], axis=1)
            if rng.random() < 0.5:  # mirroring latents is a fair approximation of mirroring the picture (docs/mini.md)
                crop, other, edge = crop[..., ::-1], other[..., ::-1], edge[:, ::-1]
            if n < side:
                crop, other = (np.pad(c, ((0, 0), (0, side - n), (0, side - n)), mode="reflect") for c in (crop, other))
                edge = np.pad(edge, ((0, 8 * (side - n)), (0, 8 * (side - n))), mode="reflect")
            latents.append(crop)
            others.append(other)
            edges.append(edge)
        stack = torch.from_numpy(np.stack(latents).astype(np.float32))
        return Window(
            stack,
            torch.from_numpy(np.stack(others).astype(np.float32)),
            torch.from_numpy(np.stack(edges)).float()[:, None].expand(-1, 3, -1, -1),
            torch.from_numpy(self.labels[indices].astype(np.int64)),
        )

    def sampling_weights(self, side: int, share: dict[str, float]) -> npt.NDArray[np.float64]:
        """Probability of each picture of `train`: a label's pictures weigh `share` (default 1), too small ones 0."""
        weights: npt.NDArray[np.float64] = np.array(
            [share.get(self.label_names[label], 1.0) for label in self.labels[self.train]]
        )
        weights *= [min(self._latents[index].shape[1:]) >= side for index in self.train]
        weights /= weights.sum()
        return weights
