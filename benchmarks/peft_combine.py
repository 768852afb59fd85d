"""Peer: combining two adapters with PEFT, which needs the model they are for.

python peft_combine.py BASE ADAPTER=WEIGHT ADAPTER=WEIGHT OUT RANK CALLS

Appends the seconds of the one call that combines to CALLS.
"""

from __future__ import annotations

import json
import sys
import time

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    base, one, other, out, rank, calls = sys.argv[1:]
    adapters = [text.rpartition("=") for text in (one, other)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    wrapped = PeftModel.from_pretrained(model, adapters[0][0], adapter_name="one")
    wrapped.load_adapter(adapters[1][0], adapter_name="other")
    weights = [float(weight) for _, _, weight in adapters]
    wall, cpu = time.perf_counter(), time.process_time()
    wrapped.add_weighted_adapter(["one", "other"], weights, "combined", combination_type="svd", svd_rank=int(rank))
    used = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    with open(calls, "a") as file:
        file.write(json.dumps(used) + "\n")
    wrapped.save_pretrained(out, selected_adapters=["combined"])


if __name__ == "__main__":
    main()
