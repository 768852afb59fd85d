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


def edit(
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


# Name: (what is particular, arguments of `edit`).
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
    "minimal": (
        "a config of four settings",
        {"drop": [], "config": {}},
    ),
    "no-base-name": ("`base_model_name_or_path: null`", {"config": {"base_model_name_or_path": None}}),
}


def _edited(source: Path, arguments: Mapping[str, Any]) -> Write:
    return lambda out: edit(source, out, **arguments)


def make_adapters(shop: Workshop) -> None:
    """Adapters that somebody's script wrote."""
    base = shop.base("llama")
    plain = shop.root / "adapters" / "llama" / "peft-plain"
    if not plain.exists():
        train("llama", plain)
    for name, (what, arguments) in _EDITS.items():
        if name == "minimal":
            kept = {"peft_type", "r", "lora_alpha", "target_modules"}
            arguments = {"drop": set(json.loads((plain / CONFIG).read_text())) - kept}
        shop.add("refused", f"llama/{name}", what, _edited(plain, arguments), base)
    # The rest of these says all there is to say.
    stranger = partial(edit, plain, tensors=_with("base_model.model.model.gate.alpha", 3))
    shop.add("refused", "llama/unknown-tensor", "a tensor that is no factor", stranger, base, "llama/peft-plain")
    ranked = shop.root / "adapters" / "llama" / "peft-rank-12"
    if ranked.exists():
        write = partial(edit, ranked, drop=["r"])
        shop.add("refused", "llama/no-rank", "no `r`, rank 12", write, base, "llama/peft-rank-12")
    shop.add("refused", "llama/pickled", "`adapter_model.bin`", lambda out: _pickled(plain, out), base)
    shop.add("refused", "llama/subfolder", "the adapter in a folder within", lambda out: _below(plain, out), base)
    shop.add(
        "refused", "llama/no-config", "no `adapter_config.json`", lambda out: _nothing_but_weights(plain, out), base
    )
    shop.add("refused", "llama/other-base", "an adapter of a wider model", _of_wider_model, base)
    shop.add("refused", "mixtral/per-expert", "per-expert factors, PEFT before 0.18", _per_expert, shop.base("mixtral"))
    of_qwen = partial(_per_expert, family="qwen3_moe")
    shop.add("refused", "qwen3_moe/per-expert", "per-expert factors, PEFT before 0.18", of_qwen, shop.base("qwen3_moe"))


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


def make_checkpoints(shop: Workshop) -> None:
    """Checkpoints in which something is unusual."""

    def changed(family: str, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Write:
        def write(out: Path) -> None:
            shutil.copytree(shop.base(family), out)
            if tensors:
                save_file(tensors(load_file(out / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
            settings = json.loads((out / "config.json").read_text()) | config
            (out / "config.json").write_text(
                json.dumps({key: value for key, value in settings.items() if value != "absent"})
            )

        return write

    one64 = lambda tensors: {n: t.double() if n.endswith("0.mlp.up_proj.weight") else t for n, t in tensors.items()}  # noqa: E731
    for name, what, write in (
        ("llama/checkpoint-float64", "one weight in float64", changed("llama", one64)),
        ("llama/checkpoint-extra", "a tensor that nobody expects", changed("llama", _with("model.extra.weight", 3))),
        ("llama/checkpoint-missing", "a norm missing", changed("llama", _without("model.norm"))),
        (
            "llama/checkpoint-biases",
            "biases that the config denies",
            changed("llama", _with("model.layers.0.mlp.up_proj.bias", 256)),
        ),
        ("llama/checkpoint-no-tokenizer", "no tokenizer", _without_tokenizer(shop.base("llama"))),
        ("qwen3_moe/checkpoint-some-dense", "some layers dense", _some_dense),
        ("qwen3_moe/checkpoint-top-k", "`norm_topk_prob: false`", changed("qwen3_moe", norm_topk_prob=False)),
    ):
        shop.add("refused", name, what, write)
    for family in ("llama", "qwen2", "mixtral", "qwen3_moe"):
        write = partial(models.older_config, shop.base(family))
        shop.add("trained", f"{family}/saved-older", "the same with a config of transformers 4", write)


def _without_tokenizer(base: Path) -> Write:
    return lambda out: shutil.copytree(base, out, ignore=shutil.ignore_patterns("tokenizer*"))


def _some_dense(out: Path) -> None:
    models.save(models.make("qwen3_moe", mlp_only_layers=[0]), out)
