"""The verb that trains."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from surgery.api.calling import check_keywords
from surgery.keywords import TrainKeywords

if TYPE_CHECKING:
    from surgery.api.calling import CheckpointLike
    from surgery.training.report import TrainReport
    from surgery.training.starting import Start


def train(
    checkpoint: CheckpointLike,
    *,
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    **keywords: Unpack[TrainKeywords],
) -> TrainReport:
    """Train `checkpoint`, or an adapter of one, on `data`.

    An interrupted run leaves its state beside `output`; the same call goes on from there, bit for bit.

    Args:
        checkpoint: the model, a folder; or the folder of an adapter, which is trained on.
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
            base: the checkpoint that an adapter belongs to which is trained on; by the adapter's own word where it is
                None.
            any_base: take it even if hashes prove that the adapter was made for another.
            base_name: what an adapter calls its base; the name of the checkpoint's folder where it is None.
            steps: of the optimiser; instead of `epochs`.
            epochs: times to go through the data; 1 where neither is given.
            batch_size: examples to a forward pass, on each device.
            gradient_accumulation: forward passes to a step.
            learning_rate: at its highest; the method's own where it is None.
            schedule: how it falls after the warm-up.
            warmup: steps of it; below 1, the share of all steps.
            final_rate: what the rate falls to, as a share of the highest.
            optimizer: `adamw`, or `adamw-8bit` with bitsandbytes.
            beta1: of AdamW.
            beta2: of AdamW.
            epsilon: of AdamW.
            weight_decay: of matrices; vectors and virtual tokens have none.
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
    from surgery.training.recipe import with_recipe
    from surgery.training.run import TrainSettings
    from surgery.training.run import train as run_train
    from surgery.training.work import Silent

    check_keywords("train", keywords, TrainKeywords)
    given: dict[str, Any] = {**keywords, "data": os.fspath(data)}
    if (held_out := keywords.get("eval_data")) is not None:
        given["eval_data"] = os.fspath(held_out)
    recipe = given.pop("recipe", None)
    run = {name: given.pop(name) for name in ("overwrite", "dry_run", "hash", "device") if name in given}
    progress, trackers = given.pop("progress", None) or Silent(), tuple(given.pop("trackers", ()))
    base, any_base = given.pop("base", None), given.pop("any_base", False)
    options = with_recipe(recipe, given)
    settings = TrainSettings(progress=progress, trackers=trackers, **run)
    return run_train(find_start(checkpoint, base, any_base), output, options, settings)


def find_start(reference: CheckpointLike, base: CheckpointLike | None = None, any_base: bool = False) -> Start:
    """Open what is to be trained: a checkpoint, or the folder of an adapter and its base.

    Args:
        reference: what is to be trained.
        base: the checkpoint that an adapter belongs to; found by the name in the adapter where it is None.
        any_base: take a base even if hashes prove that the adapter was made for another.

    Raises:
        InputError: no folder on disk, or no base by the adapter's name.
        OptionError: a base for something that is no adapter.
        MismatchError: the adapter does not fit the base.
    """
    from surgery.checkpoint import Checkpoint
    from surgery.errors import InputError, OptionError
    from surgery.folder import LocalFolder
    from surgery.hub.resolve import adapter_on_disk, is_adapter, resolve_checkpoint, stored
    from surgery.training.starting import adapter_files, holds_method, start_from, start_on

    place = None
    if not isinstance(reference, Checkpoint):
        if holds_method(Path(reference)):
            place = LocalFolder(reference)
        elif is_adapter(reference):
            place = adapter_on_disk(reference)
    if place is None:
        if base is not None or any_base:
            flag = "--any-base" if base is None else "--base"
            raise OptionError(f"{flag} is for an adapter that is trained on, and {reference} is none.")
        return start_from(stored(resolve_checkpoint(reference)))
    if base is None:
        name = adapter_files(place).config.get("base_model_name_or_path")
        try:
            found = stored(resolve_checkpoint(str(name or "")))
        except InputError as error:
            raise InputError(
                f"{place.label} is an adapter of {name!r}, which is not here; name its base with --base CHECKPOINT."
            ) from error
        return start_on(place, found, any_base)
    return start_on(place, stored(resolve_checkpoint(base)), any_base)
