"""The style that is distilled, from a style file or a prompt file, and what is trained of it: its keys and values."""

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.manifest import MANIFEST
from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, Style
from lsast_engines.errors import StyleError

from ..base.attention import cross_attention_layers, project_contexts
from ..base.base import Base
from ..base.projection import GROUPS
from ..prompts.prompt_file import check_fingerprint, find_prompts, load_prompts


class Student(nn.Module):
    """Keys and values init + scale · delta, of which delta is trained; those of ControlNet stay: they have no guidance.

    The scale is the root mean square of each layer's keys or values, so that one learning rate suits all layers.
    """

    init: torch.Tensor
    control: torch.Tensor
    scale: torch.Tensor

    def __init__(self, style: Style, unet: nn.Module) -> None:
        super().__init__()
        kv_unet = torch.from_numpy(style.kv_unet)
        self.register_buffer("init", kv_unet.clone())
        self.register_buffer("control", torch.from_numpy(style.kv_control), persistent=False)
        widths = [layer.width for layer in cross_attention_layers(unet) for _ in ("key", "value")]
        parts = kv_unet.split(widths, dim=2)
        scale = torch.cat([part.square().mean().sqrt().expand(part.shape[2]) for part in parts])
        self.register_buffer("scale", scale, persistent=False)
        self.delta = nn.ParameterList(torch.zeros_like(rows) for rows in kv_unet)

    def rows(self, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of U-Net [T, Wu] and ControlNet [T, Wc] in this stage."""
        return self.init[stage] + self.scale * self.delta[stage], self.control[stage]


def read_style(name_or_path: str, base: Base, folder: Path | None = None) -> Style:
    """The style of a file; else that of the name in the bundle `folder` of `base`; else of what `find_prompts` finds.

    `StyleError` if there is none, or it is damaged, of another base, or its guidance is distilled already.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        bundle = folder is not None and (folder / MANIFEST).is_file()
        styles = Bundle.open(folder, verify_hashes=False).styles() if folder is not None and bundle else {}
        try:
            path = styles.get(name_or_path) or find_prompts(name_or_path, folder)
        except StyleError as error:
            raise StyleError(f"{error}; or a style of the base: {', '.join(styles) or 'it has none'}") from None
    if path.name.endswith(".prompts.safetensors"):
        found = load_prompts(path, base)
        kv_unet, kv_control = (_project(net, found.prompts).numpy() for net in (base.unet, base.controlnet))
        meta = {**{key: str(getattr(found, key)) for key in ("variant", "layout", "prompt")}, **found.meta}
        return Style(found.name, base.fingerprint, len(kv_unet), kv_unet.shape[1], kv_unet, kv_control, meta)
    style = Style.load(path)
    check_fingerprint(style.base, f"style file {path}", base.config.name, base.fingerprint, base.config.training)
    if (scale := style.meta.get(DISTILLED_GUIDANCE_KEY)) is not None:
        raise StyleError(f"{path} has distilled guidance {scale} already; expected the style it was distilled from")
    return style


def null_rows(base: Base) -> torch.Tensor:
    """Keys and values [T, Wu] of the base's null context in the U-Net, on the CPU."""
    context = base.null_context.float().expand(1, len(GROUPS), -1, -1)
    return _project(base.unet, context)[0]


@torch.no_grad()
def _project(network: UNet2DConditionModel | ControlNetModel, prompts: torch.Tensor) -> torch.Tensor:
    return project_contexts(network, prompts.to(network.device, network.dtype)).float().cpu()
