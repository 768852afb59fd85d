"""A LoRA adapter on disk: which factors it has, at what scale, and what it replaces whole. Reads headers only.

Everything that PEFT writes is understood, or refused by name with the remedy.
Source: peft 0.21 (`tuners/lora/config.py`, `layer.py`, `variants.py`, `utils/save_and_load.py`, `utils/other.py`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surgery.checkpoint import Checkpoint, StoredTensor, read_adapter_files
from surgery.errors import FormatError, InputError, UnsupportedError, several
from surgery.folder import Folder, LocalFolder
from surgery.names import natural_key
from surgery.patterns import first_match, matches
from surgery.source import kind_of, unexpanded

# Initialisations that replaced the base weight: B A is to be added to the changed base, not to the one on disk.
_CHANGED_BASE = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
_VIRTUAL = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")
# Settings under which the forward pass is no longer W + s B A.
_OTHER_FORWARD = {
    "alora_invocation_tokens": "an activated LoRA, which acts only after its invocation tokens",
    "arrow_config": "an Arrow mixture, which routes between adapters",
    "kasa_config": "a KaSA adapter, which truncates the base weights",
    "layer_replication": "trained on a base with replicated layers",
    "monteclora_config": "a MonteCLoRA adapter, which samples its weights",
    "use_bdlora": "a block-diagonal LoRA",
    "use_qalora": "a QA-LoRA, whose inputs are pooled",
    "velora_config": "a VeLoRA adapter",
    "megatron_config": "trained on Megatron's parallel layers",
}
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.(?P<parameter>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")


# Where `surgery train` puts the virtual tokens of `lora+prompt`.
_BESIDE = {"prompt/adapter_config.json", "prompt/surgery_method.json"}


@dataclass(frozen=True)
class Lora:
    """One pair of factors.

    Attributes:
        module: the module PEFT wraps, as the adapter names it.
        depth: how many wrappers of parameters lie around this one: 0 for the outermost (see `peft_format.factor_keys`).
        A, B: lora_A and lora_B, or lora_embedding_A and lora_embedding_B.
        embedding: which of the two.
        magnitude: DoRA's m, one value for each output feature, or None.
        bias: a bias of lora_B, or None.
    """

    module: str
    depth: int
    A: StoredTensor = field(repr=False)
    B: StoredTensor = field(repr=False)
    embedding: bool = False
    magnitude: StoredTensor | None = field(default=None, repr=False)
    bias: StoredTensor | None = field(default=None, repr=False)

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for tensor in (self.A, self.B, self.magnitude, self.bias) if tensor is not None)


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that the adapter replaces: `values[i]` becomes row `indices[i]`."""

    indices: tuple[int, ...]
    values: StoredTensor = field(repr=False)


@dataclass(frozen=True)
class Adapter:
    """An adapter and the weight it is to be applied with.

    Attributes:
        files: its folder, tensors and config.
        weight: multiplies every scale.
        loras: its factors, in natural order of modules.
        saved: parameters stored whole (`modules_to_save`, `bias`, resized embeddings), by name.
        tokens: replaced rows (`trainable_token_indices`), by embedding module.
    """

    files: Checkpoint
    weight: float
    loras: tuple[Lora, ...]
    saved: Mapping[str, StoredTensor]
    tokens: Mapping[str, TokenRows]

    @property
    def label(self) -> str:
        return self.files.label

    @property
    def config(self) -> Mapping[str, object]:
        return self.files.config

    @property
    def target_parameters(self) -> tuple[str, ...]:
        value = self.config.get("target_parameters")
        return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()

    def scale(self, key: str, rank: int) -> float:
        """What B A is multiplied by: weight * alpha / r, or weight * alpha / sqrt(r) with rsLoRA.

        `key` is the module's name (or the parameter's, for `target_parameters`) that `alpha_pattern` is matched with;
        the first pattern that matches counts. The division and its order are PEFT's (`LoraLayer.set_scale`).
        """
        alpha = first_match(_mapping(self.config, "alpha_pattern"), key, self.config.get("lora_alpha", 8))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise FormatError(f"{self.label}: lora_alpha of {key!r} is {alpha!r}, expected a number.")
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return self.weight * alpha / divisor

    def expected_rank(self, key: str, rank: int) -> bool:
        """Whether the config lets the module `key` have `rank`.

        PEFT sorts `rank_pattern` when it saves and takes the first match when it loads, so an adapter with overlapping
        patterns does not load there. The tensors say what the rank is; any pattern that matches may agree with them.
        """
        patterns = _mapping(self.config, "rank_pattern")
        return rank in {self.config.get("r"), *(value for pattern, value in patterns.items() if matches(pattern, key))}


def open_adapter(path: str | os.PathLike[str], weight: float = 1.0) -> Adapter:
    """Open an adapter folder on disk."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist{unexpanded(path)}{_weight_hint(path)}.")
    if not Path(path).is_dir():
        raise InputError(f"{path} is not an adapter folder, with adapter_config.json and its weights.")
    return read_adapter(LocalFolder(path), weight)


def refuse_virtual_tokens(adapter: Adapter) -> None:
    """Raise for a LoRA that has virtual tokens beside it, where these would get lost."""
    if not _BESIDE.isdisjoint(adapter.files.folder.names()):
        raise UnsupportedError(
            f"{adapter.label} has virtual tokens beside its LoRA, in the folder prompt, which no weights can hold; "
            "delete that folder to go on without them."
        )


def _weight_hint(path: str | os.PathLike[str]) -> str:
    """What to add to "does not exist" where all but what follows an equals sign does."""
    name, equals, _ = os.fspath(path).rpartition("=")
    return f"; a weight is written {name}=0.5" if equals and name and kind_of(Path(name)) else ""


def read_adapter(folder: Folder, weight: float = 1.0) -> Adapter:
    """Open the adapter in a folder. Raises `UnsupportedError` for kinds that cannot be merged, by name."""
    files = read_adapter_files(folder)
    _refuse(files)
    if not math.isfinite(weight):
        raise InputError(f"The weight of {files.label} is {weight}, expected a number.")
    loras: dict[tuple[str, int], dict[str, StoredTensor]] = {}
    saved: dict[str, StoredTensor] = {}
    tokens: dict[str, TokenRows] = {}
    for key, tensor in files.tensors.items():
        name = key.removeprefix("base_model.model.")
        if (match := _FACTOR.fullmatch(name)) is not None:
            module, depth = _unwrap(match["module"])
            what = f"{match['what']}.bias" if match["parameter"] == "bias" else match["what"]
            loras.setdefault((module, depth), {})[what] = tensor
        elif (match := _TOKENS.fullmatch(name)) is not None:
            tokens[match["module"]] = TokenRows(_token_indices(files, match["module"]), tensor)
        elif ".lora_" in name:
            raise UnsupportedError(f"{files.label}: tensor {key!r} belongs to a LoRA variant that is not known.")
        else:
            saved[re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", name)] = tensor
    problems: list[str] = []
    found = []
    for (module, depth), parts in sorted(loras.items(), key=lambda item: (natural_key(item[0][0]), item[0][1])):
        lora, problem = _assemble(files.label, module, depth, parts)
        problems += [problem] if problem else []
        found += [lora] if lora else []
    if problems:
        raise FormatError(several(files.label, problems), problems)
    return Adapter(files, weight, tuple(found), saved, tokens)


def _refuse(files: Checkpoint) -> None:
    config = files.config
    kind = config.get("peft_type")
    if kind in _VIRTUAL:
        raise UnsupportedError(
            f"{files.label} is an adapter of type {kind!r}: virtual tokens, which cannot be merged into weights. "
            "Load it with PEFT beside its base."
        )
    if kind != "LORA":
        raise UnsupportedError(f"{files.label} is an adapter of type {kind!r}, expected 'LORA'; merge it with PEFT.")
    init = config.get("init_lora_weights")
    start = next((start for start in _CHANGED_BASE if isinstance(init, str) and init.lower().startswith(start)), None)
    if start is not None:
        raise UnsupportedError(
            f"{files.label} was initialised with {_CHANGED_BASE[start]}, which changed the base weights, so it does "
            "not fit the base on disk; convert it with PEFT first, by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    for setting, meaning in _OTHER_FORWARD.items():
        if config.get(setting):
            raise UnsupportedError(f"{files.label} is {meaning} ({setting}); it cannot be merged into weights.")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise FormatError(f"{files.label}: 'r' in adapter_config.json is {rank!r}, expected a positive integer.")


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _unwrap(module: str) -> tuple[str, int]:
    """`experts.base_layer.base_layer` is `experts`, two wrappers deep."""
    bare = module.replace(".base_layer", "")
    return bare, module.count(".base_layer")


def _assemble(label: str, module: str, depth: int, parts: Mapping[str, StoredTensor]) -> tuple[Lora | None, str | None]:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [name for name in (a, b) if name not in parts]
    if missing:
        return None, f"{label}: module {module!r} has no {missing[0]}."
    A, B = parts[a], parts[b]
    ranks = A.shape[:1] + (B.shape[1:2] if len(B.shape) > 1 else ())
    if len(A.shape) < 2 or len(B.shape) < 2 or ranks[0] != ranks[1] or not ranks[0]:
        return None, f"{label}: module {module!r} has {a} of shape {list(A.shape)} and {b} of shape {list(B.shape)}."
    wrong = next((t for t in parts.values() if not t.dtype.arithmetic), None)
    if wrong is not None:
        return None, f"{label}: tensor {wrong.name!r} has dtype {wrong.dtype}, expected a float."
    return Lora(module, depth, A, B, embedding, parts.get("lora_magnitude_vector"), parts.get("lora_B.bias")), None


def _token_indices(files: Checkpoint, module: str) -> tuple[int, ...]:
    value = files.config.get("trainable_token_indices")
    if isinstance(value, dict):
        value = next((rows for name, rows in value.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(value, list) or not all(type(index) is int and index >= 0 for index in value):
        raise FormatError(f"{files.label}: trainable_token_indices has no list of rows for {module!r}.")
    return tuple(value)
