"""The tree of errors that is drawn is the tree that is defined."""

import inspect
import re

from fedgraft import errors


def drawn() -> dict[str, str]:
    """Each error in the drawing -> the one it hangs from, read by its depth."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = [(-1, "Exception")]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"(\s+(?:[│├└─]+\s*)*)(\w+Error)\s{2,}\S", line):
            depth, name = len(match[1]), match[2]
            while above[-1][0] >= depth:
                above.pop()
            parents[name] = above[-1][1]
            above.append((depth, name))
    return parents


def test_the_tree_drawn_is_the_tree_defined() -> None:
    defined = {
        name: error.__base__.__name__
        for name, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, Exception) and error.__base__
    }
    assert drawn() == defined
    assert defined["FedgraftError"] == "Exception"
