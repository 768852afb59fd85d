"""`extract BASE TUNED`: the difference of two checkpoints as a LoRA adapter.

What the adapter can carry is factored (`factor.FactorStep`); what it cannot (norms, biases, embeddings, heads, layers
outside `--targets`) is compared, reported as residual, and stored whole with `--save-residual`.
Source: LoRA (Hu et al. 2021), section 4.1 for dW = B A; the SVD gives the B A of a rank that is nearest to dW (Eckart
and Young).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.card import extraction_card
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import BY_NAME
from surgery.errors import MismatchError, OptionError, several
from surgery.layout import TensorSpec, single_file
from surgery.operation import PlanSummary, Run, RunOptions, check_paths, config_bytes, staged, summarise
from surgery.ops import best_rank
from surgery.ops.exact_extract import add_exact, check_exact, estimate_exact
from surgery.ops.factor import CompareStep, FactorStep, SpectrumStep, SvdOptions
from surgery.ops.kinship import note_other_base
from surgery.ops.ranks import Spectrum, by_budget, by_energy, incomplete
from surgery.pairing import Pairing, SitePair, TensorPair, pair, refuse_quantised, tied_embedding
from surgery.peft_format import Residual, adapter_config, carry_residual, factor_keys
from surgery.plan import CopyStep, Plan, Step
from surgery.provenance import Input
from surgery.reports import ExtractReport, ModuleReport, PlannedAdapter, ResidualReport
from surgery.sites import TARGETS, Kind, Site, find_sites, select
from surgery.source import Source, read_bytes

DEFAULT_RANK = 16
BEST = "best"
# Values of each spectrum that are read before ranks are chosen by energy or budget; doubled where they do not suffice.
_SPECTRUM_START = 64
# A base and its fine-tune point the same way; the weights of unrelated models are as good as orthogonal.
_PROBED_SITES = 8
_LEAST_COSINE = 0.5
# What a tensor takes in a header, at most, besides its name.
_HEADER_ENTRY = 120


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What to extract.

    Attributes:
        rank: the same for every module (a smaller matrix gets its full rank); 16 if nothing else is given. `best`, with
            `exact`, is for each module the rank that makes adapter and record smallest together.
        energy: instead, for each module the least rank that keeps this share of ||dW||^2, in (0, 1].
        budget: instead, this many parameters in all, shared over modules so that the total error is least.
        max_rank: bound on the ranks that `energy` and `budget` choose.
        targets: which modules, see `sites.select`.
        method: `randomized` or `exact`.
        dtype: of the factors: `float32` or `bfloat16`.
        save_residual: store what changed and has no factors whole, as `modules_to_save`.
        allow_missing: report tensors found in one checkpoint only, instead of refusing.
        allow_nonfinite: take NaN and infinity for no change, instead of refusing.
        any_base: extract even if the two do not look like a base and its fine-tune.
        base_name: what the adapter should call its base; by default the base's Hub id or folder name.
        seed: of the randomised SVD.
        exact: write the record, too, from which `restore` gives TUNED back.
    """

    rank: int | str | None = None
    energy: float | None = None
    budget: int | None = None
    max_rank: int | None = None
    targets: str = "all-linear"
    method: str = "randomized"
    dtype: str = "float32"
    save_residual: bool = False
    allow_missing: bool = False
    allow_nonfinite: bool = False
    any_base: bool = False
    base_name: str | None = None
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(
                f"--{given[0]} and --{given[1]} exclude each other; give one of --rank, --energy, --budget."
            )
        for name in ("rank", "budget", "max_rank"):
            value = getattr(self, name)
            if name == "rank" and isinstance(value, str):
                if value != BEST:
                    raise OptionError(f"--rank is {value!r}, expected a number or 'best'.")
                if not self.exact:
                    raise OptionError("--rank best weighs the adapter against the exact record; it wants --exact.")
            elif value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} is {value}, expected at least 1.")
        if self.max_rank is not None and self.energy is None and self.budget is None:
            raise OptionError("--max-rank bounds the ranks of --energy and --budget; give one of them.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise OptionError(f"--energy is {self.energy}, expected a share above 0 and at most 1.")
        if self.method not in ("randomized", "exact"):
            raise OptionError(f"--method is {self.method!r}, expected 'randomized' or 'exact'.")
        if self.dtype not in ("float32", "bfloat16"):
            raise OptionError(f"--dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'.")
        if not self.targets.replace(",", " ").strip():
            raise OptionError(f"--targets is empty; name {TARGETS}.")

    @property
    def svd(self) -> SvdOptions:
        dtype = {"float32": "F32", "bfloat16": "BF16"}[self.dtype]
        return SvdOptions(self.method, dtype, self.seed, self.allow_nonfinite)

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every module, or None where the data decide."""
        if self.energy is not None or self.budget is not None or isinstance(self.rank, str):
            return None
        return self.rank or DEFAULT_RANK


@dataclass(frozen=True)
class _Work:
    """Everything that is decided before any data are read.

    `whole` are parameters without a counterpart to compare with: new in TUNED, or grown.
    """

    base: Checkpoint
    tuned: Checkpoint
    options: ExtractOptions
    factored: Mapping[str, SitePair]
    compared: Mapping[str, TensorPair]
    whole: Mapping[str, tuple[StoredTensor, str]]
    notes: tuple[str, ...]


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    output: str | os.PathLike[str],
    options: ExtractOptions,
    run_options: RunOptions,
) -> ExtractReport:
    """Write the adapter that takes `base` to `tuned`, as a PEFT folder at `output`.

    Raises `MismatchError` naming everything about the two that does not fit, before any work.
    """
    inputs = (Input("base", base), Input("tuned", tuned))
    output = Path(output)
    check_paths(output, inputs, run_options.overwrite)
    if options.exact:
        check_exact(tuned)
        if not run_options.settings.hash:
            raise OptionError("--exact proves what it restores by hashes; leave out --no-hash.")
    work = _prepare(*_with_config(base, tuned), options)
    if not options.any_base:
        _check_related(work)
    first = _factor_plan(work, dict.fromkeys(work.factored, options.fixed_rank or DEFAULT_RANK))
    summary = summarise([first], output, run_options.settings)
    if run_options.dry_run:
        expected = estimate_exact(base, tuned) if options.exact else None
        return ExtractReport(
            str(output),
            summary,
            notes=work.notes,
            dry_run=True,
            planned=_planned(work),
            estimated_record_bytes=expected,
        )
    with staged(output, first, ("extract", options), run_options) as run:
        ranks = _choose_ranks(work, run)
        found = run.execute(_factor_plan(work, ranks), "factoring").reports()
        report, plan = _assemble(work, ranks, found, run, summary, output)
        run.execute(plan, "writing")
        if options.exact:
            report = replace(report, exact=add_exact(run, base, tuned))
            report = replace(report, resumed=run.resumed)
        run.finish("extract", options, inputs, report.numbers())
        return report


def _with_config(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Where one of the two is a file without a config, it is read as what the other one is."""
    if not base.config:
        return replace(base, config=tuned.config), tuned
    return base, tuned if tuned.config else replace(tuned, config=base.config)


# Planning -------------------------------------------------------------------------------------------------------------


def _prepare(base: Checkpoint, tuned: Checkpoint, options: ExtractOptions) -> _Work:
    refuse_quantised(base)
    refuse_quantised(tuned)
    paired = pair(base, tuned)
    chosen, unmatched = select({name: found.right for name, found in paired.sites.items()}, options.targets)
    factored = {name: paired.sites[name] for name in chosen if _is_arithmetic(paired.sites[name])}
    compared = dict(paired.tensors)
    for name, found in paired.sites.items():
        if name not in factored:
            compared |= {one.name: one for one in _as_tensors(found)}
    whole = {name: (tensor, "only in TUNED") for name, tensor in paired.right_only.items()}
    if unmatched and paired.sites:
        strangers = [
            f"--targets names {item!r}, which matches no module of {tuned.label}; name {TARGETS}; the suffixes are "
            f"{_endings(paired)}."
            for item in unmatched
        ]
        raise OptionError(several("--targets", strangers), strangers)
    problems: list[str] = []
    grown: list[str] = []
    for other in [one for one in compared.values() if not one.same_shape]:
        del compared[other.name]
        if _has_grown(other) and options.save_residual:
            whole[other.name] = (other.right, "another number of rows")
        elif options.exact and len(other.left.shape) > 1 and other.left.shape[1:] == other.right.shape[1:]:
            grown.append(f"{other.name!r} has another number of rows in TUNED, which only the exact record holds.")
        else:
            problems.append(_shape_problem(other))
    one_sided, notes = _one_sided(paired, options)
    problems += one_sided
    if problems:
        raise MismatchError(several(f"the pair {base.label} and {tuned.label}", problems), problems)
    notes = (*notes, *grown, *note_other_base(base, tuned))
    return _Work(base, tuned, options, factored, compared, whole, notes)


def _is_arithmetic(found: SitePair) -> bool:
    return all(tensor.dtype.arithmetic for tensor in (*found.left.tensors, *found.right.tensors))


def _as_tensors(found: SitePair) -> list[TensorPair]:
    """A site without factors as parameters to compare: a layer's weight, or each stored piece of a stack."""
    site = found.right
    pieces = list(zip(found.left.tensors, site.tensors, strict=False))
    if len(pieces) == 1:
        name = site.name if site.kind is Kind.PARAMETER else f"{site.name}.weight"
        return [TensorPair(name, site.part, *pieces[0])]
    return [TensorPair(f"{site.name}[{number}]", site.part, *piece) for number, piece in enumerate(pieces)]


def _endings(paired: Pairing) -> str:
    endings = sorted({name.rpartition(".")[2] for name in paired.sites})
    return ", ".join(endings[:12]) + (", ..." if len(endings) > 12 else "")


def _has_grown(found: TensorPair) -> bool:
    left, right = found.left.shape, found.right.shape
    return found.part in ("embeddings", "head") and len(left) == len(right) == 2 and left[1] == right[1]


def _shape_problem(found: TensorPair) -> str:
    left, right = list(found.left.shape), list(found.right.shape)
    if _has_grown(found):
        return (
            f"The vocabulary of {found.name!r} went from {left[0]} to {right[0]} rows, which no LoRA can carry; "
            "pass --save-residual to store the new matrix whole."
        )
    return f"Tensor {found.name!r} has shape {left} in BASE and {right} in TUNED; is this the right base?"


def _one_sided(paired: Pairing, options: ExtractOptions) -> tuple[list[str], tuple[str, ...]]:
    """Sentences about tensors found in one checkpoint only: those that refuse the pair, and those that may pass."""
    base_only = [f"Tensor {name!r} is in BASE and not in TUNED" for name in paired.left_only]
    tuned_only = [f"Tensor {name!r} is in TUNED and not in BASE" for name in paired.right_only]
    if options.allow_missing or options.exact:
        return [], tuple(f"{text}." for text in (*base_only, *tuned_only))
    problems = [f"{text}; pass --allow-missing to extract the rest." for text in base_only]
    if not options.save_residual:
        problems += [f"{text}; pass --save-residual to store it whole, or --allow-missing." for text in tuned_only]
    return problems, ()


def _factor_plan(work: _Work, ranks: Mapping[str, int]) -> Plan:
    """Factor every site that has a rank, compare everything else. B is divided by what its reader multiplies by."""
    alpha = max(ranks.values(), default=1)
    element = BY_NAME[work.options.svd.dtype].bits // 8
    steps: list[Step] = []
    spare = sum(tensor.nbytes for tensor, _ in work.whole.values()) if work.options.save_residual else 0
    for name, found in work.factored.items():
        if ranks.get(name):
            site = found.right
            rank = min(ranks[name], site.out_features, site.in_features)
            steps.append(FactorStep(found, work.options.svd, rank, alpha / rank))
            spare += 2 * element * len(site.matrices) * rank * (site.out_features + site.in_features)
    lenient = work.options.allow_nonfinite
    steps += [CompareStep(found, lenient) for found in work.compared.values()]
    return Plan(tuple(steps), spare=spare)


def _planned(work: _Work) -> PlannedAdapter:
    """The adapter at most: the rank asked for in every module, or as far as `max_rank` and `budget` let it grow."""
    options = work.options
    rank = options.fixed_rank
    sites = {name: found.right for name, found in work.factored.items()}
    count = sum(
        len(site.matrices)
        * min(rank or options.max_rank or site.out_features, site.out_features, site.in_features)
        * (site.out_features + site.in_features)
        for site in sites.values()
    )
    count = min(count, options.budget or count)
    header = sum(len(key) + _HEADER_ENTRY for keys in factor_keys(sites.values()).values() for key in keys)
    return PlannedAdapter(
        len(sites), rank, count, count * BY_NAME[options.svd.dtype].bits // 8 + header + _HEADER_ENTRY
    )


def _check_related(work: _Work) -> None:
    """Refuse a pair whose weights do not point the same way; the first rows of some modules tell."""
    names = list(work.factored)
    cosines = []
    for name in names[:: max(1, len(names) // _PROBED_SITES)][:_PROBED_SITES]:
        left, right = work.factored[name].left.tensors[0], work.factored[name].right.tensors[0]
        if left.shape == right.shape and (cosine := _cosine(left, right)) is not None:
            cosines.append((cosine, name))
    if cosines and sorted(cosines)[len(cosines) // 2][0] < _LEAST_COSINE:
        cosine, name = min(cosines)
        raise MismatchError(
            f"{work.tuned.label} does not look like a fine-tune of {work.base.label}: their weights of {name!r} have a "
            f"cosine of {cosine:.2f}, expected nearly 1; name the right base, or pass --any-base to extract anyway."
        )


def _cosine(left: StoredTensor, right: StoredTensor) -> float | None:
    """Cosine between the first elements of two stored tensors; None where either is zero or not finite."""
    import torch

    rows = []
    for tensor in (left, right):
        count = min(tensor.numel, 1 << 16)
        data = bytearray(read_bytes(tensor.source, tensor.offset, count * tensor.dtype.bits // 8))
        rows.append(torch.frombuffer(data, dtype=tensor.dtype.to_torch).to(torch.float64))
    dot, norms = float(rows[0] @ rows[1]), float(rows[0].norm() * rows[1].norm())
    return dot / norms if math.isfinite(dot) and 0 < norms < math.inf else None


# Ranks ----------------------------------------------------------------------------------------------------------------


def _choose_ranks(work: _Work, run: Run) -> dict[str, int]:
    """The rank of every site that is to have factors. By energy or budget, the inputs are read once more for it."""
    options = work.options
    if options.fixed_rank is not None:
        return dict.fromkeys(work.factored, options.fixed_rank)
    if options.rank == BEST:
        return _choose_best(work, run)
    spectra: dict[str, Spectrum] = {}
    ranks: dict[str, int] = {}
    wanted = dict.fromkeys(work.factored, _SPECTRUM_START)
    while wanted:
        steps = {name: SpectrumStep(work.factored[name], options.svd, count) for name, count in wanted.items()}
        found = run.execute(Plan(tuple(steps.values())), "reading spectra").reports()
        for name, step in steps.items():
            report = found[step.name]
            spectra[name] = Spectrum.of(work.factored[name].right, report)
        if options.energy is not None:
            ranks = by_energy(spectra, options.energy, options.max_rank)
        else:
            ranks = by_budget(spectra, options.budget or 0, options.max_rank)
        open_ended = incomplete(spectra, ranks, options.max_rank, options.energy)
        wanted = {name: 2 * len(spectra[name].energies) for name in open_ended}
    changed = [spectrum for spectrum in spectra.values() if spectrum.total]
    if changed and not ranks:
        least = min(spectrum.cost for spectrum in changed)
        raise OptionError(
            f"--budget is {options.budget}, below the {least} parameters of the smallest module at rank 1."
        )
    return ranks


def _choose_best(work: _Work, run: Run) -> dict[str, int]:
    """The rank of every site that changed; 0 where the record alone is smaller than with any factors."""
    found: dict[str, Mapping[str, object]] = {}
    counts = dict.fromkeys(work.factored, best_rank.START)
    wanted = list(work.factored)
    ranks: dict[str, int] = {}
    while wanted:
        steps = {name: best_rank.RankStep(work.factored[name], work.options.svd, counts[name]) for name in wanted}
        reports = run.execute(Plan(tuple(steps.values())), "weighing ranks").reports()
        found |= {name: reports[step.name] for name, step in steps.items()}
        ranks, wanted = best_rank.choose(work.factored, work.options.svd, found, counts)
        counts |= {name: 4 * counts[name] for name in wanted}
    return ranks


# Assembly -------------------------------------------------------------------------------------------------------------


def _assemble(
    work: _Work,
    ranks: Mapping[str, int],
    found: Mapping[str, Mapping[str, object]],
    run: Run,
    summary: PlanSummary,
    output: Path,
) -> tuple[ExtractReport, Plan]:
    """The report, and the plan that copies factors and residual into the adapter's one file."""
    alpha = max(ranks.values(), default=1)
    sites: dict[str, Site] = {}
    modules: list[ModuleReport] = []
    for name in (name for name, rank in ranks.items() if rank):
        if found[f"factor {name}"]["energy"]:
            sites[name] = work.factored[name].right
            modules.append(_module_report(sites[name], found[f"factor {name}"]))
    changed = {name: found[f"compare {name}"] for name in work.compared if found[f"compare {name}"]["changed"]}
    residual = _carried(work, sites, changed) if work.options.save_residual else Residual()
    if not sites and not residual.tensors:
        raise MismatchError(f"{work.tuned.label} equals {work.base.label} in every weight that was to be factored.")
    steps: list[CopyStep] = []
    for name, keys in factor_keys(sites.values()).items():
        parts = run.staging.read_part(f"factor {name}")
        steps += [_copy(key, parts[part]) for key, part in zip(keys, "AB", strict=True)]
    steps += [_copy(f"base_model.model.{key}", tensor) for key, tensor in residual.tensors.items()]
    layout = single_file("adapter_model.safetensors", [step.output for step in steps])
    passed_over = sum(rank == 0 for rank in ranks.values())
    notes = work.notes
    if passed_over:
        notes += (f"{passed_over} modules changed and have no factors: the exact record alone is smaller.",)
    totals = _Totals.of([found[f"factor {name}"] for name in sites])
    report = ExtractReport(
        output=str(output),
        plan=summary,
        modules=tuple(modules),
        residual=_residual_reports(work, changed, residual),
        unchanged=len(work.factored) - len(sites) - passed_over,
        parameters=sum(math.prod(step.output.shape) for step in steps),
        nbytes=layout.nbytes,
        notes=(*notes, *_held_back(work.options, modules)),
        change=totals.change,
        energy_kept=totals.energy_kept,
        error=totals.error,
        resumed=run.resumed,
    )
    names = [site.module for site in find_sites(work.tuned).values()]
    base_name = work.options.base_name or work.base.provenance["source"]
    config = adapter_config({m.name: m.rank for m in modules}, sites, names, alpha, residual, work.tuned, base_name)
    files = {
        "adapter_config.json": config_bytes(config),
        "README.md": extraction_card(config, report).encode(errors="replace"),
    }
    return report, Plan(tuple(steps), layout, files, _tokenizer(work))


def _held_back(options: ExtractOptions, modules: Sequence[ModuleReport]) -> list[str]:
    """A note on modules that keep less than `energy` because of `max_rank`."""
    if options.energy is None or options.max_rank is None:
        return []
    count = sum(m.rank >= options.max_rank and m.energy_kept < options.energy for m in modules)
    what = "1 module" if count == 1 else f"{count} modules"
    return [f"--max-rank kept {what} below --energy {options.energy:g}."] if count else []


def _copy(key: str, tensor: StoredTensor) -> CopyStep:
    return CopyStep(TensorSpec(key, tensor.dtype, tensor.shape), tensor)


def _carried(work: _Work, sites: Mapping[str, Site], changed: Mapping[str, object]) -> Residual:
    """How the adapter is to hold what changed and has no factors."""
    parameters = {found.name: found.right for found in work.compared.values()}
    parameters |= {name: tensor for name, (tensor, _) in work.whole.items()}
    # A head that is tied to an embedding follows it only if PEFT loads the embedding into the base model itself.
    tied = {
        name
        for name, tensor in parameters.items()
        if name in changed and tied_embedding(work.tuned, name, tensor) is not None
    }
    grown = {name for name, (_, reason) in work.whole.items() if reason != "only in TUNED"}
    return carry_residual([*changed, *work.whole], parameters, {site.module for site in sites.values()}, tied | grown)


def _module_report(site: Site, found: Mapping[str, object]) -> ModuleReport:
    base, energy, error = (_number(found[key]) for key in ("base", "energy", "error"))
    shape = (site.out_features, site.in_features)
    return ModuleReport(
        name=site.name,
        part=site.part,
        shape=shape if len(site.matrices) == 1 else (len(site.matrices), *shape),
        rank=int(_number(found["rank"])),
        change=math.sqrt(energy / base) if base else None,
        energy_kept=1 - error / energy,
        error=math.sqrt(error / energy),
        excess=_number(found["excess"]),
    )


def _residual_reports(
    work: _Work, changed: Mapping[str, Mapping[str, object]], residual: Residual
) -> tuple[ResidualReport, ...]:
    reports = []
    for name, report in changed.items():
        base, energy = report.get("base"), report.get("energy")
        change = math.sqrt(_number(energy) / _number(base)) if energy is not None and base else None
        reports.append(_residual_report(work, name, work.compared[name].part, change, "changed", residual))
    for name, (_, reason) in work.whole.items():
        reports.append(_residual_report(work, name, "head", None, reason, residual))
    return tuple(reports)


def _residual_report(
    work: _Work, name: str, part: str, change: float | None, reason: str, residual: Residual
) -> ResidualReport:
    saved = work.options.save_residual and name not in residual.refused
    return ResidualReport(name, part, change, saved, residual.refused.get(name, reason))


@dataclass(frozen=True)
class _Totals:
    """Norms over all factored modules together; see `ExtractReport`."""

    change: float = 0.0
    energy_kept: float = 0.0
    error: float = 0.0

    @classmethod
    def of(cls, found: list[Mapping[str, object]]) -> _Totals:
        base, energy, error = (math.fsum(_number(one[key]) for one in found) for key in ("base", "energy", "error"))
        if not energy:
            return cls()
        return cls(math.sqrt(energy / base) if base else 0.0, 1 - error / energy, math.sqrt(error / energy))


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)


_TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "chat_template",
)


def _tokenizer(work: _Work) -> tuple[tuple[str, Source], ...]:
    """The tuned model's tokenizer, if its vocabulary is another than the base's: the adapter is no use without it."""
    if not any(reason == "another number of rows" for _, reason in work.whole.values()):
        return ()
    names = [name for name in work.tuned.carried if name.startswith(_TOKENIZER_FILES)]
    return tuple((name, work.tuned.folder.open(name)) for name in names)
