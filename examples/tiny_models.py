"""Tiny language models of text that every Python has: the data, a tokenizer, the training loop and the loss.

    B: sequences in a batch     T: tokens of context     V: size of the vocabulary

The text is the standard library's own source, and the reference manual that `help()` quotes from
(`pydoc_data.topics`): two kinds of text with a shared vocabulary, so that a model of the one has something to learn
from the other. Both are split by name, the same way on every machine that has the same Python.
"""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 128
END = "<|end|>"
# Not source to learn from: tests, other people's packages, tables of numbers, and the text to be learnt later.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "pydoc_data"}
# Whole documents are held out until they have so many characters.
_HELD_OUT = 50_000


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and others to measure the loss on."""

    train: Sequence[str]
    held_out: Sequence[str]


def python_source(limit: int) -> Corpus:
    """About `limit` characters of the standard library's modules, whole files."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    wanted = [name.as_posix() for name in names if not _SKIPPED & set(name.parts)]
    texts = ((root / name).read_text(encoding="utf-8", errors="replace") for name in _mixed(wanted))
    held_out = _take(texts, _HELD_OUT)
    return Corpus(_take(texts, limit), held_out)


def python_manual() -> Corpus:
    """The language reference as `help()` shows it.

    Its topics quote one another whole, so every paragraph of a held-out topic is taken out of the others.
    """
    from pydoc_data.topics import topics

    return _apart(topics[name] for name in _mixed(topics))


def torch_headers(limit: int) -> Corpus:
    """About `limit` characters of the C++ headers that torch is installed with, whole files."""
    root = Path(torch.__file__).parent / "include"
    names = _mixed(path.relative_to(root).as_posix() for path in root.rglob("*.h"))
    texts = ((root / name).read_text(encoding="utf-8", errors="replace") for name in names)
    held_out = _take(texts, _HELD_OUT)
    return Corpus(_take(texts, limit), held_out)


def package_descriptions() -> Corpus:
    """What the installed packages say of themselves: their README files, and the fields above them."""
    found = {distribution.name: distribution.read_text("METADATA") or "" for distribution in distributions()}
    return _apart(found[name] for name in _mixed(found))


def _apart(texts: Iterator[str]) -> Corpus:
    """Texts that repeat one another, split so that no paragraph that is held out is left in the others."""
    held_out = _take(texts, _HELD_OUT)
    known = {paragraph for text in held_out for paragraph in text.split("\n\n")}
    return Corpus(["\n\n".join(part for part in text.split("\n\n") if part not in known) for text in texts], held_out)


def _take(texts: Iterator[str], characters: int) -> list[str]:
    """The next texts, until they have so many characters together."""
    taken: list[str] = []
    while sum(map(len, taken)) < characters and (text := next(texts, None)) is not None:
        taken.append(text)
    return taken


def _mixed(names: Iterable[str]) -> list[str]:
    """Names in an order that has nothing to do with the alphabet, and is the same everywhere."""
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))


@dataclass(frozen=True)
class Tokens:
    """Documents as one row of token ids, each document followed by `END`; `nbytes` is what they take as UTF-8."""

    ids: torch.Tensor
    nbytes: int


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` tokens, learnt from `texts`."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)  # type: ignore[no-untyped-call]  # transformers annotates little


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tokens:
    """All of `texts` as one row of tokens."""
    rows = [*tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    ids = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    return Tokens(torch.tensor(ids), sum(len(text.encode()) for text in texts))


def make_model(vocabulary: int, hidden: int, layers: int, seed: int, biases: bool = False) -> LlamaForCausalLM:
    """A Llama with fresh weights, in float32; with `biases`, its linear layers have them."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        attention_bias=biases,
        mlp_bias=biases,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how to train: AdamW, a short warm-up, then a learning rate that falls to zero in a straight line."""

    steps: int
    learning_rate: float
    batch: int = 16
    weight_decay: float = 0.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, the first being 0."""
        warm = max(self.steps // 20, 1)
        return self.learning_rate * min((step + 1) / warm, (self.steps - step) / (self.steps - warm + 1))


def train(model: LlamaForCausalLM, tokens: Tokens, how: Training, on_step: Callable[[float], None]) -> None:
    """Train all parameters of `model` on random stretches of `tokens`; `on_step` is told each step's loss in nats."""
    generator = torch.Generator().manual_seed(how.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=how.weight_decay, fused=True)
    model.train()
    for step in range(how.steps):
        starts = torch.randint(len(tokens.ids) - CONTEXT, (how.batch,), generator=generator)
        rows = torch.stack([tokens.ids[start : start + CONTEXT + 1] for start in starts])  # [B, T + 1]
        loss = _loss(model, rows)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = how.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        on_step(loss.item())
    model.train(False)


@dataclass(frozen=True)
class Loss:
    """How badly a model foretells a text. Bits per byte can be compared between tokenizers, nats per token cannot."""

    nats_per_token: float
    bits_per_byte: float


def evaluate(model: torch.nn.Module, tokens: Tokens) -> Loss:
    """The loss on every token of `tokens` but the first, each foretold from at most `CONTEXT` tokens before it."""
    nats = 0.0
    with torch.no_grad():
        for rows in _windows(tokens.ids):
            nats += float(_loss(model, rows, reduction="sum"))
    return Loss(nats / (len(tokens.ids) - 1), nats / math.log(2) / tokens.nbytes)


def _windows(ids: torch.Tensor, batch: int = 32) -> Iterator[torch.Tensor]:
    """Rows of `CONTEXT` + 1 tokens, the last of each being the first of the next; at the end one shorter row."""
    rows = [ids[start : start + CONTEXT + 1] for start in range(0, len(ids) - 1, CONTEXT)]
    rest = [rows.pop()] if len(rows[-1]) <= CONTEXT else []
    for first in range(0, len(rows), batch):
        yield torch.stack(rows[first : first + batch])  # [B, T + 1]
    yield from (row[None] for row in rest)


def _loss(model: torch.nn.Module, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of every token but the first of each row. Logits of virtual tokens come before theirs."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, 1 - rows.shape[1] :]  # [B, T, V]
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)
