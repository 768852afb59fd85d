"""The section that push writes into a card: what the folder is, what it lost, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping

from surgery.card import table, with_section
from surgery.hub.examining import Examined
from surgery.hub.naming import why_not_a_repository

_WHERE = """Ids stand for what a Hub has. From a registry in a folder, `surgery pull {name} -o DIR` first, and
then give DIR in its place."""
_PEFT = """```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(model, {name})
```"""
_TRANSFORMERS_ADAPTER = """```python
model.load_adapter({name})  # on a model that is loaded already; needs peft installed
```"""
_VLLM_ADAPTER = """```sh
vllm serve {base} --enable-lora{rank} --lora-modules adapter={name}
```"""
_TRANSFORMERS = """```python
from transformers import {auto}

model = {auto}.from_pretrained({name})
```"""
_VLLM = """```sh
vllm serve {name}
```"""
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# vLLM's own default for --max-lora-rank; a larger rank has to be asked for.
_VLLM_RANK = 16


def card(readme: str, found: Examined, name: str) -> str:
    """`readme` with the section for what `found` says, as repository `name`. The same input gives the same text."""
    facts = found.facts
    named = facts.get("base")
    base = named if isinstance(named, str) else None
    is_adapter = facts["kind"] == "adapter"
    lines = [*_what(facts), *_error(found.provenance)]
    text = ["## What it is", "", *table(dict(lines)), "", "## How to load it", "", _WHERE.format(name=_word(name)), ""]
    text += _load_adapter(facts, base, name) if is_adapter else _load_model(facts, name)
    front: dict[str, str | list[str]] = {}
    if base is not None and "/" in base and why_not_a_repository(base) is None:
        front["base_model"] = base
        if is_adapter:
            front["base_model_relation"] = "adapter"
    front["library_name"] = "peft" if is_adapter else "transformers"
    front["tags"] = (
        ["lora", "checkpoint-surgery"] if facts.get("method") in ("lora", "dora") else ["checkpoint-surgery"]
    )
    return with_section(readme, "\n".join(text), front)


def _what(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    rows = [("kind", {"moe": "mixture of experts"}.get(str(facts["kind"]), str(facts["kind"])))]
    for key, title in (("base", "base"), ("method", "method"), ("family", "family"), ("experts", "experts")):
        if facts.get(key) is not None:
            rows.append((title, _cell(facts[key])))
    ranks, targets, inputs = facts.get("ranks"), facts.get("targets"), facts.get("inputs")
    if isinstance(ranks, list) and ranks:
        rows.append(("rank", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"))
    if isinstance(targets, list) and targets:
        rows.append(("targets", ", ".join(f"`{_cell(target)}`" for target in targets)))
    rows.append(("parameters", f"{facts['parameters']:,}"))
    rows.append(("stored as", _cell(facts.get("dtype"))))
    if facts.get("operation"):
        listed = inputs if isinstance(inputs, list) else []
        sources = [f"{item.get('role')} {_cell(item.get('source'))}" for item in listed]
        rows.append(("made by", f"`surgery {facts['operation']}`" + (f" from {', '.join(sources)}" if sources else "")))
    return rows


def _error(provenance: Mapping[str, object] | None) -> list[tuple[str, str]]:
    """What the operation measured of its own error, for those that a reader of the card cares about."""
    report = provenance.get("report") if provenance is not None else None
    if not isinstance(report, dict):
        return []
    titles = {
        "change": "change of the weights, norm of dW / norm of W",
        "energy_kept": "share of the change that is kept",
        "error": "error, norm of (dW - B A) / norm of dW",
        "survived": "share of the change that survived the rounding",
    }
    rows = []
    for key, title in titles.items():
        value = report.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((title, f"{value:.3%}"))
    return rows


def _load_adapter(facts: Mapping[str, object], base: str | None, name: str) -> list[str]:
    shown = base or "BASE"
    task = facts.get("task")
    auto = _TASKS.get(str(task), "AutoModel") if task else "AutoModelForCausalLM"
    ranks = facts.get("ranks")
    largest = max(ranks) if isinstance(ranks, list) and ranks else 0
    rank = f" --max-lora-rank {_allowed(largest)}" if largest > _VLLM_RANK else ""
    vllm = _VLLM_ADAPTER.format(base=_word(shown), rank=rank, name=_word(name))
    return [
        "With PEFT:",
        "",
        _PEFT.format(auto=auto, base=_quoted(shown), name=_quoted(name)),
        "",
        "With transformers:",
        "",
        _TRANSFORMERS_ADAPTER.format(name=_quoted(name)),
        "",
        *(["With vLLM:", "", vllm, ""] if auto == "AutoModelForCausalLM" else []),
        f"Merged into the base on disk: `surgery merge {_word(shown)} {_word(name)} -o merged`.",
    ]


def _load_model(facts: Mapping[str, object], name: str) -> list[str]:
    architecture = str(facts.get("architecture") or "")
    auto = next((auto for ending, auto in _AUTO.items() if architecture.endswith(ending)), "AutoModel")
    lines = ["With transformers:", "", _TRANSFORMERS.format(auto=auto, name=_quoted(name))]
    if auto == "AutoModelForCausalLM":
        lines += ["", "With vLLM:", "", _VLLM.format(name=_word(name))]
    return lines


def _allowed(rank: int) -> int:
    """The least rank at or above `rank` that vLLM takes. Source: vLLM 0.32, `config/lora.py`."""
    return next((known for known in (16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ").replace("`", "'") + '"'


def _word(text: str) -> str:
    """A word of a command line; what a shell would not take for one is quoted."""
    import shlex

    return shlex.quote(text.replace("\n", " ").replace("`", "'"))


def _cell(value: object) -> str:
    """Text within a cell of a Markdown table."""
    text = str(value).replace("\n", " ").replace("|", "\\|").replace("`", "'")
    return text.replace("<", "&lt;")
