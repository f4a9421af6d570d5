"""Markdown in answers: what is shown of it, and that nothing an answer holds becomes anything else."""

import json
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.report.markdown import ELEMENTS, as_html, formatted

MARKS = ["*", "**", "_", "`", "```\n", "# ", "> ", "- ", "1. ", "|a|b|\n|-|-|\n|", "<b>", "</p>", "<script>"]
MARKS += ["[x](javascript:1)", "![i](//h/i.png)", "<!--", "&lt;", "\n", "\n\n", "    ", "\u2028", "\x00", "word"]
MARKS += ['"', "'", "\\", '~~~ a" onx=1\n']


def texts(nodes):
    for node in nodes:
        if isinstance(node, str):
            yield node
        else:
            assert node[0] in ELEMENTS
            yield from texts(part for part in node[1:] if not isinstance(part, int))


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_lists_code_and_emphasis():
    text = "# Rice\n\nRest it **ten** minutes:\n\n3. lid on\n4. `heat` off\n\n```sh\n<b>&\n```\n> so\n"
    assert formatted(text) == [
        ["h1", "Rice"],
        ["p", "Rest it ", ["strong", "ten"], " minutes:"],
        ["ol", 3, ["li", "lid on"], ["li", ["code", "heat"], " off"]],
        ["pre", ["code", "<b>&\n"]],
        ["blockquote", ["p", "so"]],
    ]
    assert as_html("a\n\n* b") == '<div class="formatted"><p>a</p><ul><li>b</li></ul></div>'
    assert as_html("2) x\n3) y") == '<div class="formatted"><ol start="2"><li>x</li><li>y</li></ol></div>'


def test_a_table():
    assert formatted("| a | b |\n|---|:-:|\n| 1 | *2* |") == [
        ["table", ["thead", ["tr", ["th", "a"], ["th", "b"]]], ["tbody", ["tr", ["td", "1"], ["td", ["em", "2"]]]]]
    ]


@pytest.mark.parametrize("text", ["", "Plain words. 3 < 4 and 2*3 = 6.", "snake_case_name", "a - b", "5 > 4 & x"])
def test_plain_text_is_left_alone(text):
    assert formatted(text) is None
    assert Tags(as_html(text)).text == text


HOSTILE = [
    "# <script>alert(1)</script>",
    "**<img src=x onerror=alert(1)>**",
    "[click](javascript:alert(1)) **now**",
    "![x](https://evil.example/x.png) `a`",
    "<a href=//evil>x</a>\n\n# y",
    '```html" onload="x\n</code></pre><script>x</script>\n```',
    "- &lt;script&gt;",
    "[x]: javascript:alert(1)\n\n**[x]**",
    "<https://evil.example> `x`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_hostile_stays_text(text):
    page = Tags(as_html(text))
    assert set(page.tags) <= ELEMENTS | {"div"}
    assert page.attributes == [("class", "formatted")]


@given(st.lists(st.sampled_from(MARKS), max_size=25).map("".join))
def test_no_text_makes_another_element(text):
    page = Tags(as_html(text))
    assert set(page.tags) <= ELEMENTS | {"div"}
    assert {name for name, _ in page.attributes} <= {"class", "start"}
    nodes = formatted(text)
    if nodes is not None:
        json.dumps(nodes)
        assert "".join(texts(nodes)).count("word") <= text.count("word")


@pytest.mark.parametrize(
    "text", ["> " * 3000 + "x", "- " * 3000 + "x", "*" * 20_000, "`" * 20_000, "[" * 20_000 + "**a", "|" * 9000]
)
def test_what_is_nested_deeply_takes_no_time(text):
    start = time.process_time()
    as_html(text)
    assert time.process_time() - start < 5
