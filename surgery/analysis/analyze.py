"""`analyze BASE ADAPTER...`: how updates relate to the weights they are for, and what the weights are themselves.

Nothing is written but a picture, if one is asked for. dW stays in its factors; of W one matrix at a time is in memory
for each thread.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.adapter import Adapter
from surgery.analysis.pictures import check_picture, write_picture
from surgery.analysis.places import Place, places_of_adapters, places_of_base
from surgery.analysis.report import (
    AnalyzedModule,
    AnalyzeReport,
    Overlap,
    PairReport,
    Spectrum,
    UpdateReport,
)
from surgery.analysis.steps import CompareStep, SpectrumStep
from surgery.checkpoint import Checkpoint
from surgery.errors import OptionError
from surgery.execute import Settings, execute
from surgery.hashing import HashBook
from surgery.ops.slots import name_of
from surgery.plan import Plan, Step
from surgery.writer import NullStaging


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """What to look at.

    Attributes:
        targets: which matrices, as `--targets`; by default those that the adapters act on, or all linear layers.
        layers: `all`, `last:N`, `last:half`, `every:N`, or a list such as `0,4-7`.
        directions: phi(i, j) is told for i and j up to this.
        values: how many singular values of a matrix are listed, about.
        seed: of the randomised SVD that finds the leading directions of a large W.
    """

    targets: str | None = None
    layers: str = "all"
    directions: int = 8
    values: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.targets is not None and not self.targets.strip():
            raise OptionError("--targets is empty; leave it out, or name modules.")
        if self.directions < 1:
            raise OptionError(f"--directions is {self.directions}, expected at least 1.")
        if self.values < 4:
            raise OptionError(f"--values is {self.values}, expected at least 4.")


def analyze(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    options: AnalyzeOptions,
    settings: Settings,
    plot: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> AnalyzeReport:
    """Look at a base's weights, or at what adapters make of them; with `plot`, draw it.

    Raises `OptionError` for a choice that names nothing, `MismatchError` for an adapter of another base,
    `UnsupportedError` for one that is no product of factors, `NonFiniteError` for NaN and infinity, `OutputError` and
    `MissingExtraError` for a picture that cannot be written.
    """
    if plot is not None:
        check_picture(plot, overwrite)
    left_out: list[str] = []
    if adapters:
        places, left_out = places_of_adapters(base, adapters, options.targets, options.layers)
    else:
        places = places_of_base(base, options.targets, options.layers)
    plan = Plan(tuple(_step(place, options) for place in places))
    found = execute(plan, NullStaging(), settings, HashBook(False), "analyzing").reports()
    report = AnalyzeReport(
        label=base.label,
        adapters=tuple(name_of(adapter) for adapter in adapters),
        weights=tuple(adapter.weight for adapter in adapters),
        modules=tuple(_module(place, found[step.name]) for place, step in zip(places, plan.steps, strict=True)),
        left_out=tuple(left_out),
        notes=tuple(_notes(adapters, places)),
    )
    if plot is None:
        return report
    write_picture(report, plot)
    return replace(report, plot=os.fspath(plot))


def _step(place: Place, options: AnalyzeOptions) -> Step:
    if place.factors:
        return CompareStep(place, options.directions, options.values, options.seed)
    return SpectrumStep(place, options.values)


def _notes(adapters: Sequence[Adapter], places: Sequence[Place]) -> list[str]:
    if len(adapters) < 2:
        return []
    alone = sum(len(place.factors) < 2 for place in places)
    if not alone:
        return []
    return [f"Of {len(places)} matrices, {alone} have only one of the adapters; there is nothing to compare there."]


# From what the steps found, which is plain JSON, to the report --------------------------------------------------------


def _module(place: Place, found: Mapping[str, Any]) -> AnalyzedModule:
    spectrum = found.get("spectrum")
    return AnalyzedModule(
        name=place.name,
        group=place.group,
        part=place.part,
        layer=place.layer,
        shape=place.shape,
        norm=found["norm"],
        spectrum=None if spectrum is None else Spectrum(**spectrum),
        updates=tuple(_update(one) for one in found.get("updates", ())),
        pairs=tuple(_pair(one) for one in found.get("pairs", ())),
    )


def _update(found: Mapping[str, Any]) -> UpdateReport:
    sides = {side: _overlap(found[side]) for side in ("output", "input")}
    return UpdateReport(**{**found, **sides, "spectrum": Spectrum(**found["spectrum"])})


def _pair(found: Mapping[str, Any]) -> PairReport:
    return PairReport(**{**found, **{side: _overlap(found[side]) for side in ("output", "input")}})


def _overlap(found: Mapping[str, Any] | None) -> Overlap | None:
    return None if found is None else Overlap(**found)
