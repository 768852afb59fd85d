"""From a method's options to a model that can be trained, and from what was saved back to a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import FormatError, MismatchError, MissingExtraError, OptionError, UnsupportedError
from surgery.names import split_parameter
from surgery.training.methods import anatomy, folders
from surgery.training.methods.options import METHODS, PROMPT_BESIDE_LORA, MethodOptions, parse_top
from surgery.training.methods.prepared import Prepared, Save, State, own_name, parameter_groups, trained

if TYPE_CHECKING:
    import torch


def apply_method(model: Any, options: MethodOptions | None = None, learning_rate: float | None = None) -> Prepared:
    """Prepare a transformers model for training, in place.

    Args:
        model: as `from_pretrained` gives it, on any device; on the meta device it can be counted.
        options: what to train; LoRA on all linear layers by default.
        learning_rate: at its highest; the method's own by default.

    Raises:
        UnsupportedError: the method trains nothing on this model, or cannot be had with it.
        OptionError: a pattern or target that means nothing here.
        MissingExtraError: PEFT is not installed, and the method is PEFT's.
    """
    options = options or MethodOptions()
    allowed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    extra = _matching(allowed, [pattern for pattern, _ in options.train], "--train")
    head = [f"{module}." for module in anatomy.head_modules(model)] if options.head else []
    extra |= {name for name in allowed if name.startswith(tuple(head))} if head else set()
    prepare = _PREPARE.get(options.kind, _choose)
    if prepare is not _choose:
        _need_peft(options)
    model, save, kind = prepare(model, options, extra)
    if kind == "checkpoint":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in allowed)
    frozen = _matching([own_name(name) for name, _ in model.named_parameters()], options.freeze, "--freeze")
    for name, parameter in model.named_parameters():
        if own_name(name) in frozen:
            parameter.requires_grad_(False)
    return _prepared(model, options, kind, save, learning_rate)


def load_method(model: Any, folder: str | Path, trainable: bool = False) -> Any:
    """Put what `Prepared.save` wrote, or any PEFT adapter, onto its base.

    Args:
        model: the base, changed in place.
        folder: of an adapter.
        trainable: whether its parameters shall be trained on.

    Returns:
        A model to call: PEFT's for PEFT's methods, with an infix a `PromptedModel`, else `model` itself.
    """
    return _load(model, Path(folder), trainable)[0]


def continue_method(model: Any, folder: str | Path, learning_rate: float | None = None) -> Prepared:
    """Prepare a base and an adapter of it for training the adapter on, in place. What is saved is the adapter again.

    Args:
        model: the base.
        folder: of an adapter that `Prepared.save` wrote, or of PEFT's LoRA, prompt or prefix tuning.
        learning_rate: at its highest; that of the adapter's method by default.

    Raises:
        UnsupportedError: an adapter of another kind.
    """
    place = Path(folder)
    made, save, method = _load(model, place, trainable=True)
    if method not in METHODS:
        raise UnsupportedError(
            f"{place} is an adapter of type {method!r}, which cannot be trained on here; expected LoRA, a prompt, a "
            "prefix or a bottleneck adapter."
        )
    return _prepared(made, MethodOptions(method), "adapter", save, learning_rate)


def _prepared(model: Any, options: MethodOptions, kind: str, save: Save, learning_rate: float | None) -> Prepared:
    from surgery.training.methods.prompts import PromptedModel

    parameters, rate = trained(model), options.default_rate if learning_rate is None else learning_rate
    if not parameters:
        raise UnsupportedError(f"--method {options.name} with --freeze leaves nothing to train; freeze less.")
    return Prepared(
        model=model,
        method=options.name,
        kind=kind,
        groups=parameter_groups(parameters, rate, _factors(options)),
        trainable=sum(parameter.numel() for parameter in parameters.values()),
        adds_tokens="prompt" in options.kind or "prefix" in options.kind,
        needs_labels=isinstance(model, PromptedModel),
        _save=save,
    )


# One function a method: (model, options, names trained whole besides) to (model, save, kind of what is saved) -------

Made = tuple[Any, Save, str]


def _choose(model: Any, options: MethodOptions, extra: set[str]) -> Made:
    """Methods that train some of the model's own parameters."""
    heads = tuple(f"{module}." for module in anatomy.head_modules(model)) if not options.head else ()
    chosen = {name for name in _CHOOSE[options.kind](model, options) if not name.startswith(heads)}
    if not chosen:
        raise UnsupportedError(_NOTHING[options.kind].format(model=anatomy.name_of(model)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and (name in chosen or name in extra))
    return model, partial(folders.save_checkpoint, model), "checkpoint"


def _lora(model: Any, options: MethodOptions, extra: set[str]) -> Made:
    from surgery.training.methods.lora import add_lora

    whole = sorted({split_parameter(name)[0] for name in extra})
    # A head is stored as one module, under the name that PEFT gives it by itself.
    heads = [name for name in anatomy.head_modules(model) if any(inner.startswith(name) for inner in whole)]
    whole = heads + [name for name in whole if not name.startswith(tuple(heads) or "\0")]
    wrapped, save = add_lora(model, options, whole)
    return wrapped, save, "adapter"


def _bottleneck(model: Any, options: MethodOptions, extra: set[str]) -> Made:
    from surgery.training.methods.bottleneck import CHILD, add_bottlenecks
    from surgery.training.methods.lora import base_name

    both = options.kind == "adapter-h"
    add_bottlenecks(model, options.rank, both, options.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(CHILD in name.split(".") or name in extra)
    settings = {"method": options.kind, "rank": options.rank}

    def save(folder: Path, dtype: torch.dtype | None, state: State | None) -> None:
        del dtype
        found = state or model.state_dict()
        kept = [n for n, p in model.named_parameters() if p.requires_grad or CHILD in n.split(".")]
        folders.save_own({name: found[name] for name in kept}, folder, base_name(model, options), settings)

    return model, save, "adapter"


def _virtual(model: Any, options: MethodOptions, extra: set[str]) -> Made:
    from surgery.training.methods.lora import base_name
    from surgery.training.methods.prompts import PromptedModel, add_virtual_tokens

    if options.train:
        raise OptionError(
            f"--method {options.name} stores virtual tokens alone, so that --train has nowhere to go; "
            "use --method lora or full with it."
        )
    if not options.head and extra:
        raise OptionError(f"--method {options.name} always trains the classifier's head.")
    name = base_name(model, options)
    wrapped = add_virtual_tokens(model, options)

    def save(folder: Path, dtype: torch.dtype | None, state: State | None) -> None:
        del dtype
        if isinstance(wrapped, PromptedModel):
            found = state or wrapped.state_dict()
            tensors = {key: found[key] for key in ("prompt", "infix")}
            sizes = {"prompt_tokens": len(wrapped.prompt), "infix_tokens": len(wrapped.infix)}
            folders.save_own(tensors, folder, name, {"method": "prompt", **sizes})
        else:
            folders.save_peft(wrapped, folder, state, name)

    return wrapped, save, "adapter"


def _lora_and_virtual(model: Any, options: MethodOptions, extra: set[str]) -> Made:
    _, save_lora, _ = _lora(model, options, extra)
    wanted = set(trained(model))
    outer, save_virtual, _ = _virtual(model, replace(options, train=(), head=True), set())
    _thaw(model, wanted)

    return outer, _save_both(outer, model, save_lora, save_virtual), "adapter"


def _save_both(outer: Any, model: Any, save_lora: Save, save_virtual: Save) -> Save:
    """LoRA's folder with the virtual tokens' inside; `outer` is around `model`, which has LoRA in it."""

    def save(folder: Path, dtype: torch.dtype | None, state: State | None) -> None:
        (folder / folders.PROMPT_FOLDER).mkdir(exist_ok=True)
        if state is not None:
            # The outer wrapper's names to those of the inner one.
            at = next(name for name, module in outer.named_modules() if module is model)
            start = f"{at}."
            inside = {f"base_model.model.{k.removeprefix(start)}": v for k, v in state.items() if k.startswith(start)}
            save_lora(folder, dtype, inside)
        else:
            save_lora(folder, dtype, None)
        save_virtual(folder / folders.PROMPT_FOLDER, dtype, state)

    return save


_PREPARE: dict[str, Callable[[Any, MethodOptions, set[str]], Made]] = {
    "lora": _lora,
    "prompt": _virtual,
    "prefix": _virtual,
    "lora+prompt": _lora_and_virtual,
    "lora+prefix": _lora_and_virtual,
    "adapter-h": _bottleneck,
    "adapter-l": _bottleneck,
}


def _last_layers(model: Any, options: MethodOptions) -> Iterable[str]:
    """The parameters of the last N layers; in a model with encoder and decoder, of the decoder."""
    layers, wanted = list(anatomy.blocks(model)), parse_top(options.name)
    stack = [name for name in layers if split_parameter(name)[0] == split_parameter(layers[-1])[0]]
    if wanted > len(stack):
        raise OptionError(f"--method top:{wanted}: {anatomy.name_of(model)} has {len(stack)} layers.")
    last = tuple(f"{name}." for name in stack[-wanted:])
    return [name for name, _ in model.named_parameters() if name.startswith(last)]


_CHOOSE: dict[str, Callable[[Any, MethodOptions], Iterable[str]]] = {
    "full": lambda model, _: [name for name, _ in model.named_parameters()],
    "selected": lambda model, options: [
        name for name, _ in model.named_parameters() if any(re.search(pattern, name) for pattern, _ in options.train)
    ],
    "top": _last_layers,
    "bitfit": lambda model, _: [name for name, part in anatomy.parts(model).items() if part == "biases"],
    "router": lambda model, _: anatomy.router_parameters(model),
    "experts": lambda model, _: anatomy.expert_parameters(model),
}
_NOTHING = {
    "full": "{model} has no parameters.",
    "selected": "--train names no parameter of {model}.",
    "top": "{model} has no layers.",
    "bitfit": "--method bitfit trains biases, and {model} has none; use --method lora.",
    "router": "--method router trains routers, and {model} has none: it is no mixture of experts; "
    "`surgery upcycle` makes one.",
    "experts": "--method experts trains experts, and {model} has none: it is no mixture of experts; "
    "`surgery upcycle` makes one.",
}


# The way back ---------------------------------------------------------------------------------------------------------

_PEFT_TYPES = {"LORA": "lora", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}


def _load(model: Any, place: Path, trainable: bool) -> Made:
    """An adapter put onto its base: the model to call, what saves the adapter again, and the method or PEFT's type."""
    if (place / folders.SETTINGS).is_file():
        return _load_own(model, place, trainable)
    if not (place / "adapter_config.json").is_file():
        raise FormatError(f"{place} has neither adapter_config.json nor {folders.SETTINGS}; it is no adapter.")
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    from surgery.training.methods.lora import known_warnings, public_name
    from surgery.training.methods.prompts import load_virtual_tokens

    config = PeftConfig.from_pretrained(str(place))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    width = model.config.get_text_config().hidden_size if kind == "PROMPT_TUNING" else None
    if width is not None and config.token_dim not in (None, width):
        raise MismatchError(
            f"{place} has virtual tokens of {config.token_dim} numbers, and {anatomy.name_of(model)} has embeddings of "
            f"{width}; is it for another base?"
        )
    try:
        with known_warnings():
            if trainable and config.is_prompt_learning:
                loaded = load_virtual_tokens(model, place, config)
            else:
                loaded = PeftModel.from_pretrained(model, str(place), is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError) as error:  # what PEFT raises for other shapes and modules
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
        raise MismatchError(
            f"{place} cannot be put onto {anatomy.name_of(model)} ({reason}); is it for another base?"
        ) from error
    name = public_name(config.base_model_name_or_path or "")

    def save(folder: Path, _dtype: torch.dtype | None, state: State | None) -> None:
        folders.save_peft(loaded, folder, state, name)

    method, inner = _PEFT_TYPES.get(kind, kind), place / folders.PROMPT_FOLDER
    if not inner.is_dir():
        return loaded, save, method
    base = loaded.get_base_model()
    wanted = set(trained(base))
    prompted, save_virtual, virtual = _load(base, inner, trainable)
    _thaw(base, wanted)
    return prompted.train(model.training), _save_both(prompted, base, save, save_virtual), f"{method}+{virtual}"


def _load_own(model: Any, folder: Path, trainable: bool) -> Made:
    settings = folders.read_own(folder)
    method = settings["method"]
    names = {"rank": int, "prompt_tokens": int, "infix_tokens": int}
    given = {name: settings[name] for name, kind in names.items() if isinstance(settings.get(name), kind)}
    if method not in ("adapter-h", "adapter-l", "prompt"):
        raise FormatError(f"{folder / folders.SETTINGS} is of the method {method!r}, which has no folder of its own.")
    prepared = apply_method(model, MethodOptions(method, **given, base_name=settings.get("base_model_name_or_path")))
    stored = folders.put_own(prepared.model, folder)
    for name, parameter in prepared.model.named_parameters():
        parameter.requires_grad_(trainable and name in stored)
    return prepared.model, prepared.save, method


def _factors(options: MethodOptions) -> list[tuple[str, float]]:
    """Patterns and factors on the learning rate, those of the user first."""
    beside = [(r"prompt_encoder|^prompt$|^infix$", PROMPT_BESIDE_LORA)] if "+" in options.kind else []
    plus = [(r"\.lora_(embedding_)?B\b", options.lora_plus)] if options.lora_plus != 1 else []
    return [*options.train, *plus, *beside]


def _matching(names: Iterable[str], patterns: Iterable[str], flag: str) -> set[str]:
    """The names that some pattern is found in. Raises `OptionError` for a pattern that is found in none."""
    names, found = list(names), set()
    for pattern in patterns:
        hits = {name for name in names if re.search(pattern, name)}
        if not hits:
            raise OptionError(f"{flag} {pattern}: no parameter's name contains that; one is called {names[-1]}.")
        found |= hits
    return found


def _thaw(model: torch.nn.Module, names: set[str]) -> None:
    """Train again what a second wrapper has frozen."""
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


def _need_peft(options: MethodOptions) -> None:
    if options.kind in ("adapter-h", "adapter-l"):
        return
    try:
        import peft  # noqa: F401 - whether it is there
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
