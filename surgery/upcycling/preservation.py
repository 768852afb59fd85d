"""How far a mixture is from its dense model as a function: both are run in float32, one after the other.

**The bound.** With identical experts under weights that sum to one, a mixture computes sum_k w_k f(x) where the dense
model computes f(x), so the two differ by rounding only. Let u = 2^-24 be the unit roundoff of float32. In each of L
layers, a dot product over n terms (n is the larger of hidden and intermediate size) may be summed in another order,
because an expert sees other batches of tokens than the MLP did; rounding errors of that kind are independent and add up
to about sqrt(n) u of the result's norm. The weights add a few u. The layers' errors are independent of each other, too:
sqrt(L n) u in all. The layers that follow, the norms above all, can amplify it; a factor of 16 leaves room. So

    || mixture - dense || / || dense ||  <=  16 sqrt(L n) 2^-24,

which is 1e-5 for a tiny model and 6e-4 for one of 8 billion parameters. Scales do not matter, as both sides are norms.
Some models amplify more. Where the difference is above that, the dense model is run in float64, too, and the bound is
16 times its own distance from it if that is larger: what float32 does to the dense model it may do to the mixture.
What the bound is there to find is far above it: combine weights that do not sum to one change the logits by 0.1 to 1,
one wrong expert by 1e-2 or more, a rounding to bfloat16 on the way by 4e-3.

Small experts (`granular:G`) have their last matrix multiplied by G. That is exact unless G is no power of two; then
each weight is rounded once more in the stored dtype, with unit roundoff v, and 16 sqrt(L) v is added.

**Digits.** Passes run on one thread of torch, so that the numbers do not depend on how many there are.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.errors import InputError, IntegrityError, MissingExtraError, OptionError
from surgery.execute import Progress, one_torch_thread
from surgery.upcycling.memory import free_memory
from surgery.upcycling.planning import Upcycling
from surgery.upcycling.report import ExpertLoad, PreservationReport, UpcycleReport

if TYPE_CHECKING:
    import torch

    from surgery.ops.running import Inputs, Loaded

_UNIT_ROUNDOFF = 2.0**-24
_SAFETY = 16
# Positions whose logits are kept and compared: with a vocabulary of 150,000 that is 77 MB.
_COMPARED = 128
# Of the memory that is free, what may be taken without being asked.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True)
class Verification:
    """That the output is to be measured, and how.

    Attributes:
        dense: the folder of the dense model.
        text: a file to measure the loss on.
        bound: what the relative difference may be, where rounding alone makes one.
        nbytes: memory that it takes, about.
        asked_for: whether somebody insists; else a model that cannot be run is told about and not refused.
        class_name: what to run a checkpoint as whose config names no class.
    """

    dense: Path
    text: Path | None
    bound: float | None
    nbytes: int
    asked_for: bool
    class_name: str = ""


def arrange(
    checkpoint: Checkpoint,
    needed: int,
    bound: float | None,
    verify: bool | None,
    text: str | os.PathLike[str] | None,
    class_name: str = "",
) -> Verification | str:
    """Decide whether to measure the output; if not, why not, in a sentence, or nothing where nobody wants it.

    Args:
        checkpoint: the model that the output is compared with.
        needed: bytes of memory that it takes, see `memory_needed`.
        bound: what the relative difference may be, where rounding alone makes one.
        verify: True forces, False forbids; None measures what fits in memory and can be run.
        text: a file to measure the loss on, which asks for measuring.
        class_name: what to run the checkpoint as if its config names no class.

    Raises:
        OptionError: a text, and no measuring.
        InputError: measuring is asked for, and the dense model cannot be run from where it is, or the text not be read.
        MissingExtraError: measuring is asked for, and transformers is not installed.
    """
    from surgery.ops.running import is_installed, transformers_module

    if text is not None and verify is False:
        raise OptionError("--text goes with --verify, which measures the loss on it.")
    if verify is False:
        return ""
    asked_for = verify is True or text is not None
    dense = checkpoint.path
    reason = ""
    if dense is None or not dense.is_dir():
        reason = f"{checkpoint.label} is not a folder on this disk, which is what transformers can run"
        if asked_for:
            raise InputError(f"{reason}; pull it first, or leave --verify out.")
    elif not is_installed():
        if asked_for:
            raise MissingExtraError("transformers", "train")
        reason = "transformers is not installed (`pip install 'checkpoint-surgery[train]'`)"
    elif not asked_for and needed > _SHARE_OF_MEMORY * (free := free_memory()):
        reason = f"that takes about {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"
    if reason:
        return f"The difference from the dense model was not measured: {reason}. --verify insists."
    assert dense is not None
    if asked_for:
        transformers_module()
    source = Path(text) if text is not None else None
    if source is not None:
        _check_text(source, checkpoint)
    return Verification(dense, source, bound, needed, asked_for, class_name)


def _check_text(text: Path, checkpoint: Checkpoint) -> None:
    from surgery.ops.running import TOKENIZER_FILES

    try:
        with open(text, "rb") as file:
            file.read(1)
    except OSError as error:
        raise InputError(f"{text} cannot be read: {error.strerror}.") from error
    if not set(TOKENIZER_FILES) & set(checkpoint.folder.names()):
        raise InputError(f"{text} cannot be used: {checkpoint.label} has no tokenizer; copy its files there.")


def relative_bound(work: Upcycling) -> float:
    """What the relative difference of logits may be where the mixture is the dense function; derived above."""
    layers = len(work.mlps)
    terms = max(max(mlp.hidden, mlp.inner) for mlp in work.mlps)
    bound = math.sqrt(layers * terms) * _UNIT_ROUNDOFF
    groups = {mixture.groups for mixture in work.mixtures.values()}
    if any(count & (count - 1) for count in groups):
        bound += math.sqrt(layers) * max(_roundoff(mlp.output.dtype.name) for mlp in work.mlps)
    return _SAFETY * bound


def _roundoff(dtype: str) -> float:
    """Half of the distance from 1 to the next number of a stored dtype."""
    return {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}.get(dtype, 2.0**-3)


def measured(
    report: UpcycleReport, verification: Verification | str, output: Path, progress: Progress
) -> tuple[UpcycleReport, tuple[str, ...]]:
    """A report with what was measured on the mixture in `output`, and the notes that are due where nothing was.

    Raises what `measure` raises, but `InputError` only where measuring was asked for.
    """
    if isinstance(verification, str):
        return report, (verification,) if verification else ()
    try:
        return replace(report, preservation=measure(verification, output, progress)), ()
    except (InputError, MissingExtraError) as error:
        if verification.asked_for:
            raise
        return report, (f"The difference from the dense model was not measured: {error}",)


def measure(verification: Verification, output: Path, progress: Progress) -> PreservationReport:
    """Run the dense model and the mixture in `output`, and compare.

    Raises:
        InputError: transformers cannot run the dense model, or there is not the memory, or its outputs are no numbers.
        IntegrityError: transformers cannot run the mixture, or the two differ where theory says that they do not.
    """
    importlib.import_module("torch")  # imported here, so that the bar below does not stand still meanwhile
    places = [verification.dense, output]
    sizes = [_size(place) for place in places]
    progress.start(sum(sizes), "verifying")
    try:
        dense = _run(verification.dense, verification, InputError)
        progress.advance(sizes[0])
        # The same inputs: which class reads a tokenizer's files depends on the model type beside them.
        mixture = _run(output, verification, IntegrityError, dense.inputs, verification.dense)
        progress.advance(sizes[1])
    finally:
        progress.stop()
    return _compared(verification, dense, mixture)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


@dataclass(frozen=True)
class _Found:
    """What a model says.

    Attributes:
        logits: [positions, outputs], float32, of the first of its `positions`.
        loss: the sum over the `tokens` that it foretells, in nats.
        inputs: what it was run on.
    """

    logits: torch.Tensor
    positions: int
    loss: float
    tokens: int
    inputs: Inputs
    loads: tuple[ExpertLoad, ...]
    unexpected: frozenset[str]


def _run(
    folder: Path,
    verification: Verification,
    error: type[InputError | IntegrityError],
    inputs: Inputs | None = None,
    base: Path | None = None,
) -> _Found:
    """Load the model of a folder, run it, and let go of it.

    Args:
        folder: of the model.
        verification: what to run it on, unless `inputs` say.
        error: what a failure means.
        inputs: those of the model that it is compared with.
        base: where the dense weights are, of a folder that has none of its own.
    """
    from surgery.ops.running import inputs_of, load, quietly
    from surgery.upcycling.loads import Watch

    try:
        loaded = load(folder, base, class_name=verification.class_name)
        _check_complete(loaded, folder, error)
        inputs = inputs or inputs_of(loaded.model, folder, verification.text)
        watch = Watch(loaded.model)
        with one_torch_thread(), quietly():
            logits, positions, loss, tokens = _passes(loaded.model, inputs)
    except (IntegrityError, MissingExtraError):
        raise
    except InputError as failure:
        if error is InputError:
            raise
        raise error(
            f"The mixture cannot be run by transformers, and nothing was written: {failure} This is a fault of this "
            "tool or of transformers; --no-verify goes without."
        ) from failure
    except Exception as failure:  # whatever transformers and torch may raise
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0].rstrip(".")
        if isinstance(failure, MemoryError) or "allocate memory" in reason:
            error = InputError
        raise error(
            f"{_name(folder, error)} cannot be run by transformers ({reason}); --no-verify goes without."
        ) from failure
    found = _Found(logits, positions, loss, tokens, inputs, watch.loads(), loaded.unexpected)
    del loaded, watch
    gc.collect()  # of two models one is in memory at a time
    return found


def _name(folder: Path, error: type[Exception]) -> str:
    return "The mixture" if error is IntegrityError else f"{folder}"


def _check_complete(loaded: Loaded, folder: Path, error: type[InputError | IntegrityError]) -> None:
    if loaded.missing:
        missing = sorted(loaded.missing)
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise error(
            f"{_name(folder, error)} has no {missing[0]!r}{rest}, which transformers fills with random numbers, so "
            "that there is nothing to compare."
        )


def _passes(model: Any, inputs: Inputs) -> tuple[torch.Tensor, int, float, int]:
    """Every forward pass: the first logits of how many, and the summed loss of how many tokens."""
    import torch
    from torch.nn.functional import cross_entropy

    from surgery.ops.running import first_output, foretells_tokens

    kept: list[torch.Tensor] = []
    positions, loss, tokens = 0, 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(inputs.batches):
            outputs = first_output(model(**batch))
            outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
            outputs = outputs.reshape(-1, outputs.shape[-1])
            positions += len(outputs)
            room = _COMPARED - sum(len(part) for part in kept)
            kept.append(outputs[:room].clone())
            if inputs.targets and foretells_tokens(model):
                targets = inputs.targets[number].flatten()
                loss += float(cross_entropy(outputs[: len(targets)], targets, reduction="sum"))
                tokens += len(targets)
    return torch.cat(kept), positions, loss, tokens


def _own_rounding(verification: Verification, dense: _Found) -> float:
    """How far the dense model in float32 is from itself in float64, of the norm."""
    import torch

    from surgery.ops.running import load, quietly

    model = load(verification.dense, dtype=torch.float64, class_name=verification.class_name).model
    batches = tuple(
        {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        for batch in dense.inputs.batches
    )
    with one_torch_thread(), quietly():
        exact = _passes(model, replace(dense.inputs, batches=batches))[0]
    return float((dense.logits - exact).norm() / exact.norm())


def _compared(verification: Verification, dense: _Found, mixture: _Found) -> PreservationReport:
    """The report; raises where the two differ by more than rounding."""
    if not bool(dense.logits.isfinite().all()):
        raise InputError(
            f"{verification.dense} gives NaN or infinity itself, so that there is nothing to compare with."
        )
    unused = sorted(mixture.unexpected - dense.unexpected)
    if unused:
        raise IntegrityError(
            f"transformers has no use for {unused[0]!r} of the mixture, so that it is lost; nothing was written. This "
            "is a fault of this tool or of transformers: please report it; --no-verify goes without."
        )
    if dense.logits.shape != mixture.logits.shape or not bool(mixture.logits.isfinite().all()):
        raise IntegrityError(
            "The mixture gives NaN, infinity or outputs of another shape where the dense model gives numbers; nothing "
            "was written. --no-verify goes without."
        )
    left, right = dense.logits.double(), mixture.logits.double()
    norm, difference = float(left.norm()), right - left
    distance = float(difference.norm())
    positions, has_loss = len(left), verification.text is not None and dense.tokens > 0
    report = PreservationReport(
        inputs=dense.inputs.described + (f", logits at the first {positions}" if dense.positions > positions else ""),
        largest=float(difference.abs().max()),
        relative=distance / norm if norm else float(distance > 0),
        agreement=float((left.argmax(-1) == right.argmax(-1)).double().mean()),
        bound=verification.bound,
        dense_loss=dense.loss / dense.tokens if has_loss else None,
        loss=mixture.loss / mixture.tokens if has_loss else None,
        loads=mixture.loads,
    )
    if report.bound is not None and report.relative > report.bound:
        # Some models magnify rounding: what it does to the dense model itself says how much.
        report = replace(report, bound=max(report.bound, _SAFETY * _own_rounding(verification, dense)))
    if report.bound is not None and report.relative > report.bound:
        raise IntegrityError(
            f"The mixture differs from the dense model by {report.relative:.2e} of its logits' norm (at most "
            f"{report.largest:.2e}) on {report.inputs}, where rounding explains {report.bound:.2e} at most; nothing "
            "was written. The stored weights, this tool or transformers is at fault: please report it; --no-verify "
            "goes without."
        )
    return report
