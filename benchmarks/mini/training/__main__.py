"""Train a small base such as mini, and its decoder on what its styles paint; docs/mini.md has the order.

python -m benchmarks.mini.training base --images paintings --images photos --teacher taesd --out base
python -m benchmarks.mini.training decoder --style monet=paintings/claude-monet --contents photos --out new
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from lsast_engines.bundle.bundle import PROMPTS
from lsast_engines.cli import Command, Group, debug_option, json_option, log_to_stderr, print_result
from lsast_engines.errors import PictureError, TrainingError, UsageError
from lsast_engines.files import require_writable
from lsast_engines.images import find_pictures
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base, resolve_local_base, save_base
from lsast_train.base.mini_networks import MiniAutoencoder
from lsast_train.checkpoints.source import BaseSource
from lsast_train.cli.shared import (
    declared_options,
    device_option,
    folder_option,
    run_options,
    set_up_torch,
    threads_option,
)
from lsast_train.finetuning.perceptual import LiteDistance
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import find_prompts, load_prompts, save_prompts
from lsast_train.training.loop import load_modules
from lsast_train.training.run import RunFiles, find_device, versions

from .dataset import Crops, LatentDataset, build_cache
from .finetune_gan import GanOptions, train_vae_gan
from .mini_base import MiniConfig, build_mini
from .train_autoencoder import AutoencoderOptions, load_teacher, train_autoencoder
from .train_decoder import DecoderOptions, DecoderTraining, StyleWorks
from .train_unet import BaseTrainingOptions, train_base

log = logging.getLogger("lsast.train.mini")

Value = TypeVar("Value")

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


def parse_pairs(option: str, form: str, values: Iterable[str], kind: Callable[[str], Value]) -> dict[str, Value]:
    """``("monet=1.5", …)`` → values by name, each made by `kind`, which raises `ValueError` for a text it refuses.

    Raises:
        UsageError: not of that form, or a name twice.
    """
    found: dict[str, Value] = {}
    for pair in values:
        name, _, text = pair.partition("=")
        try:
            if not name or not text or name in found:
                raise ValueError
            found[name] = kind(text)
        except ValueError:
            raise UsageError(f"found {option} {pair}; expected {form}, each once") from None
    return found


@click.group("training", cls=Group)
def main() -> None:
    """Train a small base such as mini."""


@main.command("base", cls=Command)
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
def base(
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


@main.command("decoder", cls=Command)
@click.option(
    "-s",
    "--style",
    "styles",
    required=True,
    multiple=True,
    metavar="NAME=DIR",
    help="Prompts of a run or of the base's bundle, or a file, and the folder tree of the artist's works. Repeatable.",
)
@folder_option("--contents", required=True, text="Folder tree of pictures to paint, such as photographs.")
@click.option("--base", metavar="NAME", help="Base or bundle with mini's autoencoder. [default: the embedded one]")
@declared_options(DecoderOptions)
@folder_option("-o", "--out", required=True, text="Folder of the base.")
@run_options
def decoder(
    styles: tuple[str, ...],
    contents: Path,
    base: str | None,
    device: str | None,
    out: Path,
    resume: bool,
    overwrite: bool,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Train the decoder of a base such as mini on what its styles paint.

    Prints the base's folder. The prompts stay valid, since nothing else of the base changes; they are copied into its
    folder "prompts", where lsast-export finds them.
    """
    options, works = DecoderOptions(**chosen), parse_pairs("--style", "NAME=DIR", styles, Path)
    if (out / "base.json").exists() and not overwrite:
        raise TrainingError(f"found the base {out}; replace it with --overwrite, or name another folder with --out")
    set_up_torch(threads)
    with log_to_stderr():
        source = BaseSource(base)
        loaded, place = load_base(source), resolve_local_base(source)
        prompts = {name: load_prompts(find_prompts(name, place), loaded) for name in works}
        if len({style.name for style in prompts.values()}) < len(prompts):
            raise UsageError(f"found one style twice among --style {', '.join(prompts)}; expected each once")
        RunFiles(out, "decoder").require(options.size, loaded.config.multiple, resume)
        size = loaded.config.size
        pairs = {
            prompts[name].name: StyleWorks(prompts[name], PaintingDataset.load(tree, options.size, "random", size))
            for name, tree in works.items()
        }
        others = PaintingDataset.load(contents, options.size, "random", size)
        training = DecoderTraining(loaded, pairs, others, options, out, resume, device)
        training.run()
    for style in prompts.values():
        save_prompts(style, out / PROMPTS / f"{style.name}.prompts.safetensors")
    finish(loaded, out, {f"decoder_{name}": str(asdict(options)[name]) for name in ("steps", "paintings")})
    training.files.checkpoint.unlink(missing_ok=True)


def finish(base: Base, out: Path, facts: dict[str, str]) -> None:
    """Write `base` and print where it is. A base that was trained on before stays a source of prompts."""
    origins = f"{base.config.training.get('exported_from', '')} {base.fingerprint}".split()
    known = {"exported_from": " ".join(origins)} if base.config.training else {}
    base.config = replace(base.config, training={**base.config.training, **facts, **versions(), **known})
    save_base(base, out)
    print_result({"base": str(out), "fingerprint": load_base(out).fingerprint}, out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.mini.training")
