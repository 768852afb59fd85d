"""A page as a checker reads it: whether its tags nest, what it refers to, and what a person would read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urlsplit

import httpx2

from tests.hub.server.serving import Server

_VOID = {"br", "hr", "img", "input", "link", "meta"}
_NAMED = {"input", "select", "textarea"}
# What the templates and the renderer of cards write; anything else was let through.
_WORDS = """html head title script body a header div svg path rect nav ul ol li form button main footer code pre h1 h2
h3 h4 h5 h6 p span section article table caption thead tbody tr th td details summary dl dt dd label fieldset legend
select option time strong em blockquote s"""
_KNOWN = _VOID | set(_WORDS.split())


@dataclass
class Page(HTMLParser):
    """A page that was read, and what is wrong with it."""

    text: str = ""
    title: str = ""
    problems: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)
    tags: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._labels: set[str] = set()
        self._inputs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in _KNOWN:
            self.problems.append(f"<{tag}>")
        if tag not in _VOID:
            self._open.append(tag)
        if len(found) != len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        self.problems += [f"<{tag} {name}>" for name in found if name.startswith("on") or name == "style"]
        self._refer(tag, found)
        if "id" in found:
            self.ids.append(found["id"])
        if tag == "label":
            self._labels.add(found.get("for", ""))
        if tag in _NAMED and found.get("type") not in ("hidden", "radio"):
            self._inputs.append(found.get("id", "no id"))
        if tag == "input":
            self.fields[found.get("name", "")] = found.get("value", "")
        if tag == "th" and "scope" not in found:
            self.problems.append("<th> without scope")
        if tag == "img" and "alt" not in found:
            self.problems.append("<img> without alt")

    def _refer(self, tag: str, found: dict[str, str]) -> None:
        if tag == "script" and not found.get("src"):
            self.problems.append("a script within the page")
        for name in ("href", "src", "action"):
            if name not in found:
                continue
            (self.links if name == "href" else self.sources).append(found[name])
            if urlsplit(found[name]).scheme not in ("", "http", "https", "mailto"):
                self.problems.append(f"<{tag} {name}={found[name]!r}>")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing that is open")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open[-1:] == ["title"]:
            self.title += data

    def checked(self) -> Page:
        """Itself, if nothing is wrong with it."""
        counts = {tag: sum(name == tag for name, _ in self.tags) for tag in ("h1", "main", "title")}
        assert counts == {"h1": 1, "main": 1, "title": 1}
        assert ("html", {"lang": "en"}) in self.tags
        assert not self._open
        assert len(self.ids) == len(set(self.ids))
        assert set(self._inputs) <= self._labels
        targets = [link[1:] for link in self.links if link.startswith("#") and not link.startswith("#card-")]
        assert set(targets) <= set(self.ids)
        assert not self.problems
        return self


def read(answer: httpx2.Response) -> Page:
    """A page that is sound, and went out with the headers that every page has."""
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "same-origin"
    assert answer.text.startswith("<!doctype html>\n")
    page = Page()
    page.feed(answer.text)
    page.close()
    return page.checked()


def browser(server: Server) -> httpx2.Client:
    """A client that keeps cookies and asks for pages."""
    return httpx2.Client(base_url=server.url, headers={"Accept": "text/html,*/*;q=0.8"})


@contextlib.contextmanager
def logged_in(server: Server, user: str) -> Iterator[httpx2.Client]:
    """The same, with a session for a user's token."""
    with browser(server) as client:
        form = read(client.get("/login")).fields["form"]
        answer = client.post("/login", data={"form": form, "token": server.tokens.get(user, user), "next": "/"})
        assert answer.status_code == 303, answer.text
        yield client
