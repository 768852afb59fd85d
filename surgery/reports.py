"""What operations report: the objects that the library returns and the command line prints. Plain data.

Shares are between 0 and 1, norms are Frobenius norms, sizes are bytes. `as_dict` gives what `--json` prints, and
`numbers` the part that goes into `surgery.json`: nothing about where or how the work was run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from surgery.operation import PlanSummary


@dataclass(frozen=True)
class Fetched:
    """What was read of a repository on a Hub.

    Attributes:
        source: its id.
        revision: the commit.
        nbytes: that came over the network; what the Hub's cache held did not.
        proved: weight files that have the SHA-256 the Hub gives them, or the tensors that `surgery.json` has on record.
        unproved: weight files of which parts were read that no hash is known of.
    """

    source: str
    revision: str
    nbytes: int
    proved: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()

    def __add__(self, other: Fetched) -> Fetched:
        """Both readings of one repository together."""
        return Fetched(
            self.source,
            self.revision,
            self.nbytes + other.nbytes,
            tuple(sorted({*self.proved, *other.proved} - {*self.unproved, *other.unproved})),
            tuple(sorted({*self.unproved, *other.unproved})),
        )


@dataclass(frozen=True)
class Report:
    """What all reports of operations that write share.

    Attributes:
        output: the target, as given.
        plan: what the operation was going to do.
        dry_run: whether that is all there is.
        resumed: steps taken over from an interrupted run.
        fetched: what came over the network, one entry for each repository on a Hub that was read.
    """

    output: str
    plan: PlanSummary
    dry_run: bool = field(default=False, kw_only=True)
    resumed: int = field(default=0, kw_only=True)
    fetched: tuple[Fetched, ...] = field(default=(), kw_only=True)

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def numbers(self) -> dict[str, object]:
        """The report without what differs between two runs of the same work."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_THE_RUN}


_OF_THE_RUN = {"output", "plan", "dry_run", "resumed", "planned", "fetched"}


@dataclass(frozen=True)
class PlannedAdapter:
    """What a dry run of `extract` foretells, at most: modules that turn out equal in both checkpoints get no factors.

    Attributes:
        modules: that are targeted.
        rank: of every module, or None where `energy` or `budget` choose.
        parameters: of all factors.
        nbytes: of the weight file, without what `save_residual` adds.
    """

    modules: int
    rank: int | None
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class ModuleReport:
    """What one module's factors keep of its dW.

    Attributes:
        shape: (out, in), or (experts, out, in).
        change: ||dW|| / ||W||; None where W is zero.
        energy_kept: 1 - error^2.
        error: ||dW - B A|| / ||dW||, measured with the stored factors.
        excess: the randomised SVD's certificate: by what share `error` lies above the least possible for the rank, as
            far as the spectrum foretells; 0 for the exact method.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    rank: int
    change: float | None
    energy_kept: float
    error: float
    excess: float


@dataclass(frozen=True)
class ResidualReport:
    """A parameter that changed and has no factors. `change` is None where there is nothing to compare with."""

    name: str
    part: str
    change: float | None
    saved: bool
    reason: str


@dataclass(frozen=True)
class ExactTensor:
    """How an exact extraction keeps one tensor of the fine-tune.

    Attributes:
        how: `same` (as the base, or as the adapter has it), `coded`, or `literal`.
        nbytes: of its code; 0 where it is the same.
        tuned_bytes: of the tensor itself.
    """

    name: str
    how: str
    nbytes: int
    tuned_bytes: int


@dataclass(frozen=True)
class ExactReport:
    """What it takes to give the fine-tune back.

    Attributes:
        adapter_bytes: of the adapter's files.
        residual_bytes: of the codes.
        record_bytes: of all of `exact/`: codes, hashes, headers and other files.
        tuned_bytes: of the fine-tune's files.
        ratio: (adapter_bytes + record_bytes) / tuned_bytes.
        tensors: every tensor of the fine-tune.
        notes: sentences about what is not on record.
    """

    adapter_bytes: int
    residual_bytes: int
    record_bytes: int
    tuned_bytes: int
    ratio: float
    tensors: tuple[ExactTensor, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExtractReport(Report):
    """What `extract` found and wrote. `change`, `energy_kept` and `error` are over all factored modules together.

    `unchanged` counts targeted modules that are equal in both checkpoints and so have no factors. `exact` is what an
    exact extraction keeps beside the adapter; `estimated_record_bytes` what a dry run expects of it at most, as
    `planned` is what it expects of the adapter.
    """

    modules: tuple[ModuleReport, ...] = ()
    residual: tuple[ResidualReport, ...] = ()
    unchanged: int = 0
    parameters: int = 0
    nbytes: int = 0
    change: float = 0.0
    energy_kept: float = 0.0
    error: float = 0.0
    notes: tuple[str, ...] = ()
    exact: ExactReport | None = None
    estimated_record_bytes: int | None = None
    planned: PlannedAdapter | None = None


@dataclass(frozen=True)
class RestoreReport(Report):
    """What `restore` wrote, every tensor and file of it proved by its hash.

    Attributes:
        tuned: what the fine-tune was called.
        tensors: how many it has.
        same: how many of them are the base's or the adapter's as they are.
        files: how many files it has.
        nbytes: of all of them.
    """

    tuned: str = ""
    tensors: int = 0
    same: int = 0
    files: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class WeightReport:
    """What the rounding left of the change of one stored tensor.

    Attributes:
        survived: 1 - || realised dW - dW || / || dW ||; None where dW is zero. It falls to 0 and below where a small dW
            vanishes between two neighbouring numbers of the dtype.
        unchanged_share: share of the weights that are the same number before and after.
    """

    name: str
    survived: float | None
    unchanged_share: float


@dataclass(frozen=True)
class MergeReport(Report):
    """What `merge`, `subtract` or `switch` wrote. The two shares are over all changed weights together.

    Attributes:
        weights: tensors that adapters were added to.
        replaced: tensors that an adapter put in the place of the base's.
        added: tensors that the base does not have.
        copied: how many tensors moved as bytes.
        nbytes: of the weight files.
        record_bytes: of the undo record; 0 without one.
        exact: for `subtract` and `switch`: whether the base was restored to the bit and proved by its hashes.
        removed: for `subtract` and `switch`: the adapters taken out.
        holds: after an exact `subtract` or `switch`, the adapters that are merged into the base.
        expected_error: for an inexact `subtract`: what the rounding of the merge may have left, || . || / ||W||.
    """

    weights: tuple[WeightReport, ...] = ()
    survived: float | None = None
    unchanged_share: float = 0.0
    replaced: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    copied: int = 0
    nbytes: int = 0
    record_bytes: int = 0
    exact: bool | None = None
    removed: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    expected_error: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertReport(Report):
    """What `convert` read and wrote.

    Attributes:
        source_format, target_format: `peft`, `kohya`, `diffusers` or `mlx`.
        modules: with factors, in the output.
        tensors: in the output.
        moved: those among them whose bytes are the input's.
        scaled: those that were multiplied, because the target cannot express their scale otherwise.
        scale_error: the largest relative error of a scale, from rounding an alpha; 0 where all are exact.
        parameters: numbers in the output.
        nbytes: size of the weight file.
        file: its name in the output.
    """

    source_format: str = ""
    target_format: str = ""
    modules: int = 0
    tensors: int = 0
    moved: int = 0
    scaled: int = 0
    scale_error: float = 0.0
    parameters: int = 0
    nbytes: int = 0
    file: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CombinedModule:
    """What `combine` or `resize` made of one module.

    M is what the method makes of the adapters' dW before its rank is cut: their weighted sum for `sum` and `cat`, and
    with `as_peft`; for `tsv` and `iso` what they make at the rank.

    Attributes:
        shape: (out, in), or (experts, out, in).
        ranks: of each adapter at this module; 0 for one that does not have it.
        rank: of the result.
        energy_kept: 1 - error^2.
        error: ||M - B A|| / ||M||, measured with the stored factors.
        from_sum: || sum of the weighted dW - B A || / || sum of the weighted dW ||; None where the sum is zero.
        excess: as for `ModuleReport`, where M has no small basis and is factored by randomised SVD; 0 elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    energy_kept: float
    error: float
    from_sum: float | None
    excess: float


@dataclass(frozen=True)
class CombineReport(Report):
    """What `combine` or `resize` wrote. `energy_kept`, `error` and `from_sum` are over all modules together.

    Attributes:
        method: how the adapters were combined.
        adapters: their names, without paths.
        weights: of the adapters.
        stored_whole: tensors taken along as they are.
        parameters: numbers in the new adapter.
        nbytes: of its weight file.
    """

    method: str = "sum"
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    modules: tuple[CombinedModule, ...] = ()
    stored_whole: tuple[str, ...] = ()
    parameters: int = 0
    nbytes: int = 0
    energy_kept: float = 1.0
    error: float = 0.0
    from_sum: float | None = None
    notes: tuple[str, ...] = ()
