"""What the API takes and gives, as pydantic models; those of the options are made from `lsast.options`."""

import base64
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    Base64Encoder,
    BaseModel,
    ConfigDict,
    EncodedBytes,
    Field,
    ValidationError,
    WithJsonSchema,
    create_model,
)

from lsast_engines.declared_options import Rule
from lsast_engines.errors import UsageError, did_you_mean, fault_list

from ..options.options import rules
from .settings import Settings

State = Literal["queued", "painting", "done", "failed", "cancelled"]

PICTURE_FIELDS = ("picture", "mask")
"""The fields of a request that are pictures."""


def _annotation(rule: Rule) -> Any:
    """The type of an option for pydantic, with its range and its help."""
    kind: Any = Literal[tuple(rule.choices)] if rule.choices else rule.type
    bounds: dict[str, Any] = {}
    if rule.range:
        low, high = rule.range.low, rule.range.high
        bounds = {"gt" if rule.range.above else "ge": low} | ({"le": high} if high < float("inf") else {})
        bounds = {name: rule.type(value) for name, value in bounds.items()}
    elif rule.type is str and not rule.choices:
        bounds = {"min_length": 1, "max_length": 1000}
    bounded: Any = Annotated[kind, Field(**bounds)] if bounds else kind
    if rule.range and rule.range.or_zero:
        schema = {"type": "integer", "minimum": bounds["ge"], "maximum": bounds["le"]}
        bounded = Annotated[kind, AfterValidator(_in(rule)), WithJsonSchema({"anyOf": [{"const": 0}, schema]})]
    return Annotated[Union[bounded, None], Field(description=rule.help)]  # noqa: UP007


def _in(rule: Rule) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not rule.accepts(value):
            raise ValueError(rule.expected)
        return value

    return check


class _Base64(Base64Encoder):
    """Base64 to the letter, also as a data URL, which is what browsers make of a file."""

    @classmethod
    def decode(cls, data: bytes) -> bytes:
        """See `pydantic.EncoderProtocol`."""
        if data.startswith(b"data:"):
            _, encoded, data = data.partition(b";base64,")
            if not encoded:
                raise ValueError("a data URL that is not in base64")
        return base64.b64decode(b"".join(data.split()), validate=True)


_Picture = Annotated[bytes, EncodedBytes(_Base64)]
_BINARY: dict[str, Any] = {"format": "binary"}
_MASK = "Where to paint, a picture of the same size: white is painted, black keeps its pixels."


@dataclass(frozen=True)
class Models:
    """A request for a painting within the limits of a server."""

    options: type[BaseModel]
    """The fields of `lsast.Options`, each with its range."""
    form: type[BaseModel]
    """A painting as a form (multipart/form-data)."""
    json: type[BaseModel]
    """A painting as JSON."""
    rules: Mapping[str, Rule]


@functools.cache
def models(settings: Settings) -> Models:
    """The models of a server; what its settings limit has no larger range."""
    limits = {"size": settings.max_size, "tile": settings.max_tile}
    limited = {
        name: replace(rule, range=replace(rule.range, high=min(rule.range.high, limits.get(name, rule.range.high))))
        if rule.range
        else rule
        for name, rule in rules().items()
    }
    options = create_model(
        "PaintingOptions",
        __config__=ConfigDict(extra="forbid"),
        __doc__="Options of a painting; what is left out is taken from the preset, else the style, else the bundle.",
        **{name: (_annotation(rule), None) for name, rule in limited.items()},  # type: ignore[call-overload]
    )
    form = create_model(
        "PaintingForm",
        __base__=options,
        picture=(bytes, Field(description="The picture.", json_schema_extra=_BINARY)),
        mask=(bytes, Field(b"", description=_MASK, json_schema_extra=_BINARY)),
    )
    json = create_model(
        "PaintingJson",
        __base__=options,
        picture=(_Picture, Field(description="The picture, in base64; a data URL is taken, too.")),
        mask=(_Picture | None, Field(None, description=_MASK)),
    )
    return Models(options, form, json, limited)


class Painting(BaseModel):
    """A job: one painting, from the moment it was accepted."""

    id: str
    state: State
    position: int | None = Field(None, description="Paintings before it, of one that is queued.")
    step: int = Field(0, description="Steps done.")
    steps: int = Field(0, description="Steps in all; 0 until painting begins.")
    seconds_left: float | None = Field(None, description="Estimate, of one that is being painted.")
    error: str | None = Field(None, description="What went wrong, in words.")
    options: dict[str, Any] | None = Field(None, description="All options with the defaults filled in, when done.")
    seconds: dict[str, float] | None = Field(None, description="Wall time of each phase, when done.")
    size: tuple[int, int] | None = Field(None, description="Width and height of the painting, when done.")


class StyleCard(BaseModel):
    """A style that pictures can be painted in."""

    name: str
    guidance: float | None = Field(None, description="The guidance scale of a style with distilled guidance.")
    defaults: dict[str, Any] = Field({}, description="Its own defaults of options, which win over those of the bundle.")
    thumbnail: str | None = Field(None, description="A painted sample, as a data URL; null until it is painted.")


class OptionCard(BaseModel):
    """One option: what a form needs to show it."""

    name: str
    type: Literal["str", "int", "float", "bool"]
    help: str
    choices: list[str] | None = None
    low: float | None = None
    high: float | None = None
    or_zero: bool = Field(False, description="Whether 0 is allowed besides.")
    default: str | int | float | bool | None = None


class OptionSheet(BaseModel):
    """The options, the presets and the limits of this server."""

    version: str
    bundle: str
    stages: int
    options: list[OptionCard]
    presets: dict[str, dict[str, Any]]
    limits: dict[str, float]


class Fault(BaseModel):
    """What went wrong, in words."""

    detail: str


def option_cards(defaults: Mapping[str, Any], settings: Settings) -> list[OptionCard]:
    """A card for every option, with the default values of a bundle, within the limits of a server."""
    return [
        OptionCard(
            name=name,
            type=rule.type.__name__,
            help=rule.help,
            choices=list(rule.choices) or None,
            low=rule.range.low if rule.range else None,
            high=rule.range.high if rule.range and rule.range.high < float("inf") else None,
            or_zero=bool(rule.range and rule.range.or_zero),
            default=min(defaults[name], rule.range.high) if rule.range and name in defaults else defaults.get(name),
        )
        for name, rule in models(settings).rules.items()
    ]


def given_options(values: Mapping[str, str], settings: Settings) -> dict[str, Any]:
    """The options in a query or a form, whose values are texts.

    Raises:
        UsageError: unknown or invalid options, all at once.
    """
    try:
        return models(settings).options.model_validate_strings(values).model_dump(exclude_none=True)
    except ValidationError as error:
        raise UsageError(in_words(error, settings)) from None


def in_words(error: ValidationError, settings: Settings) -> str:
    """The faults that pydantic found, a line each, in the words of the options' rules."""
    limited = models(settings).rules
    known = {**dict.fromkeys(PICTURE_FIELDS), **limited}
    lines: dict[str, None] = {}
    for fault in error.errors(include_url=False, include_context=False):
        name = str(fault["loc"][0]) if fault["loc"] else ""
        rule = limited.get(name)
        if rule:
            near = did_you_mean(fault["input"], rule.choices)
            lines[f"{name}: found {fault['input']!r:.60}; expected {rule.expected}{near}"] = None
        elif fault["type"] == "extra_forbidden":
            near = did_you_mean(name, known) or f"; expected {', '.join(known)}"
            lines[f"{name:.60}: unknown{near}"] = None
        elif fault["type"] == "missing":
            lines[f"{name}: missing"] = None
        elif name in PICTURE_FIELDS:
            lines[f"{name}: expected a picture in base64, or as a data URL"] = None
        else:
            lines[": ".join(filter(None, [name, fault["msg"]]))] = None
    return fault_list("invalid request:", list(lines))
