"""Adapters and checkpoints with something wrong or unusual: what scripts write, and what happens to files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from consumers import models
from consumers.trained import LINEAR, QV, train
from consumers.workshop import Workshop, Write

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def _edit(
    source: Path,
    out: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
    drop: Iterable[str] = (),
) -> None:
    """A copy of an adapter with other settings or other tensors; `drop` names settings to leave out."""
    shutil.copytree(source, out)
    settings = json.loads((out / CONFIG).read_text()) | dict(config or {})
    (out / CONFIG).write_text(json.dumps({key: value for key, value in settings.items() if key not in drop}))
    if tensors:
        changed = tensors(load_file(out / WEIGHTS))
        save_file({name: value.contiguous() for name, value in changed.items()}, out / WEIGHTS, {"format": "pt"})


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def _cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}


def _without(word: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if word not in name}


def _with(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: 0.1 * torch.ones(shape)}


def _not_finite(tensors: Tensors) -> Tensors:
    first = min(tensors)
    tensors[first].view(-1)[0] = float("nan")
    return tensors


def _pickled(source: Path, out: Path) -> None:
    shutil.copytree(source, out)
    torch.save(load_file(out / WEIGHTS), out / "adapter_model.bin")
    (out / WEIGHTS).unlink()


def _below(source: Path, out: Path) -> None:
    """What PEFT writes for an adapter whose name is not `default`: a folder within the folder."""
    shutil.copytree(source, out / "mine")


def _nothing_but_weights(source: Path, out: Path) -> None:
    out.mkdir()
    shutil.copy(source / WEIGHTS, out)


# Name: (what is particular, arguments of `_edit`).
_EDITS: dict[str, tuple[str, dict[str, Any]]] = {
    "float64": ("factors in float64", {"tensors": _cast(torch.float64)}),
    "float16": ("factors in float16", {"tensors": _cast(torch.float16)}),
    "bfloat16": ("factors in bfloat16", {"tensors": _cast(torch.bfloat16)}),
    "alpha-fraction": ("`lora_alpha` 12.5", {"config": {"lora_alpha": 12.5}}),
    "wrong-rank": ("`r` 4 with tensors of rank 8", {"config": {"r": 4}}),
    "no-prefix": ("keys without `base_model.model.`", {"tensors": _renamed("base_model.model.", "")}),
    "wrong-prefix": (
        "keys below `base_model.model.model.model.`",
        {"tensors": _renamed("model.layers", "model.model.layers")},
    ),
    "adapter-name": ("keys with `.default`", {"tensors": _renamed(".weight", ".default.weight")}),
    "no-b": ("one B missing", {"tensors": _without("layers.1.mlp.up_proj.lora_B")}),
    "no-a": ("one A missing", {"tensors": _without("layers.1.mlp.up_proj.lora_A")}),
    "layer-missing": ("no factors for the last layer", {"tensors": _without("layers.1.")}),
    "unknown-target": (
        "factors of a module that the base lacks",
        {
            "tensors": lambda tensors: _renamed("self_attn.q_proj", "self_attn.query")(tensors),
            "config": {"target_modules": ["query", *LINEAR[1:]]},
        },
    ),
    "targets-too-few": ("`target_modules` names fewer than there are factors", {"config": {"target_modules": QV}}),
    "targets-all-linear": ("`target_modules: 'all-linear'`", {"config": {"target_modules": "all-linear"}}),
    "no-targets": ("no `target_modules`", {"drop": ["target_modules"]}),
    "no-alpha": ("no `lora_alpha`", {"drop": ["lora_alpha"]}),
    "pissa": ("`init_lora_weights: 'pissa'`", {"config": {"init_lora_weights": "pissa"}}),
    "ia3": ("`peft_type: 'IA3'`", {"config": {"peft_type": "IA3"}}),
    "fan-in-fan-out": ("`fan_in_fan_out` on linear layers", {"config": {"fan_in_fan_out": True}}),
    "nan": ("a NaN in a factor", {"tensors": _not_finite}),
    "unknown-setting": ("a setting that no PEFT knows", {"config": {"quantum_flux": 3}}),
    "no-base-name": ("`base_model_name_or_path: null`", {"config": {"base_model_name_or_path": None}}),
}


def make_adapters(shop: Workshop) -> None:
    """Adapters that somebody's script wrote."""
    if shop.wants("llama"):
        _of_llama(shop)
    for family in filter(shop.wants, ("mixtral", "qwen3_moe")):
        what, write = "per-expert factors, PEFT before 0.18", partial(_per_expert, family=family)
        shop.add("refused", f"{family}/per-expert", what, write, shop.base(family))


def _of_llama(shop: Workshop) -> None:
    base, plain, ranked = shop.base("llama"), shop.adapter("llama/peft-plain"), shop.adapter("llama/peft-rank-12")
    for name, (what, arguments) in _EDITS.items():
        shop.add("refused", f"llama/{name}", what, partial(_edit, plain, **arguments), base)
    # The rest of these says all there is to say.
    for name, what, source, arguments in (
        (
            "minimal",
            "a config of four settings",
            plain,
            {"drop": _settings(plain) - {"peft_type", "r", "lora_alpha", "target_modules"}},
        ),
        (
            "unknown-tensor",
            "a tensor that is no factor",
            plain,
            {"tensors": _with("base_model.model.model.gate.alpha", 3)},
        ),
        ("no-rank", "no `r`, rank 12", ranked, {"drop": ["r"]}),
    ):
        write: Write = partial(_edit, source, **arguments)
        shop.add("refused", f"llama/{name}", what, write, base, means=f"llama/{source.name}")
    shop.add("refused", "llama/pickled", "`adapter_model.bin`", partial(_pickled, plain), base)
    shop.add("refused", "llama/subfolder", "the adapter in a folder within", partial(_below, plain), base)
    shop.add("refused", "llama/no-config", "no `adapter_config.json`", partial(_nothing_but_weights, plain), base)
    shop.add("refused", "llama/other-base", "an adapter of a wider model", _of_wider_model, base)


def _settings(adapter: Path) -> set[str]:
    return set(json.loads((adapter / CONFIG).read_text()))


def _of_wider_model(out: Path) -> None:
    train("llama", out)
    wider = {
        name: torch.cat([value, value], dim=1) if "lora_A" in name else torch.cat([value, value], dim=0)
        for name, value in load_file(out / WEIGHTS).items()
    }
    save_file(wider, out / WEIGHTS, {"format": "pt"})


def _per_expert(out: Path, family: str = "mixtral", experts: int = 4, rank: int = 4) -> None:
    """Factors of each expert by its own name, as PEFT wrote them for transformers 4."""
    model = models.make(family).config
    hidden = model.hidden_size
    wide = model.intermediate_size if family == "mixtral" else model.moe_intermediate_size
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(model.num_hidden_layers):
        for expert in range(experts):
            for name in names:
                into, out_of = (wide, hidden) if name in ("w2", "down_proj") else (hidden, wide)
                key = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(rank, into, generator=generator)
                tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out_of, rank, generator=generator)
    out.mkdir(parents=True)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(names),
        "task_type": "CAUSAL_LM",
    }
    (out / CONFIG).write_text(json.dumps(settings))


def _changed(base: Path, out: Path, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> None:
    """A copy of a checkpoint with other tensors or other settings."""
    shutil.copytree(base, out)
    if tensors:
        save_file(tensors(load_file(out / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(settings))


def _one_in_float64(tensors: Tensors) -> Tensors:
    return {name: value.double() if name.endswith("0.mlp.up_proj.weight") else value for name, value in tensors.items()}


# Name: (what is unusual, arguments of `_changed`).
_CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama/checkpoint-float64": ("one weight in float64", {"tensors": _one_in_float64}),
    "llama/checkpoint-extra": ("a tensor that nobody expects", {"tensors": _with("model.extra.weight", 3)}),
    "llama/checkpoint-missing": ("a norm missing", {"tensors": _without("model.norm")}),
    "llama/checkpoint-biases": (
        "biases that the config denies",
        {"tensors": _with("model.layers.0.mlp.up_proj.bias", 256)},
    ),
}
# Families whose config says whether the weights of the chosen experts are normalised.
_NORMALISED = ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "flex_olmo")
# Name: (what is unusual, settings of the config).
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe/checkpoint-some-dense": ("some layers dense", {"mlp_only_layers": [0]}),
    "glm4_moe/checkpoint-all-sparse": ("every layer sparse", {"first_k_dense_replace": 0}),
    "ernie4_5_moe/checkpoint-all-sparse": ("every layer sparse", {"moe_layer_start_index": 0}),
    "ernie4_5_moe/checkpoint-one-shared": ("one shared expert", {"moe_num_shared_experts": 1}),
    "ernie4_5_moe/checkpoint-none-shared": ("no shared expert", {"moe_num_shared_experts": 0}),
}


def make_checkpoints(shop: Workshop) -> None:
    """Checkpoints in which something is unusual."""
    for name, (what, arguments) in _CHANGES.items():
        family = name.partition("/")[0]
        if shop.wants(family):
            shop.add("refused", name, what, partial(_changed, shop.base(family), **arguments))
    if shop.wants("llama"):
        shop.add("refused", "llama/checkpoint-no-tokenizer", "no tokenizer", _without_tokenizer(shop.base("llama")))
    for family in filter(shop.wants, _NORMALISED):
        for name, value in (("true", True), ("false", False)):
            write = partial(_changed, shop.older(family), norm_topk_prob=value)
            shop.add("refused", f"{family}/checkpoint-top-k-{name}", f"`norm_topk_prob: {name}`", write)
    for name, (what, settings) in _SETTINGS.items():
        family = name.partition("/")[0]
        if shop.wants(family):
            shop.add("refused", name, what, partial(_remade, family, settings))
    if shop.wants("glm4_moe"):
        write = partial(_with_tokenizer_of, shop.base("glm4_moe"), shop.base("llama"))
        shop.add("refused", "glm4_moe/checkpoint-other-tokenizer", "a Llama's tokenizer", write)
    if shop.wants("ernie4_5_moe"):
        write = partial(_changed, shop.older("ernie4_5_moe"), tensors=_no_router_bias)
        shop.add("refused", "ernie4_5_moe/checkpoint-no-bias", "router biases of zero", write)
    for family in filter(shop.wants, ("llama", "qwen2", *models.MIXTURES)):
        older: Write = partial(models.older_config, shop.base(family))
        shop.add("trained", f"{family}/saved-older", "the same with a config of transformers 4", older)


def _without_tokenizer(base: Path) -> Write:
    return lambda out: shutil.copytree(base, out, ignore=shutil.ignore_patterns("tokenizer*"))


def _with_tokenizer_of(base: Path, other: Path, out: Path) -> None:
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("tokenizer*"))
    for path in other.glob("tokenizer*"):
        shutil.copy(path, out)


def _no_router_bias(tensors: Tensors) -> Tensors:
    return {
        name: torch.zeros_like(value) if name.endswith("e_score_correction_bias") else value
        for name, value in tensors.items()
    }


def _remade(family: str, settings: Mapping[str, Any], out: Path) -> None:
    models.save(models.make(family, **settings), out)
