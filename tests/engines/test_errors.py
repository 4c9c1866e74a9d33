from __future__ import annotations

from lsast_engines import errors


def test_errors_docstring_has_the_exception_tree() -> None:
    assert errors.__doc__
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LsastError)]
    assert len(kinds) > 8
    for kind in kinds:
        (line,) = (line for line in errors.__doc__.splitlines() if kind.__name__ in line.split())
        assert f"exit {kind.exit_code}" in line
        if kind is not errors.LsastError:
            (base,) = (line for line in errors.__doc__.splitlines() if kind.__bases__[0].__name__ in line.split())
            assert line.index(kind.__name__) > base.index(kind.__bases__[0].__name__)
