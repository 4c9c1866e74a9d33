"""Write a card for each embedded style from what its training and its judgement left behind.

    python -m benchmarks.quality.style_cards --runs runs --compare compare/compare.json --out docs/styles

`--runs` holds what `lsast-train` wrote (prompts and curve, a folder for each style), `--compare` is the JSON of
`benchmarks/quality/compare_peers.py`. Text that no file knows (provenance, limits) stands in `NOTES`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open

from lsast_engines.files import replace_file


@dataclass(frozen=True)
class Note:
    """What is known of a style beyond its files."""

    artist: str
    provenance: str
    limits: str


_JPEGS = "reduced JPEGs (256 to 800 pixels) of works in the public domain (life + 70)"
_SMALL = "reduced JPEGs (long side at most 500 pixels) of works in the public domain (life + 70)"
_CROWDS = "Faces and crowds dissolve into strokes."
NOTES = {
    "vangogh": Note("Vincent van Gogh (1853-1890)", _JPEGS, _CROWDS),
    "monet": Note(
        "Claude Monet (1840-1926)",
        "JPEGs of 256 x 256 pixels of works in the public domain (life + 70)",
        f"All works were small squares, enlarged. {_CROWDS}",
    ),
    "roerich": Note(
        "Nicholas Roerich (1874-1947)",
        f"{_SMALL}; late works may still be protected in the United States",
        f"Works are small (short side 332 pixels, median), enlarged; palettes vary much with the seed. {_CROWDS}",
    ),
    "martin": Note(
        "Henri Martin (1860-1943)",
        _SMALL,
        f"Finest dots are lost in mini's autoencoder. {_CROWDS}",
    ),
    "koson": Note(
        "Ohara Koson (1877-1945)",
        f"{_SMALL}; late works may still be protected in the United States",
        "Prints with few flat tones: what is left of them on a busy photograph is palette and outline, "
        "not emptiness. Strong curves show stairs of latent cells.",
    ),
    "cezanne": Note(
        "Paul Cézanne (1839-1906)",
        _SMALL,
        f"Learned from few works, so the blues and ochres of his landscapes come on every picture. {_CROWDS}",
    ),
    "north": Note(
        "Marianne North (1830-1890)",
        _SMALL,
        f"Mostly flowers and forest, so pinks, reds and greens come on faces and walls, too. {_CROWDS}",
    ),
}
METRICS = ("deception", "deception_lite2", "kid", "lpips", "edge_f1", "ssim")


@click.command()
@click.option("--runs", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--compare", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(runs: Path, compare: Path | None, out: Path) -> None:
    """Write OUT/STYLE.md for every run."""
    out.mkdir(parents=True, exist_ok=True)
    scores = json.loads(compare.read_text())["styles"] if compare else {}
    for prompts in sorted(runs.rglob("*.prompts.safetensors")):
        name = prompts.name.removesuffix(".prompts.safetensors")
        with safe_open(prompts, "numpy") as file:
            facts = json.loads(file.metadata()["lsast"])
        curve = json.loads(prompts.with_name(f"{name}.curve.json").read_text())
        with replace_file(out / f"{name}.md") as handle:
            handle.write(card(name, facts, curve, scores.get(name)).encode())
        click.echo(out / f"{name}.md")


def card(name: str, facts: dict[str, Any], curve: dict[str, Any], scores: dict[str, Any] | None) -> str:
    """The card as Markdown."""
    if name not in NOTES:
        raise click.ClickException(f"found no note on {name}; expected its artist, provenance and limits in NOTES")
    note, meta = NOTES[name], facts["meta"]
    options = json.loads(meta["options"])
    first = curve["evaluations"][0]["held_out"]
    best = next(e for e in curve["evaluations"] if e["step"] == curve["best_step"])["held_out"]
    lines = [
        f"# `{name}`: {note.artist}",
        "",
        f"- **Works:** {meta['works']}, of which {meta['works_held_out']} were held out; {note.provenance}.",
        f"- **Licence:** {meta['licence'] or 'not given'} (the works); the style is under this project's licence.",
        f"- **Training:** {meta['steps']} steps of {options['batch']} crops of {options['size']}², {facts['variant']}, "
        f"generator {facts['generator']}, learning rate {options['lr']}, seed {options['seed']}; step "
        f"{meta['best_step']} kept; base `{facts['base'][:12]}`, paintings "
        f"`{meta['paintings_sha256'][:12]}`, prompts `{facts['sha256'][:12]}`.",
        f"- **Held-out loss:** {float(meta['relative_held_out_loss']):.4f} of the untrained prompts'.",
        f"- **Limits:** {note.limits}",
        "",
        "Held-out noise error by stage (0 next to the clean picture):",
        "",
        "| stage | " + " | ".join(str(stage) for stage in range(len(best))) + " |",
        "|---|" + "---|" * len(best),
        "| untrained | " + " | ".join(f"{value:.4f}" for value in first) + " |",
        "| kept | " + " | ".join(f"{value:.4f}" for value in best) + " |",
    ]
    if scores:
        methods = scores["methods"]
        first_row = next(iter(methods.values()))
        names = [metric for metric in first_row["scores"] if metric.partition("[")[0] in METRICS]
        count = first_row["n"]
        lines += [
            "",
            f"Scores on {count} pictures (`benchmarks/quality/compare_peers.py`; 95 % intervals over pictures):",
            "",
        ]
        lines += ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for method, row in methods.items():
            lines.append(f"| {method} | " + " | ".join(_cell(row["scores"][metric]) for metric in names) + " |")
    return "\n".join(lines) + "\n"


def _cell(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


if __name__ == "__main__":
    main()
