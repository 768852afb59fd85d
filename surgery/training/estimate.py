"""What a training run will take, before it starts: parameters, bytes, and the memory of each device.

Counts come from the method applied to a model without weights, activations from a step on it (`meta.py`).

    memory of a device = weights/s + masters/s + gradients/s + optimiser/s + gathered weights + activations

with s the number of devices that share each of them: ZeRO-1 shares optimiser states and master copies, ZeRO-2 gradients
too, ZeRO-3 (FSDP) weights too, and then the largest layer is gathered whole while it computes. Activations are those of
the largest moment, which is early in the backward pass; the sum takes gradients as whole there, as they are while steps
are accumulated, so that it is an upper bound otherwise. Kernels, fragmentation and the CUDA context come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from surgery.errors import MissingExtraError, OptionError, UnsupportedError
from surgery.training.methods.options import MethodOptions

SHARDING = ("none", "optimizer", "gradients", "full")
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class EstimateOptions:
    """How the run is going to be done. Widths are bytes for each number.

    Attributes:
        method: what is trained.
        weight_bytes: of weights that are not an adapter's; by default as the config says, else 4.
        trained_bytes: of what is trained; by default 4 for adapters, and the weights' own width without one.
        master_bytes: of a second copy of what is trained, as mixed precision keeps; 0 by default.
        gradient_bytes: by default the width of what is trained.
        optimizer_bytes: of all states together: 8 for AdamW in float32 (the default), 4 in bfloat16, 2 in 8 bits.
        batch_size: rows on each device at a time.
        length: tokens of a row; 512 by default, or what the model can take if that is less.
        checkpointing: compute the activations of each layer again in the backward pass.
        devices: that the run is spread over.
        sharding: one of `SHARDING`.
        task: one of `meta.TASKS`; by default as the config says.
        activations: run the step without data; a large model takes seconds for it.
    """

    method: MethodOptions = field(default_factory=MethodOptions)
    weight_bytes: float | None = None
    trained_bytes: float | None = None
    master_bytes: float = 0.0
    gradient_bytes: float | None = None
    optimizer_bytes: float = 8.0
    batch_size: int = 1
    length: int | None = None
    checkpointing: bool = False
    devices: int = 1
    sharding: str = "none"
    task: str | None = None
    activations: bool = True

    def __post_init__(self) -> None:
        for name in ("weight_bytes", "trained_bytes", "master_bytes", "gradient_bytes", "optimizer_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 64:
                raise OptionError(f"--{name.replace('_', '-')} is {value}, expected a width from 0 to 64 bytes.")
        for name in ("batch_size", "length", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} is {value}, expected at least 1.")
        if self.sharding not in SHARDING:
            raise OptionError(f"--sharding {self.sharding} is not known; it is one of {', '.join(SHARDING)}.")


@dataclass(frozen=True)
class MemoryReport:
    """Bytes on one device.

    Attributes:
        weights: of the model and what was added to it.
        master: of the second copy of what is trained.
        gradients: of what is trained.
        optimizer: of the optimiser's states.
        gathered: of the largest layer, whole for a while if weights are shared out.
        activations: of the forward pass and the first of the backward pass, at most; null if shapes do not tell.
        total: the sum; without activations if they are not known.
    """

    weights: int
    master: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int | None
    total: int


@dataclass(frozen=True)
class EstimateReport:
    """What a run would take.

    Attributes:
        label: the checkpoint.
        architecture: the class that is trained.
        method: as asked for.
        kind: `estimate`.
        parameters: of the model, without what the method adds.
        trainable_parameters: that are trained.
        adapter_bytes: of what would be saved: an adapter, or the whole checkpoint; numbers alone, no headers.
        saves: an `adapter` or a `checkpoint`.
        learning_rate: that training would start from.
        batch_size: rows on each device.
        length: tokens of a row; null for images.
        devices: that share the work.
        sharding: what they share out.
        memory: of one of them.
        notes: what the figures leave out.
    """

    label: str
    architecture: str
    method: str
    parameters: int
    trainable_parameters: int
    adapter_bytes: int
    saves: str
    learning_rate: float
    batch_size: int
    length: int | None
    devices: int
    sharding: str
    memory: MemoryReport
    notes: tuple[str, ...] = ()
    kind: str = "estimate"

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def estimate(label: str, config: Mapping[str, Any], options: EstimateOptions | None = None) -> EstimateReport:
    """What it takes to train the model that a `config.json` describes.

    Args:
        label: what to call it.
        config: the content of the file.
        options: the method and the machine.

    Raises:
        UnsupportedError: the method trains nothing on this model.
        InputError: the config is not one that transformers understands.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "train") from error
    from surgery.training.meta import empty_model, example_inputs
    from surgery.training.methods import apply_method
    from surgery.training.methods.anatomy import name_of

    options = options or EstimateOptions()
    width = _stored_width(config) if options.weight_bytes is None else options.weight_bytes
    dtype = torch.float32 if width >= 4 else torch.bfloat16
    model = empty_model(label, config, dtype, options.task)
    architecture, parameters = name_of(model), _numel(model)
    prepared = apply_method(model, options.method)
    whole = prepared.kind == "checkpoint"
    trained_width = options.trained_bytes
    if trained_width is None:
        trained_width = width if whole else 4.0
    # A classifier's head that PEFT copies beside the one of the model is there twice.
    frozen = _numel(prepared.model) - prepared.trainable
    saved = parameters * width if whole else prepared.trainable * trained_width
    length = options.length or min(512, _longest(model))
    inputs = example_inputs(prepared.model, options.batch_size, length)
    activations: int | None = None
    notes: tuple[str, ...] = ("The total is without activations, which were not asked for.",)
    if options.activations:
        activations, notes = _activations(prepared.model, inputs, options.checkpointing)
    shares = _shares(options)
    gradient_width = trained_width if options.gradient_bytes is None else options.gradient_bytes
    parts = {
        "weights": (frozen * width + prepared.trainable * trained_width) / shares["weights"],
        "master": prepared.trainable * options.master_bytes / shares["optimizer"],
        "gradients": prepared.trainable * gradient_width / shares["gradients"],
        "optimizer": prepared.trainable * options.optimizer_bytes / shares["optimizer"],
        "gathered": _largest_layer(model) * width if shares["weights"] > 1 else 0,
    }
    sizes = {name: round(size) for name, size in parts.items()}
    return EstimateReport(
        label=label,
        architecture=architecture,
        method=options.method.name,
        parameters=parameters,
        trainable_parameters=prepared.trainable,
        adapter_bytes=round(saved),
        saves=prepared.kind,
        learning_rate=options.method.default_rate,
        batch_size=options.batch_size,
        length=length if "input_ids" in inputs else None,
        devices=options.devices,
        sharding=options.sharding,
        memory=MemoryReport(**sizes, activations=activations, total=sum(sizes.values()) + (activations or 0)),
        notes=notes,
    )


def _stored_width(config: Mapping[str, Any]) -> int:
    """Bytes of a weight by the config; 4 where it does not say."""
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    return _WIDTHS.get(str(named).removeprefix("torch."), 4)


def _numel(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _longest(model: Any) -> int:
    """Tokens that a model has positions for."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    value = getattr(config, "max_position_embeddings", None)
    # RoBERTa counts positions from its padding token's id on.
    return value - 2 if isinstance(value, int) and value > 2 else 512


def _shares(options: EstimateOptions) -> dict[str, int]:
    """Among how many devices each part is divided."""
    level = SHARDING.index(options.sharding)
    names = ("optimizer", "gradients", "weights")
    return {name: options.devices if level > number else 1 for number, name in enumerate(names)}


def _largest_layer(model: Any) -> int:
    from surgery.training.methods.anatomy import blocks

    return max(_numel(block) for block in blocks(model).values())


def _activations(model: Any, inputs: Mapping[str, Any], checkpointing: bool) -> tuple[int | None, tuple[str, ...]]:
    """Bytes, and a note where they are not known."""
    from surgery.training.meta import peak_of_step
    from surgery.training.methods.lora import known_warnings

    try:
        if checkpointing:
            inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "base", model)
            with known_warnings():
                inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return peak_of_step(model, inputs), ()
    except UnsupportedError as error:
        return None, (f"{error} The total is without them.",)
