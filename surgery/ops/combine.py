"""`combine ADAPTER...` and `resize ADAPTER`: several adapters as one, or one at another rank. No base is read.

Sums, concatenations and the singular-vector methods stay in the basis that the factors share (`cores`); what works on
the entries of dW goes through it in tiles (`elementwise`); `as_peft` works on A and B (`as_peft`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.adapter import Adapter
from surgery.card import combination_card
from surgery.dtypes import BY_NAME
from surgery.errors import MismatchError, OptionError, several
from surgery.layout import TensorSpec, single_file
from surgery.operation import PlanSummary, Run, RunOptions, carried_files, check_paths, config_bytes, staged, summarise
from surgery.ops.combining import METHODS, CombineStep, Recipe, SpectrumStep
from surgery.ops.ranks import Spectrum, by_energy, incomplete
from surgery.ops.slots import Slot, Whole, common_base, gather, name_of, stored_whole, target_modules, target_parameters
from surgery.peft_format import factor_keys, lora_config, needs_head
from surgery.plan import CopyStep, Plan, Step
from surgery.provenance import Input
from surgery.reports import CombinedModule, CombineReport
from surgery.sites import Kind
from surgery.source import Source

# Values of each spectrum that are read before ranks are chosen by energy; doubled where they do not suffice.
_SPECTRUM_START = 64


@dataclass(frozen=True, kw_only=True)
class CombineOptions:
    """How to combine.

    Attributes:
        method: `sum`, `cat`, `ties`, `dare-ties`, `dare-linear`, `magnitude-prune`, `tsv`, `iso`, or with `as_peft`
            `linear`.
        rank: of every module; by default the largest rank that an adapter has there, and all of them for `cat`. A
            module whose result has a smaller rank gets that.
        energy: instead, for each module the least rank that keeps this share of ||dW||^2, in (0, 1].
        density: share of the entries that the pruning methods keep, in (0, 1].
        as_peft: prune, elect and add A and B separately, as PEFT's `add_weighted_adapter` does.
        dtype: of the factors: `float32` or `bfloat16`.
        drop_saved: leave out what adapters store whole.
        any_base: combine adapters that name different bases.
        base_name: what the result should call its base; by default what the first adapter calls it.
        seed: of DARE and of the randomised SVD.
    """

    method: str = "sum"
    rank: int | None = None
    energy: float | None = None
    density: float = 0.5
    as_peft: bool = False
    dtype: str = "float32"
    drop_saved: bool = False
    any_base: bool = False
    base_name: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"--method is {self.method!r}, expected one of {', '.join(METHODS)}.")
        if self.method == "linear" and not self.as_peft:
            raise OptionError(
                "--method linear adds A and B separately, which is not a sum of dW; pass --as-peft for that, or use "
                "--method sum."
            )
        if self.method in ("tsv", "iso") and self.as_peft:
            raise OptionError(f"--as-peft has no method {self.method!r}; PEFT does not know it.")
        if self.rank is not None and self.energy is not None:
            raise OptionError("--rank and --energy exclude each other; give one of them.")
        fixed = self.method == "cat" or (self.as_peft and self.method != "sum")
        if fixed and (self.rank is not None or self.energy is not None):
            given = "--rank" if self.rank is not None else "--energy"
            raise OptionError(
                f"{given} does not go with --method {self.method}{' --as-peft' if self.as_peft else ''}, whose rank "
                "follows from the adapters; `surgery resize` cuts the result."
            )
        if self.method == "tsv" and self.energy is not None:
            raise OptionError("--energy does not go with --method tsv, which shares a rank out evenly; give --rank.")
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"--rank is {self.rank}, expected at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise OptionError(f"--energy is {self.energy}, expected a share above 0 and at most 1.")
        if not 0 < self.density <= 1:
            raise OptionError(f"--density is {self.density}, expected a share above 0 and at most 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise OptionError(f"--dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'.")

    @property
    def recipe(self) -> Recipe:
        dtype = {"float32": "F32", "bfloat16": "BF16"}[self.dtype]
        return Recipe(self.method, self.density, self.as_peft, dtype, self.seed)


@dataclass(frozen=True)
class _Work:
    """Everything that is decided before any factors are read."""

    adapters: tuple[Adapter, ...]
    options: CombineOptions
    slots: Mapping[str, Slot]
    whole: Whole
    settings: Mapping[str, object]
    base_name: str | None
    notes: tuple[str, ...]


def combine(
    adapters: Sequence[Adapter],
    output: str | os.PathLike[str],
    options: CombineOptions,
    run_options: RunOptions,
    operation: str = "combine",
) -> CombineReport:
    """Write one adapter made of `adapters`, each at its weight, as a PEFT folder at `output`.

    Raises `MismatchError` or `UnsupportedError` naming everything that does not go together, before any work.
    """
    inputs = [Input("adapter", adapter.files, adapter.weight) for adapter in adapters]
    output = Path(output)
    check_paths(output, inputs, run_options.overwrite)
    work = _prepare(adapters, options)
    ranks = {name: _fixed_rank(work, slot) for name, slot in work.slots.items()}
    first = _plan(work, ranks)
    summary = summarise([first], output, run_options.settings)
    if run_options.dry_run:
        return replace(_blank(work, output, summary), dry_run=True)
    weights = [adapter.weight for adapter in adapters]
    with staged(output, first, (operation, options, weights), run_options) as run:
        if options.energy is not None:
            ranks = _choose_ranks(work, run)
        plan = _plan(work, ranks)
        found = run.execute(plan, "combining").reports()
        report = _report(_blank(work, output, summary), work, ranks, found, plan, run.resumed)
        config = _config(work, ranks)
        run.staging.write_file("adapter_config.json", config_bytes(config))
        run.staging.write_file("README.md", combination_card(config, report).encode())
        run.finish(operation, options, inputs, report.numbers())
        return report


def resize(
    adapter: Adapter, output: str | os.PathLike[str], options: CombineOptions, run_options: RunOptions
) -> CombineReport:
    """Write `adapter` at another rank: the nearest of that rank, or of the least rank that keeps an energy."""
    if options.rank is None and options.energy is None:
        raise OptionError("Give --rank or --energy: the rank to resize to, or the share of the energy to keep.")
    return combine([adapter], output, options, run_options, "resize")


# Planning -------------------------------------------------------------------------------------------------------------


def _prepare(adapters: Sequence[Adapter], options: CombineOptions) -> _Work:
    if not adapters:
        raise OptionError("No adapter was given.")
    slots = gather(adapters)
    if options.as_peft:
        _check_as_peft(slots, options)
    base, notes = common_base(adapters, options.any_base)
    whole = stored_whole(adapters, options.drop_saved)
    settings, about_settings = _settings(adapters, whole, options)
    everything = (*notes, *about_settings, *whole.notes)
    return _Work(tuple(adapters), options, slots, whole, settings, options.base_name or base, everything)


def _check_as_peft(slots: Mapping[str, Slot], options: CombineOptions) -> None:
    """PEFT refuses these too."""
    problems = []
    for slot in slots.values():
        if slot.kind is Kind.PARAMETER:
            problems.append(f"{slot.name!r} is a parameter, whose adapters PEFT does not combine; leave out --as-peft.")
        ranks = {share.rank for share in slot.shares}
        if len(ranks) > 1 and options.method not in ("sum", "cat"):
            problems.append(
                f"{slot.name!r} has ranks {', '.join(map(str, sorted(ranks)))} in these adapters, and --as-peft "
                f"{options.method} needs one rank; use sum or cat, or leave out --as-peft."
            )
    if problems:
        raise MismatchError(several("combining as PEFT does", problems), problems)


def _settings(
    adapters: Sequence[Adapter], whole: Whole, options: CombineOptions
) -> tuple[dict[str, object], list[str]]:
    """The config's settings beside ranks and targets, and sentences about those that the adapters disagree on."""
    notes = []
    settings: dict[str, object] = {"fan_in_fan_out": any(bool(a.config.get("fan_in_fan_out")) for a in adapters)}
    for key in ("task_type", "revision", "auto_mapping"):
        values = [value for adapter in adapters if (value := adapter.config.get(key)) is not None]
        if any(value != values[0] for value in values):
            notes.append(f"The adapters differ in {key} ({', '.join(map(repr, values))}); left empty.")
        elif values:
            settings[key] = values[0]
    if options.base_name is not None:
        settings.pop("revision", None)
    settings |= whole.settings
    if needs_head(settings.get("task_type")) and not settings.get("modules_to_save"):
        settings["task_type"] = None
        notes.append("task_type is left empty: PEFT would look for the head of the task, which is not here.")
    return settings, notes


def _fixed_rank(work: _Work, slot: Slot) -> int:
    """The rank of a slot as far as the options say; with `energy` the largest there could be."""
    recipe = work.options.recipe
    if work.options.energy is not None:
        return min(slot.stacked, recipe.most(slot))
    if work.options.rank is not None:
        return min(work.options.rank, recipe.most(slot))
    return recipe.default_rank(slot)


def _plan(work: _Work, ranks: Mapping[str, int]) -> Plan:
    """Combine every slot at its rank, copy what is stored whole."""
    alpha = max(ranks.values())
    recipe = work.options.recipe
    dtype = BY_NAME[recipe.dtype]
    keys = factor_keys(slot.site for slot in work.slots.values())
    steps: list[Step] = []
    for name, slot in work.slots.items():
        A, B = (TensorSpec(key, dtype, shape) for key, shape in zip(keys[name], slot.shapes(ranks[name]), strict=True))
        steps.append(CombineStep(slot, recipe, A, B, ranks[name], alpha / ranks[name]))
    steps += [CopyStep(TensorSpec.like(tensor), tensor) for tensor in work.whole.tensors.values()]
    layout = single_file("adapter_model.safetensors", [spec for step in steps for spec in step.writes])
    carried: tuple[tuple[str, Source], ...] = ()
    if len(work.adapters) == 1:
        carried = carried_files(work.adapters[0].files, {"README.md", "adapter_config.json"})
    return Plan(tuple(steps), layout, carried=carried)


def _choose_ranks(work: _Work, run: Run) -> dict[str, int]:
    """For every slot the least rank that keeps the energy asked for; 1 where there is none to keep."""
    recipe, energy = work.options.recipe, work.options.energy
    assert energy is not None
    spectra: dict[str, Spectrum] = {}
    wanted = dict.fromkeys(work.slots, _SPECTRUM_START)
    ranks: dict[str, int] = {}
    while wanted:
        steps = {name: SpectrumStep(work.slots[name], recipe, count) for name, count in wanted.items()}
        found = run.execute(Plan(tuple(steps.values())), "reading spectra").reports()
        for name, step in steps.items():
            slot = work.slots[name]
            cost = slot.experts * (slot.out_features + slot.in_features)
            spectra[name] = Spectrum.measured(found[step.name], cost, recipe.most(slot))
        ranks = by_energy(spectra, energy)
        open_ended = incomplete(spectra, ranks, None, energy)
        wanted = {name: 2 * len(spectra[name].energies) for name in open_ended}
    return {name: ranks.get(name, 1) for name in work.slots}


# Assembly -------------------------------------------------------------------------------------------------------------


def _config(work: _Work, ranks: Mapping[str, int]) -> dict[str, object]:
    return lora_config(
        max(ranks.values()),
        ranks,
        base_name=work.base_name,
        target_modules=target_modules(work.adapters, work.slots.values()),
        target_parameters=target_parameters(work.slots.values()),
        **work.settings,
    )


def _blank(work: _Work, output: Path, summary: PlanSummary) -> CombineReport:
    return CombineReport(
        output=str(output),
        plan=summary,
        method=work.options.method + (" as PEFT" if work.options.as_peft else ""),
        adapters=tuple(name_of(adapter) for adapter in work.adapters),
        weights=tuple(adapter.weight for adapter in work.adapters),
        notes=work.notes,
    )


def _report(
    blank: CombineReport,
    work: _Work,
    ranks: Mapping[str, int],
    found: Mapping[str, Mapping[str, object]],
    plan: Plan,
    resumed: int,
) -> CombineReport:
    modules = []
    sums = dict.fromkeys(("energy", "error", "sum_energy", "from_sum"), 0.0)
    for name, slot in work.slots.items():
        numbers = {key: _number(value) for key, value in found[f"combine {name}"].items()}
        sums = {key: value + numbers[key] for key, value in sums.items()}
        shape = (slot.out_features, slot.in_features)
        own = {share.adapter: share.rank for share in slot.shares}
        modules.append(
            CombinedModule(
                name=name,
                shape=shape if slot.kind is not Kind.PARAMETER else (slot.experts, *shape),
                ranks=tuple(own.get(number, 0) for number in range(len(work.adapters))),
                rank=ranks[name],
                energy_kept=1 - _share(numbers["error"], numbers["energy"]),
                error=math.sqrt(_share(numbers["error"], numbers["energy"])),
                from_sum=_distance(numbers),
                excess=numbers["excess"],
            )
        )
    notes = list(blank.notes)
    if work.options.recipe.on_entries:
        notes.append(
            f"What {work.options.method} makes of dW has no low rank of its own: the error is what any adapter of the "
            "rank loses. A larger --rank keeps more."
        )
    specs = [spec for step in plan.steps for spec in step.writes]
    return replace(
        blank,
        modules=tuple(modules),
        stored_whole=tuple(work.whole.tensors),
        parameters=sum(math.prod(spec.shape) for spec in specs),
        nbytes=plan.layout.nbytes,
        energy_kept=1 - _share(sums["error"], sums["energy"]),
        error=math.sqrt(_share(sums["error"], sums["energy"])),
        from_sum=_distance(sums),
        notes=tuple(notes),
        resumed=resumed,
    )


def _share(error: float, energy: float) -> float:
    """The part of the energy that is lost; where there is none, nothing is."""
    return error / energy if energy else 0.0


def _distance(numbers: Mapping[str, float]) -> float | None:
    return math.sqrt(numbers["from_sum"] / numbers["sum_energy"]) if numbers["sum_energy"] else None


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)
