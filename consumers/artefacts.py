"""Every kind of adapter and merged checkpoint that this project writes, and others with something to refuse.

What comes out is a list of jobs on disk below one folder, with a sentence on each for the table.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from consumers import models

Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_QV = ["q_proj", "v_proj"]
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Artefact:
    """Something to load.

    Attributes:
        name: `family/artefact`.
        what: how it came to be, for the table.
        group: `written` by this project, `trained` by PEFT, or made to be `refused`.
        path: its folder.
        base: the checkpoint that an adapter acts on; for a checkpoint, itself.
        engines: the only ones to give it to; none for all.
        means: the artefact that says the same, where this one's format is not PEFT's.
    """

    name: str
    what: str
    group: str
    path: Path
    base: Path
    engines: tuple[str, ...] = ()
    means: str = ""

    @property
    def is_adapter(self) -> bool:
        return self.path != self.base


class Workshop:
    """Makes artefacts in a folder: `bases/`, `tuned/`, `all/` (everything tuned), `adapters/`, `checkpoints/`."""

    def __init__(self, root: Path, only: str = "") -> None:
        self.root, self.only = root, only
        self.made: list[Artefact] = []

    def base(self, family: str) -> Path:
        return self._model("bases", family, lambda: models.make(family))

    def base32(self, family: str) -> Path:
        """The same weights in float32, to be merged into without rounding."""
        return self._model("bases32", family, lambda: models.make(family), torch.float32)

    def tuned(self, family: str) -> Path:
        return self._model("tuned", family, lambda: models.fine_tune(models.make(family)))

    def tuned_throughout(self, family: str) -> Path:
        return self._model("all", family, lambda: models.fine_tune(models.make(family), everything=True))

    def _model(self, kind: str, family: str, make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = self.root / kind / family
        return folder if folder.exists() else models.save(make(), folder, dtype)

    def add(
        self, group: str, name: str, what: str, write: Callable[[Path], object], base: Path | None = None
    ) -> Path | None:
        """Let `write` make the artefact, in a fresh folder of its own."""
        if self.only not in name:
            return None
        folder = self.root / ("adapters" if base else "checkpoints") / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(folder)
        self.made.append(Artefact(name, what, group, folder, base or folder))
        return folder


def make_all(root: Path, only: str = "") -> list[Artefact]:
    """Make every artefact whose name contains `only`."""
    shop = Workshop(root, only)
    for family in models.FAMILIES:
        _of_family(shop, family)
    _extracted(shop)
    _experts(shop)
    _trained(shop)
    _merged(shop)
    _edited(shop)
    _damaged_checkpoints(shop)
    _converted(shop)
    return shop.made


def _converted(shop: Workshop) -> None:
    """What `convert --to mlx` makes of every adapter that we or PEFT write."""
    for one in [one for one in shop.made if one.is_adapter and one.group in ("written", "trained")]:
        folder = one.path.with_name(f"mlx-{one.path.name}")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            surgery.convert(one.path, to="mlx", base=one.base, output=folder)
        except surgery.SurgeryError as error:
            print(f"convert --to mlx refuses {one.name}: {error}")
            continue
        name = f"{one.name.partition('/')[0]}/{folder.name}"
        what = f"`convert --to mlx` of {one.name}"
        shop.made.append(Artefact(name, what, "converted", folder, one.base, ("mlx",), one.name))


def _of_family(shop: Workshop, family: str) -> None:
    """For each family: the checkpoint as transformers saves it, its default adapter, and that merged."""
    base, tuned = shop.base(family), shop.tuned(family)
    if shop.only in f"{family}/saved":
        shop.made.append(Artefact(f"{family}/saved", "`save_pretrained` of transformers 5", "trained", base, base))
    shop.add("written", f"{family}/extract", "`extract`", _extract(base, tuned), base)
    adapter = shop.root / "adapters" / family / "extract"
    if adapter.exists():
        merge = lambda out: surgery.merge(base, adapter, output=out)  # noqa: E731
        shop.add("written", f"{family}/merge", "`merge`", merge)


def _extract(base: Path, tuned: Path, **options: Any) -> Callable[[Path], object]:
    return lambda out: surgery.extract(base, tuned, output=out, **{"device": "cpu", "base_name": base.name, **options})


def _extracted(shop: Workshop) -> None:
    """The options of `extract`."""
    base, tuned = shop.base("llama"), shop.tuned("llama")
    throughout = shop.tuned_throughout("llama")
    for name, what, pair, options in (
        ("rank-1", "`extract --rank 1`", tuned, {"rank": 1}),
        ("rank-32", "`extract --rank 32`", tuned, {"rank": 32}),
        ("energy", "`extract --energy 0.9`", tuned, {"energy": 0.9, "max_rank": 16}),
        ("budget", "`extract --budget 12K`", tuned, {"budget": 12_000, "max_rank": 16}),
        ("bfloat16", "`extract --dtype bfloat16`", tuned, {"dtype": "bfloat16"}),
        ("attention", "`extract --targets attention`", tuned, {"targets": "attention"}),
        ("one-layer", "`extract --targets 're:layers.1.*proj'`", tuned, {"targets": r"re:.*layers\.1\..*_proj"}),
        ("embeddings", "`extract --targets all-linear,embeddings`", throughout, {"targets": "all-linear,embeddings"}),
        ("head", "`extract --targets all-linear,head`", throughout, {"targets": "all-linear,head"}),
        ("residual", "`extract --save-residual`", throughout, {"save_residual": True}),
        (
            "residual-norms",
            "`extract --targets all-linear,embeddings,head --save-residual`",
            throughout,
            {"targets": "all-linear,embeddings,head", "save_residual": True},
        ),
    ):
        shop.add("written", f"llama/extract-{name}", what, _extract(base, pair, **options), base)
    base, throughout = shop.base("qwen3"), shop.tuned_throughout("qwen3")
    write = _extract(base, throughout, targets="all-linear,embeddings")
    what = "`extract --targets all-linear,embeddings`, tied"
    shop.add("written", "qwen3/extract-embeddings", what, write, base)


def _experts(shop: Workshop) -> None:
    for family in ("mixtral", "qwen3_moe"):
        base, tuned = shop.base(family), shop.tuned(family)
        write = _extract(base, tuned, targets="attention")
        shop.add("written", f"{family}/extract-attention", "`extract --targets attention`", write, base)
        write = _extract(base, tuned, targets="experts", rank=4)
        shop.add("written", f"{family}/extract-experts", "`extract --targets experts`", write, base)


def _merged(shop: Workshop) -> None:
    base = shop.base("llama")
    adapters = shop.root / "adapters" / "llama"
    for name, what, adapter, options in (
        ("reversible", "`merge --reversible`", "extract", {"reversible": True}),
        ("sharded", "`merge --shard-size 200K`", "extract", {"shard_bytes": 200_000}),
        ("residual", "`merge` of an adapter with a residual", "extract-residual", {}),
        ("embeddings", "`merge` of an adapter of embeddings", "extract-embeddings", {}),
    ):
        if (adapters / adapter).exists():
            write = _merge(base, adapters / adapter, **options)
            shop.add("written", f"llama/merge-{name}", what, write)
    tied = shop.root / "adapters" / "qwen3"
    for name, adapter in (("embeddings", "extract-embeddings"), ("head", "peft-head")):
        if (tied / adapter).exists():
            what = f"`merge` of an adapter of the {name}, tied before"
            shop.add("written", f"qwen3/merge-{name}", what, _merge(shop.base("qwen3"), tied / adapter))
    if (adapters / "extract").exists():
        undone = lambda out: _merge_and_subtract(base, adapters / "extract", out)  # noqa: E731
        shop.add("written", "llama/subtract", "`subtract`", undone)
        float32 = _merge(shop.base32("llama"), adapters / "extract")
        shop.add("written", "llama/merge-float32", "`merge` into float32", float32)


def _merge(base: Path, adapter: Path, **options: Any) -> Callable[[Path], object]:
    return lambda out: surgery.merge(base, adapter, output=out, **options)


def _merge_and_subtract(base: Path, adapter: Path, out: Path) -> None:
    between = out.with_name(out.name + "-merged")
    surgery.merge(base, adapter, output=between, reversible=True, overwrite=True)
    surgery.subtract(between, output=out)
    shutil.rmtree(between)


def train(family: str, folder: Path, seed: int = 3, **settings: Any) -> None:
    """An adapter as PEFT writes it, with factors that make a difference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = models.make(family)
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, "target_modules": _LINEAR, **settings})
        wrapped = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
                elif "lora_" in name and parameter.dim() > 1:
                    parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
                elif any(word in name for word in ("modules_to_save", "trainable_tokens", "lora_")) or (
                    config.bias != "none" and name.endswith("bias")
                ):
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        wrapped.save_pretrained(folder)


# Name: (how it came to be, settings of LoraConfig).
_LORA: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("rank 8, alpha 16", {}),
    "rslora": ("`use_rslora`", {"use_rslora": True}),
    "rank-pattern": (
        "`rank_pattern`, one alpha",
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 4}},
    ),
    "alpha-pattern": ("`alpha_pattern`", {"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64, "mlp.up_proj": 2}}),
    "patterns": (
        "`rank_pattern` and `alpha_pattern`",
        {"rank_pattern": {"q_proj": 2, "up_proj": 4}, "alpha_pattern": {"q_proj": 2, "up_proj": 32}},
    ),
    "dora": ("`use_dora`", {"use_dora": True}),
    "lora-bias": ("`lora_bias`", {"lora_bias": True}),
    "saved-head": ("`modules_to_save=['lm_head']`", {"modules_to_save": ["lm_head"]}),
    "saved-embeddings": ("`modules_to_save=['embed_tokens']`", {"modules_to_save": ["embed_tokens"]}),
    "saved-norms": ("`modules_to_save=['norm', ...]`", {"modules_to_save": ["input_layernorm", "norm"]}),
    "embeddings": ("`embed_tokens` targeted", {"target_modules": [*_LINEAR, "embed_tokens"]}),
    "head": ("`lm_head` targeted", {"target_modules": [*_LINEAR, "lm_head"]}),
    "regex": ("`target_modules` a pattern", {"target_modules": r".*layers\.1\.(self_attn|mlp)\.[a-z]+_proj"}),
    "layers": ("`layers_to_transform=[1]`", {"layers_to_transform": [1]}),
    "trainable-tokens": ("`trainable_token_indices`", {"trainable_token_indices": {"embed_tokens": [5, 6, 40]}}),
    "layer-replication": ("`layer_replication`", {"layer_replication": [[0, 2], [0, 2]]}),
    "activated": ("aLoRA, `alora_invocation_tokens`", {"alora_invocation_tokens": [5, 6]}),
    "rank-600": ("rank 600", {"r": 600, "target_modules": _QV}),
    "rank-12": ("rank 12", {"r": 12}),
}


def _trained(shop: Workshop) -> None:
    base = shop.base("llama")
    for name, (what, settings) in _LORA.items():
        shop.add("trained", f"llama/peft-{name}", f"PEFT: {what}", lambda out, s=settings: train("llama", out, **s), base)
    base = shop.base("qwen2")
    settings: dict[str, Any] = {"bias": "all", "target_modules": _QV}
    shop.add("trained", "qwen2/peft-bias", "PEFT: `bias='all'`", lambda out: train("qwen2", out, **settings), base)
    base = shop.base("qwen3")
    for name, module in (("embeddings", "embed_tokens"), ("head", "lm_head")):
        tied: dict[str, Any] = {"target_modules": [*_LINEAR, module]}
        what = f"PEFT: `{module}` targeted, tied embeddings"
        shop.add("trained", f"qwen3/peft-{name}", what, lambda out, t=tied: train("qwen3", out, **t), base)
    for family in ("mixtral", "qwen3_moe"):
        base = shop.base(family)
        fused: dict[str, Any] = {
            "target_modules": _QV,
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }
        what = "PEFT: `target_parameters`, fused experts"
        shop.add("trained", f"{family}/peft-fused", what, lambda out, f=family: train(f, out, **fused), base)
    base = shop.base("gpt2")
    what = "PEFT: Conv1D, `fan_in_fan_out`"
    conv: dict[str, Any] = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    shop.add("trained", "gpt2/peft-plain", what, lambda out: train("gpt2", out, **conv), base)


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
    "wrong-prefix": ("keys below `base_model.model.model.model.`", {"tensors": _renamed("model.layers", "model.model.layers")}),
    "adapter-name": ("keys with `.default`", {"tensors": _renamed(".weight", ".default.weight")}),
    "no-b": ("one B missing", {"tensors": _without("layers.1.mlp.up_proj.lora_B")}),
    "no-a": ("one A missing", {"tensors": _without("layers.1.mlp.up_proj.lora_A")}),
    "layer-missing": ("no factors for the last layer", {"tensors": _without("layers.1.")}),
    "unknown-target": (
        "factors of a module that the base lacks",
        {
            "tensors": lambda tensors: _renamed("self_attn.q_proj", "self_attn.query")(tensors),
            "config": {"target_modules": ["query", *_LINEAR[1:]]},
        },
    ),
    "unknown-tensor": ("a tensor that is no factor", {"tensors": _with("base_model.model.model.gate.alpha", 3)}),
    "targets-too-few": ("`target_modules` names fewer than there are factors", {"config": {"target_modules": _QV}}),
    "targets-all-linear": ("`target_modules: 'all-linear'`", {"config": {"target_modules": "all-linear"}}),
    "no-targets": ("no `target_modules`", {"drop": ["target_modules"]}),
    "no-alpha": ("no `lora_alpha`", {"drop": ["lora_alpha"]}),
    "no-rank": ("no `r`", {"drop": ["r"]}),
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


def _edited(shop: Workshop) -> None:
    """Adapters that somebody's script wrote."""
    base = shop.base("llama")
    plain = shop.root / "adapters" / "llama" / "peft-plain"
    if not plain.exists():
        train("llama", plain)
    for name, (what, arguments) in _EDITS.items():
        if name == "minimal":
            kept = {"peft_type", "r", "lora_alpha", "target_modules"}
            arguments = {"drop": set(json.loads((plain / CONFIG).read_text())) - kept}
        write = lambda out, a=arguments: edit(plain, out, **a)  # noqa: E731
        shop.add("refused", f"llama/{name}", what, write, base)
    shop.add("refused", "llama/pickled", "`adapter_model.bin`", lambda out: _pickled(plain, out), base)
    shop.add("refused", "llama/subfolder", "the adapter in a folder within", lambda out: _below(plain, out), base)
    shop.add("refused", "llama/no-config", "no `adapter_config.json`", lambda out: _nothing_but_weights(plain, out), base)
    shop.add("refused", "llama/other-base", "an adapter of a wider model", _of_wider_model, base)
    shop.add("refused", "mixtral/per-expert", "per-expert factors, PEFT before 0.18", _per_expert, shop.base("mixtral"))
    write = lambda out: _per_expert(out, "qwen3_moe")  # noqa: E731
    shop.add("refused", "qwen3_moe/per-expert", "per-expert factors, PEFT before 0.18", write, shop.base("qwen3_moe"))


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
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(names), "task_type": "CAUSAL_LM"}
    (out / CONFIG).write_text(json.dumps(settings))


def _damaged_checkpoints(shop: Workshop) -> None:
    """Checkpoints in which something is unusual."""

    def changed(family: str, tensors: Callable[[Tensors], Tensors] | None = None, **config: Any) -> Callable[[Path], object]:
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
        ("llama/checkpoint-biases", "biases that the config denies", changed("llama", _with("model.layers.0.mlp.up_proj.bias", 256))),
        ("llama/checkpoint-no-tokenizer", "no tokenizer", _without_tokenizer(shop.base("llama"))),
        ("qwen3_moe/checkpoint-some-dense", "some layers dense", _some_dense),
    ):
        shop.add("refused", name, what, write)
    for family in ("llama", "mixtral", "qwen3_moe", "gemma2"):
        write = lambda out, f=family: _older_config(shop.base(f), out)  # noqa: E731
        shop.add("trained", f"{family}/saved-older", "the same with a config of transformers 4", write)


def _without_tokenizer(base: Path) -> Callable[[Path], object]:
    return lambda out: shutil.copytree(base, out, ignore=shutil.ignore_patterns("tokenizer*"))


def _some_dense(out: Path) -> None:
    models.save(models.make("qwen3_moe", mlp_only_layers=[0]), out)


def _older_config(base: Path, out: Path) -> None:
    """`rope_theta`, `num_experts` and `torch_dtype` beside the newer spellings."""
    shutil.copytree(base, out)
    config = json.loads((out / "config.json").read_text())
    rope = config.get("rope_parameters", {})
    config |= {"rope_theta": rope.get("rope_theta", 10000.0), "torch_dtype": config.get("dtype", "bfloat16")}
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    (out / "config.json").write_text(json.dumps(config))
