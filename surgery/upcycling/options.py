"""What to make of a dense checkpoint: the options of `upcycle`, and the small languages that they are written in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from surgery.errors import OptionError

TOP_K, EXPERT_CHOICE = "top-k", "expert-choice"
ROUTERS = (TOP_K, EXPERT_CHOICE)
COMBINES = ("normalized", "raw")
COPY, LORA = "copy", "lora"
KINDS = (COPY, LORA)
RESTS = ("average", "first", "base")
STACKS = ("encoder", "decoder")

DEFAULT_EXPERTS = 8
# More than any model has; a typing error of this kind would plan tensors by the million.
MOST_EXPERTS = 4096
DEFAULT_TOP_K = 2
DEFAULT_CAPACITY = 2.0
DEFAULT_RANK = 16

_NUMBER = r"[0-9]{1,9}(?:\.[0-9]{0,9})?(?:[eE]-?[0-9])?|\.[0-9]{1,9}"
_AMOUNT = re.compile(rf"(?P<number>{_NUMBER})(?P<percent>%)?")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


@dataclass(frozen=True)
class ExpertInit:
    """How experts start out.

    Attributes:
        kind: `copy`, `noise`, `drop`, `granular`, `from` or `adapters`.
        amount: of `noise` the standard deviation, of `drop` the share of the intermediate dimension that is redrawn.
        relative: whether the noise is a share of each matrix's own standard deviation.
        groups: of `granular`: small experts to one copy of the MLP.
        paths: of `from` the dense checkpoints, of `adapters` the adapters.
    """

    kind: str
    amount: float = 0.0
    relative: bool = False
    groups: int = 1
    paths: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether every expert is the MLP that it came from, so that the mixture is the dense function."""
        return self.kind in ("copy", "granular")


@dataclass(frozen=True)
class RouterInit:
    """How routers start out: `normal` with a standard deviation, `zeros`, or `hidden` states of prompts in a file."""

    kind: str
    std: float = 0.02
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """What to make of a dense checkpoint.

    Attributes:
        experts: to each chosen MLP; one for each checkpoint or adapter that `init` names, else 8.
        top_k: experts that a token goes to; 2 unless given.
        router: `top-k` or `expert-choice`; for encoder-decoder models also `encoder=...,decoder=...`.
        capacity: of expert choice: the experts that take a token, on average (the paper's C).
        group: of expert choice: the tokens that compete with each other, `sequence` (or image) or `batch`.
        allow_future: let expert choice into a decoder, where it sees tokens that come later.
        layers: `all`, `last:N`, `last:half`, `every:N`, or a list such as `0,4-7`; also `encoder=...,decoder=...`
            with a semicolon between the two.
        init: `copy`, `noise:STD`, `noise:SHARE%`, `drop:RATIO`, `granular:G`, `from:A,B,...`, `adapters:A,B,...`.
        rest: with `from` and `adapters`, what becomes of everything but the experts: `average`, `first`, or `base`,
            which is CHECKPOINT. By default `average` of checkpoints, and `base` under adapters.
        any_base: take adapters even if hashes prove that they were made for another base.
        router_init: `normal:STD`, `zeros`, or `hidden:PROMPTS.jsonl`.
        shared_expert: add an expert that sees every token and starts out silent.
        combine: `normalized` weights sum to one over a token's experts; `raw` ones are the router's probabilities.
            Normalised by default, where the format can do that.
        target: the model type to write, `shipped` for code that travels along, or `auto`; `switch` is short for
            `switch_transformers`.
        kind: `copy`, or `lora` for low-rank updates to one frozen MLP, written without it.
        rank: of these updates; 16 unless given.
        alpha: an update is (alpha / rank) B A; the rank unless given.
        seed: of routers, factors, noise and redrawn weights.
        shard_bytes: the largest weight file.
    """

    experts: int | None = None
    top_k: int | None = None
    router: str = TOP_K
    capacity: float | None = None
    group: str = "sequence"
    allow_future: bool = False
    layers: str = "all"
    init: str = "copy"
    rest: str | None = None
    any_base: bool = False
    router_init: str = "normal:0.02"
    shared_expert: bool = False
    combine: str | None = None
    target: str = "auto"
    kind: str = COPY
    rank: int | None = None
    alpha: float | None = None
    seed: int = 0
    shard_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.experts is not None and self.experts < 2:
            raise OptionError(f"--experts is {self.experts}, expected at least 2.")
        if self.experts is not None and self.experts > MOST_EXPERTS:
            raise OptionError(f"--experts is {self.experts}, expected at most {MOST_EXPERTS}.")
        if self.top_k is not None and self.top_k < 1:
            raise OptionError(f"--top-k is {self.top_k}, expected at least 1.")
        if self.capacity is not None and not 0 < self.capacity < float("inf"):
            raise OptionError(f"--capacity is {self.capacity:g}, expected more than 0.")
        if self.combine not in (None, *COMBINES):
            raise OptionError(f"--combine is {self.combine!r}, expected one of {', '.join(COMBINES)}.")
        if self.group not in ("sequence", "batch"):
            raise OptionError(f"--group is {self.group!r}, expected sequence or batch.")
        if self.rest is not None and self.rest not in RESTS:
            raise OptionError(f"--rest is {self.rest!r}, expected one of {', '.join(RESTS)}.")
        if self.rest is not None and self.expert_init.kind not in ("from", "adapters"):
            raise OptionError("--rest goes with --init from:... or adapters:..., where there are several models.")
        if self.rest == "first" and self.expert_init.kind == "adapters":
            raise OptionError("--rest first goes with --init from:...; adapters have base and average.")
        if self.any_base and self.expert_init.kind != "adapters":
            raise OptionError("--any-base goes with --init adapters:...")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise OptionError(f"--shard-size is {self.shard_bytes} bytes, expected at least 1.")
        routers = set(self.routers.values())
        if self.capacity is not None and EXPERT_CHOICE not in routers:
            raise OptionError("--capacity goes with --router expert-choice; a top-k router drops no token.")
        for option, given in (("--group batch", self.group == "batch"), ("--allow-future", self.allow_future)):
            if given and EXPERT_CHOICE not in routers:
                raise OptionError(
                    f"{option} goes with --router expert-choice; a top-k router sees one token at a time."
                )
        if self.top_k is not None and TOP_K not in routers:
            raise OptionError("--top-k goes with --router top-k; expert choice has --capacity.")
        _ = self.expert_init, self.start_of_router
        self._check_kind()

    def _check_kind(self) -> None:
        """Refuse what makes no sense with routed LoRA experts, or only with them."""
        if self.kind not in KINDS:
            raise OptionError(f"--kind is {self.kind!r}, expected one of {', '.join(KINDS)}.")
        if self.kind == COPY:
            for option, value in (("--rank", self.rank), ("--alpha", self.alpha)):
                if value is not None:
                    raise OptionError(f"{option} goes with --kind lora; a copy of the MLP has full rank.")
            return
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"--rank is {self.rank}, expected at least 1.")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise OptionError(f"--alpha is {self.alpha:g}, expected more than 0.")
        if self.init != "copy":
            raise OptionError(
                f"--init {self.init} goes with --kind copy; updates of low rank start out as zero, over one MLP."
            )
        if self.shared_expert:
            raise OptionError("--shared-expert goes with --kind copy; the one MLP under the updates sees every token.")
        if self.target not in ("auto", "shipped"):
            raise OptionError(
                f"--target {self.target} goes with --kind copy; routed LoRA experts are in no format of transformers, "
                "so their code is shipped."
            )
        if self.shard_bytes is not None:
            raise OptionError("--shard-size goes with --kind copy; routers and updates are one small file.")

    @property
    def expert_init(self) -> ExpertInit:
        return parse_init(self.init)

    @property
    def start_of_router(self) -> RouterInit:
        return parse_router_init(self.router_init)

    @property
    def routers(self) -> Mapping[str, str]:
        """The router of each stack; under the name "" that of every stack not named."""
        found = per_stack(self.router, "--router", ",")
        for router in found.values():
            if router not in ROUTERS:
                raise OptionError(f"--router is {router!r}, expected one of {', '.join(ROUTERS)}.")
        return found


def per_stack(text: str, option: str, separator: str) -> dict[str, str]:
    """`encoder=A,decoder=B` as a mapping; anything else is for every stack, under the name ""."""
    if "=" not in text:
        return {"": text}
    found = {}
    for part in text.split(separator):
        stack, _, value = part.strip().partition("=")
        if stack not in STACKS or not value or stack in found:
            raise OptionError(
                f"{option} has the part {part.strip()!r}, expected encoder=... or decoder=..., each once, "
                f"separated by {separator!r}."
            )
        found[stack] = value
    return found


def parse_init(text: str) -> ExpertInit:
    """Read `--init`."""
    kind, _, value = text.partition(":")
    if text == "copy":
        return ExpertInit("copy")
    match = _AMOUNT.fullmatch(value)
    if kind == "noise" and match is not None and float(match["number"]) > 0:
        relative = match["percent"] is not None
        return ExpertInit("noise", float(match["number"]) / (100 if relative else 1), relative)
    if kind == "drop" and match is not None and not match["percent"] and 0 < float(match["number"]) <= 1:
        return ExpertInit("drop", float(match["number"]))
    if kind == "granular" and _is_number(value) and int(value) >= 2:
        return ExpertInit("granular", groups=int(value))
    if kind in ("from", "adapters"):
        paths = tuple(path.strip() for path in value.split(","))
        if len(paths) >= 2 and all(paths):
            return ExpertInit(kind, paths=paths)
        raise OptionError(f"--init is {text!r}, expected at least two paths after {kind!r}, separated by commas.")
    raise OptionError(
        f"--init is {text!r}, expected copy, noise:STD (or noise:1%), drop:RATIO (up to 1), granular:G (2 or more), "
        "from:CHECKPOINT,CHECKPOINT,... or adapters:ADAPTER,ADAPTER,..."
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def parse_router_init(text: str) -> RouterInit:
    """Read `--router-init`."""
    kind, _, value = text.partition(":")
    if text == "zeros":
        return RouterInit("zeros")
    if text == "normal" or (kind == "normal" and re.fullmatch(_NUMBER, value) and float(value) > 0):
        return RouterInit("normal", float(value) if value else 0.02)
    if kind == "hidden" and value:
        return RouterInit("hidden", path=value)
    raise OptionError(f"--router-init is {text!r}, expected normal:STD, zeros or hidden:PROMPTS.jsonl.")


def parse_layers(text: str, depth: int, option: str = "--layers") -> tuple[int, ...]:
    """The zero-based layers that `--layers` chooses out of `depth`.

    >>> parse_layers("every:3", 8), parse_layers("last:half", 7), parse_layers("0,4-6", 8)
    ((1, 4, 7), (4, 5, 6), (0, 4, 5, 6))
    """
    word, _, value = text.partition(":")
    if text == "all":
        return tuple(range(depth))
    if word == "last" and value == "half":
        return tuple(range(depth - max(1, depth // 2), depth))
    if word in ("last", "every") and _is_number(value) and int(value) > 0:
        count = int(value)
        if word == "last":
            if count > depth:
                raise OptionError(f"{option} is {text!r}, but the model has {depth} layers; choose at most that many.")
            return tuple(range(depth - count, depth))
        return tuple(range((depth - 1) % count, depth, count))
    if text == "none":
        return ()
    return _listed(text, depth, option)


def _listed(text: str, depth: int, option: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise OptionError(
                f"{option} is {text!r}, expected all, last:N, last:half, every:N, or layers such as 0,4-7."
            )
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise OptionError(f"{option} has the range {part.strip()!r}, expected the smaller number first.")
        if last >= depth:
            _beyond([last], depth, option)
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def _beyond(layers: Sequence[int], depth: int, option: str) -> NoReturn:
    raise OptionError(
        f"{option} names layer {layers[0]}, but the model has the layers 0 to {depth - 1}; layers count from zero."
    )
