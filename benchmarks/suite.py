"""The command line of `run_all.py`: goes through the benchmarks, prints what they find, and writes it down."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks import machine
from benchmarks.cases import (
    combining,
    copying,
    exact,
    extraction,
    hub,
    memory,
    merging,
    mixing,
    registry,
    reversing,
    starting,
    training,
    undo_record,
    upcycling,
)
from benchmarks.measuring import ROOT, ProcessError, Workshop
from benchmarks.table import Result

BENCHMARKS: dict[str, Callable[[Workshop], Result]] = {
    "extract-large": extraction.large,
    "extract-small": extraction.small,
    "merge": merging.run,
    "reversible": reversing.run,
    "undo-record": undo_record.run,
    "exact-sizes": exact.sizes,
    "exact-speed": exact.speed,
    "memory": memory.run,
    "combine": combining.run,
    "copy": copying.run,
    "registry": registry.run,
    "hub": hub.run,
    "upcycle": upcycling.against_mergekit,
    "upcycle-copy": upcycling.against_copying,
    "training": training.run,
    "mixed": mixing.run,
    "startup": starting.run,
}
RUNS = 5
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- begin results -->", "<!-- end results -->"


def main() -> int:
    given = _arguments()
    workshop = Workshop(given.folder, 1 if given.quick else given.runs, given.quick, _mergekit(), _trl())
    workshop.folder.mkdir(parents=True, exist_ok=True)
    workshop.compile()
    names = given.only or list(BENCHMARKS)
    results: dict[str, Result] = {}
    failed = []
    head = machine.describe(workshop.mergekit) + "."
    if workshop.mergekit is None:
        head += "\n\nmergekit not found, skipped: set MERGEKIT_BIN as docs/benchmarks.md says."
    if workshop.trl is None:
        head += "\n\nTRL not found, skipped: set TRL_PYTHON as docs/benchmarks.md says."
    if workshop.quick:
        head += "\n\nA quick run: the sizes are too small for the figures to say anything."
    print(head, flush=True)
    for name in names:
        try:
            results[name] = BENCHMARKS[name](workshop)
            print(f"\n{results[name].markdown()}", flush=True)
        except ProcessError as error:
            failed.append(name)
            print(f"\n### {name}: failed\n\n{error}", flush=True)
        finally:
            workshop.clear()
    if not given.keep:
        workshop.clear_models()
    text = "\n\n".join([head, *(result.markdown() for result in results.values())])
    _write(workshop, head, text, results)
    if given.docs and not failed:
        _write_page(text)
    missed = [f"{name}: {row.figure}" for name, result in results.items() for row in result.rows if row.met is False]
    print("\n" + ("\n".join(["Missed:", *missed]) if missed else "No bar was missed."))
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure us and our peers on the same files.")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each process (default {RUNS})")
    parser.add_argument("--quick", action="store_true", help="try the scripts on tiny models, one run each")
    parser.add_argument("--keep", action="store_true", help="keep the models for another run (5 GB)")
    parser.add_argument("--docs", action="store_true", help="put the tables into docs/benchmarks.md")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench", help="where to work (default .bench)")
    given = parser.parse_args()
    if given.docs and (given.quick or given.only):
        parser.error("--docs wants all benchmarks at full size")
    given.folder = given.folder.absolute()
    return given


def _mergekit() -> Path | None:
    """`mergekit-extract-lora` in the folder that MERGEKIT_BIN names, or on the search path."""
    found = shutil.which("mergekit-extract-lora", path=os.environ.get("MERGEKIT_BIN"))
    return Path(found).absolute() if found else None


def _trl() -> Path | None:
    """The interpreter that TRL_PYTHON names: one that has TRL, with our packages."""
    found = os.environ.get("TRL_PYTHON")
    return Path(found).absolute() if found else None


def _write(workshop: Workshop, head: str, text: str, results: dict[str, Result]) -> None:
    content = {
        "environment": head,
        "quick": workshop.quick,
        "benchmarks": {name: result.as_dict() for name, result in results.items()},
    }
    (workshop.folder / "results.json").write_text(json.dumps(content, indent=2))
    (workshop.folder / "results.md").write_text(text + "\n")


def _write_page(text: str) -> None:
    """Replace the results in docs/benchmarks.md, between two comments that do not show."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
