"""Pictures of an analysis: well-formed, complete without a network, legible in light and dark, whole or not at all."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import surgery
from surgery.analysis.page import cell_colours, page, told
from surgery.analysis.panels import Curves, Grid, panels
from surgery.analysis.report import AnalyzeReport
from surgery.errors import MissingExtraError, OptionError, OutputError
from tests.tools import square_adapter, square_checkpoint

_VOID = {"meta", "line"}


class Parsed(HTMLParser):
    """Checks that every tag is closed in order, and collects what the page says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def report(tmp_path: Path) -> AnalyzeReport:
    """Of three adapters of two ranks."""
    base = square_checkpoint(tmp_path / "base", 3, 24)
    adapters = [square_adapter(tmp_path / f"a{rank}", 3, 24, rank) for rank in (2, 5)]
    return surgery.analyze(base, *adapters, adapters[0])


def test_what_is_drawn(report: AnalyzeReport) -> None:
    """Of each adapter its size, amplification, spectrum and overlap with W; of every two what they share."""
    drawn = panels(report)
    titles = [panel.title for panel in drawn]
    for adapter in ("a2 (1)", "a5", "a2 (3)"):
        assert f"{adapter}: size" in titles
        assert f"{adapter}: amplification" in titles
        assert f"{adapter}: phi with W, input side" in titles
    shared = next(panel for panel in drawn if panel.title == "Shared input directions")
    assert isinstance(shared, Grid)
    assert shared.rows == shared.columns == ("a2 (1)", "a5", "a2 (3)")
    assert shared.values[0][0] is None
    assert shared.values[0][2] == pytest.approx(1)
    phi = next(panel for panel in drawn if panel.title == "a2 (1) and a5: phi(i, j), input side")
    assert isinstance(phi, Grid)
    assert (len(phi.rows), len(phi.columns)) == (2, 5)
    first = report.modules[0].pairs[0].input
    assert first is not None
    means = [module.pairs[0].input.phi[0][0] for module in report.modules if module.pairs[0].input]
    assert phi.values[0][0] == pytest.approx(sum(means) / 3)
    curve = next(panel for panel in drawn if panel.title == "a5: singular values of dW")
    assert isinstance(curve, Curves)
    assert all(len(one.x) == 5 for one in curve.curves)


def test_many_adapters_share_one_table(tmp_path: Path) -> None:
    base = square_checkpoint(tmp_path / "base", 1, 16)
    adapters = [square_adapter(tmp_path / f"a{n}", 1, 16, 2) for n in range(4)]
    titles = [panel.title for panel in panels(surgery.analyze(base, *adapters))]
    assert "Shared input directions" in titles
    assert not [title for title in titles if " and " in title]


def test_a_page_is_complete_and_says_what_it_shows(report: AnalyzeReport) -> None:
    text = page(report)
    parsed = Parsed(text)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    said = " ".join(parsed.words)
    for panel in panels(report):
        assert panel.title in said
        assert panel.note in said
    assert "prefers-color-scheme: dark" in text
    assert parsed.tags.count("svg") > 3
    assert text.count("role='img' aria-label=") == sum(isinstance(p, Curves) for p in panels(report))
    assert text.count("scope='row'") > 20


def test_names_do_not_become_markup(tmp_path: Path) -> None:
    base = square_checkpoint(tmp_path / "<b>base", 1, 12)
    adapter = square_adapter(tmp_path / "<i>&x", 1, 12)
    text = page(surgery.analyze(base, adapter))
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;i&gt;&amp;x: size" in text


def test_every_cell_can_be_read() -> None:
    """Black or white on each colour of the scale has a contrast of at least 4.5 to 1 (WCAG 2, AA)."""

    def luminance(channels: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for step in range(101):
        red, green, blue, ink = cell_colours(step / 100, 0, 1)
        back = luminance([red / 255, green / 255, blue / 255])
        front = 1.0 if ink == "#ffffff" else 0.0
        assert (max(back, front) + 0.05) / (min(back, front) + 0.05) >= 4.5
    assert cell_colours(3.0, 2.0, 2.0)[:3] == cell_colours(0.0, 0, 1)[:3]


def test_the_lines_can_be_told_from_the_paper() -> None:
    """Each hue has a contrast of at least 4.5 to 1 with the background of its scheme."""
    from surgery.analysis import page as module

    style = module._STYLE
    light, dark = style.split("@media")[0], style.split("@media")[1]

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in (light, dark):
        (paper,) = re.findall(r"--paper: (#\w{6})", scheme)
        hues = re.findall(r"--(?:h\d|ink|faint): (#\w{6})", scheme)
        assert len(hues) == 8
        for hue in hues:
            bright, dim = sorted((luminance(hue), luminance(paper)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, hue


def test_a_png_is_a_picture(report: AnalyzeReport, tmp_path: Path) -> None:
    """And the same bytes each time."""
    from matplotlib.image import imread

    base, adapter = tmp_path / "base", tmp_path / "a5"
    for name in ("one.png", "two.png"):
        assert surgery.analyze(base, adapter, plot=tmp_path / name).plot == str(tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert content == (tmp_path / "two.png").read_bytes()
    image = imread(io.BytesIO(content))
    assert image.shape[0] > 300
    assert image.shape[1] > 1000
    assert float(image.std()) > 0.05


def test_weights_are_drawn_too(tmp_path: Path) -> None:
    base = square_checkpoint(tmp_path / "base", 2, 24)
    for name in ("w.html", "w.png"):
        surgery.analyze(base, plot=tmp_path / name)
        assert (tmp_path / name).stat().st_size > 2000
    Parsed((tmp_path / "w.html").read_text())


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    """Refused before any work, and nothing is left of one that fails."""
    base = square_checkpoint(tmp_path / "base", 1, 12)
    there = tmp_path / "there.html"
    there.write_text("mine")

    def refused(plot: Path, kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught:
            surgery.analyze(base, plot=plot)
        return str(caught.value)

    svg = tmp_path / "x.svg"
    assert refused(svg, OptionError) == f"--plot is '{svg}', expected a name that ends in .png or .html."
    assert refused(there, OutputError) == f"{there} exists already; pass --overwrite to replace it."
    assert there.read_text() == "mine"
    missing = tmp_path / "no" / "x.html"
    assert refused(missing, OutputError) == (
        f"{missing.parent} is no folder, so x.html cannot be written there; make it first."
    )
    (tmp_path / "f.html").mkdir()
    assert refused(tmp_path / "f.html", OutputError) == f"{tmp_path / 'f.html'} is a folder; name a file for --plot."
    surgery.analyze(base, plot=there, overwrite=True)
    assert there.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".registry", "base", "f.html", "there.html"] or sorted(
        path.name for path in tmp_path.iterdir()
    ) == ["base", "f.html", "there.html"]


def test_a_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    base = square_checkpoint(tmp_path / "base", 1, 12)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"This needs the package 'matplotlib'.*checkpoint-surgery\[train\]"):
        surgery.analyze(base, plot=tmp_path / "x.png")
    surgery.analyze(base, plot=tmp_path / "x.html")


def test_a_layer_of_zeros_is_no_curve(tmp_path: Path) -> None:
    """A logarithmic axis has no zero."""
    from safetensors.torch import save_file

    base = square_checkpoint(tmp_path / "base", 1, 12)
    save_file({"m.0.weight": torch.zeros(12, 12)}, base / "model.safetensors")
    text = page(surgery.analyze(base))
    assert "Nothing but zeros." in text
    surgery.analyze(base, plot=tmp_path / "x.png")


def test_numbers_in_cells() -> None:
    assert [told(0.5, True), told(1234.5, False), told(0.012345, False)] == ["50%", "1.23e+03", "0.0123"]
