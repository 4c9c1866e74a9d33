"""Nodes for ComfyUI: load a bundle, mix styles, stylize.

    pip install 'lsast[cpu]'                          # in ComfyUI's environment
    ln -s "$PWD/examples/comfyui" ComfyUI/custom_nodes/lsast

ComfyUI's IMAGE is a float tensor [B, H, W, 3] in 0…1, its MASK one of [B, H, W]. A style is a text of the grammar of
mixes (`vangogh:0.6+monet@up`), so that mixes can be mixed again.
"""

from typing import Any

import numpy as np

import lsast
from lsast.options import style_mix
from lsast_engines.bundle.bundle import Bundle, find_bundle

CATEGORY = "lsast"


class LoadBundle:
    """Opens a bundle; its engines stay open as long as ComfyUI keeps the node's output."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", ("LSAST",), ("stylizer",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "bundle": ("STRING", {"default": "", "tooltip": "Folder or name; empty is the embedded bundle."}),
                "backend": (["auto", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"],),
                "device": ("STRING", {"default": "auto"}),
            }
        }

    def load(self, bundle: str, backend: str, device: str) -> tuple[lsast.Stylizer]:
        """The open bundle."""
        return (lsast.load(bundle or None, backend=backend, device=device),)


class Mix:
    """Two styles, or mixes, joined by weight."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "mix", ("STRING",), ("style",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The inputs, as ComfyUI asks for them."""
        share = {"default": 0.5, "min": 0.01, "max": 0.99, "step": 0.01, "tooltip": "Weight of the first style."}
        return {"required": {"first": _style(), "second": _style(), "share": ("FLOAT", share)}}

    def mix(self, first: str, second: str, share: float) -> tuple[str]:
        """The mix as a text."""
        return (f"{_weighed(first, share)}+{_weighed(second, 1 - share)}",)


class Stylize:
    """Repaints images; a batch of them is painted in batches."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "stylize", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The inputs, as ComfyUI asks for them."""
        return {
            "required": {
                "stylizer": ("LSAST",),
                "image": ("IMAGE",),
                "style": _style(),
                "strength": ("FLOAT", {"default": 0.9, "min": 0.05, "max": 1.0, "step": 0.05}),
                "size": ("INT", {"default": 512, "min": 0, "max": 8192, "step": 64}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
            },
            "optional": {"mask": ("MASK",)},
        }

    def stylize(
        self, stylizer: lsast.Stylizer, image: Any, style: str, strength: float, size: int, seed: int, mask: Any = None
    ) -> tuple[Any]:
        """The paintings, in the form of the images."""
        import torch  # noqa: TID251  # ComfyUI has it

        pictures = [np.clip(np.asarray(one.cpu(), np.float32), 0, 1) for one in image]
        rows = [{"mask": _mask(mask, index)} if mask is not None else {} for index in range(len(pictures))]
        results = stylizer.stylize_many(pictures, style, rows=rows, strength=strength, size=size, seed=seed)
        painted = np.stack([np.asarray(result.image.convert("RGB"), np.float32) / 255 for result in results])
        return (torch.from_numpy(painted),)


def _mask(mask: Any, index: int) -> np.ndarray:
    return np.asarray(mask[index % len(mask)].cpu(), np.float32).clip(0, 1)


def _style() -> tuple[str, dict[str, Any]]:
    styles = list(Bundle.open(find_bundle(), verify_hashes=False).styles())
    return "STRING", {
        "default": styles[0],
        "tooltip": f"A mix such as vangogh:0.6+monet:0.4, or a style: {', '.join(styles)}",
    }


def _weighed(mix: str, share: float) -> str:
    """The mix with weights that sum to `share`."""
    terms = style_mix.Mix.parse(mix).terms
    total = sum(term.weight for term in terms)
    return "+".join(
        f"{term.style}:{term.weight / total * share:g}"
        + (f"@{term.group}" if term.group else "")
        + ("@{}-{}".format(*term.stages) if term.stages else "")
        for term in terms
    )


NODE_CLASS_MAPPINGS = {"LsastLoadBundle": LoadBundle, "LsastMix": Mix, "LsastStylize": Stylize}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LsastLoadBundle": "Load bundle (lsast)",
    "LsastMix": "Mix styles (lsast)",
    "LsastStylize": "Stylize (lsast)",
}
