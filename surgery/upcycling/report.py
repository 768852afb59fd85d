"""What `upcycle` and `dense` report. Plain data; `--json` prints it and `surgery.json` keeps the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.reports import Report


@dataclass(frozen=True)
class StackReport:
    """What became of one stack of layers.

    Attributes:
        stack: `encoder` or `decoder`.
        layers: the sparse ones, zero-based, of `depth`.
        experts: routed experts to a layer.
        top_k: experts to a token, or None under expert choice.
        capacity: under expert choice: experts to a token on average, else None.
        normalized: whether a token's weights sum to one, before `scale`.
        scale: what its experts' outputs are multiplied by beside the weights; 1 unless a mixture that was enlarged has
            another (routed_scaling_factor).
        group: under expert choice: the tokens that compete.
        rank, alpha: of routed LoRA experts: each is (alpha / rank) B A on top of the one MLP; None for copies.
    """

    stack: str
    layers: tuple[int, ...]
    depth: int
    experts: int
    top_k: int | None
    capacity: float | None
    normalized: bool
    group: str | None
    rank: int | None = None
    alpha: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class ConsumerReport:
    """Whether one program loads the output.

    Attributes:
        verdict: `loads`, `warning`, `silently wrong` or `refused`, as `lint` has it.
        reasons: what stands against it, one sentence each.
        option: what would change the verdict, if anything would.
    """

    consumer: str
    verdict: str
    reasons: tuple[str, ...] = ()
    option: str = ""


@dataclass(frozen=True)
class ChoiceReport:
    """What another choice of layers would give.

    Attributes:
        layers: what to give as `--layers`.
        sparse: how many layers it makes sparse.
        target: the model type that would be written.
        nbytes: of its weight files.
        verdicts: consumer to verdict, as in `ConsumerReport`.
    """

    layers: str
    sparse: int
    target: str
    nbytes: int
    verdicts: dict[str, str]


@dataclass(frozen=True)
class ExpertLoad:
    """Where the tokens of the verification went, in one layer: shares of all choices, one to an expert."""

    layer: str
    shares: tuple[float, ...]
    uncovered: float = 0.0


@dataclass(frozen=True)
class PreservationReport:
    """How far the mixture is from the dense model as a function, both in float32.

    Attributes:
        inputs: what they were run on: `2 sequences of 64 random tokens`, or the file.
        largest: the largest difference of two logits.
        relative: || difference || / || dense logits ||.
        agreement: the share of positions whose largest logit is the same.
        bound: what `relative` may be where nothing but rounding is changed, else None.
        dense_loss, loss: mean negative log-likelihood a token on a text, in nats; None without a text.
        loads: of each sparse layer.
    """

    inputs: str
    largest: float
    relative: float
    agreement: float
    bound: float | None = None
    dense_loss: float | None = None
    loss: float | None = None
    loads: tuple[ExpertLoad, ...] = ()


@dataclass(frozen=True)
class UpcycleReport(Report):
    """What `upcycle` wrote.

    Attributes:
        source: the dense model type; of a mixture that was enlarged, its own where the dense one is not known.
        target: the model type written.
        architecture: its class.
        stacks: what became of each stack.
        kind: `copy`, or `lora` for updates of low rank to one MLP.
        init: how the experts started out.
        rest: of several checkpoints or adapters, what became of everything but the experts.
        left_out: tensors that the adapters change and the mixture has as the dense model has them.
        survived: of the adapters' changes, what rounding left: 1 - || realised dW - dW || / || dW ||.
        router_init: how the routers started out.
        parameters: in all.
        active: of those, the ones a token meets.
        stored_parameters: of those, the ones in the weight files: all, or with routed LoRA experts all but the dense
            model's.
        dense_parameters: of the dense model.
        nbytes: of the weight files.
        dense_bytes: of the dense model's.
        preserved: whether the mixture is the dense function by construction, to rounding.
        consumers: who loads it.
        choices: what was asked for, beside the paper's choice of layers and all of them; empty where that is the same,
            or the model has two stacks.
        preservation: the measured difference; None where it was not measured.
        notes: what to know before training it; why it was not measured, too, which depends on the computer and is not
            in `surgery.json`.
    """

    source: str = ""
    target: str = ""
    architecture: str = ""
    stacks: tuple[StackReport, ...] = ()
    kind: str = "copy"
    init: str = ""
    rest: str | None = None
    left_out: tuple[str, ...] = ()
    survived: float | None = None
    router_init: str = ""
    parameters: int = 0
    active: int = 0
    stored_parameters: int = 0
    dense_parameters: int = 0
    nbytes: int = 0
    dense_bytes: int = 0
    preserved: bool = False
    consumers: tuple[ConsumerReport, ...] = ()
    choices: tuple[ChoiceReport, ...] = ()
    preservation: PreservationReport | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DenseReport(Report):
    """What `dense` wrote.

    Attributes:
        source: the mixture's model type.
        target: the dense one.
        architecture: its class.
        layers: those that were mixtures, by stack, zero-based.
        experts: to each of them.
        taken: the expert that is the MLP now (of small experts, the copy); None for the mean of all.
        identical: whether all were the same; None where nobody looked.
        dropped: tensors that the dense model has no place for: routers, silent shared experts, zero biases.
        parameters: in all.
        mixture_parameters: of the mixture.
        nbytes: of the weight files.
        notes: what to know.
    """

    source: str = ""
    target: str = ""
    architecture: str = ""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    experts: int = 0
    taken: int | None = None
    identical: bool | None = None
    dropped: tuple[str, ...] = ()
    parameters: int = 0
    mixture_parameters: int = 0
    nbytes: int = 0
    notes: tuple[str, ...] = ()
