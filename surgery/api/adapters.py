"""The verbs of adapter algebra: extract, restore, merge, subtract, switch, combine, resize, convert."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Unpack

from surgery.api.calling import check_keywords, counted, resolved, split
from surgery.keywords import (
    CombineKeywords,
    ConvertKeywords,
    ExtractKeywords,
    MergeKeywords,
    ResizeKeywords,
    SubtractKeywords,
    SwitchKeywords,
    WritingKeywords,
)

if TYPE_CHECKING:
    from surgery.api.calling import AdapterLike, CheckpointLike
    from surgery.reports import CombineReport, ConvertReport, ExtractReport, MergeReport, RestoreReport


@counted
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

    check_keywords("extract", keywords, ExtractKeywords)
    run, options = split({"device": "auto", **keywords})
    return run_extract(resolve_checkpoint(base), resolve_checkpoint(tuned), output, ExtractOptions(**options), run)


@counted
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

    check_keywords("restore", keywords, WritingKeywords)
    found, (opened,) = resolved("BASE", base, (adapter,))
    return run_restore(found, opened, output, split(keywords)[0])


@counted
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

    check_keywords("merge", keywords, MergeKeywords)
    run, options = split(keywords)
    return run_merge(*resolved("BASE", base, adapters), output, MergeOptions(**options), run)


@counted
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

    check_keywords("subtract", keywords, SubtractKeywords)
    run, options = split(keywords)
    return run_subtract(*resolved("MERGED", merged, adapters), output, MergeOptions(**options), run)


@counted
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

    check_keywords("switch", keywords, SwitchKeywords)
    run, options = split(keywords)
    found, (one, other) = resolved("MERGED", merged, (old, new))
    return run_switch(found, one, other, output, MergeOptions(**options), run)


@counted
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
    from surgery.adapter import refuse_virtual_tokens
    from surgery.hub.resolve import resolve_adapter
    from surgery.ops.combine import CombineOptions
    from surgery.ops.combine import combine as run_combine

    check_keywords("combine", keywords, CombineKeywords)
    run, options = split(keywords)
    opened = [resolve_adapter(adapter) for adapter in adapters]
    for one in opened:
        refuse_virtual_tokens(one)
    return run_combine(opened, output, CombineOptions(**options), run)


@counted
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

    check_keywords("resize", keywords, ResizeKeywords)
    run, options = split(keywords)
    return run_resize(resolve_adapter(adapter), output, CombineOptions(**options), run)


@counted
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

    check_keywords("convert", keywords, ConvertKeywords)
    run, options = split(keywords)
    place, bases = resolve_folder(adapter), resolve_bases(base)
    return run_convert(place, bases, output, ConvertOptions(to=to, **options), run)
