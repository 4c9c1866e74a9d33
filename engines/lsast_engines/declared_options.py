"""Options declared once, as fields of a dataclass: ``name: Annotated[type, help, Range(...)] = default``.

Checks, command line, documentation and the server's models are read off the declaration. Help and range may be left
out; a type may be ``Literal``, for named values, and may be optional (``| None``).
"""

import functools
import math
import numbers
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .errors import did_you_mean


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: from `low` to `high`, and 0 as well with `or_zero`."""

    low: float
    high: float = math.inf
    or_zero: bool = False
    above: bool = False
    """Whether `low` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        return (self.low <= value <= self.high and not (self.above and value == self.low)) or (
            self.or_zero and value == 0
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        span = f"above {self.low:g}, up to {self.high:g}" if self.above else f"{self.low:g} to {self.high:g}"
        return f"0, or {span}" if self.or_zero else span


@dataclass(frozen=True)
class Rule:
    """What an option may be and what it does, read off its declaration."""

    type: Any
    """``str``, ``int``, ``float`` or ``bool``."""
    help: str
    """Empty for an option that is not on the command line."""
    choices: tuple[str, ...] = ()
    """The allowed values, of a text that is a choice."""
    range: Range | None = None
    """The allowed numbers."""
    optional: bool = False
    """Whether None is allowed, too."""
    default: Any = None
    """None if there is none."""

    @property
    def values(self) -> str:
        """The allowed values, for messages and help."""
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        return str(self.range or {bool: "true or false"}.get(self.type, "a name"))

    @property
    def expected(self) -> str:
        """The allowed values with their type, for messages."""
        return {int: "a whole number, ", float: "a number, "}.get(self.type, "") + self.values

    def plain(self, value: Any) -> Any:
        """`value` in Python's own type where it is of another, such as a scalar of numpy, so that JSON can hold it."""
        if isinstance(value, bool):
            return value
        if isinstance(value, str):
            return str.__str__(value)  # of a member of an enumeration its value
        if isinstance(value, numbers.Real):
            try:
                number = float(value)
            except OverflowError:  # what is no float has no place in JSON, and beyond 4 300 digits no text
                return -math.inf if value < 0 else math.inf
            return int(value) if isinstance(value, numbers.Integral) else number
        if self.type is bool:
            import numpy as np  # only for a value that is no bool of Python

            return bool(value) if isinstance(value, np.bool_) else value
        return value

    def accepts(self, value: Any) -> bool:
        """Whether the option may be `value`, in Python's own type."""
        if value is None or self.choices:
            return self.optional if value is None else isinstance(value, str) and value in self.choices
        kinds = (int, float) if self.type is float else self.type
        if not isinstance(value, kinds) or (isinstance(value, bool) and self.type is not bool):
            return False
        return value in self.range and math.isfinite(value) if self.range else value != ""


@functools.cache
def rules_of(options: type) -> Mapping[str, Rule]:
    """The rule of every option that a dataclass declares, by name, in the order of the declaration."""
    found = {}
    hints = get_type_hints(options, include_extras=True)
    for entry in fields(options):
        hint = hints[entry.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else [hint]
        optional = type(None) in get_args(kind)
        kind = next(part for part in get_args(kind) if part is not type(None)) if optional else kind
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        found[entry.name] = Rule(
            str if choices else kind,
            next((note for note in notes if isinstance(note, str)), ""),
            choices,
            next((note for note in notes if isinstance(note, Range)), None),
            optional,
            None if entry.default is MISSING else entry.default,
        )
    return found


def option_faults(options: type, values: Mapping[str, Any]) -> list[str]:
    """The invalid ones of `values`, by the rules of `options`, a line each."""
    rules = rules_of(options)
    return [
        f"{name}: found {value!r}; expected {rules[name].expected}{did_you_mean(value, rules[name].choices)}"
        for name, value in values.items()
        if not rules[name].accepts(value)
    ]
