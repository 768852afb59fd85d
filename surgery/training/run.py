"""`train CHECKPOINT --data F -o OUT`: everything around the loop, from the checkpoint on disk to the one that appears.

Until a run is done all of it is in the staging folder beside the target: `state/` (see `state`), then `files/`.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import InputError, MissingExtraError, OptionError
from surgery.hashing import HashBook
from surgery.operation import check_paths
from surgery.provenance import FILE_NAME, Input, describe_input, describe_tensor, document, hash_files
from surgery.training import batches, plots, state
from surgery.training.dropout import add_residual_dropout
from surgery.training.examples import Examples, hold_out, image_examples, text_examples
from surgery.training.images import Pictures
from surgery.training.loop import Loop, Silent, TrainProgress, Work, schedule_of
from surgery.training.options import TrainOptions
from surgery.training.prepared import Prepared, prepare
from surgery.training.rates import warmup_steps
from surgery.training.reading import Rows, read_rows, source_name
from surgery.training.report import DataReport, TrainReport, trained_card
from surgery.training.tasks import Labels, Task, find_labels, find_task, load_model, longest
from surgery.training.text import Encoder, load_tokenizer, transformers_package
from surgery.writer import Staging

if TYPE_CHECKING:
    import torch

TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


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


def train(checkpoint: Checkpoint, output: str | os.PathLike[str], options: TrainOptions, settings: TrainSettings) -> TrainReport:
    """Train `checkpoint` and write the result to `output`. Raises `KeyboardInterrupt` when interrupted, state saved."""
    target = Path(output)
    inputs = [Input("base", checkpoint)]
    if checkpoint.path is None or not checkpoint.path.is_dir():
        raise InputError(f"{checkpoint.label} is not a folder on disk; fetch it with `surgery pull` first.")
    check_paths(target, inputs, settings.overwrite)
    with accelerated(options, settings) as accelerator, quiet_transformers():
        subject = _subject(checkpoint, options, accelerator)
        if settings.dry_run:
            return _report(subject, options, accelerator, target, dry_run=True)
        with _staged(target, accelerator) as staging:
            return _train(subject, staging, target, options, settings, accelerator, inputs)


@dataclass(frozen=True)
class Subject:
    """Data and model, ready for each other."""

    checkpoint: Checkpoint
    task: Task
    prepared: Prepared
    tokenizer: Any
    examples: Examples
    held_out: Examples | None
    batch: Any
    steps: int
    parameters: int
    grown: bool = False


def _subject(checkpoint: Checkpoint, options: TrainOptions, accelerator: Any) -> Subject:
    """Read data, load the model, and refuse whatever can be refused before the first step."""
    assert checkpoint.path is not None
    folder = checkpoint.path
    config = _config(checkpoint)
    with accelerator.main_process_first():  # which leaves tokens in the cache of `datasets` for the others
        rows = read_rows(options.data)
        task = find_task(config, rows.kind, checkpoint.label, options.data, options.task)
        labels = find_labels(rows, config) if task.classifies else None
        tokenizer = None
        if rows.kind != "image" and not (rows.kind == "tokens" and not _has_tokenizer(folder, options)):
            tokenizer = load_tokenizer(folder, options)
        read = partial(_examples, task=task, tokenizer=tokenizer, labels=labels, config=config, options=options)
        examples, held_out = read(rows), None
        if options.eval_data is not None:
            other = read_rows(options.eval_data)
            find_task(config, other.kind, checkpoint.label, options.eval_data, task.name)
            held_out = read(other)
        elif options.eval_split:
            examples, held_out = hold_out(examples, options.eval_split, options.seed)
    model = load_model(folder, checkpoint.label, config, task, labels, options)
    grown = tokenizer is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings
    if grown:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    prepared = prepare(model, options)
    if options.residual_dropout:
        add_residual_dropout(model, options.residual_dropout)
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    schedule = schedule_of(examples, options, accelerator.num_processes)
    steps = options.steps or math.ceil((options.epochs or 1.0) * schedule.steps_per_epoch)
    parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    batch = _batches(task, tokenizer, folder, config, labels, options)
    return Subject(checkpoint, task, prepared, tokenizer, examples, held_out, batch, steps, parameters, grown)


def _examples(rows: Rows, task: Task, tokenizer: Any, labels: Labels | None, config: Any, options: TrainOptions) -> Examples:
    if rows.kind == "image":
        assert labels is not None
        return image_examples(rows, labels)
    if options.packing:
        _refuse_packing(config)
    encoder = Encoder.of(tokenizer, rows.kind, task.name, options)
    return text_examples(rows, encoder, longest(config, options), options, labels)


def _refuse_packing(config: Any) -> None:
    """Under expert choice the tokens of a row compete: packed examples would see each other."""
    stacks = (getattr(config, "moe_stacks", None) or {}).values()
    if any(stack.get("router") == "expert-choice" for stack in stacks):
        raise OptionError("--packing puts examples into one row, and with expert choice the tokens of a row compete.")


def _batches(task: Task, tokenizer: Any, folder: Path, config: Any, labels: Labels | None, options: TrainOptions) -> Any:
    """What makes the tensors of some items."""
    if task.name == "image-classification":
        assert labels is not None
        return Pictures.of(folder, config, labels).batch
    padding = next((t for t in (getattr(tokenizer, "pad_token_id", None), config.pad_token_id) if t is not None), 0)
    if labels is not None:
        return partial(batches.label_batch, padding=padding, number=labels.continuous)
    return partial(batches.text_batch, padding=padding, packed=options.packing)


def _config(checkpoint: Checkpoint) -> Any:
    transformers = transformers_package()
    if checkpoint.model_type.startswith("upcycled_"):
        import surgery.moe  # noqa: F401 - registers the classes
    try:
        return transformers.AutoConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"{checkpoint.label} cannot be trained: transformers has no model for it ({reason}).") from error


def _has_tokenizer(folder: Path, options: TrainOptions) -> bool:
    return options.tokenizer is not None or (folder / "tokenizer_config.json").is_file()


# The run --------------------------------------------------------------------------------------------------------------


def _train(
    subject: Subject,
    staging: Staging | None,
    target: Path,
    options: TrainOptions,
    settings: TrainSettings,
    accelerator: Any,
    inputs: list[Input],
) -> TrainReport:
    from accelerate.utils import broadcast_object_list

    root = state.staging_folder(target) / "state"
    resume = [False]
    if staging is not None:
        resume = [state.check_same(root, _identity(subject, options, accelerator), target)]
    (resume_all,) = broadcast_object_list(resume)
    if settings.trackers:
        values = {name: value for name, value in asdict(options).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers("surgery", config=values)
    work = Work(
        subject.task, subject.prepared, subject.examples, subject.held_out, subject.batch, subject.steps, root, options,
        settings.progress,
    )  # fmt: skip
    loop = Loop(work, accelerator)
    position = loop.run(bool(resume_all))
    accelerator.end_training()
    written = position.step
    if options.keep == "best" and position.best_loss is not None:
        written = position.best_step
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
        _finish(subject, staging, root, options, settings, inputs, report)
    accelerator.wait_for_everyone()
    return report


def _identity(subject: Subject, options: TrainOptions, accelerator: Any) -> dict[str, object]:
    """What an interrupted run must have in common with the one that goes on: option by option, to name what differs."""
    sources = {t.source.name: t.source.identity for t in subject.checkpoint.tensors.values()}
    settings: dict[str, object] = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items()}
    return settings | {
        "CHECKPOINT": subject.checkpoint.label,
        "the checkpoint's files": {name: identity and identity[1:] for name, identity in sources.items()},
        "the data": subject.examples.rows.digest,
        "the held-out data": subject.held_out.rows.digest if subject.held_out is not None else None,
        "the number of processes": accelerator.num_processes,
        "the device": accelerator.device.type,
    }


def _finish(
    subject: Subject,
    staging: Staging,
    root: Path,
    options: TrainOptions,
    settings: TrainSettings,
    inputs: list[Input],
    report: TrainReport,
) -> None:
    """Write weights, tokenizer, log, pictures, card and provenance; then the output appears."""
    checkpoint, files = subject.checkpoint, staging.files
    shutil.rmtree(files, ignore_errors=True)
    (files / "training").mkdir(parents=True)
    with state.full_disk(root):
        subject.prepared.save(files, _save_dtype(checkpoint, options))
        if subject.tokenizer is not None and (subject.grown or options.tokenizer or options.chat_template):
            subject.tokenizer.save_pretrained(files)
        shutil.copyfile(root / "log.jsonl", files / "training" / "log.jsonl")
        _draw(files / "training")
    for name in checkpoint.carried if report.kind == "checkpoint" else ():
        if not (files / name).exists():
            staging.carry(name, checkpoint.folder.open(name))
    readme = (files / "README.md").read_text(encoding="utf-8") if (files / "README.md").is_file() else ""
    recorded = asdict(options) | {
        "data": source_name(options.data),
        "eval_data": None if options.eval_data is None else source_name(options.eval_data),
        "learning_rate": options.rate,
    }
    base = inputs[0].checkpoint.provenance["source"]
    staging.write_file("README.md", trained_card(readme, base, report, recorded).encode())
    hashes = HashBook(settings.hash)
    made = open_checkpoint(files) if report.kind == "checkpoint" else None
    tensors = made.tensors if made is not None else {}
    outputs = {
        name: describe_tensor(tensor, hashes.require(tensor) if hashes.enabled else None)
        for name, tensor in tensors.items()
    }
    weights = made.weights.names if made is not None else ()
    content = document(
        "train",
        recorded,
        [*(describe_input(item, hashes) for item in inputs), _data_input(report.data, "data")]
        + ([_data_input(report.eval_data, "held out")] if report.eval_data is not None else []),
        outputs,
        hash_files(files, weights) if hashes.enabled else {},
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


def _report(subject: Subject, options: TrainOptions, accelerator: Any, target: Path, dry_run: bool = False) -> TrainReport:
    schedule = schedule_of(subject.examples, options, accelerator.num_processes)
    held_out = subject.held_out
    return TrainReport(
        output=str(target),
        task=subject.task.name,
        method=options.method,
        kind=subject.prepared.kind,
        parameters=subject.parameters,
        trained=sum(parameter.numel() for group in subject.prepared.groups for parameter in group.params),
        steps=subject.steps,
        epochs=round(schedule.epoch(subject.steps), 4),
        warmup=warmup_steps(subject.steps, options),
        precision={"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        device=accelerator.device.type,
        processes=accelerator.num_processes,
        data=_described(subject.examples, options.data),
        eval_data=None if held_out is None else _described(held_out, options.eval_data or options.data),
        dry_run=dry_run,
        notes=tuple(_notes(subject, options)),
    )


def _described(examples: Examples, source: str) -> DataReport:
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
    if subject.held_out is None:
        yield "Nothing was held out: only the loss on what was learnt is known."


# Other people's machinery ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def accelerated(options: TrainOptions, settings: TrainSettings) -> Iterator[Any]:
    """accelerate's accelerator for a run; what it keeps globally goes with it."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import set_seed

    trackers = [check_tracker(name) for name in settings.trackers]
    if settings.device not in ("auto", "cpu"):
        if not torch.cuda.is_available():
            raise OptionError(f"--device is {settings.device}, and there is no GPU that torch can use.")
        torch.cuda.set_device(settings.device if ":" in settings.device else 0)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched:
        AcceleratorState._reset_state(reset_partial_state=True)
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    if options.optimizer == "adamw-8bit" and not _importable("bitsandbytes"):
        raise OptionError("--optimizer adamw-8bit needs the package 'bitsandbytes', which is not installed.")
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=trackers or None,
        project_dir=None if not trackers else os.getcwd(),
    )
    set_seed(options.seed, device_specific=accelerator.num_processes > 1)
    try:
        yield accelerator
    finally:
        if not launched:
            accelerator.free_memory()
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            PartialState._reset_state()


def check_tracker(name: str) -> str:
    """A tracker's name, if accelerate knows it and its package is there: accelerate itself goes on without."""
    from accelerate.tracking import get_available_trackers

    if name not in TRACKERS:
        raise OptionError(f"--track is {name!r}, expected {', '.join(TRACKERS)}.")
    if name not in {str(getattr(found, "value", found)) for found in get_available_trackers()}:
        raise OptionError(f"--track {name} needs the package of that name, which is not installed.")
    return name


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and from advising for a while."""
    logging = transformers_package().utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


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

