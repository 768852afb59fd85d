"""The verbs that write no model: inspect, lint, verify, analyze, estimate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

from surgery.api.calling import check_keywords, resolved, split
from surgery.errors import OptionError, UnsupportedError
from surgery.keywords import AnalyzeKeywords, EstimateKeywords, MethodKeywords, VerifyKeywords

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.analysis.report import AnalyzeReport
    from surgery.api.calling import AdapterLike, CheckpointLike
    from surgery.checkpoint import Checkpoint
    from surgery.ops.inspection import AdapterReport, CheckpointReport
    from surgery.ops.lint import LintReport
    from surgery.ops.verify import CompareReport, VerifyReport
    from surgery.training.estimate import EstimateReport


def inspect(path: CheckpointLike | Adapter, *, tensors: bool = False) -> CheckpointReport | AdapterReport:
    """Describe a checkpoint or an adapter from its headers; with `tensors`, list every tensor."""
    from surgery.adapter import Adapter
    from surgery.hub.resolve import resolve, resolve_files
    from surgery.ops.inspection import inspect_adapter, inspect_beside, inspect_checkpoint, is_beside

    found: Checkpoint | Adapter | None
    try:
        found = resolve(path)
    except UnsupportedError:
        found = None
    beside = found is None or (not isinstance(found, Adapter) and is_beside(found))
    if beside and isinstance(path, str | os.PathLike) and is_beside(files := resolve_files(path)):
        # Trained beside a base and without factors: no adapter that can be merged, and no checkpoint.
        return inspect_beside(files, tensors)
    if found is None:
        found = resolve(path)  # which says what is wrong with it
    return inspect_adapter(found, tensors) if isinstance(found, Adapter) else inspect_checkpoint(found, tensors)


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
    from surgery.hub.resolve import resolve_checkpoint, resolve_files, stored
    from surgery.ops.verify import compare, verify_output, with_logits

    check_keywords("verify", keywords, VerifyKeywords)
    logits = keywords.get("logits", False)
    settings = split(keywords)[0].settings
    if right is None and logits:
        raise OptionError("--logits compares two checkpoints; name the second.")
    if right is None:
        return verify_output(resolve_files(left), settings)
    pair = resolve_checkpoint(left), resolve_checkpoint(right)
    if logits:
        pair = stored(pair[0]), stored(pair[1])
    report = compare(*pair, settings)
    return with_logits(report, *pair, keywords.get("seed", 0)) if logits else report


def analyze(base: CheckpointLike, *adapters: AdapterLike, **keywords: Unpack[AnalyzeKeywords]) -> AnalyzeReport:
    """Say how adapters relate to the weights they are for: spectra, shared subspaces, amplification (LoRA, section 7).

    Without an adapter, say what the weights are themselves: their singular values and effective ranks. dW stays in its
    factors; of the base one matrix at a time is in memory for each thread.

    Args:
        base: the checkpoint.
        *adapters: for it, each with an optional weight; every two of them are compared.
        **keywords:
            targets: which matrices, as `--targets`; by default those that the adapters act on, or all linear layers.
            layers: `all` (the default), `last:N`, `last:half`, `every:N`, or a list such as `0,4-7`.
            directions: phi(i, j) is told for i and j up to this; 8 by default.
            values: how many singular values of a matrix are listed, about; 64 by default.
            seed: of the randomised SVD that finds the leading directions of a large weight.
            plot: a picture to write, `.png` or `.html`.
            overwrite: replace a picture that is there.
            device: `cpu` (the default), `cuda`, `cuda:N`, or `auto`.
            threads: matrices at a time.
            progress: told about the bytes as they pass.

    Raises:
        OptionError: a choice that names nothing.
        MismatchError: an adapter of another base.
        UnsupportedError: an adapter whose change is no product of factors, such as a DoRA.
        NonFiniteError: NaN or infinity in a matrix.
        OutputError: a picture that exists or cannot be written.
        MissingExtraError: a PNG without matplotlib.
    """
    from surgery.analysis.analyze import AnalyzeOptions
    from surgery.analysis.analyze import analyze as run_analyze

    check_keywords("analyze", keywords, AnalyzeKeywords)
    run, options = split(keywords)
    plot = options.pop("plot", None)
    found = resolved("BASE", base, adapters)
    return run_analyze(*found, AnalyzeOptions(**options), run.settings, plot, run.overwrite)


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

    check_keywords("estimate", keywords, EstimateKeywords)
    given: dict[str, Any] = dict(keywords)
    method = {name: given.pop(name) for name in MethodKeywords.__optional_keys__ if name in given}
    return run_estimate(*resolve_config(checkpoint), EstimateOptions(method=MethodOptions(**method), **given))
