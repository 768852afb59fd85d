"""What `--method` and the options beside it say, checked. Needs neither torch nor transformers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from surgery.errors import OptionError
from surgery.patterns import compile_pattern

# Method: the learning rate it starts from, in units of full tuning's. LoRA's ten is what Schulman et al., "LoRA Without
# Regret" (2025), find for models of every size; the others are rules of thumb, in the proportions that Hu et al. used
# on GPT-3 (their table 12), and a run that matters should try a few.
METHODS: dict[str, float] = {
    "full": 1,
    "selected": 1,
    "top": 1,
    "bitfit": 100,
    "lora": 10,
    "prompt": 100,
    "prefix": 20,
    "adapter-h": 10,
    "adapter-l": 10,
    "lora+prompt": 10,
    "lora+prefix": 10,
    "router": 10,
    "experts": 1,
}
FULL_LEARNING_RATE = 2e-5
# Soft prompts train beside LoRA at this multiple of its learning rate.
PROMPT_BESIDE_LORA = 10.0

_TOP = re.compile(r"top:(\d+)")
_LORA_ONLY = ("alpha", "targets", "dropout", "rslora", "dora", "pissa", "lora_plus")
_TOKENS = ("prompt", "prefix", "lora+prompt", "lora+prefix")


@dataclass(frozen=True)
class MethodOptions:
    """What to train, and how much of it.

    Attributes:
        method: one of `METHODS`, where `top` is written `top:N`; by default `lora`, or `selected` if `train` is given.
        rank: of LoRA, and the bottleneck of `adapter-h` and `adapter-l`.
        alpha: of LoRA; 32 by default, so that the learning rate fits every rank, and 8 with `rslora`.
        targets: where LoRA acts, as `--targets` of the other commands; `all-linear` by default.
        dropout: before A, from 0 to below 1.
        rslora: scale by alpha/sqrt(rank) (Kalajdzievski 2023).
        dora: train magnitudes of rows apart from directions (Liu et al. 2024).
        pissa: begin with the leading singular vectors of each weight (Meng et al. 2024).
        lora_plus: B's learning rate over A's (Hayou et al. 2024).
        prompt_tokens: virtual tokens before the input, for `prompt` and `prefix`.
        infix_tokens: virtual tokens between prompt and completion, for `prompt`.
        train: patterns searched in parameter names, each with its factor on the learning rate: what to train besides,
            and with `selected` alone.
        freeze: patterns of what not to train after all.
        head: whether a classification head is trained; it is new as a rule.
        base_name: what an adapter should call its base; by default the folder's name or the Hub id.
        seed: of what is drawn at random.
    """

    method: str | None = None
    rank: int = 16
    alpha: float | None = None
    targets: str | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    pissa: bool = False
    lora_plus: float = 1.0
    prompt_tokens: int | None = None
    infix_tokens: int = 0
    train: tuple[tuple[str, float], ...] = ()
    freeze: tuple[str, ...] = ()
    head: bool = True
    base_name: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        parse_top(self.name)
        if self.kind not in METHODS:
            known = ", ".join("top:N" if name == "top" else name for name in METHODS)
            raise OptionError(f"--method {self.name} is not known; it is one of {known}.")
        for flag, value in (("--rank", self.rank), ("--prompt-tokens", self.tokens)):
            if value < (0 if flag != "--rank" and self.infix_tokens else 1):
                raise OptionError(f"{flag} is {value}, expected at least 1.")
        if self.infix_tokens < 0:
            raise OptionError(f"--infix-tokens is {self.infix_tokens}, expected at least 0.")
        if not 0 <= self.dropout < 1:
            raise OptionError(f"--dropout is {self.dropout}, expected a share from 0 to below 1.")
        for flag, number in (("--alpha", self.lora_alpha), ("--lora-plus", self.lora_plus)):
            if not (math.isfinite(number) and number > 0):
                raise OptionError(f"{flag} is {number}, expected a number above 0.")
        if self.dora and self.pissa:
            raise OptionError("--dora and --pissa exclude each other: both decide what B A starts from; choose one.")
        self._check_that_options_are_used()
        for pattern, factor in (*self.train, *((pattern, 1.0) for pattern in self.freeze)):
            compile_pattern(pattern)
            if not (math.isfinite(factor) and factor > 0):
                raise OptionError(f"The learning rate of {pattern!r} is multiplied by {factor}, expected above 0.")

    def _check_that_options_are_used(self) -> None:
        if "lora" not in self.kind:
            defaults = MethodOptions.__dataclass_fields__
            for name in _LORA_ONLY:
                if getattr(self, name) != defaults[name].default:
                    flag = f"--{name.replace('_', '-')}"
                    raise OptionError(f"{flag} belongs to LoRA, and --method is {self.name}; leave it out.")
        if self.infix_tokens and "prompt" not in self.kind:
            raise OptionError(f"--infix-tokens belongs to --method prompt, and --method is {self.name}; leave it out.")
        if self.prompt_tokens is not None and self.kind not in _TOKENS:
            raise OptionError(
                f"--prompt-tokens belongs to the methods prompt and prefix, and --method is {self.name}; leave it out."
            )
        if self.kind == "selected" and not self.train:
            raise OptionError("--method selected trains what --train names; give at least one --train PATTERN.")

    @property
    def name(self) -> str:
        """The method as it was asked for."""
        return self.method or ("selected" if self.train else "lora")

    @property
    def kind(self) -> str:
        """The method without its number."""
        return "top" if self.name.startswith("top:") else self.name

    @property
    def lora_alpha(self) -> float:
        if self.alpha is not None:
            return self.alpha
        return 8.0 if self.rslora else 32.0

    @property
    def tokens(self) -> int:
        """Virtual tokens before the input."""
        return 8 if self.prompt_tokens is None else self.prompt_tokens

    @property
    def default_rate(self) -> float:
        """The learning rate to start from where none is given."""
        return FULL_LEARNING_RATE * METHODS[self.kind]


def parse_top(method: str) -> int:
    """N of `top:N`; 0 for every other method. Raises `OptionError`."""
    if not method.startswith("top"):
        return 0
    match = _TOP.fullmatch(method)
    if match is None or int(match[1]) < 1:
        raise OptionError(f"--method {method} is not of the form top:N, with N the number of layers to train.")
    return int(match[1])


def parse_rate(text: str) -> tuple[str, float]:
    """`PATTERN` or `PATTERN=FACTOR`, as a pattern and a factor on the learning rate.

    >>> parse_rate("router=5"), parse_rate("embed|norm")
    (('router', 5.0), ('embed|norm', 1.0))
    """
    pattern, _, factor = text.rpartition("=")
    try:
        return (pattern, float(factor)) if pattern else (text, 1.0)
    except ValueError:
        return text, 1.0
