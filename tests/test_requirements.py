"""requirements.txt is what pip, `pip install -c` and uv install."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pins(lines: list[str]) -> dict[str, str]:
    """The version of each package, by its normalised name (PEP 503)."""
    found = dict(line.split("==") for line in lines)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}


LINES = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
REQUIRED = [line for line in LINES if line]


def test_pip_takes_it_for_constraints():
    """Which may have no extras, and pin nothing unless each line is `name==version`."""
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in REQUIRED)


def test_uv_sync_resolves_the_same_pins():
    """`uv lock`, after requirements.txt was copied into the group `pins`, mends what this finds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["uv"]["default-groups"] == ["pins"]
    assert project["dependency-groups"]["pins"] == REQUIRED
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    own = next(package for package in packages if package["name"] == "tandem-dpo")
    locked = {each["name"]: each["specifier"] for each in own["metadata"]["requires-dev"]["pins"]}
    assert locked == {name: f"=={version}" for name, version in pins(REQUIRED).items()}
    # With the extra vllm another version of a package may stand beside it
    versions = {(package["name"], package.get("version")) for package in packages}
    assert pins(REQUIRED).items() <= versions
