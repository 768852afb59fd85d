"""From options to what is to be made: the mixture of each stack, and the format that can hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from surgery.checkpoint import Checkpoint
from surgery.errors import OptionError, UnsupportedError
from surgery.names import plain
from surgery.upcycling.mixture import Asked, Config, Mixture, Target
from surgery.upcycling.mlps import Mlp
from surgery.upcycling.native import NATIVE
from surgery.upcycling.options import (
    DEFAULT_CAPACITY,
    DEFAULT_EXPERTS,
    DEFAULT_TOP_K,
    EXPERT_CHOICE,
    UpcycleOptions,
    parse_layers,
    per_stack,
)
from surgery.upcycling.seq2seq import SEQ2SEQ, SWITCH
from surgery.upcycling.shipped import SHIPPED, shipped_target

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
        inner = first.inner
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
            normalized=(options.combine or default_combine(options.target)) == "normalized",
            groups=init.groups,
            inner=inner,
            shared=options.shared_expert,
            group=options.group,
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

    Raises `OptionError` for a name that is none, `UnsupportedError` with what each format cannot express.
    """
    formats = targets_of(checkpoint.model_type)
    known = {target.name: target for target in (*NATIVE, *SEQ2SEQ, *formats)}
    if options.target not in (AUTO, SHIPPED, *known):
        raise OptionError(f"--target is {options.target!r}, expected auto, {', '.join(known)} or {SHIPPED}.")
    reasons = {target.name: objections(target, Asked(checkpoint, config, chosen)) for target in formats}
    fitting = [target for target in formats if not reasons[target.name]]
    usable = [t for t in fitting if (t.automatic if options.target == AUTO else t.name == options.target)]
    if usable:
        return usable[0]
    model_type, asked_for = plain(checkpoint.model_type), options.target
    if asked_for == AUTO:
        listed = "; ".join(f"{name} {' and '.join(found)}" for name, found in reasons.items())
        raise UnsupportedError(
            f"{checkpoint.label} is a {model_type}, and no format can hold this mixture of it: {listed}."
        )
    if asked_for in reasons:
        what = f"cannot become {asked_for}, which {' and '.join(reasons[asked_for])}."
    else:
        takes = f", which takes {', '.join(known[asked_for].sources)}" if asked_for in known else ""
        what = f"is a {model_type} and cannot become {asked_for}{takes}."
    raise UnsupportedError(f"{checkpoint.label} {what}{_remedy(fitting)}")


def targets_of(model_type: str) -> tuple[Target, ...]:
    """Every format for a dense family: the native ones first."""
    native = tuple(target for target in (*NATIVE, *SEQ2SEQ) if model_type in target.sources)
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
