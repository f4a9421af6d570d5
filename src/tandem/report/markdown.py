"""Markdown in answers, as a tree of a few kinds of elements, from which alone pages are built: answers are hostile.

A node is text, or a list of an element's name and its children; an `ol` may have its first number as second item.
There are no links, images or HTML: what an answer has of them stays text.
"""

import functools
import re
from typing import Any

from markupsafe import Markup, escape

ELEMENTS = frozenset(
    "p h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong hr br table thead tbody tr th td".split()  # noqa: SIM905
)
LONGEST = 100_000  # characters; a longer answer is shown as plain text
_MARKED = re.compile(
    r"^ {0,3}(?:#{1,6} |>|[-*+] |\d{1,9}[.)] |```|~~~|\|)|^ {4}|`[^`]+`|\*\*\S|__\S|(?<!\w)[*_]\w", re.MULTILINE
)
_VOID = frozenset(("hr", "br"))

Node = str | list[Any]


def formatted(text: str) -> list[Node] | None:
    """The nodes of a text; None where it has nothing of Markdown and is shown as plain text."""
    if len(text) > LONGEST or not _MARKED.search(text):
        return None
    from markdown_it.tree import SyntaxTreeNode

    try:
        return _children(SyntaxTreeNode(_parser().parse(text)))
    except RecursionError:
        return None


@functools.cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False, "maxNesting": 20}).enable("table")
    return markdown.disable(["image", "link", "autolink", "reference", "html_block", "html_inline"])


def _children(node: Any) -> list[Node]:
    found: list[Node] = []
    for child in node.children:
        found += _nodes(child)
    return found


def _nodes(node: Any) -> list[Node]:
    if node.type in ("inline", "text"):
        return _children(node) if node.children else [node.content] if node.content else []
    if node.type == "softbreak":
        return ["\n"]
    if node.type in ("fence", "code_block"):
        return [["pre", ["code", node.content]]]
    if node.type == "code_inline":
        return [["code", node.content]]
    if node.type == "paragraph" and node.hidden:  # of a tight list
        return _children(node)
    if node.tag not in ELEMENTS:
        return [node.content] if node.content else _children(node)
    start = node.attrs.get("start") if node.tag == "ol" else None
    return [[node.tag, *([start] if isinstance(start, int) else []), *_children(node)]]


def as_html(text: str) -> Markup:
    """A text as HTML, for the page without a script; everything but the elements' names is escaped."""
    nodes = formatted(text)
    if nodes is None:
        return Markup('<div class="text">{}</div>').format(text)
    return Markup('<div class="formatted">{}</div>').format(Markup("").join(map(_html, nodes)))


def _html(node: Node) -> Markup:
    if isinstance(node, str):
        return escape(node)
    name, *children = node
    first = children.pop(0) if children and isinstance(children[0], int) else None
    assert name in ELEMENTS
    start = Markup(' start="{}"').format(first) if first is not None else ""
    if name in _VOID:
        return Markup(f"<{name}>")
    return Markup(f"<{name}{start}>{Markup('').join(map(_html, children))}</{name}>")
