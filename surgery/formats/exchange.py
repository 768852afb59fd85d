"""The neutral form of an adapter: modules with their factors and scales, whatever tool wrote them.

    dW of a module = scale * B A        A: (r, in) or (r, in, *kernel)      B: (out, r) or (out, r, 1, ...)

A module is named as the model has it in memory, within its component: `unet` or `text_encoder` of a pipeline, an empty
string where the adapter is for one model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, SurgeryError, UnsupportedError, several
from surgery.formats.recipes import Recipe, padded, scaled
from surgery.names import natural_key
from surgery.source import Source

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Factors:
    """The LoRA of one module, or of one stack of experts.

    Attributes:
        module: in-memory name; of a stack, the module and the parameter: `model.layers.0.mlp.experts.gate_up_proj`.
        A, B: the factors; of a stack of E experts (E*r, in), expert by expert, and (out, r*E), the expert fastest.
        alpha: the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        rslora: which of the two.
        component: the part of a pipeline that the module belongs to.
        experts: E; 0 for what is not a stack.
        parameter: whether PEFT addresses it as a parameter (`target_parameters`), as it does stacks and routers.
        embedding: A is (r, rows) and B (columns, r), and dW is their product's transpose.
        magnitude: DoRA's m, (out,), or None.
        bias: a bias of B, (out,), or None.
    """

    module: str
    A: Recipe
    B: Recipe
    alpha: float
    rslora: bool = False
    component: str = ""
    experts: int = 0
    parameter: bool = False
    embedding: bool = False
    magnitude: Recipe | None = None
    bias: Recipe | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0] // max(self.experts, 1)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def name(self) -> str:
        """The module with its component."""
        return f"{self.component}.{self.module}" if self.component else self.module


@dataclass(frozen=True)
class Exchange:
    """An adapter in the neutral form.

    Attributes:
        files: where it came from.
        format: `peft`, `kohya`, `diffusers` or `mlx`.
        modules: its factors, in natural order.
        saved: tensors that a PEFT adapter holds whole, by their key in its file.
        config: a PEFT adapter's config; empty for the other formats.
        carried: files that go along, such as a tokenizer.
        notes: what reading it had to assume.
    """

    files: Checkpoint
    format: str
    modules: tuple[Factors, ...]
    saved: Mapping[str, StoredTensor] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    carried: tuple[tuple[str, Source], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.files.label

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(sorted({factors.component for factors in self.modules}))

    def with_modules(self, modules: Iterable[Factors], *notes: str) -> Exchange:
        """The same adapter with other modules, and more to say about them."""
        ordered = tuple(sorted(modules, key=lambda factors: natural_key(factors.name)))
        return replace(self, modules=ordered, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Written:
    """What a format makes of an adapter.

    Attributes:
        file: name of the one weight file.
        tensors: key to recipe.
        metadata: of the weight file.
        files: small files beside it.
        carried: files copied along.
        notes: what was folded, rounded or assumed.
    """

    file: str
    tensors: Mapping[str, Recipe]
    metadata: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    carried: tuple[tuple[str, Source], ...] = ()
    notes: tuple[str, ...] = ()


def most_common(values: Iterable[float]) -> float:
    """The value that occurs most often; of several the largest, so that the order of modules does not matter."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def exact_patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Full names to the values that differ from the default, for PEFT's `rank_pattern` and `alpha_pattern`.

    PEFT reads a key as the end of a module's name. Where a full name is also the end of another one (`proj_out` and
    `blocks.0.proj_out`), a leading `^` ties it to the beginning.
    """
    endings = {name.split(".", depth)[-1] for name in values for depth in range(1, name.count(".") + 1)}
    return {
        f"^{name}" if name in endings else name: value
        for name, value in sorted(values.items(), key=lambda item: natural_key(item[0]))
        if value != default
    }


def pad_ranks(modules: Sequence[Factors], rank: int | None = None) -> tuple[Factors, ...]:
    """Every module at one rank, the largest unless one is given: rows and columns of zeros, dW as it was."""
    most = rank or max(factors.rank for factors in modules)
    return tuple(grown(factors, most) for factors in modules)


def grown(factors: Factors, rank: int) -> Factors:
    """The same dW at a larger rank; alpha grows with it so that the scale stays."""
    if factors.rank == rank:
        return factors
    if factors.experts:
        raise ValueError(f"{factors.module}: a stack of experts is padded expert by expert")
    A = padded(factors.A, (rank, *factors.A.shape[1:]))
    B = padded(factors.B, (factors.B.shape[0], rank, *factors.B.shape[2:]))
    growth = rank / factors.rank
    return replace(factors, A=A, B=B, alpha=factors.alpha * (math.sqrt(growth) if factors.rslora else growth))


def folded(factors: Factors, scale: float) -> Factors:
    """The same dW at another scale: B takes what is missing, in float32 where it has to be multiplied."""
    bias = None if factors.bias is None else scaled(factors.bias, factors.scale / scale)
    B = scaled(factors.B, factors.scale / scale)
    return replace(factors, B=B, bias=bias, alpha=scale * factors.rank, rslora=False)


def refuse(label: str, problems: Sequence[str], kind: type[SurgeryError] = FormatError) -> None:
    """Raise one error for all problems, if there are any."""
    if problems:
        raise kind(several(label, problems), problems)


def refuse_whole_tensors(exchange: Exchange, target: str) -> None:
    """Refuse an adapter that holds more than factors, for a format that has no place for it."""
    whole = sorted(exchange.saved, key=natural_key)
    if whole:
        shown = ", ".join(repr(name) for name in whole[:3]) + (", ..." if len(whole) > 3 else "")
        if all(name.endswith(".base_layer.weight") for name in whole):
            raise UnsupportedError(
                f"{exchange.label} holds weights of its base ({shown}), which {target} has no place for; name the base "
                "with --base: what is the base's own to the bit is left out."
            )
        raise UnsupportedError(
            f"{exchange.label} holds {len(whole)} tensors whole ({shown}), which {target} has no place for; merge it "
            "into its base instead, with `surgery merge`."
        )


def refuse_parts(exchange: Exchange, target: str, parts: Collection[str]) -> None:
    """Refuse modules with parts that a format cannot express: `embedding`, `experts`, `magnitude`, `bias`."""
    words = {
        "embedding": "a LoRA on an embedding",
        "experts": "a LoRA on fused experts",
        "magnitude": "a DoRA magnitude",
        "bias": "a bias of lora_B",
    }
    problems = [
        f"{exchange.label}: {factors.name!r} has {words[part]}, which {target} has no place for."
        for part in parts
        for factors in exchange.modules
        if getattr(factors, part)
    ]
    refuse(f"{exchange.label} as {target}", problems, UnsupportedError)


def check_shapes(label: str, modules: Iterable[Factors]) -> None:
    """Refuse factors whose ranks disagree, and those that are not floats."""
    problems = []
    for factors in modules:
        A, B = factors.A, factors.B
        if len(A.shape) < 2 or len(B.shape) < 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
            problems.append(f"{label}: {factors.name!r} has factors of shape {list(A.shape)} and {list(B.shape)}.")
        elif not (A.dtype.arithmetic and B.dtype.arithmetic):
            problems.append(f"{label}: {factors.name!r} has factors of dtype {A.dtype} and {B.dtype}, expected floats.")
        elif not math.isfinite(factors.alpha):
            problems.append(f"{label}: the alpha of {factors.name!r} is {factors.alpha}, expected a number.")
    refuse(label, problems)
