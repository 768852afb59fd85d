"""`train CHECKPOINT --data F -o OUT`: everything around the loop, from the checkpoint on disk to the one that appears.

Until a run is done all of it is in the staging folder beside the target: `state/` (see `state`), then `files/`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import MissingExtraError
from surgery.hashing import HashBook
from surgery.operation import check_paths
from surgery.provenance import FILE_NAME, describe_input, describe_tensor, document, hash_files
from surgery.training import plots, state, zero
from surgery.training.effects import without_effect
from surgery.training.examples import Examples
from surgery.training.loop import Loop
from surgery.training.machine import accelerated, quiet_transformers
from surgery.training.options import TrainOptions
from surgery.training.rates import warmup_steps
from surgery.training.reading import source_name
from surgery.training.report import DataReport, TrainReport, trained_card
from surgery.training.starting import Start, adapter_files
from surgery.training.subject import Subject, make_subject
from surgery.training.work import Silent, TrainProgress, Work, schedule_of
from surgery.writer import Staging, staging_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainSettings:
    """How to run; nothing here is part of what comes out, but that devices differ in the last bits.

    Attributes:
        overwrite: replace an existing output.
        dry_run: look at data and model, train nothing.
        hash: hash every tensor for `surgery.json`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`; what `accelerate launch` says comes first.
        trackers: besides the log, those of accelerate by name.
        progress: told about each step.
    """

    overwrite: bool = False
    dry_run: bool = False
    hash: bool = True
    device: str = "auto"
    trackers: tuple[str, ...] = ()
    progress: TrainProgress = field(default_factory=Silent)


def train(start: Start, output: str | os.PathLike[str], options: TrainOptions, settings: TrainSettings) -> TrainReport:
    """Train and write the result to `output`. Raises `KeyboardInterrupt` when interrupted, state saved."""
    target = Path(output)
    check_paths(target, start.inputs, settings.overwrite)
    with (
        accelerated(options, settings.device, settings.trackers) as accelerator,
        quiet_transformers(),
        state.same_threads(_state_folder(target)),
    ):
        subject = make_subject(start, options, accelerator)
        if settings.dry_run:
            return _report(subject, options, accelerator, target, dry_run=True)
        with _staged(target, accelerator) as staging:
            return _train(subject, start, staging, target, options, settings, accelerator)


# The run --------------------------------------------------------------------------------------------------------------


def _train(
    subject: Subject,
    start: Start,
    staging: Staging | None,
    target: Path,
    options: TrainOptions,
    settings: TrainSettings,
    accelerator: Any,
) -> TrainReport:
    from accelerate.utils import broadcast_object_list, set_seed

    root = _state_folder(target)
    resume = [False]
    if staging is not None:
        resume = [state.check_same(root, _identity(subject, start, options, accelerator), target)]
    (resume_all,) = broadcast_object_list(resume)
    if settings.trackers:
        values = {name: value for name, value in asdict(options).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("surgery", config=values)
    work = Work(
        subject.task, subject.prepared, subject.examples, subject.held_out, subject.batch, subject.steps, root, options,
        settings.progress,
    )  # fmt: skip
    # Loading has drawn, and each process is to drop other activations.
    set_seed(options.seed, device_specific=accelerator.num_processes > 1)
    loop = Loop(work, accelerator)
    position = loop.run(bool(resume_all))
    written, weights = position.step, loop.weights()
    if options.keep == "best" and position.best_loss is not None:
        written = position.best_step
        if staging is not None and weights is None:  # the first process writes
            state.put_weights(subject.prepared.model, state.load_best(root))
    report = replace(
        _report(subject, options, accelerator, target),
        done=position.step,
        tokens=position.tokens,
        tokens_per_second=round(position.tokens / position.seconds, 1) if position.seconds else None,
        first_loss=position.first_loss,
        last_loss=position.last_loss,
        eval_loss=position.eval_loss,
        best_loss=position.best_loss,
        best_step=position.best_step if position.best_loss is not None else None,
        written=written,
        resumed=loop.resumed,
    )
    if staging is not None:
        _finish(subject, start, staging, root, options, settings, report, weights)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def _state_folder(target: Path) -> Path:
    return staging_folder(target) / "state"


def _identity(subject: Subject, start: Start, options: TrainOptions, accelerator: Any) -> dict[str, object]:
    """What an interrupted run must have in common with the one that goes on: option by option, to name what differs."""
    settings: dict[str, object] = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items()}
    return settings | {
        "CHECKPOINT": start.checkpoint.label,
        "the checkpoint's files": _identities(start.checkpoint),
        "the adapter": None if start.files is None else start.files.label,
        "the adapter's files": None if start.files is None else _identities(start.files),
        "the data": subject.examples.rows.digest,
        "the held-out data": subject.held_out.rows.digest if subject.held_out is not None else None,
        "the number of processes": accelerator.num_processes,
        "sharding": "fsdp2" if accelerator.is_fsdp2 else zero.asked(accelerator),
        "the device": accelerator.device.type,
    }


def _identities(files: Checkpoint) -> dict[str, object]:
    """What tells a file from one that has been written since, by name."""
    sources = {t.source.name: t.source.identity for t in files.tensors.values()}
    return {name: identity and identity[1:] for name, identity in sources.items()}


def _finish(
    subject: Subject,
    start: Start,
    staging: Staging,
    root: Path,
    options: TrainOptions,
    settings: TrainSettings,
    report: TrainReport,
    weights: Mapping[str, torch.Tensor] | None,
) -> None:
    """Write weights, tokenizer, log, pictures, card and provenance; then the output appears."""
    checkpoint, files = subject.checkpoint, staging.files
    shutil.rmtree(files, ignore_errors=True)
    (files / "training").mkdir(parents=True)
    with state.full_disk(root):
        subject.prepared.save(files, _save_dtype(checkpoint, options), weights)
        if subject.tokenizer is not None and (subject.grown or options.tokenizer or options.chat_template):
            subject.tokenizer.save_pretrained(files)
        shutil.copyfile(root / "log.jsonl", files / "training" / "log.jsonl")
        _draw(files / "training")
    source = checkpoint if report.kind == "checkpoint" else start.files
    if source is not None:
        for name in source.carried:
            if not (files / name).exists():
                staging.carry(name, source.folder.open(name))
    readme = (files / "README.md").read_text(encoding="utf-8") if (files / "README.md").is_file() else ""
    recorded = asdict(options) | {
        "data": source_name(options.data),
        "eval_data": None if options.eval_data is None else source_name(options.eval_data),
        "learning_rate": options.rate,
    }
    base = checkpoint.provenance["source"]
    staging.write_file("README.md", trained_card(readme, base, report, recorded).encode())
    hashes = HashBook(settings.hash)
    made = open_checkpoint(files) if report.kind == "checkpoint" else adapter_files(files)
    outputs = {
        name: describe_tensor(tensor, hashes.require(tensor) if hashes.enabled else None)
        for name, tensor in made.tensors.items()
    }
    content = document(
        "train",
        recorded,
        [*(describe_input(item, hashes) for item in start.inputs), _data_input(report.data, "data")]
        + ([_data_input(report.eval_data, "held out")] if report.eval_data is not None else []),
        outputs,
        hash_files(files, made.weights.names) if hashes.enabled else {},
        report.numbers(),
        True,
    )
    staging.write_file(FILE_NAME, content)
    staging.commit(settings.overwrite)
    hashes.save()


def _draw(folder: Path) -> None:
    lines = plots.read_log(folder / "log.jsonl")
    try:
        plots.draw_loss(lines, folder / "loss.png")
        if any(line.get("load") for line in lines):
            plots.draw_experts(lines, folder / "experts.png")
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error


def _data_input(data: DataReport, role: str) -> Mapping[str, object]:
    return {"role": role, "source": data.source, "kind": data.kind, "examples": data.examples, "blake3": data.digest}


def _save_dtype(checkpoint: Checkpoint, options: TrainOptions) -> torch.dtype | None:
    """The dtype to write: the checkpoint's own most common one, unless the options name another."""
    import torch

    if options.save_dtype != "auto":
        found: torch.dtype = getattr(torch, options.save_dtype)
        return found
    sizes: dict[Any, int] = {}
    for tensor in checkpoint.tensors.values():
        dtype = tensor.dtype.to_torch
        if dtype in (torch.float32, torch.bfloat16, torch.float16):
            sizes[dtype] = sizes.get(dtype, 0) + tensor.numel
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _report(
    subject: Subject, options: TrainOptions, accelerator: Any, target: Path, dry_run: bool = False
) -> TrainReport:
    schedule = schedule_of(subject.examples, options, accelerator.num_processes)
    held_out = subject.held_out
    return TrainReport(
        output=str(target),
        task=subject.task.name,
        method=subject.prepared.method,
        kind=subject.prepared.kind,
        parameters=subject.parameters,
        trained=subject.prepared.trainable,
        steps=subject.steps,
        epochs=round(schedule.epoch(subject.steps), 4),
        warmup=warmup_steps(subject.steps, options),
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        data=describe_data(subject.examples, options.data),
        eval_data=None if held_out is None else describe_data(held_out, options.eval_data or options.data),
        dry_run=dry_run,
        notes=tuple(_notes(subject, options)),
    )


def describe_data(examples: Examples, source: str) -> DataReport:
    """What a report says of data."""
    every = range(len(examples))
    rows = {int(examples.pieces[piece, 0]) for item in examples.items for piece in item}
    return DataReport(
        source_name(source), examples.rows.kind, len(rows), len(examples), examples.size(every), examples.count(every),
        examples.longer, examples.truncated, examples.skipped, examples.rows.digest,
    )  # fmt: skip


def _notes(subject: Subject, options: TrainOptions) -> Iterator[str]:
    examples = subject.examples
    if examples.longer:
        what = {"truncate": "cut", "skip": "left out", "split": "split"}[options.over_length]
        yield f"{examples.longer} examples were too long and have been {what}."
    if examples.skipped and options.over_length != "skip":
        yield f"{examples.skipped} examples have nothing to learn and take no part."
    warm = warmup_steps(subject.steps, options)
    if 0 < subject.steps <= warm:
        yield (
            f"The warm-up of {warm} steps is not over after {subject.steps}: the learning rate never reaches "
            f"{options.rate:g}; --warmup below 1 is a share of the run."
        )
    yield from without_effect(subject, options)


@contextlib.contextmanager
def _staged(target: Path, accelerator: Any) -> Iterator[Staging | None]:
    """The staging folder, held by the first process; it is kept whenever it holds a state to go on from."""
    if not accelerator.is_main_process:
        yield None
        return
    staging = Staging(target, "train")
    done = False
    try:
        yield staging
        done = True
    finally:
        if not done and not (staging.root / "state" / "latest.json").is_file():
            staging.discard()
        staging.close()
