"""Collections of many artists, in the shapes that WikiArt and AST have."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsast_engines.errors import TrainingError
from lsast_train.artists import artists_of, pictures_by, style_name
from lsast_train.base.lazy_base import save_base
from lsast_train.prompts.prompt_file import load_prompts


def _pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def _names(found: dict[str, list[Path]]) -> dict[str, list[str]]:
    return {artist: [path.stem for path in paths] for artist, paths in found.items()}


def test_style_name_is_how_wikiart_spells_an_artist():
    assert style_name("Vincent van Gogh") == style_name("vincent-van-gogh") == "vincent-van-gogh"
    assert style_name("Eugène  Delacroix") == "eugene-delacroix"


def test_artists_of_wikiart_come_from_the_files_of_all_its_folders(tmp_path):
    root = _pictures(
        tmp_path,
        "Impressionism/claude-monet_water-lilies-1914.png",
        "Realism/claude-monet_boats_1866.png",
        "Realism/vincent-van-gogh_peat-boat.png",
    )
    assert _names(artists_of(root)) == {
        "claude-monet": ["claude-monet_water-lilies-1914", "claude-monet_boats_1866"],
        "vincent-van-gogh": ["vincent-van-gogh_peat-boat"],
    }
    assert pictures_by("Claude Monet", root / "Impressionism") == [
        root / "Impressionism" / "claude-monet_water-lilies-1914.png"
    ]
    with pytest.raises(TrainingError, match=r"no picture of 'Monet, Claude' .* one of 2 artists such as"):
        pictures_by("Monet, Claude", root)


def test_artists_of_ast_and_of_plain_folders_come_from_the_folders(tmp_path):
    folders = ("paul-cezanne_card-players", "Claude Monet/late", "Vincent_van_Gogh", "Pierre-Auguste_Renoir")
    root = _pictures(tmp_path, *(f"{folder}/IMG_{number}.png" for number, folder in enumerate(folders)))
    assert _names(artists_of(root)) == {
        "claude-monet": ["IMG_1"],
        "paul-cezanne": ["IMG_0"],
        "pierre-auguste-renoir": ["IMG_3"],
        "vincent-van-gogh": ["IMG_2"],
    }
    with pytest.raises(TrainingError, match="found no artist of 2 pictures"):
        artists_of(_pictures(tmp_path / "flat", "1.png", "2.png"))


def test_artists_of_a_table_beside_the_pictures(tmp_path):
    root = _pictures(tmp_path, "a/1.png", "a/2.png", "3.png")
    table = 'filename,genre,artist\na/1.png,landscape,Claude Monet\n"3.png",portrait,Eugène Delacroix\na/2.png,,\n'
    (root / "classes.csv").write_text(table, encoding="utf-8")
    assert _names(artists_of(root)) == {"claude-monet": ["1"], "eugene-delacroix": ["3"]}


def test_each_artist_learns_a_style_of_every_artist_that_has_enough_pictures(base, tmp_path, command):
    save_base(base, Path("tiny"))
    names = [f"Realism/{artist}_{n}.png" for artist in ("claude-monet", "paul-cezanne") for n in range(3)]
    root = _pictures(tmp_path / "wikiart", *names, "Realism/edvard-munch_one.png")
    knobs = ("--images", root, "--base", "tiny", "--steps", "1", "--batch", "1", "--size", "64")
    code, out, err = command("--each-artist", *knobs)
    assert code == 1
    files = [Path("runs", name, f"{name}.prompts.safetensors") for name in ("claude-monet", "paul-cezanne")]
    assert out.split() == [str(file) for file in files]
    assert [load_prompts(file).meta["works"] for file in files] == ["3", "3"]
    assert "edvard-munch: found 1 usable pictures" in err
    assert "no style for 1 of 3 artists: edvard-munch" in err
    before = files[0].read_bytes()
    code, _, err = command("--each-artist", *knobs)
    assert (code, "claude-monet: finished before, passed over" in err) == (1, True)
    # Alone, a finished training is not replaced unasked.
    code, _, err = command("--artist", "Claude Monet", *knobs, "--seed", "5")
    assert (code, "found a finished training" in err) == (1, True)
    assert files[0].read_bytes() == before
    assert command("--artist", "Claude Monet", *knobs, "--seed", "5", "--overwrite")[0] == 0
    assert files[0].read_bytes() != before
    assert command("--each-artist", "--style", "x", "--images", root)[0] == 2
