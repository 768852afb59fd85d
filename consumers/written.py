"""Adapters and checkpoints that this project writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import surgery
from consumers import models
from consumers.workshop import Artefact, Workshop, Write


def make_adapters(shop: Workshop) -> None:
    """What `extract` writes, for each family and with each option."""
    for family in filter(shop.wants, models.FAMILIES):
        _of_family(shop, family)
    _extracted(shop)
    _experts(shop)


def _of_family(shop: Workshop, family: str) -> None:
    """For each family: the checkpoint as transformers saves it, its default adapter, and that merged."""
    base, tuned = shop.base(family), shop.tuned(family)
    if shop.only in f"{family}/saved":
        shop.made.append(Artefact(f"{family}/saved", "`save_pretrained` of transformers 5", "trained", base, base))
    shop.add("written", f"{family}/extract", "`extract`", _extract(base, tuned), base)
    adapter = shop.root / "adapters" / family / "extract"
    if adapter.exists():
        merge = lambda out: surgery.merge(base, adapter, output=out)  # noqa: E731
        shop.add("written", f"{family}/merge", "`merge`", merge)


def _extract(base: Path, tuned: Path, **options: Any) -> Write:
    return lambda out: surgery.extract(base, tuned, output=out, **{"device": "cpu", "base_name": base.name, **options})


def _extracted(shop: Workshop) -> None:
    """The options of `extract`."""
    base, tuned = shop.base("llama"), shop.tuned("llama")
    throughout = shop.tuned_throughout("llama")
    for name, what, pair, options in (
        ("rank-1", "`extract --rank 1`", tuned, {"rank": 1}),
        ("rank-32", "`extract --rank 32`", tuned, {"rank": 32}),
        ("energy", "`extract --energy 0.9`", tuned, {"energy": 0.9, "max_rank": 16}),
        ("budget", "`extract --budget 12K`", tuned, {"budget": 12_000, "max_rank": 16}),
        ("bfloat16", "`extract --dtype bfloat16`", tuned, {"dtype": "bfloat16"}),
        ("attention", "`extract --targets attention`", tuned, {"targets": "attention"}),
        ("one-layer", "`extract --targets 're:layers.1.*proj'`", tuned, {"targets": r"re:.*layers\.1\..*_proj"}),
        ("embeddings", "`extract --targets all-linear,embeddings`", throughout, {"targets": "all-linear,embeddings"}),
        ("head", "`extract --targets all-linear,head`", throughout, {"targets": "all-linear,head"}),
        ("residual", "`extract --save-residual`", throughout, {"save_residual": True}),
        (
            "residual-norms",
            "`extract --targets all-linear,embeddings,head --save-residual`",
            throughout,
            {"targets": "all-linear,embeddings,head", "save_residual": True},
        ),
    ):
        shop.add("written", f"llama/extract-{name}", what, _extract(base, pair, **options), base)
    base, throughout = shop.base("qwen3"), shop.tuned_throughout("qwen3")
    write = _extract(base, throughout, targets="all-linear,embeddings")
    what = "`extract --targets all-linear,embeddings`, tied"
    shop.add("written", "qwen3/extract-embeddings", what, write, base)


def _experts(shop: Workshop) -> None:
    for family in filter(shop.wants, ("mixtral", "qwen3_moe")):
        base, tuned = shop.base(family), shop.tuned(family)
        write = _extract(base, tuned, targets="attention")
        shop.add("written", f"{family}/extract-attention", "`extract --targets attention`", write, base)
        write = _extract(base, tuned, targets="experts", rank=4)
        shop.add("written", f"{family}/extract-experts", "`extract --targets experts`", write, base)


def make_checkpoints(shop: Workshop) -> None:
    """What `merge` and `subtract` write, beyond a plain merge for each family."""
    base = shop.base("llama")
    adapters = shop.root / "adapters" / "llama"
    for name, what, adapter, options in (
        ("reversible", "`merge --reversible`", "extract", {"reversible": True}),
        ("sharded", "`merge --shard-size 200K`", "extract", {"shard_bytes": 200_000}),
        ("residual", "`merge` of an adapter with a residual", "extract-residual", {}),
        ("embeddings", "`merge` of an adapter of embeddings", "extract-embeddings", {}),
    ):
        if (adapters / adapter).exists():
            write = _merge(base, adapters / adapter, **options)
            shop.add("written", f"llama/merge-{name}", what, write)
    tied = shop.root / "adapters" / "qwen3"
    for name, adapter in (("embeddings", "extract-embeddings"), ("head", "peft-head")):
        if (tied / adapter).exists():
            what = f"`merge` of an adapter of the {name}, tied before"
            shop.add("written", f"qwen3/merge-{name}", what, _merge(shop.base("qwen3"), tied / adapter))
    if (adapters / "extract").exists():
        undone = lambda out: _merge_and_subtract(base, adapters / "extract", out)  # noqa: E731
        shop.add("written", "llama/subtract", "`subtract`", undone)
        float32 = _merge(shop.base32("llama"), adapters / "extract")
        shop.add("written", "llama/merge-float32", "`merge` into float32", float32)


def _merge(base: Path, adapter: Path, **options: Any) -> Write:
    return lambda out: surgery.merge(base, adapter, output=out, **options)


def _merge_and_subtract(base: Path, adapter: Path, out: Path) -> None:
    between = out.with_name(out.name + "-merged")
    surgery.merge(base, adapter, output=between, reversible=True, overwrite=True)
    surgery.subtract(between, output=out)
    shutil.rmtree(between)


def make_converted(shop: Workshop) -> None:
    """What `convert --to mlx` makes of every adapter that we or PEFT write."""
    for one in [one for one in shop.made if one.is_adapter and one.group in ("written", "trained")]:
        family = one.name.partition("/")[0]
        folder, base = one.path.with_name(f"mlx-{one.path.name}"), shop.older(family)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            surgery.convert(one.path, to="mlx", base=base, output=folder)
        except surgery.SurgeryError as error:
            shop.unconverted[one.name] = "; ".join(error.problems[:1]) or str(error)
            continue
        name = f"{family}/{folder.name}"
        what = f"`convert --to mlx` of {one.name}"
        shop.made.append(Artefact(name, what, "converted", folder, base, ("mlx",), one.name))
