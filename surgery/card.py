"""Model cards for what this tool writes: where it comes from, what it loses, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.reports import CombineReport, ExtractReport


def extraction_card(config: Mapping[str, object], report: ExtractReport) -> str:
    """The `README.md` of an extracted adapter, with the front matter by which a Hub links it to its base."""
    base = config["base_model_name_or_path"]
    ranks = sorted({module.rank for module in report.modules})
    rank = "none" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    saved = [item.name for item in report.residual if item.saved]
    lost = [item.name for item in report.residual if not item.saved]
    lines = [
        "---",
        f"base_model: {_yaml(base)}",
        "library_name: peft",
        "tags:",
        "- lora",
        "- checkpoint-surgery",
        "---",
        "",
        f"# LoRA extracted from a fine-tune of {base}",
        "",
        "The difference between a fine-tune and its base, as low-rank factors by truncated SVD.",
        "",
        "| | |",
        "|---|---|",
        f"| rank | {rank} |",
        f"| modules | {len(report.modules)} |",
        f"| parameters | {report.parameters:,} |",
        f"| change of the weights, norm of dW / norm of W | {report.change:.3%} |",
        f"| share of the change that is kept | {report.energy_kept:.3%} |",
        f"| error, norm of (dW - B A) / norm of dW | {report.error:.3%} |",
        "",
    ]
    if saved:
        lines += [f"Stored whole beside the factors: {_list(saved)}.", ""]
    if lost:
        lines += [f"Changed by the fine-tune and not in this adapter: {_list(lost)}.", ""]
    return "\n".join([*lines, *_LOAD]) + "\n"


def combination_card(config: Mapping[str, object], report: CombineReport) -> str:
    """The `README.md` of a combined or resized adapter."""
    base = config["base_model_name_or_path"]
    ranks = sorted({module.rank for module in report.modules})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    names = [name.rstrip("/").rpartition("/")[2] for name in report.adapters]
    several = len(names) > 1
    lines = [
        "---",
        *([f"base_model: {_yaml(base)}"] if base else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- checkpoint-surgery",
        "---",
        "",
        f"# LoRA {'combined from ' + str(len(names)) + ' adapters' if several else 'of another rank'}",
        "",
        f"Made from {_list(names)} by the method `{report.method}`.",
        "",
        "| | |",
        "|---|---|",
        *([f"| weights | {', '.join(f'{weight:g}' for weight in report.weights)} |"]),
        f"| rank | {rank} |",
        f"| modules | {len(report.modules)} |",
        f"| parameters | {report.parameters:,} |",
        f"| share of the energy that is kept | {report.energy_kept:.3%} |",
        f"| error, norm of (dW - B A) / norm of dW | {report.error:.3%} |",
        "",
    ]
    return "\n".join([*lines, *_LOAD]) + "\n"


_LOAD = (
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


def _yaml(value: object) -> str:
    text = str(value)
    plain = text and all(character.isalnum() or character in "/_.-" for character in text) and text[0].isalpha()
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _list(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def conversion_card(config: Mapping[str, object], source: str, modules: int) -> str:
    """The `README.md` of an adapter that came from another tool's format."""
    base = config["base_model_name_or_path"]
    lines = [
        "---",
        *([f"base_model: {_yaml(base)}"] if base else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- checkpoint-surgery",
        "---",
        "",
        f"# LoRA{f' for {base}' if base else ''}",
        "",
        f"Converted from {source} by checkpoint-surgery: the same change of the same {modules} modules.",
        "",
        "## Load it",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, adapter)  # base_model: the base, loaded with transformers",
        "```",
        "",
        "Or merge it into the base on disk: `surgery merge BASE ADAPTER -o MERGED`.",
    ]
    return "\n".join(lines) + "\n"
