"""Styles from prompt files: finding them, making sure that they fit, and baking one for a bundle that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, Style, StyleFile, encode_defaults
from lsast_engines.errors import StyleError, UsageError
from lsast_train.base.base import Base, BaseParts, check_fingerprint
from lsast_train.prompts.prompt_file import Prompts, UnboundPrompts, load_any_prompts
from lsast_train.prompts.text_encoder import TextPath

from .bake import bake_style

EXPORTED_FROM = "exported_from"
"""Key in a base's training facts: fingerprints, separated by blanks, of the bases it is a rounding of."""


def find_prompts(name_or_path: str) -> Path:
    """The prompt file of a style: a file, or ``runs/NAME/NAME.prompts.safetensors`` as `lsast-train` writes it.

    Raises:
        StyleError: it is at neither place.
    """
    given = Path(name_or_path).expanduser()
    run = Path("runs", name_or_path, f"{name_or_path}.prompts.safetensors")
    for path in (given, run):
        if path.is_file():
            return path
    raise StyleError(
        f"found no prompts at {given} or {run}; expected a file NAME.prompts.safetensors: "
        "learn them with lsast-train --style NAME --images DIR, or name the file"
    )


def find_distilled(name_or_path: str) -> Path | None:
    """The style file that `lsast-train distil` wrote: a file, or ``runs/NAME/NAME.safetensors``; None if there is none.

    Prompts of that name, from which a style is baked, go before.
    """
    given = Path(name_or_path).expanduser()
    if given.is_file():
        return None if given.name.endswith(".prompts.safetensors") or given.suffix != ".safetensors" else given
    folder = Path("runs", name_or_path)
    run, prompts = folder / f"{name_or_path}.safetensors", folder / f"{name_or_path}.prompts.safetensors"
    return run if run.is_file() and not prompts.is_file() else None


def install_distilled(bundle: Bundle, file: Path) -> Path:
    """Put a style file of `lsast-train distil` where the runtime of `bundle` finds it, in the user's folder.

    Returns:
        The style file there; one of the same name is replaced.

    Raises:
        StyleError: a damaged file, or a style that does not fit the bundle.
    """
    style = StyleFile(file).load()
    bundle.check_style(style)
    path = bundle.user_style_folder / f"{style.name}.safetensors"
    style.save(path)
    return path


def check_prompts(prompts: Prompts, base: Base | BaseParts) -> None:
    """Refuse prompts that were learned on another base than `base` or one that it is a rounding of.

    Raises:
        StyleError: another base.
    """
    if prompts.base not in base.facts.training.get(EXPORTED_FROM, "").split():
        check_fingerprint(prompts.base, base, f"style {prompts.name}")


def bake_prompts(base: Base, prompts: Prompts) -> Style:
    """The style of `prompts` for `base`, with how they were learned among its facts."""
    kind = {name: str(getattr(prompts, name)) for name in ("variant", "generator", "prompt", "layout", "gradient")}
    return bake_style(base, prompts.prompts, prompts.name, {**kind, **prompts.meta})


def install_style(bundle: Bundle, base: Base, prompts: Prompts) -> Path:
    """Bake `prompts` for `bundle` and put the style where its runtime finds it, in the user's folder.

    Args:
        bundle: the bundle.
        base: its base, as `load_base` gives it.
        prompts: learned on that base.

    Returns:
        The style file; one of the same name is replaced.

    Raises:
        StyleError: prompts that do not fit the bundle.
    """
    check_prompts(prompts, base)
    style = bake_prompts(base, prompts)
    bundle.check_style(style)
    path = bundle.user_style_folder / f"{style.name}.safetensors"
    style.save(path)
    return path


def with_defaults(styles: Sequence[Prompts], defaults: Mapping[str, Mapping[str, Any]]) -> list[Prompts]:
    """`styles` with what they ask for unless told otherwise, by name, among their facts.

    Raises:
        UsageError: defaults of a style that is not among `styles`, or that cannot be meant.
    """
    names = [prompts.name for prompts in styles]
    if strangers := sorted(set(defaults) - set(names)):
        raise UsageError(
            f"found defaults of {', '.join(strangers)}; expected those of a style that is baked here: "
            f"{', '.join(names) or 'none is'}"
        )
    if guided := [
        p.name for p in styles if DISTILLED_GUIDANCE_KEY in p.meta and "guidance" in defaults.get(p.name, {})
    ]:
        raise UsageError(f"found a default of guidance for {', '.join(guided)}; expected none: it is baked in")
    return [
        replace(prompts, meta={**prompts.meta, **encode_defaults(defaults.get(prompts.name, {}))}) for prompts in styles
    ]


def read_prompts(names_or_paths: tuple[str, ...], base: Base | BaseParts | None = None) -> list[Prompts]:
    """The prompts of all named styles.

    Args:
        names_or_paths: as `find_prompts` takes them.
        base: binds embeddings that are bound to no base yet, with its text encoder.

    Raises:
        StyleError: one that is not there, damaged, or named twice; one that is bound to no base without a `base` that
            has a text encoder.
    """
    styles = [load_any_prompts(find_prompts(name)) for name in names_or_paths]
    names = [prompts.name for prompts in styles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StyleError(f"found more than one style named {', '.join(twice)}; expected different names")
    return [prompts if isinstance(prompts, Prompts) else bind_prompts(prompts, base) for prompts in styles]


def bind_prompts(prompts: UnboundPrompts, base: Base | BaseParts | None) -> Prompts:
    """`prompts` as the text encoder of `base` resolves them.

    Raises:
        StyleError: no base, one without a text encoder (a bundle has none), or one that takes other embeddings.
    """
    text = text_path(base)
    if text is None or base is None:
        found = "no base" if base is None else f"base {base.facts.name!r} without one (no bundle has one)"
        raise StyleError(
            f"the embeddings of {prompts.name!r} need a text encoder; found {found}. Bind them to the base that the "
            "bundle comes from: lsast-export import FILE --base BASE"
        )
    return prompts.bind(text, base.fingerprint)


def text_path(base: Base | BaseParts | None) -> TextPath | None:
    """The text path of a base; None if it has no text encoder. Of `BaseParts` nothing else is loaded."""
    if isinstance(base, BaseParts):
        return TextPath(base.load("text_encoder")) if "text_encoder" in base.networks else None
    return None if base is None or base.text_encoder is None else TextPath(base.text_encoder)
