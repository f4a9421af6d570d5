"""`python -m tests.modules` writes the table of modules in docs/architecture.md: of each its docstring's beginning."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "src" / "tandem", ROOT / "docs" / "architecture.md"
HEADING = "## Modules\n"


def first_sentence(file: Path) -> str:
    """Of its docstring, in one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?]) (?=[A-Z`a-z])", paragraph)[0]


def table() -> str:
    """A row for each module: its name and its docstring's first sentence."""
    rows = []
    for file in sorted(SOURCE.rglob("*.py")):
        if file.stem != "__init__":
            name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
            rows.append(f"| `{name}` | {first_sentence(file).replace('|', '&#124;')} |")
    return "\n".join(["| module | what it is |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """docs/architecture.md with the table of today's modules at its end."""
    before, heading, _ = PAGE.read_text(encoding="utf-8").partition(HEADING)
    assert heading, f"{PAGE} has no {HEADING.strip()}"
    return f"{before}{heading}\nBy `python -m tests.modules`, from the modules themselves.\n\n{table()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
