"""Every rule of lint with something bad that it is about, and with something good that it lets pass.

Whether the consumers do what the rules say is proved elsewhere, by running them.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import surgery
from surgery.errors import OptionError
from surgery.ops import lint_adapters, lint_checkpoints, lint_mixtures, lint_mlx, lint_servers
from surgery.ops.lint import CLEAN, CONSUMERS, REFUSED, SILENT, WARNING, Rule
from tests.models import is_linear, logits, make, perturb, save
from tests.peft_tools import stored, write_adapter
from tests.surgery.test_merge import adapter_folder
from tests.tools import read_json, run_cli

ADAPTER_RULES = [*lint_adapters.rule.all, *lint_servers.rule.all, *lint_mlx.rule.all]
CHECKPOINT_RULES = [*lint_checkpoints.rule.all, *lint_mixtures.rule.all]
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


# Bad adapters: name of the case to what makes it ----------------------------------------------------------------------


def by_hand(tmp_path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A sound adapter of rank 2 on the first q_proj, with other tensors or settings."""
    own = {f"{PREFIX}{Q}.lora_{w}.weight": torch.ones(s) for w, s in (("A", (2, 32)), ("B", (32, 2)))}
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    settings = {name: value for name, value in settings.items() if value is not ...}
    return adapter_folder(tmp_path / "adapter", own if tensors is None else tensors, **settings)


def with_peft(family: str = "llama", **config: Any) -> Callable[[Path], Path]:
    """An adapter that PEFT itself writes."""
    settings = {"r": 2, "target_modules": ["q_proj"], **config}
    return lambda tmp_path: write_adapter(make(family), LoraConfig(**settings), tmp_path / "adapter")


def hand(**config: Any) -> Callable[[Path], Path]:
    return lambda tmp_path: by_hand(tmp_path, **config)


def renamed(old: str, new: str) -> Callable[[Path], Path]:
    """A sound adapter with other keys."""

    def made(tmp_path: Path) -> Path:
        folder = by_hand(tmp_path)
        tensors = {key.replace(old, new): tensor for key, tensor in stored(folder).items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return made


def without(ending: str) -> Callable[[Path], Path]:
    def made(tmp_path: Path) -> Path:
        folder = by_hand(tmp_path)
        tensors = {key: tensor for key, tensor in stored(folder).items() if not key.endswith(ending)}
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return made


def converted(to: str, **options: Any) -> Callable[[Path], Path]:
    def made(tmp_path: Path) -> Path:
        surgery.convert(by_hand(tmp_path), to=to, output=tmp_path / to, **options)
        return tmp_path / to

    return made


def damaged_mlx(**parameters: Any) -> Callable[[Path], Path]:
    """An mlx-lm adapter with other lora_parameters; a value of ... takes one out."""

    def made(tmp_path: Path) -> Path:
        folder = converted("mlx")(tmp_path)
        config = read_json(folder / "adapter_config.json")
        config["lora_parameters"] |= parameters
        config["lora_parameters"] = {k: v for k, v in config["lora_parameters"].items() if v is not ...}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return made


def strange_mlx(tmp_path: Path) -> Path:
    folder = converted("mlx")(tmp_path)
    tensors = load_file(folder / "adapters.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(3)}, folder / "adapters.safetensors")
    return folder


def tied_in_mlx(tmp_path: Path) -> Path:
    """Factors on an embedding, as mlx-lm has them."""
    return in_mlx(tmp_path, "model.embed_tokens")


def router_in_mlx(tmp_path: Path) -> Path:
    return in_mlx(tmp_path, "model.layers.1.mlp.gate")


def in_mlx(tmp_path: Path, key: str) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({f"{key}.lora_a": torch.ones(96, 2), f"{key}.lora_b": torch.ones(2, 32)}, folder / "adapters.safetensors")
    config = {"num_layers": 2, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def wider() -> dict[str, torch.Tensor]:
    """Factors for a model of another width."""
    return {f"{PREFIX}{Q}.lora_{w}.weight": torch.ones(s) for w, s in (("A", (2, 64)), ("B", (64, 2)))}


def ia3(tmp_path: Path) -> Path:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(make("llama"), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def experts(skip: str = "", rank: int = 2, family: str = "mixtral", router: int = 0) -> Callable[[Path], Path]:
    """A version-4 adapter on experts; `skip` leaves out modules, `router` is the rank of routers."""

    def made(tmp_path: Path) -> Path:
        base = save(make(family), tmp_path / "mixture")
        tensors = {}
        for name, weight in stored(base).items():
            module = name.removesuffix(".weight")
            if ".experts." in name and not (skip and module.endswith(skip)):
                tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(rank, weight.shape[1])
                tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(weight.shape[0], rank)
            if router and module.endswith(".gate"):
                tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(router, weight.shape[1])
                tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(weight.shape[0], router)
        targets = ["w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate"]
        return adapter_folder(tmp_path / "adapter", tensors, r=2, lora_alpha=4, target_modules=targets)

    return made


def added_tokens(tmp_path: Path) -> Path:
    folder = by_hand(tmp_path)
    (folder / "added_tokens.json").write_text('{"<new>": 96}')
    return folder


def two_layers(ranks: tuple[int, int]) -> Callable[[Path], Path]:
    """q_proj in both layers, of the ranks given; a rank of 0 leaves a layer out."""

    def made(tmp_path: Path) -> Path:
        tensors = {}
        for layer, rank in enumerate(ranks):
            if rank:
                stem = f"{PREFIX}model.layers.{layer}.self_attn.q_proj"
                tensors[f"{stem}.lora_A.weight"] = torch.ones(rank, 32)
                tensors[f"{stem}.lora_B.weight"] = torch.ones(32, rank)
        pattern = {f"layers.{n}.self_attn.q_proj": rank for n, rank in enumerate(ranks) if rank}
        return adapter_folder(
            tmp_path / "adapter", tensors, r=max(ranks), lora_alpha=4, target_modules=["q_proj"], rank_pattern=pattern
        )

    return made


BAD: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "kohya": (
        converted("kohya", component="unet"),
        {f"{consumer}/format" for consumer in CONSUMERS},
    ),
    "mlx": (converted("mlx"), {"peft/format", "vllm/format", "llama.cpp/format", "sglang/format", "lorax/format"}),
    "rank": (hand(r=4, rank_pattern={}), {"peft/rank", "vllm/rank-pattern", "llama.cpp/rank"}),
    "prefix": (renamed(PREFIX, ""), {"peft/prefix", "lorax/prefix"}),
    "default": (renamed(".weight", ".default.weight"), {"vllm/keys", "llama.cpp/keys"}),
    "no A": (without("lora_A.weight"), {"peft/pairs", "vllm/pairs", "llama.cpp/pairs"}),
    "no B": (without("lora_B.weight"), {"peft/pairs", "vllm/pairs", "llama.cpp/pairs"}),
    "other targets": (hand(target_modules=["k_proj"]), {"peft/targets", "vllm/targets", "llama.cpp/targets"}),
    "other modules": (
        renamed("layers.0", "layers.7"),
        {"peft/modules", "vllm/modules", "llama.cpp/modules"},
    ),
    "half": (experts("w3"), {"peft/half-experts", "llama.cpp/some-experts"}),
    "ranks of experts": (experts(rank=4), {"peft/expert-ranks", "peft/rank", "vllm/rank-pattern"}),
    "rank of the router": (experts(router=1), {"peft/router-rank"}),
    "one by one": (experts(family="qwen2_moe"), {"peft/one-by-one"}),
    "one by one in vllm": (experts(family="qwen2_moe"), {"vllm/one-by-one"}),
    "some experts": (experts("experts.2.w1"), {"llama.cpp/some-experts"}),
    "dropout": (
        with_peft("mixtral", target_modules=[], target_parameters=FUSED),
        {"vllm/fused-experts", "llama.cpp/fused-experts", "lorax/keys"},
    ),
    "nothing": (hand(r=..., lora_alpha=..., target_modules=...), {"vllm/config", "llama.cpp/alpha", "sglang/config"}),
    "head": (
        with_peft(modules_to_save=["lm_head"]),
        {"vllm/modules-to-save", "vllm/keys", "llama.cpp/keys", "lorax/keys"},
    ),
    "norms": (with_peft(modules_to_save=["input_layernorm"]), {"vllm/modules-to-save", "llama.cpp/norms"}),
    "dora": (with_peft(use_dora=True), {"vllm/dora", "sglang/dora", "lorax/dora", "vllm/keys", "llama.cpp/keys"}),
    "lora bias": (
        lambda tmp_path: write_adapter(
            make("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), tmp_path / "adapter"
        ),
        {"vllm/lora-bias", "lorax/lora-bias", "llama.cpp/keys"},
    ),
    "bias": (hand(bias="all"), {"vllm/bias"}),
    "pissa": (hand(init_lora_weights="pissa_niter_4"), {"vllm/init", "llama.cpp/init", "lorax/init"}),
    "alora": (hand(alora_invocation_tokens=[1, 2]), {"vllm/forward", "llama.cpp/forward"}),
    "rank 32": (hand(r=32, rank_pattern={"q_proj": 2}), {"vllm/max-lora-rank"}),
    "rank 600": (hand(r=600, rank_pattern={"q_proj": 2}), {"vllm/rank"}),
    "rslora": (with_peft(use_rslora=True), {"llama.cpp/rslora"}),
    "alphas": (hand(alpha_pattern={"q_proj": 7}), {"llama.cpp/alpha-pattern", "lorax/alpha-pattern"}),
    "gpt2": (with_peft("gpt2", target_modules=["c_attn"], fan_in_fan_out=True), {"llama.cpp/conv1d", "vllm/gpt2"}),
    "tied": (with_peft("llama-tied", target_modules=["lm_head"]), {"llama.cpp/tied-head"}),
    "tied embeddings": (with_peft("llama-tied", target_modules=["embed_tokens"]), {"llama.cpp/tied-embeddings"}),
    "tied embeddings in mlx": (tied_in_mlx, {"mlx/tied-embeddings"}),
    "ia3": (ia3, {"vllm/kind", "llama.cpp/kind", "sglang/kind", "lorax/kind"}),
    "lora by another name": (hand(peft_type="IA3"), {"peft/kind", "vllm/kind", "llama.cpp/kind"}),
    "replicated": (hand(layer_replication=[[0, 2]]), {"vllm/forward", "llama.cpp/layer-replication"}),
    "another width": (
        lambda tmp_path: by_hand(tmp_path, wider()),
        {"peft/shapes", "vllm/shapes", "llama.cpp/shapes"},
    ),
    "no targets": (hand(target_modules=...), {"peft/targets", "llama.cpp/targets", "vllm/config"}),
    "a pattern": (hand(target_modules=r".*\.k_proj"), {"peft/targets", "vllm/targets", "llama.cpp/targets"}),
    "no scale": (damaged_mlx(scale=...), {"mlx/parameters"}),
    "another rank": (damaged_mlx(rank=4), {"mlx/rank"}),
    "strange": (strange_mlx, {"mlx/keys"}),
    "router in mlx": (router_in_mlx, {"mlx/router"}),
    "added tokens": (added_tokens, {"sglang/added-tokens"}),
    "ranks": (two_layers((2, 4)), {"lorax/ranks"}),
    "layers": (two_layers((0, 2)), {"lorax/missing-layers"}),
    "parameters": (
        lambda tmp_path: edited(with_peft("mixtral", target_modules=[], target_parameters=FUSED)(tmp_path)),
        {"peft/parameters"},
    ),
}
BASES = {
    "one by one": "qwen2_moe",
    "one by one in vllm": "qwen2_moe",
    "router in mlx": "llama",
    "other modules": "llama",
    "another width": "llama",
    "tied": "llama-tied",
    "tied embeddings": "llama-tied",
    "tied embeddings in mlx": "llama-tied",
}
# Where the base stands for one of another family.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "router in mlx": {"model_type": "glm4_moe"},
    "one by one in vllm": {"model_type": "flex_olmo", "architectures": ["FlexOlmoForCausalLM"]},
}


def edited(folder: Path) -> Path:
    """The same folder, with a dropout in its config."""
    config = read_json(folder / "adapter_config.json") | {"lora_dropout": 0.1}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", BAD)
def test_rules_on_adapters_fire(case: str, tmp_path: Path) -> None:
    """Each on the fault that it is about, with a sentence, a source, and a command where one would help."""
    make_it, expected = BAD[case]
    folder = make_it(tmp_path)
    base = save(make(BASES[case]), tmp_path / "base") if case in BASES else None
    if base is not None and case in MODEL_TYPES:
        config = read_json(base / "config.json") | MODEL_TYPES[case]
        (base / "config.json").write_text(json.dumps(config))
    report = surgery.lint(folder, consumers=CONSUMERS, base=base)
    fired = {finding.rule for finding in report.findings}
    assert expected <= fired
    assert not report.passed
    for finding in report.findings:
        assert len(finding.message) > 20
        assert finding.source
        assert "{path}" not in finding.mend
        assert report.verdicts[finding.consumer] != CLEAN


def test_every_rule_on_adapters_has_a_case() -> None:
    covered = {rule for _, expected in BAD.values() for rule in expected}
    assert {rule.id for rule in ADAPTER_RULES} == covered
    assert len({rule.id for rule in ADAPTER_RULES}) == len(ADAPTER_RULES)


@pytest.mark.parametrize(
    "case", ["by hand", "peft", "attention", "all-linear", "embeddings", "pattern", "mixed", "extract"]
)
def test_good_adapters_are_clean(case: str, tmp_path: Path) -> None:
    """For every consumer that reads PEFT folders; for mlx-lm once it is converted."""
    base = save(make("llama"), tmp_path / "base")
    clean: tuple[str, ...] = ("peft", "vllm", "llama.cpp", "sglang", "lorax")
    if case == "by hand":
        folder, clean = by_hand(tmp_path), clean[:4]  # one layer only is no good for LoRAX
    elif case == "extract":
        tuned = save(perturb(make("llama"), rank=3, where=is_linear), tmp_path / "tuned")
        surgery.extract(base, tuned, output=tmp_path / "adapter", energy=0.8)
        folder, clean = tmp_path / "adapter", clean[:4]  # nor are mixed ranks
    else:
        configs: dict[str, dict[str, Any]] = {
            "peft": {},
            "attention": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7},
            "all-linear": {"target_modules": "all-linear", "r": 16},
            "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
            "pattern": {"target_modules": r".*\.(q|k)_proj"},
            "mixed": {"r": 4, "rank_pattern": {"k_proj": 2}, "target_modules": ["q_proj", "k_proj"]},
        }
        folder = with_peft(**configs[case])(tmp_path)
        clean = clean[:4] if case in ("embeddings", "mixed") else clean
    report = surgery.lint(folder, consumers=clean, base=base)
    assert set(report.verdicts.values()) == {CLEAN}, report.findings
    assert report.passed
    surgery.convert(folder, to="mlx", base=base, output=tmp_path / "mlx")
    assert surgery.lint(tmp_path / "mlx", consumers="mlx").verdicts == {"mlx": CLEAN}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "t5"])
def test_what_extract_writes_is_clean_for_the_default_consumers(family: str, tmp_path: Path) -> None:
    model = make(family)
    base, tuned = save(model, tmp_path / "base"), save(perturb(model, where=is_linear), tmp_path / "tuned")
    surgery.extract(base, tuned, output=tmp_path / "adapter", rank=2)
    report = surgery.lint(tmp_path / "adapter", base=base)
    vllm = REFUSED if family == "t5" else CLEAN  # which has no encoder-decoders
    assert report.verdicts == {"peft": CLEAN, "vllm": vllm, "llama.cpp": CLEAN}, report.findings


def test_the_remedies_for_experts_and_scales_work(tmp_path: Path) -> None:
    """What lint says to run gives an adapter that it has nothing to say about."""
    model = make("mixtral")
    base = save(model, tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj"], target_parameters=FUSED)
    folder = write_adapter(model, config, tmp_path / "adapter")
    report = surgery.lint(folder, base=base)
    assert {(f.rule, f.severity) for f in report.findings} == {
        ("vllm/fused-experts", REFUSED),
        ("llama.cpp/fused-experts", REFUSED),
        ("llama.cpp/rslora", SILENT),
    }
    mends = {finding.mend for finding in report.findings}
    assert f"surgery convert {folder} --to peft --experts per-expert --base BASE -o OUT" in mends
    surgery.convert(folder, to="peft", experts="per-expert", portable=True, base=base, output=tmp_path / "mended")
    assert surgery.lint(tmp_path / "mended", base=base).passed
    torch.testing.assert_close(of_peft(folder), of_peft(tmp_path / "mended"), atol=1e-5, rtol=1e-5)


def of_peft(folder: Path) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(make("mixtral"), folder))


def test_what_the_rules_say_of_peft_is_what_peft_does(tmp_path: Path) -> None:
    """Without the prefix, or beside its targets, PEFT leaves factors out: the model is the base. Other ranks fail."""
    base = logits(make("llama"))
    cases = {"prefix": renamed(PREFIX, ""), "targets": hand(target_modules=["k_proj"]), "sound": hand()}
    for name, made in cases.items():
        folder = made(tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = logits(PeftModel.from_pretrained(make("llama"), folder))
        assert torch.equal(found, base) == (name != "sound"), name
        assert surgery.lint(folder, consumers="peft").passed == (name == "sound")
    folder = BAD["rank"][0](tmp_path / "rank")
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(make("llama"), folder)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint(family: str = "llama", tensors: dict[str, Any] | None = None, **config: Any) -> Callable[[Path], Path]:
    """A checkpoint with a tokenizer, with other tensors (None takes one out) or settings (... takes one out)."""

    def made(tmp_path: Path) -> Path:
        folder = save(make(family), tmp_path / "model", torch.bfloat16)
        (folder / "tokenizer.json").write_text("{}")
        found = {**stored(folder), **(tensors or {})}
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, folder / "model.safetensors")
        changed = {**read_json(folder / "config.json"), **config}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
        return folder

    return made


def without_file(name: str) -> Callable[[Path], Path]:
    def made(tmp_path: Path) -> Path:
        folder = checkpoint()(tmp_path)
        (folder / name).unlink()
        return folder

    return made


def other_name(tmp_path: Path) -> Path:
    folder = checkpoint()(tmp_path)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    return folder


ERNIE: dict[str, Any] = {"moe_intermediate_size": 16, "intermediate_size": 64, "num_key_value_heads": 2}


def router_bias(value: float) -> dict[str, torch.Tensor]:
    return {"model.layers.1.mlp.moe_statics.e_score_correction_bias": torch.full((1, 4), value)}


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "no config": (checkpoint(model_type=...), {f"{consumer}/config" for consumer in CONSUMERS}),
    "no class": (checkpoint(architectures=...), {"vllm/architectures", "llama.cpp/architectures"}),
    "contraption": (checkpoint(architectures=["ContraptionForThinking"]), {"llama.cpp/architecture"}),
    "bert": (checkpoint("bert"), {"mlx/model-type"}),
    "qwen3_moe": (checkpoint("qwen3_moe"), {"mlx/config-fields"}),
    "top-k": (checkpoint("qwen3_moe", norm_topk_prob=False), {"llama.cpp/top-k"}),
    "top-k of qwen2": (checkpoint("qwen2_moe", norm_topk_prob=True), {"llama.cpp/top-k", "mlx/top-k"}),
    "top-k of olmoe": (
        checkpoint("qwen2_moe", model_type="olmoe", norm_topk_prob=True),
        {"llama.cpp/top-k", "vllm/top-k"},
    ),
    "shared experts": (
        checkpoint(model_type="ernie4_5_moe", moe_num_shared_experts=1, **ERNIE),
        {"llama.cpp/shared-experts"},
    ),
    "shared gate": (
        checkpoint("qwen2_moe", {"model.layers.1.mlp.shared_expert_gate.weight": torch.zeros(1, 32)}),
        {"llama.cpp/shared-gate"},
    ),
    "router bias": (
        checkpoint(tensors=router_bias(0.5), model_type="ernie4_5_moe"),
        {"mlx/router-bias"},
    ),
    "hunyuan": (
        checkpoint(model_type="hunyuan_v1_moe", moe_topk=2),
        {"llama.cpp/config-fields", "llama.cpp/own-tokenizer"},
    ),
    "glm": (checkpoint(model_type="glm4_moe"), {"llama.cpp/own-tokenizer"}),
    "gpt2": (checkpoint("gpt2"), {"llama.cpp/n-ctx"}),
    "own code": (
        checkpoint(model_type="upcycled_llama", auto_map={"AutoConfig": "a.B"}),
        {"peft/own-code", "vllm/own-code"},
    ),
    "encoder-decoder": (
        checkpoint("t5", architectures=["SwitchTransformersForConditionalGeneration"]),
        {"vllm/encoder-decoder"},
    ),
    "head": (checkpoint(architectures=["LlamaForSequenceClassification"]), {"mlx/head"}),
    "float64": (checkpoint(tensors={"model.norm.weight": torch.ones(32, dtype=torch.float64)}), {"mlx/dtypes"}),
    "theta": (
        checkpoint("mixtral", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        {"mlx/rope-theta"},
    ),
    "vocabulary": (
        checkpoint(vocab_size=100),
        {"peft/vocabulary", "vllm/vocabulary", "llama.cpp/vocabulary", "mlx/vocabulary"},
    ),
    "tied": (checkpoint(tie_word_embeddings=True), {"vllm/tied-head", "mlx/tied-head"}),
    "float32": (checkpoint(dtype="float32"), {"vllm/float32"}),
    "weights": (other_name, {"mlx/weights"}),
    "tokenizer": (without_file("tokenizer.json"), {"vllm/tokenizer", "llama.cpp/tokenizer", "mlx/tokenizer"}),
    "experts": (
        checkpoint("mixtral", {EXPERT.replace("w2", w): None for w in ("w1", "w2", "w3")}),
        {"peft/experts", "vllm/experts", "llama.cpp/experts", "mlx/experts"},
    ),
    "mixed layers": (
        checkpoint("qwen2_moe", {"model.layers.7.mlp.down_proj.weight": torch.ones(2, 2)}),
        {"llama.cpp/mixed-layers", "mlx/mixed-layers"},
    ),
    "fused": (
        checkpoint("mixtral", {"model.layers.0.block_sparse_moe.experts.gate_up_proj": torch.ones(4, 2, 2)}),
        {"mlx/fused-experts", "llama.cpp/fused-experts"},
    ),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_rules_on_checkpoints_fire(case: str, tmp_path: Path) -> None:
    make_it, expected = BAD_CHECKPOINTS[case]
    report = surgery.lint(make_it(tmp_path), consumers=CONSUMERS)
    assert report.subject == "checkpoint"
    assert expected <= {finding.rule for finding in report.findings}
    assert report.passed == all(finding.severity == WARNING for finding in report.findings)


def test_every_rule_on_checkpoints_has_a_case() -> None:
    covered = {rule for _, expected in BAD_CHECKPOINTS.values() for rule in expected}
    assert {rule.id for rule in CHECKPOINT_RULES} == covered
    assert len({rule.id for rule in CHECKPOINT_RULES}) == len(CHECKPOINT_RULES)
    rules: list[Rule[Any]] = [*CHECKPOINT_RULES, *ADAPTER_RULES]
    assert {rule.severity for rule in rules} == {REFUSED, SILENT, WARNING}
    assert all(rule.consumer in CONSUMERS and rule.source for rule in rules)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("qwen2", {}),
        ("mixtral", {"rope_theta": 1e6}),
        ("qwen3_moe", {"num_experts": 4, "rope_theta": 1e4, "norm_topk_prob": True}),
    ],
)
def test_good_checkpoints_are_clean(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """As transformers saves them in bfloat16, with a tokenizer, and the settings that mlx-lm looks for."""
    folder = checkpoint(family, **config)(tmp_path)
    if family == "qwen2":
        nested = read_json(folder / "config.json")["rope_parameters"] | {"rope_theta": 1e6}
        folder = checkpoint(family, rope_parameters=nested)(tmp_path / "again")
    report = surgery.lint(folder, consumers=CONSUMERS)
    assert set(report.verdicts.values()) == {CLEAN}, report.findings


@pytest.mark.parametrize(
    ("model_type", "config", "tensors", "rules"),
    [
        ("qwen2_moe", {"norm_topk_prob": False}, {}, {"llama.cpp/top-k", "mlx/top-k"}),
        (
            "qwen2_moe",
            {},
            {"model.layers.1.mlp.shared_expert_gate.weight": torch.ones(1, 32)},
            {"llama.cpp/shared-gate"},
        ),
        ("qwen2_moe", {"norm_topk_prob": True, "num_experts": 2, "num_experts_per_tok": 2}, {}, {"llama.cpp/top-k"}),
        ("qwen3_moe", {"norm_topk_prob": True}, {}, {"llama.cpp/top-k"}),
        ("ernie4_5_moe", {}, router_bias(0.0), {"mlx/router-bias"}),
        ("glm4_moe", {"norm_topk_prob": True}, router_bias(0.5), {"mlx/router-bias"}),
        ("ernie4_5_moe", ERNIE | {"moe_num_shared_experts": 2}, {}, {"llama.cpp/shared-experts"}),
        ("ernie4_5_moe", ERNIE | {"moe_num_shared_experts": 0}, {}, {"llama.cpp/shared-experts"}),
        (
            "hunyuan_v1_moe",
            {"moe_topk": [2, 2], "moe_intermediate_size": [64, 64], "num_shared_expert": [1, 1]},
            {},
            {"llama.cpp/config-fields"},
        ),
    ],
)
def test_rules_on_mixtures_stay_silent_where_nothing_is_wrong(
    model_type: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], rules: set[str], tmp_path: Path
) -> None:
    folder = checkpoint(tensors=tensors, model_type=model_type, **config)(tmp_path)
    assert not rules & {finding.rule for finding in surgery.lint(folder, consumers=CONSUMERS).findings}


def test_the_tokenizers_that_converters_ask_for_pass(tmp_path: Path) -> None:
    folder = checkpoint(model_type="glm4_moe")(tmp_path)
    tokens = ["[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>"]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in tokens]}))
    assert "llama.cpp/own-tokenizer" not in {finding.rule for finding in surgery.lint(folder).findings}
    folder = checkpoint(model_type="hunyuan_v1_moe")(tmp_path / "other")
    (folder / "tokenization_hy.py").write_text("")
    assert "llama.cpp/own-tokenizer" not in {finding.rule for finding in surgery.lint(folder).findings}
    folder = checkpoint("qwen2_moe")(tmp_path / "third")
    assert "llama.cpp/own-tokenizer" not in {finding.rule for finding in surgery.lint(folder).findings}
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "llama.cpp/own-tokenizer" in {finding.rule for finding in surgery.lint(folder).findings}


def test_what_spoils_the_base_spoils_the_adapter(tmp_path: Path) -> None:
    """For each consumer that has something against the base, in its own words; but no adapter needs a tokenizer."""
    base = checkpoint("qwen3_moe", norm_topk_prob=False)(tmp_path)
    (base / "tokenizer.json").unlink()
    folder = write_adapter(make("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    assert surgery.lint(folder, consumers=["vllm", "llama.cpp"]).passed
    report = surgery.lint(folder, consumers=["vllm", "llama.cpp"], base=base)
    assert report.verdicts == {"vllm": CLEAN, "llama.cpp": SILENT}
    (finding,) = report.findings
    assert finding.rule == "llama.cpp/top-k"
    assert finding.message.startswith(f"its base, {base}: norm_topk_prob is false")
    (base / "config.json").unlink()
    assert surgery.lint(folder, consumers=["vllm", "llama.cpp"], base=base / "model.safetensors").passed


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    """Exit status 1 where a consumer named in --for would refuse it or get it wrong, and only then."""
    folder = BAD["rslora"][0](tmp_path)
    run = run_cli("lint", folder, "--for", "peft,vllm")
    assert run.returncode == 0, run.stderr
    assert re.search(r"peft +clean *\nvllm +clean", run.stdout)
    run = run_cli("lint", folder)
    assert run.returncode == 1
    assert re.search(r"llama.cpp +silently wrong", run.stdout)
    assert "llama.cpp/rslora (silently wrong): use_rslora is set" in run.stdout
    assert f"mend    surgery convert {folder} --to peft --portable -o OUT" in run.stdout
    run = run_cli("lint", folder, "--for", "llama.cpp", "--json")
    assert run.returncode == 1
    report = json.loads(run.stdout)
    assert (report["verdicts"], report["passed"]) == ({"llama.cpp": "silently wrong"}, False)
    assert report["findings"][0]["rule"] == "llama.cpp/rslora"
    run = run_cli("lint", folder, "--for", "ollama")
    assert run.returncode == 2
    assert "--for is 'ollama', expected some of peft, vllm, llama.cpp, mlx, sglang, lorax." in run.stderr
    with pytest.raises(OptionError, match="--for is empty"):
        surgery.lint(folder, consumers="")
