"""The base's sites and parameters under every name that an adapter may use for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import prod

from surgery.adapter import Adapter, Lora
from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.families import FAMILIES, family_of, part_of
from surgery.peft_format import nesting_key
from surgery.sites import Kind, Piece, Site, find_sites, memory_names, vocabulary_of

_ONE_EXPERT = re.compile(r"(?P<module>.*\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)")
_PROJECTIONS = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}


HEAD = "lm_head.weight"


def head_tied_to(base: Checkpoint) -> StoredTensor | None:
    """The embedding that a decoder uses as its output head as well, without storing a head; None where there is one."""
    return None if HEAD in base.tensors else embedding_of_tied(base)


def embedding_of_tied(base: Checkpoint) -> StoredTensor | None:
    """The embedding that a decoder's config ties its output head to, whether or not a head is stored too.

    Encoder-decoders are left out: T5 scales its output only while the head is tied, so the two cannot be told apart.
    """
    tied = base.text_config.get("tie_word_embeddings", base.config.get("tie_word_embeddings", True))
    causal = base.architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    if not tied or not causal or base.config.get("is_encoder_decoder"):
        return None
    vocabulary = vocabulary_of(base)
    found = [
        tensor
        for name, tensor in base.tensors.items()
        if len(tensor.shape) == 2 and tensor.shape[0] == vocabulary and part_of(name, tensor.shape) == "embeddings"
    ]
    return found[0] if len(found) == 1 else None


class Directory:
    """The base's sites and parameters, under every name an adapter may use."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.sites = find_sites(base)
        self.tied_head = head_tied_to(base)
        self.known_family = any(base.model_type in family.model_types for family in FAMILIES)
        self.parameters = {memory: stored for stored, memory in memory_names(base).items()}
        self.stacks: dict[str, list[Site]] = {}
        for site in self.sites.values():
            if site.kind is Kind.PARAMETER:
                self.stacks.setdefault(site.module, []).append(site)
        for stack in self.stacks.values():
            stack.sort(key=lambda site: nesting_key(site.name))

    def site(self, lora: Lora, name: str, targets: Sequence[str]) -> Site | None:
        """The site that a LoRA acts on if its module is called `name`."""
        if (site := self.sites.get(name)) is not None and site.kind is not Kind.PARAMETER:
            return site
        if name in self.stacks:
            named = [s for s in self.stacks[name] if any(s.name == t or s.name.endswith(f".{t}") for t in targets)]
            place = len(named) - 1 - lora.depth
            return named[place] if 0 <= place < len(named) else None
        return self._stored(name) or self._one_expert(name) or self._tied(name)

    def _stored(self, name: str) -> Site | None:
        for parameter in ("weight", "in_proj_weight"):  # the latter is torch's own MultiheadAttention
            tensor = self.base.tensors.get(f"{name}.{parameter}")
            if tensor is not None and len(tensor.shape) >= 2:
                kernel = tensor.shape[2:]
                out, wide = tensor.shape[0], prod(tensor.shape[1:])
                kind = Kind.CONV if kernel else Kind.LINEAR
                return Site(name, kind, "other", ((Piece(tensor, 0, out),),), out, wide, kernel)
        return None

    def _one_expert(self, name: str) -> Site | None:
        """One projection of one expert, where the base stores them fused or the adapter uses in-memory names."""
        match = _ONE_EXPERT.fullmatch(name)
        if match is None or match["projection"] not in _PROJECTIONS:
            return None
        parameter, half = _PROJECTIONS[match["projection"]]
        stack = self.sites.get(f"{match['module']}.{parameter}")
        number = int(match["expert"])
        if stack is None or number >= len(stack.matrices):
            return None
        pieces = stack.matrices[number]
        if half is None:
            return Site(name, Kind.LINEAR, "experts", (pieces,), stack.out_features, stack.in_features)
        if len(pieces) == 2:
            piece = pieces[half]
            own = Piece(piece.tensor, 0, piece.end - piece.begin, piece.transposed)
            return Site(name, Kind.LINEAR, "experts", ((own,),), own.end, stack.in_features)
        return None  # a fused tensor that holds both halves: the fused adapter is the one that fits it

    def _tied(self, name: str) -> Site | None:
        """The output head, where the base has it tied to its embedding and stores nothing of its own."""
        if self.tied_head is None or f"{name}.weight" != HEAD:
            return None
        out, wide = self.tied_head.shape
        return Site(name, Kind.LINEAR, "head", ((Piece(self.tied_head, 0, out, is_head=True),),), out, wide)

    def parameter(self, name: str) -> str | None:
        """The stored name of a parameter."""
        if name == HEAD and self.tied_head is not None:
            return HEAD
        return self.parameters.get(name) or (name if name in self.base.tensors else None)


Reading = Callable[[str], str]


def _without(prefix: str) -> Reading:
    return lambda name: name.removeprefix(prefix)


def _with(prefix: str) -> Reading:
    return lambda name: prefix + name


def _readings(base: Checkpoint) -> list[Reading]:
    """Ways to read the module names of an adapter, most literal first."""
    prefix = family_of(base.model_type).base_prefix
    prefixes = [prefix] if prefix else []
    first = {name.split(".", 1)[0] for name in base.tensors if "." in name}
    prefixes += [next(iter(first))] if len(first) == 1 and not prefix else []
    readings: list[Reading] = [lambda name: name]
    for one in [*prefixes, "model", "transformer"]:
        readings += [_without(f"{one}."), _with(f"{one}.")]
    readings += [
        lambda name: re.sub(r"^model\.(?!language_model\.)", "model.language_model.", name),
        lambda name: re.sub(r"^model\.(?!language_model\.)", "language_model.model.", name),
        lambda name: name.replace("model.language_model.", "model.", 1),
        lambda name: name.replace("language_model.model.", "model.", 1),
    ]
    return readings


def best_reading(directory: Directory, adapter: Adapter) -> Reading:
    """The first reading that places every LoRA (or, without any, every saved tensor); else the one that places most."""

    def placed(reading: Reading) -> int:
        if not adapter.loras:
            return sum(directory.parameter(reading(name)) is not None for name in adapter.saved)
        targets = adapter.target_parameters
        return sum(directory.site(lora, reading(lora.module), targets) is not None for lora in adapter.loras)

    readings = _readings(directory.base)
    wanted = len(adapter.loras) or len(adapter.saved)
    best, best_count = readings[0], -1
    for reading in readings:
        if (count := placed(reading)) > best_count:
            best, best_count = reading, count
        if best_count == wanted:
            break
    return best
