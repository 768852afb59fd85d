"""Routed LoRA experts over one frozen MLP (MixLoRA, arXiv:2404.15159): routers and factors alone, in a small file.

The format is that of `surgery.moe.routed_lora`; its names are transformers' in-memory ones. B is zero, so that every
expert is the MLP; A is drawn as the modelling code draws it, N(0, 1 / rank).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.dtypes import F32
from surgery.errors import InputError, UnsupportedError
from surgery.families import family_of
from surgery.folder import LocalFolder
from surgery.layout import TensorSpec
from surgery.moe_families import UPCYCLED_FAMILIES, UpcycledFamily
from surgery.names import plain
from surgery.plan import Step
from surgery.upcycling.mixture import Mixture
from surgery.upcycling.mlps import Mlp
from surgery.upcycling.routers import RouterStep, ZerosStep


def check_family(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedError` for a dense model whose MLPs cannot have routed LoRA experts."""
    family = UPCYCLED_FAMILIES.get(checkpoint.model_type)
    if family is None:
        able = ", ".join(name for name, known in UPCYCLED_FAMILIES.items() if known.takes_lora)
        raise UnsupportedError(
            f"{checkpoint.label} is of type {plain(checkpoint.model_type)}, which cannot have routed LoRA experts; "
            f"expected one of {able}, or --kind copy."
        )
    if not family.takes_lora:
        raise UnsupportedError(
            f"{checkpoint.label} is of type {family.model_type}, which cannot have routed LoRA experts: they need "
            "an MLP that is one module, and in BERT and RoBERTa it is two; use --kind copy."
        )


def where_base_is(checkpoint: Checkpoint, target: Path) -> dict[str, object]:
    """The fields of `config.json` that name the dense weights, for an output at `target`.

    A folder on disk is named relative to the output, so that the two can be moved together; a model on a Hub by its id
    and revision. Raises `InputError` for a lone weight file, which transformers cannot load.
    """
    revision = None
    if checkpoint.path is None or (isinstance(checkpoint.folder, LocalFolder) and checkpoint.folder.is_cache):
        name, revision = checkpoint.provenance["source"], checkpoint.provenance.get("revision")
    elif checkpoint.path.is_dir():
        name = os.path.relpath(checkpoint.path.resolve(), target.parent.resolve() / target.name)
    else:
        raise InputError(f"{checkpoint.path} is a file; with --kind lora give the folder that the base is loaded from.")
    return {"base_model_name_or_path": name, "base_model_revision": revision}


def mixture_path(family: UpcycledFamily, architecture: str, mlp: Mlp) -> str:
    """The in-memory path of the mixture in place of an MLP."""
    stack = family.stacks[mlp.stack]
    layer = stack.layer.format(layer=mlp.number)
    return family_of(family.model_type).in_memory(f"{family.prefix_of(architecture)}{layer}.{stack.mixture}")


def factor_steps(path: str, mlp: Mlp, mixture: Mixture, rank: int, seed: int) -> Iterator[Step]:
    """A (rank, inputs) and B (outputs, rank) of every expert and linear map; float32, as adapters have them."""
    for expert in range(mixture.experts):
        for role, leaf in mlp.leaves.items():
            rows, columns = mlp.parts[f"{role}.weight"].shape
            if leaf.transposed:
                rows, columns = columns, rows
            name = f"{path}.experts.{expert}.{leaf.expert}"
            # Drawn as a router is: a matrix of normal numbers, with a random stream of its own.
            yield RouterStep(TensorSpec(f"{name}.lora_A.weight", F32, (rank, columns)), 1 / rank, 1, seed)
            yield ZerosStep(TensorSpec(f"{name}.lora_B.weight", F32, (rows, rank)))


def factor_parameters(mlp: Mlp, rank: int) -> int:
    """Numbers in the factors of one expert."""
    return sum(rank * sum(mlp.parts[f"{role}.weight"].shape) for role in mlp.leaves)
