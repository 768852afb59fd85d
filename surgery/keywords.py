"""The keywords of the library's verbs, for type checkers and editors; a test holds them to what they stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from surgery.api.calling import CheckpointLike
    from surgery.execute import Progress
    from surgery.training.work import TrainProgress


class WritingKeywords(TypedDict, total=False):
    """How to run what writes; nothing here is part of what it makes.

    Attributes:
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        threads: tensors at a time; one for each processor by default, at most eight.
        progress: told about the bytes as they pass.
    """

    overwrite: bool
    dry_run: bool
    threads: int | None
    progress: Progress | None


class HashingKeywords(WritingKeywords, total=False):
    """How to run what need not be hashed; with `hash`, every input and output tensor is, for `surgery.json`."""

    hash: bool


class RunKeywords(HashingKeywords, total=False):
    """How to run what computes; `device` is `cpu`, `cuda`, `cuda:N`, or `auto`."""

    device: str


class ExtractKeywords(RunKeywords, total=False):
    """What to extract, see `surgery.ops.extract_options.ExtractOptions`, and how to run."""

    rank: int | str | None
    energy: float | None
    budget: int | None
    max_rank: int | None
    targets: str
    method: str
    dtype: str
    save_residual: bool
    allow_missing: bool
    allow_nonfinite: bool
    any_base: bool
    base_name: str | None
    seed: int
    exact: bool


class SubtractKeywords(RunKeywords, total=False):
    """How to subtract, see `surgery.ops.merge.MergeOptions`, and how to run."""

    shard_bytes: int | None
    allow_nonfinite: bool


class SwitchKeywords(SubtractKeywords, total=False):
    """How to switch, see `surgery.ops.merge.MergeOptions`, and how to run."""

    reversible: bool


class MergeKeywords(SwitchKeywords, total=False):
    """How to merge, see `surgery.ops.merge.MergeOptions`, and how to run."""

    any_base: bool


class ResizeKeywords(RunKeywords, total=False):
    """How to resize, see `surgery.ops.combine.CombineOptions`, and how to run."""

    rank: int | None
    energy: float | None
    dtype: str
    drop_saved: bool
    base_name: str | None


class CombineKeywords(ResizeKeywords, total=False):
    """How to combine, see `surgery.ops.combine.CombineOptions`, and how to run."""

    method: str
    density: float
    as_peft: bool
    any_base: bool
    seed: int


class ConvertKeywords(HashingKeywords, total=False):
    """What to make of an adapter, see `surgery.ops.convert.ConvertOptions`, and how to run."""

    experts: str | None
    component: str | None
    portable: bool
    pad_ranks: bool
    base_name: str | None


class UpcycleKeywords(HashingKeywords, total=False):
    """What to make of a dense checkpoint, see `surgery.upcycling.options.UpcycleOptions`, and how to run."""

    experts: int | None
    top_k: int | None
    router: str
    capacity: float | None
    group: str
    allow_future: bool
    layers: str
    init: str
    rest: str | None
    any_base: bool
    router_init: str
    shared_expert: bool
    combine: str | None
    target: str
    kind: str
    rank: int | None
    alpha: float | None
    seed: int
    shard_bytes: int | None
    verify: bool | None
    text: str | os.PathLike[str] | None


class DenseKeywords(HashingKeywords, total=False):
    """What to make of a mixture, see `surgery.upcycling.downcycle.DenseOptions`, and how to run."""

    expert: int | None
    average: bool
    to: str | None
    drop_shared: bool
    shard_bytes: int | None


class MethodKeywords(TypedDict, total=False):
    """What is trained, see `surgery.training.methods.MethodOptions`."""

    method: str | None
    rank: int
    alpha: float | None
    targets: str | None
    dropout: float
    rslora: bool
    dora: bool
    pissa: bool
    lora_plus: float
    prompt_tokens: int | None
    infix_tokens: int
    train: tuple[tuple[str, float], ...]
    freeze: tuple[str, ...]
    head: bool


class EstimateKeywords(MethodKeywords, total=False):
    """What a run would look like, see `surgery.training.estimate.EstimateOptions`."""

    task: str | None
    activations: bool
    batch_size: int
    length: int | None
    checkpointing: bool
    devices: int
    sharding: str
    weight_bytes: float | None
    trained_bytes: float | None
    master_bytes: float
    gradient_bytes: float | None
    optimizer_bytes: float


class TrainKeywords(MethodKeywords, total=False):
    """What and how to train, see `surgery.training.options.TrainOptions`, and how to run.

    Attributes:
        base: the checkpoint that an adapter belongs to which is trained on.
        any_base: take it even if hashes prove that the adapter was made for another.
        base_name: what an adapter calls its base.
        recipe: a named set of options, which those given here come before.
        overwrite: replace an existing output.
        dry_run: look at data and model, train nothing.
        hash: hash every tensor for `surgery.json`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        trackers: besides the log, those of accelerate by name.
        progress: told about each step.
    """

    eval_data: str | os.PathLike[str] | None
    eval_split: float
    task: str | None
    loss: str
    tokenizer: str | None
    chat_template: str | None
    end_token: str | None
    max_length: int | None
    over_length: str
    packing: bool
    new_head: bool
    steps: int | None
    epochs: float | None
    batch_size: int
    gradient_accumulation: int
    learning_rate: float | None
    schedule: str
    warmup: float
    final_rate: float
    optimizer: str
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    precision: str
    activation_checkpointing: bool
    residual_dropout: float
    router_aux_loss: float | None
    router_z_loss: float | None
    eval_every: int | None
    save_every: int | None
    log_every: int
    keep: str
    patience: int | None
    save_dtype: str
    seed: int
    base: CheckpointLike | None
    any_base: bool
    base_name: str | None
    recipe: str | None
    overwrite: bool
    dry_run: bool
    hash: bool
    device: str
    trackers: Sequence[str]
    progress: TrainProgress | None


class EvaluateKeywords(TypedDict, total=False):
    """What to evaluate and how, see `surgery.evaluation.options`."""

    task: str | None
    adapter_field: str | None
    loss: str
    tokenizer: str | None
    chat_template: str | None
    end_token: str | None
    max_length: int | None
    over_length: str
    batch_size: int
    precision: str
    max_new_tokens: int
    temperature: float
    seed: int
    output: str | os.PathLike[str] | None
    generate: str | os.PathLike[str] | None
    pairwise: str | os.PathLike[str] | None
    key: str | os.PathLike[str] | None
    overwrite: bool
    dry_run: bool
    device: str
    progress: Progress | None


class AnalyzeKeywords(TypedDict, total=False):
    """What to look at, see `surgery.analysis.analyze.AnalyzeOptions`, and how to run.

    Attributes:
        plot: a picture to write, `.png` or `.html`.
        overwrite: replace a picture that is there.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: matrices at a time.
        progress: told about the bytes as they pass.
    """

    targets: str | None
    layers: str
    directions: int
    values: int
    seed: int
    plot: str | os.PathLike[str] | None
    overwrite: bool
    device: str
    threads: int | None
    progress: Progress | None


class VerifyKeywords(TypedDict, total=False):
    """How to compare, and how to run what only looks.

    Attributes:
        logits: run both checkpoints, too.
        seed: of the random inputs.
        threads: tensors at a time.
        progress: told about the bytes as they pass.
    """

    logits: bool
    seed: int
    threads: int | None
    progress: Progress | None
