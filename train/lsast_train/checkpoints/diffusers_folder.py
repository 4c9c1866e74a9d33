"""A base, or a ControlNet, in diffusers' format: a folder for each network with its configuration and its weights.

It is a local folder, or a repository of the Hugging Face hub at a pinned revision.
"""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lsast_engines.diffusion import NoiseSchedule
from lsast_engines.errors import TrainingError, UsageError

from .inspection import BaseInspection, Part, UnetWeights
from .networks import Kind, clip_weights, diffusers_weights
from .weights import read_tensors

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""What diffusers calls the weights of a network."""

_NETWORKS: dict[Part, tuple[str, Kind | Literal["CLIPTextModel"], tuple[str, str]]] = {
    "unet": ("unet", "UNet2DConditionModel", FILES),
    "autoencoder": ("vae", "AutoencoderKL", FILES),
    "text_encoder": ("text_encoder", "CLIPTextModel", ("model.safetensors", "pytorch_model.bin")),
    "controlnet": ("controlnet", "ControlNetModel", FILES),
}
"""Folder of each network, its class in diffusers or transformers, and files of its weights."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BRANCHES = ("main", "master", "HEAD")
_MARKS, _NON_EMA = ("", ".fp16"), ".non_ema"
_log = logging.getLogger("lsast.base")


class Repository:
    """The files of a model by their path inside of its folder: a local folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        resolved = path.resolve()
        # The cache of the hub: models--OWNER--NAME/snapshots/REVISION.
        cached = resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--")
        self.name = resolved.parent.parent.name.rpartition("--")[2] if cached else resolved.name
        """The model's name in messages and in `BaseInspection.origin`; no path of this machine."""

    def first(self, *paths: str) -> Path | None:
        """The local file of the first of `paths` that is there; `TrainingError` if that cannot be found out."""
        return next((self.path / path for path in paths if (self.path / path).is_file()), None)


class HubRepository(Repository):
    """A repository of the hub. Files that were downloaded before are taken without asking the network."""

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision

    def first(self, *paths: str) -> Path | None:
        """See `Repository`."""
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        where = f"{self.name} at revision {self.revision}"
        try:
            for path in paths:
                found = huggingface_hub.try_to_load_from_cache(self.name, path, None, self.revision)
                if isinstance(found, str):
                    return Path(found)
            for path in paths:
                try:
                    return Path(huggingface_hub.hf_hub_download(self.name, path, revision=self.revision))
                except LocalEntryNotFoundError:  # no answer from the network
                    raise
                except EntryNotFoundError:
                    continue
        except LocalEntryNotFoundError as error:
            raise TrainingError(
                f"{where} is not in the cache and cannot be downloaded now ({error}); download it where there is a "
                f"network, with: hf download {self.name} --revision {self.revision} --local-dir FOLDER, and name "
                "FOLDER instead"
            ) from error
        # No such repository or revision, no permission, a broken connection: the library's message says which.
        except (OSError, ValueError) as error:
            raise TrainingError(f"{where} cannot be downloaded: {error}") from error
        return None


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME or OWNER/NAME@REVISION and is no local file or folder."""
    return _HUB_ID.fullmatch(name.partition("@")[0]) is not None and not Path(name).expanduser().exists()


def open_hub(name: str, revision: str | None) -> HubRepository:
    """The repository OWNER/NAME or OWNER/NAME@REVISION; `UsageError` without a revision, or for a branch."""
    owner, _, own = name.partition("@")
    pinned = own or revision
    if pinned is None or pinned in _BRANCHES:
        found = "no revision" if pinned is None else f"the branch {pinned!r}"
        raise UsageError(
            f"found no local file or folder {name!r}, and for the hub's {owner} {found}; expected a commit hash or tag "
            f"(--revision, or {owner}@REVISION): what a branch holds changes, and styles are bound to exact weights"
        )
    return HubRepository(owner, pinned)


def _weight_files(part: Part, marks: Sequence[str]) -> list[str]:
    """Names that a network's weights may have, most wanted first; those in ``.json`` are indices of shards. `marks` are
    of variants, e.g. ``.fp16`` for ``model.fp16.safetensors``."""
    found: list[str] = []
    for stem, _, ending in (name.rpartition(".") for name in _NETWORKS[part][2]):
        for mark in marks:
            indices = {f"{stem}{mark}.{ending}.index.json": None, f"{stem}.{ending}.index{mark}.json": None}
            found += [f"{stem}{mark}.{ending}", *indices]
    return found


def read_folder(repository: Repository, wanted: UnetWeights, own: Sequence[Part], found: BaseInspection) -> None:
    """Add the parts of the base in `repository` to `found`: those named in `own`."""
    found.origin["source"] = repository.name
    found.origin["unet_weights"] = "the folder's own" if wanted == "auto" else wanted
    non_ema = _weight_files("unet", [_NON_EMA])
    if wanted != "auto" and repository.first(*(f"unet/{name}" for name in non_ema)) is None:
        found.fail(
            "unet",
            f"found no {non_ema[0]}, without which a folder does not tell EMA from other weights; "
            f"expected it for --unet-weights {wanted}: take --unet-weights auto",
        )
    else:
        add_from(repository, "unet", found, marks=[_NON_EMA] if wanted == "non-ema" else _MARKS)
    if "autoencoder" in own:
        add_from(repository, "autoencoder", found)
    add_from(repository, "text_encoder", found)
    if "controlnet" in own and repository.first("controlnet/config.json") is not None:
        add_from(repository, "controlnet", found)
    if "unet" in found.configs:
        heads = found.configs["unet"]["attention_head_dim"]
        found.heads = heads if isinstance(heads, int) else found.heads
    _read_schedule(repository, found)


def add_from(
    repository: Repository, part: Part, found: BaseInspection, *, root: bool = False, marks: Sequence[str] = _MARKS
) -> None:
    """Add a network to `found`, if it is in its folder of `repository`, or in the `root`."""
    folder, kind, _ = _NETWORKS[part]
    prefix, names = "" if root else f"{folder}/", _weight_files(part, marks)
    config_file = repository.first(f"{prefix}config.json")
    weights_file = repository.first(*(prefix + name for name in names))
    if config_file is None and weights_file is None:
        return
    if config_file is None or weights_file is None:
        missing = "config.json" if config_file is None else f"weights ({names[0]} or the like)"
        found.fail(part, f"found no {prefix}{missing} in {repository.name}; expected it")
        return
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        found.fail(part, f"{prefix}config.json of {repository.name} cannot be read ({error})")
        return
    named = config.get("_class_name") or next(iter(config.get("architectures") or ()), kind)
    if named not in (kind, f"{kind}WithProjection"):
        found.fail(part, f"found a {named}; expected a {kind}")
        return
    if config.get("quantization_config"):
        found.fail(part, "found quantized weights (quantization_config); expected fp32, fp16 or bf16")
        return
    _log.info("%s: %s of %s", part, weights_file.name, repository.name)
    if kind == "CLIPTextModel":
        found.add(part, lambda: clip_weights(_shards(repository, prefix, weights_file), config))
    else:
        found.add(part, lambda: diffusers_weights(kind, _shards(repository, prefix, weights_file), config))


def _shards(repository: Repository, prefix: str, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of `file`, or of all files that it lists if it is an index."""
    if file.suffix != ".json":
        return read_tensors(file)
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"{file.name} is no index of shards ({error})") from error
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise TrainingError(f"{file.name} lists {name!r}; expected the names of files beside it")
        shard = repository.first(prefix + name)
        if shard is None:
            raise TrainingError(f"{file.name} lists {name}, which is not there")
        tensors |= read_tensors(shard)
    return tensors


def _read_schedule(repository: Repository, found: BaseInspection) -> None:
    file = repository.first("scheduler/scheduler_config.json")
    if file is None:
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if re.match("Flow|EDM", kind := str(config.get("_class_name") or "")):
            found.fail("scheduler", f"found {kind}; expected a schedule of betas, such as DDIMScheduler's")
            return
        # What a configuration leaves out depends on the class, so it is not guessed.
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        found.noise = NoiseSchedule(*(config[name] for name in names))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, UsageError) as error:
        found.fail("scheduler", f"scheduler_config.json cannot be used ({type(error).__name__}: {error})")
        return
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        found.fail("scheduler", "found trained_betas or rescale_betas_zero_snr; expected betas of a named schedule")
    prediction = config.get("prediction_type", "epsilon")
    if prediction in ("epsilon", "v_prediction"):
        found.prediction = prediction
    else:
        found.fail("scheduler", f"found prediction {prediction!r}; expected epsilon or v_prediction")
