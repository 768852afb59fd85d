"""The feed-forward blocks of a dense checkpoint, found by the names that its family stores them under."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, InputError, UnsupportedError, several
from surgery.moe_families import UPCYCLED_FAMILIES, Leaf, Stack
from surgery.names import expert_of, plain

# Parameters of a block are called by the role of their leaf: `gate`, `up` and `down` of a gated MLP, else `in`, `out`.
GATE, UP, DOWN = "gate.weight", "up.weight", "down.weight"
_OUTPUTS = ("down", "out")

# Families with a native mixture that are stored as Llama is, and need no modelling code of ours.
_LIKE_LLAMA = ("olmo2", "granite", "ernie4_5", "hunyuan_v1_dense", "qwen3_5_text")

_M2M_LEAVES = (Leaf("fc1", "fc1", "in"), Leaf("fc2", "fc2", "out"))
# M2M100 and NLLB keep their MLPs in the layer itself.
M2M_STACKS = {
    stack: Stack(f"{stack}.layers.{{layer}}", "ffn", _M2M_LEAVES, f"{stack}_layers", causal=stack == "decoder")
    for stack in ("encoder", "decoder")
}

_ENLARGED = (
    "mixtral", "glm4_moe", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "flex_olmo", "granitemoe", "ernie4_5_moe",
    "hunyuan_v1_moe",
)  # fmt: skip


def stacks_of(model_type: str) -> Mapping[str, Stack]:
    """The stacks of layers of a dense family; empty for one that is not known."""
    if model_type in _LIKE_LLAMA:
        return UPCYCLED_FAMILIES["llama"].stacks
    if model_type == "m2m_100":
        return M2M_STACKS
    family = UPCYCLED_FAMILIES.get(model_type)
    return family.stacks if family is not None else {}


def known_types() -> tuple[str, ...]:
    """Every dense model type whose feed-forward blocks can be found."""
    return (*UPCYCLED_FAMILIES, *_LIKE_LLAMA, "m2m_100")


@dataclass(frozen=True)
class Mlp:
    """One feed-forward block.

    Attributes:
        stack: `encoder` or `decoder`.
        number: zero-based layer.
        layer: the stored path of the layer: `model.layers.3`.
        leaves: the linear maps that it has, by role.
        parts: its parameters, by role: `gate.weight`, `out.bias`.
    """

    stack: str
    number: int
    layer: str
    leaves: Mapping[str, Leaf] = field(repr=False)
    parts: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.parts.values())

    @property
    def output(self) -> StoredTensor:
        """The weight that leads out of the block."""
        return next(self.parts[f"{role}.weight"] for role in _OUTPUTS if f"{role}.weight" in self.parts)

    @property
    def hidden(self) -> int:
        """Size of what goes in and comes out."""
        return self.output.shape[1 - self.output_axis]

    @property
    def inner(self) -> int:
        """The intermediate size."""
        return self.output.shape[self.output_axis]

    @property
    def output_axis(self) -> int:
        """The dimension of `output` that counts the intermediate units."""
        role = next(role for role in _OUTPUTS if role in self.leaves)
        return 0 if self.leaves[role].transposed else 1

    def inner_axis(self, part: str) -> int | None:
        """The dimension of a parameter that counts the intermediate units; None for the bias of the output."""
        role, _, kind = part.partition(".")
        if role in _OUTPUTS:
            return self.output_axis if kind == "weight" else None
        return 1 - self.output_axis if kind == "weight" else 0


def find_mlps(checkpoint: Checkpoint) -> tuple[Mlp, ...]:
    """Every feed-forward block, in order of stack and layer.

    Raises `UnsupportedError` for a family without a row in the table and for a mixture of experts, `FormatError` for
    layers that are not there or differ from each other in shape.
    """
    if any(expert_of(name) is not None or ".experts." in name for name in checkpoint.tensors):
        raise UnsupportedError(
            f"{checkpoint.label} is a mixture of experts already, though its config calls it "
            f"{plain(checkpoint.model_type or 'unknown')!r}; mixtures that can be enlarged are those of type "
            f"{', '.join(_ENLARGED)}, and those that ship their code."
        )
    stacks = stacks_of(checkpoint.model_type)
    if not checkpoint.model_type:
        raise InputError(f"{checkpoint.label} has no config.json that names its model_type; give the whole folder.")
    if not stacks:
        raise UnsupportedError(
            f"{checkpoint.label} is of type {plain(checkpoint.model_type or 'unknown')!r}, for whose feed-forward "
            f"blocks no names are known; expected one of {', '.join(known_types())}."
        )
    mlps = [mlp for stack, layout in stacks.items() for mlp in _of_stack(checkpoint, stack, layout)]
    problems = [*_problems(checkpoint, mlps, stacks)]
    if problems:
        raise FormatError(several(f"the layers of {checkpoint.label}", problems), problems)
    return tuple(mlps)


def _of_stack(checkpoint: Checkpoint, stack: str, layout: Stack) -> Iterator[Mlp]:
    leaves = {leaf.dense: leaf for leaf in layout.leaves}
    layer = re.escape(layout.layer).replace(re.escape("{layer}"), r"(?P<number>\d+)")
    names = "|".join(re.escape(name) for name in leaves)
    pattern = re.compile(rf"(?P<layer>(?:\w+\.)?{layer})\.(?P<leaf>{names})\.(?P<kind>weight|bias)")
    found: dict[tuple[int, str], dict[str, StoredTensor]] = {}
    roles: dict[tuple[int, str], dict[str, Leaf]] = {}
    for name, tensor in checkpoint.tensors.items():
        if (match := pattern.fullmatch(name)) is not None:
            key, leaf = (int(match["number"]), match["layer"]), leaves[match["leaf"]]
            found.setdefault(key, {})[f"{leaf.role}.{match['kind']}"] = tensor
            roles.setdefault(key, {})[leaf.role] = leaf
    for number, path in sorted(found):
        yield Mlp(stack, number, path, roles[number, path], dict(sorted(found[number, path].items())))


def _problems(checkpoint: Checkpoint, mlps: list[Mlp], stacks: Mapping[str, Stack]) -> Iterator[str]:
    if not mlps:
        yield (
            f"{checkpoint.label} says that it is of type {plain(checkpoint.model_type)}, but no feed-forward block "
            "of one is stored in it; give the whole model."
        )
    for stack in stacks:
        own = [mlp for mlp in mlps if mlp.stack == stack]
        numbers = [mlp.number for mlp in own]
        if numbers != list(range(len(own))):
            missing = sorted(set(range(max(numbers) + 1)) - set(numbers))
            yield (
                f"{checkpoint.label} has {len(own)} feed-forward blocks up to layer {max(numbers)} of its {stack}; "
                f"{f'layers {missing} are missing' if missing else 'some layers have two'}."
            )
        said = checkpoint.config.get(stacks[stack].depth)
        if own and isinstance(said, int) and numbers == list(range(len(own))) and said != len(own):
            yield (
                f"{checkpoint.label} holds {len(own)} layers of its {stack}, but config.json says "
                f"{stacks[stack].depth} {said}; give the whole model, or mend the config."
            )
        for mlp in own:
            if "out.weight" not in mlp.parts and "down.weight" not in mlp.parts:
                yield f"{mlp.layer!r} of {checkpoint.label} lacks the weight that leads out of its feed-forward block."
            elif shapes(mlp) != shapes(own[0]):
                yield (
                    f"The feed-forward block of {mlp.layer!r} in {checkpoint.label} has {shapes(mlp)}, expected "
                    f"{shapes(own[0])} as in layer 0; a mixture needs layers of one shape."
                )


def shapes(mlp: Mlp) -> dict[str, list[int]]:
    """The shape of each parameter of a block."""
    return {part: list(tensor.shape) for part, tensor in mlp.parts.items()}
