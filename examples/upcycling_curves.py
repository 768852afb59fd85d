"""Upcycled models against the dense model trained on, and against a mixture from scratch: what more training gives.

Sparse Upcycling (Komatsuzaki et al. 2023) reports that for the same extra cost an upcycled model ends up better than
the dense model trained on, and that a mixture from scratch needs about the dense model's whole cost to catch up.
Here are a small Llama on the source of the standard library (top-2), and a ViT on scikit-learn's handwritten digits
(expert choice, C = 2), with mixtures in the last half of the layers, at equal steps and at equal floating-point
operations (`upcycling_flops.py` says what is counted). Then one choice after another is changed, and the models are
tuned on another task: text of another kind, other digits; and a linear probe tells digits apart from ten of each.

    python examples/upcycling_curves.py [--part text vision ablations tuning] [--size small] [--more STEPS]
                                        [--seeds N] [--quick] [--device cuda] [--folder FOLDER]

Runs that are done are not done again. The folder gets `results.json`, `curves.png` and `ablations.png`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from show import console
from transformers.utils import logging
from upcycling_probe import few_shot_accuracy
from upcycling_runs import Bench, Mixture, Setting
from upcycling_tables import Arms, Tuned, draw_ablations, draw_curves, show_ablations, show_curves, show_tuning

PARTS = ("text", "vision", "ablations", "tuning")
SHORT = Setting(
    kind="text", hidden=32, layers=2, heads=2, intermediate=64, experts=4, before=12, more=6, tuning=4, batch=4,
    rate=2e-3, tuning_rate=1e-3, every=6, measured=100, draws=1, vocabulary=300, context=32, characters=100_000,
)  # fmt: skip
# A minute or two on one processor core for each seed of a part.
SMALL = Setting(
    kind="text", hidden=64, layers=4, heads=2, intermediate=192, experts=8, before=500, more=250, tuning=60, batch=8,
    rate=2e-3, tuning_rate=1e-3, every=50,
)  # fmt: skip
# For a GPU of 24 GB or more: 12 layers of width 768, and all the source that there is.
LARGE = Setting(
    kind="text", hidden=768, layers=12, heads=12, intermediate=2048, experts=32, before=20_000, more=10_000,
    tuning=1000, batch=32, rate=3e-4, tuning_rate=1e-4, every=500, vocabulary=16_384, context=512,
    characters=40_000_000,
)  # fmt: skip
SIZES: Mapping[str, tuple[Setting, Setting]] = {
    "quick": (SHORT, replace(SHORT, kind="vision", batch=16)),
    "small": (
        SMALL,
        replace(SMALL, kind="vision", heads=4, intermediate=128, batch=64, before=300, more=150, every=25),
    ),
    "large": (
        LARGE,
        replace(LARGE, kind="vision", hidden=384, heads=6, intermediate=1536, batch=512, before=4000, more=2000),
    ),
}  # fmt: skip


def main_mixture(setting: Setting) -> Mixture:
    """As the paper has it by default: top-2 for a decoder, expert choice for vision, half of the layers."""
    router = "top-k" if setting.kind == "text" else "expert-choice"
    return Mixture(experts=setting.experts, router=router)


def compare(bench: Bench, mixture: Mixture, seed: int) -> Arms:
    """One seed of the main comparison."""
    upcycled = bench.upcycled(mixture, seed)
    return Arms(bench.dense(seed), bench.continued(upcycled.flops, seed), upcycled, bench.scratch(mixture, seed))


def ablations(setting: Setting) -> dict[str, Mixture]:
    """One choice changed at a time, of a ViT: in a decoder expert choice would see the future."""
    base = main_mixture(setting)
    many = 4 * setting.experts
    top = replace(base, router="top-k")
    last = setting.layers - 1
    return {
        f"C = 2, {base.experts} experts, last half": base,
        "C = 1": replace(base, count=1),
        "C = 3": replace(base, count=3),
        "top-1, raw": replace(top, count=1, combine="raw"),
        "top-2": top,
        "2 experts": replace(base, experts=2),
        f"{many} experts": replace(base, experts=many),
        f"{many} experts, batch as group": replace(base, experts=many, group="batch"),
        "last layer": replace(base, layers=f"{last}"),
        "first half": replace(base, layers=f"0-{setting.layers // 2 - 1}"),
        "every second": replace(base, layers="every:2"),
        "all layers": replace(base, layers="all"),
        "router: zeros": replace(base, router_init="zeros"),
        "router: normal, 1": replace(base, router_init="normal:1"),
        "weights: raw": replace(base, combine="raw"),
        "experts: noise of 1%": replace(base, init="noise:1%"),
        "experts: half redrawn": replace(base, init="drop:0.5"),
    }


def ablate(bench: Bench, chosen: Mapping[str, Mixture], seed: int) -> dict[str, Arms]:
    """One seed of every ablation, against one dense run that is long enough for the dearest of them."""
    runs = {label: bench.upcycled(mixture, seed) for label, mixture in chosen.items()}
    dense, continued = bench.dense(seed), bench.continued(max(run.flops for run in runs.values()), seed)
    return {label: Arms(dense, continued, run) for label, run in runs.items()}


def tune(bench: Bench, mixture: Mixture, seed: int) -> list[Tuned]:
    """Tune the dense model, the dense model trained on, and the upcycled one."""
    arms = compare(bench, mixture, seed)
    assert arms.scratch is not None
    named = {"dense, first training": arms.dense, "dense, trained on": arms.continued, "upcycled": arms.upcycled}
    found = []
    for arm, run in (named | {"mixture from scratch": arms.scratch}).items():
        probe = None
        if bench.setting.kind == "vision":
            probe = few_shot_accuracy(Path(run.folder), bench.data.other_train, bench.data.other_held_out)
        found.append(Tuned(arm, seed, bench.tuned(run, seed), probe))
    return found


# The whole ------------------------------------------------------------------------------------------------------------


def experiment(parts: Sequence[str], benches: Mapping[str, Bench], seeds: Sequence[int], folder: Path) -> None:
    """Run the parts, show their tables, write numbers and pictures."""
    results: dict[str, Any] = {}
    curves: dict[str, list[Arms]] = {}
    for kind in ("text", "vision"):
        if kind in parts:
            curves[kind] = [compare(benches[kind], main_mixture(benches[kind].setting), seed) for seed in seeds]
            show_curves(kind, curves[kind])
            results[kind] = [asdict(arms) for arms in curves[kind]]
    if curves:
        draw_curves(curves, folder / "curves.png")
    if "ablations" in parts:
        bench = benches["vision"]
        found = [ablate(bench, ablations(bench.setting), seed) for seed in seeds]
        show_ablations(found)
        draw_ablations(found, folder / "ablations.png")
        results["ablations"] = [{label: asdict(arms) for label, arms in one.items()} for one in found]
    if "tuning" in parts:
        for kind, bench in benches.items():
            tuned = [item for seed in seeds for item in tune(bench, main_mixture(bench.setting), seed)]
            show_tuning(kind, tuned)
            results[f"tuning-{kind}"] = [asdict(item) for item in tuned]
    place = folder / "results.json"
    kept = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    place.write_text(json.dumps(kept | results, indent=1), encoding="utf-8")
    console.print(f"\n{place} and pictures beside it")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to run (default: all)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of models and trainings (default: small)")
    parser.add_argument("--quick", action="store_true", help="the same as --size quick --seeds 1")
    parser.add_argument("--seeds", type=int, help="models of each kind (default 3)")
    parser.add_argument("--more", type=int, help="steps after upcycling, instead of the size's own")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, or auto")
    parser.add_argument("--folder", type=Path, default=Path(".demo/curves"), help="where to work")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates little
    if given.device == "cpu":
        torch.set_num_threads(1)
    settings: Sequence[Setting] = SIZES["quick" if given.quick else given.size]
    if given.more:
        settings = [replace(setting, more=given.more) for setting in settings]
    seeds = range(given.seeds or (1 if given.quick else 3))
    wanted = {"text": {"text", "tuning"}, "vision": {"vision", "ablations", "tuning"}}
    benches = {
        setting.kind: Bench(given.folder, setting, given.device)
        for setting in settings
        if wanted[setting.kind] & set(given.part)
    }
    experiment(given.part, benches, seeds, given.folder)


if __name__ == "__main__":
    main()
