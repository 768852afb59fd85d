"""The feed-forward blocks of a dense checkpoint, found by the names that its family stores them under."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, UnsupportedError, several
from surgery.names import expert_of, natural_key, plain

# Model types whose feed-forward block is down(act(gate(x)) * up(x)) under the names of Llama.
GATED_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "ernie4_5", "hunyuan_v1_dense", "qwen3_5_text",
)  # fmt: skip
GATE, UP, DOWN = "gate_proj.weight", "up_proj.weight", "down_proj.weight"


@dataclass(frozen=True)
class DenseFamily:
    """Where a family keeps its feed-forward blocks.

    Attributes:
        pattern: matches a stored parameter of one, in full; groups `module` (the block), `layer`, `leaf`, and `stack`
            where there are two.
        stack: of a family that has one: `encoder` or `decoder`.
    """

    pattern: re.Pattern[str]
    stack: str = "decoder"


_GATED = DenseFamily(
    re.compile(
        r"(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.mlp)\.(?P<leaf>(?:gate_proj|up_proj|down_proj)\.(?:weight|bias))"
    )
)
DENSE_FAMILIES: dict[str, DenseFamily] = dict.fromkeys(GATED_TYPES, _GATED)


@dataclass(frozen=True)
class Mlp:
    """One feed-forward block.

    Attributes:
        stack: `encoder` or `decoder`.
        layer: zero-based.
        module: the stored path of the block: `model.layers.3.mlp`.
        leaves: its parameters by the rest of their names: `gate_proj.weight`.
    """

    stack: str
    layer: int
    module: str
    leaves: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def parent(self) -> str:
        """The stored path of the layer."""
        return self.module.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.leaves.values())

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.leaves.values())


def find_mlps(checkpoint: Checkpoint) -> tuple[Mlp, ...]:
    """Every feed-forward block, in order of stack and layer.

    Raises `UnsupportedError` for a family without a row in the table and for a mixture of experts, `FormatError` for
    layers that are not there or differ from each other in shape.
    """
    family = DENSE_FAMILIES.get(checkpoint.model_type)
    if any(expert_of(name) is not None or ".experts." in name for name in checkpoint.tensors):
        raise UnsupportedError(
            f"{checkpoint.label} is a mixture of experts already; `surgery dense` makes a dense checkpoint of it."
        )
    if family is None:
        known = ", ".join(DENSE_FAMILIES)
        raise UnsupportedError(
            f"{checkpoint.label} is of type {plain(checkpoint.model_type or 'unknown')!r}, for whose feed-forward "
            f"blocks no names are known; expected one of {known}."
        )
    found: dict[tuple[str, int, str], dict[str, StoredTensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if (match := family.pattern.fullmatch(name)) is not None:
            stack = match.groupdict().get("stack") or family.stack
            found.setdefault((stack, int(match["layer"]), match["module"]), {})[match["leaf"]] = tensor
    mlps = tuple(
        Mlp(stack, layer, module, dict(sorted(leaves.items(), key=lambda item: natural_key(item[0]))))
        for (stack, layer, module), leaves in sorted(found.items())
    )
    problems = [*_problems(checkpoint, mlps)]
    if problems:
        raise FormatError(several(f"the layers of {checkpoint.label}", problems), problems)
    return mlps


def _problems(checkpoint: Checkpoint, mlps: tuple[Mlp, ...]) -> Iterator[str]:
    if not mlps:
        yield (
            f"{checkpoint.label} says that it is a {plain(checkpoint.model_type)}, but no feed-forward block of one is "
            "stored in it; give the whole model."
        )
        return
    for stack in dict.fromkeys(mlp.stack for mlp in mlps):
        own = [mlp for mlp in mlps if mlp.stack == stack]
        numbers = [mlp.layer for mlp in own]
        if numbers != list(range(len(own))):
            missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
            yield (
                f"{checkpoint.label} has {len(own)} feed-forward blocks up to layer {max(numbers)} of its {stack}; "
                f"{f'layers {missing} are missing' if missing else 'some layers have two'}."
            )
        shapes = _shapes(own[0])
        for mlp in own[1:]:
            if _shapes(mlp) != shapes:
                yield (
                    f"{mlp.module!r} of {checkpoint.label} has {_shapes(mlp)}, expected {shapes} as in layer 0; a "
                    "mixture needs layers of one shape."
                )


def _shapes(mlp: Mlp) -> dict[str, tuple[int, ...]]:
    return {leaf: tensor.shape for leaf, tensor in mlp.leaves.items()}
