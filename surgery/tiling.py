"""Tiles: the row ranges in which matrices are gone through, so that memory stays flat and work stays in cache."""

from __future__ import annotations

from collections.abc import Iterator

# Elements of one tile: 2 MB in float32, so that a handful of tiles stay in a core's second-level cache.
TILE_ELEMENTS = 1 << 19
# Rows of a tile are a multiple of this and never fewer, unless the matrix itself is smaller: a BLAS sums in another
# order for a handful of rows, and the product of a tile must have the bits of the whole product.
TILE_ROWS = 64


def tiles(rows: int, columns: int, block: int | None = None) -> Iterator[tuple[int, int]]:
    """Row ranges that cover a matrix in order. With `block`, no range crosses a multiple of it: one expert at a time.

    >>> list(tiles(200, 1 << 13))
    [(0, 64), (64, 128), (128, 200)]
    """
    block = block or max(rows, 1)
    step = max(TILE_ROWS, TILE_ELEMENTS // max(columns, 1) // TILE_ROWS * TILE_ROWS)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        count = max(1, (stop - start) // step)  # the remainder joins the last tile
        for number in range(count):
            yield start + number * step, stop if number == count - 1 else start + (number + 1) * step
