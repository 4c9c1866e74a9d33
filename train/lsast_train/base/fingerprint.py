"""Whether what was learned on one base fits another."""

from collections.abc import Mapping

from lsast_engines.errors import StyleError

EXPORTED_FROM = "exported_from"
"""Key among the training facts of a base: fingerprints, separated by blanks, of the bases whose prompts fit it."""


def check_fingerprint(found: str, what: str, base: str, fingerprint: str, facts: Mapping[str, str]) -> None:
    """Refuse what was learned on another base.

    Args:
        found: fingerprint of the base that `what`, as the message calls it, was learned on.
        base, fingerprint: of the base that it is for.
        facts: of that base, from its manifest or its training; under `EXPORTED_FROM` they name bases that it was made
            from, by rounding weights or by training its decoder on. What was learned on these fits, too.

    Raises:
        StyleError: another base.
    """
    if found not in (fingerprint, *facts.get(EXPORTED_FROM, "").split()):
        raise StyleError(
            f"{what} was learned on base {found[:12]}…; the base {base!r} is {fingerprint[:12]}…: train it again on "
            "this base, or name the base that it was trained on with --base"
        )
