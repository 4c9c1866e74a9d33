"""Pack what each call carries, so that a machine lent for minutes can be used from the first one.

    python -m benchmarks.gpu_day.pack --paintings DIR --photos DIR --onnxruntime FILE --out packed

Needs diffusers and the packages of EfficientNet-Lite1 in this environment. Nearly all of the time is for pictures.
OUT/CALL is what the call carries; what it unpacks stays there for the calls after it.
"""

import argparse
import importlib
import io
import shutil
import tarfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
CODE = ("pyproject.toml", "README.md", "engines", "runtime", "train", "export", "eval", "benchmarks", "tests")
LEFT_OUT = {".safetensors", ".png", ".jpg", ".pyc"}
UNUSED = ("modular_pipelines", "pipelines")
"""Folders of diffusers that no network needs; of `pipelines` some modules are imported."""

IMPORTED_PIPELINES = ("stable_diffusion", "deprecated")
LARGEST = 512 * 512 * 1.3
"""Pixels of a picture that travels: training takes it at 512²."""


def pack_picture(source: Path, target: Path, quality: int) -> int:
    """Write a picture as AVIF, no larger than `LARGEST`; its bytes, 0 if it is unreadable or too small to train on."""
    try:
        picture = Image.open(source).convert("RGB")
    except OSError:
        return 0
    if min(picture.size) < 96:
        return 0
    factor = (LARGEST / (picture.width * picture.height)) ** 0.5
    if factor < 1:
        size = (round(picture.width * factor), round(picture.height * factor))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "AVIF", quality=quality, speed=7)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.write_bytes(buffer.getvalue())


def pack_pictures(root: Path, target: Path, quality: int) -> None:
    """Write every picture below `root` as AVIF, with its folders."""
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in {".jpg", ".jpeg", ".png"}]
    targets = [target / path.relative_to(root).with_suffix(".avif") for path in files]
    with ProcessPoolExecutor() as pool:
        total = sum(pool.map(pack_picture, files, targets, [quality] * len(files), chunksize=16))
    print(f"{target}: {len(files)} pictures, {total / 1e6:.1f} MB")


def pack_tar(target: Path, parts: Iterable[tuple[Path, str]]) -> None:
    """Write files and folders under the names given as .tar.xz, without weights, pictures and links."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def travels(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(entry.name)
        left_out = path.suffix in LEFT_OUT or path.name == "__pycache__" or entry.issym()
        return None if left_out else entry

    with tarfile.open(target, "w:xz") as archive:
        for path, name in parts:
            archive.add(path, name, filter=travels)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paintings", type=Path, required=True, help="A folder for each artist.")
    parser.add_argument("--photos", type=Path, required=True, help="A folder for each kind.")
    parser.add_argument("--onnxruntime", type=Path, required=True, help="onnxruntime-gpu for the card, as .tar.xz.")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    out: Path = given.out
    code = [(ROOT / name, name) for name in CODE if (ROOT / name).exists()]
    diffusers = Path(importlib.import_module("diffusers").__path__[0])
    parts = [(path, f"diffusers/{path.name}") for path in sorted(diffusers.iterdir()) if path.name not in UNUSED]
    pipelines = [path for path in sorted((diffusers / "pipelines").iterdir()) if path.is_file()]
    pipelines += [diffusers / "pipelines" / name for name in IMPORTED_PIPELINES]
    parts += [(path, f"diffusers/pipelines/{path.name}") for path in pipelines]
    parts += [(path, path.name) for path in diffusers.parent.glob("diffusers-*.dist-info")]
    pack_tar(out / "parity" / "code.tar.xz", code)
    pack_tar(out / "parity" / "diffusers.tar.xz", parts)
    (out / "engines").mkdir(parents=True, exist_ok=True)
    shutil.copy(given.onnxruntime, out / "engines" / "onnxruntime.tar.xz")
    lite = [
        Path(importlib.import_module(f"efficientnet_lite{name}").__path__[0])
        for name in ("1_pytorch_model", "_pytorch")
    ]
    pack_tar(out / "train" / "lite.tar.xz", [(path, path.name) for path in lite])
    pack_pictures(given.photos, out / "train" / "photos", 52)
    pack_pictures(given.paintings, out / "pictures" / "paintings", 55)
    for call in ("engines", "train"):  # so that a mended script reaches a machine that is warm
        shutil.copy(out / "parity" / "code.tar.xz", out / call / "code.tar.xz")


if __name__ == "__main__":
    main()
