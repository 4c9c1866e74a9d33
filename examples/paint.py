"""Paint every picture given in two styles and in their mix, with one open stylizer.

    python examples/paint.py OUT_FOLDER PICTURE …

Needs `pip install 'lsast[cpu]'`.
"""

import itertools
import sys
from pathlib import Path

import lsast

STYLES = ("vangogh", "monet", "vangogh:0.6+monet:0.4")


def main(folder: Path, pictures: list[Path]) -> None:
    """Write `folder`/NAME-0.png … for every picture and style."""
    jobs = list(itertools.product(pictures, range(len(STYLES))))
    with lsast.load() as stylizer:  # engines and styles are opened once
        results = stylizer.stylize_many(
            (picture for picture, _ in jobs), (STYLES[index] for _, index in jobs), batch=len(STYLES), seed=7
        )
        for (picture, index), result in zip(jobs, results, strict=True):  # in the order of the jobs, one by one
            result.save(folder / f"{picture.stem}-{index}.png")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
    except lsast.LsastError as error:
        sys.exit(str(error))
