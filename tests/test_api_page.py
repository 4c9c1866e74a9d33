"""docs/api.md is what the docstrings say, and they say something about everything."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import lsast

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api_page", DOCS / "make_api_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_docstrings_say(maker):
    written = (DOCS / "api.md").read_text(encoding="utf-8")
    assert written == maker.page(), "run: python docs/make_api_page.py"


def test_every_public_name_is_on_it_with_every_parameter_and_field(maker):
    text = maker.page()
    for name in lsast.__all__:
        assert re.search(rf"(## |- )`{name}`", text), name
        value = getattr(lsast, name)
        if not inspect.isclass(value) or not issubclass(value, lsast.LsastError):
            for parameter in inspect.signature(value.stylize if name == "Stylizer" else value).parameters:
                assert parameter == "self" or re.search(rf"\b{parameter}: ", text), (name, parameter)
