"""Peak memory of merging into a checkpoint and into one of four times its size, in tensors of the same sizes."""

from __future__ import annotations

from benchmarks.measuring import OUT, Process, Workshop, ours
from benchmarks.models import ALL_LINEAR, LONG, SHORT, Shape
from benchmarks.table import Result, at_most, megabytes


def run(workshop: Workshop) -> Result:
    shapes = workshop.shape(SHORT), workshop.shape(LONG)
    modes = {"": (), " --no-hash": ("--no-hash",)}
    found = workshop.alternate(
        *(
            Process(_name(mode, shape), _merge(workshop, shape, *options))
            for mode, options in modes.items()
            for shape in shapes
        ),
        keep=False,
    )
    rows = []
    for mode in modes:
        short, long = (found[_name(mode, shape)] for shape in shapes)
        figure = f"peak memory, 4x against 1x, surgery merge{mode}"
        rows.append(at_most(figure, long.peak, short.peak, megabytes, 1.1))
    sizes = " and ".join(f"{shape.layers} layers, {shape.nbytes / 1e6:.0f} MB" for shape in shapes)
    note = f"Rank 16 on all linear layers, hidden size {shapes[0].hidden}: {sizes}."
    return Result("Memory does not grow with the checkpoint", [note], list(found.values()), rows)


def _name(mode: str, shape: Shape) -> str:
    return f"surgery merge{mode}, {shape.layers} layers"


def _merge(workshop: Workshop, shape: Shape, *options: str) -> tuple[str, ...]:
    base, adapter = workshop.base(shape), workshop.adapter(shape, ALL_LINEAR)
    return ours("merge", base, adapter, *options, "--quiet", "--output", OUT)
