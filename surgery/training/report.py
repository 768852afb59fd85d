"""What `train` reports, and the card of what it wrote. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from surgery.card import LOAD_WITH_PEFT, table, with_section


@dataclass(frozen=True)
class DataReport:
    """What was trained or evaluated on.

    Attributes:
        source: a file's or folder's name, or an id.
        kind: of the examples: `text`, `completion`, `chat`, `label`, `image` or `tokens`.
        examples: that take part.
        rows: of a batch, that they make up: fewer under packing.
        tokens: of all of them; pictures count as one.
        predictions: that the loss is about.
        longer, truncated, skipped: how many examples were too long, were cut, and were left out.
        digest: BLAKE3-256 of the files.
    """

    source: str
    kind: str
    examples: int
    rows: int
    tokens: int
    predictions: int
    longer: int
    truncated: int
    skipped: int
    digest: str


@dataclass(frozen=True)
class TrainReport:
    """What `train` did.

    Attributes:
        output: the target, as given.
        task: what was learnt.
        method: what was trained.
        kind: what was written: `checkpoint` or `adapter`.
        parameters: of the model.
        trained: of those, the trained ones.
        steps: that were to be done.
        done: that were done; fewer where patience ran out.
        epochs: times the data were gone through.
        warmup: steps of the warm-up.
        precision: of the forward and backward passes.
        device: where it ran.
        processes: how many took part.
        tokens: that were read.
        tokens_per_second: over the time spent training.
        first_loss, last_loss: of the first and of the last step, nats a prediction.
        eval_loss: of the last evaluation.
        best_loss, best_step: of the evaluation with the least loss.
        written: the step whose weights were written.
        data: what was trained on.
        eval_data: what was evaluated on.
        dry_run: whether nothing was trained.
        resumed: steps taken over from an interrupted run.
        notes: what to know.
    """

    output: str
    task: str
    method: str
    kind: str
    parameters: int
    trained: int
    steps: int
    epochs: float
    warmup: int
    precision: str
    device: str
    processes: int
    data: DataReport
    eval_data: DataReport | None = None
    done: int = 0
    tokens: int = 0
    tokens_per_second: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    written: int = 0
    dry_run: bool = False
    resumed: int = 0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def numbers(self) -> dict[str, object]:
        """The report without what differs between two runs of the same work."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_RUN}


_OF_THE_RUN = {"output", "dry_run", "resumed", "tokens_per_second"}


def trained_card(readme: str, base: str, report: TrainReport, options: Mapping[str, object]) -> str:
    """The `README.md` of what was trained: the input's, with a section about the training.

    An adapter's tells how to load it, unless its method is one that PEFT does not have.
    """
    own = report.method.startswith("adapter-") or options["infix_tokens"]
    front: dict[str, str | list[str]] = {"base_model": base, "tags": ["checkpoint-surgery"]}
    if report.kind == "adapter" and not own:
        front |= {"library_name": "peft", "tags": ["lora"] * ("lora" in report.method) + ["checkpoint-surgery"]}
    rows = {
        "task": report.task,
        "method": f"{report.method}, {report.trained:,} of {report.parameters:,} parameters trained",
        "data": f"{report.data.source}: {report.data.examples:,} examples, {report.data.predictions:,} predictions",
        "steps": f"{report.done:,}, of {options['batch_size']} x {options['gradient_accumulation']} x "
        f"{report.processes} rows each",
        "learning rate": f"{options['learning_rate']:g}, {options['schedule']}, {report.warmup} steps of warm-up",
        "precision": report.precision,
        "loss of the first step and of the last": f"{report.first_loss:.4f}, {report.last_loss:.4f}",
    }
    if report.best_loss is not None and report.eval_data is not None:
        rows["loss on held-out examples"] = f"{report.best_loss:.4f} at step {report.best_step}"
    rows["weights"] = f"of step {report.written}"
    lines = ["## Training", "", f"Trained from `{base}` by checkpoint-surgery.", "", *table(rows), ""]
    lines += ["![loss](training/loss.png)", "", "Every step is in `training/log.jsonl`."]
    if report.kind == "adapter" and not own:
        lines += ["", *LOAD_WITH_PEFT]
    return with_section(readme, "\n".join(lines), front)
