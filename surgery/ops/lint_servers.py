"""Rules on adapters that servers have: vLLM, SGLang, LoRAX. Sources are in `lint_subject`."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.names import layer_of
from surgery.ops.lint import REFUSED, SILENT, Rules, some
from surgery.ops.lint_subject import CHANGED_BASE, GGUF, HELPER, MERGE, PER_EXPERT, TO_PEFT, AdapterFiles
from surgery.ops.lint_tables import VLLM_3D_EXPERTS, VLLM_BY_TRANSFORMERS, VLLM_DEFAULT_MAX_RANK, VLLM_RANKS

rule: Rules[AdapterFiles] = Rules()


# vLLM -----------------------------------------------------------------------------------------------------------------


@rule("vllm/config", REFUSED, f"{HELPER}: from_dict", TO_PEFT)
def _required_settings(adapter: AdapterFiles) -> Iterator[str]:
    missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in adapter.config]
    if adapter.is_peft and missing:
        yield f"adapter_config.json has no {some(missing)}"


@rule("vllm/modules-to-save", REFUSED, f"{HELPER}: _validate_features", MERGE)
def _saved_heads(adapter: AdapterFiles) -> Iterator[str]:
    value = adapter.config.get("modules_to_save")
    extra = [name for name in value if name not in ("classifier", "score")] if isinstance(value, list) else []
    if extra:
        yield f"modules_to_save has {some(extra)}, expected nothing, or classifier and score"


@rule("vllm/dora", REFUSED, f"{HELPER}: _validate_features", MERGE)
@rule("sglang/dora", REFUSED, "SGLang main 2026-08, srt/lora/lora_manager.py: validate_new_adapter", MERGE)
@rule("lorax/dora", SILENT, "LoRAX main 2025, adapters/lora.py: only lora_A and lora_B are looked up", MERGE)
def _dora(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.config.get("use_dora") or any("lora_magnitude_vector" in key for key in adapter.files.tensors):
        yield "this is a DoRA (use_dora), whose weights are rescaled after B A is added"


@rule("vllm/lora-bias", REFUSED, f"{HELPER}: _validate_features", MERGE)
@rule("lorax/lora-bias", SILENT, "LoRAX main 2025, adapters/lora.py: only lora_A and lora_B are looked up", MERGE)
def _lora_bias(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.config.get("lora_bias") or any(key.endswith("lora_B.bias") for key in adapter.files.tensors):
        yield "lora_B has biases (lora_bias)"


@rule("vllm/bias", REFUSED, f"{HELPER}: validate_legal", MERGE)
def _bias(adapter: AdapterFiles) -> Iterator[str]:
    if (value := adapter.config.get("bias", "none")) != "none":
        yield f"bias is {value!r}, expected 'none'"


@rule("vllm/init", REFUSED, f"{HELPER}: _init_is_supported")
def _init_of_vllm(adapter: AdapterFiles) -> Iterator[str]:
    init = adapter.config.get("init_lora_weights")
    known = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
    if isinstance(init, str) and init.lower() not in known:
        yield f"init_lora_weights is {init!r}, expected true, false, or one of {', '.join(known)}"


@rule("llama.cpp/init", SILENT, f"{GGUF}: init_lora_weights is not read")
@rule("lorax/init", SILENT, "LoRAX main 2025, adapters/lora.py: init_lora_weights is not read")
def _changed_base(adapter: AdapterFiles) -> Iterator[str]:
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGED_BASE):
        yield (
            f"init_lora_weights is {init!r}, which changed the base when training began; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )


_OTHER_FORWARD = {
    "alora_invocation_tokens": "an activated LoRA",
    "layer_replication": "trained on replicated layers",
    "use_bdlora": "a block-diagonal LoRA",
    "use_qalora": "a QA-LoRA",
}


@rule("vllm/forward", REFUSED, f"{HELPER}: _validate_features")
def other_forward(adapter: AdapterFiles) -> Iterator[str]:
    """Settings under which the forward pass is no longer W + s B A."""
    for setting, meaning in _OTHER_FORWARD.items():
        if adapter.config.get(setting):
            yield f"this is {meaning} ({setting})"


@rule("vllm/keys", REFUSED, "vLLM 0.32.0, lora/utils.py: parse_fine_tuned_lora_name", MERGE)
def _keys_of_vllm(adapter: AdapterFiles) -> Iterator[str]:
    wrong = []
    for key in adapter.files.tensors if adapter.is_peft else ():
        parts = key.split(".")
        factor = len(parts) > 1 and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        head = len(parts) > 1 and parts[-1] in ("weight", "bias") and parts[-2] in ("score", "classifier")
        embedding = parts[-1] in ("lora_embedding_A", "lora_embedding_B")
        base = key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))
        if not (factor or head or embedding or base):
            wrong.append(key)
    if wrong:
        yield f"{some(wrong)}: expected factors only, and the heads 'score' and 'classifier'"


@rule(
    "vllm/rank",
    REFUSED,
    "vLLM 0.32.0, config/lora.py: MaxLoRARanks",
    f"surgery resize {{path}} --rank {VLLM_RANKS[-1]} -o OUT",
)
def _largest_rank(adapter: AdapterFiles) -> Iterator[str]:
    if (most := _most_rank(adapter)) > VLLM_RANKS[-1]:
        yield f"the largest rank is {most}, expected at most {VLLM_RANKS[-1]}"


@rule(
    "vllm/max-lora-rank", REFUSED, "vLLM 0.32.0, config/lora.py: max_lora_rank", "vllm serve ... --max-lora-rank RANK"
)
def _rank_needs_an_option(adapter: AdapterFiles) -> Iterator[str]:
    most = _most_rank(adapter)
    if VLLM_DEFAULT_MAX_RANK < most <= VLLM_RANKS[-1]:
        least = next(size for size in VLLM_RANKS if size >= most)
        yield f"the largest rank is {most}, above the default of {VLLM_DEFAULT_MAX_RANK}: give --max-lora-rank {least}"


def _most_rank(adapter: AdapterFiles) -> int:
    named = [adapter.config.get("r"), *adapter.pattern("rank_pattern").values()]
    return max((rank for rank in named if isinstance(rank, int)), default=0)


@rule("vllm/fused-experts", REFUSED, "vLLM 0.32.0, lora/model_manager.py: _validate_moe_lora_format", PER_EXPERT)
def _fused_experts_of_vllm(adapter: AdapterFiles) -> Iterator[str]:
    three = adapter.base is not None and adapter.base.architecture in VLLM_3D_EXPERTS
    if adapter.fused and not three:
        yield (
            f"{adapter.fused[0]!r} is a fused LoRA on experts: refused, or left out without a word, by every model "
            "that vLLM runs with experts one by one (Mixtral, Qwen2-MoE, Qwen3-MoE and others)"
        )
    elif adapter.fused and any(f"{module}.base_layer" not in adapter.factors for module in _outer(adapter)):
        yield f"{adapter.fused[0]!r} has a LoRA on one of gate_up_proj and down_proj only, expected both"


@rule("vllm/one-by-one", REFUSED, "measured with vLLM 0.32.0, lora/lora_weights.py: an assertion in pack_moe", MERGE)
def _one_by_one_in_vllm(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.experts and adapter.base is not None and adapter.base.architecture in VLLM_BY_TRANSFORMERS:
        yield f"{min(adapter.experts)!r} has LoRAs one by one, and vLLM runs the model through transformers' code"


def _outer(adapter: AdapterFiles) -> list[str]:
    return [module for module in adapter.fused if not module.endswith(".base_layer")]


# SGLang, LoRAX --------------------------------------------------------------------------------------------------------


@rule("sglang/config", REFUSED, "SGLang main 2026-08, srt/lora/lora_config.py: LoRAConfig", TO_PEFT)
def _sglang_settings(adapter: AdapterFiles) -> Iterator[str]:
    missing = [name for name in ("target_modules", "r", "lora_alpha") if adapter.config.get(name) is None]
    if adapter.is_peft and missing:
        yield f"adapter_config.json has no {some(missing)}"


@rule("sglang/added-tokens", REFUSED, "SGLang main 2026-08, srt/lora/lora_manager.py: validate_new_adapter", MERGE)
def _added_tokens(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.is_peft and "added_tokens.json" in adapter.files.folder.names():
        yield "the folder has an added_tokens.json, which stands for a grown vocabulary"


@rule("lorax/keys", SILENT, "LoRAX main 2025, adapters/lora.py: other tensors are not looked up", MERGE)
def _other_tensors(adapter: AdapterFiles) -> Iterator[str]:
    left = [key for key in adapter.others if "lora_magnitude_vector" not in key and not key.endswith("lora_B.bias")]
    left += [f"{module}.lora_embedding_A" for module, parts in adapter.factors.items() if "lora_embedding_A" in parts]
    left += [f"{module}.lora_A" for module in adapter.fused]
    if left:
        yield f"{some(left)}: not used"


@rule(
    "lorax/ranks",
    REFUSED,
    "LoRAX main 2025, adapters/lora.py: the layers of one kind are stacked, at one scale alpha / r",
    "surgery convert {path} --to peft --portable --pad-ranks -o OUT",
)
def _ranks_of_lorax(adapter: AdapterFiles) -> Iterator[str]:
    default = adapter.config.get("r")
    for module, rank in adapter.ranks.items():
        if rank != default and module not in adapter.fused:
            yield f"{module!r} has rank {rank}, expected {default!r} as all others"
            return


@rule("lorax/missing-layers", SILENT, "LoRAX main 2025, adapters/lora.py: LoraWeights.load returns None", MERGE)
def _layers_of_lorax(adapter: AdapterFiles) -> Iterator[str]:
    kinds: dict[str, set[int]] = {}
    for module in adapter.factors:
        if (layer := layer_of(module)) is not None:
            kinds.setdefault(module.rpartition(".")[2], set()).add(layer)
    count = _number_of_layers(adapter, kinds)
    for kind, layers in kinds.items():
        if len(layers) < count:
            yield f"{kind!r} has factors in {len(layers)} of {count} layers: those of all its layers are dropped"
            return


def _number_of_layers(adapter: AdapterFiles, kinds: dict[str, set[int]]) -> int:
    value = None if adapter.base is None else adapter.base.text_config.get("num_hidden_layers")
    return value if isinstance(value, int) else 1 + max((max(layers) for layers in kinds.values()), default=-1)
