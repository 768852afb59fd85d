"""Measure us and our peers, print tables, and write them to .bench/results.json and .bench/results.md.

    python benchmarks/run_all.py [--only NAME] [--runs N] [--quick] [--keep] [--docs]

The peak memory of a measured process starts at that of the process that started it, so nothing large is imported here:
what needs torch runs in processes of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.suite import main

    sys.exit(main())
