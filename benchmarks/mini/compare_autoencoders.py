"""Compare autoencoders on whole pictures that none of them was trained on, at the scale that mini paints at.

    python -m benchmarks.mini.compare_autoencoders --pictures photographs=DIR --pictures van-gogh=DIR \
        --autoencoder present=mini --autoencoder next=benchmarks/mini/autoencoder_next.safetensors \
        --autoencoder taesd=DIR --out table.json

A folder that mini was trained from counts with its held-out pictures only (`--held-out`). An autoencoder is a base, a
file of its weights or a diffusers folder of an AutoencoderTiny; DECODER@ENCODER crosses two. Feature distance:
EfficientNet-Lite2, which no training saw.
"""

import json
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from benchmarks.mini.training.dataset import fit_picture, is_held_out
from benchmarks.mini.training.train_autoencoder import load_teacher, psnr
from lsast_engines.files import replace_file
from lsast_engines.images import find_pictures, read_picture
from lsast_train.base.lazy_base import load_base
from lsast_train.base.mini_networks import MiniAutoencoder
from lsast_train.finetuning.perceptual import LiteDistance

Network = Callable[[torch.Tensor], torch.Tensor]

BLOCK = 16
"""Side in pixels of the blocks that `gradient_kept` sorts into quarters."""


def gradient_magnitude(image: torch.Tensor) -> torch.Tensor:
    """Images [B, C, H, W] → [B, 1, H-1, W-1]: mean over channels of |∂y| + |∂x|."""
    down, right = image[..., 1:, :-1] - image[..., :-1, :-1], image[..., :-1, 1:] - image[..., :-1, :-1]
    return down.abs().mean(1, keepdim=True) + right.abs().mean(1, keepdim=True)


def gradient_kept(decoded: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """How much of the gradient of `image` [1, C, H, W] is in `decoded`, by quarters of its blocks, flattest first."""
    wanted, found = (F.avg_pool2d(gradient_magnitude(x), BLOCK).flatten() for x in (image, decoded))
    quarters = wanted.argsort().tensor_split(4)
    return torch.stack([found[index].sum() / wanted[index].sum().clamp(min=1e-6) for index in quarters])


def open_autoencoder(where: str) -> tuple[Network, Network]:
    if where.endswith(".safetensors"):
        mini, prefix = MiniAutoencoder().eval(), "autoencoder."
        tensors = {key.removeprefix(prefix): v.float() for key, v in load_file(where).items() if key.startswith(prefix)}
        mini.load_state_dict(tensors)
        return mini.encode, mini.decode
    if (Path(where) / "config.json").is_file():
        taesd = load_teacher(Path(where))
        return taesd.encoder, taesd.decoder
    base = load_base(where)
    return lambda image: base.encode(image)[0], base.decode


def open_roundtrip(where: str) -> Network:
    decoder, _, encoder = where.partition("@")
    decode, encode = open_autoencoder(decoder)[1], open_autoencoder(encoder or decoder)[0]
    return lambda image: decode(encode(image))


def named(value: str) -> tuple[str, str]:
    name, equals, where = value.partition("=")
    if not equals:
        raise click.BadParameter(f"found {value!r}; expected NAME=PATH")
    return name, where


@click.command()
@click.option("--pictures", multiple=True, required=True, metavar="NAME=DIR", help="Folder of pictures. Repeatable.")
@click.option("--held-out", multiple=True, metavar="NAME", help="Of these only the held-out pictures. Repeatable.")
@click.option("--autoencoder", multiple=True, required=True, metavar="NAME=PATH", help="Repeatable.")
@click.option("--most", default=8, show_default=True, help="Pictures of a folder, evenly drawn.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder for the decoded pictures, side by side.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the figures.")
@torch.no_grad()
def main(
    pictures: tuple[str, ...],
    held_out: tuple[str, ...],
    autoencoder: tuple[str, ...],
    most: int,
    images: Path | None,
    out: Path | None,
) -> None:
    distance = LiteDistance("cpu", 2)
    opened = {name: open_roundtrip(where) for name, where in map(named, autoencoder)}
    table: dict[str, dict[str, dict[str, float]]] = {}
    print("| pictures | n | autoencoder | PSNR | Lite2 distance | gradient kept, flattest quarter … busiest |")
    print("|---|---|---|---|---|---|")
    for name, folder in map(named, pictures):
        paths = find_pictures(Path(folder))
        if name in held_out:
            paths = [path for path in paths if is_held_out(f"{path.parent.name}/{path.name}")]
        paths = paths[:: max(1, len(paths) // most)][:most]
        rows: dict[str, list[list[float]]] = {key: [] for key in opened}
        for path in paths:
            rgb = fit_picture(read_picture(path).rgb)
            image = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            strip = [rgb]
            for key, roundtrip in opened.items():
                decoded = roundtrip(image.contiguous(memory_format=torch.channels_last)).clamp(-1, 1)
                kept = gradient_kept(decoded, image).tolist()
                rows[key].append([psnr(decoded, image), distance(decoded, image).item(), *kept])
                strip.append(((decoded[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            if images is not None:
                images.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.concatenate(strip, axis=1)).save(images / f"{name}_{path.stem}.png")
        table[name] = {}
        for key, values in rows.items():
            mean = np.mean(values, axis=0)
            kept = [round(float(x), 3) for x in mean[2:]]
            table[name][key] = {"n": len(paths), "psnr": float(mean[0]), "distance": float(mean[1]), "kept": kept}
            cells = [f"{mean[0]:.2f}", f"{mean[1]:.4f}", " ".join(f"{x:.2f}" for x in kept)]
            print(f"| {name} | {len(paths)} | {key} | {' | '.join(cells)} |", flush=True)
    if out is not None:
        with replace_file(out) as handle:
            handle.write(json.dumps(table, indent=1).encode())


if __name__ == "__main__":
    main()
