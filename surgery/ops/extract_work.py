"""What `extract` decides before any data are read: what is factored, what compared, what has no counterpart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import BY_NAME
from surgery.errors import MismatchError, OptionError, several
from surgery.ops.extract_options import ExtractOptions
from surgery.ops.factor import CompareStep, FactorStep
from surgery.ops.kinship import note_other_base
from surgery.pairing import Pairing, SitePair, TensorPair, pair, refuse_quantised
from surgery.peft_format import factor_keys
from surgery.plan import Plan, Step
from surgery.reports import PlannedAdapter
from surgery.sites import TARGETS, Kind, select
from surgery.source import read_bytes

# A base and its fine-tune point the same way; the weights of unrelated models are as good as orthogonal.
_PROBED_SITES = 8
_LEAST_COSINE = 0.5
# What a tensor takes in a header, at most, besides its name.
_HEADER_ENTRY = 120


@dataclass(frozen=True)
class Work:
    """Everything that is decided before any data are read.

    `whole` are parameters without a counterpart to compare with: new in TUNED, or grown.
    """

    base: Checkpoint
    tuned: Checkpoint
    options: ExtractOptions
    factored: Mapping[str, SitePair]
    compared: Mapping[str, TensorPair]
    whole: Mapping[str, tuple[StoredTensor, str]]
    notes: tuple[str, ...]


def prepare(base: Checkpoint, tuned: Checkpoint, options: ExtractOptions) -> Work:
    """Pair the two checkpoints and decide what becomes of each parameter; raises all that there is to refuse."""
    refuse_quantised(base)
    refuse_quantised(tuned)
    paired = pair(base, tuned)
    chosen, unmatched = select({name: found.right for name, found in paired.sites.items()}, options.targets)
    factored = {name: paired.sites[name] for name in chosen if _is_arithmetic(paired.sites[name])}
    compared = dict(paired.tensors)
    for name, found in paired.sites.items():
        if name not in factored:
            compared |= {one.name: one for one in _as_tensors(found)}
    whole = {name: (tensor, "only in TUNED") for name, tensor in paired.right_only.items()}
    if unmatched and paired.sites:
        strangers = [
            f"--targets names {item!r}, which matches no module of {tuned.label}; name {TARGETS}; the suffixes are "
            f"{_endings(paired)}."
            for item in unmatched
        ]
        raise OptionError(several("--targets", strangers), strangers)
    problems: list[str] = []
    grown: list[str] = []
    for other in [one for one in compared.values() if not one.same_shape]:
        del compared[other.name]
        if _has_grown(other) and options.save_residual:
            whole[other.name] = (other.right, "another number of rows")
        elif options.exact and len(other.left.shape) > 1 and other.left.shape[1:] == other.right.shape[1:]:
            grown.append(f"{other.name!r} has another number of rows in TUNED, which only the exact record holds.")
        else:
            problems.append(_shape_problem(other))
    one_sided, notes = _one_sided(paired, options)
    problems += one_sided
    if problems:
        raise MismatchError(several(f"the pair {base.label} and {tuned.label}", problems), problems)
    notes = (*notes, *grown, *note_other_base(base, tuned))
    return Work(base, tuned, options, factored, compared, whole, notes)


def _is_arithmetic(found: SitePair) -> bool:
    return all(tensor.dtype.arithmetic for tensor in (*found.left.tensors, *found.right.tensors))


def _as_tensors(found: SitePair) -> list[TensorPair]:
    """A site without factors as parameters to compare: a layer's weight, or each stored piece of a stack."""
    site = found.right
    pieces = list(zip(found.left.tensors, site.tensors, strict=False))
    if len(pieces) == 1:
        name = site.name if site.kind is Kind.PARAMETER else f"{site.name}.weight"
        return [TensorPair(name, site.part, *pieces[0])]
    return [TensorPair(f"{site.name}[{number}]", site.part, *piece) for number, piece in enumerate(pieces)]


def _endings(paired: Pairing) -> str:
    endings = sorted({name.rpartition(".")[2] for name in paired.sites})
    return ", ".join(endings[:12]) + (", ..." if len(endings) > 12 else "")


def _has_grown(found: TensorPair) -> bool:
    left, right = found.left.shape, found.right.shape
    return found.part in ("embeddings", "head") and len(left) == len(right) == 2 and left[1] == right[1]


def _shape_problem(found: TensorPair) -> str:
    left, right = list(found.left.shape), list(found.right.shape)
    if _has_grown(found):
        return (
            f"The vocabulary of {found.name!r} went from {left[0]} to {right[0]} rows, which no LoRA can carry; "
            "pass --save-residual to store the new matrix whole."
        )
    return f"Tensor {found.name!r} has shape {left} in BASE and {right} in TUNED; is this the right base?"


def _one_sided(paired: Pairing, options: ExtractOptions) -> tuple[list[str], tuple[str, ...]]:
    """Sentences about tensors found in one checkpoint only: those that refuse the pair, and those that may pass."""
    base_only = [f"Tensor {name!r} is in BASE and not in TUNED" for name in paired.left_only]
    tuned_only = [f"Tensor {name!r} is in TUNED and not in BASE" for name in paired.right_only]
    if options.allow_missing or options.exact:
        return [], tuple(f"{text}." for text in (*base_only, *tuned_only))
    problems = [f"{text}; pass --allow-missing to extract the rest." for text in base_only]
    if not options.save_residual:
        problems += [f"{text}; pass --save-residual to store it whole, or --allow-missing." for text in tuned_only]
    return problems, ()


def factor_plan(work: Work, ranks: Mapping[str, int]) -> Plan:
    """Factor every site that has a rank, compare everything else. B is divided by what its reader multiplies by."""
    alpha = max(ranks.values(), default=1)
    element = BY_NAME[work.options.svd.dtype].bits // 8
    steps: list[Step] = []
    spare = sum(tensor.nbytes for tensor, _ in work.whole.values()) if work.options.save_residual else 0
    for name, found in work.factored.items():
        if ranks.get(name):
            site = found.right
            rank = min(ranks[name], site.out_features, site.in_features)
            steps.append(FactorStep(found, work.options.svd, rank, alpha / rank))
            spare += 2 * element * len(site.matrices) * rank * (site.out_features + site.in_features)
    lenient = work.options.allow_nonfinite
    steps += [CompareStep(found, lenient) for found in work.compared.values()]
    return Plan(tuple(steps), spare=spare)


def planned_adapter(work: Work) -> PlannedAdapter:
    """The adapter at most: the rank asked for in every module, or as far as `max_rank` and `budget` let it grow."""
    options = work.options
    rank = options.fixed_rank
    sites = {name: found.right for name, found in work.factored.items()}
    count = sum(
        len(site.matrices)
        * min(rank or options.max_rank or site.out_features, site.out_features, site.in_features)
        * (site.out_features + site.in_features)
        for site in sites.values()
    )
    count = min(count, options.budget or count)
    header = sum(len(key) + _HEADER_ENTRY for keys in factor_keys(sites.values()).values() for key in keys)
    return PlannedAdapter(
        len(sites), rank, count, count * BY_NAME[options.svd.dtype].bits // 8 + header + _HEADER_ENTRY
    )


def check_related(work: Work) -> None:
    """Refuse a pair whose weights do not point the same way; the first rows of some modules tell."""
    names = list(work.factored)
    cosines = []
    for name in names[:: max(1, len(names) // _PROBED_SITES)][:_PROBED_SITES]:
        left, right = work.factored[name].left.tensors[0], work.factored[name].right.tensors[0]
        if left.shape == right.shape and (cosine := _cosine(left, right)) is not None:
            cosines.append((cosine, name))
    if cosines and sorted(cosines)[len(cosines) // 2][0] < _LEAST_COSINE:
        cosine, name = min(cosines)
        raise MismatchError(
            f"{work.tuned.label} does not look like a fine-tune of {work.base.label}: their weights of {name!r} have a "
            f"cosine of {cosine:.2f}, expected nearly 1; name the right base, or pass --any-base to extract anyway."
        )


def _cosine(left: StoredTensor, right: StoredTensor) -> float | None:
    """Cosine between the first elements of two stored tensors; None where either is zero or not finite."""
    import torch

    rows = []
    for tensor in (left, right):
        count = min(tensor.numel, 1 << 16)
        data = bytearray(read_bytes(tensor.source, tensor.offset, count * tensor.dtype.bits // 8))
        rows.append(torch.frombuffer(data, dtype=tensor.dtype.to_torch).to(torch.float64))
    dot, norms = float(rows[0] @ rows[1]), float(rows[0].norm() * rows[1].norm())
    return dot / norms if math.isfinite(dot) and 0 < norms < math.inf else None
