"""Adapters on experts: one module for each expert, or one fused stack as transformers 5 has it in memory, both ways.

`experts.7.w1` and `experts.7.w3` of a checkpoint become rows of `experts.gate_up_proj` in memory; which is which, the
sites of the base say. Taking apart is exact at the same rank. Putting together is exact too: where gate and up have the
same A the rank stays, and else it grows to the sum of theirs, with a block-diagonal B (what PEFT does on loading).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from surgery.checkpoint import Checkpoint
from surgery.errors import UnsupportedError
from surgery.families import family_of
from surgery.formats.exchange import Exchange, Factors, refuse
from surgery.formats.experts import is_per_expert, projection_of, put_together, same_factors, take_apart
from surgery.sites import Kind, Site, find_sites, memory_names

LAYOUTS = ("fused", "per-expert")


def to_per_expert(exchange: Exchange, base: Checkpoint) -> Exchange:
    """Every fused stack as modules under the names of the stored experts. Exact, at the same rank."""
    sites = find_sites(base)
    modules: list[Factors] = []
    problems = []
    stacks = 0
    for factors in exchange.modules:
        site = sites.get(factors.module)
        if not factors.experts:
            router = site is not None and site.kind is Kind.PARAMETER
            modules.append(_router_as_stored(factors, site) if router and site is not None else factors)
        elif site is None or not is_per_expert(site):
            problems.append(
                f"{exchange.label}: {base.label} does not store the experts of {factors.module!r} one by one, so they "
                "have no names of their own."
            )
        else:
            problems += _misfit(exchange.label, factors, site)
            modules += [] if problems else take_apart(factors, site)
            stacks += 1
    refuse(f"the experts of {exchange.label}", problems, UnsupportedError)
    note = f"{stacks} stacks of experts are now {len(modules)} modules in all; dW is the same." if stacks else ""
    return exchange.with_modules(modules, *([note] if note else []))


def _router_as_stored(factors: Factors, site: Site) -> Factors:
    return replace(factors, module=site.tensors[0].name.rpartition(".")[0], parameter=False)


def _misfit(label: str, factors: Factors, site: Site) -> list[str]:
    found = (factors.experts, factors.B.shape[0], factors.A.shape[1])
    expected = (len(site.matrices), site.out_features, site.in_features)
    if found == expected:
        return []
    return [
        f"{label}: the factors of {factors.module!r} are for {found[0]} experts of {list(found[1:])}, the base has "
        f"{expected[0]} of {list(expected[1:])}."
    ]


def to_fused(exchange: Exchange, base: Checkpoint) -> Exchange:
    """Modules of single experts as the stacks that transformers 5 has in memory. Exact; the rank may grow."""
    places = _places(base)
    names = memory_names(base)
    routers = family_of(base.model_type).routers
    found: dict[str, dict[tuple[int, int], Factors]] = {}
    modules: list[Factors] = []
    problems = []
    for factors in exchange.modules:
        place = places.get(factors.module)
        if place is None:
            memory = names.get(f"{factors.module}.weight", f"{factors.module}.weight")
            is_router = routers is not None and routers.fullmatch(memory.removesuffix(".weight"))
            becomes_parameter = is_router and not factors.parameter
            modules.append(replace(factors, module=memory, parameter=True) if becomes_parameter else factors)
            continue
        site, expert, piece = place
        shape = (site.matrices[expert][piece].end - site.matrices[expert][piece].begin, site.in_features)
        if (factors.B.shape[0], factors.A.shape[1]) != shape:
            problems.append(
                f"{exchange.label}: the factors of {factors.module!r} are for "
                f"{[factors.B.shape[0], factors.A.shape[1]]}, the base has {list(shape)}."
            )
        elif factors.magnitude is not None or factors.bias is not None:
            what = "a DoRA magnitude" if factors.magnitude is not None else "a bias of lora_B"
            problems.append(f"{exchange.label}: {factors.module!r} has {what}, which no stack of experts can have.")
        else:
            found.setdefault(site.name, {})[expert, piece] = factors
    refuse(f"the experts of {exchange.label}", problems, UnsupportedError)
    sites = find_sites(base)
    grown = 0
    for name, parts in found.items():
        stack, has_grown = _fuse(sites[name], parts)
        modules.append(stack)
        grown += has_grown
    notes = [f"{len(found)} stacks of experts were put together; dW is the same."] if found else []
    if grown:
        notes.append(
            f"The rank of {grown} stacks is the sum of those of gate and up, whose A differ; B is block-diagonal there."
        )
    return exchange.with_modules(modules, *notes)


def _places(base: Checkpoint) -> dict[str, tuple[Site, int, int]]:
    """Module of one expert's projection, as stored and as in memory, to its stack, expert and piece."""
    names: Mapping[str, str] = memory_names(base)
    places = {}
    for site in find_sites(base).values():
        if is_per_expert(site):
            for expert, matrix in enumerate(site.matrices):
                for number, piece in enumerate(matrix):
                    for name in (piece.tensor.name, names[piece.tensor.name]):
                        places[name.rpartition(".")[0]] = (site, expert, number)
    return places


def _fuse(site: Site, parts: Mapping[tuple[int, int], Factors]) -> tuple[Factors, bool]:
    """The fused stack, and whether its rank is the sum of those of its projections."""
    pieces = site.matrices[0]
    rows = [[parts.get((expert, number)) for expert in range(len(site.matrices))] for number in range(len(pieces))]
    present = [row for row in rows if any(row)]
    same_A = len(present) > 1 and all(same_factors(present[0], row) for row in present[1:])
    projections = [
        projection_of(row, piece.end - piece.begin, site.in_features) if any(row) else None
        for row, piece in zip(rows, pieces, strict=True)
    ]
    return put_together(site, projections, same_A), len(present) > 1 and not same_A
