"""Baking: prompts become keys and values, which are all that the runtime reads of them.

A cross-attention uses its context c only as K = W_k c and V = W_v c. Both depend on the style and the stage, not on
the picture or the step, so a style *is* its keys and values, packed as `lsast_train.base.kv_packing` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lsast_engines.bundle.bundle import Bundle, user_style_folder
from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import Style, StyleFile
from lsast_engines.errors import StyleError, UsageError, fault_list
from lsast_train.base.attention import GROUPS
from lsast_train.base.base import Base
from lsast_train.base.kv_packing import kv_layouts, project_kv
from lsast_train.base.lazy_base import LazyBase
from lsast_train.prompts.prompt_file import Prompts

from .prompts import EXPORTED_FROM, check_prompts

_log = logging.getLogger("lsast.export")

NULL_STYLE = "null"
"""Name of the unconditional style, row 0 of classifier-free guidance."""

_NETWORKS = {"unet": "unet", "control": "controlnet"}
"""The prefix of a network's weights in ``base.safetensors``, by its name in the manifest."""


@dataclass(frozen=True, eq=False)
class KVProjector:
    """The matrices W_k and W_v of every cross-attention of a base. They are read one at a time."""

    fingerprint: str
    """Of the base; styles are bound to it."""
    layers: tuple[AttentionLayer, ...]
    null_context: torch.Tensor
    """[tokens, dim] float32: the unconditional context."""
    weight: Callable[[str], torch.Tensor]
    """A weight by its name in ``base.safetensors``."""

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> KVProjector:
        """Read from the files of a bundle; no network is built.

        Raises:
            UsageError: a quantized bundle, which does not hold them.
        """
        try:
            file = safe_open(str(bundle.path / "base.safetensors"), "pt")
            null_context = file.get_tensor("null_context").float()
        except (OSError, SafetensorError) as error:
            made_from = bundle.manifest.source.get("quantized_from", "the bundle that it was made from")
            raise UsageError(
                f"{bundle.path} holds no weights to bake with ({error}); expected {made_from}: its styles fit both"
            ) from error
        return cls(bundle.manifest.fingerprint, bundle.manifest.attention_layers, null_context, file.get_tensor)

    @classmethod
    def of_base(cls, base: Base, parts: LazyBase | None = None) -> KVProjector:
        """Take them from the networks of `base`, or from `parts`, whose networks `base` has on the meta device."""
        layers = tuple(entry for layout in kv_layouts(base) for entry in layout.entries)
        networks: dict[str, Mapping[str, torch.Tensor]] = {
            prefix: base.networks()[prefix].state_dict() if parts is None else parts.networks[prefix]().tensors
            for prefix in _NETWORKS.values()
        }

        def weight(name: str) -> torch.Tensor:
            prefix, _, key = name.partition(".")
            return networks[prefix][key]

        return cls(base.fingerprint, layers, base.null_context.float(), weight)

    def __call__(self, contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed keys and values, float32, of the U-Net [N, T, Wu] and of the ControlNet [N, T, Wc].

        They are computed in float64, so that they do not depend on the order in which a machine sums: equal prompts
        give equal styles.

        Args:
            contexts: [N, 3, T, dim], one for each layer group in the order of `GROUPS`.
        """
        unet, control = (
            project_kv([e for e in self.layers if e.network == network], contexts.double(), self._matrix).float()
            for network in _NETWORKS
        )
        return unet, control

    def _matrix(self, layer: AttentionLayer, matrix: str) -> torch.Tensor:
        return self.weight(f"{_NETWORKS[layer.network]}.{layer.name}.{matrix}.weight").double()


def bake_style(
    projector: KVProjector, contexts: torch.Tensor, name: str, meta: Mapping[str, str] | None = None
) -> Style:
    """The style of the contexts of every stage and layer group.

    Args:
        projector: of the base; the style is bound to its fingerprint.
        contexts: [stages, 3, tokens, dim], groups in the order of `GROUPS`.
        name: of the style.
        meta: licence, training facts, default options.

    Raises:
        StyleError: contexts of another shape, or not finite; all faults at once.
    """
    tokens, dim = projector.null_context.shape
    faults = []
    if contexts.ndim != 4 or tuple(contexts.shape[1:]) != (len(GROUPS), tokens, dim) or not len(contexts):
        faults.append(f"prompts: found shape {list(contexts.shape)}; expected [stages, {len(GROUPS)}, {tokens}, {dim}]")
    if not torch.isfinite(contexts).all():
        faults.append("prompts: found NaN or infinite values; train the style again")
    if faults:
        raise StyleError(fault_list(f"style {name!r} cannot be baked:", faults))
    with torch.no_grad():
        unet, control = (packed.numpy() for packed in projector(contexts))
    return Style(name, projector.fingerprint, len(contexts), tokens, unet, control, dict(meta or {}))


def bake_null_style(projector: KVProjector) -> Style:
    """The style of the null context: one stage, the same context for every layer group."""
    contexts = projector.null_context.expand(1, len(GROUPS), *projector.null_context.shape)
    return bake_style(projector, contexts, NULL_STYLE)


def bake_prompts(projector: KVProjector, prompts: Prompts) -> Style:
    """The style of `prompts`; its `meta` says how they were learned."""
    _warn_of_unlearned(prompts.name, prompts.meta)
    kind = {name: str(getattr(prompts, name)) for name in ("variant", "generator", "prompt", "layout", "gradient")}
    return bake_style(projector, prompts.prompts, prompts.name, {**kind, **prompts.meta})


def _warn_of_unlearned(name: str, meta: Mapping[str, str]) -> None:
    if meta.get("best_step") == "0":
        _log.warning(
            "style %r learned nothing: no step of its training lowered the held-out loss; train it again with another "
            "--lr, or with more pictures",
            name,
        )


def bake_for_bundle(bundle: Bundle, styles: Sequence[Prompts], distilled: Sequence[Path] = ()) -> dict[str, Path]:
    """Bake styles for a bundle, into the user's style folder, where the runtime finds them.

    Args:
        bundle: the bundle.
        styles: prompts that were learned on its base.
        distilled: style files of `lsast-train distill`, which are only checked and copied.

    Returns:
        The style files by name; those of the same names are replaced.

    Raises:
        StyleError: a style that does not fit the bundle, or a damaged file. Then none is written.
        UsageError: a quantized bundle.
    """
    manifest = bundle.manifest
    for prompts in styles:
        check_prompts(prompts, manifest.name, manifest.fingerprint, manifest.source.get(EXPORTED_FROM, ""))
    projector = KVProjector.of_bundle(bundle) if styles else None
    made = [bake_prompts(projector, prompts) for prompts in styles if projector is not None]
    made += [StyleFile(path).load() for path in distilled]
    for style in made:
        bundle.check_style(style)
    for style in made[len(styles) :]:
        _warn_of_unlearned(style.name, style.meta)
    folder = user_style_folder(manifest.fingerprint)
    paths = {style.name: folder / f"{style.name}.safetensors" for style in made}
    for style in made:
        style.save(paths[style.name])
    return paths
