"""The verbs of mixtures of experts: upcycle and dense."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from surgery.api.calling import check_keywords, counted, split
from surgery.keywords import DenseKeywords, UpcycleKeywords

if TYPE_CHECKING:
    from surgery.adapter import Adapter
    from surgery.api.calling import CheckpointLike
    from surgery.checkpoint import Checkpoint
    from surgery.upcycling.report import DenseReport, UpcycleReport


@counted
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
    from surgery.hub.resolve import resolve_checkpoint, stored
    from surgery.upcycling.options import UpcycleOptions
    from surgery.upcycling.upcycle import upcycle as run_upcycle

    check_keywords("upcycle", keywords, UpcycleKeywords)
    run, options = split(keywords)
    measured = options.pop("verify", None), options.pop("text", None)
    chosen = UpcycleOptions(**options)
    found = resolve_checkpoint(checkpoint)
    if measured[0] or measured[1] is not None or chosen.start_of_router.path:
        found = stored(found)  # a model is run
    sources = _sources(chosen.expert_init.kind, chosen.expert_init.paths)
    return run_upcycle(found, output, chosen, run, *measured, sources)


def _sources(kind: str, paths: Sequence[str]) -> list[Checkpoint] | list[Adapter]:
    """Open what `--init from:` or `adapters:` names."""
    from surgery.adapter import refuse_virtual_tokens
    from surgery.errors import InputError
    from surgery.hub.resolve import is_adapter, resolve_adapter, resolve_checkpoint

    if kind == "adapters":
        adapters = [resolve_adapter(path) for path in paths]
        for adapter in adapters:
            refuse_virtual_tokens(adapter)
        return adapters
    for path in paths:
        if is_adapter(path):
            raise InputError(f"{path} is an adapter; make experts of adapters with --init adapters:...")
    return [resolve_checkpoint(path) for path in paths]


@counted
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

    check_keywords("dense", keywords, DenseKeywords)
    run, options = split(keywords)
    chosen = DenseOptions(**options)
    return run_dense(resolve_checkpoint(checkpoint), output, chosen, run)
