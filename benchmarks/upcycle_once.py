"""Upcycle a checkpoint once, not measured: what `cp` is to copy.

python -m benchmarks.upcycle_once CHECKPOINT OUT EXPERTS
"""

from __future__ import annotations

import sys

import surgery

if __name__ == "__main__":
    surgery.upcycle(sys.argv[1], output=sys.argv[2], experts=int(sys.argv[3]), hash=False)
