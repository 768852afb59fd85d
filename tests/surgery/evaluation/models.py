"""Tiny models with heads that `making` has none of."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.surgery.training import making


def classifier(labels: int, **settings: Any) -> Any:
    """A fresh BERT with a head for so many labels."""
    torch.manual_seed(1)
    config: Any = transformers.BertConfig
    model: Any = transformers.BertForSequenceClassification(
        config(**making._TEXT, num_labels=labels, initializer_range=0.4, **settings)
    )
    return model.eval()


def llama(**settings: Any) -> Any:
    """A fresh Llama that differs from `making`'s in some settings."""
    torch.manual_seed(0)
    config: Any = transformers.LlamaConfig
    return transformers.LlamaForCausalLM(config(**{**making._CAUSAL, **settings}))
