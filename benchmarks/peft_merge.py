"""Peer: merging an adapter the usual way, through a model in memory.

python peft_merge.py BASE ADAPTER OUT
"""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    base, adapter, out = sys.argv[1:4]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)


if __name__ == "__main__":
    main()
