"""What `analyze` reports. Plain data.

    dW = s B A, of an adapter at a module: (out, in), rank r      W: (out, in), the base's weight there
    phi(i, j): how much of the leading i directions of one lies in the leading j of the other, from 0 to 1

The output side are the left singular vectors of a matrix (out, in), the input side the right ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix, sigma_1 first, and how many directions it needs.

    Attributes:
        norm: the Frobenius norm, the root of the sum of their squares.
        rank: how many there are: min(out, in) for W, the rank of the factors for dW.
        positions: which of them `values` lists, from 1: all, or some in even steps of the logarithm.
        values: these singular values.
        stable_rank: norm^2 / sigma_1^2.
        effective_rank: the exponential of the entropy of the shares sigma_i / sum of sigma (Roy and Vetterli 2007).
        rank_90, rank_99: the least number of directions that hold 90% and 99% of norm^2.
    """

    norm: float
    rank: int
    positions: tuple[int, ...]
    values: tuple[float, ...]
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_99: int


@dataclass(frozen=True)
class Overlap:
    """How far two subspaces of one space are the same, each with its leading directions first.

    Attributes:
        phi: row i, column j: phi(i, j), from 1 up to the number of directions asked for.
        whole: phi(a, b) of all a directions of the one and all b of the other.
        chance: what `whole` is on average for random subspaces of these sizes: max(a, b) / dimension.
    """

    phi: tuple[tuple[float, ...], ...]
    whole: float
    chance: float


@dataclass(frozen=True)
class UpdateReport:
    """What one adapter does at one module.

    Attributes:
        adapter: its place among the adapters of the report, from 0.
        rank: r, of its factors.
        directions: how many of them are not zero; what follows is about these.
        change: ||dW|| / ||W||; None where W is zero.
        spectrum: of dW.
        seen: ||U^T W V||, with U and V the singular vectors of dW: what W has in the directions of dW.
        own: the same with as many leading singular vectors of W itself, the most there could be.
        chance: the same with random directions, root mean square: r ||W|| / sqrt(out in).
        amplification: ||dW|| / `seen`; None where that is no number.
        chance_amplification: ||dW|| / `chance`; None likewise.
        output, input: overlap of the directions of dW (i) with as many leading ones of W (j); None for a dW of zeros.
    """

    adapter: int
    rank: int
    directions: int
    change: float | None
    spectrum: Spectrum
    seen: float
    own: float
    chance: float
    amplification: float | None
    chance_amplification: float | None
    output: Overlap | None
    input: Overlap | None


@dataclass(frozen=True)
class PairReport:
    """How the dW of two adapters relate at one module.

    Attributes:
        left, right: their places among the adapters of the report, from 0.
        cosine: of the angle between the two dW, seen as vectors; None where one is zero.
        output, input: overlap of their directions; None likewise.
    """

    left: int
    right: int
    cosine: float | None
    output: Overlap | None
    input: Overlap | None


@dataclass(frozen=True)
class AnalyzedModule:
    """One matrix of the base.

    Attributes:
        name: of the stored tensor, with the number of the expert in brackets where it is one of a stack.
        group: what it has in common with its like in other layers, such as `self_attn.q_proj`.
        part: `attention`, `mlp`, `experts` or another part of the model.
        layer: zero-based, or None outside of the layers.
        shape: (out, in).
        norm: ||W||.
        spectrum: of W; None where adapters are analyzed.
        updates: of the adapters that act on it.
        pairs: of every two of them.
    """

    name: str
    group: str
    part: str
    layer: int | None
    shape: tuple[int, int]
    norm: float
    spectrum: Spectrum | None = None
    updates: tuple[UpdateReport, ...] = ()
    pairs: tuple[PairReport, ...] = ()


@dataclass(frozen=True)
class AnalyzeReport:
    """What `analyze` found.

    Attributes:
        label: of the base, as given.
        adapters: their names, without paths.
        weights: of the adapters.
        modules: in natural order of their names.
        left_out: what adapters hold beside factors, which has no dW to decompose.
        plot: the picture that was written, as given.
        notes: sentences about what the numbers do not cover.
    """

    label: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    modules: tuple[AnalyzedModule, ...]
    left_out: tuple[str, ...] = ()
    plot: str | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
