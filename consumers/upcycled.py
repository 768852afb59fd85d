"""Mixtures of experts that `upcycle` writes. They are the dense models as functions, so that is what they mean."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import surgery
from consumers.workshop import Workshop

# Name: (what the command line says, options of `upcycle`). One line makes another.
_UPCYCLED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama/upcycled": ("", {}),
    "llama/upcycled-qwen2-moe": ("--target qwen2_moe", {"target": "qwen2_moe"}),
    "llama/upcycled-glm4-moe": ("--target glm4_moe", {"target": "glm4_moe"}),
    "mistral/upcycled": ("", {}),
    "qwen2/upcycled": ("", {}),
    "qwen2/upcycled-last": ("--layers last:1", {"layers": "last:1"}),
    "qwen3/upcycled": ("", {}),
    "qwen3/upcycled-last": ("--layers last:1", {"layers": "last:1"}),
    "qwen3/upcycled-granular": ("--init granular:2", {"init": "granular:2"}),
    "granite/upcycled": ("", {}),
    "olmo2/upcycled": ("", {}),
    "ernie4_5/upcycled": ("", {}),
    "ernie4_5/upcycled-last": ("--layers last:1", {"layers": "last:1"}),
    "hunyuan_v1_dense/upcycled": ("", {}),
}


def make_upcycled(shop: Workshop) -> None:
    """One checkpoint for each row of the table, with 32 experts in each of its layers."""
    for name, (words, options) in _UPCYCLED.items():
        family = name.partition("/")[0]
        if shop.wants(family):
            write = partial(_upcycle, shop.base(family), {"experts": 32, **options})
            what = f"`upcycle --experts 32{' ' if words else ''}{words}`"
            shop.add("written", name, what, write, means=f"{family}/saved")


def _upcycle(base: Path, options: dict[str, Any], out: Path) -> None:
    surgery.upcycle(base, output=out, **options)
