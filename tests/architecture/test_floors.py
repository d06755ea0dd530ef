"""A file imports its own package and lower floors; a third-party library has one home.

    0 errors provenance progress noise
    1 weights | text | models
    2 training | evaluation
    3 selection
    4 federation
    5 study | pocket
    6 report
    7 cli

Packages side by side on one floor do not know each other. `fedgraft/__init__.py` is the front door
and may name everything; `testing.py` is a side door that no other file of the package goes through.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "fedgraft"
FLOOR = {
    part: int(number)
    for number, parts in re.findall(r"^    (\d) (.+)$", __doc__ or "", re.MULTILINE)
    for part in re.findall(r"\w+", parts)
}
DOORS = {"__init__", "__main__", "testing"}
HOMES: dict[str, str | tuple[str, ...]] = {
    "blake3": "weights/",
    "datasets": "text/sources.py",
    "dp_accounting": "noise.py",
    "flwr": "federation/flower.py",
    "fundus": "text/crawl.py",
    "huggingface_hub": "weights/",
    "jinja2": (
        "report/template.py",
        "text/dialogues.py",  # what a chat template raises
    ),
    "langdetect": "evaluation/harness.py",
    "lm_eval": "evaluation/harness.py",
    "matplotlib": "report/figures.py",
    "nltk": "evaluation/harness.py",
    "peft": "training/adapter.py",
    "punkt": "evaluation/harness.py",
    "py3langid": "text/cleaning.py",
    "pyarrow": "text/sources.py",
    "rensa": "text/cleaning.py",
    "rouge_score": "evaluation/rouge.py",
    "safetensors": (
        "weights/",
        "models.py",  # what torch saves and loads
        "training/",
        "federation/",  # messages, and what a round leaves
    ),
    "sklearn": "selection/",
    "trafilatura": "text/sources.py",
    "typer": "cli/",
    "yaml": "study/",
    "zstandard": ("weights/planes.py", "text/sources.py"),
}
NOUNS_OF_NOTHING = {"utils", "util", "core", "common", "helpers", "helper", "manager", "misc"}


@dataclass(frozen=True)
class Source:
    """One file of fedgraft, read but not imported."""

    name: str
    """Its path below the package, e.g. `weights/graft.py`."""
    code: str

    @property
    def part(self) -> str:
        """The package that it belongs to, or its own name where it stands alone."""
        return self.name.partition("/")[0].removesuffix(".py")

    def imports(self) -> Iterator[str]:
        """Dotted names imported anywhere in the file: `from a import b` gives `a.b`."""
        for node in ast.walk(ast.parse(self.code, self.name)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = "." * node.level + (node.module or "")
                yield from (f"{start}.{alias.name}" for alias in node.names)


SOURCES = [
    Source(file.relative_to(PACKAGE).as_posix(), file.read_text(encoding="utf-8"))
    for file in sorted(PACKAGE.rglob("*.py"))
]
INSIDE = [source for source in SOURCES if source.part not in DOORS]


def climbs(source: Source) -> list[str]:
    """Imports of a file that lead to its own floor's neighbours or higher."""
    return [
        f"{source.name} imports {imported}"
        for imported in source.imports()
        if imported.startswith("fedgraft.")
        and (other := imported.split(".")[1]) != source.part
        and not FLOOR.get(other, 99) < FLOOR[source.part]
        and {FLOOR.get(other), FLOOR[source.part]} != {0}
    ]


def strays(source: Source) -> list[str]:
    """Imports of a library in a file that is not its home."""
    return [
        f"{source.name} imports {imported}, whose home is {home}"
        for imported in source.imports()
        if (home := HOMES.get(imported.split(".")[0])) and not source.name.startswith(home)
    ]


def test_every_file_stands_on_a_floor() -> None:
    assert {source.part for source in INSIDE} <= FLOOR.keys()


def test_a_file_imports_its_own_package_and_lower_floors_only() -> None:
    assert [breach for source in INSIDE for breach in climbs(source)] == []


def test_each_library_has_one_home() -> None:
    assert [breach for source in INSIDE for breach in strays(source)] == []


def test_weights_know_neither_torch_nor_transformers_but_for_live_models() -> None:
    heavy = {"torch", "transformers", "tokenizers", "peft"}
    weights = [source for source in INSIDE if source.part == "weights"]
    knowing = {
        (source.name, library)
        for source in weights
        for name in source.imports()
        if (library := name.split(".")[0]) in heavy
    }
    assert knowing == {("weights/live.py", "torch"), ("weights/live.py", "transformers")}


def test_models_alone_calls_the_auto_classes_of_transformers() -> None:
    callers = {
        source.name
        for source in INSIDE
        for imported in source.imports()
        if imported.startswith("transformers.") and imported.split(".")[-1].startswith("Auto")
    }
    assert callers <= {"models.py"}


def test_imports_are_absolute() -> None:
    assert [s.name for s in SOURCES for name in s.imports() if name.startswith(".")] == []


def test_a_file_is_named_after_a_noun_of_the_product() -> None:
    words = {word for source in SOURCES for word in re.split(r"[/_.]", source.name)}
    assert words & NOUNS_OF_NOTHING == set()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("weights/graft.py", "def late():\n    from fedgraft.study.study import Study"),
        ("weights/graft.py", "from fedgraft.text import corpus"),
        ("weights/graft.py", "import fedgraft.testing"),
        ("weights/graft.py", "from fedgraft import Family"),
        ("study/study.py", "from fedgraft import pocket"),
        ("errors.py", "from fedgraft.weights import graft"),
    ],
)
def test_a_planted_climb_is_seen(name: str, code: str) -> None:
    assert len(climbs(Source(name, code))) == 1


def test_a_planted_stray_is_seen() -> None:
    assert strays(Source("study/run.py", "import peft")) == [
        "study/run.py imports peft, whose home is training/adapter.py"
    ]
