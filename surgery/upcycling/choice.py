"""From options to what is to be made: the mixture of each stack, and the format that can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.checkpoint import Checkpoint
from surgery.errors import OptionError, UnsupportedError
from surgery.names import plain
from surgery.upcycling.mixture import Asked, Config, Mixture, Target
from surgery.upcycling.mlps import Mlp, stacks_of
from surgery.upcycling.native import NATIVE
from surgery.upcycling.options import (
    COPY,
    DEFAULT_CAPACITY,
    DEFAULT_EXPERTS,
    DEFAULT_RANK,
    DEFAULT_TOP_K,
    EXPERT_CHOICE,
    LORA,
    UpcycleOptions,
    parse_layers,
    per_stack,
)
from surgery.upcycling.routed_lora import check_family
from surgery.upcycling.seq2seq import SEQ2SEQ, SWITCH
from surgery.upcycling.shipped import SHIPPED, shipped_target

AUTO = "auto"


def mixtures(mlps: Sequence[Mlp], options: UpcycleOptions) -> dict[str, Mixture]:
    """What the chosen MLPs of each stack become. Raises `OptionError` for numbers that do not go together."""
    init = options.expert_init
    experts = _experts(options)
    rank = (options.rank or DEFAULT_RANK) if options.kind == LORA else None
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
        inner = first.inner
        if inner % init.groups:
            raise OptionError(
                f"--init is granular:{init.groups}, but the intermediate size {inner} does not divide by it."
            )
        choice = routers.get(stack, routers.get("", "top-k")) == EXPERT_CHOICE
        found[stack] = Mixture(
            layers=chosen,
            depth=depth,
            experts=experts,
            top_k=None if choice else _top_k(options, experts),
            capacity=(options.capacity or DEFAULT_CAPACITY * init.groups) if choice else None,
            normalized=(options.combine or default_combine(options.target)) == "normalized",
            groups=init.groups,
            inner=inner,
            shared=options.shared_expert,
            group=options.group,
            rank=rank,
            alpha=options.alpha or float(rank or 0),
        )
    if not found:
        raise OptionError(f"--layers is {options.layers!r}, which chooses no layer at all.")
    return found


def default_combine(target: str) -> str:
    """How weights are combined where nothing is said: so that the function stays, where the format can do that."""
    return "raw" if target == SWITCH else "normalized"


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
    top_k = options.top_k or (1 if options.target == SWITCH else DEFAULT_TOP_K * groups)
    if top_k > experts:
        raise OptionError(f"--top-k is {top_k}, expected at most the {experts} experts.")
    if top_k % groups:
        raise OptionError(
            f"--top-k is {top_k}, expected a multiple of {groups}: with --init granular:{groups} a token needs all "
            "parts of a copy."
        )
    return top_k


def choose_target(
    checkpoint: Checkpoint, config: Config, chosen: Mapping[str, Mixture], options: UpcycleOptions
) -> Target:
    """The format to write: the one named, or the first that can express everything asked for.

    Raises `OptionError` for a name that is none and for expert choice that would see the future, `UnsupportedError`
    with what each format cannot express.
    """
    _refuse_future(checkpoint, chosen, options)
    if options.kind == LORA:
        check_family(checkpoint)
    formats = targets_of(checkpoint.model_type, options.kind)
    known = {target.name: target for target in (*NATIVE, *SEQ2SEQ, *formats)}
    if options.target not in (AUTO, SHIPPED, *known):
        names = ", ".join(name for name in known if name != SHIPPED)
        raise OptionError(f"--target is {options.target!r}, expected auto, {names} or {SHIPPED}.")
    reasons = {target.name: objections(target, Asked(checkpoint, config, chosen)) for target in formats}
    fitting = [target for target in formats if not reasons[target.name]]
    usable = [t for t in fitting if (t.automatic if options.target == AUTO else t.name == options.target)]
    if usable:
        return usable[0]
    model_type, asked_for = plain(checkpoint.model_type), options.target
    if asked_for == AUTO:
        listed = "; ".join(f"{name} {' and '.join(found)}" for name, found in reasons.items())
        raise UnsupportedError(
            f"{checkpoint.label} is of type {model_type}, and no format can hold this mixture of it: {listed}."
        )
    if asked_for in reasons:
        what = f"cannot become {asked_for}, which {' and '.join(reasons[asked_for])}."
    else:
        takes = f", which takes {', '.join(known[asked_for].sources)}" if asked_for in known else ""
        what = f"is of type {model_type} and cannot become {asked_for}{takes}."
    raise UnsupportedError(f"{checkpoint.label} {what}{_remedy(fitting)}")


def _refuse_future(checkpoint: Checkpoint, chosen: Mapping[str, Mixture], options: UpcycleOptions) -> None:
    """Raise where experts would choose among tokens of which some come later: in a decoder, unless it is allowed."""
    stacks = stacks_of(checkpoint.model_type)
    # A BERT whose config says so is a decoder, under the names of an encoder.
    turned = len(stacks) == 1 and checkpoint.config.get("is_decoder") is True
    for stack, mixture in chosen.items():
        if mixture.capacity is not None and (stacks[stack].causal or turned) and not options.allow_future:
            which = "" if stacks[stack].causal else " (config.json has is_decoder: true)"
            raise OptionError(
                f"--router expert-choice in a decoder{which} lets each token's experts depend on the tokens after it, "
                "so that training sees the future and generation does not; use top-k, or pass --allow-future."
            )


def targets_of(model_type: str, kind: str = COPY) -> tuple[Target, ...]:
    """Every format for a dense family: the native ones first, which have copies of the MLP and no updates to it."""
    native = tuple(target for target in (*NATIVE, *SEQ2SEQ) if model_type in target.sources and kind == COPY)
    shipped = shipped_target(model_type)
    return native if shipped is None else (*native, shipped)


def _remedy(fitting: Sequence[Target]) -> str:
    named = [target.name for target in fitting if target.automatic]
    return f" `--target {named[0]}` can hold it." if named else ""


def objections(target: Target, asked: Asked) -> list[str]:
    """What a format cannot express of a model and the mixture asked for."""
    found = []
    for stack, mixture in asked.mixtures.items():
        if not target.fits(mixture):
            layers = f"asked for {_listed(mixture.layers)} of {mixture.depth}"
            found.append(f"can make only {target.subset.value} sparse ({layers})")
        if mixture.capacity is not None and not target.expert_choice:
            found.append("has no expert choice")
        if not mixture.normalized and not target.raw:
            found.append("always normalises the weights of a token's experts")
        if mixture.shared and target.blocks[stack].shared is None:
            found.append("has no shared expert")
    if target.tasks and task_of(asked.checkpoint) not in target.tasks:
        found.append(f"has no class for {plain(asked.checkpoint.architecture) or 'this task'}")
    return [*dict.fromkeys([*found, *target.objections(asked)])]


def _listed(layers: Sequence[int]) -> str:
    return f"layers {', '.join(map(str, layers[:6]))}{', ...' if len(layers) > 6 else ''}"


_TASKS = (
    "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "LMHeadModel",
    "ForConditionalGeneration", "ForImageClassification", "ForMaskedLM", "EncoderModel", "Model",
)  # fmt: skip


def task_of(checkpoint: Checkpoint) -> str:
    """The ending of the checkpoint's class: `ForCausalLM`. Without a class, what its tensors say."""
    for task in _TASKS:
        if checkpoint.architecture.endswith(task):
            return task
    if checkpoint.architecture:
        return checkpoint.architecture
    return "ForCausalLM" if any(name.startswith("model.") for name in checkpoint.tensors) else "Model"
