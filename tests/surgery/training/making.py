"""Tiny models and real text to train them on: paragraphs of the language reference that `help()` shows."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers

from surgery.api.training import find_start
from surgery.training.options import TrainOptions
from surgery.training.report import TrainReport
from surgery.training.run import TrainSettings, train
from surgery.training.work import Silent

WORDS = 320


@cache
def paragraphs() -> list[str]:
    """Of the language reference, 40 to 400 characters each."""
    texts = [part.strip() for text in tiny_models.python_manual().train for part in text.split("\n\n")]
    return [text for text in dict.fromkeys(texts) if 40 <= len(text) <= 400]


@cache
def tokenizer() -> Any:
    return tiny_models.make_tokenizer(paragraphs(), WORDS)


_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_SIZE, "vocab_size": WORDS, "max_position_embeddings": 320}
_CAUSAL = {**_TEXT, "eos_token_id": 0, "bos_token_id": None}
# Name: (class, config class, settings).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _CAUSAL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 320, "eos_token_id": 0, "bos_token_id": 0}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_CAUSAL, "num_key_value_heads": 2, "num_local_experts": 4}),
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_SIZE, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": WORDS, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}),
    "switch": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_heads": 2, "num_experts": 4, "expert_capacity": 3, "decoder_start_token_id": 0}),
}  # fmt: skip


def model(kind: str = "llama", **settings: Any) -> Any:
    """A fresh model of two layers."""
    torch.manual_seed(0)
    class_name, config_name, own = MODELS[kind]
    return getattr(transformers, class_name)(getattr(transformers, config_name)(**(own | settings)))


def checkpoint(folder: Path, kind: str = "llama", made: Any = None, **settings: Any) -> Path:
    """A checkpoint with its tokenizer."""
    (made if made is not None else model(kind, **settings)).save_pretrained(folder)
    if kind != "vit":
        tokenizer().save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(path: Path, number: int = 48) -> Path:
    """A JSONL of so many paragraphs."""
    return jsonl(path, ({"text": text} for text in paragraphs()[:number]))


class Stops(Silent):
    """Progress that asks the run to stop, as Ctrl-C does, when the step of that number is done."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any]) -> None:
        import signal

        if line["step"] == self.at:
            signal.raise_signal(signal.SIGINT)


def run(folder: Path, data: Path, output: Path, progress: Any = None, base: Any = None, **options: Any) -> TrainReport:
    """Train on the CPU, everything unless a method is named."""
    settings = TrainSettings(device="cpu", progress=progress or Silent())
    given = {"method": "full", **options} if base is None else options
    return train(find_start(folder, base, False), output, TrainOptions(data=str(data), **given), settings)


def log(output: Path) -> list[dict[str, Any]]:
    lines = (output / "training" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in log(output) if "loss" in line]
