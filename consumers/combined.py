"""Adapters that `combine` and `resize` write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import surgery
from consumers.workshop import Workshop, Write

# Name: (how it came to be, options of `combine`).
_COMBINED: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("`combine --rank 12`", {"rank": 12}),
    "sum-energy": ("`combine --energy 0.9`", {"energy": 0.9}),
    "cat": ("`combine --method cat`", {"method": "cat"}),
    "ties": ("`combine --method ties`", {"method": "ties", "density": 0.5}),
    "dare-ties": ("`combine --method dare-ties`", {"method": "dare-ties", "density": 0.5}),
    "dare-linear": ("`combine --method dare-linear`", {"method": "dare-linear", "density": 0.5}),
    "magnitude-prune": ("`combine --method magnitude-prune`", {"method": "magnitude-prune", "density": 0.5}),
    "tsv": ("`combine --method tsv`", {"method": "tsv"}),
    "iso": ("`combine --method iso`", {"method": "iso"}),
    "linear-as-peft": ("`combine --method linear --as-peft`", {"method": "linear", "as_peft": True}),
    "cat-as-peft": ("`combine --method cat --as-peft`", {"method": "cat", "as_peft": True}),
    "ties-as-peft": ("`combine --method ties --as-peft`", {"method": "ties", "density": 0.5, "as_peft": True}),
}


def make_combined(shop: Workshop) -> None:
    """One adapter for each method, and those made of adapters whose settings say something about scale or rank."""
    if shop.wants("llama"):
        _of_llama(shop)
    for family in filter(shop.wants, ("mixtral", "qwen3_moe")):
        one, other = shop.adapter(f"{family}/extract"), shop.adapter(f"{family}/extract-attention")
        write = _combine(one, other, rank=8)
        shop.add("written", f"{family}/combine", "`combine --rank 8`, fused experts", write, shop.base(family))
        write = _resize(shop.adapter(f"{family}/extract-experts"), rank=2)
        shop.add("written", f"{family}/resize", "`resize --rank 2`, fused experts", write, shop.base(family))


def _of_llama(shop: Workshop) -> None:
    base, adapters = shop.base("llama"), shop.root / "adapters" / "llama"
    one, other = adapters / "extract", adapters / "extract-other"
    for name, (what, options) in _COMBINED.items():
        shop.add("written", f"llama/combine-{name}", what, _combine(one, f"{other}=-0.5", **options), base)
    for name, what, sources, options in (
        ("rslora", "`combine` of an rsLoRA and one of many alphas", ("peft-rslora", "peft-patterns"), {}),
        ("different", "`combine` of adapters of different modules", ("extract-attention", "extract-one-layer"), {}),
        ("embeddings", "`combine` with embeddings", ("extract-embeddings", "extract-head"), {}),
    ):
        write = _combine(*(adapters / source for source in sources), any_base=True, **options)
        shop.add("written", f"llama/combine-{name}", what, write, base)
    for name, what, source, options in (
        ("rank-4", "`resize --rank 4`", "extract", {"rank": 4}),
        ("energy", "`resize --energy 0.8`", "extract", {"energy": 0.8}),
        ("bfloat16", "`resize --rank 4 --dtype bfloat16`", "extract", {"rank": 4, "dtype": "bfloat16"}),
        ("rslora", "`resize --rank 4` of an rsLoRA", "peft-rslora", {"rank": 4}),
        ("patterns", "`resize --rank 4` of one of many alphas", "peft-patterns", {"rank": 4}),
        ("rank-600", "`resize --rank 512` of one of rank 600", "peft-rank-600", {"rank": 512}),
    ):
        shop.add("written", f"llama/resize-{name}", what, _resize(adapters / source, **options), base)


def _combine(*adapters: Path | str, **options: Any) -> Write:
    return lambda out: surgery.combine(*adapters, output=out, **{"device": "cpu", "base_name": "base", **options})


def _resize(adapter: Path, **options: Any) -> Write:
    return lambda out: surgery.resize(adapter, output=out, **{"device": "cpu", "base_name": "base", **options})
