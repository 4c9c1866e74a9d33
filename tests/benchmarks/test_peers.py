"""The peers of `benchmarks/speed/compare.py` do the work that they claim to: so many passes of each network a step."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_train.base.base import Base


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return importlib.import_module("benchmarks.speed.peers")


def _batches(network: Any) -> list[int]:
    """Filled with the batch of every pass of `network`."""
    seen: list[int] = []
    network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["sample"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(("name", "control"), [("reference", 1), ("diffusers", 2)])
def test_peers_run_the_expected_passes(peers, name, control):
    base: Base = build_mini(MiniConfig.tiny())  # the pipeline changes its processors
    paint: Callable[[int], list[float]] = peers.PEERS[name](base, 64, torch.float32)
    unet, controlnet = _batches(base.unet), _batches(base.controlnet)
    with torch.inference_mode():
        ticks = paint(3)
        assert unet == [2, 2, 2]
        assert controlnet == [control] * 3
        assert len(ticks) == (3 if name == "reference" else 2)
        one, two = peers.counted(paint, 1), peers.counted(paint, 2)
    assert unet[3:] == [2, 2, 2]
    # A step is more than two passes of the U-Net alone, and what runs once a picture comes on top.
    with torch.inference_mode(), peers.FlopCounterMode(display=False) as counter:
        fresh = build_mini(MiniConfig.tiny())
        contexts = torch.zeros(2, 3, base.config.tokens, base.context_dim)
        fresh.eps(torch.zeros(2, 4, 8, 8), torch.tensor([1, 1]), contexts)
    assert counter.get_total_flops() // 2 < two - one < one
