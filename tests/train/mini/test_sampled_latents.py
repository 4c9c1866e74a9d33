"""Latents of the sampler, with a base that knows the noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lsast_engines.errors import TrainingError
from lsast_engines.images import find_pictures
from lsast_train.base.base import Base
from lsast_train.mini.architecture import MiniConfig, build_mini
from lsast_train.mini.sampled_latents import (
    SampledLatents,
    SampledLatentsOptions,
    build_sampled_latents,
    sample_window,
)

OPTIONS = SampledLatentsOptions(count=4, side=16)


class Oracle:
    """A base whose latents are mean colours of 8x8 pixels, and whose noise leads to a latent of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.base = build_mini(MiniConfig.tiny())
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(Base, "encode", lambda _, image: (self.encode(image), torch.zeros(1)))
        monkeypatch.setattr(Base, "eps", lambda _, *given: self.eps(*given))

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        mean = F.avg_pool2d(image, 8)
        return torch.cat([mean, mean[:, :1]], dim=1)

    def eps(self, noisy: torch.Tensor, t: torch.Tensor, contexts: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Leads to 0 with the null context and to 1 with the other."""
        self.calls.append({"t": int(t[0]), "contexts": contexts, "edges": edges})
        abar = self.base.alphas_cumprod[t].view(-1, 1, 1, 1)
        goal = torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1)
        return (noisy - abar.sqrt() * goal) / (1 - abar).sqrt()


def test_sampled_window_is_guided_from_the_timestep_down(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle, rng = Oracle(monkeypatch), np.random.default_rng(0)
    options = SampledLatentsOptions(timesteps=(500, 501), steps=(4, 4), guidance=(3.0, 3.0))
    latent, edges = torch.randn(1, 4, 16, 16), torch.ones(1, 3, 128, 128)
    found = sample_window(oracle.base, latent, edges, latent, rng, options)
    torch.testing.assert_close(
        found, torch.full_like(latent, 3.0), atol=0.3, rtol=0
    )  # 0 + 3 (1 - 0), and DDIM's last sigma
    steps = [call["t"] for call in oracle.calls]
    assert len(steps) == 4
    assert steps[0] == pytest.approx(375, abs=30)  # the noisiest of four steps of equal length below 500
    assert steps == sorted(steps, reverse=True)
    contexts = oracle.calls[0]["contexts"]
    torch.testing.assert_close(contexts[0], oracle.base.null_context.expand(3, -1, -1))
    assert torch.equal(oracle.calls[0]["edges"], edges.expand(2, -1, -1, -1))


def test_crops_of_latents_and_pictures_belong_together(
    monkeypatch: pytest.MonkeyPatch, picture_folders: list[Path], tmp_path: Path
) -> None:
    oracle = Oracle(monkeypatch)
    monkeypatch.setattr("lsast_train.mini.sampled_latents.sample_window", lambda base, latent, *rest: latent)
    paths = find_pictures(picture_folders[0])
    build_sampled_latents(oracle.base, paths, tmp_path / "s.safetensors", OPTIONS)
    cache = SampledLatents(tmp_path / "s.safetensors")
    assert len(cache) == 4
    latents, images = cache.batch(6, 64, np.random.default_rng(1))
    assert (latents.shape, images.shape) == ((6, 4, 8, 8), (6, 3, 64, 64))
    torch.testing.assert_close(oracle.encode(images), latents, atol=2e-3, rtol=0)
    with pytest.raises(TrainingError, match="found no readable picture"):
        build_sampled_latents(oracle.base, paths[:2], tmp_path / "x", SampledLatentsOptions(side=400))
