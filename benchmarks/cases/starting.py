"""How long `surgery --help` takes, against importing the library that parses its arguments."""

from __future__ import annotations

import sys

from benchmarks.measuring import Process, Workshop, ours
from benchmarks.table import Result, at_most, seconds

LEAST_RUNS = 15


def run(workshop: Workshop) -> Result:
    help_, click = "surgery --help", "python -c 'import click'"
    found = workshop.alternate(
        Process(help_, ours("--help")),
        Process(click, (sys.executable, "-c", "import click")),
        keep=False,
        least=LEAST_RUNS,
    )
    row = at_most("CPU against click", found[help_].cpu, found[click].cpu, seconds, 3)
    return Result("Start-up", ["Byte code is compiled beforehand."], list(found.values()), [row])
