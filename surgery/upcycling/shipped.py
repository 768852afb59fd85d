"""The format for every other family: its modelling code, `surgery/moe/modeling_upcycled.py`, travels along."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from surgery.moe_families import CLASS_PREFIX, MODELING_FILE, UPCYCLED_FAMILIES, UpcycledFamily
from surgery.names import plain
from surgery.upcycling.mixture import Asked, Block, Mixture, Subset, Target

# What `--target` calls it, whatever the family.
SHIPPED = "shipped"


def shipped_target(model_type: str) -> Target | None:
    """The format that ships its code, for a dense model type; None for a family that the code does not know."""
    family = UPCYCLED_FAMILIES.get(model_type)
    if family is None:
        return None
    return Target(
        SHIPPED,
        lambda architecture, _: CLASS_PREFIX + (architecture or family.auto_classes["AutoModel"]),
        (model_type,),
        Subset.ANY,
        {stack: _block(family, stack) for stack in family.stacks},
        lambda asked: _config(family, asked),
        lambda asked: _objections(family, asked),
        expert_choice=True,
        raw=True,
        ships=True,
    )


def _block(family: UpcycledFamily, stack: str) -> Block:
    leaves = {leaf.role: leaf.expert for leaf in family.stacks[stack].leaves}
    experts = {f"{role}.{kind}": f"experts.{{e}}.{name}.{kind}" for role, name in leaves.items() for kind in _KINDS}
    return Block(family.stacks[stack].mixture, "router.weight", experts)


_KINDS = ("weight", "bias")


def _config(family: UpcycledFamily, asked: Asked) -> dict[str, object]:
    return {
        "model_type": family.upcycled_type,
        "auto_map": family.auto_map(),
        "moe_stacks": {stack: _stack(mixture) for stack, mixture in asked.mixtures.items()},
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.0,
        "router_jitter_noise": 0.0,
    }


def _stack(mixture: Mixture) -> dict[str, object]:
    return {
        "layers": list(mixture.layers),
        "num_experts": mixture.experts,
        "router": "top-k" if mixture.capacity is None else "expert-choice",
        "num_experts_per_tok": mixture.top_k,
        "capacity_factor": mixture.capacity,
        "normalize": mixture.normalized,
        "group": mixture.group,
        "granularity": mixture.groups,
        **(
            {"kind": "copy"} if mixture.rank is None else {"kind": "lora", "rank": mixture.rank, "alpha": mixture.alpha}
        ),
    }


def _objections(family: UpcycledFamily, asked: Asked) -> Iterator[str]:
    architecture = asked.checkpoint.architecture
    if architecture and architecture not in family.auto_classes.values():
        yield f"has no class for {plain(architecture)}"


def modelling_code() -> bytes:
    """The file that goes into the checkpoint."""
    return (Path(__file__).parents[1] / "moe" / MODELING_FILE).read_bytes()
