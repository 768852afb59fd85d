"""`--router-init hidden:PROMPTS.jsonl`: prompts for each expert, and the router rows that come of them.

One JSON object to a line: `{"expert": 0, "text": "..."}` or `{"expert": 0, "prompts": ["...", "..."]}`. Lines of one
expert add up; with granular experts, `expert` counts whole copies of the MLP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, InputError, MissingExtraError, several
from surgery.folder import MAX_JSON_BYTES
from surgery.names import plain
from surgery.source import FileSource, read_bytes
from surgery.upcycling.mixture import Mixture
from surgery.upcycling.mlps import Mlp, stacks_of

if TYPE_CHECKING:
    import numpy as np

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_FIELDS = ("expert", "text", "prompts")

# The router rows (experts, hidden) of each sparse layer, by stack and number.
Rows = Mapping[tuple[str, int], "np.ndarray"]


def read_prompts(path: str, experts: int) -> tuple[tuple[str, ...], ...]:
    """The prompts of each expert. Raises `FormatError` naming every line that is wrong and every expert without any."""
    source = FileSource(path)
    if source.size > MAX_JSON_BYTES:
        raise FormatError(f"{path} has {source.size} bytes, more than the {MAX_JSON_BYTES} that prompts may have.")
    try:
        text = read_bytes(source, 0, source.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 ({error}).") from error
    found: list[list[str]] = [[] for _ in range(experts)]
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            expert, prompts = _entry(line, experts)
        except ValueError as error:
            problems.append(f"{path} line {number}: {error}.")
        else:
            found[expert] += prompts
    missing = [str(expert) for expert, prompts in enumerate(found) if not prompts]
    if missing and not problems:
        problems.append(f"{path} has no prompts for expert {', '.join(missing)}; each of {experts} needs some.")
    if problems:
        raise FormatError(several(path, problems), problems)
    return tuple(tuple(prompts) for prompts in found)


def _entry(line: str, experts: int) -> tuple[int, list[str]]:
    """One line. Raises ValueError with the end of a sentence."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON {type(entry).__name__}, expected an object")
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise ValueError(f"unknown field {plain(unknown[0])!r}, expected expert and text, or expert and prompts")
    expert = entry.get("expert")
    if type(expert) is not int or not 0 <= expert < experts:
        raise ValueError(f"expert is {plain(repr(expert))}, expected a number from 0 to {experts - 1}")
    if ("text" in entry) == ("prompts" in entry):
        raise ValueError("expected either text or prompts")
    prompts = entry["prompts"] if "prompts" in entry else [entry["text"]]
    if not isinstance(prompts, list) or not prompts:
        raise ValueError("prompts is no list of texts")
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty, or no text")
    return expert, prompts


def check_model(checkpoint: Checkpoint) -> None:
    """Raise `InputError` for a checkpoint that no prompt can be run through."""
    if checkpoint.path is None or not checkpoint.path.is_dir():
        raise InputError(f"{checkpoint.label} is not a folder on disk; prompts can be run through such a model only.")
    if checkpoint.model_type == "vit":
        raise InputError(f"{checkpoint.label} takes images, so it has no hidden states of prompts.")
    if checkpoint.config.get("is_encoder_decoder") or len(stacks_of(checkpoint.model_type)) > 1:
        raise InputError(
            f"{checkpoint.label} has an encoder and a decoder; hidden states of prompts are for models of one stack."
        )
    if not any(name in checkpoint.folder.names() for name in _TOKENIZERS):
        raise InputError(f"{checkpoint.label} has no tokenizer, which prompts need; put its files beside the weights.")


def router_rows(
    checkpoint: Checkpoint, chosen: Sequence[tuple[Mlp, Mixture]], prompts: Sequence[Sequence[str]]
) -> tuple[Rows, str]:
    """Run the prompts through the dense model; the rows of every router, and a sentence for the report.

    Raises `MissingExtraError` without transformers.
    """
    try:
        from surgery.moe.hidden import router_rows as run
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    assert checkpoint.path is not None
    places = {(mlp.stack, mlp.number): path for mlp, path in _places(checkpoint, chosen)}
    found = run(checkpoint.path, checkpoint.model_type, places, prompts)
    share, chance = 100 * found.own_expert_first, 100 / len(prompts)
    said = (
        f"On the prompts themselves, the routers rank a prompt's own expert first for {share:.0f} % of its tokens; "
        f"chance would be {chance:.0f} %."
    )
    return found.rows, said


def _places(checkpoint: Checkpoint, chosen: Sequence[tuple[Mlp, Mixture]]) -> Iterator[tuple[Mlp, str]]:
    """Below the base model, the linear map that the MLP's input goes into."""
    for mlp, _ in chosen:
        layer = stacks_of(checkpoint.model_type)[mlp.stack].layer.replace("{layer}", str(mlp.number))
        first = next(mlp.leaves[role] for role in ("gate", "in") if role in mlp.leaves)
        yield mlp, f"{layer}.{first.dense}"
