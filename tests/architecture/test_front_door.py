"""What `fedgraft` exports exists, and editors see the same names that run time finds."""

import ast
import inspect

import pytest

import fedgraft


def seen_by_editors() -> dict[str, str]:
    """Exported name -> the module that `if TYPE_CHECKING` imports it from."""
    tree = ast.parse(inspect.getsource(fedgraft))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_editors_and_run_time_see_the_same_names() -> None:
    assert seen_by_editors() == fedgraft._HOME


@pytest.mark.parametrize("name", dir(fedgraft))
def test_an_exported_name_is_defined_where_it_is_said_to_live(name: str) -> None:
    exported = getattr(fedgraft, name)
    assert exported.__module__ == fedgraft._HOME[name]
    assert exported.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'fedgraft' has no attribute 'grafd'"):
        fedgraft.grafd  # noqa: B018
