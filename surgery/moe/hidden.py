"""Router rows from the hidden states of prompts: what mergekit calls the gate mode `hidden`.

The row of expert e in a layer is the mean of what enters that layer's MLP while the dense model reads the prompts of e:
over the tokens of a prompt, then over its prompts. mergekit 0.1.5 (`mergekit/moe/router.py`, read, not copied) takes
the states between layers, of the last token or their mean, and divides each row by its length. Here:

1. each row is divided by its length, as there;
2. the mean of the rows is taken off them: it adds the same to all scores, which a softmax does not see and a sigmoid
   would be saturated by, since the states of all prompts have most of their length in common;
3. all rows of a layer are multiplied by one number, so that over the prompts' own tokens the scores have a standard
   deviation of 1 across the experts. A unit row times a state of length sqrt(hidden) would leave the softmax flat or
   saturated, whichever the model's norms happen to give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from surgery.errors import InputError
from surgery.execute import one_torch_thread
from surgery.moe.modeling_upcycled import FAMILIES

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = tuple[str, int]
# Rows that differ by no more than this of their length are the same but for rounding in float32.
_SAME = 1e-6


@dataclass(frozen=True)
class RouterRows:
    """Rows (experts, hidden) in float32 by stack and layer, and the share of tokens that rank their expert first."""

    rows: Mapping[Key, NDArray[np.float32]]
    own_expert_first: float


def router_rows(
    folder: Path, model_type: str, places: Mapping[Key, str], prompts: Sequence[Sequence[str]]
) -> RouterRows:
    """The rows of each layer's router. Runs the model twice over the prompts, in float32 on one thread of the CPU.

    Args:
        folder: the dense checkpoint.
        model_type: of it.
        places: for each layer the stored path, below the base model, of a linear map that the MLP's input goes into.
        prompts: of each expert.

    Raises:
        InputError: the model or its tokenizer cannot be loaded, or all prompts give one hidden state.
    """
    with _quiet(), one_torch_thread(), torch.no_grad():
        model, tokenizer = _load(folder)
        watched = {key: _module(model, model_type, key, path) for key, path in places.items()}
        tokens = [[_tokens(folder, model, tokenizer, prompt) for prompt in own] for own in prompts]
        means = {key: [torch.zeros(0)] * len(prompts) for key in watched}
        for expert, own in enumerate(tokens):
            sums: dict[Key, Tensor] = {}
            for ids in own:
                for key, states in _states(model, watched, ids).items():
                    sums[key] = sums.get(key, torch.zeros(())) + states.double().mean(dim=0) / len(own)
            for key, mean in sums.items():
                means[key][expert] = mean
        rows = {key: _apart(folder, key, torch.stack(found)) for key, found in means.items()}
        squares, first, count = dict.fromkeys(rows, 0.0), 0.0, 0
        for expert, own in enumerate(tokens):
            for ids in own:
                for key, states in _states(model, watched, ids).items():
                    scores = states.double() @ rows[key].T  # (tokens, experts)
                    squares[key] += float(scores.square().mean())
                    first += float((scores.argmax(dim=-1) == expert).double().mean())
                    count += 1
        each = count // len(rows)
        scaled = {key: row * (each / squares[key]) ** 0.5 for key, row in rows.items()}
        return RouterRows({key: row.float().numpy() for key, row in scaled.items()}, first / count)


def _apart(folder: Path, key: Key, means: Tensor) -> Tensor:
    """Unit rows without what they have in common: (experts, hidden), float64."""
    units = means / means.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    apart: Tensor = units - units.mean(dim=0)
    if float(apart.norm(dim=-1).max()) < _SAME:
        raise InputError(
            f"The prompts of all experts lead {folder} to one hidden state in layer {key[1]}; give each expert prompts "
            "of its own."
        )
    return apart


def _states(model: Any, watched: Mapping[Key, nn.Module], ids: Tensor) -> dict[Key, Tensor]:
    """What enters each watched module while the model reads `ids` (1, tokens): (tokens, hidden)."""
    found: dict[Key, Tensor] = {}

    def watch(key: Key) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            found[key] = args[0].reshape(-1, args[0].shape[-1])

        return hook

    handles = [module.register_forward_pre_hook(watch(key)) for key, module in watched.items()]
    try:
        model(input_ids=ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _module(model: Any, model_type: str, key: Key, path: str) -> nn.Module:
    """The module that the MLP's input goes into: by the layout in memory where that is known, else as it is stored."""
    stack, number = key
    layout = FAMILIES.get(model_type, {}).get(stack)
    found: nn.Module = model.base_model.get_submodule(
        path if layout is None else f"{layout.layers}.{number}.{layout.mlp}"
    )
    return found


def _load(folder: Path) -> tuple[Any, Any]:
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = (getattr(config, "architectures", None) or [""])[0]
        cls = getattr(transformers, name, None) or transformers.AutoModel
        return cls.from_pretrained(folder, dtype=torch.float32).eval(), transformers.AutoTokenizer.from_pretrained(
            folder
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{folder} cannot be run by transformers, or its tokenizer cannot ({reason}).") from error


def _tokens(folder: Path, model: Any, tokenizer: Any, prompt: str) -> Tensor:
    """The tokens of a prompt (1, tokens), as many as the model has positions for."""
    ids = tokenizer(prompt)["input_ids"]
    text = model.config.get_text_config()
    if not ids:
        raise InputError(f"The tokenizer of {folder} makes no tokens of the prompt {prompt!r}.")
    if max(ids) >= text.vocab_size:
        raise InputError(
            f"The tokenizer of {folder} gives token {max(ids)}, but the model has {text.vocab_size}; it is another's."
        )
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or len(ids)
    # RoBERTa numbers its positions from the padding token on.
    return torch.tensor([ids[: max(1, limit - 2)]])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars of its own for a while."""
    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
