"""Rules on adapters that PEFT and llama.cpp have, and on the format as a whole. Sources: `lint_subject`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from surgery.errors import FormatError
from surgery.families import family_of
from surgery.ops.directory import head_tied_to
from surgery.ops.lint import REFUSED, SILENT, Rules, some
from surgery.ops.lint_servers import other_forward
from surgery.ops.lint_subject import (
    EXPERT,
    FUSE,
    GGUF,
    HALVES,
    HELPER,
    MERGE,
    PER_EXPERT,
    PORTABLE,
    PREFIX,
    TO_MLX,
    TO_PEFT,
    AdapterFiles,
    is_router,
)
from surgery.patterns import compile_pattern
from surgery.sites import Kind, find_sites, memory_names

rule: Rules[AdapterFiles] = Rules()
# Those of Mixtral's kind for which PEFT stacks experts; see also `Family.taken_for_experts`.
_MAPPED = ("mixtral", "minimax", "minimax_m2")


# The format as a whole ------------------------------------------------------------------------------------------------


@rule("peft/format", REFUSED, "peft 0.21.2, config.py: peft_type and adapter_model are required", TO_PEFT)
@rule("vllm/format", REFUSED, "vLLM 0.32.0, lora/peft_helper.py and lora_model.py: from_local_checkpoint", TO_PEFT)
@rule("llama.cpp/format", REFUSED, f"{GGUF}: adapter_config.json and adapter_model", TO_PEFT)
@rule("sglang/format", REFUSED, "SGLang main 2026-08, srt/lora/lora_config.py", TO_PEFT)
@rule("lorax/format", REFUSED, "LoRAX main 2025, adapters/lora.py: loads PEFT's LoraConfig", TO_PEFT)
def _is_peft_folder(adapter: AdapterFiles) -> Iterator[str]:
    if not adapter.is_peft:
        yield f"this is an adapter in the format of {adapter.format}, expected a PEFT folder"


@rule("vllm/kind", REFUSED, "vLLM 0.32.0, lora/peft_helper.py: the fields of LoRA only")
@rule("llama.cpp/kind", REFUSED, "llama.cpp (llama-cpp-python 0.3.36), convert_lora_to_gguf.py: lora_alpha is required")
@rule("sglang/kind", REFUSED, "SGLang main 2026-08, srt/lora/lora.py: peft_type must be lora")
@rule("lorax/kind", REFUSED, "LoRAX main 2025, adapters/lora.py: loads PEFT's LoraConfig")
def _is_lora(adapter: AdapterFiles) -> Iterator[str]:
    kind = adapter.config.get("peft_type")
    if adapter.is_peft and kind != "LORA":
        yield f"peft_type is {kind!r}, expected 'LORA'; merge it with PEFT"


@rule(
    "mlx/format", REFUSED, "mlx-lm 0.32.2, tuner/utils.py: load_adapters reads num_layers and lora_parameters", TO_MLX
)
def _is_mlx_folder(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.format != "mlx":
        yield f"this is an adapter in the format of {adapter.format}, expected mlx-lm's adapters.safetensors"


# PEFT -----------------------------------------------------------------------------------------------------------------


@rule("peft/rank", REFUSED, "peft 0.21.2, utils/other.py: the first rank_pattern that matches counts", TO_PEFT)
@rule("vllm/rank-pattern", SILENT, f"{HELPER}: get_rank_and_scaling, alpha over the config's rank", TO_PEFT)
def _ranks_of_the_config(adapter: AdapterFiles) -> Iterator[str]:
    for module, rank in adapter.ranks.items():
        configured = adapter.configured(module, "rank_pattern", "r")
        if module not in adapter.fused and configured != rank and not is_router(module):
            yield f"{module!r} has rank {rank}, adapter_config.json gives it {configured!r}"
            return


@rule("llama.cpp/rank", SILENT, f"{GGUF}: alpha over the tensors' rank, where vLLM takes the config's", TO_PEFT)
def _rank_of_the_tensors(adapter: AdapterFiles) -> Iterator[str]:
    if isinstance(adapter.config.get("r"), int):
        yield from _ranks_of_the_config(adapter)


@rule("peft/kind", SILENT, "measured with peft 0.21.2: another kind of adapter is made, and nothing of this is loaded")
def _is_lora_in_peft(adapter: AdapterFiles) -> Iterator[str]:
    kind = adapter.config.get("peft_type")
    if adapter.factors and kind != "LORA":
        yield f"peft_type is {kind!r}, and the tensors are those of a LoRA; write 'LORA' there"


@rule("peft/prefix", SILENT, "measured with peft 0.21.2: it warns of missing keys and dW is 0", TO_PEFT)
@rule("lorax/prefix", SILENT, "LoRAX main 2025, adapters/lora.py: map_weights_for_model", TO_PEFT)
def _keys_have_the_prefix(adapter: AdapterFiles) -> Iterator[str]:
    bare = [key for key in adapter.files.tensors if not key.startswith(PREFIX)]
    if adapter.is_peft and bare:
        yield f"{len(bare)} keys do not begin with {PREFIX!r}, such as {bare[0]!r}: their factors are not used"


@rule(
    "peft/half-experts",
    REFUSED,
    "peft 0.21.2, utils/transformers_weight_conversion.py: _convert_peft_config_moe",
    FUSE,
)
def _gate_and_up_together(adapter: AdapterFiles) -> Iterator[str]:
    for module, experts in adapter.experts.items():
        words = {word for projections in experts.values() for word in projections}
        for pair in HALVES:
            if len(words & pair) == 1:
                (there,), (missing,) = words & pair, pair - words
                yield f"{module!r} has LoRAs on {there!r} and none on {missing!r}, which are one parameter in memory"
                return


@rule(
    "peft/expert-ranks",
    REFUSED,
    "peft 0.21.2, utils/transformers_weight_conversion.py: stacks get r, and gate_up_proj twice that, no pattern",
    FUSE,
)
def _experts_of_one_rank(adapter: AdapterFiles) -> Iterator[str]:
    default = adapter.config.get("r")
    for module, rank in adapter.ranks.items():
        if EXPERT.fullmatch(module) and rank != default:
            yield f"{module!r} has rank {rank}, expected r, {default!r}: experts are stacked when they are loaded"
            return


@rule(
    "peft/router-rank",
    REFUSED,
    "peft 0.21.2, utils/transformers_weight_conversion.py: a router beside experts becomes a parameter of rank r",
    FUSE,
)
def _router_of_one_rank(adapter: AdapterFiles) -> Iterator[str]:
    default = adapter.config.get("r")
    for module, rank in adapter.ranks.items():
        if adapter.experts and is_router(module) and rank != default and not adapter.is_parameter(module):
            yield f"{module!r} has rank {rank}, expected r, {default!r}, of the router beside experts one by one"
            return


@rule("peft/one-by-one", REFUSED, "peft 0.21.2, utils/transformers_weight_conversion.py: no map for the family", FUSE)
def _experts_one_by_one(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.base is None or not adapter.experts:
        return
    family = family_of(adapter.base.model_type)
    stacked = family.experts is not None and adapter.base.model_type not in _MAPPED and not family.taken_for_experts
    if stacked:
        yield f"{min(adapter.experts)!r} has LoRAs one by one, which PEFT stacks for other families only"


@rule("peft/parameters", REFUSED, "peft 0.21.2, tuners/lora/layer.py: ParamWrapper", PER_EXPERT)
def _parameters_take_plain_loras(adapter: AdapterFiles) -> Iterator[str]:
    if not adapter.fused:
        return
    for setting in ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out"):
        if value := adapter.config.get(setting):
            yield f"target_parameters with {setting} {value!r}, which PEFT does not have for parameters"


@rule("peft/pairs", SILENT, "measured with peft 0.21.2: the other factor keeps its initial values", "")
@rule("vllm/pairs", REFUSED, "measured with vLLM 0.32.0: without B a TypeError, without A the module is dropped")
@rule("llama.cpp/pairs", REFUSED, f"{GGUF}: an assertion")
def _pairs(adapter: AdapterFiles) -> Iterator[str]:
    for module, parts in adapter.factors.items():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if (a in parts) != (b in parts):
                there, missing = (a, b) if a in parts else (b, a)
                yield f"{module!r} has {there} and no {missing}"
                return


@rule("peft/targets", SILENT, "measured with peft 0.21.2: factors of other modules are left out", TO_PEFT)
@rule("vllm/targets", SILENT, "measured with vLLM 0.32.0: it adds them, PEFT does not; 3.3 nats apart", TO_PEFT)
@rule("llama.cpp/targets", SILENT, f"{GGUF}: it adds them, PEFT does not; measured: 3.3 nats apart", TO_PEFT)
def _targets(adapter: AdapterFiles) -> Iterator[str]:
    targets = adapter.config.get("target_modules")
    if not adapter.factors or adapter.fused or adapter.experts or targets == "all-linear":
        return
    if targets is None:
        yield "adapter_config.json has no target_modules: PEFT takes those that it has for the model type"
        return
    left = [
        module
        for module in adapter.factors
        if not (_is_target(module, targets) or adapter.is_parameter(module) or is_router(module))
    ]
    if left:
        yield f"{some(left)}: not among target_modules, {some(targets) if isinstance(targets, list) else targets!r}"


def _is_target(module: str, targets: object) -> bool:
    """PEFT's `check_target_module_exists`: a list of ends of names, or a pattern for whole names."""
    if isinstance(targets, list):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    try:
        return compile_pattern(str(targets)).fullmatch(module) is not None
    except FormatError:
        return True  # too intricate to try


@rule("vllm/modules", REFUSED, "vLLM 0.32.0, lora/lora_model.py: check_unexpected_modules; measured: or left out")
@rule("llama.cpp/modules", REFUSED, f"{GGUF}: 'Can not map tensor'")
def _modules_of_the_base(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.base is None:
        return
    known = {name.rpartition(".")[0] for names in memory_names(adapter.base).items() for name in names}
    known |= {site.module for site in find_sites(adapter.base).values()} | {"lm_head"}
    unknown = [module for module in adapter.factors if module.replace(".base_layer", "") not in known]
    if unknown:
        yield f"{some(unknown)}: no modules of {adapter.base.label}"


@rule("peft/modules", SILENT, "measured with peft 0.21.2: it warns, and dW is 0", "")
def _modules_in_peft(adapter: AdapterFiles) -> Iterator[str]:
    if not adapter.config.get("layer_replication"):  # which makes the layers that the base lacks
        yield from _modules_of_the_base(adapter)


@rule("peft/shapes", REFUSED, "peft 0.21.2, utils/save_and_load.py: 'size mismatch'")
@rule("vllm/shapes", REFUSED, "measured with vLLM 0.32.0: a RuntimeError on the sizes of tensors")
@rule("llama.cpp/shapes", REFUSED, "llama.cpp (llama-cpp-python 0.3.36), src/llama-adapter.cpp: 'has incorrect shape'")
def _shapes_of_the_base(adapter: AdapterFiles) -> Iterator[str]:
    sites = {} if adapter.base is None else find_sites(adapter.base)
    for module, parts in adapter.factors.items():
        site = sites.get(module)
        if site is None or site.kind is not Kind.LINEAR or not {"lora_A", "lora_B"} <= parts.keys():
            continue
        found = (parts["lora_B"].shape[0], parts["lora_A"].shape[-1])
        if found != (site.out_features, site.in_features):
            expected = [site.out_features, site.in_features]
            yield f"the factors of {module!r} are for a weight of {list(found)}, the base has {expected}"
            return


# llama.cpp ------------------------------------------------------------------------------------------------------------


@rule("llama.cpp/rslora", SILENT, f"{GGUF}: use_rslora is not read; measured: 3.13 nats off", PORTABLE)
def _rslora(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.config.get("use_rslora") and any(rank != 1 for rank in adapter.ranks.values()):
        yield "use_rslora is set: the scale alpha / sqrt(r) is read as alpha / r"


@rule("llama.cpp/alpha-pattern", SILENT, f"{GGUF}: one lora_alpha for all; measured: 1.23 nats off", PORTABLE)
@rule("lorax/alpha-pattern", SILENT, "LoRAX main 2025, adapters/lora.py: one lora_alpha for all", PORTABLE)
def _alphas(adapter: AdapterFiles) -> Iterator[str]:
    default = adapter.config.get("lora_alpha")
    for module in adapter.ranks:
        alpha = adapter.configured(module, "alpha_pattern", "lora_alpha")
        if alpha != default:
            yield f"{module!r} has alpha {alpha!r} by alpha_pattern, read as {default!r}"
            return


@rule("llama.cpp/alpha", REFUSED, f"{GGUF}: KeyError", TO_PEFT)
def _alpha(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.is_peft and "lora_alpha" not in adapter.config:
        yield "adapter_config.json has no 'lora_alpha'"


@rule("llama.cpp/forward", SILENT, f"{GGUF}: the settings are not read; measured: aLoRA 4.5 nats off", "")
def _other_forward_of_llama_cpp(adapter: AdapterFiles) -> Iterator[str]:
    yield from (message for message in other_forward(adapter) if "layer_replication" not in message)


@rule("llama.cpp/layer-replication", REFUSED, f"{GGUF}: 'Can not map tensor'")
def _layer_replication(adapter: AdapterFiles) -> Iterator[str]:
    yield from (message for message in other_forward(adapter) if "layer_replication" in message)


@rule("llama.cpp/keys", REFUSED, f"{GGUF}: get_tensors ends the program at any other tensor", MERGE)
def _keys_of_llama_cpp(adapter: AdapterFiles) -> Iterator[str]:
    read = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    keys = [key for key in adapter.files.tensors if adapter.is_peft and not key.endswith(read)]
    wrong = [key for key in keys if ".base_layer.weight" not in key and not _is_norm(key)]
    if wrong:
        yield f"{some(wrong)}: expected factors only"


def _is_norm(key: str) -> bool:
    return "_layernorm" in key or ".norm" in key


@rule(
    "llama.cpp/norms",
    SILENT,
    "llama.cpp (llama-cpp-python 0.3.36), src/llama-adapter.cpp: '_norm.weight' is skipped",
    MERGE,
)
def _norms(adapter: AdapterFiles) -> Iterator[str]:
    norms = [key for key in adapter.others if _is_norm(key) and ".base_layer.weight" not in key]
    if norms:
        yield f"{some(norms)}: norms are converted, and ignored when the adapter is loaded"


@rule("llama.cpp/fused-experts", REFUSED, f"{GGUF}: 'Can not map tensor'", PER_EXPERT)
def _fused_experts(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.fused:
        yield f"{adapter.fused[0]!r} is a fused LoRA on experts, whose key names no tensor of the model"


@rule(
    "llama.cpp/some-experts",
    REFUSED,
    "llama.cpp (llama-cpp-python 0.3.36), conversion/llama.py, qwen.py: 'Unprocessed experts'",
    MERGE,
)
def _every_expert(adapter: AdapterFiles) -> Iterator[str]:
    for module, experts in adapter.experts.items():
        count = max(experts) + 1
        if any(len(experts.get(expert, ())) != 3 for expert in range(count)):
            yield f"{module!r} has LoRAs on some of its projections only, expected all three of every expert"
            return


@rule(
    "llama.cpp/conv1d",
    REFUSED,
    "llama.cpp (llama-cpp-python 0.3.36), conversion/gpt2.py: transposes B A as it does W",
    MERGE,
)
def _conv1d(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.config.get("fan_in_fan_out") and _is_gpt2(adapter):
        yield "the base stores its weights transposed (fan_in_fan_out, GPT-2), and the factors are transposed with them"


def _is_gpt2(adapter: AdapterFiles) -> bool:
    return any(re.search(r"\bh\.\d+\..*c_\w+$", module) for module in adapter.factors)


@rule("vllm/gpt2", REFUSED, "measured with vLLM 0.32.0: 'GPT2LMHeadModel does not support LoRA yet.'", MERGE)
def _no_lora_in_vllm(adapter: AdapterFiles) -> Iterator[str]:
    if _is_gpt2(adapter):
        yield "the base is a GPT-2, for which vLLM takes no LoRA"


@rule(
    "llama.cpp/tied-embeddings", REFUSED, "measured with llama-cpp-python 0.3.36: GGML_ASSERT(ggml_can_mul_mat)", MERGE
)
@rule("mlx/tied-embeddings", SILENT, "measured with mlx-lm 0.32.2: the factors act on the head too, 2 nats off", MERGE)
def _tied_embeddings(adapter: AdapterFiles) -> Iterator[str]:
    tied = None if adapter.base is None else head_tied_to(adapter.base)
    module = "" if tied is None else tied.name.removesuffix(".weight")
    of_mlx = adapter.format == "mlx" and f"{module}.lora_a" in adapter.files.tensors
    if (
        adapter.base is not None
        and tied is not None
        and (of_mlx or "lora_embedding_A" in adapter.factors.get(module, {}))
    ):
        yield f"{module!r} has factors, and {adapter.base.label} has its head tied to it"


@rule("llama.cpp/tied-head", REFUSED, f"{GGUF}: 'lm_head is present in adapter, but is ignored in base model'", MERGE)
def _tied_head(adapter: AdapterFiles) -> Iterator[str]:
    if "lm_head" in adapter.factors and adapter.base is not None and head_tied_to(adapter.base) is not None:
        yield f"'lm_head' has factors, and {adapter.base.label} has its head tied to its embedding"
