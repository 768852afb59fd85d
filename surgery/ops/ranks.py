"""Choosing ranks from spectra. Pure functions.

A site with E matrices (experts) has one rank for all of them, because PEFT stores the stack in one tensor; its energies
are added up rank by rank. One more rank at a site costs E * (out + in) parameters.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.sites import Site


@dataclass(frozen=True)
class Spectrum:
    """What is known of a site's dW.

    Attributes:
        energies: sigma_i^2, descending, summed over the site's matrices; the leading ones only.
        total: ||dW||^2.
        cost: parameters of one rank.
        full: the largest rank there is.
    """

    energies: tuple[float, ...]
    total: float
    cost: int
    full: int

    @classmethod
    def of(cls, site: Site, report: Mapping[str, object]) -> Spectrum:
        """Gather what a `SpectrumStep` measured for each matrix of a site."""
        cost = len(site.matrices) * (site.out_features + site.in_features)
        return cls.measured(report, cost, min(site.out_features, site.in_features))

    @classmethod
    def measured(cls, report: Mapping[str, object], cost: int, full: int) -> Spectrum:
        """The same for what costs `cost` parameters a rank and has at most rank `full`."""
        totals, spectra = report["energies"], report["spectra"]
        assert isinstance(totals, list)
        assert isinstance(spectra, list)
        length = max((len(values) for values in spectra), default=0)
        summed = tuple(math.fsum(values[i] for values in spectra if i < len(values)) for i in range(length))
        return cls(summed, math.fsum(totals), cost, full)


def by_energy(spectra: Mapping[str, Spectrum], share: float, max_rank: int | None = None) -> dict[str, int]:
    """For each site the least rank whose energies reach `share` of its total, or all the ranks known if none does.

    Sites that did not change are left out.
    """
    ranks = {}
    for name, spectrum in spectra.items():
        if spectrum.total == 0.0:
            continue
        kept, rank = 0.0, 0
        limit = min(len(spectrum.energies), max_rank or len(spectrum.energies))
        while rank < limit and kept < share * spectrum.total:
            kept += spectrum.energies[rank]
            rank += 1
        ranks[name] = max(rank, 1)
    return ranks


def by_budget(spectra: Mapping[str, Spectrum], budget: int, max_rank: int | None = None) -> dict[str, int]:
    """Ranks of least total error for at most `budget` parameters.

    Takes the rank that removes the most error for its parameters, sigma^2 / cost, again and again. Energies fall with
    the rank, so this greedy choice is optimal up to the last rank that no longer fits, which is passed over for the
    next best that does. Sites that get nothing are left out.
    """
    ranks: dict[str, int] = dict.fromkeys(spectra, 0)
    queue = [(-s.energies[0] / s.cost, name) for name, s in spectra.items() if s.energies and s.energies[0] > 0.0]
    heapq.heapify(queue)
    left = budget
    while queue:
        _, name = heapq.heappop(queue)
        spectrum = spectra[name]
        if spectrum.cost > left:
            continue
        left -= spectrum.cost
        ranks[name] += 1
        rank = ranks[name]
        if rank < min(len(spectrum.energies), max_rank or rank + 1) and spectrum.energies[rank] > 0.0:
            heapq.heappush(queue, (-spectrum.energies[rank] / spectrum.cost, name))
    return {name: rank for name, rank in ranks.items() if rank}


def incomplete(
    spectra: Mapping[str, Spectrum], ranks: Mapping[str, int], max_rank: int | None, share: float | None
) -> list[str]:
    """Sites whose chosen rank is all that is known of them while there is more to know: not final there."""
    found = []
    for name, rank in ranks.items():
        spectrum = spectra[name]
        if rank < len(spectrum.energies) or rank >= min(spectrum.full, max_rank or spectrum.full):
            continue
        if share is None or sum(spectrum.energies) < share * spectrum.total:
            found.append(name)
    return found
