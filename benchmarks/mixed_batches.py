"""Time a forward pass of a batch whose rows have adapters of their own: ours, PEFT's, and the base alone. Prints JSON.

    python -m benchmarks.mixed_batches BASE LENGTHS RUNS ADAPTER...

One row for each adapter. All three are called in turn in one process, after one call each that is not counted; seconds
are those of the processor. PEFT has all adapters loaded and is told the rows' by `adapter_names`. The difference is
the largest between our logits and PEFT's with one adapter at a time, as a share of the largest logit.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

import surgery

# What one measurement of each should take at least: the clock and the machine are not steadier.
LEAST_SECONDS = 0.2


def load(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def with_peft(base: Path, adapters: list[Path]) -> Any:
    model = PeftModel.from_pretrained(load(base), str(adapters[0]), adapter_name=adapters[0].name)
    for adapter in adapters[1:]:
        model.load_adapter(str(adapter), adapter_name=adapter.name)
    return model.eval()


def seconds(call: Callable[[], object], times: int) -> float:
    begun = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - begun) / times


def measured(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    times = max(1, round(LEAST_SECONDS / max(seconds(calls["base"], 1), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            found[name].append(seconds(call, times))
    return found


def main() -> None:
    base, lengths, runs = Path(sys.argv[1]), [int(text) for text in sys.argv[2].split(",")], int(sys.argv[3])
    adapters = [Path(text) for text in sys.argv[4:]]
    warnings.simplefilter("ignore")
    names = [adapter.name for adapter in adapters]
    plain, carrying, peft = load(base), load(base), with_peft(base, adapters)
    found = []
    with surgery.mixed_adapters(carrying, adapters) as mixed, torch.inference_mode():
        for length in lengths:
            random = torch.Generator().manual_seed(length)
            ids = torch.randint(0, plain.config.vocab_size, (len(adapters), length), generator=random)

            def ours(ids: torch.Tensor = ids) -> torch.Tensor:
                with mixed.rows(names):
                    logits: torch.Tensor = carrying(ids).logits
                return logits

            def theirs(ids: torch.Tensor = ids) -> object:
                return peft(ids, adapter_names=names)

            def alone(ids: torch.Tensor = ids) -> object:
                return plain(ids)

            spent = measured({"base": alone, "surgery": ours, "peft": theirs}, runs)
            together, difference = ours(), 0.0
            for row, name in enumerate(names):
                peft.set_adapter(name)
                single = peft(ids[row : row + 1]).logits[0]
                apart = float((together[row] - single).abs().max() / single.abs().max())
                difference = max(difference, apart if math.isfinite(apart) else math.inf)
            found.append({"length": length, "seconds": spent, "difference": difference})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
