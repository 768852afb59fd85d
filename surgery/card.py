"""Model cards for what this tool writes: where it comes from, what it loses, how to load it.

What the tool says stands between two comments that do not show. Everything else in a `README.md` is a person's, and
stays as it is: `with_section` replaces the tool's section, and adds to the front matter only what is not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.reports import CombineReport, ExtractReport


BEGIN, END = "<!-- surgery: begin -->", "<!-- surgery: end -->"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(?P<body>.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}\\n?", re.DOTALL)


def extraction_card(config: Mapping[str, object], report: ExtractReport) -> str:
    """The `README.md` of an extracted adapter, with the front matter by which a Hub links it to its base."""
    base = config["base_model_name_or_path"]
    ranks = sorted({module.rank for module in report.modules})
    rank = "none" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    saved = [item.name for item in report.residual if item.saved]
    lost = [item.name for item in report.residual if not item.saved]
    lines = [
        f"# LoRA extracted from a fine-tune of {base}",
        "",
        "The difference between a fine-tune and its base, as low-rank factors by truncated SVD.",
        "",
        *table(
            {
                "rank": rank,
                "modules": str(len(report.modules)),
                "parameters": f"{report.parameters:,}",
                "change of the weights, norm of dW / norm of W": f"{report.change:.3%}",
                "share of the change that is kept": f"{report.energy_kept:.3%}",
                "error, norm of (dW - B A) / norm of dW": f"{report.error:.3%}",
            }
        ),
        "",
    ]
    if saved:
        lines += [f"Stored whole beside the factors: {_list(saved)}.", ""]
    if lost:
        lines += [f"Changed by the fine-tune and not in this adapter: {_list(lost)}.", ""]
    front = {"base_model": str(base), "library_name": "peft", "tags": ["lora", "checkpoint-surgery"]}
    return with_section("", "\n".join([*lines, *LOAD_WITH_PEFT]), front)


def combination_card(config: Mapping[str, object], report: CombineReport) -> str:
    """The `README.md` of a combined or resized adapter."""
    base = config["base_model_name_or_path"]
    ranks = sorted({module.rank for module in report.modules})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    names = [name.rstrip("/").rpartition("/")[2] for name in report.adapters]
    lines = [
        f"# LoRA {'combined from ' + str(len(names)) + ' adapters' if len(names) > 1 else 'of another rank'}",
        "",
        f"Made from {_list(names)} by the method `{report.method}`.",
        "",
        *table(
            {
                "weights": ", ".join(f"{weight:g}" for weight in report.weights),
                "rank": rank,
                "modules": str(len(report.modules)),
                "parameters": f"{report.parameters:,}",
                "share of the energy that is kept": f"{report.energy_kept:.3%}",
                "error, norm of (dW - B A) / norm of dW": f"{report.error:.3%}",
            }
        ),
        "",
    ]
    front = {"base_model": str(base or ""), "library_name": "peft", "tags": ["lora", "checkpoint-surgery"]}
    return with_section("", "\n".join([*lines, *LOAD_WITH_PEFT]), front)


def conversion_card(config: Mapping[str, object], source: str, modules: int) -> str:
    """The `README.md` of an adapter that came from another tool's format."""
    base = config["base_model_name_or_path"]
    lines = [
        f"# LoRA{f' for {base}' if base else ''}",
        "",
        f"Converted from {source} by checkpoint-surgery: the same change of the same {modules} modules.",
        "",
    ]
    front = {"base_model": str(base or ""), "library_name": "peft", "tags": ["lora", "checkpoint-surgery"]}
    return with_section("", "\n".join([*lines, *LOAD_WITH_PEFT]), front)


# Of every adapter's card.
LOAD_WITH_PEFT = (
    "## Load it",
    "",
    "```python",
    "from peft import PeftModel",
    "",
    "model = PeftModel.from_pretrained(base_model, adapter)  # base_model: the base, loaded with transformers",
    "```",
    "",
    "Or merge it into the base on disk: `surgery merge BASE ADAPTER -o MERGED`.",
)


def table(rows: Mapping[str, str]) -> list[str]:
    """The lines of a Markdown table of names and values."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def with_section(readme: str, section: str, front: Mapping[str, str | Sequence[str]]) -> str:
    """A `README.md` with the tool's section in it.

    Args:
        readme: what is there; may be empty.
        section: Markdown, put where an earlier section of the tool stands, else at the end.
        front: front matter to add, for each key that the front matter has not got.
    """
    marked = f"{BEGIN}\n\n{section.strip()}\n\n{END}\n"
    text = _with_front(readme, front)
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: marked, text, count=1)
    return f"{text.rstrip()}\n\n{marked}" if text.strip() else marked


def by_a_person(readme: str) -> str:
    """What a card says beside front matter and the tool's section."""
    text = _FRONT.sub("", readme, count=1)
    kept, position = [], 0
    # Not by the pattern: of many beginnings without an end each would be followed to the end of the text.
    while (begin := text.find(BEGIN, position)) >= 0 and (end := text.find(END, begin)) >= 0:
        kept.append(text[position:begin])
        position = end + len(END)
    return "".join([*kept, text[position:]]).strip()


def written_by_a_person(readme: str) -> bool:
    """Whether a card says anything beside front matter and the tool's section."""
    return bool(by_a_person(readme))


def _with_front(readme: str, front: Mapping[str, str | Sequence[str]]) -> str:
    match = _FRONT.match(readme)
    if match is None and readme.lstrip().startswith("---"):
        return readme  # something that is no front matter, or one that never ends
    body = match["body"] if match else ""
    present = set(re.findall(r"^([\w-]+)[ \t]*:", body, re.MULTILINE))
    added = ""
    for key, value in front.items():
        if key in present or not value:
            continue
        lines = [f"{key}: {_yaml(value)}"] if isinstance(value, str) else [f"{key}:", *(f"- {_yaml(v)}" for v in value)]
        added += "".join(f"{line}\n" for line in lines)
    if not added:
        return readme
    if match is None:
        return f"---\n{added}---\n" + (f"\n{readme.lstrip()}" if readme.strip() else "")
    return readme[: match.end("body")] + added + readme[match.end("body") :]


def _yaml(value: object) -> str:
    text = str(value)
    plain = text and all(character.isalnum() or character in "/_.-" for character in text) and text[0].isalpha()
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _list(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
