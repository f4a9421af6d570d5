"""A table in Markdown keeps what is in its cells."""

from tandem.markdown_table import markdown_table


def test_a_table():
    assert markdown_table(["a", "b"], [["x|y", 1], ["two\nlines", None]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| x\|y | 1 |",
        "| two lines | None |",
    ]
