"""Tests come through the doors that the code has: none takes a private name of a module of Tandem."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Those imported from a module of tandem, read from one, or named to be replaced in one."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.startswith("tandem.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tandem":
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
            yield from (alias.name for alias in node.names if is_private(alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            first, second = [*map(ast.unparse, node.args[:2]), ""][:2]
            if first in modules and is_private(second.strip("'\"")):
                yield f"{first}.{second}"
            if first.strip("'\"").startswith("tandem.") and any(map(is_private, first.strip("'\"").split("."))):
                yield first


def test_no_test_takes_a_private_name():
    found = {
        str(path.relative_to(TESTS)): names
        for path in sorted(TESTS.rglob("*.py"))
        if (names := list(private_names(ast.parse(path.read_text()))))
    }
    assert not found, f"make it public, or test it through what is: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "from tandem.runs import _held",
        "from tandem import runs\nruns._held(1)",
        "import tandem.runs\ntandem.runs._held",
        "from tandem import runs\nmonkeypatch.setattr(runs, '_held', None)",
        "monkeypatch.setattr('tandem.runs._held', None)",
    ],
)
def test_it_is_seen(code: str):
    assert len(list(private_names(ast.parse(code)))) == 1


def test_what_is_public_or_of_others_is_not():
    code = "from tandem.runs import locked\nfrom os import _exit\nimport openai\nopenai._x\nlocked.__name__"
    assert not list(private_names(ast.parse(code)))
