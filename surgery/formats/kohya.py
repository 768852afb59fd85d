"""kohya's files, which Automatic1111, ComfyUI and many others read: one file, names with underscores for dots.

    lora_unet_<module>.lora_down.weight   A, (r, in) or (r, in, kh, kw)
    lora_unet_<module>.lora_up.weight     B, (out, r) or (out, r, 1, 1)
    lora_unet_<module>.alpha              the scale is alpha / r; absent or 0 means alpha = r
    lora_unet_<module>.dora_scale         DoRA's m, (out, 1) or (out, 1, 1, 1)

`lora_te_` and `lora_te1_` are the first text encoder, `lora_te2_` and `lora_te3_` the others. A name with underscores
cannot be read back without the names of the model; two modules may even share one. SDXL files name the modules as the
original U-Net has them (`input_blocks_4_1_...`), which are those of diffusers under other numbers.
Source: kohya-ss/sd-scripts (`networks/lora.py`: scale, zero alpha, prefixes), LyCORIS 4.1 (`modules/locon.py`:
dora_scale, either way round), diffusers 0.42 (`loaders/lora_conversion_utils.py`: prefixes, block numbers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.dtypes import F32
from surgery.errors import FormatError, InputError, MismatchError, UnsupportedError
from surgery.families import family_of
from surgery.formats.exchange import (
    Exchange,
    Factors,
    Written,
    check_shapes,
    most_common,
    refuse,
    refuse_parts,
    refuse_whole_tensors,
)
from surgery.formats.peft import effective_alpha
from surgery.formats.recipes import Number, Recipe, Reshaped, Stored, read_number
from surgery.names import natural_key

PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# What each component is written as. Transformers in place of a U-Net go by the same prefix in kohya's trainers.
_WRITTEN = {
    "unet": "lora_unet_",
    "transformer": "lora_unet_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
}
_KEY = re.compile(r"(?P<module>lora_(?:unet|te[123]?)_[^.]+)\.(?P<what>.+)")
_KNOWN = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "magnitude"}
# Other parametrisations of LyCORIS, by a word in their keys.
_OTHERS = {
    "hada_w": "LoHa (a Hadamard product of two low-rank matrices)",
    "lokr_w": "LoKr (a Kronecker product)",
    "lora_mid": "a LoCon with a core tensor (lora_mid, Tucker form)",
    "oft_": "OFT (an orthogonal transformation)",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
    "diff": "whole differences of weights",
    "w_norm": "whole norms",
}


def is_kohya(names: Iterable[str]) -> bool:
    """Whether the names of a file's tensors are kohya's."""
    return any(_KEY.fullmatch(name) for name in names)


def read_kohya(files: Checkpoint, bases: Mapping[str, Checkpoint]) -> Exchange:
    """A kohya file in the neutral form.

    Args:
        files: the file.
        bases: the model of each component (under ``""`` one for all), whose names tell which module is meant.

    Raises:
        UnsupportedError: for a parametrisation other than LoRA, by name.
        MismatchError: naming every module that the base does not have, or that could be one of several.
    """
    parts: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for name, tensor in files.tensors.items():
        other = next((kind for word, kind in _OTHERS.items() if word in name.partition(".")[2]), None)
        if other is not None:
            raise UnsupportedError(
                f"{files.label} is {other}, by tensor {name!r}; only LoRA has factors A and B: merge it with the tool "
                "that made it, and extract a LoRA from the result with `surgery extract`."
            )
        match = _KEY.fullmatch(name)
        if match is None or match["what"] not in _KNOWN:
            problems.append(f"{files.label}: tensor {name!r} is none that a kohya LoRA has.")
        else:
            parts.setdefault(match["module"], {})[_KNOWN[match["what"]]] = tensor
    for module, found in parts.items():
        problems += [f"{files.label}: {module!r} has no {key}." for key, part in _KNOWN.items() if _lacks(found, part)]
    refuse(files.label, problems)
    names = _Names(files.label, bases)
    modules = [names.factors(module, found) for module, found in parts.items()]
    refuse(f"the names in {files.label}", names.problems, MismatchError)
    kept = [factors for factors in modules if factors is not None]
    check_shapes(files.label, kept)
    return Exchange(files, "kohya", ()).with_modules(kept)


def _lacks(found: Mapping[str, StoredTensor], part: str) -> bool:
    return part in ("A", "B") and part not in found


@dataclass(frozen=True)
class _Meant:
    """A module of the base: its name in memory and the shape of its weight, (out, in, *kernel)."""

    module: str
    shape: tuple[int, ...]


class _Names:
    """Which module an underscored name means, by the names of the base."""

    def __init__(self, label: str, bases: Mapping[str, Checkpoint]) -> None:
        self.label = label
        self.bases = bases
        self.problems: list[str] = []
        self._known: dict[str, dict[str, set[_Meant]]] = {}

    def factors(self, name: str, found: Mapping[str, StoredTensor]) -> Factors | None:
        prefix = next(prefix for prefix in sorted(PREFIXES, key=len, reverse=True) if name.startswith(prefix))
        component = PREFIXES[prefix]
        if component == "unet" and "transformer" in self.bases:
            component = "transformer"
        meant = self._meant(component, name, name.removeprefix(prefix))
        if meant is None:
            return None
        A, B = found["A"], found["B"]
        out, wide = meant.shape[0], prod(meant.shape[1:])
        if (B.shape[0], prod(A.shape[1:])) != (out, wide):
            self.problems.append(
                f"{self.label}: the factors of {name!r} are {list(A.shape)} and {list(B.shape)}, but {meant.module!r} "
                f"has a weight of {list(meant.shape)} in the base."
            )
            return None
        rank = A.shape[0]
        alpha = read_number(found["alpha"]) if "alpha" in found else 0.0
        return Factors(
            module=meant.module,
            A=_seen(A, (rank, *meant.shape[1:])),
            B=_seen(B, (out, rank, *(1 for _ in meant.shape[2:]))),
            alpha=alpha or float(rank),  # a zero alpha stands for the rank
            component=component,
            magnitude=self._magnitude(name, found.get("magnitude"), out),
        )

    def _magnitude(self, name: str, tensor: StoredTensor | None, out: int) -> Recipe | None:
        if tensor is None:
            return None
        if tensor.numel != out or tensor.shape[:1] != (out,):
            raise UnsupportedError(
                f"{self.label}: dora_scale of {name!r} has shape {list(tensor.shape)}, expected {out} rows: it was "
                "trained with a norm over the outputs (LyCORIS without wd_on_out), which PEFT's DoRA does not have."
            )
        return Stored(tensor, (out,))

    def _meant(self, component: str, name: str, flat: str) -> _Meant | None:
        base = self.bases.get(component, self.bases.get(""))
        if base is None:
            there = ", ".join(sorted(self.bases)) or "none"
            raise InputError(
                f"{self.label} has underscores for the dots of names, and only the model's own names tell which are "
                f"which; name the base of its {component} with --base (there is {there})."
            )
        if component not in self._known:
            self._known[component] = _flat_names(base)
        candidates = sorted(self._known[component].get(flat, ()), key=lambda one: natural_key(one.module))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            names = " or ".join(repr(one.module) for one in candidates)
            self.problems.append(f"{self.label}: {name!r} can mean {names} of {base.label}.")
        else:
            self.problems.append(f"{self.label}: {name!r} is no module of {base.label}; is it the adapter's base?")
        return None


def _seen(tensor: StoredTensor, shape: tuple[int, ...]) -> Recipe:
    """A factor in the shape that PEFT gives it: a 1 x 1 convolution may be stored as a matrix, and the reverse."""
    return Stored(tensor) if tensor.shape == shape else Stored(tensor, shape)


def _flat_names(base: Checkpoint) -> dict[str, set[_Meant]]:
    """Every name with underscores that a module of the base can have, and the modules it can mean."""
    family = family_of(base.model_type)
    blocks = _blocks(base)
    known: dict[str, set[_Meant]] = {}
    for stored, tensor in base.tensors.items():
        module, _, parameter = family.in_memory(stored).rpartition(".")
        if parameter != "weight" or len(tensor.shape) < 2:
            continue
        spellings = {module, stored.rpartition(".")[0], *_original(module, blocks)}
        # The text encoders of CLIP have lost this prefix in memory, and kept it in files.
        spellings |= {f"text_model.{one}" for one in spellings if one.startswith(("encoder.", "embeddings."))}
        for spelling in spellings:
            known.setdefault(spelling.replace(".", "_"), set()).add(_Meant(module, tensor.shape))
    return known


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(?P<half>down|up)_blocks\.(?P<block>\d+)\.(?P<kind>\w+)\.(?P<layer>\d+)\.(?P<rest>.+)")
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class _Blocks:
    """How a U-Net is divided: resnets to a block on the way down, and the blocks on the way up that have attention."""

    layers: int
    with_attention: frozenset[str]


def _blocks(base: Checkpoint) -> _Blocks | None:
    """The division of a U-Net as diffusers names it; None for every other model."""
    if not any(name.startswith("down_blocks.") for name in base.tensors):
        return None
    layers = base.config.get("layers_per_block", 2)
    attention = {
        match["block"] for name in base.tensors if (match := _BLOCK.match(name)) and match["kind"] == "attentions"
        if match["half"] == "up"
    }  # fmt: skip
    return _Blocks(layers if isinstance(layers, int) else 2, frozenset(attention))


def _original(module: str, blocks: _Blocks | None) -> tuple[str, ...]:
    """What the original U-Net of Stable Diffusion calls a module of diffusers'."""
    if blocks is None:
        return ()
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    if match := _MIDDLE.fullmatch(module):
        place = 1 if match["kind"] == "attentions" else 2 * int(match["layer"])
        return (f"middle_block.{place}.{_within(match['kind'], match['rest'])}",)
    match = _BLOCK.fullmatch(module)
    if match is None:
        return ()
    block, layer, kind, rest = int(match["block"]), int(match["layer"]), match["kind"], match["rest"]
    if match["half"] == "down":
        if kind == "downsamplers":
            return (f"input_blocks.{(block + 1) * (blocks.layers + 1)}.0.op",)
        number = 1 + block * (blocks.layers + 1) + layer
        return (f"input_blocks.{number}.{int(kind == 'attentions')}.{_within(kind, rest)}",)
    if kind == "upsamplers":
        place = 2 if match["block"] in blocks.with_attention else 1
        return (f"output_blocks.{block * (blocks.layers + 1) + blocks.layers}.{place}.{rest}",)
    number = block * (blocks.layers + 1) + layer
    return (f"output_blocks.{number}.{int(kind == 'attentions')}.{_within(kind, rest)}",)


def _within(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest


def write_kohya(exchange: Exchange, file: str) -> Written:
    """One file in kohya's names. Raises `FormatError` where two modules would get the same name."""
    refuse_whole_tensors(exchange, "kohya's format")
    refuse_parts(exchange, "kohya's format", ("embedding", "experts", "bias"))
    tensors: dict[str, Recipe] = {}
    owner: dict[str, str] = {}
    problems = []
    for factors in exchange.modules:
        if factors.component not in _WRITTEN:
            raise InputError(f"{exchange.label}: kohya's format has no name for the component {factors.component!r}.")
        stem = _WRITTEN[factors.component] + factors.module.replace(".", "_")
        if stem in owner:
            problems.append(f"{exchange.label}: {owner[stem]!r} and {factors.name!r} would both be called {stem!r}.")
        owner[stem] = factors.name
        tensors[f"{stem}.lora_down.weight"] = factors.A
        tensors[f"{stem}.lora_up.weight"] = factors.B
        tensors[f"{stem}.alpha"] = Number(effective_alpha(factors), F32)
        if factors.magnitude is not None:
            shape = (factors.B.shape[0], *(1 for _ in factors.A.shape[1:]))
            tensors[f"{stem}.dora_scale"] = Reshaped(factors.magnitude, shape)
    refuse(f"the names of {exchange.label}", problems, FormatError)
    ranks = {factors.rank for factors in exchange.modules}
    alphas = {effective_alpha(factors) for factors in exchange.modules}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": _common(ranks),
        "ss_network_alpha": _common(alphas),
    }
    return Written(file, tensors, metadata)


def _common(values: set[int] | set[float]) -> str:
    """The one value, or the word that kohya's own tools write where it varies."""
    return f"{most_common(values):g}" if len(values) == 1 else "Dynamic"
