"""`lint PATH --for CONSUMER,...`: what each consumer would refuse, or take and silently get wrong.

A rule is a function that looks at headers and configs and yields one sentence for each fault, with what was found and
what is expected; beside it stand the consumer, how bad it is, the source of the fact and the command that mends it.
Rules on adapters are in `lint_adapters`, `lint_servers` and `lint_mlx`, those on checkpoints in `lint_checkpoints` and
`lint_mixtures`. An adapter is no better than its base: what a consumer refuses or gets wrong there counts for both.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from surgery.checkpoint import Checkpoint, open_checkpoint, read_checkpoint
from surgery.errors import OptionError
from surgery.folder import Folder
from surgery.formats.reading import format_of

CONSUMERS = ("peft", "vllm", "llama.cpp", "mlx", "sglang", "lorax")
DEFAULT_CONSUMERS = CONSUMERS[:3]

REFUSED = "refused"
SILENT = "silently wrong"
WARNING = "warning"
CLEAN = "clean"
_ORDER = (CLEAN, WARNING, SILENT, REFUSED)

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One fact about one consumer.

    Attributes:
        id: consumer and a word: `llama.cpp/rslora`.
        severity: `refused`, `silently wrong` or `warning`.
        source: the project, its version, and the file or experiment that the fact comes from.
        mend: the command that mends it, with `{path}` for the adapter or checkpoint; empty where there is none.
        check: yields a sentence for each fault.
    """

    id: str
    severity: str
    source: str
    mend: str
    check: Callable[[Subject], Iterable[str]]

    @property
    def consumer(self) -> str:
        return self.id.partition("/")[0]


class Rules(Generic[Subject]):
    """A collection of rules, each added by decorating its function; a function may serve several."""

    def __init__(self) -> None:
        self.all: list[Rule[Subject]] = []

    def __call__(
        self,
        id: str,  # noqa: A002 - the field of Rule
        severity: str,
        source: str,
        mend: str = "",
    ) -> Callable[[Callable[[Subject], Iterable[str]]], Callable[[Subject], Iterable[str]]]:
        """Add the decorated function as a rule."""

        def add(check: Callable[[Subject], Iterable[str]]) -> Callable[[Subject], Iterable[str]]:
            self.all.append(Rule(id, severity, source, mend, check))
            return check

        return add


@dataclass(frozen=True)
class Finding:
    """A fault that a rule found."""

    rule: str
    consumer: str
    severity: str
    message: str
    source: str
    mend: str


@dataclass(frozen=True)
class LintReport:
    """What `lint` found.

    Attributes:
        label: the adapter or checkpoint, as given.
        subject: `adapter` or `checkpoint`.
        format: of an adapter: `peft`, `kohya`, `diffusers` or `mlx`; of a checkpoint its model type.
        verdicts: consumer to the worst of its findings, or `clean`.
        rules: how many rules were tried.
    """

    label: str
    subject: str
    format: str
    verdicts: dict[str, str]
    findings: tuple[Finding, ...]
    rules: int
    kind: str = field(default="lint", kw_only=True)

    @property
    def passed(self) -> bool:
        """Whether no consumer would refuse it or get it silently wrong."""
        return not {REFUSED, SILENT} & set(self.verdicts.values())

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}


def lint(
    place: Folder | Path, consumers: Sequence[str] = DEFAULT_CONSUMERS, base: Checkpoint | None = None
) -> LintReport:
    """Try every rule of the consumers on the adapter or checkpoint at `place`; from headers and configs alone.

    Args:
        place: a folder, or a file.
        consumers: which, of `CONSUMERS`.
        base: the model of an adapter, for the rules that depend on it.
    """
    from surgery.ops import lint_adapters, lint_mlx, lint_servers
    from surgery.ops.lint_subject import AdapterFiles

    check_consumers(consumers)
    if is_adapter_place(place):
        kind, files = format_of(place)
        adapter = AdapterFiles(kind, files, base)
        rules = _tried([*lint_adapters.rule.all, *lint_servers.rule.all, *lint_mlx.rule.all], consumers)
        findings = [finding for one in rules for finding in _findings(one, adapter, files.label)]
        if base is not None and base.model_type:
            findings += _of_base(base, consumers)
        return _report(files.label, "adapter", kind, findings, len(rules), consumers)
    return lint_checkpoint(open_checkpoint(place) if isinstance(place, Path) else read_checkpoint(place), consumers)


def lint_checkpoint(checkpoint: Checkpoint, consumers: Sequence[str]) -> LintReport:
    """Try the rules on a checkpoint that is open, or only planned."""
    from surgery.ops import lint_checkpoints, lint_mixtures

    rules = _tried([*lint_checkpoints.rule.all, *lint_mixtures.rule.all], consumers)
    findings = [finding for one in rules for finding in _findings(one, checkpoint, checkpoint.label)]
    return _report(checkpoint.label, "checkpoint", checkpoint.model_type, findings, len(rules), consumers)


def _tried(rules: Sequence[Rule[Subject]], consumers: Sequence[str]) -> list[Rule[Subject]]:
    return [rule for rule in rules if rule.consumer in consumers]


def _of_base(base: Checkpoint, consumers: Sequence[str]) -> list[Finding]:
    """What spoils the base of an adapter. That it has no tokenizer does not: the adapter needs none."""
    return [
        replace(finding, message=f"its base, {base.label}: {finding.message}")
        for finding in lint_checkpoint(base, consumers).findings
        if finding.severity != WARNING and not finding.rule.endswith("tokenizer")
    ]


def check_consumers(consumers: Sequence[str]) -> None:
    """Refuse a name that is none of `CONSUMERS`."""
    unknown = [name for name in consumers if name not in CONSUMERS]
    if unknown or not consumers:
        found = repr(unknown[0]) if unknown else "empty"
        raise OptionError(f"--for is {found}, expected some of {', '.join(CONSUMERS)}.")


def is_adapter_place(place: Folder | Path) -> bool:
    """Whether a folder or file holds an adapter of any format, and no checkpoint."""
    if isinstance(place, Path):
        return any(".lora_" in name or ".lora." in name or "_lora." in name for name in open_checkpoint(place).tensors)
    names = set(place.names())
    whole = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    if names & whole:
        return False
    return "adapter_config.json" in names or "config.json" not in names


def _report(
    label: str, subject: str, kind: str, findings: Sequence[Finding], rules: int, consumers: Sequence[str]
) -> LintReport:
    # A consumer that refuses the whole folder has nothing to say about its parts.
    closed = {finding.consumer for finding in findings if finding.rule.endswith("/format")}
    kept = [one for one in findings if one.consumer not in closed or one.rule.endswith("/format")]
    verdicts = {
        consumer: max((one.severity for one in kept if one.consumer == consumer), key=_ORDER.index, default=CLEAN)
        for consumer in consumers
    }
    return LintReport(label, subject, kind, verdicts, tuple(kept), rules)


def _findings(rule: Rule[Subject], item: Subject, label: str) -> Iterator[Finding]:
    mend = rule.mend.replace("{path}", shlex.quote(label))
    for message in rule.check(item):
        yield Finding(rule.id, rule.consumer, rule.severity, message, rule.source, mend)


def some(names: Iterable[str], most: int = 3) -> str:
    """A few names for a sentence, and how many more there are."""
    found = list(names)
    shown = ", ".join(repr(name) for name in found[:most])
    return shown if len(found) <= most else f"{shown} and {len(found) - most} more"
