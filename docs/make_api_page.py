"""Write docs/api.md from the docstrings of the library's public names.

    python docs/make_api_page.py

A test makes sure that the page is what this writes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

_SECTIONS = ("Args", "Returns", "Yields", "Raises")


def page() -> str:
    """The text of the page."""
    import lsast

    values = {name: getattr(lsast, name) for name in lsast.__all__}
    errors = {name: value for name, value in values.items() if _is_error(value)}
    parts = [
        "# API of `lsast`",
        "Written from the docstrings by `docs/make_api_page.py`. `import lsast` costs next to nothing: what a name "
        "needs is imported when the name is first used.",
    ]
    for name, value in values.items():
        if name not in errors:
            parts += _class(name, value) if inspect.isclass(value) else _function(name, value, "##")
    parts += ["## Errors", "Messages say what was found, what was expected, and how to mend it.", _tree(errors)]
    return "\n\n".join(parts) + "\n"


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _class(name: str, value: type) -> list[str]:
    parts = [f"## `{name}`", _text(inspect.getdoc(value) or "")]
    if dataclasses.is_dataclass(value):
        parts += ["**Fields**", _fields(value)]
    for method_name, method in vars(value).items():
        if method_name.startswith("_") or not (inspect.getdoc(method) and callable(getattr(value, method_name, None))):
            if isinstance(method, property) and not method_name.startswith("_"):
                parts += [f"### `{name}.{method_name}`", _text(inspect.getdoc(method) or "")]
            continue
        function = method.__func__ if isinstance(method, classmethod) else method
        parts += _function(f"{name}.{method_name}", function, "###")
    return parts


def _fields(value: type) -> str:
    """A list of a dataclass's fields, each with the docstring under it."""
    from lsast.options.options import rules

    documents = _field_documents(value)
    lines = []
    for field in dataclasses.fields(value):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        text = _join(documents.get(field.name, "")).replace("``", "`")
        kind = str(field.type)
        if kind.startswith("Annotated"):  # an option
            rule = rules()[field.name]
            kind, text = (
                inspect.formatannotation(typing.get_type_hints(value)[field.name]),
                f"{rule.help} Expected: {rule.expected}.",
            )
        lines.append(f"- `{field.name}: {kind}{default}`" + (f" — {text}" if text else ""))
    return "\n".join(lines)


def _field_documents(value: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        document = after.value if isinstance(after, ast.Expr) else None
        if isinstance(statement, ast.AnnAssign) and isinstance(document, ast.Constant):
            assert isinstance(statement.target, ast.Name)
            found[statement.target.id] = str(document.value)
    return found


def _function(name: str, function: Any, level: str) -> list[str]:
    signature = inspect.signature(function)
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(_parameter(parameter))
    parameters = [text for text in shown if text not in ("self", "cls")]
    returns = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    body = ",\n    ".join(parameters)
    one_line = f"{prefix}{name}({', '.join(parameters)}){returns}"
    if len(one_line) > 100:
        one_line = f"{prefix}{name}(\n    {body},\n){returns}"
    return [f"{level} `{name}`", f"```python\n{one_line}\n```", _text(inspect.getdoc(function) or "")]


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{kind}"
    return f"{stars}{parameter.name}{kind} = {parameter.default!r}"


def _text(document: str) -> str:
    """A docstring as Markdown: its sections become headings with lists."""
    blocks: list[str] = []
    for part in re.split(rf"^({'|'.join(_SECTIONS)}):\n", document, flags=re.MULTILINE):
        if part in _SECTIONS:
            blocks.append(f"**{part}**")
        elif blocks and blocks[-1].strip("*") in _SECTIONS:
            section, rest = _dedented(part)
            blocks += [_list(section), *([rest] if rest else [])]
        else:
            blocks += [_join(paragraph) for paragraph in part.strip().split("\n\n") if paragraph]
    return "\n\n".join(block.replace("``", "`") for block in blocks)


def _dedented(part: str) -> tuple[str, str]:
    """The indented lines that a section begins with, and what comes after them."""
    lines = part.rstrip().split("\n")
    count = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[:count])).strip(), "\n".join(lines[count:]).strip()


def _list(section: str) -> str:
    """``name: what`` entries as a list; a text without names as it is."""
    entries = re.split(r"\n(?=\S)", section)
    if not all(re.match(r"[\w, ]+: ", entry) for entry in entries):
        return _join(section)
    lines = []
    for entry in entries:
        name, _, what = entry.partition(": ")
        lines.append(f"- `{name}`: {_join(what)}")
    return "\n".join(lines)


def _join(text: str) -> str:
    return " ".join(text.split())


def _tree(errors: dict[str, type[Exception]]) -> str:
    """The errors as a list, the more special below the more general."""

    def below(parent: str | None, level: int) -> list[str]:
        lines = []
        for name, value in errors.items():
            base = value.__mro__[1].__name__
            if (base if base in errors else None) == parent:
                status = getattr(value, "exit_code", 1)
                lines.append(f"{'  ' * level}- `{name}` (exit {status}): {_join(inspect.getdoc(value) or '')}")
                lines += below(name, level + 1)
        return lines

    return "\n".join(below(None, 0))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "engines"), str(ROOT / "runtime")]
    PAGE.write_text(page(), encoding="utf-8")
