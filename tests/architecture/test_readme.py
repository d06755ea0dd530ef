"""What the README and the guide name is there: files, links, verbs, imports."""

import ast
import re
from pathlib import Path

import pytest

import fedgraft
from fedgraft.cli.main import ORDER

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "fedgraft"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def files_in_tree() -> set[str]:
    """Paths below the package that the README's tree comments on."""
    tree = README[README.index("    src/fedgraft/\n") : README.index("A file imports its own")]
    files, folder = set(), ""
    for line in tree.splitlines()[1:]:
        if found := re.match(r" {6}(\w+/) ", line):
            folder = found[1]
        elif found := re.match(r" {6}( {2})?([\w.]+\.\w+) ", line):
            files.add((folder if found[1] else "") + found[2])
    return files


def test_the_tree_comments_on_every_file() -> None:
    parts = {f.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py")}
    parts = {p for p in parts if not p.endswith("__init__.py") and not p.startswith("cli/")}
    tree = files_in_tree()
    assert {name for name in tree if name.endswith(".py")} == parts
    assert [name for name in tree if not (PACKAGE / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
    drawn_later = {"docs/report.png"}
    assert [to for to in links if to not in drawn_later and not (page.parent / to).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_verbs_that_exist(page: Path) -> None:
    verbs = re.findall(r"^(?:\$ |    )fedgraft (\w+)", page.read_text(encoding="utf-8"), re.M)
    assert set(verbs) <= set(ORDER)


def test_the_example_in_python_imports_what_is_exported() -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    imported = [
        alias.name
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.ImportFrom) and node.module == "fedgraft"
        for alias in node.names
    ]
    assert imported
    assert set(imported) <= set(dir(fedgraft))
