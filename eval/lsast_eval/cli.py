"""``lsast-eval``: options, and results on a terminal. Imports torch only when pictures are to be scored."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from lsast_engines.cli import Group, combine_options, debug_option, echo, json_option, log_to_stderr, print_result
from lsast_engines.errors import UsageError
from lsast_engines.files import require_writable

_FOLDER = click.Path(path_type=Path)


def _methods(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    methods: dict[str, Path] = {}
    for value in values:
        name, sign, folder = value.partition("=")
        if not (name and sign and folder):
            raise click.BadParameter(f"found {value!r}; expected NAME=DIR")
        if name in methods:
            raise click.BadParameter(f"found {name!r} twice; expected each name once")
        methods[name] = Path(folder)
    return methods


_matched = combine_options(
    click.option("--artist", metavar="NAME", help="Whose works they are. [default: the name of --works' folder]"),
    click.option(
        "--method",
        "methods",
        metavar="NAME=DIR",
        multiple=True,
        callback=_methods,
        help="Results; may be repeated.",
    ),
    click.option("--works", metavar="DIR", type=_FOLDER, help="Folder of the artist's works."),
    click.option("--contents", metavar="DIR", type=_FOLDER, help="Folder of the pictures that were repainted."),
)
"""The options that scoring and voting share."""


@click.group(
    "lsast-eval",
    cls=Group,
    invoke_without_command=True,
    requires=("eval", "torch", "efficientnet_lite_pytorch"),
    sections={
        "Pictures": ("contents", "works", "methods", "artist", "artists", "photos", "leave_out"),
        "Scores": ("size", "bootstrap", "seed", "cache", "sheet", "sheet_rows", "threads"),
    },
)
@_matched
@click.option("--artists", metavar="DIR", type=_FOLDER, help="Folder with a folder for each artist: deception score.")
@click.option("--photos", metavar="DIR", type=_FOLDER, help="Photographs, one more class of the artist classifier.")
@click.option(
    "--leave-out", metavar="NAME", multiple=True, help="Folder of --artists that is no class; may be repeated."
)
@click.option("--size", type=int, help="Shorter side at which results are compared with contents. [default: 512]")
@click.option("--bootstrap", type=int, help="Resamplings behind the intervals. [default: 300]")
@click.option("--seed", type=int, help="Of the resampling. [default: 0]")
@click.option(
    "--cache", metavar="DIR", type=_FOLDER, help="Where features are kept. [default: in lsast's cache folder]"
)
@click.option("--sheet", metavar="PNG", type=_FOLDER, help="Write a contact sheet.")
@click.option("--sheet-rows", type=click.IntRange(1), default=12, show_default=True, help="Contents on the sheet.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. [default: all cores]")
@json_option
@debug_option
@click.pass_context
def main(
    context: click.Context,
    /,
    contents: Path | None,
    works: Path | None,
    methods: dict[str, Path],
    artist: str | None,
    artists: Path | None,
    photos: Path | None,
    leave_out: tuple[str, ...],
    sheet: Path | None,
    sheet_rows: int,
    threads: int | None,
    **chosen: Any,
) -> None:
    """Score folders of stylised pictures against their contents and an artist's works.

    \b
      lsast-eval --contents photos --works artists/monet --artists artists --method ours=out --method other=out2
      lsast-eval vote --contents photos --works artists/monet --method ours=out --method other=out2 --out votes.jsonl

    A method's pictures are named like the contents. Prints a table; nothing is painted, nothing is downloaded.
    """
    if context.invoked_subcommand is not None:
        return
    if contents is None or works is None or not methods:
        given = {"--contents DIR": contents, "--works DIR": works, "--method NAME=DIR": methods}
        missing = " and no ".join(name for name, value in given.items() if not value)
        raise UsageError(f"found no {missing}; lsast-eval needs them (--help lists all options)")
    from .report import EvalOptions

    if sheet is not None:
        if sheet.exists() and not sheet.is_file():
            raise UsageError(f"found --sheet {sheet}, a folder or a device; expected the name of a file")
        require_writable(sheet.parent)
    options = replace(EvalOptions(), **{name: value for name, value in chosen.items() if value is not None})
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from .evaluation import evaluate

    with log_to_stderr(logging.WARNING):
        report = evaluate(contents, works, artists, methods, artist, options, photos=photos, leave_out=leave_out)
        print_result(report.to_json(), *report.table().split("\n"))
        if sheet is not None:
            report.sheet(sheet, sheet_rows)


@main.command("vote")
@_matched
@click.option("--out", metavar="FILE", type=_FOLDER, required=True, help="Votes, a JSON line each; added to.")
@click.option("--voter", default="anonymous", show_default=True, help="Tells people apart in one file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order and the sides.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0 is any free one.")
@click.option("--open/--no-open", "browse", default=True, show_default=True, help="Open the page in a browser.")
@debug_option
def vote(
    contents: Path | None,
    works: Path | None,
    methods: dict[str, Path],
    artist: str | None,
    out: Path,
    voter: str,
    seed: int,
    port: int,
    browse: bool,
) -> None:
    """Serve a local web page on which people vote between two results; --out gets a line for each vote.

    Order and sides are random, methods are not named. Works of --works are shown beside each pair. Pairs that a voter
    has voted on are not shown again. Stop it with Ctrl-C.
    """
    import webbrowser

    from .matching import artist_of
    from .voting.page import VoteSession, draw_pairs, open_server

    name = artist if artist or works is None else artist_of(works)
    if contents is None or name is None:
        raise UsageError("found no --contents DIR, or neither --works DIR nor --artist NAME; expected them")
    click.get_current_context().with_resource(log_to_stderr(logging.WARNING))
    session = VoteSession(draw_pairs(contents, methods, works, seed), name, out, voter)
    with open_server(session, port) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            echo(f"{address}  {session.remaining} pairs to vote on; Ctrl-C ends", err=True)
            if browse:
                webbrowser.open(address)
            server.serve_forever()
        except KeyboardInterrupt:
            echo(str(out))


@main.command("votes")
@click.argument("files", metavar="FILE…", nargs=-1, required=True, type=_FOLDER)
@click.option(
    "--confidence", type=click.FloatRange(0.5, 1, min_open=True, max_open=True), default=0.95, show_default=True
)
@json_option
@debug_option
def votes(files: tuple[Path, ...], confidence: float) -> None:
    """Win rates of votes, by artist, with Wilson's intervals; a tie is half a win for either side."""
    from .voting.votes import left_bias, read_votes, win_rates

    with log_to_stderr(logging.WARNING):
        cast = read_votes(files)
    artists = sorted({vote.artist for vote in cast})
    rates = {name: win_rates([vote for vote in cast if vote.artist == name], confidence) for name in artists}
    left = left_bias(cast, confidence)
    voters = len({vote.voter for vote in cast})
    facts = {
        "votes": len(cast),
        "voters": voters,
        "left": None if left is None else dict(zip(("rate", "low", "high"), left, strict=True)),
        "artists": {name: [asdict(rate) for rate in found] for name, found in rates.items()},
    }
    lines = []
    for name, found in rates.items():
        pairs = [f"{rate.method} against {rate.other or 'all'}" for rate in found]
        lines += [name, ""]
        for pair, rate in zip(pairs, found, strict=True):
            counts = f"{rate.wins} won, {rate.ties} tied, {rate.losses} lost"
            lines.append(f"{pair:{max(map(len, pairs))}}  {rate.rate:6.1%} [{rate.low:.1%}, {rate.high:.1%}]  {counts}")
        lines.append("")
    side = "no decided vote" if left is None else f"the left one was taken {left[0]:.1%} [{left[1]:.1%}, {left[2]:.1%}]"
    lines += [
        f"* {len(cast)} votes of {voters} voters; {side}",
        f"* intervals of {confidence:.0%} are Wilson's, as if every vote had a person and a picture of its own",
    ]
    print_result(facts, *lines)
