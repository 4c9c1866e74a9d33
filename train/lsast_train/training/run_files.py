"""The files of a run, whether it can begin, and the result of a finished one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lsast_engines.bundle.style import style_name_faults
from lsast_engines.environment import package_version
from lsast_engines.errors import TrainingError, UsageError, fault_list
from lsast_engines.files import require_writable


@dataclass(frozen=True)
class RunFiles:
    """Where a run writes: one folder, under the style's name."""

    folder: Path
    name: str
    prompts: bool = True
    """Whether the result is a prompt file, or else a style file."""

    @property
    def result(self) -> Path:
        """The prompt file or style file."""
        return self.folder / f"{self.name}{'.prompts' * self.prompts}.safetensors"

    @property
    def checkpoint(self) -> Path:
        """There only while a run is unfinished."""
        return self.folder / f"{self.name}.checkpoint.safetensors"

    @property
    def curve(self) -> Path:
        """The losses as JSON; the picture has the suffix ``.png``."""
        return self.folder / f"{self.name}.curve.json"


def require_run(files: RunFiles, size: int, multiple: int, resume: bool, overwrite: bool = True) -> None:
    """Refuse a run that cannot begin.

    Args:
        size: side of its pictures in pixels.
        multiple: the base's sides are multiples of it.
        resume: whether it goes on from a checkpoint.
        overwrite: whether it may replace the result of a finished run, if it does not go on.

    Raises:
        UsageError: a name that is no file name, or a size that the base cannot take; all faults at once. Or a folder
            that cannot be written.
        TrainingError: a checkpoint that is missing, or in the way; a result that is not to be replaced.
    """
    faults = style_name_faults(files.name)
    if size % multiple:
        faults.append(f"size: found {size}; expected a multiple of {multiple} for this base")
    if faults:
        raise UsageError(fault_list("invalid options:", faults))
    path = files.checkpoint
    if resume and not path.exists():
        raise TrainingError(f"found no checkpoint {path}; start without --resume")
    if path.exists() and not resume:
        raise TrainingError(f"found the checkpoint of an unfinished run, {path}; go on with --resume, or delete it")
    if not (resume or overwrite) and files.result.exists():
        raise TrainingError(
            f"found a finished training, {files.result}; name another folder with --out, or train again with "
            "--overwrite"
        )
    require_writable(files.folder)


@dataclass(frozen=True)
class RunResult:
    """The result of a finished run."""

    file: Path
    """The prompt file or style file."""
    curve: Path
    steps: int
    best_step: int
    """Step of the evaluation with the lowest held-out loss, whose values were kept."""
    relative_loss: float
    """Its held-out loss relative to the start: to the initial prompts, or to the style without guidance."""
    seconds: float
    """Wall time of the steps, including those before a resume."""


def versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    return {name: package_version(name) for name in ("lsast", "torch", "diffusers")}
