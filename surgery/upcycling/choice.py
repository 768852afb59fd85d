"""From options to what is to be made: the mixture of each stack, and the format that can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.checkpoint import Checkpoint
from surgery.errors import OptionError, UnsupportedError
from surgery.names import plain
from surgery.upcycling.mlps import DOWN, Mlp
from surgery.upcycling.options import (
    DEFAULT_CAPACITY,
    DEFAULT_EXPERTS,
    DEFAULT_TOP_K,
    EXPERT_CHOICE,
    UpcycleOptions,
    parse_layers,
    per_stack,
)
from surgery.upcycling.targets import BY_NAME, TARGETS, Asked, Config, Mixture, Target, fits_layers

AUTO = "auto"


def mixtures(mlps: Sequence[Mlp], options: UpcycleOptions) -> dict[str, Mixture]:
    """What the chosen MLPs of each stack become. Raises `OptionError` for numbers that do not go together."""
    init = options.expert_init
    experts = _experts(options)
    found = {}
    depths = {stack: sum(mlp.stack == stack for mlp in mlps) for stack in dict.fromkeys(mlp.stack for mlp in mlps)}
    layers, routers = per_stack(options.layers, "--layers", ";"), options.routers
    for option, given in (("--layers", layers), ("--router", routers)):
        for stack in given:
            if stack and stack not in depths:
                raise OptionError(f"{option} speaks of the {stack}, but the model has only a {', '.join(depths)}.")
    for stack, depth in depths.items():
        chosen = parse_layers(layers.get(stack, layers.get("", "none")), depth)
        if not chosen:
            continue
        first = next(mlp for mlp in mlps if mlp.stack == stack)
        inner = inner_size(first)
        if inner % init.groups:
            raise OptionError(
                f"--init is granular:{init.groups}, but the intermediate size {inner} does not divide by it."
            )
        choice = routers.get(stack, routers.get("", "top-k")) == EXPERT_CHOICE
        if choice and stack == "decoder" and not options.allow_future:
            raise OptionError(
                "--router expert-choice in a decoder lets each token's experts depend on the tokens after it, so that "
                "training sees the future and generation does not; use top-k, or pass --allow-future."
            )
        found[stack] = Mixture(
            layers=chosen,
            depth=depth,
            experts=experts,
            top_k=None if choice else _top_k(options, experts),
            capacity=(options.capacity or DEFAULT_CAPACITY) if choice else None,
            normalized=options.normalized,
            groups=init.groups,
            inner=inner,
            shared=options.shared_expert,
            group=options.group,
        )
    if not found:
        raise OptionError(f"--layers is {options.layers!r}, which chooses no layer at all.")
    return found


def _experts(options: UpcycleOptions) -> int:
    init = options.expert_init
    if init.paths:
        experts = options.experts or len(init.paths)
        if experts % len(init.paths):
            raise OptionError(
                f"--experts is {experts}, expected a multiple of the {len(init.paths)} models that --init names."
            )
        return experts
    experts = options.experts or DEFAULT_EXPERTS * init.groups
    if experts % init.groups or experts == init.groups:
        raise OptionError(
            f"--experts is {experts}, expected a multiple of {init.groups}, at least {2 * init.groups}: with "
            f"--init granular:{init.groups} it counts small experts."
        )
    return experts


def _top_k(options: UpcycleOptions, experts: int) -> int:
    groups = options.expert_init.groups
    top_k = options.top_k or DEFAULT_TOP_K * groups
    if top_k > experts:
        raise OptionError(f"--top-k is {top_k}, expected at most the {experts} experts.")
    if top_k % groups:
        raise OptionError(
            f"--top-k is {top_k}, expected a multiple of {groups}: with --init granular:{groups} a token needs all "
            "parts of a copy."
        )
    return top_k


def inner_size(mlp: Mlp) -> int:
    """The intermediate size of a gated MLP: the columns of `down_proj`."""
    return mlp.leaves[DOWN].shape[-1]


def choose_target(
    checkpoint: Checkpoint, config: Config, chosen: Mapping[str, Mixture], options: UpcycleOptions
) -> Target:
    """The format to write: the one named, or the first that can express everything asked for.

    Raises `OptionError` for a name that is none, `UnsupportedError` with what each format cannot express.
    """
    if options.target != AUTO and options.target not in BY_NAME:
        raise OptionError(f"--target is {options.target!r}, expected auto, {', '.join(BY_NAME)}.")
    fitting: list[Target] = []
    reasons: dict[str, list[str]] = {}
    for target in TARGETS:
        if checkpoint.model_type in target.sources:
            found = objections(target, checkpoint, config, chosen)
            if not found:
                fitting.append(target)
            reasons[target.name] = found
    named = BY_NAME.get(options.target)
    usable = fitting if named is None else [target for target in fitting if target is named]
    if usable:
        return usable[0]
    model_type = plain(checkpoint.model_type)
    if named is not None and named.name not in reasons:
        raise UnsupportedError(
            f"{checkpoint.label} is a {model_type}, which {named.name} has no place for; it takes "
            f"{', '.join(named.sources)}." + _remedy(fitting)
        )
    if named is not None:
        raise UnsupportedError(
            f"{checkpoint.label} cannot become {named.name}, which {' and '.join(reasons[named.name])}."
            + _remedy(fitting)
        )
    listed = "; ".join(f"{name} {' and '.join(found)}" for name, found in reasons.items())
    raise UnsupportedError(
        f"{checkpoint.label} is a {model_type}, and no format can hold this mixture of it: {listed or 'none is known'}."
    )


def _remedy(fitting: Sequence[Target]) -> str:
    return f" `--target {fitting[0].name}` can hold it." if fitting else ""


def objections(target: Target, checkpoint: Checkpoint, config: Config, chosen: Mapping[str, Mixture]) -> list[str]:
    """What a format cannot express of a model and the mixture asked for."""
    found = []
    for mixture in chosen.values():
        if not fits_layers(target, mixture):
            found.append(
                f"can make only {target.subset.value} sparse (asked for {_listed(mixture.layers)} of {mixture.depth})"
            )
        if mixture.capacity is not None:
            found.append("has no expert choice")
        if not mixture.normalized and not target.raw:
            found.append("always normalises the weights of a token's experts")
        if mixture.shared and target.shared is None:
            found.append("has no shared expert")
        found += target.objections(Asked(checkpoint, config, mixture))
    if task_of(checkpoint) not in target.tasks:
        found.append(f"has no class for {checkpoint.architecture or 'this task'}")
    return found


def _listed(layers: Sequence[int]) -> str:
    return f"layers {', '.join(map(str, layers[:6]))}{', ...' if len(layers) > 6 else ''}"


_TASKS = (
    "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "LMHeadModel",
    "ForConditionalGeneration", "ForImageClassification", "ForMaskedLM", "Model",
)  # fmt: skip


def task_of(checkpoint: Checkpoint) -> str:
    """The ending of the checkpoint's class: `ForCausalLM`. Without a class, what its tensors say."""
    for task in _TASKS:
        if checkpoint.architecture.endswith(task):
            return task
    if checkpoint.architecture:
        return checkpoint.architecture
    return "ForCausalLM" if any(name.startswith("model.") for name in checkpoint.tensors) else "Model"
