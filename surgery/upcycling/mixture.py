"""What a dense model is to become: the mixture of each stack, and the format that holds it. Plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from surgery.checkpoint import Checkpoint

Config = Mapping[str, object]
# The value of a field that the new config must not have.
ABSENT = object()


class Subset(Enum):
    """Which sets of layers a format can make sparse."""

    ALL = "all layers"
    ANY = "any layers"
    SUFFIX = "the last layers"
    RANGE = "layers in one piece or at one interval"


@dataclass(frozen=True)
class Mixture:
    """What each chosen MLP of one stack becomes.

    Attributes:
        layers: zero-based, of `depth`.
        experts: routed experts, small ones where `groups` is more than 1.
        top_k: experts to a token, or None under expert choice.
        capacity: the paper's C under expert choice, else None.
        normalized: whether a token's weights sum to one.
        groups: small experts to one copy of the MLP.
        inner: the intermediate size of the dense MLP.
        shared: whether a silent shared expert is asked for.
        group: the tokens that compete under expert choice.
        rank: of the low-rank updates that the experts are, or None where each is an MLP.
        alpha: an update is (alpha / rank) B A.
    """

    layers: tuple[int, ...]
    depth: int
    experts: int
    top_k: int | None
    capacity: float | None
    normalized: bool
    groups: int
    inner: int
    shared: bool
    group: str = "sequence"
    rank: int | None = None
    alpha: float = 0.0

    @property
    def expert_inner(self) -> int:
        """The intermediate size of an expert."""
        return self.inner // self.groups

    @property
    def all_layers(self) -> bool:
        return len(self.layers) == self.depth

    @property
    def is_suffix(self) -> bool:
        return self.layers == tuple(range(self.depth - len(self.layers), self.depth))

    @property
    def interval(self) -> tuple[int, int, int] | None:
        """First layer, last layer and step, where the layers are so many multiples of the step apart: Ernie's rule."""
        first, last = self.layers[0], self.layers[-1]
        for step in range(1, self.depth + 1):
            if self.layers == tuple(n for n in range(first, last + 1) if (n + 1) % step == 0):
                return first, last, step
        return None


@dataclass(frozen=True)
class Asked:
    """A dense model, its config with every default said, and what is to be made of each stack."""

    checkpoint: Checkpoint
    config: Config
    mixtures: Mapping[str, Mixture]

    @property
    def mixture(self) -> Mixture:
        """Of a model that has one stack."""
        (only,) = self.mixtures.values()
        return only


@dataclass(frozen=True)
class SharedExpert:
    """An expert that sees every token, beside the routed ones.

    Attributes:
        names: the dense MLP's parameters to its own, below the sparse block.
        gate: the matrix (1, hidden) whose sigmoid scales it, if there is one.
        required: whether every consumer looks for it, asked for or not.
        size: its intermediate size where it is only there because it has to be; the dense MLP's otherwise.
    """

    names: Mapping[str, str]
    gate: str = ""
    required: bool = False
    size: Callable[[Mixture], int] = lambda mixture: mixture.expert_inner


@dataclass(frozen=True)
class Block:
    """The names of a sparse block.

    Attributes:
        path: of the block, below its layer.
        router: the router's weight, below the block.
        experts: the dense MLP's parameters to an expert's, with `{e}` for its number.
        stacks: or, where all experts share one tensor: its name, and the dense parameters stacked in it.
        corrections: names and shapes of what balances loads without a loss; zeros, in float32.
        shared: its shared expert, if it has one.
    """

    path: str
    router: str
    experts: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    corrections: tuple[tuple[str, Callable[[int], tuple[int, ...]]], ...] = ()
    shared: SharedExpert | None = None


@dataclass(frozen=True)
class Target:
    """One format.

    Attributes:
        name: its `model_type`.
        classes: the dense checkpoint's class, and its ending such as `ForCausalLM`, to the class here.
        sources: dense model types that it can carry.
        subset: which layers can be sparse.
        blocks: the sparse block in each stack.
        configure: the fields of `config.json` that differ from the dense config's.
        objections: what it cannot express of a checkpoint; the end of a sentence for each.
        tasks: the classes it has, by their ending; empty if it has all.
        expert_choice: whether experts can choose tokens.
        raw: whether weights can be the router's probabilities as they are.
        float32_router: whether the router is stored in float32 whatever the others are.
        preserving: whether normalised top-k keeps the dense function.
        ships: whether its modelling code travels in the checkpoint.
        automatic: whether it is chosen without being named.
        rename: the dense name of a tensor that is kept to its name here.
        rename_back: its name here to the dense one.
        notes: sentences for the report.
    """

    name: str
    classes: Callable[[str, str], str]
    sources: tuple[str, ...]
    subset: Subset
    blocks: Mapping[str, Block]
    configure: Callable[[Asked], dict[str, object]]
    objections: Callable[[Asked], Iterator[str]]
    tasks: tuple[str, ...] = ()
    expert_choice: bool = False
    raw: bool = False
    float32_router: bool = False
    preserving: bool = True
    ships: bool = False
    automatic: bool = True
    rename: Callable[[str], str] = lambda name: name
    rename_back: Callable[[str], str] = lambda name: name
    notes: tuple[str, ...] = ()

    def fits(self, mixture: Mixture) -> bool:
        """Whether the chosen layers are a set that it can express."""
        if self.subset is Subset.ALL:
            return mixture.all_layers
        if self.subset is Subset.SUFFIX:
            return mixture.is_suffix
        return self.subset is Subset.ANY or mixture.interval is not None
