"""Adapters and checkpoints that `extract`, `merge`, `subtract`, `switch` and `restore` write."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import surgery
from consumers import models
from consumers.workshop import Workshop, Write


def make_adapters(shop: Workshop) -> None:
    """What `extract` writes, for each family and with each option."""
    for family in filter(shop.wants, models.FAMILIES):
        _of_family(shop, family)
    if shop.wants("llama"):
        _extracted(shop)
    if shop.wants("qwen3"):
        base, throughout = shop.base("qwen3"), shop.tuned_throughout("qwen3")
        write = _extract(base, throughout, targets="all-linear,embeddings")
        what = "`extract --targets all-linear,embeddings`, tied"
        shop.add("written", "qwen3/extract-embeddings", what, write, base)
    for family in filter(shop.wants, models.MIXTURES):
        _experts(shop, family)


def _of_family(shop: Workshop, family: str) -> None:
    """For each family: the checkpoint as transformers saves it, its default adapter, and that merged."""
    base, tuned = shop.base(family), shop.tuned(family)
    shop.found("trained", f"{family}/saved", "`save_pretrained` of transformers 5", base)
    shop.add("written", f"{family}/extract", "`extract`", _extract(base, tuned), base)
    shop.add("written", f"{family}/merge", "`merge`", _merge(base, shop.adapter(f"{family}/extract")))


def _extract(base: Path, tuned: Path, **options: Any) -> Write:
    return lambda out: surgery.extract(base, tuned, output=out, **{"device": "cpu", "base_name": base.name, **options})


def _extracted(shop: Workshop) -> None:
    """The options of `extract`."""
    base, tuned, other = shop.base("llama"), shop.tuned("llama"), shop.tuned_otherwise("llama")
    throughout = shop.tuned_throughout("llama")
    for name, what, pair, options in (
        ("other", "`extract` of another fine-tune", other, {}),
        ("rank-1", "`extract --rank 1`", tuned, {"rank": 1}),
        ("rank-32", "`extract --rank 32`", tuned, {"rank": 32}),
        ("rank-best", "`extract --rank best --exact`", tuned, {"rank": "best", "exact": True}),
        ("exact", "`extract --exact`", tuned, {"exact": True}),
        ("exact-throughout", "`extract --exact`, everything tuned", throughout, {"exact": True}),
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


def _experts(shop: Workshop, family: str) -> None:
    base, tuned = shop.base(family), shop.tuned(family)
    write = _extract(base, tuned, targets="attention")
    shop.add("written", f"{family}/extract-attention", "`extract --targets attention`", write, base)
    write = _extract(base, tuned, targets="experts", rank=4)
    shop.add("written", f"{family}/extract-experts", "`extract --targets experts`", write, base)


def make_checkpoints(shop: Workshop) -> None:
    """What `merge`, `subtract`, `switch` and `restore` write, beyond a plain merge for each family."""
    if shop.wants("llama"):
        _of_llama(shop)
    if shop.wants("qwen3"):
        for name, adapter in (("embeddings", "extract-embeddings"), ("head", "peft-head")):
            what = f"`merge` of an adapter of the {name}, tied before"
            shop.add(
                "written", f"qwen3/merge-{name}", what, _merge(shop.base("qwen3"), shop.adapter(f"qwen3/{adapter}"))
            )
    for family in filter(shop.wants, ("mixtral", "qwen3_moe")):
        base = shop.base(family)
        for name, what, adapter, options in (
            ("experts", "`merge` of an adapter of the experts", "extract-experts", {}),
            ("per-expert", "`merge` of one of each expert by its own name", "per-expert", {}),
            ("reversible", "`merge --reversible`", "extract", {"reversible": True}),
        ):
            write = _merge(base, shop.adapter(f"{family}/{adapter}"), **options)
            shop.add("written", f"{family}/merge-{name}", what, write)
        shop.found("trained", f"{family}/tuned", "a fine-tune, by `save_pretrained`", shop.tuned(family))
        write = partial(_restored, base, shop.tuned(family))
        what = "`extract --exact`, then `restore`"
        shop.add("written", f"{family}/restore", what, write, means=f"{family}/tuned")


def _of_llama(shop: Workshop) -> None:
    base, adapters = shop.base("llama"), shop.root / "adapters" / "llama"
    for name, what, adapter, options in (
        ("reversible", "`merge --reversible`", "extract", {"reversible": True}),
        ("sharded", "`merge --shard-size 200K`", "extract", {"shard_bytes": 200_000}),
        ("residual", "`merge` of an adapter with a residual", "extract-residual", {}),
        ("embeddings", "`merge` of an adapter of embeddings", "extract-embeddings", {}),
        ("dora", "`merge` of a DoRA", "peft-dora", {}),
        ("rslora", "`merge` of an rsLoRA", "peft-rslora", {}),
    ):
        shop.add("written", f"llama/merge-{name}", what, _merge(base, adapters / adapter, **options))
    one, other = adapters / "extract", adapters / "extract-other"
    shop.add("written", "llama/merge-two", "`merge` of two adapters", _merge(base, one, other))
    shop.add("written", "llama/subtract", "`subtract`", partial(_subtracted, base, one), means="llama/saved")
    shop.add("written", "llama/switch", "`switch`", partial(_switched, base, one, other))
    write = _merge(shop.base32("llama"), one, any_base=True)
    shop.add("written", "llama/merge-float32", "`merge` into float32", write, means="llama/extract")
    for name, tuned in (("tuned", shop.tuned("llama")), ("tuned-throughout", shop.tuned_throughout("llama"))):
        shop.found("trained", f"llama/{name}", "a fine-tune, by `save_pretrained`", tuned)
    for name, adapter, means in (
        ("restore", "extract-exact", "tuned"),
        ("restore-throughout", "extract-exact-throughout", "tuned-throughout"),
    ):
        write = partial(_restore, base, adapters / adapter)
        shop.add("written", f"llama/{name}", f"`restore` of llama/{adapter}", write, means=f"llama/{means}")


def _merge(base: Path, *adapters: Path, **options: Any) -> Write:
    return lambda out: surgery.merge(base, *adapters, output=out, **options)


def _subtracted(base: Path, adapter: Path, out: Path) -> None:
    between = out.with_name(out.name + "-merged")
    surgery.merge(base, adapter, output=between, reversible=True, overwrite=True)
    surgery.subtract(between, output=out)
    shutil.rmtree(between)


def _switched(base: Path, one: Path, other: Path, out: Path) -> None:
    between = out.with_name(out.name + "-merged")
    surgery.merge(base, one, output=between, reversible=True, overwrite=True)
    surgery.switch(between, one, other, output=out)
    shutil.rmtree(between)


def _restore(base: Path, adapter: Path, out: Path) -> None:
    surgery.restore(base, adapter, output=out)


def _restored(base: Path, tuned: Path, out: Path) -> None:
    between = out.with_name(out.name + "-adapter")
    surgery.extract(base, tuned, output=between, exact=True, base_name=base.name)
    surgery.restore(base, between, output=out)
    shutil.rmtree(between)
