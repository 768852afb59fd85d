"""mlx-lm's adapters: a folder with `adapters.safetensors` and an `adapter_config.json` of another kind than PEFT's.

    <module>.lora_a       A^T, (in, r)         of experts (E, r, in)
    <module>.lora_b       B^T, (r, out)        of experts (E, out, r)
    <module>.m            DoRA's magnitude, (out,)

The config has one rank and one scale for all modules, the names of the modules within a layer (`keys`) and the number
of layers counted from the last, where -1 is all. A module without tensors keeps a B of zeros. There is no alpha: the
scale multiplies B A. Modules are named as MLX has them: as they are stored, experts as `switch_mlp`.
Source: mlx-lm 0.32 (`tuner/lora.py`, `tuner/dora.py`, `tuner/utils.py`, `models/switch_layers.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, InputError, UnsupportedError
from surgery.families import family_of
from surgery.formats.exchange import (
    Exchange,
    Factors,
    Written,
    check_shapes,
    folded,
    grown,
    most_common,
    refuse,
    refuse_parts,
    refuse_whole_tensors,
)
from surgery.formats.experts import Projection, is_per_expert, projections_of, put_together
from surgery.formats.recipes import Permuted, Recipe, Stored, padded, scaled, turned
from surgery.hashing import hash_tensor
from surgery.names import natural_key
from surgery.operation import config_bytes
from surgery.sites import Site, find_sites, memory_names

FILE = "adapters.safetensors"
_LEAF = re.compile(r"(?P<module>.+)\.(?P<what>lora_a|lora_b|m)")
_LAYER = re.compile(r"(?P<prefix>(?:language_model\.)?model\.layers\.\d+)\.(?P<key>.+)")
_OUTSIDE = ("model.embed_tokens", "language_model.model.embed_tokens", "lm_head")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def is_mlx(config: Mapping[str, object]) -> bool:
    """Whether an `adapter_config.json` is mlx-lm's."""
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx(files: Checkpoint, base: Checkpoint | None) -> Exchange:
    """An mlx-lm adapter in the neutral form. One with experts needs the base, for their names in memory."""
    kind = files.config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(
            f"{files.label} has fine_tune_type {kind!r}, expected 'lora' or 'dora'; there are no factors to convert."
        )
    scale = _setting(files, "scale")
    parts: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in files.tensors.items():
        match = _LEAF.fullmatch(name)
        if match is None:
            problems.append(f"{files.label}: tensor {name!r} is none that an mlx-lm adapter has.")
        else:
            parts.setdefault(match["module"], {})[match["what"]] = tensor
    for module, found in parts.items():
        problems += [f"{files.label}: {module!r} has no {what}." for what in ("lora_a", "lora_b") if what not in found]
        if len({len(tensor.shape) for what, tensor in found.items() if what != "m"}) != 1:
            problems.append(f"{files.label}: {module!r} has lora_a and lora_b of different dimensions.")
    refuse(files.label, problems)
    stacks = {module: found for module, found in parts.items() if len(found["lora_a"].shape) == 3}
    plain = [_factors(module, found, scale, base) for module, found in parts.items() if module not in stacks]
    modules = [*plain, *_read_stacks(files.label, stacks, scale, base)]
    check_shapes(files.label, modules)
    return Exchange(files, "mlx", ()).with_modules(modules)


def _setting(files: Checkpoint, name: str) -> float:
    parameters = files.config.get("lora_parameters")
    value = parameters.get(name) if isinstance(parameters, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise FormatError(f"{files.label}: {name!r} of lora_parameters is {value!r}, expected a number.")
    return value


def _factors(module: str, found: Mapping[str, StoredTensor], scale: float, base: Checkpoint | None) -> Factors:
    A, B = turned(Stored(found["lora_a"])), turned(Stored(found["lora_b"]))
    name = module
    if base is not None:
        name = family_of(base.model_type).in_memory(f"{module}.weight").removesuffix(".weight")
    embedding = name.endswith("embed_tokens")
    return Factors(
        module=name,
        A=A,
        B=B,
        alpha=scale * A.shape[0],
        embedding=embedding,
        magnitude=Stored(found["m"]) if "m" in found else None,
    )


def _read_stacks(
    label: str, stacks: Mapping[str, Mapping[str, StoredTensor]], scale: float, base: Checkpoint | None
) -> list[Factors]:
    if not stacks:
        return []
    if base is None:
        raise InputError(
            f"{label} has LoRAs on experts, whose names in other tools depend on the model; name its base with --base."
        )
    left = dict(stacks)
    modules = []
    for site in find_sites(base).values():
        names = _mlx_names(site)
        found = [left.pop(name, None) for name in names]
        if not any(found):
            continue
        parts: list[Projection | None] = []
        for tensors in found:
            if tensors is None:
                parts.append(None)
                continue
            B3 = Permuted(Stored(tensors["lora_b"]), (1, 2, 0))
            parts.append(Projection(Stored(tensors["lora_a"]), B3, scale))
        expected = len(site.matrices)
        wrong = next((part for part in parts if part is not None and part.A3.shape[0] != expected), None)
        if wrong is not None:
            raise FormatError(f"{label}: {names[0]!r} has {wrong.A3.shape[0]} experts, the base has {expected}.")
        modules.append(put_together(site, parts, _share_A(parts)))
    refuse(label, [f"{label}: {name!r} is no stack of experts of {base.label}." for name in left])
    return modules


def _share_A(parts: Sequence[Projection | None]) -> bool:
    """Whether gate and up have the same A to the bit, as they have where a fused LoRA was taken apart."""
    stored = [part.A3.stored for part in parts if part is not None]
    if len(stored) != len(parts) or len(parts) < 2 or len({tensor.shape for tensor in stored if tensor}) != 1:
        return False
    return len({hash_tensor(tensor) for tensor in stored if tensor is not None}) == 1


def _mlx_names(site: Site) -> tuple[str, ...]:
    """What MLX calls the projections of a stack of experts: `...switch_mlp.gate_proj`; none for another site."""
    parameter = site.name.rpartition(".")[2]
    if not is_per_expert(site) or parameter not in _PROJECTIONS:
        return ()
    stem = site.matrices[0][0].tensor.name.rpartition(".experts.")[0]
    return tuple(f"{stem}.switch_mlp.{projection}" for projection in _PROJECTIONS[parameter])


def write_mlx(exchange: Exchange, base: Checkpoint | None, base_name: str | None) -> Written:
    """The files of an mlx-lm adapter: one rank, filled up with zeros, and one scale, the rest of each folded into B."""
    refuse_whole_tensors(exchange, "mlx-lm's format")
    refuse_parts(exchange, "mlx-lm's format", ("bias",))
    dora = _is_dora(exchange)
    rank = max((factors.rank for factors in exchange.modules), default=1)
    scale = most_common(factors.scale for factors in exchange.modules) if exchange.modules else 1.0
    sites = {} if base is None else find_sites(base)
    tensors: dict[str, Recipe] = {}
    keys: set[str] = set()
    problems = []
    for factors in exchange.modules:
        if len(factors.A.shape) != 2 or (factors.embedding and factors.magnitude is not None):
            what = "a convolution" if len(factors.A.shape) != 2 else "a DoRA on an embedding"
            problems.append(f"{exchange.label}: {factors.name!r} is {what}, which mlx-lm's format has no place for.")
            continue
        if factors.experts:
            names, recipes = _stack(exchange.label, factors, sites, rank, scale)
        else:
            names, recipes = _module(factors, base, rank, scale)
        tensors |= recipes
        for name in names:
            match = _LAYER.fullmatch(name)
            if match is None and name not in _OUTSIDE:
                problems.append(
                    f"{exchange.label}: {name!r} is no module whose name in MLX is known; known are modules of "
                    "'model.layers.N', 'model.embed_tokens' and 'lm_head'."
                )
            keys.add(match["key"] if match else name)
    refuse(f"{exchange.label} for MLX", problems, UnsupportedError)
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted(keys, key=natural_key),
        },
        "model": base_name or exchange.config.get("base_model_name_or_path") or "",
        "num_layers": _layers(base),
    }
    files = {"adapter_config.json": config_bytes(config)}
    return Written(FILE, tensors, {"format": "mlx"}, files, notes=_notes(exchange, rank, scale))


def _is_dora(exchange: Exchange) -> bool:
    without = [factors.name for factors in exchange.modules if factors.magnitude is None]
    if not without or len(without) == len(exchange.modules):
        return not without
    raise UnsupportedError(
        f"{exchange.label}: {without[0]!r} has no DoRA magnitude and others have; mlx-lm's format has it for all or "
        "for none."
    )


def _layers(base: Checkpoint | None) -> int:
    """The number of layers of the base; -1, which is all, where it is not known."""
    value = None if base is None else base.text_config.get("num_hidden_layers")
    return value if isinstance(value, int) else -1


def _module(factors: Factors, base: Checkpoint | None, rank: int, scale: float) -> tuple[list[str], dict[str, Recipe]]:
    name = _stored_name(factors.module.removesuffix(".weight") if factors.parameter else factors.module, base)
    own = folded(grown(replace(factors, bias=None), rank), scale)
    recipes = {f"{name}.lora_a": turned(own.A), f"{name}.lora_b": turned(own.B)}
    if own.magnitude is not None:
        recipes[f"{name}.m"] = own.magnitude
    return [name], recipes


def _stored_name(module: str, base: Checkpoint | None) -> str:
    """The name a module is stored under, which is the one MLX uses; the name itself without a base."""
    if base is None or f"{module}.weight" in base.tensors:
        return module
    stored = {memory: name for name, memory in memory_names(base).items()}.get(f"{module}.weight")
    return module if stored is None else stored.removesuffix(".weight")


def _stack(
    label: str, factors: Factors, sites: Mapping[str, Site], rank: int, scale: float
) -> tuple[list[str], dict[str, Recipe]]:
    site = sites.get(factors.module)
    names = () if site is None else _mlx_names(site)
    if site is None or not names:
        raise InputError(
            f"{label}: how MLX names the experts of {factors.module!r} depends on the model; name its base with --base."
        )
    recipes: dict[str, Recipe] = {}
    for name, part in zip(names, projections_of(factors, site), strict=True):
        experts, _, wide = part.A3.shape
        recipes[f"{name}.lora_a"] = padded(part.A3, (experts, rank, wide))
        B = Permuted(scaled(part.B3, part.scale / scale), (2, 0, 1))
        recipes[f"{name}.lora_b"] = padded(B, (experts, B.shape[1], rank))
    return list(names), recipes


def _notes(exchange: Exchange, rank: int, scale: float) -> tuple[str, ...]:
    smaller = sum(factors.rank != rank for factors in exchange.modules)
    other = sum(factors.scale != scale for factors in exchange.modules)
    notes = []
    if smaller:
        notes.append(f"MLX has one rank for all: {smaller} modules are filled up with zeros to rank {rank}.")
    if other:
        notes.append(f"MLX has one scale for all, {scale:g}: what {other} modules miss is folded into B, in float32.")
    return tuple(notes)
