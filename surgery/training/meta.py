"""A model without weights, and what a training step on it would hold in memory: shapes alone, on the meta device.

The step is run, forwards and backwards, on tensors that have a shape and no data, and every storage is counted from its
birth to its death. So nothing about an architecture is assumed: what autograd saves is what is counted.

B: rows     n: tokens of a row     E: experts     k: experts of a token
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from surgery.errors import InputError, MissingExtraError, OptionError, UnsupportedError, first_line

if TYPE_CHECKING:
    import torch

ATTENTION = "surgery_shapes"
# What a task is called, and transformers' auto class for it.
TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}


def empty_model(label: str, config: Mapping[str, Any], dtype: torch.dtype, task: str | None = None) -> Any:
    """The model that `config.json` describes, on the meta device.

    Args:
        label: what to call it in an error.
        config: the content of the file.
        dtype: of the weights.
        task: one of `TASKS`; by default as `architectures` says.

    Raises:
        InputError: the config is not one that transformers understands.
        MissingExtraError: transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    from surgery.moe import modeling_upcycled  # and with it the upcycled classes in the auto classes

    if task is not None and task not in TASKS:
        raise OptionError(f"--task {task} is not known; it is one of {', '.join(TASKS)}.")
    settings = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{label}: config.json has no model_type.")
    architecture = next(iter(config.get("architectures") or []), None)
    try:
        made = transformers.AutoConfig.for_model(model_type, **settings)
        found: Any = getattr(transformers, TASKS[task]) if task else None
        if found is None and isinstance(architecture, str):
            found = getattr(transformers, architecture, None) or getattr(modeling_upcycled, architecture)
        found = found or transformers.AutoModelForCausalLM
        build = getattr(found, "_from_config", None) or found.from_config
        with torch.device("meta"), _silent(transformers):
            model = build(made, dtype=dtype)
    except Exception as error:  # whatever a hostile config makes a model's code raise
        raise InputError(f"{label}: transformers makes no model of its config.json ({first_line(error)}).") from error
    model.config.use_cache = False  # as in training
    return model


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without what transformers logs about settings, which are not ours to change."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def example_inputs(model: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A batch with labels, for a model of any of the tasks, on the meta device."""
    import torch

    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    place: dict[str, Any] = {"device": "meta", "dtype": torch.long}
    if "ForImageClassification" in name:
        config, dtype = model.config, next(model.parameters()).dtype
        sides = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        pixels = torch.empty(batch, config.num_channels, *sides, device="meta", dtype=dtype)
        return {"pixel_values": pixels, "labels": torch.empty(batch, **place)}
    ids = torch.empty(batch, length, **place)
    one_each = "ForSequenceClassification" in name
    return {"input_ids": ids, "labels": torch.empty(batch, **place) if one_each else torch.empty_like(ids)}


def peak_of_step(model: Any, inputs: Mapping[str, torch.Tensor]) -> int:
    """The most bytes that a step holds at a time besides weights and their gradients.

    Raises:
        UnsupportedError: the model's forward pass looks into its data, of which there is none.
    """
    counter = _counter()
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *inputs.values())}
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in model.parameters()
        if p.requires_grad
    ]
    model.train()
    try:
        import transformers

        with counter, _shapes_only(model), _silent(transformers):
            counter.ignored = own
            model(**inputs).loss.backward()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedError(
            f"The activations of {type(model).__name__} cannot be told from shapes ({first_line(error)})."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return int(counter.peak)


def _counter() -> Any:
    """A mode under which every new storage is counted until it is freed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch annotates no modes
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # likewise
            self.ignored: set[int] = set()
            self.alive: dict[int, int] = {}
            self.now = self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self._born(value.untyped_storage())
            return result

        def _born(self, storage: Any) -> None:
            key = storage._cdata
            if key in self.alive or key in self.ignored:
                return
            self.alive[key] = storage.nbytes()
            self.now += self.alive[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._died, key)

        def _died(self, key: int) -> None:
            self.now -= self.alive.pop(key, 0)

    return Counter()


@contextlib.contextmanager
def _shapes_only(model: Any) -> Iterator[None]:
    """Let attention and mixtures of experts run without data for a while."""
    from unittest import mock

    import torch
    import transformers

    base = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "base", model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("torch.autocast", _autocast(torch.autocast)))
        if getattr(base, "_supports_sdpa", False):
            transformers.AttentionInterface.register(ATTENTION, _attention)
            before = base.config._attn_implementation
            base.set_attn_implementation(ATTENTION)
            stack.callback(base.set_attn_implementation, before)
        for module in base.modules():
            if hasattr(module, "_apply_experts"):
                stack.enter_context(mock.patch.object(module, "_apply_experts", _even_shares(module)))
            elif hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and hasattr(module, "num_experts"):
                stack.enter_context(mock.patch.object(module, "forward", _stacked_experts(module)))
        yield


def _autocast(real: Any) -> Any:
    """`torch.autocast`, which has nothing for the meta device and refuses even to be switched off there."""

    def autocast(device_type: str, *arguments: Any, **keywords: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else real(device_type, *arguments, **keywords)

    return autocast


def _attention(_module: Any, query: Any, key: Any, value: Any, _mask: Any, **_others: Any) -> tuple[Any, None]:
    """What a fused attention kernel keeps for its gradient: queries, keys, values, its result, a number for each row.

    query: (B, heads, n, d) to (B, n, heads, d). Keys and values may have fewer heads.
    """
    import torch

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            result = torch.empty_like(query[..., : value.shape[-1]].expand(*query.shape[:-1], value.shape[-1]))
            ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
            return result

        @staticmethod
        def backward(ctx: Any, *_gradients: Any) -> Any:
            return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])

    return Fused.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]  # nor `apply`


def _stacked_experts(module: Any) -> Any:
    """The experts of transformers' mixtures, every token's k of them, as if all tokens chose the same ones."""

    def forward(hidden: Any, chosen: Any, weights: Any) -> Any:
        import torch

        k = chosen.shape[-1]
        tokens = hidden.reshape(-1, hidden.shape[-1]).repeat(k, 1)  # (B n k, d)
        into, out = (
            (p[0] if getattr(module, "is_transposed", False) else p[0].T)
            for p in (module.gate_up_proj, module.down_proj)
        )
        wide = tokens @ into
        gate, up = wide.chunk(2, dim=-1)
        act = getattr(module, "act_fn", torch.nn.functional.silu)
        result = ((act(gate) * up) @ out) * weights.reshape(-1, 1).to(hidden.dtype)
        return result.view(k, *hidden.shape).sum(0)

    return forward


def _even_shares(module: Any) -> Any:
    """The experts of shipped mixtures, each with its share of the tokens."""

    def apply(tokens: Any, _taken: Any, weights: Any) -> Any:
        import math

        options = module.options
        each = options.num_experts_per_tok or options.capacity_factor
        share = max(1, math.ceil(tokens.shape[0] * tokens.shape[1] * each / options.num_experts))
        flat, total = tokens.reshape(-1, tokens.shape[-1]), 0
        for number, expert in enumerate(module.experts):
            some = flat[:1].expand(share, -1) * weights.reshape(-1, options.num_experts)[:1, number, None].to(
                flat.dtype
            )
            total = total + expert(some).float().sum(0)
        return (flat + total).to(tokens.dtype).reshape(tokens.shape)

    return apply
