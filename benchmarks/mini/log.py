"""Print the training log of a base as Markdown: held-out errors and token gain over the steps.

    python -m benchmarks.mini.log benchmarks/mini/logs

The folder holds ``base.log.json``, ``autoencoder.log.json`` and ``finetune_gan.log.json``, as the training writes
them (``sharpening.log.json`` is an earlier version's second phase).
"""

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def main(folder: Path) -> None:
    """Print the logs."""
    base = json.loads((folder / "base.log.json").read_text())["history"]
    print("Token gain: held-out v-error with the null context minus that with the picture's own tokens, by timestep;")
    print("*other* minus own in brackets: what another picture's tokens cost.\n")
    stages = [f"t = {row['t']:.0f}" for row in base[0]["gain"]]
    print(f"| step | pictures | training loss | {' | '.join(stages)} |\n|{'---|' * (3 + len(stages))}")
    for entry in base:
        cells = [f"{row['null'] - row['own']:.4f} ({row['other'] - row['own']:.4f})" for row in entry["gain"]]
        print(f"| {entry['step']} | {entry['pictures']} | {entry['loss']:.4f} | {' | '.join(cells)} |")
    last = base[-1]["gain"]
    print(f"\nHeld-out v-error at step {base[-1]['step']}:\n")
    print("| tokens | " + " | ".join(stages) + f" |\n|{'---|' * (1 + len(stages))}")
    for name in ("null", "other", "label", "own", "own+edges"):
        print(f"| {name} | " + " | ".join(f"{row[name]:.4f}" for row in last) + " |")
    for phase in ("autoencoder", "sharpening", "finetune_gan"):
        file = folder / f"{phase}.log.json"
        if not file.exists():
            continue
        history = json.loads(file.read_text())["history"]
        names = [name for name in history[0] if name != "step"]
        print(f"\n| {phase} step | {' | '.join(names)} |\n|{'---|' * (1 + len(names))}")
        for entry in history:
            print(f"| {entry['step']} | " + " | ".join(f"{entry[n]:.3f}" for n in names) + " |")


if __name__ == "__main__":
    main()
