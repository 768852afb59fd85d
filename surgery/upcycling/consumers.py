"""Which programs load what `upcycle` writes, by the rules of `lint`, and which option would change that.

All of it is known before a byte is written: the rules look at names, shapes and settings, and the plan has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import SurgeryError
from surgery.folder import WeightFiles, WithoutRecords
from surgery.ops.lint import REFUSED, SILENT, WARNING, Finding, lint_checkpoint
from surgery.ops.running import TOKENIZER_FILES
from surgery.plan import CopyStep, Plan, Step
from surgery.source import BytesSource, Source, read_bytes
from surgery.upcycling.choice import choose_target, mixtures, targets_of
from surgery.upcycling.enlarge import RepeatStep
from surgery.upcycling.mixture import Config
from surgery.upcycling.options import COPY, EXPERT_CHOICE, LORA, UpcycleOptions
from surgery.upcycling.planning import Upcycling, new_config, plan_upcycling
from surgery.upcycling.report import ChoiceReport, ConsumerReport
from surgery.upcycling.routers import ZerosStep

LOADS = "loads"
# What the table calls a program, and what `lint` does: PEFT's rules on checkpoints are those of transformers.
CONSUMERS = {"transformers": "peft", "vLLM": "vllm", "llama.cpp": "llama.cpp", "MLX": "mlx"}
_ORDER = (LOADS, WARNING, SILENT, REFUSED)
# Tensors of so many bytes a rule may look into.
_SMALL = 1 << 16
# From here on a program does not have the model.
_BAD = (SILENT, REFUSED)
# What goes when expert choice does.
_OF_EXPERT_CHOICE = {"capacity": None, "group": "sequence", "allow_future": False}


@dataclass(frozen=True)
class _PlannedFolder(WithoutRecords):
    """An output folder before it is there."""

    label: str
    small: Mapping[str, bytes]
    carried: Mapping[str, Source]
    weights: tuple[str, ...]

    @property
    def provenance(self) -> Mapping[str, str]:
        return {"source": self.label}

    def names(self) -> Sequence[str]:
        return sorted({*self.small, *self.carried, *self.weights})

    def open(self, name: str) -> Source:
        return self.carried[name] if name in self.carried else BytesSource(name, self.small.get(name, b""))


def planned_checkpoint(checkpoint: Checkpoint, config: Config, plan: Plan) -> Checkpoint:
    """The output as a checkpoint, from its plan.

    Tensors that are copied have their bytes; small ones of zeros, or that repeat zeros, are zeros, as biases that
    correct a router are at the start, and other small ones are not, which is all that a rule looks for in them.

    Args:
        checkpoint: that the output is made of.
        config: of the output.
        plan: of the output.
    """
    tensors: dict[str, StoredTensor] = {}
    for step in plan.steps:
        for spec in step.writes:
            if isinstance(step, CopyStep):
                tensors[spec.name] = replace(step.source, name=spec.name, is_slice=False)
            else:
                byte = b"\0" if _is_zero(step) else b"\1"
                data = BytesSource(spec.name, byte * (spec.nbytes if spec.nbytes <= _SMALL else 0))
                tensors[spec.name] = StoredTensor(spec.name, spec.dtype, spec.shape, data, 0)
    files = tuple(file.name for file in plan.layout.files)
    folder = _PlannedFolder(checkpoint.label, plan.files, dict(plan.carried), files)
    weights = WeightFiles(files, None, "model", False)
    return Checkpoint(checkpoint.label, folder, tensors, (), weights, dict(config))


def _is_zero(step: Step) -> bool:
    """Whether a step writes nothing but zeros, as far as that is soon found out."""
    if isinstance(step, RepeatStep) and step.source.nbytes <= _SMALL:
        return not any(read_bytes(step.source.source, step.source.offset, step.source.nbytes))
    return isinstance(step, ZerosStep)


def verdicts(work: Upcycling, plan: Plan | None = None) -> tuple[ConsumerReport, ...]:
    """What each program makes of the output."""
    return verdicts_on(planned_checkpoint(work.checkpoint, new_config(work), plan or plan_upcycling(work)))


def verdicts_on(planned: Checkpoint) -> tuple[ConsumerReport, ...]:
    """What each program makes of a mixture; that the folder has no tokenizer is no more than a warning."""
    found = lint_checkpoint(planned, tuple(CONSUMERS.values()))
    has_tokenizer = bool(set(TOKENIZER_FILES) & set(planned.folder.names()))
    reports = []
    for name, known_as in CONSUMERS.items():
        severities = {f: _severity(f, has_tokenizer) for f in found.findings if f.consumer == known_as}
        worst = max(severities.values(), key=_ORDER.index, default=LOADS)
        # Beside what makes a program refuse it, what it would warn of is no matter.
        reasons = tuple(finding.message for finding, severity in severities.items() if severity == worst)
        reports.append(ConsumerReport(name, worst, reasons))
    return tuple(reports)


def _severity(finding: Finding, has_tokenizer: bool) -> str:
    return WARNING if finding.rule.endswith("tokenizer") and not has_tokenizer else finding.severity


def who_loads_it(work: Upcycling, plan: Plan) -> tuple[ConsumerReport, ...]:
    """The verdict of each program and, where it has no use for the output, the option that would change that."""
    found = verdicts(work, plan)
    open_ones = {report.consumer for report in found if report.verdict in _BAD}
    remedies: dict[str, str] = {}
    for words, other in _others(work):
        if not open_ones - remedies.keys():
            break
        for report in verdicts(other):
            if report.consumer in open_ones and report.verdict not in _BAD:
                remedies.setdefault(report.consumer, f"{words} ({new_config(other)['model_type']})")
    return tuple(replace(report, option=remedies.get(report.consumer, "")) for report in found)


def _others(work: Upcycling) -> Iterator[tuple[str, Upcycling]]:
    """Other things that could be made of the same model, the nearest first, with what to type for each."""
    options = work.options
    tried = {_identity(work)}
    for changes in _changes(work):
        try:
            other = rearranged(work, replace(options, **changes))
        except SurgeryError:
            continue
        if _identity(other) not in tried:
            tried.add(_identity(other))
            yield _words(changes), other


def _identity(work: Upcycling) -> object:
    return work.target.name, tuple(work.mixtures.items())


def rearranged(work: Upcycling, options: UpcycleOptions) -> Upcycling:
    """The same model under other options. Raises what they are refused with."""
    chosen = mixtures(work.mlps, options)
    target = choose_target(work.checkpoint, work.config, chosen, options)
    return replace(work, mixtures=chosen, target=target, options=options)


def _changes(work: Upcycling) -> Iterator[dict[str, Any]]:
    """One change after another, then two at once, then all that a plain mixture has not."""
    options = work.options
    (first, *_) = work.mixtures.values()
    last = dict.fromkeys((len(first.layers), max(1, first.depth // 2)))
    layers: list[dict[str, Any]] = [{"layers": text} for text in ("all", *(f"last:{count}" for count in last))]
    plain: dict[str, Any] = {}
    if EXPERT_CHOICE in options.routers.values():
        plain |= {"router": "top-k", **_OF_EXPERT_CHOICE}
    if options.kind == LORA:
        plain |= {"kind": COPY, "rank": None, "alpha": None}
    if options.combine == "raw":
        plain["combine"] = "normalized"
    targets: list[dict[str, Any]] = [
        {"target": target.name} for target in targets_of(work.checkpoint.model_type) if target.automatic
    ]
    automatic: list[dict[str, Any]] = [] if options.target == "auto" else [{"target": "auto"}]
    if len(work.mixtures) == 1 and not any("=" in text for text in (options.layers, options.router)):
        yield from ([plain] if plain else [])
        for base in (plain, {}) if plain else ({},):
            yield from ({**base, **change} for change in (*automatic, *targets, *layers))
            yield from ({**base, **one, **other} for one in (*automatic, *targets) for other in layers)


def _words(changes: Mapping[str, object]) -> str:
    """What to type for some changes of options."""
    shown = {name: value for name, value in changes.items() if value is not None and name not in _OF_EXPERT_CHOICE}
    return " ".join(f"--{name} {value}" for name, value in shown.items())


def choices(work: Upcycling) -> tuple[ChoiceReport, ...]:
    """What all layers and the last half, which is the paper's choice, would give beside what was asked for.

    Nothing for routed LoRA experts, about which the paper says nothing.
    """
    if len(work.mixtures) != 1 or "=" in work.options.layers or work.options.kind == LORA:
        return ()
    found: dict[tuple[int, ...], ChoiceReport] = {}
    for layers in (work.options.layers, "last:half", "all"):
        try:
            other = rearranged(work, replace(work.options, layers=layers))
        except SurgeryError:
            continue
        (mixture,) = other.mixtures.values()
        if mixture.layers not in found:
            found[mixture.layers] = _choice(other, layers)
    return tuple(found.values()) if len(found) > 1 else ()


def _choice(work: Upcycling, layers: str) -> ChoiceReport:
    plan = plan_upcycling(work)
    (mixture,) = work.mixtures.values()
    return ChoiceReport(
        layers=layers,
        sparse=len(mixture.layers),
        target=str(new_config(work)["model_type"]),
        nbytes=plan.layout.nbytes,
        verdicts={report.consumer: report.verdict for report in verdicts(work, plan)},
    )
