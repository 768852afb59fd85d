"""Dense transformers whose MLPs have become mixtures of experts (sparse upcycling).

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (2023), sections 2 and 3: in
some layers of a trained dense model, E copies of the MLP stand where there was one, and a router decides which of them
see a token. Everything else is as it was. Each model class here is a dense class of transformers with those MLPs
replaced: `UpcycledGPT2LMHeadModel` is `transformers.GPT2LMHeadModel`, and so on for every class of the families in
`FAMILIES`. They are made when asked for; see `__getattr__` at the end.

This file needs only torch and transformers (5.10 or later). It travels with the checkpoint, and `auto_map` in
config.json names it. So it is one file, long as it is: whoever gets a checkpoint has this and nothing else of ours.

What config.json says besides the dense model's settings:

    "moe_stacks": {                       one entry for each stack of layers that has mixtures: "encoder", "decoder"
      "decoder": {
        "layers": [6, 7, 8, 9, 10, 11],   zero-based
        "num_experts": 32,
        "router": "top-k",                or "expert-choice"
        "num_experts_per_tok": 2,         K, for top-k
        "capacity_factor": null,          C, for expert choice: each expert takes ceil(C n / E) of n tokens
        "normalize": true,                whether a token's combine weights sum to 1
        "group": "sequence",              the tokens that compete in expert choice: one "sequence" or image, or "batch"
        "granularity": 1,                 G: an expert has 1/G of the MLP's intermediate units
        "kind": "copy"                    or "lora": low-rank updates to one frozen MLP, with "rank" and "alpha"
      }
    },
    "base_model_name_or_path": null,      for kind "lora", if the folder has only routers and updates, in
    "base_model_revision": null,          routed_lora.safetensors: where the dense weights are
    "router_aux_loss_coef": 0.01,         load balancing, top-k only
    "router_z_loss_coef": 0.0,
    "router_jitter_noise": 0.0

Shapes: G groups of n tokens, H hidden size, E experts.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as torch's own documentation calls it
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

# --------------------------------------------------------------------------------------------------------------------
# Routing: pure functions
# --------------------------------------------------------------------------------------------------------------------


def choose_top_k(logits: Tensor, k: int) -> Tensor:
    """Each token takes the k experts of highest probability.

    Args:
        logits: [G, n, E].
        k: experts for each token.

    Returns:
        Which expert takes which token, bool [G, n, E].
    """
    best = logits.topk(k, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)


def tokens_per_expert(tokens: int, num_experts: int, capacity_factor: float) -> int:
    """T of expert choice: how many of a group's tokens each expert takes, ceil(C n / E), from 1 to n."""
    return min(tokens, max(1, math.ceil(capacity_factor * tokens / num_experts)))


def choose_by_experts(logits: Tensor, capacity_factor: float, real: Tensor | None = None) -> Tensor:
    """Each expert takes the T tokens of its group that give it the highest probability (expert choice).

    Load is balanced by construction. A token may be taken by several experts or by none, and which it is depends on all
    tokens of the group, later ones included.

    Args:
        logits: [G, n, E].
        capacity_factor: C, the mean number of experts that take a token.
        real: bool [G, n], False for padding, which is never taken and does not count in n.

    Returns:
        Which expert takes which token, bool [G, n, E].
    """
    _, n, num_experts = logits.shape
    scores = logits.softmax(dim=-1)
    most = tokens_per_expert(n, num_experts, capacity_factor)
    if real is None:
        take: Tensor | bool = True
    else:
        scores = scores.masked_fill(~real.unsqueeze(-1), -1.0)
        limit = [tokens_per_expert(count, num_experts, capacity_factor) for count in real.sum(dim=1).tolist()]
        rank = torch.arange(most, device=logits.device)
        take = rank < torch.tensor(limit, device=logits.device).unsqueeze(-1)  # [G, T]
        take = take.unsqueeze(-1).expand(-1, -1, num_experts)
    best = scores.topk(most, dim=1).indices  # [G, T, E]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, take)


def combine_weights(logits: Tensor, taken: Tensor, normalize: bool) -> Tensor:
    """The weights by which the outputs of the experts that took a token are added up.

    Args:
        logits: [G, n, E].
        taken: bool [G, n, E].
        normalize: whether the weights of a token sum to 1. Identical experts then give what the dense MLP gave. If not,
            the weights are the router's probabilities, as in the original recipe for language.

    Returns:
        [G, n, E], zero where not taken.
    """
    if normalize:
        # Probabilities divided by their sum over the chosen experts are a softmax over the chosen logits.
        logits = logits.masked_fill(~taken, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1) * taken


def load_balancing_loss(logits: Tensor, taken: Tensor, real: Tensor | None = None) -> Tensor:
    """E times the sum over experts of (share of all assignments) x (mean probability); 1 when balanced.

    Fedus et al., "Switch Transformers" (2021), equation 4. For K experts a token, transformers' own Mixtral loss is K
    times this.

    Args:
        logits: [G, n, E].
        taken: bool [G, n, E].
        real: bool [G, n], False for padding, which does not count.

    Returns:
        A scalar with a gradient towards `logits`.
    """
    probabilities, counts = logits.softmax(dim=-1), taken.to(logits.dtype)
    if real is not None:
        probabilities, counts = probabilities[real], counts[real]
    num_experts = logits.shape[-1]
    probabilities, counts = probabilities.reshape(-1, num_experts), counts.reshape(-1, num_experts)
    share = counts.sum(dim=0) / counts.sum().clamp_min(1)
    return num_experts * (share * probabilities.sum(dim=0) / max(1, len(probabilities))).sum()


def router_z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2, which keeps logits small. Zoph et al., "ST-MoE" (2022), equation 5.

    Args:
        logits: [G, n, E].
        real: bool [G, n], False for padding, which does not count.
    """
    squares = logits.logsumexp(dim=-1).square()
    if real is not None:
        squares = squares[real]
    return squares.sum() / max(1, squares.numel())


@dataclass(frozen=True)
class Routing:
    """What a mixture decided in its last forward pass.

    Attributes:
        logits: the router's scores, [G, n, E]; in training they carry gradients.
        taken: which expert took which token, bool [G, n, E].
        real: bool [G, n], False for padding; None if there was none, or none could be seen.
    """

    logits: Tensor
    taken: Tensor
    real: Tensor | None

    @property
    def tokens_per_expert(self) -> Tensor:
        """How many tokens each expert took, padding not counted: [E], integer."""
        taken = self.taken if self.real is None else self.taken[self.real]
        return taken.flatten(0, -2).sum(dim=0)

    @property
    def uncovered(self) -> Tensor:
        """The share of tokens that no expert took, from 0 to 1; padding not counted."""
        none = ~self.taken.any(dim=-1)
        return (none if self.real is None else none[self.real]).float().mean()

    def load_balancing_loss(self) -> Tensor:
        """See the function of that name."""
        return load_balancing_loss(self.logits, self.taken, self.real)

    def router_z_loss(self) -> Tensor:
        """See the function of that name."""
        return router_z_loss(self.logits, self.real)


# --------------------------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoeOptions:
    """One entry of `moe_stacks`; see the top of this file."""

    layers: tuple[int, ...]
    num_experts: int
    router: str = "top-k"
    num_experts_per_tok: int = 0
    capacity_factor: float = 0.0
    normalize: bool = True
    group: str = "sequence"
    granularity: int = 1
    kind: str = "copy"
    rank: int = 0
    alpha: float = 0.0
    jitter: float = 0.0

    @classmethod
    def of(cls, config: PreTrainedConfig, stack: str) -> MoeOptions:
        """The options of a stack, checked.

        Raises:
            ValueError: something is missing, unknown or out of range.
        """
        written = {key: value for key, value in config.moe_stacks[stack].items() if value is not None}
        unknown = written.keys() - (cls.__dataclass_fields__.keys() - {"jitter"})
        if unknown:
            raise ValueError(f"moe_stacks.{stack} in config.json has unknown fields: {', '.join(sorted(unknown))}.")
        missing = {"layers", "num_experts"} - written.keys()
        if missing:
            raise ValueError(f"moe_stacks.{stack} in config.json lacks {' and '.join(sorted(missing))}.")
        written["layers"] = tuple(written["layers"])
        options = replace(cls(**written), jitter=config.router_jitter_noise)
        count, k, capacity = options.num_experts, options.num_experts_per_tok, options.capacity_factor
        wrong = None
        if count < 1:
            wrong = f"num_experts is {count}, and must be at least 1"
        elif options.router not in ("top-k", "expert-choice"):
            wrong = f"router is {options.router!r}, and must be 'top-k' or 'expert-choice'"
        elif options.router == "top-k" and not 1 <= k <= count:
            wrong = f"num_experts_per_tok is {k}, and must be from 1 to {count}"
        elif options.router == "expert-choice" and not capacity > 0:
            wrong = f"capacity_factor is {capacity}, and must be positive"
        elif options.group not in ("sequence", "batch"):
            wrong = f"group is {options.group!r}, and must be 'sequence' or 'batch'"
        elif options.granularity < 1:
            wrong = f"granularity is {options.granularity}, and must be at least 1"
        elif options.kind not in ("copy", "lora"):
            wrong = f"kind is {options.kind!r}, and must be 'copy' or 'lora'"
        elif options.kind == "lora" and (options.rank < 1 or not options.alpha):
            wrong = f"rank is {options.rank} and alpha {options.alpha}, and kind 'lora' needs both"
        elif options.kind == "lora" and options.granularity > 1:
            wrong = f"granularity is {options.granularity}, and kind 'lora' has one whole MLP"
        if wrong:
            raise ValueError(f"moe_stacks.{stack} in config.json: {wrong}.")
        return options


class Router(nn.Linear):
    """A linear map without bias from a token to a score for each expert, in float32 whatever the model's dtype."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[G, n, H] to [G, n, E]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.to(dtype), self.weight.to(dtype))


class MixtureOfExperts(nn.Module):
    """E copies of an MLP and a router, where the MLP was.

    Attributes:
        router: scores the experts for each token.
        experts: modules of the dense family's own MLP class.
        routing: what the last forward pass decided; None before the first.
    """

    def __init__(self, mlp: nn.Module, hidden_size: int, options: MoeOptions) -> None:
        super().__init__()
        self.options = options
        self.router = Router(hidden_size, options.num_experts)
        if options.kind == "lora":
            # The one frozen MLP keeps its names, so that the dense checkpoint is a part of this one's.
            for name, child in mlp.named_children():
                self.add_module(name, child)
            experts = [lora_expert(mlp, options.rank, options.alpha) for _ in range(options.num_experts)]
        else:
            small = mlp if options.granularity == 1 else narrow_mlp(mlp, options.granularity)
            experts = [copy.deepcopy(small) for _ in range(options.num_experts)]
            for module in nn.ModuleList(experts).modules():
                # A model that is not loaded from a checkpoint shall start with experts that differ.
                module.__dict__["_is_hf_initialized"] = False
        self.experts = nn.ModuleList(experts)
        self.freeze_shared_mlp()
        self.routing: Routing | None = None
        self._real: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, n, H] to [B, n, H]. Tokens that no expert took get zeros, so that only the residual goes on."""
        options = self.options
        real, self._real = self._real, None
        tokens = hidden_states.reshape(-1, *hidden_states.shape[-2:])
        if options.group == "batch":
            tokens = tokens.flatten(0, 1).unsqueeze(0)
        if real is not None:
            real = real.to(tokens.device).reshape(tokens.shape[:-1])

        seen_by_router = tokens
        if self.training and options.jitter:
            noise = torch.empty_like(tokens).uniform_(1 - options.jitter, 1 + options.jitter)
            seen_by_router = tokens * noise
        logits = self.router(seen_by_router)
        if options.router == "top-k":
            taken = choose_top_k(logits, options.num_experts_per_tok)
        else:
            taken = choose_by_experts(logits, options.capacity_factor, real)
        weights = combine_weights(logits, taken, options.normalize)
        self.routing = Routing(logits, taken, real)
        return self._apply_experts(tokens, taken, weights).reshape(hidden_states.shape)

    def _apply_experts(self, tokens: Tensor, taken: Tensor, weights: Tensor) -> Tensor:
        """The sum over experts of weight x expert(token).

        Outputs are added in float32 and rounded once. With identical experts and weights that sum to 1 that gives back
        the very bits of the dense MLP in bfloat16, nearly always.

        Args:
            tokens: [G, n, H].
            taken: bool [G, n, E].
            weights: float32 [G, n, E].

        Returns:
            [G, n, H], in the dtype of the experts' outputs.
        """
        flat = tokens.flatten(0, 1)  # [G n, H]
        expert_of, token_of = taken.flatten(0, 1).t().nonzero(as_tuple=True)  # sorted by expert
        inputs = flat[token_of].split(taken.sum(dim=(0, 1)).tolist())
        # In training idle experts run on no tokens: their gradients are then zero, not absent, on every device.
        idle_too = self.training or not len(token_of)
        outputs = torch.cat(
            [expert(rows) for expert, rows in zip(self.experts, inputs, strict=True) if idle_too or len(rows)]
        )
        weighted = outputs * weights.flatten(0, 1)[token_of, expert_of].unsqueeze(-1)
        result = torch.zeros_like(flat, dtype=weighted.dtype).index_add(0, token_of, weighted)
        # Not the dtype of `tokens`: T5 in float16 keeps the second half of its MLPs in float32.
        return result.to(outputs.dtype).view_as(tokens)

    def freeze_shared_mlp(self) -> None:
        """Leave the MLP out of training whose updates are the experts, if this is of kind "lora"."""
        for name, child in self.named_children():
            if name not in ("router", "experts"):
                child.requires_grad_(False)

    def see_attention_mask(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn which tokens are padding, from what the layer's attention is given; a forward pre-hook.

        The attention runs before the MLP in every layer, also when gradient checkpointing repeats a layer, so this is
        always about the tokens that come next. Hidden from us are masks of other kinds (flex attention) and those of a
        generation with a cache; all tokens count as real then.
        """
        names = list(inspect.signature(type(attention).forward).parameters)[1:]
        hidden_states = kwargs.get("hidden_states", args[0] if args else None)
        mask = kwargs.get("attention_mask", dict(zip(names, args, strict=False)).get("attention_mask"))
        self._real = None
        if isinstance(mask, Tensor) and hidden_states is not None:
            real = attended_tokens(mask)
            if real.shape == hidden_states.shape[:2]:
                self._real = real

    def __getstate__(self) -> dict[str, Any]:
        # The last routing is part of a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "routing": None, "_real": None}


def attended_tokens(mask: Tensor) -> Tensor:
    """Tokens that some token may attend to; the others are padding.

    Args:
        mask: an attention mask as layers get it: [B, n] (1 or 0), or [B, 1, queries, n], bool or added to the scores.

    Returns:
        bool [B, n].
    """
    if mask.dtype.is_floating_point and mask.dim() > 2:
        mask = mask > torch.finfo(mask.dtype).min / 2
    mask = mask.bool()
    return mask if mask.dim() == 2 else mask.flatten(1, -2).any(dim=1)


class LoraFactor(nn.Module):
    """One factor of a low-rank update. No nn.Linear, because the dense family's initialisation is not for it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens, columns] to [tokens, rows]."""
        return F.linear(inputs, self.weight.to(inputs.dtype))


class LoraLinear(nn.Module):
    """W x + (alpha / rank) B A x, where W belongs to another module and is frozen, and B is zero at the start."""

    def __init__(self, frozen: nn.Linear | Conv1D, rank: int, alpha: float) -> None:
        super().__init__()
        self._frozen = (frozen,)  # in a tuple, so that it is no submodule and not stored again for each expert
        rows, columns = linear_shape(frozen)
        self.scale = alpha / rank
        self.lora_A = LoraFactor(rank, columns)
        self.lora_B = LoraFactor(rows, rank)
        nn.init.normal_(self.lora_A.weight, std=1 / rank)

    @property
    def weight(self) -> Tensor:
        """W, for modules that ask for its dtype."""
        return self._frozen[0].weight

    def forward(self, inputs: Tensor) -> Tensor:
        """[tokens, columns] to [tokens, rows]."""
        return self._frozen[0](inputs) + self.scale * self.lora_B(self.lora_A(inputs))


def narrow_mlp(mlp: nn.Module, granularity: int) -> nn.Module:
    """An MLP of the same class with 1 / `granularity` of the intermediate units, and weights that mean nothing yet.

    Raises:
        ValueError: the intermediate units do not divide.
    """
    small = copy.deepcopy(mlp)
    linear = [(name, module) for name, module in mlp.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for number, (name, module) in enumerate(linear):
        rows, columns = linear_shape(module)
        # The last linear map leads out, in every family.
        is_output = number == len(linear) - 1
        inner = columns if is_output else rows
        if inner % granularity:
            raise ValueError(
                f"moe_stacks in config.json has granularity {granularity}, and the MLP's {inner} intermediate units do "
                "not divide by it."
            )
        if is_output:
            columns = inner // granularity
        else:
            rows = inner // granularity
        made: nn.Module = (
            Conv1D(rows, columns)
            if isinstance(module, Conv1D)
            else nn.Linear(columns, rows, bias=module.bias is not None)
        )
        small.set_submodule(name, made.to(module.weight))
    return small


def linear_shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Outputs and inputs of a linear map."""
    return (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)


def lora_expert(mlp: nn.Module, rank: int, alpha: float) -> nn.Module:
    """An MLP of the same class whose linear maps are those of `mlp` plus low-rank updates of its own."""
    expert = copy.deepcopy(mlp, {id(parameter): parameter for parameter in mlp.parameters()})
    for name, module in mlp.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            expert.set_submodule(name, LoraLinear(module, rank, alpha))
    return expert


class BertExpert(nn.Module):
    """The MLP that BERT spreads over `intermediate` and `output`, without the residual and LayerNorm that follow."""

    def __init__(self, intermediate: nn.Module, dense: nn.Module) -> None:
        super().__init__()
        self.intermediate = intermediate
        self.output = nn.Sequential(OrderedDict(dense=dense))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, H] to [tokens, H]."""
        return self.output(self.intermediate(hidden_states))


# --------------------------------------------------------------------------------------------------------------------
# The models
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StackLayout:
    """Where a family keeps what matters here, as module paths in memory.

    Attributes:
        layers: the list of layers, below the base model.
        mlp: below a layer.
        attention: below a layer; runs before the MLP.
    """

    layers: str
    mlp: str
    attention: str


_LLAMA_LIKE = {"decoder": StackLayout("layers", "mlp", "self_attn")}
_BERT_LIKE = {"encoder": StackLayout("encoder.layer", "intermediate", "attention")}
FAMILIES: dict[str, dict[str, StackLayout]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "vit": {"encoder": StackLayout("layers", "mlp", "attention")},
    "t5": {
        "encoder": StackLayout("encoder.block", "layer.1.DenseReluDense", "layer.0"),
        "decoder": StackLayout("decoder.block", "layer.2.DenseReluDense", "layer.0"),
    },
    "gpt2": {"decoder": StackLayout("h", "mlp", "attn")},
    "gpt_neox": {"decoder": StackLayout("layers", "mlp", "attention")},
    **dict.fromkeys(
        ("phi", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"),
        _LLAMA_LIKE,
    ),
}
PREFIX = "Upcycled"
ROUTED_LORA_FILE = "routed_lora.safetensors"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def replace_mlps(model: PreTrainedModel) -> None:
    """Put mixtures in place of the MLPs that the config names."""
    config = model.config
    for stack, layout in FAMILIES[config.model_type.removeprefix("upcycled_")].items():
        if stack not in (config.moe_stacks or {}):
            continue
        options = MoeOptions.of(config, stack)
        if stack == "decoder" and hasattr(model.base_model, "encoder") and not hasattr(model.base_model, "decoder"):
            continue  # T5's encoder on its own
        layers: Any = model.base_model.get_submodule(layout.layers)
        for number in options.layers:
            if not 0 <= number < len(layers):
                raise ValueError(
                    f"moe_stacks.{stack} in config.json names layer {number}, but there are only {len(layers)} layers."
                )
            layer = layers[number]
            mlp = layer.get_submodule(layout.mlp)
            if isinstance(mlp, MixtureOfExperts):
                continue  # by the base model, where a head has made that through AutoModel
            if layout is _BERT_LIKE["encoder"]:
                if options.kind == "lora":
                    raise ValueError(
                        "Routed LoRA experts need an MLP that is one module; in BERT and RoBERTa it is two."
                    )
                # `output` keeps dropout, residual and LayerNorm. Chunks would be routing groups of their own.
                mlp = BertExpert(mlp, layer.output.dense)
                layer.output.dense = nn.Identity()
                layer.chunk_size_feed_forward = 0
            mixture = MixtureOfExperts(mlp, config.hidden_size, options)
            layer.set_submodule(layout.mlp, mixture)
            attention = layer.get_submodule(layout.attention)
            attention.register_forward_pre_hook(mixture.see_attention_mask, with_kwargs=True)


def add_routed_lora(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Put stored routers and low-rank updates into a model that has places for them.

    Args:
        model: with mixtures of kind "lora".
        tensors: by the model's names for them: all routers and updates, and nothing else.

    Raises:
        ValueError: a name or a shape differs.
    """
    places = routed_lora_tensors(model)
    wrong = sorted(places.keys() ^ tensors.keys()) or sorted(n for n in places if places[n].shape != tensors[n].shape)
    if wrong:
        raise ValueError(
            f"{ROUTED_LORA_FILE} does not fit its base model and config.json: {len(wrong)} of its tensors are missing, "
            f"unknown or of another shape, {wrong[0]} among them."
        )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def routed_lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model's routers and low-rank updates, by name."""
    return {
        f"{name}.{part}": parameter
        for name, mixture in mixtures(model).items()
        for part, parameter in mixture.named_parameters()
        if part.startswith(("router.", "experts."))
    }


def mixtures(model: nn.Module) -> dict[str, MixtureOfExperts]:
    """Every mixture of a model by its module name; `.routing` of each tells about the last forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}


def router_loss(model: PreTrainedModel) -> Tensor | None:
    """What the routers of the last forward pass add to the task's loss, by the config's coefficients.

    The load-balancing loss is the mean over the mixtures with top-k routing: expert choice is balanced by construction.
    The z-loss is the mean over all mixtures.

    Returns:
        A scalar; None where both coefficients are zero or no mixture has run.
    """
    config = model.config
    ran = [(layer.options, layer.routing) for layer in mixtures(model).values() if layer.routing is not None]
    terms = []
    if config.router_aux_loss_coef:
        balancing = [routing.load_balancing_loss() for options, routing in ran if options.router == "top-k"]
        terms += [config.router_aux_loss_coef / len(balancing) * loss for loss in balancing]
    if config.router_z_loss_coef:
        terms += [config.router_z_loss_coef / len(ran) * routing.router_z_loss() for _, routing in ran]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None


def _config_class(dense: Any) -> type[PreTrainedConfig]:
    class UpcycledConfig(dense):  # type: ignore[misc]  # a class that is known when this runs
        model_type = f"upcycled_{dense.model_type}"
        moe_stacks: dict[str, Any] | None = None
        base_model_name_or_path: str | None = None
        base_model_revision: str | None = None
        router_aux_loss_coef: float = 0.01
        router_z_loss_coef: float = 0.0
        router_jitter_noise: float = 0.0

    UpcycledConfig._auto_class = "AutoConfig"  # save_pretrained then ships this file
    return UpcycledConfig


def _model_class(dense: Any) -> type[PreTrainedModel]:
    class UpcycledModel(dense):  # type: ignore[misc]  # likewise
        config_class = __getattr__(PREFIX + dense.config_class.__name__)

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            replace_mlps(self)
            self.post_init()

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            """As ever; or, for a folder that has only routed LoRA experts, the dense checkpoint with those added."""
            hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            config = kwargs.get("config")
            if not isinstance(config, PreTrainedConfig):
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **hub)
            base, file = config.base_model_name_or_path, None
            if base is not None:
                file = cached_file(pretrained_model_name_or_path, ROUTED_LORA_FILE, **hub)
                beside = os.path.join(pretrained_model_name_or_path, base)
                pretrained_model_name_or_path = beside if os.path.isdir(beside) else base
                config = copy.deepcopy(config)
                kwargs |= {"config": config, "revision": config.base_model_revision or "main", "subfolder": ""}
                # What is loaded is whole, and is saved as a whole.
                config.base_model_name_or_path = config.base_model_revision = None
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if file is not None:
                tensors = load_file(file)
                add_routed_lora(model, tensors)
                if isinstance(loaded, tuple):  # with `output_loading_info`
                    loaded[1]["missing_keys"] = loaded[1]["missing_keys"] - tensors.keys()
            for mixture in mixtures(model).values():
                mixture.freeze_shared_mlp()  # loading has put new parameters there
            return loaded

        @wraps(dense.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            if self.training and getattr(outputs, "loss", None) is not None:
                extra = router_loss(self)
                if extra is not None:
                    outputs.loss = outputs.loss + extra.to(outputs.loss.device)
            return outputs

    return UpcycledModel


def __getattr__(name: str) -> Any:
    """`UpcycledX` for the class X of transformers."""
    if name in globals():
        return globals()[name]
    dense: Any = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    is_config = isinstance(dense, type) and issubclass(dense, PreTrainedConfig)
    config = dense if is_config else getattr(dense, "config_class", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made: Any = _config_class(dense) if is_config else _model_class(dense)
    made.__name__ = made.__qualname__ = name
    made.__doc__ = f"`transformers.{dense.__name__}`, upcycled: mixtures of experts in place of some MLPs."
    globals()[name] = made
    base: Any = dense if is_config else transformers.MODEL_MAPPING[dense.config_class]
    if base is not dense:
        # Some heads make their base model through AutoModel, which has to know it without asking whom to trust.
        transformers.AutoModel.register(made.config_class, __getattr__(PREFIX + base.__name__), exist_ok=True)
    if not is_config and (renames := get_checkpoint_conversion_mapping(dense.__name__)):
        # Stored names that transformers changes on loading it changes for this class as for the dense one.
        register_checkpoint_conversion_mapping(name, renames, overwrite=True)
    return made
