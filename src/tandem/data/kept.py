"""What a training says of tokenized rows that train nothing or teach no end, and of what no template renders."""

from collections import Counter

from tandem.data.tokenized import tell_left_out
from tandem.errors import UserError
from tandem.ranks import warn

_UNRENDERED = "unrendered: "  # before what a template leaves out, among the counts of a making


def count_unrendered(counts: Counter[str], names: set[str]) -> None:
    """Count what the template leaves out of a row (`unrendered.left_out`)."""
    counts.update(_UNRENDERED + name for name in names)


def tell_unrendered(counts: Counter[str], total: int, what: str) -> None:
    """Say what was counted by `count_unrendered` in `total` rows, each of which is a `what`."""
    names = {name: count for name, count in counts.items() if name.startswith(_UNRENDERED)}
    tell_left_out(Counter({name.removeprefix(_UNRENDERED): names[name] for name in names}), total, f"{what}s")


def refuse_none(lost: int, total: int, what: str, why: str, max_length: int) -> None:
    """Say how many of `total` rows train nothing, and why.

    Raises:
        UserError: all of them.
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
