"""LoRA files of diffusers pipelines: one file with the modules of several components.

    unet.<module>.lora_A.weight              since 0.27; a `lora_adapter_metadata` in the header holds the LoraConfig
                                             of each component since 0.34, without which the scale is 1
    unet.<module>.lora.down.weight           before that, read only
    unet.<attention>.processor.to_q_lora.down.weight           the oldest, read only
    text_encoder.<attention>.q_proj.lora_linear_layer.down.weight, ....to_q_lora.down.weight     likewise

Source: diffusers 0.42 (`utils/state_dict_utils.py`, `utils/peft_utils.py`, `loaders/lora_base.py`). Up to pull request
14409 an adapter of mixed ranks without alphas was given the first rank as the alpha of all; the metadata prevent it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError, UnsupportedError
from surgery.formats.exchange import (
    COMPONENTS,
    Exchange,
    Factors,
    Written,
    check_shapes,
    refuse,
    refuse_parts,
    refuse_whole_tensors,
)
from surgery.formats.peft import config_of
from surgery.formats.recipes import Recipe, Stored, read_number
from surgery.names import natural_key
from surgery.patterns import first_match

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"

_PROCESSOR = re.compile(r"\.to_(?P<which>q|k|v|out)_lora\.(?P<what>down|up|alpha)")
_ENDINGS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
    "alpha": "alpha",
}
_UNET = ("down_blocks.", "up_blocks.", "mid_block.", "time_embedding.", "conv_in.", "conv_out.")


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether the names of a file's tensors are those of a diffusers LoRA."""
    return any(name.startswith((*(f"{one}." for one in COMPONENTS), *_UNET)) and "lora" in name for name in names)


def read_diffusers(files: Checkpoint) -> Exchange:
    """A diffusers LoRA file, new or old, in the neutral form."""
    parts: dict[tuple[str, str], dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in files.tensors.items():
        if ".lokr_" in name:
            raise UnsupportedError(
                f"{files.label} is LoKr (a Kronecker product), by tensor {name!r}; only LoRA has factors A and B."
            )
        place = _place(name)
        if place is None:
            problems.append(f"{files.label}: tensor {name!r} is none that a diffusers LoRA has.")
        else:
            component, module, part = place
            parts.setdefault((component, module), {})[part] = tensor
    for (component, module), found in parts.items():
        problems += [
            f"{files.label}: module {f'{component}.{module}'!r} has no {part}." for part in "AB" if part not in found
        ]
    refuse(files.label, problems)
    configs = _configs(files)
    modules = [_factors(files.label, *place, found, configs.get(place[0])) for place, found in parts.items()]
    check_shapes(files.label, modules)
    return Exchange(files, "diffusers", ()).with_modules(modules)


def _place(name: str) -> tuple[str, str, str] | None:
    """Component, module and part that a key means; None for a key of another kind."""
    component, _, rest = name.partition(".")
    if component not in COMPONENTS:
        component, rest = "unet", name
    rest = rest.replace(".processor.", ".")
    if match := _PROCESSOR.search(rest):
        which = match["which"]
        if component.startswith("text_encoder"):
            layer = f"{which}_proj"
        else:
            layer = "to_out.0" if which == "out" else f"to_{which}"
        part = {"down": "A", "up": "B", "alpha": "alpha"}[match["what"]]
        return component, f"{rest[: match.start()]}.{layer}", part
    rest = re.sub(r"\.to_out\.lora_magnitude_vector", ".to_out.0.lora_magnitude_vector", rest)
    for ending, part in _ENDINGS.items():
        if rest.endswith(f".{ending}"):
            return component, rest.removesuffix(f".{ending}"), part
    return None


def _configs(files: Checkpoint) -> dict[str, dict[str, object]]:
    """The LoraConfig of each component, from the header of the file."""
    raw = files.shards[0].header.metadata.get(METADATA) if files.shards else None
    if raw is None:
        return {}
    try:
        flat = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{files.label}: {METADATA} in the header is not valid JSON ({error}).") from error
    if not isinstance(flat, dict):
        raise FormatError(f"{files.label}: {METADATA} in the header is a JSON {type(flat).__name__}, not an object.")
    configs: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        component, _, setting = key.partition(".")
        configs.setdefault(component, {})[setting] = value
    return configs


def _factors(
    label: str, component: str, module: str, found: Mapping[str, StoredTensor], config: Mapping[str, object] | None
) -> Factors:
    A, B = Stored(found["A"]), Stored(found["B"])
    rank = A.shape[0] if A.shape else 0
    alpha: object = float(rank)  # without metadata the scale is 1, whatever the rank
    rslora = False
    if config is not None:
        pattern = config.get("alpha_pattern")
        alpha = first_match(pattern if isinstance(pattern, dict) else {}, module, config.get("lora_alpha", rank))
        rslora = bool(config.get("use_rslora"))
    if "alpha" in found:
        alpha = read_number(found["alpha"]) or float(rank)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise FormatError(f"{label}: lora_alpha of {module!r} is {alpha!r}, expected a number.")
    magnitude = found.get("magnitude")
    return Factors(
        module=module,
        A=A,
        B=B,
        alpha=alpha,
        rslora=rslora,
        component=component,
        magnitude=None if magnitude is None else Stored(magnitude, (magnitude.numel,)),
        bias=Stored(found["bias"]) if "bias" in found else None,
    )


def write_diffusers(exchange: Exchange) -> Written:
    """One file as `save_lora_weights` writes it, with the LoraConfig of each component in its header."""
    refuse_whole_tensors(exchange, "diffusers' format")
    refuse_parts(exchange, "diffusers' format", ("embedding", "experts"))
    tensors: dict[str, Recipe] = {}
    metadata: dict[str, object] = {}
    for factors in exchange.modules:
        tensors[f"{factors.name}.lora_A.weight"] = factors.A
        tensors[f"{factors.name}.lora_B.weight"] = factors.B
        if factors.magnitude is not None:
            tensors[f"{factors.name}.lora_magnitude_vector"] = factors.magnitude
        if factors.bias is not None:
            tensors[f"{factors.name}.lora_B.bias"] = factors.bias
    for component in exchange.components:
        own = exchange.with_modules(factors for factors in exchange.modules if factors.component == component)
        config = config_of(own, None)
        metadata |= {f"{component}.{key}": value for key, value in config.items() if value is not None}
    text = json.dumps(dict(sorted(metadata.items(), key=lambda item: natural_key(item[0]))), indent=2)
    notes: tuple[str, ...] = ()
    if any(factors.scale != 1 for factors in exchange.modules):
        notes = (
            "The scales are in the header's lora_adapter_metadata, which diffusers reads since 0.34; --portable folds "
            "them into B for older ones.",
        )
    return Written(FILE, tensors, {"format": "pt", METADATA: text}, notes=notes)
