"""``lsast-train mini``: train the small base itself, from folders of pictures to a base folder, in one command."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from lsast_engines.cli import Command, debug_option, json_option, print_result
from lsast_engines.errors import PictureError, TrainingError
from lsast_engines.files import require_writable
from lsast_engines.images import find_pictures

from ..base.base import Base
from ..base.lazy_base import load_base, save_base
from ..base.mini_networks import MiniAutoencoder
from ..mini.architecture import MiniConfig, build_mini
from ..mini.dataset import Crops, LatentDataset, build_cache
from ..mini.finetune_gan import GanOptions, train_vae_gan
from ..mini.perceptual import LiteDistance
from ..mini.train_autoencoder import AutoencoderOptions, load_teacher, train_autoencoder
from ..mini.train_unet import BaseTrainingOptions, train_base
from ..training.loop import load_modules
from ..training.run import find_device, versions
from .shared import declared_options, device_option, folder_option, parse_pairs, threads_option

log = logging.getLogger("lsast.train.mini")

TIME_SHARES = {"autoencoder": 0.2, "gan": 0.3}
"""With --seconds: the part of the time then left that each phase may take. U-Net, ControlNet and style encoder have the
rest."""


def label_folders(roots: list[Path]) -> list[Path]:
    """The folders that are a label each: the sub-folders of a root, or the root itself where it has none.

    Raises:
        PictureError: a root without pictures.
    """
    folders: list[Path] = []
    for root in roots:
        find_pictures(root)
        below = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        for folder in below or [root]:
            with contextlib.suppress(PictureError):
                find_pictures(folder)
                folders.append(folder)
    return folders


def copy_autoencoder(source: Base, target: Base) -> None:
    """Copy the autoencoder's weights from one mini base to another.

    Raises:
        TrainingError: `source` has another autoencoder.
    """
    given = {f"autoencoder.{key}": value for key, value in source.autoencoder.state_dict().items()}
    heading = f"found another autoencoder in base {source.config.name!r}; expected mini's, of its widths:"
    load_modules(given, {"autoencoder": target.autoencoder}, heading)


@click.command("mini", cls=Command)
@folder_option(
    *("--images", "roots"),
    multiple=True,
    required=True,
    text="Folder of pictures; its sub-folders are a label each (artists, kinds of photo). Repeatable.",
)
@folder_option("--teacher", text="TAESD as a diffusers folder: the autoencoder learns from it. Optional with --init.")
@click.option(
    "--init",
    metavar="BASE",
    help="Leave out the first phase: start from the autoencoder of this base (name or folder).",
)
@folder_option("--out", required=True, text="Folder of the base.")
@declared_options(BaseTrainingOptions)
@click.option("--autoencoder-steps", default=AutoencoderOptions().steps, show_default=True)
@click.option("--gan-steps", default=GanOptions().steps, show_default=True, help="Second phase; 0 leaves it out.")
@click.option("--share", multiple=True, metavar="LABEL=X", help="Sampling weight of a label's pictures. Repeatable.")
@click.option("--seed", default=0, show_default=True)
@device_option
@threads_option
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    help="End within so many seconds, with a whole base: the phases share the time, and learning rates decay by it.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoints in --out.")
@json_option
@debug_option
def mini(
    roots: tuple[Path, ...],
    teacher: Path | None,
    init: str | None,
    out: Path,
    autoencoder_steps: int,
    gan_steps: int,
    share: tuple[str, ...],
    seed: int,
    device: str | None,
    threads: int | None,
    seconds: float | None,
    resume: bool,
    **unet: Any,
) -> None:
    """Train the small base: autoencoder by a teacher, then as a GAN; U-Net, ControlNet and style encoder jointly.

    Checkpoints every five minutes; --resume goes on in the phase that was stopped. Prints the base folder, which
    `lsast-export --base DIR` turns into a bundle.
    """
    began = time.monotonic()

    def limit(share: float) -> float | None:
        """Seconds for a phase that may take `share` of the time left; a twentieth is kept for the last files."""
        return None if seconds is None else share * max(0.0, 0.95 * seconds - (time.monotonic() - began))

    if teacher is None and init is None:
        raise click.UsageError("found neither --teacher nor --init; expected where the autoencoder starts from")
    if init is not None and init.endswith(".safetensors"):
        raise click.UsageError("--init FILE was removed: name a base, or go on with a stopped run by --resume")
    if not resume and (left := sorted(map(str, out.rglob("*.checkpoint.safetensors")))):
        raise TrainingError(
            f"found checkpoints of another run, {', '.join(left)}; go on with --resume, delete them, or name another "
            "folder with --out"
        )
    place = find_device(device)
    require_writable(out)
    folders = label_folders(list(roots))
    shares = parse_pairs("--share", "LABEL=NUMBER", share, float)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    # A missing package is reported before hours of training.
    perceptual = LiteDistance(place) if gan_steps else None
    base = build_mini(MiniConfig(), seed)
    autoencoder = base.autoencoder
    assert isinstance(autoencoder, MiniAutoencoder)
    crops = Crops(folders, AutoencoderOptions().side)
    cache = out / "latents.safetensors"
    encoded = resume and cache.exists()  # the encoder stays the one that made the cache: its phases only restore
    needed = ["autoencoder.checkpoint.safetensors"] * (init is None)
    needed += ["finetune_gan.checkpoint.safetensors"] * bool(gan_steps)
    if encoded and (missing := [name for name in needed if not (out / name).exists()]):
        raise TrainingError(
            f"found {cache} without {' and '.join(missing)}; expected what made it: start without --resume"
        )
    taesd = None if teacher is None else load_teacher(teacher)
    if init is None and taesd is not None:
        steps, allowed = 0 if encoded else autoencoder_steps, limit(TIME_SHARES["autoencoder"])
        options = AutoencoderOptions(steps=steps, seed=seed, seconds=allowed)
        train_autoencoder(autoencoder, taesd, crops, options, out, resume, place)
    elif init is not None:
        copy_autoencoder(load_base(init), base)
    if perceptual is not None and gan_steps:
        gan = GanOptions(steps=0 if encoded else gan_steps, seed=seed, seconds=limit(TIME_SHARES["gan"]))
        train_vae_gan(autoencoder, crops, gan, out, perceptual, resume=resume, teacher=taesd, device=place)
    if not encoded:
        build_cache(folders, base.autoencoder.encoder, cache, place)
    data = LatentDataset(cache, place, unet["side"])
    training = BaseTrainingOptions(**unet, share=shares, seed=seed, seconds=limit(1.0))
    train_base(base, data, training, out, resume)
    facts = {
        "pictures": str(len(data.train)),
        "labels": ", ".join(data.label_names),
        "steps": str(unet["steps"]),
        "autoencoder_steps": str(autoencoder_steps) if init is None else f"those of {Path(init).name}",
        "gan_steps": str(gan_steps),
    }
    finish(base, out, facts)


def finish(base: Base, out: Path, facts: dict[str, str]) -> None:
    """Write `base` and print where it is. A base that was trained on before stays a source of prompts."""
    origins = f"{base.config.training.get('exported_from', '')} {base.fingerprint}".split()
    known = {"exported_from": " ".join(origins)} if base.config.training else {}
    base.config = replace(base.config, training={**base.config.training, **facts, **versions(), **known})
    save_base(base, out)
    print_result({"base": str(out), "fingerprint": load_base(out).fingerprint}, out)
