"""The result of a distillation: an ordinary style with the guidance in its metadata."""

from __future__ import annotations

import json
from dataclasses import asdict

from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, Style, decode_defaults, encode_defaults
from lsast_engines.errors import UsageError, fault_list

from ..training.run import versions
from .options import DistillOptions
from .source_style import SourceStyle
from .student import Student


def distilled_meta(
    style: SourceStyle, options: DistillOptions, relative: float, step: int, pictures: str
) -> dict[str, str]:
    """The metadata of a distilled style: that of the original, whose default guidance is baked in instead.

    Raises:
        UsageError: invalid defaults of the original.
    """
    defaults, faults = decode_defaults(style.meta)
    if faults:
        raise UsageError(fault_list(f"style {style.name!r} has invalid defaults:", faults))
    defaults.pop("guidance", None)
    return {
        **{key: value for key, value in style.meta.items() if key != "defaults"},
        **encode_defaults(defaults),
        DISTILLED_GUIDANCE_KEY: f"{options.guidance:g}",
        "distilled_from": style.name,
        "distill_options": json.dumps(asdict(options), sort_keys=True),
        "distill_images_sha256": pictures,
        "distill_step": str(step),
        "distill_relative_error": f"{relative:.6f}",
        "distill_versions": json.dumps(versions()),
    }


def distilled_style(student: Student, source: SourceStyle, name: str, base: str, meta: dict[str, str]) -> Style:
    """The style `name` of the base with the fingerprint `base` that `student`, trained from `source`, has become."""
    kv_unet = student.kv_unet().cpu().numpy()
    return Style(name, base, len(kv_unet), kv_unet.shape[1], kv_unet, source.kv_control.numpy(), meta)
