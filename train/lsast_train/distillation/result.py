"""The result of a distillation: an ordinary style, or prompts, with the guidance in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import torch

from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, Style, decode_defaults, encode_defaults
from lsast_engines.errors import UsageError, fault_list

from ..base.base import Base
from ..prompts.prompt_file import Prompts, save_prompts
from ..prompts.prompt_space import matrix_index
from ..training.run import RunFiles, versions
from .options import DistillOptions
from .source_style import SourceStyle
from .student import KeyValueStudent, PromptStudent

KIND = ("variant", "generator", "layout", "gradient", "prompt")
"""Metadata of a style that its prompt file has in the header."""


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
    if options.student_steps:
        defaults |= {"steps": options.student_steps, "strength": options.strength, "solver": options.solver}
    kept = {key: value for key, value in style.meta.items() if key != "defaults"}
    return {
        **kept,
        **encode_defaults(defaults),
        DISTILLED_GUIDANCE_KEY: f"{options.guidance:g}",
        "distilled_from": style.name,
        "distill_options": json.dumps(asdict(options), sort_keys=True),
        "distill_images_sha256": pictures,
        "distill_step": str(step),
        "distill_relative_error": f"{relative:.6f}",
        "distill_versions": json.dumps(versions()),
    }


def write_distilled(
    student: KeyValueStudent | PromptStudent,
    style: SourceStyle,
    base: Base,
    files: RunFiles,
    meta: Mapping[str, str],
) -> None:
    """Write the style file, or the prompt file, of `student`, which was trained from `style`."""
    if isinstance(student, KeyValueStudent):
        _style(style, base, files.name, student.kv_unet(), meta).save(files.result)
        return
    prompts = student.prompts().cpu()
    matrices = prompts.flatten(0, 1).clone()
    assert torch.equal(matrices[matrix_index("step+layer", stages=len(prompts))], prompts), "3s + l"
    kept = {key: value for key, value in meta.items() if key not in KIND}
    made = Prompts(files.name, base.fingerprint, "step+layer", "direct", "strided", "all", prompts, matrices, meta=kept)
    save_prompts(made, files.result)


def _style(source: SourceStyle, base: Base, name: str, kv_unet: torch.Tensor, meta: Mapping[str, str]) -> Style:
    """`source` with other keys and values of the U-Net."""
    return Style(
        *(name, base.fingerprint, source.stages, int(kv_unet.shape[1])),
        *(kv_unet.cpu().numpy(), source.kv_control.numpy()),
        dict(meta),
    )
