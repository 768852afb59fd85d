"""Upcycled models in this process: importing this registers their classes with transformers.

`AutoModelFor....from_pretrained(folder)` then loads a checkpoint with the classes of `modeling_upcycled.py` from this
package and not from the folder, so that `trust_remote_code` is not needed. Importing this imports transformers; `import
surgery` does not import this.
"""

from __future__ import annotations

import transformers

from surgery.moe import modeling_upcycled
from surgery.moe.modeling_upcycled import MixtureOfExperts, Routing, mixtures, router_loss
from surgery.moe.routed_lora import load_routed_lora, save_routed_lora
from surgery.moe_families import CLASS_PREFIX, UPCYCLED_FAMILIES

__all__ = [
    "MixtureOfExperts",
    "Routing",
    "load_routed_lora",
    "mixtures",
    "register",
    "router_loss",
    "save_routed_lora",
]


def register() -> None:
    """Tell transformers' auto classes about every upcycled class. Importing the package has done so already."""
    for family in UPCYCLED_FAMILIES.values():
        config = getattr(modeling_upcycled, CLASS_PREFIX + family.config_class)
        transformers.AutoConfig.register(family.upcycled_type, config, exist_ok=True)
        for auto, name in family.auto_classes.items():
            model = getattr(modeling_upcycled, CLASS_PREFIX + name)
            getattr(transformers, auto).register(config, model, exist_ok=True)
            if model._auto_class is None:
                model.register_for_auto_class(auto)  # save_pretrained then names it in auto_map


register()
