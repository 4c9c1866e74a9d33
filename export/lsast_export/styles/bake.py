"""Baking: prompts become keys and values, which are all that the runtime reads of them.

A cross-attention uses its context c only as K = W_k c and V = W_v c. Both depend on the style and the stage, not on
the picture or the step, so a style *is* its keys and values, packed as `lsast_train.base.projection` says. In the
order of this file: a style's prompts are read, checked, projected and written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from lsast_engines.bundle.bundle import Bundle, user_style_folder
from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import (
    DISTILLED_GUIDANCE_KEY,
    Style,
    StyleFile,
    decode_defaults,
    encode_defaults,
)
from lsast_engines.errors import StyleError, UsageError, fault_list
from lsast_engines.files import require_writable
from lsast_train.base.projection import GROUPS, project_kv
from lsast_train.prompts.prompt_file import Prompts, check_fingerprint, find_prompts, load_prompts

if TYPE_CHECKING:
    from lsast_train.base.base import Base
    from lsast_train.base.lazy_base import LazyBase

_log = logging.getLogger("lsast.export")

_NETWORKS = {"unet": "unet", "control": "controlnet"}
"""The prefix of a network's weights in ``base.safetensors``, by its name in the manifest."""


def find_distilled(name_or_path: str) -> Path | None:
    """The style file that `lsast-train distill` wrote, a file or ``runs/NAME/NAME.safetensors``; None without one.

    Prompts of that name, from which a style is baked, take precedence.
    """
    given = Path(name_or_path).expanduser()
    if given.is_file():
        return None if given.name.endswith(".prompts.safetensors") or given.suffix != ".safetensors" else given
    folder = Path("runs", name_or_path)
    run, prompts = folder / f"{name_or_path}.safetensors", folder / f"{name_or_path}.prompts.safetensors"
    return run if run.is_file() and not prompts.is_file() else None


def read_prompts(names_or_paths: Sequence[str], bundle: Path | None = None) -> list[Prompts]:
    """The prompts of all named styles.

    They are named as `find_prompts` takes them; those of `bundle` are found by name.

    Raises:
        StyleError: prompts that are missing, damaged or named twice.
    """
    styles = [load_prompts(find_prompts(name, bundle)) for name in names_or_paths]
    names = [prompts.name for prompts in styles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StyleError(f"found more than one style named {', '.join(twice)}; expected different names")
    return styles


def with_defaults(styles: Sequence[Prompts], defaults: Mapping[str, Mapping[str, Any]]) -> list[Prompts]:
    """`styles` with default options of their own, given by style name, in their `meta`.

    Raises:
        UsageError: defaults of a style that is not among `styles`, or invalid ones.
    """
    names = [prompts.name for prompts in styles]
    if strangers := sorted(set(defaults) - set(names)):
        raise UsageError(
            f"found defaults of {', '.join(strangers)}; expected those of a style that is baked here: "
            f"{', '.join(names) or 'none is'}"
        )
    distilled = [style.name for style in styles if DISTILLED_GUIDANCE_KEY in style.meta]
    if guided := [name for name in distilled if "guidance" in defaults.get(name, {})]:
        raise UsageError(f"found a default of guidance for {', '.join(guided)}; expected none: it was distilled")
    own = {style.name: decode_defaults(style.meta)[0] | dict(defaults.get(style.name, {})) for style in styles}
    return [replace(style, meta={**style.meta, **encode_defaults(own[style.name])}) for style in styles]


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
    def of_base(cls, base: Base, lazy: LazyBase | None = None) -> KVProjector:
        """Take them from the networks of `base`, or from `lazy`, whose networks `base` has on the meta device."""
        from lsast_train.base.attention import cross_attention_layers

        layers = (*cross_attention_layers(base.unet), *cross_attention_layers(base.controlnet))
        networks: dict[str, Mapping[str, torch.Tensor]] = {
            prefix: base.networks()[prefix].state_dict() if lazy is None else lazy.networks[prefix]().tensors
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

        def weight(layer: AttentionLayer, matrix: str) -> torch.Tensor:
            return self.weight(f"{_NETWORKS[layer.network]}.{layer.name}.{matrix}.weight").double()

        unet, control = (
            project_kv([e for e in self.layers if e.network == network], contexts.double(), weight).float()
            for network in _NETWORKS
        )
        return unet, control


def bake_style(
    projector: KVProjector, contexts: torch.Tensor, name: str, meta: Mapping[str, str] | None = None
) -> Style:
    """The style of the contexts of every stage and layer group.

    Args:
        contexts: [stages, 3, tokens, dim], groups in the order of `GROUPS`.
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
    """The style of the null context, row 0 of classifier-free guidance: one stage, one context for all layer groups."""
    contexts = projector.null_context.expand(1, len(GROUPS), *projector.null_context.shape)
    return bake_style(projector, contexts, "null")


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
        styles: prompts that were learned on its base.
        distilled: style files of `lsast-train distill`, which are only checked and copied.

    Returns:
        The style files by name; those of the same names are replaced.

    Raises:
        StyleError: a style that does not fit the bundle, or a damaged file. Then none is written.
        UsageError: a quantized bundle, or a folder that cannot be written.
    """
    manifest = bundle.manifest
    folder = user_style_folder(manifest.fingerprint)
    require_writable(folder)
    for prompts in styles:
        what = f"style {prompts.name!r}"
        check_fingerprint(prompts.base, what, manifest.name, manifest.fingerprint, manifest.source)
    projector = KVProjector.of_bundle(bundle) if styles else None
    made = [bake_prompts(projector, prompts) for prompts in styles if projector is not None]
    made += [StyleFile(path).load() for path in distilled]
    for style in made:
        bundle.check_style(style)
    for style in made[len(styles) :]:
        _warn_of_unlearned(style.name, style.meta)
    paths = {style.name: folder / f"{style.name}.safetensors" for style in made}
    for style in made:
        style.save(paths[style.name])
    return paths
