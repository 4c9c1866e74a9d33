"""Latents that the sampler made, beside the pictures that they should decode to: the decoder is trained on them.

A decoder that has only seen the encoder's latents prints a fine pattern over those of a sampler. Training pictures are
noised, denoised in a few steps with their own tokens, their edges and guidance, and so stay near the picture that they
come from.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save
from tqdm import tqdm

from lsast_engines.diffusion import TimestepSchedule, make_solver
from lsast_engines.errors import TrainingError
from lsast_engines.files import replace_file
from lsast_engines.images import canny_edges

from ..base.base import Base
from .dataset import read_fitted

log = logging.getLogger("lsast.train.mini")


@dataclass(frozen=True)
class SampledLatentsOptions:
    """Options of the cache of sampled latents."""

    count: int = 3000
    """Windows in all, evenly drawn from the pictures."""
    side: int = 40
    """Side of a window in latents, a multiple of 8. Pictures of 512² pixels and at most 2:1 hold 45."""
    timesteps: tuple[int, int] = (100, 700)
    """The range of the timesteps that pictures are noised to."""
    steps: tuple[int, int] = (2, 6)
    """The range of the number of DDIM steps from there to the clean latent."""
    guidance: tuple[float, float] = (2.0, 7.0)
    seed: int = 0
    seconds: float | None = None
    """Wall time after which no further window is begun."""


@torch.no_grad()
def sample_window(
    base: Base, latent: torch.Tensor, edges: torch.Tensor, style: torch.Tensor, rng: np.random.Generator,
    options: SampledLatentsOptions,
) -> torch.Tensor:  # fmt: skip
    """Noise `latent` [1, 4, n, n] and denoise it with `edges` [1, 3, 8n, 8n] and the tokens of the latent `style`."""
    assert base.style_encoder is not None
    start, steps = int(rng.integers(*options.timesteps)), int(rng.integers(options.steps[0], options.steps[1] + 1))
    strength = start / base.config.noise.train_steps
    schedule = TimestepSchedule.build(base.config.noise, round(steps / strength), strength + 1e-6, 1)
    solver = make_solver(schedule)
    scale = rng.uniform(*options.guidance)
    contexts = torch.stack([base.null_context.float(), base.style_encoder(style)[0].float()])[:, None]
    contexts = contexts.expand(-1, 3, -1, -1)
    z = schedule.add_noise(latent.cpu().numpy(), rng.standard_normal(latent.shape, dtype=np.float32))
    for step in schedule.steps:
        with torch.autocast(base.device.type, torch.bfloat16):
            noisy, t = torch.from_numpy(z).to(base.device).expand(2, -1, -1, -1), torch.full((2,), step.t)
            eps = base.eps(noisy, t.to(base.device), contexts, edges.expand(2, -1, -1, -1))
            null, own = eps.float().cpu().numpy()
        z = solver.step((null + scale * (own - null))[None], step.index, z)
    return torch.from_numpy(z)


def build_sampled_latents(base: Base, paths: list[Path], out: Path, options: SampledLatentsOptions) -> None:
    """Write the cache file `out`: ``latents`` [N, 4, n, n] fp16 and ``pictures`` [N, 8n, 8n, 3] uint8.

    Args:
        base: samples, where it is; with a style encoder.
        paths: training pictures; unreadable ones and those that hold no window are left out.
        out: a safetensors file, replaced whole.
    """
    rng, began = np.random.default_rng(options.seed), time.monotonic()
    n = options.side
    latents: list[npt.NDArray[np.float16]] = []
    pictures: list[npt.NDArray[np.uint8]] = []
    for path in tqdm([paths[i] for i in rng.permutation(len(paths))[: options.count]], desc="sample", unit="picture"):
        if latents and options.seconds is not None and time.monotonic() - began > options.seconds:
            break
        rgb = read_fitted(path)
        if rgb is None:
            continue
        image = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            image = image.to(base.device, memory_format=torch.channels_last)
            whole = base.encode(image)[0] * base.config.latent_scale
        room = np.array(whole.shape[2:]) - n + 1
        if room.min() < 1:
            continue
        (y, x), (v, u) = rng.integers(0, room), rng.integers(0, room)
        edges = canny_edges(rgb)[8 * y : 8 * (y + n), 8 * x : 8 * (x + n)]
        planes = torch.from_numpy(edges.astype(np.float32)).to(base.device)[None, None].expand(-1, 3, -1, -1)
        own = whole[..., y : y + n, x : x + n].contiguous()
        sampled = sample_window(base, own, planes, whole[..., v : v + n, u : u + n], rng, options)
        latents.append(sampled[0].numpy().astype(np.float16))
        pictures.append(rgb[8 * y : 8 * (y + n), 8 * x : 8 * (x + n)])
    if not latents:
        raise TrainingError(f"found no readable picture that holds {8 * n} pixels squared; expected some")
    with replace_file(out) as handle:
        handle.write(save({"latents": np.stack(latents), "pictures": np.stack(pictures)}))


class SampledLatents:
    """The cache on disk, cut into random crops."""

    def __init__(self, path: Path) -> None:
        """Open the cache of `build_sampled_latents`."""
        with safe_open(str(path), "numpy") as file:
            self._latents: npt.NDArray[np.float16] = file.get_tensor("latents")
            self._pictures: npt.NDArray[np.uint8] = file.get_tensor("pictures")

    def __len__(self) -> int:
        return len(self._latents)

    def batch(self, count: int, side: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` crops: latents [B, 4, side/8, side/8] and their pictures [B, 3, side, side] in [-1, 1]."""
        n = side // 8
        latents, pictures = [], []
        for index in rng.integers(len(self), size=count):
            y, x = rng.integers(0, self._latents.shape[2] - n + 1, 2)
            latents.append(self._latents[index, :, y : y + n, x : x + n])
            pictures.append(self._pictures[index, 8 * y : 8 * (y + n), 8 * x : 8 * (x + n)])
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.from_numpy(np.stack(latents).astype(np.float32)), images
