"""Adapters that `convert` writes: into PEFT's format from others, into MLX's from PEFT's, experts both ways."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import surgery
from consumers.workshop import Workshop, Write

# Name: (how it came to be, source, options of `convert --to peft`); each means what its source does.
_TO_PEFT: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("llama/portable-rslora", "`--portable`", "llama/peft-rslora", {"portable": True}),
    ("llama/portable-alpha-pattern", "`--portable`", "llama/peft-alpha-pattern", {"portable": True}),
    ("llama/portable-patterns", "`--portable`", "llama/peft-patterns", {"portable": True}),
    (
        "llama/padded-patterns",
        "`--portable --pad-ranks`",
        "llama/peft-patterns",
        {"portable": True, "pad_ranks": True},
    ),
    ("llama/padded-energy", "`--pad-ranks`", "llama/extract-energy", {"pad_ranks": True}),
    ("llama/mended-prefix", "to PEFT", "llama/no-prefix", {}),
    ("llama/mended-name", "to PEFT", "llama/adapter-name", {}),
    ("llama/mended-alpha", "to PEFT", "llama/no-alpha", {}),
    *(
        (f"{family}/{name}", f"`--experts {layout}`", f"{family}/{source}", {"experts": layout})
        for family in ("mixtral", "qwen3_moe")
        for name, layout, source in (
            ("one-by-one-extract", "per-expert", "extract"),
            ("one-by-one-experts", "per-expert", "extract-experts"),
            ("one-by-one-peft", "per-expert", "peft-fused"),
            ("fused", "fused", "per-expert"),
        )
    ),
    *(
        (f"{family}/one-by-one-extract", "`--experts per-expert`", f"{family}/extract", {"experts": "per-expert"})
        for family in ("qwen2_moe", "olmoe", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe", "flex_olmo")
    ),
)
# Adapters that go into another format and back.
_THERE_AND_BACK = ("llama/extract", "llama/extract-energy", "llama/peft-rslora", "llama/peft-patterns", "qwen3/extract")


def make_converted(shop: Workshop) -> None:
    """What comes into PEFT's format, and what `convert --to mlx` makes of every adapter."""
    for name, what, source, options in _TO_PEFT:
        family = name.partition("/")[0]
        if shop.wants(family):
            write = _convert(shop.adapter(source), to="peft", base=shop.base(family), **options)
            _add(shop, name, f"`convert --to peft` of {source}, {what}", write, source)
    for source in _THERE_AND_BACK:
        family, _, adapter = source.partition("/")
        if shop.wants(family):
            for kind in ("kohya", "diffusers", "mlx"):
                write = partial(_there_and_back, shop.adapter(source), shop.base(family), kind)
                what = f"`convert --to {kind}` of {source}, then `--to peft`"
                _add(shop, f"{family}/{kind}-{adapter}", what, write, source)
    for one in [one for one in shop.all.values() if one.is_adapter and one.group in ("written", "trained")]:
        _to_mlx(shop, one.name)


def _add(shop: Workshop, name: str, what: str, write: Write, source: str) -> None:
    shop.add("exchanged", name, what, write, shop.all[source].base, means=source)


def _convert(adapter: Path, **options: Any) -> Write:
    return lambda out: surgery.convert(adapter, output=out, **options)


def _there_and_back(adapter: Path, base: Path, kind: str, out: Path) -> None:
    between = out.with_name(f"{out.name}-{kind}")
    # Files of kohya and diffusers are for a part of a pipeline, and a text encoder may be a language model.
    component = None if kind == "mlx" else "text_encoder"
    surgery.convert(adapter, to=kind, base=base, output=between, component=component, overwrite=True)
    surgery.convert(between, to="peft", base=base, output=out)
    shutil.rmtree(between)


def _to_mlx(shop: Workshop, source: str) -> None:
    """The adapter for mlx-lm, on a base whose config mlx-lm understands in full; or what `convert` says against it."""
    family, _, adapter = source.partition("/")
    base = shop.older(family)
    try:
        write = _convert(shop.adapter(source), to="mlx", base=base)
        what = f"`convert --to mlx` of {source}"
        shop.add("converted", f"{family}/mlx-{adapter}", what, write, base, means=source, engines=("mlx",))
    except surgery.SurgeryError as error:
        if shop.only in source:
            shop.unconverted[source] = "; ".join(error.problems[:1]) or str(error)
