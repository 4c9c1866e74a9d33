from __future__ import annotations

import pytest
import torch

from lsast_engines.bundle.style import Style
from lsast_train.base.base import Base
from lsast_train.base.kv_packing import kv_layouts


@pytest.fixture
def prompts(base: Base) -> torch.Tensor:
    """[10, 3, tokens, dim]: random prompts."""
    generator = torch.Generator().manual_seed(0)
    return base.null_context + torch.randn(10, 3, base.config.tokens, base.context_dim, generator=generator)


@pytest.fixture
def source(base: Base, prompts: torch.Tensor) -> Style:
    """The style of `prompts`."""
    with torch.no_grad():
        kv_unet, kv_control = (layout.project(prompts).numpy() for layout in kv_layouts(base))
    return Style("hand", base.fingerprint, 10, base.config.tokens, kv_unet, kv_control)
