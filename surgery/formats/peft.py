"""PEFT folders as the neutral form, and back. What PEFT writes is described in `adapter` and `peft_format`.

Source: peft 0.21 (`tuners/lora/config.py`, `layer.py`, `utils/other.py`, `utils/save_and_load.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from surgery.adapter import Adapter, Lora
from surgery.card import conversion_card
from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, InputError, UnsupportedError
from surgery.formats.exchange import (
    COMPONENTS,
    Exchange,
    Factors,
    Written,
    check_shapes,
    exact_patterns,
    folded,
    most_common,
    refuse,
)
from surgery.formats.recipes import Recipe, Reshaped, Stored
from surgery.names import natural_key
from surgery.operation import config_bytes
from surgery.patterns import first_match
from surgery.peft_format import PREFIX, lora_config, nesting_key
from surgery.sites import Kind, find_sites

_SAVED_KEYS = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\b")


def read_peft(adapter: Adapter, base: Checkpoint | None = None) -> Exchange:
    """A PEFT adapter in the neutral form. Stacked experts need the base, or a config that tells their rank."""
    files = adapter.files
    if adapter.tokens:
        raise UnsupportedError(
            f"{adapter.label} replaces rows of an embedding (trainable_token_indices), which no other format has a "
            "place for; merge it into its base instead, with `surgery merge`."
        )
    parameters = _parameters(adapter, base)
    modules = []
    problems = []
    for lora in adapter.loras:
        name = parameters.get((lora.module, lora.depth))
        if name is None and (lora.depth or lora.module.endswith(".experts")):
            problems.append(
                f"{adapter.label}: the parameter that the factors of {lora.module!r} belong to is not named in "
                "target_parameters; name the base with --base."
            )
            continue
        modules.append(_factors(adapter, lora, name, base))
    refuse(adapter.label, problems)
    check_shapes(adapter.label, modules)
    saved = {key: tensor for key, tensor in files.tensors.items() if not _SAVED_KEYS.search(key)}
    carried = tuple(
        (name, files.folder.open(name)) for name in files.carried if name not in ("adapter_config.json", "README.md")
    )
    return Exchange(files, "peft", tuple(modules), saved, adapter.config, carried)


def _parameters(adapter: Adapter, base: Checkpoint | None) -> dict[tuple[str, int], str]:
    """(module, depth) to the parameter it wraps; the key in the file does not tell."""
    depths: dict[str, set[int]] = {}
    for lora in adapter.loras:
        depths.setdefault(lora.module, set()).add(lora.depth)
    known: dict[str, list[str]] = {}
    if base is not None:
        for site in find_sites(base).values():
            if site.kind is Kind.PARAMETER:
                known.setdefault(site.module, []).append(site.name)
    found: dict[tuple[str, int], str] = {}
    for module, here in depths.items():
        names = [name for name in known.get(module, []) if _is_targeted(adapter, name)]
        names = names or [
            f"{module}.{parameter}"
            for target in adapter.target_parameters
            for owner, _, parameter in [target.rpartition(".")]
            if module == owner or module.endswith(f".{owner}")
        ]
        names.sort(key=nesting_key)
        if here == set(range(len(names))):
            found |= {(module, len(names) - 1 - number): name for number, name in enumerate(names)}
    return found


def _is_targeted(adapter: Adapter, name: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in adapter.target_parameters)


def _factors(adapter: Adapter, lora: Lora, parameter: str | None, base: Checkpoint | None) -> Factors:
    name = parameter or lora.module
    experts = 0
    if parameter is not None:
        rank = first_match(_mapping(adapter.config, "rank_pattern"), name, adapter.config.get("r"))
        site = None if base is None else find_sites(base).get(name)
        experts = len(site.matrices) if site is not None else 0
        if not experts:
            if not isinstance(rank, int) or rank < 1 or lora.A.shape[0] % rank:
                raise FormatError(
                    f"{adapter.label}: the factors of {name!r} have {lora.A.shape[0]} rows, no multiple of the rank "
                    f"{rank!r} that adapter_config.json gives them; name the base with --base."
                )
            experts = lora.A.shape[0] // rank
        if lora.A.shape[0] % experts:
            raise FormatError(
                f"{adapter.label}: the factors of {name!r} have {lora.A.shape[0]} rows, expected a multiple of "
                f"{experts}, the number of experts."
            )
    rank = lora.A.shape[0] // max(experts, 1)
    alpha = first_match(_mapping(adapter.config, "alpha_pattern"), name, adapter.config.get("lora_alpha", 8))
    adapter.scale(name, rank)  # refuses an alpha that is no number
    assert isinstance(alpha, int | float)
    return Factors(
        module=name,
        A=Stored(lora.A),
        B=Stored(lora.B),
        alpha=alpha,
        rslora=bool(adapter.config.get("use_rslora")),
        experts=0 if name.endswith(".weight") else experts,
        parameter=parameter is not None,
        embedding=lora.embedding,
        magnitude=None if lora.magnitude is None else Stored(lora.magnitude, (lora.magnitude.numel,)),
        bias=None if lora.bias is None else Stored(lora.bias),
    )


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def one_component(exchange: Exchange, component: str | None) -> Exchange:
    """The modules of one component, under their own names: a PEFT folder or an MLX adapter is for one model."""
    if component is not None:
        if component not in exchange.components and exchange.components != ("",):
            raise InputError(
                f"{exchange.label} has no modules of {component!r}; there are {', '.join(exchange.components)}."
            )
        chosen = [factors for factors in exchange.modules if factors.component in (component, "")]
    elif len(exchange.components) > 1:
        raise InputError(
            f"{exchange.label} holds the modules of {', '.join(exchange.components)}, and an adapter folder is for one "
            "model; choose one with --component."
        )
    else:
        chosen = list(exchange.modules)
    return exchange.with_modules(replace(factors, component="") for factors in chosen)


def guess_component(exchange: Exchange, component: str | None) -> Exchange:
    """Give modules that have no component the one that is asked for, or the one that their names tell."""
    if exchange.components != ("",):
        return exchange
    name = component or _component_of(exchange)
    if name is None:
        raise InputError(
            f"{exchange.label} does not say which part of a pipeline it is for; give --component, one of "
            f"{', '.join(COMPONENTS)}."
        )
    return exchange.with_modules(replace(factors, component=name) for factors in exchange.modules)


def _component_of(exchange: Exchange) -> str | None:
    first = {factors.module.split(".")[0] for factors in exchange.modules}
    if first & {"down_blocks", "up_blocks", "mid_block"}:
        return "unet"
    if first & {"transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks"}:
        return "transformer"
    return "text_encoder" if first == {"text_model"} else None


def portable(exchange: Exchange) -> Exchange:
    """The spelling that PEFT, vLLM and llama.cpp read alike: one alpha, no rsLoRA, B with what is left of the scale.

    alpha becomes the largest rank, so that a module of that rank has the scale 1.
    """
    if not exchange.modules:
        return exchange
    alpha = max(factors.rank for factors in exchange.modules)
    changed = [factors for factors in exchange.modules if factors.scale != alpha / factors.rank]
    modules = [folded(factors, alpha / factors.rank) for factors in exchange.modules]
    note = f"The scale of {len(changed)} modules is folded into B, in float32." if changed else ""
    return exchange.with_modules(modules, *([note] if note else []))


def write_peft(exchange: Exchange, base_name: str | None) -> Written:
    """The files of a PEFT folder: ranks and alphas as the modules have them, by full names where they differ."""
    modules = exchange.modules
    keys = _keys(modules)
    tensors: dict[str, Recipe] = {}
    for factors in modules:
        a, b = keys[factors.module]
        tensors |= {a: factors.A, b: factors.B}
        stem = a.rpartition(".lora_")[0]
        if factors.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = Reshaped(factors.magnitude, (factors.magnitude.shape[0],))
        if factors.bias is not None:
            tensors[f"{stem}.lora_B.bias"] = factors.bias
    tensors |= {key: Stored(tensor) for key, tensor in exchange.saved.items()}
    config = config_of(exchange, base_name)
    return Written(
        file="adapter_model.safetensors",
        tensors=tensors,
        metadata={"format": "pt"},
        files={
            "adapter_config.json": config_bytes(config),
            "README.md": conversion_card(config, exchange.format, len(modules)).encode(),
        },
        carried=exchange.carried,
    )


def _keys(modules: Collection[Factors]) -> dict[str, tuple[str, str]]:
    """The keys of A and B for each module: for parameters those of their nested wrappers, the first innermost."""
    owners: dict[str, list[str]] = {}
    for factors in modules:
        if factors.parameter:
            owners.setdefault(factors.module.rpartition(".")[0], []).append(factors.module)
    keys = {}
    for factors in modules:
        module = factors.module
        if factors.parameter:
            owner = module.rpartition(".")[0]
            order = sorted(owners[owner], key=nesting_key)
            module = owner + ".base_layer" * (len(order) - 1 - order.index(factors.module))
        embedding = ("lora_embedding_A", "lora_embedding_B")
        a, b = embedding if factors.embedding else ("lora_A.weight", "lora_B.weight")
        keys[factors.module] = (f"{PREFIX}{module}.{a}", f"{PREFIX}{module}.{b}")
    return keys


def config_of(exchange: Exchange, base_name: str | None) -> dict[str, object]:
    """`adapter_config.json` for an adapter in the neutral form; what a PEFT adapter's own config says besides stays."""
    modules = exchange.modules
    rslora = bool(modules) and all(factors.rslora for factors in modules)
    alphas = {factors.module: _number(effective_alpha(factors, rslora)) for factors in modules}
    ranks: dict[str, float] = {factors.module: factors.rank for factors in modules}
    rank = most_common(ranks.values()) if ranks else 1
    # Alphas that are the ranks themselves go by the most common rank, so that the two patterns have the same keys.
    alpha = most_common(alphas.values()) if alphas else rank
    old = exchange.config
    targets = sorted((f.module for f in modules if not f.parameter), key=natural_key)
    parameters = sorted((f.module for f in modules if f.parameter), key=natural_key)
    named = base_name or old.get("base_model_name_or_path")
    return lora_config(
        int(rank),
        {},
        None,
        base_model_name_or_path=named,
        alpha_pattern=exact_patterns(alphas, alpha),
        auto_mapping=old.get("auto_mapping"),
        bias=old.get("bias", "none"),
        fan_in_fan_out=bool(old.get("fan_in_fan_out", False)),
        lora_alpha=alpha,
        lora_bias=any(factors.bias is not None for factors in modules),
        modules_to_save=old.get("modules_to_save"),
        rank_pattern=exact_patterns(ranks, rank),
        revision=old.get("revision"),
        target_modules=_short(targets),
        target_parameters=parameters or None,
        task_type=old.get("task_type"),
        use_dora=any(factors.magnitude is not None for factors in modules),
        use_rslora=rslora,
    )


def effective_alpha(factors: Factors, rslora: bool = False) -> float:
    """The alpha that gives a module its scale where the scale is alpha / rank, or alpha / sqrt(rank) with `rslora`."""
    if factors.rslora == rslora:
        return factors.alpha
    return float(factors.scale * (factors.rank**0.5 if rslora else factors.rank))


def _number(value: float) -> float:
    """A whole number as an integer, as the config of a training run has it."""
    return int(value) if float(value).is_integer() else value


_EXPERT = re.compile(r".*\.experts\.\d+\.(?P<projection>\w+)")


def _short(targets: list[str]) -> list[str]:
    """Full names, since without the base nothing shorter is known to mean the same modules; of experts the last word.

    PEFT itself replaces the projections of experts, by that word, with the stacks that transformers 5 has in memory.
    """
    experts = [_EXPERT.fullmatch(target) for target in targets]
    words = {match["projection"] for match in experts if match}
    return [*sorted(words), *(target for target, match in zip(targets, experts, strict=True) if not match)]
