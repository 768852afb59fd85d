"""Cards as HTML: what is shown as it should be, and that nothing of a stranger's HTML passes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.hub.server.pages.markdown import LONGEST, Links, render
from tests.hub.server.html_tools import Page

LINKS = Links(lambda path: f"/page/{path}", lambda path: f"/file/{path}")


def shown(text: str) -> str:
    return render(text, LINKS).strip()


def parsed(text: str) -> Page:
    page = Page()
    page.feed(shown(text))
    page.close()
    return page


GOOD = {
    "# A *title*": '<h2 id="card-a-title">A <em>title</em></h2>',
    "###### deep": '<h6 id="card-deep">deep</h6>',
    "[here](docs/a b.md)": "<p>[here](docs/a b.md)</p>",
    "[here](docs/a%20b.md)": '<p><a href="/page/docs/a b.md" rel="nofollow noopener">here</a></p>',
    "[here](./x/../y.md#part)": '<p><a href="/page/y.md" rel="nofollow noopener">here</a></p>',
    "[on](#a-title)": '<p><a href="#card-a-title" rel="nofollow noopener">on</a></p>',
    "<https://example.org/?a&b>": '<p><a href="https://example.org/?a&amp;b" rel="nofollow noopener">'
    "https://example.org/?a&amp;b</a></p>",
    "![a *b*](p.png)": '<p><img src="/file/p.png" alt="a b" loading="lazy" /></p>',
    "![far](https://example.org/p.png)": '<p><img src="https://example.org/p.png" alt="far" loading="lazy" /></p>',
    "~~old~~": "<p><s>old</s></p>",
    "```sh\n<b>\n```": '<pre tabindex="0"><code>&lt;b&gt;\n</code></pre>',
    "one <!-- not shown --> two": "<p>one  two</p>",
    "<!-- not\nshown -->": "",
}


@pytest.mark.parametrize("text", GOOD)
def test_what_is_shown(text: str) -> None:
    assert shown(text) == GOOD[text]


def test_a_table() -> None:
    page = parsed("| a | b |\n|:--|--:|\n| 1 | 2 |\n")
    assert [found for tag, found in page.tags if tag == "th"] == [
        {"class": "left", "scope": "col"},
        {"class": "right", "scope": "col"},
    ]
    assert not page.problems


def test_headings_of_one_name_have_ids_of_their_own() -> None:
    assert parsed("# Use\n\n# Use\n\n# main\n").ids == ["card-use", "card-use-2", "card-main"]


BAD = [
    "<script>alert(1)</script>",
    "text <script>alert(1)</script> text",
    '<img src=x onerror="alert(1)">',
    "<div\nonclick=alert(1)>\n\n*x*\n\n</div>",
    "[x](javascript:alert(1))",
    "[x](JaVa&#115;cript:alert(1))",
    "[x](&#x6A;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:x)",
    "[x](//[)",
    "![x](javascript:alert(1))",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    "![x](http://example.org/p.png)",
    "![x](//example.org/p.png)",
    "![x](../../../etc/passwd)",
    "![x](%2e%2e/%2e%2e/x.png)",
    '![a" onerror="alert(1)](p.png)',
    '![x](p.png "t\\" onload=alert(1)")',
    "<style>body { display: none }</style>",
    "<iframe src=https://example.org></iframe>",
    "<svg onload=alert(1)>",
    "<form action=https://example.org><input name=token></form>",
    '```"><script>alert(1)</script>\nx\n```',
    "<a href=javascript:alert(1)>x</a>",
    "| <b onclick=x> |\n|--|\n| <script>1</script> |",
    '[x]: javascript:alert(1) "t"\n\n[x]',
    "<!-- --!> <script>alert(1)</script> -->",
    "<!--> <img src=x onerror=alert(1)> -->",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?php <script>alert(1)</script> ?>",
    "# <img src=x onerror=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\\<script>alert(1)\\</script>",
]


@pytest.mark.parametrize("text", BAD)
def test_what_does_not_pass(text: str) -> None:
    page = parsed(text)
    assert not page.problems
    assert not {tag for tag, _ in page.tags} & {"script", "style", "iframe", "svg", "form", "input"}
    assert not [source for source in page.sources if not source.startswith(("/file/", "https://"))]
    assert not [link for link in page.links if "script" in link]


@settings(max_examples=150, deadline=None)
@given(st.text("<>&\"'`[]()!#*_~|-=:/\\ \nax1.;", max_size=200))
def test_anything_at_all_is_sound(text: str) -> None:
    """No tag but the renderer's own, no attribute that runs, all nested."""
    page = parsed(text)
    assert not page.problems


LONG = ["[", "[a](", "![a", "*a **a ", "<a ", "|a", "<", "`a", "~~a ", "_a", "> ", "<!--", "a\n"]


@pytest.mark.parametrize("text", LONG)
def test_hostile_cards_take_a_bounded_time(text: str) -> None:
    begin = time.monotonic()
    shown(text * (LONGEST // len(text) * 2))
    assert time.monotonic() - begin < 20  # a second or two, on a machine that does much else
