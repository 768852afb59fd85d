"""`extract BASE TUNED`: the difference of two checkpoints as a LoRA adapter.

What the adapter can carry is factored (`factor.FactorStep`); what it cannot (norms, biases, embeddings, heads, layers
outside `--targets`) is compared, reported as residual, and stored whole with `--save-residual`.
Source: LoRA (Hu et al. 2021), section 4.1 for dW = B A; the SVD gives the B A of a rank that is nearest to dW (Eckart
and Young).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.errors import OptionError
from surgery.operation import Run, RunOptions, check_paths, staged, summarise
from surgery.ops import best_rank
from surgery.ops.exact_extract import add_exact, check_exact, estimate_exact
from surgery.ops.extract_options import BEST, DEFAULT_RANK, ExtractOptions
from surgery.ops.extract_result import assemble
from surgery.ops.extract_work import Work, check_related, factor_plan, planned_adapter, prepare
from surgery.ops.factor import SpectrumStep
from surgery.ops.ranks import Spectrum, by_budget, by_energy, incomplete
from surgery.plan import Plan
from surgery.provenance import Input
from surgery.reports import ExtractReport

# Values of each spectrum that are read before ranks are chosen by energy or budget; doubled where they do not suffice.
_SPECTRUM_START = 64


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
    work = prepare(*_with_config(base, tuned), options)
    if not options.any_base:
        check_related(work)
    first = factor_plan(work, dict.fromkeys(work.factored, options.fixed_rank or DEFAULT_RANK))
    summary = summarise([first], output, run_options.settings)
    if run_options.dry_run:
        expected = estimate_exact(base, tuned) if options.exact else None
        return ExtractReport(
            str(output),
            summary,
            notes=work.notes,
            dry_run=True,
            planned=planned_adapter(work),
            estimated_record_bytes=expected,
        )
    with staged(output, first, ("extract", options), run_options) as run:
        ranks = _choose_ranks(work, run)
        found = run.execute(factor_plan(work, ranks), "factoring").reports()
        report, plan = assemble(work, ranks, found, run, summary, output)
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


def _choose_ranks(work: Work, run: Run) -> dict[str, int]:
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


def _choose_best(work: Work, run: Run) -> dict[str, int]:
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
