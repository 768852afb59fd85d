"""Upcycling: against mergekit-moe on the same model, and against writing the same bytes with cp."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.measuring import OUT, Measured, Process, Workshop, ours
from benchmarks.models import LARGE
from benchmarks.table import Result, Row, at_most, fewer_times, megabytes, seconds

MERGEKIT, COPY = "mergekit-moe", "cp -r and sync"
# As it is meant to be used at speed, and with everything on.
BARE, FULL = "surgery upcycle --no-verify --no-hash", "surgery upcycle"
LEAST_RUNS = 5


def against_mergekit(workshop: Workshop) -> Result:
    """8 experts in every layer, routers drawn at random."""
    shape = workshop.shape(LARGE)
    base = workshop.folder / "outputs" / "with-tokenizer"
    workshop.unmeasured("with_tokenizer", workshop.base(shape), base)
    processes = [
        Process(BARE, _ours(base, 8, "--no-verify", "--no-hash")),
        Process(FULL, _ours(base, 8)),
    ]
    if workshop.mergekit is not None:
        processes.append(Process(MERGEKIT, _mergekit(workshop, base), runs=3))
    found = workshop.alternate(*processes, keep=False)
    rows: list[Row] = []
    if MERGEKIT in found:
        peer = found[MERGEKIT]
        for name in (BARE, FULL):
            bar = 4.0 if name == BARE else None
            rows.append(_less(f"CPU against mergekit-moe, {name}", found[name], peer, bar))
        rows.append(at_most(f"peak memory against mergekit-moe, {BARE}", found[BARE].peak, peer.peak, megabytes, 0.1))
    note = (
        f"8 experts from each MLP of a Llama of hidden size {shape.hidden} and {shape.layers} layers, "
        f"{shape.nbytes / 1e6:.0f} MB in bfloat16, as a Mixtral. mergekit-moe takes the same model eight times, with "
        "random gates. It does not compare the result with the dense model, and hashes nothing."
    )
    return Result("Upcycling against mergekit-moe", [note], list(found.values()), rows)


def _less(figure: str, mine: Measured, peer: Measured, bar: float | None) -> Row:
    if bar is not None:
        return fewer_times(figure, mine.cpu, peer.cpu, seconds, bar)
    return Row(figure, seconds(mine.cpu), seconds(peer.cpu), peer.cpu / mine.cpu)


def against_copying(workshop: Workshop) -> Result:
    """32 experts, more than 5 GB of output."""
    shape = workshop.shape(LARGE.with_layers(3))
    base = workshop.base(shape)
    made = workshop.folder / "outputs" / "written"
    workshop.unmeasured("upcycle_once", base, made, "32")
    nbytes = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    copy = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
    found = workshop.alternate(
        Process(BARE, _ours(base, 32, "--no-verify", "--no-hash")),
        Process(COPY, ("sh", "-c", copy, "sh", str(made), OUT)),
        Process(f"{FULL} --no-verify", _ours(base, 32, "--no-verify")),
        keep=False,
        least=LEAST_RUNS,
    )
    mine, copied = found[BARE], found[COPY]
    rows = [
        at_most(f"wall time against cp, {BARE}", mine.wall, copied.wall, seconds, 1.25),
        at_most(f"peak memory, {BARE}", mine.peak, 150e6, megabytes, 1.0),
        Row(
            f"wall time against cp, {FULL} --no-verify",
            seconds(found[f"{FULL} --no-verify"].wall),
            seconds(copied.wall),
            found[f"{FULL} --no-verify"].wall / copied.wall,
        ),
    ]
    note = (
        f"32 experts from each MLP of a Llama of hidden size {shape.hidden} and {shape.layers} layers: "
        f"{nbytes / 1e9:.1f} GB written from {shape.nbytes / 1e6:.0f} MB. `cp` copies that output; both end with it "
        "synced to disk. Inputs are in the page cache."
    )
    return Result("Upcycling against copying", [note], list(found.values()), rows)


def _ours(base: Path, experts: int, *options: str) -> tuple[str, ...]:
    return ours("upcycle", base, "--experts", str(experts), *options, "--quiet", "--output", OUT)


def _mergekit(workshop: Workshop, base: Path) -> tuple[str, ...]:
    """mergekit-moe beside the command that was found, with a config that names the model eight times."""
    assert workshop.mergekit is not None
    experts = [{"source_model": str(base), "positive_prompts": [f"expert {number}"]} for number in range(8)]
    config = {"base_model": str(base), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    file = workshop.folder / "mergekit-moe.yml"
    file.write_text(json.dumps(config))  # JSON is YAML
    options = ("--i-understand-this-is-not-useful-without-training", "--random-seed", "0")
    return (str(workshop.mergekit.with_name("mergekit-moe")), str(file), OUT, *options)
