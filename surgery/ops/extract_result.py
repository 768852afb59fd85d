"""What `extract` makes of the factors it found: the report, the config, and the plan of the adapter's one file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.card import extraction_card
from surgery.checkpoint import StoredTensor
from surgery.errors import MismatchError
from surgery.layout import TensorSpec, single_file
from surgery.operation import PlanSummary, Run, config_bytes
from surgery.ops.extract_options import ExtractOptions
from surgery.ops.extract_work import Work
from surgery.pairing import tied_embedding
from surgery.peft_format import Residual, adapter_config, carry_residual, factor_keys
from surgery.plan import CopyStep, Plan
from surgery.reports import ExtractReport, ModuleReport, ResidualReport
from surgery.sites import Site, find_sites
from surgery.source import Source


def assemble(
    work: Work,
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


def _carried(work: Work, sites: Mapping[str, Site], changed: Mapping[str, object]) -> Residual:
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
    work: Work, changed: Mapping[str, Mapping[str, object]], residual: Residual
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
    work: Work, name: str, part: str, change: float | None, reason: str, residual: Residual
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


def _tokenizer(work: Work) -> tuple[tuple[str, Source], ...]:
    """The tuned model's tokenizer, if its vocabulary is another than the base's: the adapter is no use without it."""
    if not any(reason == "another number of rows" for _, reason in work.whole.values()):
        return ()
    names = [name for name in work.tuned.carried if name.startswith(_TOKENIZER_FILES)]
    return tuple((name, work.tuned.folder.open(name)) for name in names)
