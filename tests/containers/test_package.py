"""`make package`: what is in the zip, and what is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("accelerate_configs", "containers", "pipelines", "scripts", "src")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project without git, as GitHub's own zip is."""
    folder = tmp_path / "project"
    for name in PARTS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def packed(project: Path) -> dict[str, int]:
    """The mode of each file in the project's package."""
    command = [sys.executable, project / "containers" / "package.py"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    target = project / "dist" / "tandem.zip"
    assert said.startswith(f"{target} (") and target.stat().st_size < 5e6
    with zipfile.ZipFile(target) as package:
        assert package.testzip() is None
        return {entry.filename: entry.external_attr >> 16 & 0o777 for entry in package.infolist()}


def commit(project: Path) -> None:
    git = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)


@pytest.mark.parametrize("with_git", [True, False])
def test_the_package_is_the_project_that_runs_and_no_more(project: Path, with_git: bool):
    if with_git:
        (project / ".gitignore").write_text("*.secret\n__pycache__/\n*.egg-info/\n")
        commit(project)
        (project / "src" / "mine.secret").touch()
        (project / "src" / "new.py").touch()  # not committed yet, and wanted
        (project / "scripts" / "report.py").unlink()  # deleted, and not committed yet
    expected = {
        f"tandem/{path.relative_to(project)}"
        for part in PARTS
        for path in (project / part).rglob("*")
        if part != "containers" and path.is_file() and path.name != "mine.secret"
    } | {f"tandem/{name}" for name in ("LICENSE", "README.md", "pyproject.toml", "requirements.txt")}
    (project / "pipelines" / "outside").symlink_to("/etc/passwd")
    for junk in ("src/tandem/__pycache__/x.pyc", "src/tandem.egg-info/PKG-INFO"):
        (project / junk).parent.mkdir()
        (project / junk).touch()
    (project / "runs").mkdir()
    (project / "runs" / "model.safetensors").touch()

    found = packed(project)
    assert set(found) == expected
    assert found["tandem/pipelines/dpo_pipeline_sanity.sh"] & 0o111 == 0o111
    assert not found["tandem/pyproject.toml"] & 0o111


def test_a_file_of_before_1980_can_be_packed(project: Path):
    os.utime(project / "LICENSE", (0, 0))
    assert "tandem/LICENSE" in packed(project)
