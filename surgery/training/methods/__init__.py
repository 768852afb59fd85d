"""What a training run changes in a model: all of it, some of it, or something small that is added to it.

`apply_method` prepares a model in place; what it returns can be trained and saved. `load_method` puts what was saved
onto a base again, `continue_method` does so to train it on. LoRA, prompts and prefixes are PEFT's; bottleneck adapters,
infixes and the choice of parameters are ours.
Source of the methods: Hu et al., "LoRA" (2021), section 5.1, which compares them.
"""

from __future__ import annotations

from surgery.training.methods.apply import apply_method, continue_method, load_method
from surgery.training.methods.options import METHODS, MethodOptions, parse_rate, parse_top
from surgery.training.methods.prepared import Prepared

__all__ = [
    "METHODS",
    "MethodOptions",
    "Prepared",
    "apply_method",
    "continue_method",
    "load_method",
    "parse_rate",
    "parse_top",
]
