"""Sharing ranks over modules, against an exhaustive search."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from surgery.ops.ranks import Spectrum, by_budget, by_energy, incomplete

spectra_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50), min_size=1, max_size=4).map(lambda v: sorted(v, reverse=True)),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=4,
)


def spectra_of(described: list[tuple[list[int], int]]) -> dict[str, Spectrum]:
    return {
        f"m{number}": Spectrum(tuple(map(float, energies)), float(sum(energies)), cost, len(energies))
        for number, (energies, cost) in enumerate(described)
    }


def removed(spectra: dict[str, Spectrum], ranks: dict[str, int]) -> float:
    return sum(sum(spectra[name].energies[:rank]) for name, rank in ranks.items())


@given(spectra_strategy, st.integers(1, 30))
def test_budget_is_kept_and_nothing_that_fits_is_left(described: list[tuple[list[int], int]], budget: int) -> None:
    """The ranks cost at most the budget, and no further rank would fit into what is left."""
    spectra = spectra_of(described)
    ranks = by_budget(spectra, budget)
    left = budget - sum(spectra[name].cost * rank for name, rank in ranks.items())
    assert left >= 0
    for name, spectrum in spectra.items():
        assert ranks.get(name, 0) == len(spectrum.energies) or spectrum.cost > left


@given(spectra_strategy.filter(lambda d: len({cost for _, cost in d}) == 1), st.integers(1, 30))
def test_budget_is_spent_best_where_all_ranks_cost_the_same(
    described: list[tuple[list[int], int]], budget: int
) -> None:
    """Greedy is optimal: no other choice of ranks within the budget removes more error."""
    spectra = spectra_of(described)
    best = max(
        removed(spectra, dict(zip(spectra, choice, strict=True)))
        for choice in itertools.product(*(range(len(s.energies) + 1) for s in spectra.values()))
        if sum(s.cost * rank for s, rank in zip(spectra.values(), choice, strict=True)) <= budget
    )
    assert removed(spectra, by_budget(spectra, budget)) == best


@given(spectra_strategy, st.integers(1, 30))
def test_budget_is_within_one_rank_of_the_best(described: list[tuple[list[int], int]], budget: int) -> None:
    """With ranks of different cost, greedy misses the optimum by less than the largest single rank is worth."""
    spectra = spectra_of(described)
    best = max(
        removed(spectra, dict(zip(spectra, choice, strict=True)))
        for choice in itertools.product(*(range(len(s.energies) + 1) for s in spectra.values()))
        if sum(s.cost * rank for s, rank in zip(spectra.values(), choice, strict=True)) <= budget
    )
    largest = max(s.energies[0] for s in spectra.values())
    assert removed(spectra, by_budget(spectra, budget)) >= best - largest


@given(spectra_strategy, st.floats(0.05, 1.0))
def test_energy_takes_the_least_rank_that_reaches_the_share(
    described: list[tuple[list[int], int]], share: float
) -> None:
    spectra = spectra_of(described)
    for name, rank in by_energy(spectra, share).items():
        energies, total = spectra[name].energies, spectra[name].total
        assert sum(energies[:rank]) >= share * total * (1 - 1e-12)
        assert rank == 1 or sum(energies[: rank - 1]) < share * total


def test_unchanged_sites_get_no_rank() -> None:
    spectra = {"still": Spectrum((0.0, 0.0), 0.0, 3, 2), "moved": Spectrum((1.0,), 1.0, 3, 2)}
    assert by_energy(spectra, 0.9) == {"moved": 1}
    assert by_budget(spectra, 100) == {"moved": 1}


def test_a_choice_is_final_only_where_the_spectrum_is_known_beyond_it() -> None:
    """Not final: all known values taken, and more to know. Final: at full rank, at the bound, the share reached."""
    known = Spectrum((4.0, 1.0), 10.0, 1, 8)
    assert incomplete({"m": known}, {"m": 2}, None, None) == ["m"]
    assert incomplete({"m": known}, {"m": 1}, None, None) == []
    assert incomplete({"m": known}, {"m": 2}, 2, None) == []
    assert incomplete({"m": known}, {"m": 2}, None, 0.5) == []
    assert incomplete({"m": known}, {"m": 2}, None, 0.9) == ["m"]
    assert incomplete({"m": Spectrum((4.0, 1.0), 10.0, 1, 2)}, {"m": 2}, None, 0.9) == []


def test_max_rank_bounds_both() -> None:
    spectrum = {"m": Spectrum((4.0, 3.0, 2.0), 9.0, 1, 3)}
    assert by_energy(spectrum, 1.0, max_rank=2) == {"m": 2}
    assert by_budget(spectrum, 10, max_rank=2) == {"m": 2}
