"""The library's verbs: what each command does, as a function that returns the report the command prints.

A checkpoint is given as a path, a Hub id `name/repo[@revision]`, or an open `Checkpoint`; an adapter likewise, with a
weight as `path=0.5` or as a pair. What is to be written appears at `output` whole or not at all. The keywords of each
verb are typed (`surgery.keywords`), and one that it does not have raises `TypeError`.

Everything is imported when it is used, so that `import surgery` costs next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from surgery.errors import OptionError
from surgery.keywords import (
    CombineKeywords,
    ConvertKeywords,
    DenseKeywords,
    EstimateKeywords,
    ExtractKeywords,
    MergeKeywords,
    MethodKeywords,
    ResizeKeywords,
    RunKeywords,
    SubtractKeywords,
    SwitchKeywords,
    TrainKeywords,
    UpcycleKeywords,
    VerifyKeywords,
    WritingKeywords,
)

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.checkpoint import Checkpoint
    from surgery.execute import Progress
    from surgery.hub.pull import PullReport
    from surgery.hub.push import PushReport
    from surgery.operation import RunOptions
    from surgery.ops.inspection import AdapterReport, CheckpointReport
    from surgery.ops.lint import LintReport
    from surgery.ops.verify import CompareReport, VerifyReport
    from surgery.reports import CombineReport, ConvertReport, ExtractReport, MergeReport, RestoreReport
    from surgery.training.estimate import EstimateReport
    from surgery.training.report import TrainReport
    from surgery.upcycling.report import DenseReport, UpcycleReport

    CheckpointLike = str | os.PathLike[str] | Checkpoint
    AdapterLike = str | os.PathLike[str] | tuple[str | os.PathLike[str], float] | Adapter


def run_options(**keywords: Unpack[RunKeywords]) -> RunOptions:
    """How to run an operation: the keywords that all functions share which write."""
    from surgery.execute import NoProgress, Settings, default_threads, resolve_device
    from surgery.operation import RunOptions

    threads = keywords.get("threads")
    if threads is not None and threads < 1:
        raise OptionError(f"--threads is {threads}, expected at least 1.")
    settings = Settings(
        threads=threads or default_threads(),
        device=resolve_device(keywords.get("device", "cpu")),
        hash=keywords.get("hash", True),
        progress=keywords.get("progress") or NoProgress(),
    )
    return RunOptions(keywords.get("overwrite", False), keywords.get("dry_run", False), settings)


def _split(keywords: Mapping[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    """Separate how to run (`RunKeywords`) from the fields of an operation's options."""
    run = {name: value for name, value in keywords.items() if name in RunKeywords.__optional_keys__}
    return run_options(**run), {name: value for name, value in keywords.items() if name not in run}


def _check_keywords(verb: str, keywords: Mapping[str, object], known: type) -> None:
    """Raise `TypeError` for a keyword that a verb does not have, naming those that it has."""
    names = sorted(known.__optional_keys__)  # type: ignore[attr-defined]
    for name in keywords:
        if name not in names:
            from difflib import get_close_matches

            near = "".join(f" Did you mean {match!r}?" for match in get_close_matches(name, names, 1))
            raise TypeError(f"{verb}() has no keyword {name!r}.{near} It takes {', '.join(names)}.")


def extract(
    base: CheckpointLike,
    tuned: CheckpointLike,
    *,
    output: str | os.PathLike[str],
    **keywords: Unpack[ExtractKeywords],
) -> ExtractReport:
    """Write the adapter that takes `base` to `tuned`, as a PEFT folder.

    Args:
        base: the checkpoint that the adapter will be for.
        tuned: its fine-tune.
        output: the folder to write.
        **keywords:
            rank: of every module; 16 if neither `energy` nor `budget` is given. `best`, with `exact`, makes adapter and
                record smallest together.
            energy: instead, for each module the least rank that keeps this share of ||dW||^2, in (0, 1].
            budget: instead, this many parameters in all, spread so that the total error is least.
            max_rank: bound on the ranks that `energy` and `budget` choose.
            targets: which modules, as `--targets`; `all-linear` by default.
            method: `randomized` (the default) or `exact`.
            dtype: of the factors, `float32` (the default) or `bfloat16`.
            save_residual: store what changed and has no factors whole.
            allow_missing: report tensors found in one checkpoint only, instead of refusing.
            allow_nonfinite: take NaN and infinity for no change, instead of refusing.
            any_base: extract even if the two do not look like a base and its fine-tune.
            base_name: what the adapter should call its base.
            seed: of the randomised SVD.
            exact: write the record, too, from which `restore` gives `tuned` back, bit for bit.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            device: `cpu`, `cuda`, `cuda:N`, or `auto` (the default): a GPU where there is one.
            threads: modules at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.hub.resolve import resolve_checkpoint
    from surgery.ops.extract import extract as run_extract
    from surgery.ops.extract_options import ExtractOptions

    _check_keywords("extract", keywords, ExtractKeywords)
    run, options = _split({"device": "auto", **keywords})
    return run_extract(resolve_checkpoint(base), resolve_checkpoint(tuned), output, ExtractOptions(**options), run)


def restore(
    base: CheckpointLike,
    adapter: AdapterLike,
    *,
    output: str | os.PathLike[str],
    **keywords: Unpack[WritingKeywords],
) -> RestoreReport:
    """Write the fine-tune that `adapter` was extracted from, with `exact=True`, bit for bit and proved by its hashes.

    Args:
        base: the checkpoint that it was extracted with.
        adapter: the exact extraction.
        output: the folder to write.
        **keywords:
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            threads: tensors at a time.
            progress: told about the bytes as they pass.
    """
    from surgery.ops.restore import restore as run_restore

    _check_keywords("restore", keywords, WritingKeywords)
    found, (opened,) = _resolved("BASE", base, (adapter,))
    return run_restore(found, opened, output, _split(keywords)[0])


def merge(
    base: CheckpointLike,
    *adapters: AdapterLike,
    output: str | os.PathLike[str],
    **keywords: Unpack[MergeKeywords],
) -> MergeReport:
    """Write `base` with `adapters` added, in the order given.

    Args:
        base: the checkpoint to add to.
        *adapters: those to add, each with an optional weight.
        output: the folder to write.
        **keywords:
            reversible: write the record that makes `subtract` exact.
            shard_bytes: split the weights into files of at most this many bytes; as those of `base` by default.
            allow_nonfinite: let NaN and infinity pass, instead of refusing.
            any_base: merge even if hashes prove that an adapter is for another base.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            device: `cpu` (the default), `cuda`, `cuda:N`, or `auto`.
            threads: tensors at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.ops.merge import MergeOptions
    from surgery.ops.merge import merge as run_merge

    _check_keywords("merge", keywords, MergeKeywords)
    run, options = _split(keywords)
    return run_merge(*_resolved("BASE", base, adapters), output, MergeOptions(**options), run)


def subtract(
    merged: CheckpointLike,
    *adapters: AdapterLike,
    output: str | os.PathLike[str],
    **keywords: Unpack[SubtractKeywords],
) -> MergeReport:
    """Write `merged` without `adapters`; without any, if none is named and it has an undo record.

    With an undo record, what stays merged can be taken out later, and hashes are always computed: they are the proof.

    Args:
        merged: the checkpoint to take out of.
        *adapters: those to take out.
        output: the folder to write.
        **keywords:
            shard_bytes: split the weights into files of at most this many bytes; as those of `merged` by default.
            allow_nonfinite: let NaN and infinity pass, instead of refusing.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            device: `cpu` (the default), `cuda`, `cuda:N`, or `auto`.
            threads: tensors at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.ops.merge import MergeOptions
    from surgery.ops.subtract import subtract as run_subtract

    _check_keywords("subtract", keywords, SubtractKeywords)
    run, options = _split(keywords)
    return run_subtract(*_resolved("MERGED", merged, adapters), output, MergeOptions(**options), run)


def switch(
    merged: CheckpointLike,
    old: AdapterLike,
    new: AdapterLike,
    *,
    output: str | os.PathLike[str],
    **keywords: Unpack[SwitchKeywords],
) -> MergeReport:
    """Write `merged` with `old` taken out and `new` put in, in one pass.

    With an undo record, the result has one again, and hashes are always computed: they are the proof.

    Args:
        merged: the checkpoint to change.
        old: the adapter to take out.
        new: the adapter to put in.
        output: the folder to write.
        **keywords:
            reversible: write the record that makes `subtract` exact, even if `merged` has none.
            shard_bytes: split the weights into files of at most this many bytes; as those of `merged` by default.
            allow_nonfinite: let NaN and infinity pass, instead of refusing.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            device: `cpu` (the default), `cuda`, `cuda:N`, or `auto`.
            threads: tensors at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.ops.merge import MergeOptions
    from surgery.ops.subtract import switch as run_switch

    _check_keywords("switch", keywords, SwitchKeywords)
    run, options = _split(keywords)
    found, (one, other) = _resolved("MERGED", merged, (old, new))
    return run_switch(found, one, other, output, MergeOptions(**options), run)


def upcycle(
    checkpoint: CheckpointLike,
    *,
    output: str | os.PathLike[str] | None = None,
    **keywords: Unpack[UpcycleKeywords],
) -> UpcycleReport:
    """Write a dense checkpoint as a mixture of experts (Sparse Upcycling, arXiv:2212.05055).

    Args:
        checkpoint: the dense model.
        output: the folder to write; by default beside the checkpoint, as `<name>-moe-<experts>x`.
        **keywords:
            experts: to each chosen MLP; 8 by default, or one for each model that `init` names.
            top_k: experts that a token goes to; 2 by default.
            router: `top-k` (the default) or `expert-choice`; `encoder=...,decoder=...` for models that have both.
            capacity: of expert choice: the experts that take a token, on average; 2 by default.
            group: of expert choice: the tokens that compete, `sequence` (the default) or `batch`.
            allow_future: let expert choice into a decoder.
            layers: `all` (the default), `last:N`, `last:half`, `every:N`, or a list such as `0,4-7`.
            init: `copy` (the default), `noise:STD`, `drop:RATIO`, `granular:G`, `from:A,B,...`, `adapters:A,B,...`.
            rest: with `from` and `adapters`, what becomes of everything else: `average`, `first` or `base`.
            any_base: take adapters even if hashes prove that they were made for another base.
            router_init: `normal:STD`, `zeros`, or `hidden:PROMPTS.jsonl`; `normal:0.02` by default.
            shared_expert: add an expert that sees every token and starts out silent.
            combine: `normalized` (the default) or `raw`.
            target: the model type to write; `auto` by default.
            kind: `copy` (the default), or `lora`: routed low-rank updates to the one MLP, written without it.
            rank: of these updates; 16 by default.
            alpha: an update is (alpha / rank) B A; the rank by default.
            seed: of everything random.
            shard_bytes: split the weights into files of at most this many bytes; 5 GB by default.
            verify: measure the difference from the dense model; by default where transformers is installed and both
                models, one after the other, fit into the free memory.
            text: a file to measure the loss on, too.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            threads: tensors at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.hub.resolve import resolve_checkpoint
    from surgery.upcycling.options import UpcycleOptions
    from surgery.upcycling.upcycle import upcycle as run_upcycle

    _check_keywords("upcycle", keywords, UpcycleKeywords)
    run, options = _split(keywords)
    measured = options.pop("verify", None), options.pop("text", None)
    chosen = UpcycleOptions(**options)
    found = resolve_checkpoint(checkpoint)
    sources = _sources(chosen.expert_init.kind, chosen.expert_init.paths)
    return run_upcycle(found, output, chosen, run, *measured, sources)


def _sources(kind: str, paths: Sequence[str]) -> list[Checkpoint] | list[Adapter]:
    """Open what `--init from:` or `adapters:` names."""
    from surgery.errors import InputError
    from surgery.hub.resolve import is_adapter, resolve_adapter, resolve_checkpoint

    if kind == "adapters":
        return [resolve_adapter(path) for path in paths]
    for path in paths:
        if is_adapter(path):
            raise InputError(f"{path} is an adapter; make experts of adapters with --init adapters:...")
    return [resolve_checkpoint(path) for path in paths]


def dense(
    checkpoint: CheckpointLike, *, output: str | os.PathLike[str], **keywords: Unpack[DenseKeywords]
) -> DenseReport:
    """Write the dense model of a mixture of experts: what `upcycle` made, undone.

    Args:
        checkpoint: the mixture.
        output: the folder to write.
        **keywords:
            expert: the one to take, from 0; by default the first, if all of a layer are the same.
            average: take the mean of all instead.
            to: the dense model type; by default what `surgery.json` has on record, or the first that fits.
            drop_shared: leave out a shared expert that is not silent.
            shard_bytes: split the weights into files of at most this many bytes; 5 GB by default.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            threads: tensors at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.hub.resolve import resolve_checkpoint
    from surgery.upcycling.downcycle import DenseOptions
    from surgery.upcycling.downcycle import dense as run_dense

    _check_keywords("dense", keywords, DenseKeywords)
    run, options = _split(keywords)
    chosen = DenseOptions(**options)
    return run_dense(resolve_checkpoint(checkpoint), output, chosen, run)


def estimate(checkpoint: CheckpointLike, **keywords: Unpack[EstimateKeywords]) -> EstimateReport:
    """Say what a training run would take; `config.json` is enough.

    Args:
        checkpoint: the model.
        **keywords:
            method: `lora` (the default), `full`, `top:N`, `bitfit`, `prompt`, `prefix`, `adapter-h`, `adapter-l`,
                `lora+prompt`, `lora+prefix`, `router`, `experts`, or `selected`, the default with `train`.
            rank: of LoRA, and the bottleneck of adapters; 16 by default.
            alpha: of LoRA; 32 by default, and 8 with `rslora`.
            targets: where LoRA acts; `all-linear` by default.
            dropout: of LoRA, before A.
            rslora: scale LoRA by alpha/sqrt(rank).
            dora: train magnitudes apart from directions.
            pissa: begin LoRA with the leading singular vectors of each weight.
            lora_plus: the learning rate of B over that of A.
            prompt_tokens: virtual tokens before the input; 8 by default.
            infix_tokens: virtual tokens between prompt and completion.
            train: patterns of parameters to train besides, each with a factor on the learning rate.
            freeze: patterns of parameters not to train.
            head: train a classifier's head; True by default.
            task: `causal-lm`, `classification`, `seq2seq` or `image-classification`; by default as the config says.
            activations: tell them, too, which takes seconds for a large model; True by default.
            batch_size: rows on each device; 1 by default.
            length: tokens of a row; 512 by default.
            checkpointing: compute activations again in the backward pass.
            devices: that share the work.
            sharding: what they share out: `none` (the default), `optimizer`, `gradients` or `full`.
            weight_bytes: width of the model's weights; by default as the config says.
            trained_bytes: width of what is trained; by default 4 for adapters, else that of the weights.
            master_bytes: width of a second copy of it; 0 by default.
            gradient_bytes: width of gradients; by default that of what is trained.
            optimizer_bytes: of the optimiser's states together; 8 by default.
    """
    from surgery.hub.resolve import resolve_config
    from surgery.training.estimate import EstimateOptions
    from surgery.training.estimate import estimate as run_estimate
    from surgery.training.methods.options import MethodOptions

    _check_keywords("estimate", keywords, EstimateKeywords)
    given: dict[str, Any] = dict(keywords)
    method = {name: given.pop(name) for name in MethodKeywords.__optional_keys__ if name in given}
    return run_estimate(*resolve_config(checkpoint), EstimateOptions(method=MethodOptions(**method), **given))


def train(
    checkpoint: CheckpointLike,
    *,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **keywords: Unpack[TrainKeywords],
) -> TrainReport:
    """Train `checkpoint` on `data`.

    An interrupted run leaves its state beside `output`; the same call goes on from there, bit for bit.

    Args:
        checkpoint: the model, a folder.
        data: a file, a folder, or a data set on the Hub, `name/repo[:split]`.
        output: the folder to write.
        **keywords:
            eval_data: the same, to measure the loss on.
            eval_split: instead, the share of `data` to hold out, or from 1 on the number of examples.
            task: one of `TASKS`; told from checkpoint and data where it is None.
            loss: `auto` for the loss on what the model is to say (completions, the assistant's turns), `all` for
                everything.
            tokenizer: a folder or id to take the tokenizer from, instead of the checkpoint.
            chat_template: a Jinja file instead of the tokenizer's template.
            end_token: ends each completion and each text, instead of the tokenizer's end token; added to the vocabulary
                if it is not in it.
            max_length: tokens of an example at most; what the model can take, and at most 2048, where it is None.
            over_length: what becomes of longer ones; `split` is for plain text only.
            packing: several examples to a row, which do not see each other.
            new_head: put a fresh head on a checkpoint whose own is for other labels.
            method: what is trained.
            targets: of LoRA.
            rank: of LoRA, and the bottleneck of adapters.
            alpha: of LoRA; the rank where it is None.
            steps: of the optimiser; instead of `epochs`.
            epochs: times to go through the data; 1 where neither is given.
            batch_size: examples to a forward pass, on each device.
            gradient_accumulation: forward passes to a step.
            learning_rate: at its highest; None for the method's default.
            schedule: how it falls after the warm-up.
            warmup: steps of it; below 1, the share of all steps.
            final_rate: what the rate falls to, as a share of the highest.
            optimizer: `adamw`, or `adamw-8bit` with bitsandbytes.
            beta1: of AdamW.
            beta2: of AdamW.
            epsilon: of AdamW.
            weight_decay: of matrices; vectors have none.
            max_grad_norm: gradients are scaled down to this norm; 0 for never.
            precision: of the forward and backward pass; weights and optimiser are float32. `auto` is bf16 on a GPU that
                has it, fp32 elsewhere.
            activation_checkpointing: compute activations again in the backward pass instead of keeping them.
            residual_dropout: dropout before each residual addition, rising linearly from 0 at the bottom layer to this
                at the top (LIMA, section 3).
            router_aux_loss: the load-balancing loss of a mixture of experts; what its config says where it is None.
            router_z_loss: that loss; what its config says where it is None.
            eval_every: steps between evaluations; a tenth of the run where it is None.
            save_every: steps between saves of the state; a tenth of the run where it is None.
            log_every: steps between lines of the log.
            keep: the weights that are written: of the evaluation with the least loss, or the last.
            patience: stop after so many evaluations that are no better; None for never.
            save_dtype: of the weights written: `auto` for that of the checkpoint, `float32`, `bfloat16`, `float16`.
            seed: of everything random.
            recipe: `lima`, `upcycle`, `lora-paper`, or a YAML file: options that those given here come before.
            overwrite: replace an existing output.
            dry_run: look at data and model, train nothing.
            hash: hash every tensor for `surgery.json`; True by default.
            device: `cpu`, `cuda`, `cuda:N`, or `auto` (the default): a GPU where there is one.
            trackers: besides the log, those of accelerate by name, such as `tensorboard`.
            progress: told about each step.
    """
    from surgery.hub.resolve import resolve_checkpoint
    from surgery.training.recipe import with_recipe
    from surgery.training.run import TrainSettings
    from surgery.training.run import train as run_train
    from surgery.training.work import Silent

    _check_keywords("train", keywords, TrainKeywords)
    given: dict[str, Any] = {**keywords, "data": os.fspath(data)}
    recipe = given.pop("recipe", None)
    run = {name: given.pop(name) for name in ("overwrite", "dry_run", "hash", "device") if name in given}
    progress, trackers = given.pop("progress", None) or Silent(), tuple(given.pop("trackers", ()))
    options = with_recipe(recipe, given)
    settings = TrainSettings(progress=progress, trackers=trackers, **run)
    return run_train(resolve_checkpoint(checkpoint), output, options, settings)


def _resolved(
    role: str, checkpoint: CheckpointLike, adapters: Sequence[AdapterLike]
) -> tuple[Checkpoint, list[Adapter]]:
    """Open a checkpoint, which the command line calls `role`, and adapters."""
    from surgery.adapter import Adapter
    from surgery.checkpoint import Checkpoint
    from surgery.errors import InputError
    from surgery.hub.resolve import is_adapter, resolve_adapter, resolve_checkpoint

    try:
        found = [resolve_adapter(adapter) for adapter in adapters]
    except InputError as error:
        if not isinstance(checkpoint, Checkpoint | Adapter) and is_adapter(checkpoint):
            raise InputError(
                f"{os.fspath(checkpoint)} is an adapter; {role} comes first; did you swap them?"
            ) from error
        raise
    return resolve_checkpoint(checkpoint), found


def combine(
    *adapters: AdapterLike, output: str | os.PathLike[str], **keywords: Unpack[CombineKeywords]
) -> CombineReport:
    """Write one adapter made of `adapters`.

    Args:
        *adapters: each with an optional weight, which may be negative.
        output: the folder to write.
        **keywords:
            method: `sum` (the default), `cat`, `ties`, `dare-ties`, `dare-linear`, `magnitude-prune`, `tsv`, `iso`, or
                with `as_peft` `linear`.
            rank: of every module; the largest of the adapters' by default.
            energy: instead, for each module the least rank that keeps this share of ||dW||^2, in (0, 1].
            density: share of the entries that the pruning methods keep, in (0, 1].
            as_peft: prune, elect and add A and B separately, as PEFT's `add_weighted_adapter`.
            dtype: of the factors, `float32` (the default) or `bfloat16`.
            drop_saved: leave out what adapters store whole.
            any_base: combine adapters that name different bases.
            base_name: what the result should call its base.
            seed: of DARE and of the randomised SVD.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            device: `cpu` (the default), `cuda`, `cuda:N`, or `auto`.
            threads: modules at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.hub.resolve import resolve_adapter
    from surgery.ops.combine import CombineOptions
    from surgery.ops.combine import combine as run_combine

    _check_keywords("combine", keywords, CombineKeywords)
    run, options = _split(keywords)
    return run_combine([resolve_adapter(adapter) for adapter in adapters], output, CombineOptions(**options), run)


def resize(
    adapter: AdapterLike, *, output: str | os.PathLike[str], **keywords: Unpack[ResizeKeywords]
) -> CombineReport:
    """Write `adapter` at a lower rank.

    Args:
        adapter: the one to resize.
        output: the folder to write.
        **keywords:
            rank: of every module.
            energy: instead, for each module the least rank that keeps this share of ||dW||^2, in (0, 1].
            dtype: of the factors, `float32` (the default) or `bfloat16`.
            drop_saved: leave out what the adapter stores whole.
            base_name: what the result should call its base.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            device: `cpu` (the default), `cuda`, `cuda:N`, or `auto`.
            threads: modules at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.hub.resolve import resolve_adapter
    from surgery.ops.combine import CombineOptions
    from surgery.ops.combine import resize as run_resize

    _check_keywords("resize", keywords, ResizeKeywords)
    run, options = _split(keywords)
    return run_resize(resolve_adapter(adapter), output, CombineOptions(**options), run)


def inspect(path: CheckpointLike | Adapter, *, tensors: bool = False) -> CheckpointReport | AdapterReport:
    """Describe a checkpoint or an adapter from its headers; with `tensors`, list every tensor."""
    from surgery.adapter import Adapter
    from surgery.hub.resolve import resolve
    from surgery.ops.inspection import inspect_adapter, inspect_checkpoint

    found = resolve(path)
    return inspect_adapter(found, tensors) if isinstance(found, Adapter) else inspect_checkpoint(found, tensors)


def verify(
    left: CheckpointLike, right: CheckpointLike | None = None, **keywords: Unpack[VerifyKeywords]
) -> VerifyReport | CompareReport:
    """Check an output against its `surgery.json`, or compare two checkpoints.

    Args:
        left: the output to check, or the first of two.
        right: the second.
        **keywords:
            logits: compare the two as functions, too; loads both whole, with transformers.
            seed: of the random inputs that `logits` runs them on.
            threads: tensors at a time.
            progress: told about the bytes as they pass.
    """
    from surgery.adapter import Adapter
    from surgery.hub.resolve import resolve, resolve_checkpoint
    from surgery.ops.verify import compare, verify_output, with_logits

    _check_keywords("verify", keywords, VerifyKeywords)
    logits = keywords.get("logits", False)
    settings = _split(keywords)[0].settings
    if right is None and logits:
        raise OptionError("--logits compares two checkpoints; name the second.")
    if right is None:
        found = resolve(left)
        return verify_output(found.files if isinstance(found, Adapter) else found, settings)
    pair = resolve_checkpoint(left), resolve_checkpoint(right)
    report = compare(*pair, settings)
    return with_logits(report, *pair, keywords.get("seed", 0)) if logits else report


def convert(
    adapter: str | os.PathLike[str],
    *,
    to: str,
    output: str | os.PathLike[str],
    base: CheckpointLike | None = None,
    **keywords: Unpack[ConvertKeywords],
) -> ConvertReport:
    """Write `adapter`, in any known format, in another.

    Args:
        adapter: a folder or a file.
        to: the format to write: `peft`, `kohya`, `diffusers` or `mlx`.
        output: the folder to write.
        base: the model it belongs to, or a pipeline's folder; some names cannot be told without it.
        **keywords:
            experts: `fused` or `per-expert`; as they are by default.
            component: which part of a pipeline the adapter is for.
            portable: fold scales into B, so that one alpha serves all modules.
            pad_ranks: fill up all modules with zeros to the largest rank.
            base_name: what the result should call its base.
            overwrite: replace an existing output.
            dry_run: plan and check everything, write nothing.
            threads: tensors at a time.
            hash: hash every tensor for `surgery.json`; True by default.
            progress: told about the bytes as they pass.
    """
    from surgery.hub.resolve import resolve_bases, resolve_folder
    from surgery.ops.convert import ConvertOptions
    from surgery.ops.convert import convert as run_convert

    _check_keywords("convert", keywords, ConvertKeywords)
    run, options = _split(keywords)
    place, bases = resolve_folder(adapter), resolve_bases(base)
    return run_convert(place, bases, output, ConvertOptions(to=to, **options), run)


def lint(
    path: str | os.PathLike[str],
    *,
    consumers: str | Sequence[str] = ("peft", "vllm", "llama.cpp"),
    base: CheckpointLike | None = None,
) -> LintReport:
    """Say what each of `consumers` would refuse, or silently get wrong, about the adapter or checkpoint at `path`."""
    from surgery.hub.resolve import resolve_checkpoint, resolve_folder
    from surgery.ops.lint import lint as run_lint

    names = [name.strip() for name in consumers.split(",") if name.strip()] if isinstance(consumers, str) else consumers
    return run_lint(resolve_folder(path), tuple(names), None if base is None else resolve_checkpoint(base))


def push(
    folder: str | os.PathLike[str],
    name: str,
    *,
    endpoint: str | None = None,
    message: str | None = None,
    private: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Check a folder and commit it to `name[@branch]`.

    Args:
        folder: a checkpoint or an adapter on disk; it stays as it is.
        name: the repository, which is made if it is not there, and a branch, `main` by default.
        endpoint: a Hub's address, `hf`, or `local`; by default `HF_ENDPOINT` if it is set, else the local registry.
        message: of the commit.
        private: whether a repository that this push makes is private.
        allow_nonfinite: let NaN and infinity pass.
        dry_run: check everything, write nothing.
        progress: told about the bytes as they pass.
    """
    from surgery.execute import NoProgress
    from surgery.hub.endpoint import for_writing
    from surgery.hub.push import PushOptions
    from surgery.hub.push import push as run_push

    options = PushOptions(
        message=message,
        private=private,
        allow_nonfinite=allow_nonfinite,
        dry_run=dry_run,
        progress=progress or NoProgress(),
    )
    return run_push(folder, name, for_writing(endpoint), options)


def pull(
    name: str,
    *,
    output: str | os.PathLike[str],
    endpoint: str | None = None,
    check_base: CheckpointLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PullReport:
    """Fetch `name[@revision]` into the folder `output`, every file proved by its hash.

    Args:
        name: the repository, and a branch, tag or commit; `main` by default.
        output: the folder; appears whole or not at all.
        endpoint: a Hub's address, `hf`, or `local`; by default the local registry, then `HF_ENDPOINT`.
        check_base: refuse unless hashes prove that the adapter belongs to this checkpoint.
        overwrite: replace a folder that is there.
        dry_run: say what would be fetched, write nothing.
        progress: told about the bytes as they pass.
    """
    from surgery.execute import NoProgress
    from surgery.hub.endpoint import endpoint_of
    from surgery.hub.pull import PullOptions
    from surgery.hub.pull import pull as run_pull
    from surgery.hub.resolve import resolve_checkpoint

    options = PullOptions(
        overwrite=overwrite,
        dry_run=dry_run,
        check_base=None if check_base is None else resolve_checkpoint(check_base),
        progress=progress or NoProgress(),
    )
    return run_pull(name, output, endpoint_of(endpoint), options)
