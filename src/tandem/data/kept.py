"""Messages on tokenized rows that train nothing or teach no end, and on parts that the template does not render."""

from collections import Counter

from tandem.data.tokenized import tell_left_out
from tandem.errors import UserError
from tandem.ranks import warn

_UNRENDERED = "unrendered: "  # prefix, among the counts, of the names of parts that a template leaves out


def count_unrendered(counts: Counter[str], names: set[str]) -> None:
    """Count the parts that the template leaves out of a row (`unrendered.left_out`)."""
    counts.update(_UNRENDERED + name for name in names)


def tell_unrendered(counts: Counter[str], total: int, what: str) -> None:
    """Tell what `count_unrendered` has counted in `total` rows; a row is called `what`."""
    names = {name: count for name, count in counts.items() if name.startswith(_UNRENDERED)}
    tell_left_out(Counter({name.removeprefix(_UNRENDERED): names[name] for name in names}), total, f"{what}s")


def refuse_none(lost: int, total: int, what: str, why: str, max_length: int) -> None:
    """Warn that `lost` of `total` rows train nothing, and why.

    Raises:
        UserError: all of them train nothing.
    """
    if lost == total:
        raise UserError(
            f"--max_length {max_length}: no {what} keeps any of its answers; raise it or set --max_prompt_length"
        )
    if lost:
        warn(f"{lost} of {total} {what}s left out: {why}")


def warn_of_endless(endless: int, total: int, what: str) -> None:
    """Warn if no special token ends an answer in `endless` of `total` rows."""
    if endless:
        warn(
            f"{endless} of {total} {what}s have an answer that no special token ends: the model would not learn to "
            "stop; give a chat template that writes the end-of-sequence token with --chat_template"
        )
