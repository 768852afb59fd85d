"""Names of tensors and modules, as Hugging Face checkpoints spell them.

A parameter's name is `module.path.parameter`; a module path may hold the number of its layer and of its expert:
`model.layers.3.mlp.experts.7.down_proj.weight`.
"""

from __future__ import annotations

import re

# Names come from strangers: no number is longer than a file could hold, and Python reads only so many digits.
_NUMBER = re.compile(r"(\d+)")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block|resblocks|encoder_layers|decoder_layers)\.(\d{1,9})(?:\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts?(?:\.expert)?[._](\d{1,9})(?:\.|$)")


def plain(text: str) -> str:
    r"""Text that a terminal shows and does not obey: what is unprintable is spelt as in a Python string.

    >>> plain("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """A sort key under which `layers.2` comes before `layers.10`; no two names have the same one.

    >>> sorted(["layers.10.w", "layers.2.w"], key=natural_key)
    ['layers.2.w', 'layers.10.w']
    """
    parts = (part for part in _NUMBER.split(name) if part)
    key = tuple((0, int(part)) if part.isdecimal() and len(part) < 19 else (1, part) for part in parts)
    return key, name  # since `01` and `1` are the same number


def split_parameter(name: str) -> tuple[str, str]:
    """Split `a.b.weight` into its module `a.b` and its parameter `weight`; a bare name has the module ``""``."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


def layer_of(name: str) -> int | None:
    """Zero-based layer number in a name, or None where there is none.

    >>> layer_of("model.layers.3.mlp.experts.7.w1.weight"), layer_of("lm_head.weight")
    (3, None)
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def expert_of(name: str) -> int | None:
    """Zero-based expert number in a name, or None where there is none."""
    match = _EXPERT.search(name)
    return int(match.group(1)) if match else None
