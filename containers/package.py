"""Write the project without tests as a small zip, to upload where git cannot be used (Colab).

    python containers/package.py [FILE]

The zip has one folder, `tandem`. Files that git ignores and symbolic links are left out.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("accelerate_configs", "pipelines", "scripts", "src")
FILES = ("LICENSE", "README.md", "pyproject.toml", "requirements.txt")
_SKIPPED = {"__pycache__", ".DS_Store"}


def packed() -> list[Path]:
    """The files of the package, relative to the project's root."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", *PARTS],
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        found = [Path(name) for name in listed.stdout.split("\0") if name]
    else:  # no git, or no repository, as in an unpacked zip
        found = [path.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*")]
    found += [Path(name) for name in FILES]
    return sorted(
        path
        for path in set(found)
        if (ROOT / path).is_file()
        and not (ROOT / path).is_symlink()
        and not _SKIPPED & set(path.parts)
        and not any(part.endswith(".egg-info") for part in path.parts)
    )


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "tandem.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    # strict_timestamps=False: zip has no dates before 1980, which files of reproducible builds have
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as package:
        for path in packed():
            package.write(ROOT / path, Path("tandem") / path)
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
