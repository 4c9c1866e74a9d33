"""The prompts that a style is baked from: where they lie, which base they belong to, which defaults they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsast_engines.bundle.bundle import PROMPTS
from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, decode_defaults, encode_defaults
from lsast_engines.errors import StyleError, UsageError
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import LazyBase
from lsast_train.prompts.prompt_file import Prompts, UnboundPrompts, load_any_prompts
from lsast_train.prompts.text_encoder import PlaceholderEncoder

EXPORTED_FROM = "exported_from"
"""Key among the training facts of a base: fingerprints, separated by blanks, of the bases that it was rounded from."""


def find_prompts(name_or_path: str, bundle: Path | None = None) -> Path:
    """The prompt file of a style.

    It is a file; or ``runs/NAME/NAME.prompts.safetensors``, as `lsast-train` writes it; or a file of that name in the
    folder ``prompts`` of `bundle`.

    Raises:
        StyleError: there is none of these.
    """
    given, name = Path(name_or_path).expanduser(), f"{name_or_path}.prompts.safetensors"
    paths = [given, Path("runs", name_or_path, name), *([] if bundle is None else [bundle / PROMPTS / name])]
    for path in paths:
        if path.is_file():
            return path
    raise StyleError(
        f"found no prompts at {' or '.join(map(str, paths))}; expected a file NAME.prompts.safetensors: "
        "learn them with lsast-train --style NAME --images DIR, or name the file"
    )


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


def read_prompts(
    names_or_paths: Sequence[str], base: Base | LazyBase | None = None, bundle: Path | None = None
) -> list[Prompts]:
    """The prompts of all named styles.

    Args:
        names_or_paths: as `find_prompts` takes them.
        base: its text encoder binds embeddings that are bound to no base yet.
        bundle: the bundle whose prompts are found by name.

    Raises:
        StyleError: prompts that are missing, damaged or named twice, or bound to no base without a `base` that has a
            text encoder.
    """
    styles = [load_any_prompts(find_prompts(name, bundle)) for name in names_or_paths]
    names = [prompts.name for prompts in styles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StyleError(f"found more than one style named {', '.join(twice)}; expected different names")
    return [prompts if isinstance(prompts, Prompts) else bind_prompts(prompts, base) for prompts in styles]


def bind_prompts(prompts: UnboundPrompts, base: Base | LazyBase | None) -> Prompts:
    """The prompts that the text encoder of `base` makes of embeddings.

    Raises:
        StyleError: no base, one without a text encoder (a bundle has none), or one for other embeddings.
    """
    encoder = text_encoder_of(base)
    if encoder is None or base is None:
        found = "no base" if base is None else f"base {base.config.name!r} without one (no bundle has one)"
        raise StyleError(
            f"the embeddings of {prompts.name!r} need a text encoder; found {found}. Bind them to the base that the "
            "bundle comes from: lsast-export import FILE --base BASE"
        )
    return prompts.bind(encoder, base.fingerprint)


def text_encoder_of(base: Base | LazyBase | None) -> PlaceholderEncoder | None:
    """The text encoder of a base, None if it has none. Of `LazyBase` nothing else is loaded."""
    if isinstance(base, LazyBase):
        return PlaceholderEncoder(base.load("text_encoder")) if "text_encoder" in base.networks else None
    return None if base is None or base.text_encoder is None else PlaceholderEncoder(base.text_encoder)


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


def check_prompts(prompts: Prompts, base: str, fingerprint: str, origins: str) -> None:
    """Refuse prompts that were learned on another base.

    Args:
        prompts: of a style.
        base: name of the base to bake for.
        fingerprint: its fingerprint.
        origins: what it says under `EXPORTED_FROM`: prompts learned on the base before its weights were rounded fit.

    Raises:
        StyleError: another base.
    """
    if prompts.base not in (fingerprint, *origins.split()):
        raise StyleError(
            f"style {prompts.name!r} was learned on base {prompts.base[:12]}…; the base {base!r} is "
            f"{fingerprint[:12]}…: train it again on this base, or name the base that it was trained on with --base"
        )
