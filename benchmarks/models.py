"""The sizes of the checkpoints that are measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """A Llama checkpoint: widths, number of layers, and how many files it is stored in."""

    hidden: int
    intermediate: int
    kv: int
    layers: int
    vocab: int = 8000
    shards: int = 3

    @property
    def name(self) -> str:
        return f"{self.hidden}x{self.layers}"

    @property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor, in bfloat16."""
        return 2 * self.hidden * max(self.vocab, self.intermediate)

    @property
    def linear_bytes(self) -> int:
        """Bytes of all linear layers, in bfloat16."""
        return 2 * self.layers * self.hidden * (2 * self.hidden + 2 * self.kv + 3 * self.intermediate)

    @property
    def nbytes(self) -> int:
        """Bytes of the checkpoint."""
        norms = 2 * self.hidden * (2 * self.layers + 1)
        return self.linear_bytes + norms + 4 * self.vocab * self.hidden

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)

    def shrunk(self) -> Shape:
        """Small enough for a test; layers keep their proportion."""
        return Shape(128, 192, 64, max(1, self.layers // 4), 256, 2)


LARGE = Shape(2048, 5632, 1024, 8)
SMALL = Shape(1024, 2816, 512, 8)
# The longer one has four times the bytes of the shorter, in tensors of the same sizes, and is over 2 GB.
SHORT = LARGE.with_layers(5)
LONG = LARGE.with_layers(22)

ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
QUERY_AND_VALUE = "q_proj,v_proj"
