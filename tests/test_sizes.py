"""That `python -m tests.sizes` sees what is too large; on the house itself it runs with the linters."""

from pathlib import Path

from tests import sizes


def test_what_is_too_large_is_named(tmp_path: Path) -> None:
    method = "    def one(self, a, b, *, c, d, e, f, g=1, **h):\n" + "        pass\n" * 60
    small = "    def two(self, a, b, *, c, d, e, f, g=1):\n" + "        pass\n" * 59
    (tmp_path / "file.py").write_text(f"class Large:\n{method}{small}" + "    x = 1\n" * 130 + "y = 1\n" * 149)
    found = sizes.too_large(list(sizes.sizes(tmp_path)))
    assert [line.split(": ")[1] for line in found] == [
        "a file of 401 lines, of at most 400",
        "a class of 252 lines, of at most 250",
        "a function of 61 lines, of at most 60",
        "a signature of 8 parameters, of at most 7",
    ]
