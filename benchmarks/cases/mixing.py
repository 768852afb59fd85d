"""Eight adapters in one batch, against the base alone and against PEFT's `adapter_names`."""

from __future__ import annotations

import json
from statistics import median

from benchmarks.measuring import Workshop
from benchmarks.models import ALL_LINEAR, Shape
from benchmarks.table import Result, Row, at_most, seconds

# Held in float32 by all three; a layer is small enough for its overhead to show.
SHAPE = Shape(512, 1408, 256, 8, shards=1)
ADAPTERS, LENGTHS = 8, (32, 128)
MOST_DIFFERENCE = 1e-5


def run(workshop: Workshop) -> Result:
    shape = workshop.shape(SHAPE)
    adapters = [workshop.adapter(shape, ALL_LINEAR, number + 1) for number in range(ADAPTERS)]
    lengths = ",".join(map(str, LENGTHS))
    printed = workshop.unmeasured("mixed_batches", workshop.base(shape), lengths, str(workshop.runs), *adapters)
    rows: list[Row] = []
    for found in json.loads(printed):
        tokens, spent = found["length"], found["seconds"]
        # Neighbours in time are compared with one another: the machine's pace drifts.
        base, mine, peft = spent["base"], spent["surgery"], spent["peft"]
        beyond = median(one / other for one, other in zip(mine, base, strict=True))
        faster = median(other / one for one, other in zip(mine, peft, strict=True))
        figures = seconds(median(mine)), seconds(median(base)), seconds(median(peft))
        rows += [
            Row(
                f"CPU against the base alone, {tokens} tokens a row", figures[0], figures[1], beyond,
                "at most 1.25 times", beyond <= 1.25,
            ),
            Row(
                f"CPU against PEFT's adapter_names, {tokens} tokens a row", figures[0], figures[2], faster,
                "at least 1 times less", faster > 1,
            ),
            at_most(
                f"difference from one at a time, {tokens} tokens a row",
                found["difference"], MOST_DIFFERENCE, "{:.1e}".format, 1,
            ),
        ]  # fmt: skip
    note = (
        f"{ADAPTERS} rows, each with a LoRA of rank 16 on all linear layers of its own, on a Llama of hidden size "
        f"{shape.hidden} and {shape.layers} layers in float32. Seconds of one forward pass, in one process, taken in "
        "turn; ratios are medians over neighbouring calls. Loading is not counted."
    )
    return Result(f"{ADAPTERS} adapters in one batch", [note], [], rows)
