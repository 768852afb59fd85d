"""The options of `extract`."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.errors import OptionError
from surgery.ops.factor import SvdOptions
from surgery.sites import TARGETS

DEFAULT_RANK = 16
BEST = "best"


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What to extract.

    Attributes:
        rank: the same for every module (a smaller matrix gets its full rank); 16 if nothing else is given. `best`, with
            `exact`, is for each module the rank that makes adapter and record smallest together.
        energy: instead, for each module the least rank that keeps this share of ||dW||^2, in (0, 1].
        budget: instead, this many parameters in all, shared over modules so that the total error is least.
        max_rank: bound on the ranks that `energy` and `budget` choose.
        targets: which modules, see `sites.select`.
        method: `randomized` or `exact`.
        dtype: of the factors: `float32` or `bfloat16`.
        save_residual: store what changed and has no factors whole, as `modules_to_save`.
        allow_missing: report tensors found in one checkpoint only, instead of refusing.
        allow_nonfinite: take NaN and infinity for no change, instead of refusing.
        any_base: extract even if the two do not look like a base and its fine-tune.
        base_name: what the adapter should call its base; by default the base's Hub id or folder name.
        seed: of the randomised SVD.
        exact: write the record, too, from which `restore` gives TUNED back.
    """

    rank: int | str | None = None
    energy: float | None = None
    budget: int | None = None
    max_rank: int | None = None
    targets: str = "all-linear"
    method: str = "randomized"
    dtype: str = "float32"
    save_residual: bool = False
    allow_missing: bool = False
    allow_nonfinite: bool = False
    any_base: bool = False
    base_name: str | None = None
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(
                f"--{given[0]} and --{given[1]} exclude each other; give one of --rank, --energy, --budget."
            )
        for name in ("rank", "budget", "max_rank"):
            value = getattr(self, name)
            if name == "rank" and isinstance(value, str):
                if value != BEST:
                    raise OptionError(f"--rank is {value!r}, expected a number or 'best'.")
                if not self.exact:
                    raise OptionError("--rank best weighs the adapter against the exact record; it wants --exact.")
            elif value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} is {value}, expected at least 1.")
        if self.max_rank is not None and self.energy is None and self.budget is None:
            raise OptionError("--max-rank bounds the ranks of --energy and --budget; give one of them.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise OptionError(f"--energy is {self.energy}, expected a share above 0 and at most 1.")
        if self.method not in ("randomized", "exact"):
            raise OptionError(f"--method is {self.method!r}, expected 'randomized' or 'exact'.")
        if self.dtype not in ("float32", "bfloat16"):
            raise OptionError(f"--dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'.")
        if not self.targets.replace(",", " ").strip():
            raise OptionError(f"--targets is empty; name {TARGETS}.")

    @property
    def svd(self) -> SvdOptions:
        dtype = {"float32": "F32", "bfloat16": "BF16"}[self.dtype]
        return SvdOptions(self.method, dtype, self.seed, self.allow_nonfinite)

    @property
    def fixed_rank(self) -> int | None:
        """The rank of every module, or None where the data decide."""
        if self.energy is not None or self.budget is not None or isinstance(self.rank, str):
            return None
        return self.rank or DEFAULT_RANK
