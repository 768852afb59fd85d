"""`upcycle CHECKPOINT --experts E`: a dense checkpoint becomes a mixture of experts (arXiv:2212.05055, section 2).

Everything outside the chosen MLPs is copied, each chosen MLP is copied E times, and a router is drawn afresh. Copies
move as bytes; only routers, and experts that start out different, are computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.operation import RunOptions, check_paths, staged, summarise
from surgery.pairing import refuse_quantised
from surgery.plan import Plan
from surgery.provenance import Input
from surgery.upcycling.advice import notes_on, notes_on_size
from surgery.upcycling.choice import choose_target, mixtures, task_of
from surgery.upcycling.consumers import choices, planned_checkpoint, verdicts_on, who_loads_it
from surgery.upcycling.dense_configs import class_without_a_name
from surgery.upcycling.dense_defaults import with_defaults
from surgery.upcycling.enlarge import Enlarging, enlarged_config, plan_enlarging, prepare_enlarging, report_on
from surgery.upcycling.memory import memory_needed, memory_of
from surgery.upcycling.mixture import Mixture
from surgery.upcycling.mlps import Mlp, find_mlps
from surgery.upcycling.options import COPY, LORA, UpcycleOptions
from surgery.upcycling.origins import Sources, check_sources, origin_of
from surgery.upcycling.planning import Upcycling, new_config, plan_upcycling
from surgery.upcycling.preservation import (
    Verification,
    arrange,
    measured,
    relative_bound,
)
from surgery.upcycling.prompts import check_model, read_prompts, router_rows
from surgery.upcycling.report import StackReport, UpcycleReport
from surgery.upcycling.routed_lora import factor_parameters, where_base_is
from surgery.upcycling.seq2seq import SWITCH
from surgery.upcycling.settings import check_settings
from surgery.upcycling.sparse import format_of


def upcycle(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str] | None,
    options: UpcycleOptions,
    run_options: RunOptions,
    verify: bool | None = None,
    text: str | os.PathLike[str] | None = None,
    sources: Sources = (),
) -> UpcycleReport:
    """Write `checkpoint` as a mixture of experts at `output`; by default beside it, as `<name>-moe-<experts>x`.

    `verify` and `text` say whether and on what it is measured, see `preservation.arrange`; `sources` are the
    checkpoints or adapters that `options.init` names, in its order.
    """
    refuse_quantised(checkpoint)
    check_settings(checkpoint)
    if (mixture := format_of(checkpoint)) is not None:
        return _enlarge(prepare_enlarging(checkpoint, mixture, options), output, run_options, verify, text)
    work = prepare(checkpoint, options, sources)
    target = (
        Path(output)
        if output is not None
        else default_output(checkpoint, next(iter(work.mixtures.values())).experts, options.kind)
    )
    if options.kind == LORA:
        work = replace(work, base=where_base_is(checkpoint, target))
    plan = plan_upcycling(work)
    inputs = [Input("dense", checkpoint), *work.origin.inputs]
    check_paths(target, inputs, run_options.overwrite)
    report = _report(work, plan, target, run_options)
    bound = relative_bound(work) if report.preserved else None
    needed_bytes = memory_needed(work, report.parameters)
    name = class_without_a_name(checkpoint, work.target, report.architecture)
    verification = arrange(checkpoint, needed_bytes, bound, verify, text, name)
    needed = verification.nbytes if isinstance(verification, Verification) else 0
    report = replace(report, plan=replace(report.plan, peak_memory_bytes=max(needed, report.plan.peak_memory_bytes)))
    if run_options.dry_run:
        notes = (*report.notes, *([verification] if isinstance(verification, str) and verification else []))
        return replace(report, dry_run=True, notes=notes)
    if work.prompts:
        rows, said = router_rows(checkpoint, work.chosen, work.prompts)
        plan = plan_upcycling(replace(work, rows=rows))
        report = replace(report, notes=(*report.notes, said))
    with staged(target, plan, ("upcycle", options), run_options) as run:
        found = run.execute(plan, "upcycling").reports()
        work.origin.check(run.hashes)
        report = replace(report, resumed=run.resumed, survived=_survived(found))
        report, notes = measured(report, verification, run.staging.files, run_options.settings.progress)
        run.finish("upcycle", without_paths(work), inputs, report.numbers())
    return replace(report, notes=(*report.notes, *notes))


def _enlarge(
    work: Enlarging,
    output: str | os.PathLike[str] | None,
    run_options: RunOptions,
    verify: bool | None,
    text: str | os.PathLike[str] | None,
) -> UpcycleReport:
    """Write a mixture with more of its experts, and measure how far it is from the smaller one.

    Nothing bounds the difference: where the scores of two experts are equal to rounding, either may be chosen.
    """
    plan = plan_enlarging(work)
    inputs = [Input("mixture", work.checkpoint)]
    target = Path(output) if output is not None else default_output(work.checkpoint, work.factor * work.experts)
    check_paths(target, inputs, run_options.overwrite)
    report = report_on(work, plan, target, run_options)
    planned = planned_checkpoint(work.checkpoint, enlarged_config(work), plan)
    report = replace(report, consumers=verdicts_on(planned))
    needed_bytes = memory_of(report.parameters, work.checkpoint)
    name = work.target.classes("", task_of(work.checkpoint))
    verification = arrange(work.checkpoint, needed_bytes, None, verify, text, name)
    needed = verification.nbytes if isinstance(verification, Verification) else 0
    report = replace(report, plan=replace(report.plan, peak_memory_bytes=max(needed, report.plan.peak_memory_bytes)))
    if run_options.dry_run:
        notes = (*report.notes, *([verification] if isinstance(verification, str) and verification else []))
        return replace(report, dry_run=True, notes=notes)
    with staged(target, plan, ("enlarge", work.options), run_options) as run:
        run.execute(plan, "enlarging")
        report = replace(report, resumed=run.resumed)
        report, notes = measured(report, verification, run.staging.files, run_options.settings.progress)
        run.finish("upcycle", work.options, inputs, report.numbers())
    return replace(report, notes=(*report.notes, *notes))


def without_paths(work: Upcycling) -> UpcycleOptions:
    """The options as the output has them on record: sources by their names, as its other inputs are."""
    options, init = work.options, work.options.expert_init
    if init.paths:
        names = (item.checkpoint.provenance.get("source", item.checkpoint.label) for item in work.origin.inputs)
        options = replace(options, init=f"{init.kind}:{','.join(names)}")
    if options.start_of_router.path:
        options = replace(options, router_init=f"hidden:{Path(options.start_of_router.path).name}")
    return options


def _survived(found: Mapping[str, Mapping[str, object]]) -> float | None:
    """What rounding left of the adapters' changes, over all experts together; None where there are none."""
    counts = [count for report in found.values() for count in (report, *report.values()) if isinstance(count, Mapping)]
    energies = [count["energy"] for count in counts if isinstance(count.get("energy"), float)]
    losses = [count["lost"] for count in counts if isinstance(count.get("lost"), float)]
    return 1 - math.sqrt(sum(losses) / sum(energies)) if sum(energies) else None


def prepare(checkpoint: Checkpoint, options: UpcycleOptions, sources: Sources = ()) -> Upcycling:
    """Decide everything that headers and config allow to decide; raises all that there is to refuse."""
    options = replace(options, target={"switch": SWITCH}.get(options.target, options.target))
    mlps = find_mlps(checkpoint)
    chosen = mixtures(mlps, options)
    config = with_defaults(checkpoint.config, checkpoint.model_type)
    target = choose_target(checkpoint, config, chosen, options)
    check_sources(options, sources)
    replaced = [mlp for mlp in mlps if mlp.stack in chosen and mlp.number in chosen[mlp.stack].layers]
    origin = origin_of(checkpoint, replaced, options, sources)
    prompts: tuple[tuple[str, ...], ...] = ()
    if (path := options.start_of_router.path) != "":
        check_model(checkpoint)
        mixture = next(iter(chosen.values()))
        prompts = read_prompts(path, mixture.experts // mixture.groups)
    return Upcycling(checkpoint, config, mlps, chosen, target, options, origin, prompts)


def default_output(checkpoint: Checkpoint, experts: int, kind: str = COPY) -> Path:
    """`<name>-moe-<experts>x` beside a local checkpoint, and in the working folder for one on a Hub.

    With routed LoRA experts `<name>-molora-<experts>x`.
    """
    ending = f"{'molora' if kind == LORA else 'moe'}-{experts}x"
    if checkpoint.path is None or "revision" in checkpoint.provenance:  # an id, wherever its files lie
        return Path(f"{Path(checkpoint.label.partition('@')[0]).name}-{ending}")
    place = checkpoint.path.resolve()
    stem = place.name if place.is_dir() else place.stem
    return place.parent / f"{stem}-{ending}"


def _report(work: Upcycling, plan: Plan, target: Path, run_options: RunOptions) -> UpcycleReport:
    specs = [spec for step in plan.steps for spec in step.writes]
    stored = sum(math.prod(spec.shape) for spec in specs)
    parameters = stored + (work.checkpoint.parameters if work.options.kind == LORA else 0)
    architectures = new_config(work)["architectures"]
    assert isinstance(architectures, list)
    other_layers = choices(work)
    return UpcycleReport(
        output=str(target),
        plan=summarise([plan], target, run_options.settings),
        source=work.checkpoint.model_type,
        target=str(new_config(work)["model_type"]),
        architecture=str(architectures[0]),
        stacks=tuple(
            StackReport(
                stack=stack,
                layers=mixture.layers,
                depth=mixture.depth,
                experts=mixture.experts,
                top_k=mixture.top_k,
                capacity=mixture.capacity,
                normalized=mixture.normalized,
                group=None if mixture.capacity is None else mixture.group,
                rank=mixture.rank,
                alpha=mixture.alpha if mixture.rank is not None else None,
            )
            for stack, mixture in work.mixtures.items()
        ),
        kind=work.options.kind,
        init=without_paths(work).init,
        rest=_rest(work.options),
        left_out=work.origin.left_out,
        router_init=without_paths(work).router_init,
        parameters=parameters,
        active=parameters - sum(_idle(_expert_parameters(mlp, mixture), mixture) for mlp, mixture in work.chosen),
        stored_parameters=stored,
        dense_parameters=work.checkpoint.parameters,
        nbytes=plan.layout.nbytes,
        dense_bytes=work.checkpoint.nbytes,
        preserved=is_preserved(work),
        consumers=who_loads_it(work, plan),
        choices=other_layers,
        notes=(
            *notes_on(work),
            *work.origin.notes,
            *notes_on_size(plan.layout.nbytes, work.checkpoint.nbytes, other_layers),
        ),
    )


def _rest(options: UpcycleOptions) -> str | None:
    """What becomes of everything but the experts, where there are several models."""
    return options.rest or {"from": "average", "adapters": "base"}.get(options.expert_init.kind)


def _expert_parameters(mlp: Mlp, mixture: Mixture) -> int:
    """Parameters of one expert: of an MLP, of a small one, which has the bias of the output whole, or of an update."""
    if mixture.rank is not None:
        return factor_parameters(mlp, mixture.rank)
    split = sum(tensor.numel for part, tensor in mlp.parts.items() if mlp.inner_axis(part) is not None)
    return split // mixture.groups + mlp.parameters - split


def _idle(parameters: int, mixture: Mixture) -> int:
    """Parameters of one layer's experts that a token does not meet, from those of one expert."""
    active = mixture.top_k if mixture.top_k is not None else mixture.capacity
    assert active is not None
    return round(max(0.0, mixture.experts - active) * parameters)


def is_preserved(work: Upcycling) -> bool:
    """Whether the mixture is the dense function by construction: identical experts under weights that sum to one.

    Under expert choice a token that no expert takes gets nothing, so it holds only where every expert takes all.
    """
    full = all(m.capacity is None or m.capacity >= m.experts for m in work.mixtures.values())
    normalized = all(m.normalized for m in work.mixtures.values())
    return work.options.expert_init.identical and normalized and full and work.target.preserving
