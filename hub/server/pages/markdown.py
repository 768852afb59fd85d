"""A card's Markdown as HTML that is safe to show.

Raw HTML never passes: of a tag in the text nothing is left, of a block of HTML its text. What remains is made by the
renderer, which escapes all it writes. Links lead to http, https, mailto, or within the site, and tell search engines
nothing; images come from the repository itself or over https.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urlsplit

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

# Characters of a card that are shown. Beyond lies the time that hostile text can take to parse.
LONGEST = 100_000
_SCRIPT = re.compile(r"<(script|style|template|svg|math|textarea|title)\b.*?(</\1\s*>|\Z)", re.DOTALL | re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?(-->|\Z)", re.DOTALL)
_TAG = re.compile(r"<[^>]*(>|\Z)")
_NOT_A_WORD = re.compile(r"[^\w]+")
_ALIGNED = re.compile(r"text-align:(left|right|center)")


@dataclass(frozen=True)
class Links:
    """Where a card's relative links lead: functions from a path within the repository to an address."""

    page: Callable[[str], str]
    file: Callable[[str], str]


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # HTML is recognised, so that it can be left out; its tokens are replaced before anything is rendered.
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def render(text: str, links: Links) -> str:
    """HTML for Markdown from a stranger. Its headings begin at the second level, below the page's own."""
    parser = _parser()
    tokens = parser.parse(text[:LONGEST])
    return str(parser.renderer.render(list(_blocks(tokens, links)), parser.options, {}))


def _blocks(tokens: list[Token], links: Links) -> Iterator[Token]:
    from markdown_it.common.utils import escapeHtml
    from markdown_it.token import Token

    def raw(content: str) -> Token:
        return Token("html_block", "", 0, content=content)

    known: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if token.type == "html_block":
            if shown := _text_of(token.content):
                yield raw(f"<p>{escapeHtml(shown)}</p>\n")
        elif token.type in ("fence", "code_block"):
            yield raw(f'<pre tabindex="0"><code>{escapeHtml(token.content)}</code></pre>\n')
        elif token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 1, 6)}"
            if token.type == "heading_open":
                token.attrs = {"id": _anchor(tokens[number + 1].content, known)}
            yield token
        elif token.type == "table_open":
            yield raw('<div class="scroll" tabindex="0" role="region" aria-label="Table">')
            yield token
        elif token.type == "table_close":
            yield token
            yield raw("</div>\n")
        elif token.type in ("th_open", "td_open"):
            aligned = _ALIGNED.fullmatch(str(token.attrs.get("style", "")))
            token.attrs = {"class": aligned[1]} if aligned else {}
            if token.type == "th_open":
                token.attrs["scope"] = "col"
            yield token
        else:
            if token.children is not None:
                token.children = list(_inline(token.children, links))
            yield token


def _text_of(html: str) -> str:
    """The text between the tags of a block of HTML."""
    return " ".join(_TAG.sub(" ", _SCRIPT.sub(" ", _COMMENT.sub(" ", html))).split())


def _anchor(text: str, known: dict[str, int]) -> str:
    """An id for a heading, which cannot be taken for one of the page's own."""
    word = _NOT_A_WORD.sub("-", text.lower()).strip("-")[:80]
    known[word] = known.get(word, 0) + 1
    return f"card-{word}" + (f"-{known[word]}" if known[word] > 1 else "")


def _inline(tokens: list[Token], links: Links) -> Iterator[Token]:
    from markdown_it.token import Token

    for token in tokens:
        if token.type == "html_inline":
            continue
        if token.type == "link_open":
            address = _page(str(token.attrs.get("href", "")), links)
            token.attrs = {"href": address, "rel": "nofollow noopener"} if address else {}
        elif token.type == "image":
            address = _image(str(token.attrs.get("src", "")), links)
            if address is None:
                yield Token("text", "", 0, content=token.content)
                continue
            token.attrs = {"src": address, "alt": "", "loading": "lazy"}
        yield token


def _page(address: str, links: Links) -> str | None:
    """Where a link leads; None for nowhere."""
    if address.startswith("#"):
        return f"#card-{address[1:]}"
    parts = _split(address)
    if parts is None or parts.scheme not in ("", "http", "https", "mailto"):
        return None
    if parts.scheme or parts.netloc or address.startswith("/"):
        return address
    path = _within(parts.path)
    return links.page(path) if path else None


def _image(address: str, links: Links) -> str | None:
    """Where an image comes from; None for one that may not be shown."""
    parts = _split(address)
    if parts is None or parts.scheme not in ("", "https"):
        return None
    if parts.scheme:
        return address
    path = None if parts.netloc or address.startswith("/") else _within(parts.path)
    return links.file(path) if path else None


def _split(address: str) -> SplitResult | None:
    try:
        return urlsplit(address)
    except ValueError:  # brackets that hold no IPv6 address
        return None


def _within(path: str) -> str | None:
    """A relative path without dots; None for one that leads out of the repository."""
    plain = posixpath.normpath(unquote(path))
    return None if plain in (".", "..") or plain.startswith(("../", "/")) else plain
