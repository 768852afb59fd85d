"""`verify`: does an output still match its provenance, and are two checkpoints the same bytes, or the same function.

Only `compare_logits` runs a model, with transformers, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from surgery.checkpoint import Checkpoint, expect, expect_nothing
from surgery.errors import InputError
from surgery.execute import Settings, execute
from surgery.hashing import HashBook, hash_source, hash_tensor
from surgery.ops.factor import CompareStep
from surgery.ops.running import first_output, load, quietly, random_inputs
from surgery.pairing import TensorPair
from surgery.plan import Plan
from surgery.provenance import FILE_NAME, hash_files, read_provenance
from surgery.writer import NullStaging

# A card is for people, who edit it, and `push` writes a section into it: neither changes what the output is.
_CARD = "README.md"


@dataclass(frozen=True)
class VerifyReport:
    """Whether an output is what its `surgery.json` says.

    Attributes:
        tensors, files: how many were hashed and found equal.
        problems: one sentence for everything that is not as it should be; empty if all is well.
    """

    label: str
    operation: str
    tensors: int
    files: int
    problems: tuple[str, ...]
    kind: str = field(default="provenance", kw_only=True)

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class Difference:
    """A tensor that differs. `relative` is || right - left || / || left ||, or None where that is no number."""

    name: str
    relative: float | None


@dataclass(frozen=True)
class LogitReport:
    """How far two models are apart on the same inputs, in float32.

    Attributes:
        inputs: what they were run on.
        largest: the largest absolute difference of an output.
        relative: || right - left || / || left || over all outputs.
        agreement: share of positions with the same largest output.
    """

    inputs: str
    largest: float
    relative: float
    agreement: float


@dataclass(frozen=True)
class CompareReport:
    """How two checkpoints differ.

    Attributes:
        equal: tensors with the same bytes (or values, where the dtypes differ).
        different: the others that both have, the largest difference first.
        left_only, right_only: names that only one has.
        logits: the difference as functions, if that was asked for.
    """

    left: str
    right: str
    equal: int
    different: tuple[Difference, ...]
    left_only: tuple[str, ...]
    right_only: tuple[str, ...]
    logits: LogitReport | None = None
    kind: str = field(default="comparison", kw_only=True)

    @property
    def passed(self) -> bool:
        """Whether the two are the same in every tensor."""
        return not (self.different or self.left_only or self.right_only)

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"passed": self.passed}


def verify_output(checkpoint: Checkpoint, settings: Settings) -> VerifyReport:
    """Hash every tensor and file of an output again and compare with its `surgery.json`."""
    content = read_provenance(checkpoint.folder)
    if content is None:
        raise InputError(f"{checkpoint.label} has no {FILE_NAME}, so there is nothing to verify it against.")
    outputs, files = content.get("outputs"), content.get("files")
    if not isinstance(outputs, dict) or not any(isinstance(e, dict) and "blake3" in e for e in outputs.values()):
        raise InputError(f"{checkpoint.label} was written with --no-hash; its {FILE_NAME} holds no hashes to verify.")
    problems: list[str] = []
    good = 0
    settings.progress.start(checkpoint.nbytes, "verifying")
    expect(checkpoint.tensors[name] for name in outputs if name in checkpoint.tensors)
    try:
        for name, expected in outputs.items():
            tensor = checkpoint.tensors.get(name)
            expected = expected if isinstance(expected, dict) else {}
            if tensor is None:
                problems.append(f"Tensor {name!r} is missing.")
            elif (tensor.dtype.name, list(tensor.shape)) != (expected.get("dtype"), expected.get("shape")):
                problems.append(
                    f"Tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {expected.get('dtype')} "
                    f"{expected.get('shape')}."
                )
            elif hash_tensor(tensor, settings.progress.advance) != expected.get("blake3"):
                problems.append(f"Tensor {name!r} in {tensor.source.name} does not have the hash on record.")
            else:
                good += 1
    finally:
        settings.progress.stop()
        expect_nothing(checkpoint.tensors.values())
    problems += [f"Tensor {name!r} is not on record." for name in checkpoint.tensors if name not in outputs]
    good_files, file_problems = _verify_files(checkpoint, files if isinstance(files, dict) else {})
    return VerifyReport(checkpoint.label, str(content.get("operation")), good, good_files, (*problems, *file_problems))


def _verify_files(checkpoint: Checkpoint, expected: Mapping[str, object]) -> tuple[int, list[str]]:
    if checkpoint.path is None:
        found = _hash_folder(checkpoint)
    elif checkpoint.path.is_dir():
        found = hash_files(checkpoint.path, checkpoint.weights.names)
    else:
        return 0, []
    problems = []
    for name, digest in expected.items():
        if name not in found:
            problems.append(f"File {name} is missing.")
        elif found[name] != digest and name != _CARD:
            problems.append(f"File {name} does not have the hash on record.")
    good = len(expected) - len(problems)
    # What a version control or a download keeps for itself is nobody's code or text.
    known = {*expected, _CARD}
    strangers = [name for name in found if name not in known and not any(p.startswith(".") for p in name.split("/"))]
    return good, problems + [f"File {name} is not on record." for name in strangers]


def _hash_folder(checkpoint: Checkpoint) -> dict[str, str]:
    """As `hash_files`, of a folder that is not on disk."""
    records = [f"{name}/{file}" for name in ("undo", "exact") for file in checkpoint.record(name)]
    skipped = {*checkpoint.weights.names, FILE_NAME}
    names = [name for name in (*checkpoint.folder.names(), *records) if name not in skipped]
    return {name: hash_source(checkpoint.folder.open(name)) for name in names}


def compare(left: Checkpoint, right: Checkpoint, settings: Settings) -> CompareReport:
    """Compare two checkpoints tensor by tensor, under their stored names."""
    pairs = {
        name: TensorPair(name, "", tensor, right.tensors[name])
        for name, tensor in left.tensors.items()
        if name in right.tensors
    }
    alike = [pair for pair in pairs.values() if pair.same_shape]
    plan = Plan(tuple(CompareStep(pair) for pair in alike))
    found = execute(plan, NullStaging(), settings, HashBook(False), "comparing").reports()
    different = []
    for name, pair in pairs.items():
        report = found.get(f"compare {name}")
        if report is None or report["changed"]:
            different.append(Difference(name, _relative(report) if pair.same_shape and report else None))
    return CompareReport(
        left=left.label,
        right=right.label,
        equal=len(pairs) - len(different),
        different=tuple(sorted(different, key=_order)),
        left_only=tuple(name for name in left.tensors if name not in right.tensors),
        right_only=tuple(name for name in right.tensors if name not in left.tensors),
    )


def _order(difference: Difference) -> float:
    """Those that cannot be compared first, then the largest difference."""
    return -math.inf if difference.relative is None else -difference.relative


def _relative(report: Mapping[str, object]) -> float | None:
    base, energy = report.get("base"), report.get("energy")
    if not isinstance(base, float) or not isinstance(energy, float) or base <= 0:
        return None
    return math.sqrt(energy / base)


def with_logits(report: CompareReport, left: Checkpoint, right: Checkpoint, seed: int = 0) -> CompareReport:
    """A comparison with the difference as functions added to it."""
    return replace(report, logits=compare_logits(_folder(left), _folder(right), seed))


def _folder(checkpoint: Checkpoint) -> Path:
    if checkpoint.path is None or not checkpoint.path.is_dir():
        raise InputError(f"{checkpoint.label} is not a folder on disk; only such a checkpoint can be run.")
    return checkpoint.path


def compare_logits(left: Path, right: Path, seed: int = 0) -> LogitReport:
    """Run both checkpoints on the same seeded random inputs, in float32 on the CPU, and compare what comes out."""
    import torch

    outputs = []
    described = ""
    for path in (left, right):
        model = load(path).model
        inputs, described = random_inputs(model, seed)
        with torch.no_grad(), quietly():
            outputs.append(first_output(model(**inputs)).to(torch.float64))
        del model
    if outputs[0].shape != outputs[1].shape:
        raise InputError(
            f"The outputs of {left} and {right} have shapes {list(outputs[0].shape)} and {list(outputs[1].shape)}."
        )
    difference = outputs[1] - outputs[0]
    norm = float(outputs[0].norm())
    return LogitReport(
        inputs=described,
        largest=float(difference.abs().max()),
        relative=float(difference.norm()) / norm if norm else math.inf,
        agreement=float((outputs[0].argmax(-1) == outputs[1].argmax(-1)).double().mean()),
    )
