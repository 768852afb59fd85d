"""The memory that measuring a mixture takes, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.upcycling.planning import Upcycling

# What a process holds that has torch and transformers in it, and no model yet.
_PROGRAM_BYTES = 600_000_000
# Of a parameter: 4 in float32, up to 2 of the file that is mapped, and 3 of what transformers stacks as it loads; a
# Mixtral of 0.5 billion parameters in bfloat16 took 8.8.
_BYTES_PER_PARAMETER = 9
# Tokens in one pass at most, for the estimate of memory.
_TOKENS = 512


def memory_needed(work: Upcycling, parameters: int) -> int:
    """Bytes that measuring takes at most: the larger model while it is loaded, and what passes through it."""
    hidden = max(mlp.hidden for mlp in work.mlps)
    inner = max(mlp.inner for mlp in work.mlps)
    return memory_of(max(parameters, work.checkpoint.parameters), work.checkpoint, hidden + inner)


def memory_of(parameters: int, checkpoint: Checkpoint, width: int = 0) -> int:
    """Bytes that a model of so many parameters takes; `width` is the hidden size and the intermediate size together."""
    vocabulary = checkpoint.config.get("vocab_size")
    # Logits of a pass and their logarithms, those kept, and the widest layer with its copies for each expert's tokens.
    wide = 3 * (vocabulary if isinstance(vocabulary, int) else 0) + 16 * width
    return _PROGRAM_BYTES + _BYTES_PER_PARAMETER * parameters + 4 * _TOKENS * wide


def free_memory() -> int:
    """Bytes that a process can still take without swapping: file caches count, and the limit of a container binds."""
    found = []
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:  # the second version of control groups, as containers see it
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        caches = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - int((group / "memory.current").read_text()) + int(caches.get("file", 0)))
    except (OSError, ValueError):
        pass
    return max(0, min(found, default=0))
