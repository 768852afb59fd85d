"""The hub's server with the stock client: transfers against copying and hashing, growth of the store, many at once."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measuring import Measured, Usage, Workshop
from benchmarks.models import ALL_LINEAR, LARGE, SMALL
from benchmarks.table import Result, Row, at_most, megabytes, seconds

PUSH, PULL, COPY = "hf upload", "hf download", "cp -r and sha256sum"
MOST = {PUSH: 3.0, PULL: 2.0}
EXPERTS = 32
CLIENTS = 32


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(LARGE.with_layers(8))
    found = _runs(workshop, "transfer", workshop.base(shape))
    processes = [
        _measured(workshop, name, found[key]) for name, key in ((PUSH, "push"), (PULL, "pull"), (COPY, "copy"))
    ]
    push, pull, copy = processes
    rows = [
        at_most(f"wall time against {COPY}, {process.name}", process.wall, copy.wall, seconds, MOST[process.name])
        for process in (push, pull)
    ]
    rows.append(
        at_most("server's peak memory while that is pushed", statistics.median(found["server"]), 300e6, megabytes, 1.0)
    )
    dense = workshop.shape(SMALL)
    rows += [*_mixture(workshop, workshop.base(dense)), *_version(workshop), _many(workshop)]
    note = (
        f"{found['nbytes'] / 1e9:.2f} GB in {shape.shards} files, in the page cache, over loopback to a server on a "
        "new folder, by the `hf` command with a new home; start-up is included. The other copies the files and hashes "
        f"the copies. Then {EXPERTS} experts from each MLP of a Llama of {dense.nbytes / 1e6:.0f} MB."
    )
    return Result("The hub's server and the stock client", [note], processes, rows)


def _runs(workshop: Workshop, subject: str, *arguments: Path | int) -> Any:
    runs = 1 if workshop.quick else min(workshop.runs, 3)
    text = workshop.unmeasured(
        "hub_runs", subject, workshop.folder / "outputs" / "hub", str(runs), *map(str, arguments)
    )
    return json.loads(text.splitlines()[-1])


def _measured(workshop: Workshop, name: str, runs: list[dict[str, float]]) -> Measured:
    usages = [Usage(run["wall"], run["cpu"], int(run["peak"])) for run in runs]
    return Measured(name, workshop.folder, usages)


def _mixture(workshop: Workshop, dense: Path) -> list[Row]:
    mixed = workshop.folder / "outputs" / "mixture"
    workshop.unmeasured("upcycle_once", dense, mixed, str(EXPERTS))
    found = _runs(workshop, "mixture", dense, mixed)
    of = f"a {EXPERTS}-expert mixture ({found['mixture'] / 1e6:.0f} MB) after its dense checkpoint"
    return [
        _grown(f"growth by {of}, from {home}", found["grown"][key], found["dense"], 0.15)
        for key, home in (("same", "the same home"), ("new", "a new home"))
    ]


def _version(workshop: Workshop) -> list[Row]:
    adapter = workshop.adapter(workshop.shape(LARGE.with_layers(8)), ALL_LINEAR)
    second = workshop.folder / "outputs" / "second"
    changed = int(workshop.unmeasured("change_layer", adapter, second))
    found = _runs(workshop, "version", adapter, second)
    of = f"version 2 of an adapter ({found['nbytes'] / 1e6:.0f} MB) with one layer changed"
    return [
        _grown(f"growth by {of}, from {home}", found["grown"][key], changed, 2.0)
        for key, home in (("same", "the same home"), ("new", "a new home"))
    ]


def _grown(figure: str, grown: int, of: int, most: float) -> Row:
    return at_most(figure, grown, of, lambda value: f"{value / 1e6:.2f} MB", most)


def _many(workshop: Workshop) -> Row:
    adapter = workshop.adapter(workshop.shape(LARGE.with_layers(8)), ALL_LINEAR)
    found = _runs(workshop, "many", adapter, 4 if workshop.quick else CLIENTS)
    one = found["nbytes"] / statistics.median(found["one"])
    together = found["clients"] * found["nbytes"] / statistics.median(found["all"])
    ratio = together / one
    figure = f"{found['clients']} clients that pull an adapter at once, against one"
    return Row(figure, f"{together / 1e6:.0f} MB/s", f"{one / 1e6:.0f} MB/s", ratio, "not slower", ratio >= 1)
