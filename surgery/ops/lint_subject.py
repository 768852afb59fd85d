"""An adapter as `lint` sees it: its files and its config, with nothing refused; and how a rule on it is written down.

Sources of the rules: peft 0.21.2; vLLM 0.32.0 (`lora/peft_helper.py`, `utils.py`, `lora_model.py`, `model_manager.py`);
llama.cpp as of llama-cpp-python 0.3.36 (`convert_lora_to_gguf.py`, `src/llama-adapter.cpp`); mlx-lm 0.32.2
(`tuner/utils.py`); SGLang, main of August 2026 (`srt/lora/`), and LoRAX, main of 2025 (`adapters/lora.py`), which were
read and not run. Figures were measured by running the consumer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.errors import FormatError
from surgery.patterns import first_match

PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.(?:default\.)?weight)?"
)
EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<projection>\w+)")
FUSED = re.compile(r".+\.experts(\.base_layer)*")
# Projections that transformers 5 fuses into one parameter.
HALVES = ({"w1", "w3"}, {"gate_proj", "up_proj"})
# Initialisations that changed the base on disk, so that B A belongs to another base.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as its files have it, with nothing refused; `base` where it was named."""

    format: str
    files: Checkpoint
    base: Checkpoint | None = None

    @property
    def config(self) -> dict[str, object]:
        return dict(self.files.config)

    @property
    def is_peft(self) -> bool:
        return self.format == "peft"

    @cached_property
    def factors(self) -> dict[str, dict[str, StoredTensor]]:
        """Module as the file names it, without PEFT's prefix, to its factors."""
        found: dict[str, dict[str, StoredTensor]] = {}
        for key, tensor in self.files.tensors.items():
            if self.is_peft and (match := FACTOR.fullmatch(key)):
                found.setdefault(match["module"].removeprefix(PREFIX), {})[match["what"]] = tensor
        return found

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module to the rows of its A; of a fused stack, of all its experts together."""
        return {
            module: (parts.get("lora_A") or parts["lora_embedding_A"]).shape[0]
            for module, parts in self.factors.items()
            if "lora_A" in parts or "lora_embedding_A" in parts
        }

    @cached_property
    def others(self) -> list[str]:
        """Keys that are no factors."""
        return [key for key in self.files.tensors if self.is_peft and not FACTOR.fullmatch(key)]

    @cached_property
    def fused(self) -> list[str]:
        """Modules that are stacks of experts."""
        return [module for module in self.factors if FUSED.fullmatch(module)]

    @cached_property
    def experts(self) -> dict[str, dict[int, set[str]]]:
        """Expert lists to the projections of each expert that has factors."""
        found: dict[str, dict[int, set[str]]] = {}
        for module in self.factors:
            if match := EXPERT.fullmatch(module):
                found.setdefault(match["module"], {}).setdefault(int(match["expert"]), set()).add(match["projection"])
        return found

    def is_parameter(self, module: str) -> bool:
        """Whether a module is targeted by its weight, in `target_parameters`."""
        targets = self.config.get("target_parameters")
        return isinstance(targets, list) and any(f".{module}.weight".endswith(f".{target}") for target in targets)

    def pattern(self, name: str) -> dict[str, object]:
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    def configured(self, module: str, pattern: str, default: str) -> object:
        """What the config says of a module: the first pattern that means it, else the default."""
        name = f"{module}.weight" if self.is_parameter(module) else module
        try:
            return first_match(self.pattern(pattern), name, self.config.get(default))
        except FormatError:
            return None


# What mends a fault, for `Rule.mend`.
TO_PEFT = "surgery convert {path} --to peft -o OUT"
PORTABLE = "surgery convert {path} --to peft --portable -o OUT"
PER_EXPERT = "surgery convert {path} --to peft --experts per-expert --base BASE -o OUT"
FUSE = "surgery convert {path} --to peft --experts fused --base BASE -o OUT"
MERGE = "surgery merge BASE {path} -o OUT"
TO_MLX = "surgery convert {path} --to mlx --base BASE -o OUT"

# Files that many facts come from.
HELPER = "vLLM 0.32.0, lora/peft_helper.py"
GGUF = "llama.cpp (llama-cpp-python 0.3.36), convert_lora_to_gguf.py"


def is_router(module: str) -> bool:
    """Whether a module is a router, which PEFT addresses as a parameter."""
    return module.endswith((".gate", ".router"))
