"""What a distillation leaves: its files, and an ordinary style that says what is baked into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lsast_engines.bundle.style import DISTILLED_GUIDANCE_KEY, decode_defaults, encode_defaults
from lsast_engines.errors import UsageError, fault_list

from ..base.base import Base
from ..inversion import versions
from ..prompts.prompt_file import Prompts, save_prompts
from ..prompts.prompt_space import matrix_table
from .options import DistilOptions
from .source_style import SourceStyle, style_of
from .student import KeyValueStudent, PromptStudent

KIND = ("variant", "generator", "layout", "gradient", "prompt")
"""Facts that a prompt file says of itself, and baking writes from there."""


@dataclass(frozen=True)
class DistilFiles:
    """Where a distillation writes: one folder, under the new style's name."""

    folder: Path
    name: str
    kind: str

    @property
    def result(self) -> Path:
        """The style file, or the prompt file."""
        return self.folder / f"{self.name}{'.prompts' if self.kind == 'prompts' else ''}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """There only while a run is unfinished."""
        return self.folder / f"{self.name}.checkpoint.safetensors"

    @property
    def lessons(self) -> Path:
        """The teacher's states, there while a run is unfinished."""
        return self.folder / f"{self.name}.lessons.safetensors"

    @property
    def curve(self) -> Path:
        """The errors as JSON; the picture has the suffix ``.png``."""
        return self.folder / f"{self.name}.curve.json"


@dataclass(frozen=True)
class DistilOutcome:
    """What a finished distillation gives."""

    style: Path
    curve: Path
    steps: int
    best_step: int
    """Step of what was kept."""
    relative: float
    """Held-out ‖student - teacher‖ / ‖unguided - teacher‖, stage by stage, then averaged; 1 is nothing learnt."""
    seconds: float
    """Wall time of training, including that of the parts before a resume; without the teacher's."""


def distilled_meta(
    style: SourceStyle, options: DistilOptions, relative: float, step: int, pictures: str
) -> dict[str, str]:
    """The facts of a distilled style: those of the original, with the guidance baked in instead of asked for.

    Raises:
        UsageError: defaults of the original that cannot be meant.
    """
    defaults, faults = decode_defaults(style.meta)
    if faults:
        raise UsageError(fault_list(f"style {style.name!r} has defaults that cannot be meant:", faults))
    defaults.pop("guidance", None)
    if options.student_steps:
        defaults |= {"steps": options.student_steps, "strength": options.strength, "solver": options.solver}
    kept = {key: value for key, value in style.meta.items() if key != "defaults"}
    return {
        **kept,
        **encode_defaults(defaults),
        DISTILLED_GUIDANCE_KEY: f"{options.guidance:g}",
        "distilled_from": style.name,
        "distil_options": json.dumps(asdict(options), sort_keys=True),
        "distil_pictures_sha256": pictures,
        "distil_step": str(step),
        "distil_relative_error": f"{relative:.6f}",
        "distil_versions": json.dumps(versions()),
    }


def write_distilled(
    student: KeyValueStudent | PromptStudent,
    style: SourceStyle,
    base: Base,
    files: DistilFiles,
    meta: Mapping[str, str],
) -> None:
    """Write the style file, or the prompt file, of `student`, which was made from `style`."""
    if isinstance(student, KeyValueStudent):
        style_of(style, base, files.name, student.kv_unet(), meta).save(files.result)
        return
    prompts = student.prompts().cpu()
    matrices = prompts.flatten(0, 1).clone()
    assert torch.equal(matrices[matrix_table("step+layer", stages=len(prompts))], prompts), "3s + l"
    facts = {key: value for key, value in meta.items() if key not in KIND}
    made = Prompts(
        files.name, base.fingerprint, "step+layer", "direct", "strided", "all", prompts, matrices, meta=facts
    )
    save_prompts(made, files.result)
