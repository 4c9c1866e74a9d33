"""Paint every file of a folder at a tiny size in one process, and compare size, transparency and profile with Pillow's.

    pip download pillow --no-binary :all: --no-deps && tar xf pillow-*.tar.gz
    python -m benchmarks.robustness.pictures pillow-*/Tests/images

Pillow's own test pictures hold every format and many kinds of damage. A file is painted, or refused by an `LsastError`
of one line; everything else is wrong and listed. Ends with status 1 if something is wrong.
"""

import sys
import warnings
from collections import Counter
from pathlib import Path

import click
from PIL import Image, ImageOps

import lsast
from lsast_engines.cli import Command


def faults(path: Path, painted: Image.Image) -> list[str]:
    """What differs between a painting and the picture as Pillow opens it."""
    with Image.open(path) as opened:
        profile = opened.info.get("icc_profile") if opened.mode in ("RGB", "RGBA", "RGBX", "P", "PA") else None
        upright = ImageOps.exif_transpose(opened)
        has_alpha = upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info
        alpha = upright.convert("LA" if upright.mode == "La" else "RGBA").getchannel("A") if has_alpha else None
    facts = {
        "size": (painted.size, upright.size),
        "profile": (painted.info.get("icc_profile"), profile or None),
        "transparency": (painted.mode == "RGBA", alpha is not None and alpha.getextrema()[0] < 255),
    }
    return [
        f"{name}: found {found!r:.60}; expected {wanted!r:.60}"
        for name, (found, wanted) in facts.items()
        if found != wanted
    ]


def outcome(stylizer: lsast.Stylizer, path: Path) -> tuple[str, list[str]]:
    """painted, refused or wrong, and why it is wrong."""
    try:
        painted = stylizer.stylize(path, size=64, steps=1, guidance=1.0).image
    except lsast.LsastError as error:
        return ("wrong", [str(error)]) if "\n" in str(error) else ("refused", [])
    except Exception as error:
        return "wrong", [f"{type(error).__name__}: {error}"]
    try:
        different = faults(path, painted)
    except Exception as error:
        different = [f"Pillow: {type(error).__name__}: {error}"]
    return ("wrong" if different else "painted"), different


@click.command(cls=Command)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Paint every file below FOLDER; print what is wrong, then the counts."""
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    with lsast.load(threads=1) as stylizer:
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            kind, reasons = outcome(stylizer, path)
            counts[kind] += 1
            for reason in reasons:
                print(f"{path}: {reason}", flush=True)
    print(f"{counts.total()} files: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("painted", "refused", "wrong")))
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
