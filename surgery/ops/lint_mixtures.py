"""Rules on checkpoints that are mixtures of experts. Sources as in `lint_checkpoints`."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.names import expert_of, layer_of
from surgery.ops.lint import REFUSED, SILENT, Rules, some
from surgery.source import read_bytes

rule: Rules[Checkpoint] = Rules()
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")
_CONVERSION = "llama.cpp (llama-cpp-python 0.3.36), conversion"


# Experts --------------------------------------------------------------------------------------------------------------


def _experts(checkpoint: Checkpoint) -> dict[int, set[int]]:
    """Layer to the numbers of the experts stored one by one."""
    found: dict[int, set[int]] = {}
    for name in checkpoint.tensors:
        layer, expert = layer_of(name), expert_of(name)
        if layer is not None and expert is not None:
            found.setdefault(layer, set()).add(expert)
    return found


@rule("peft/experts", REFUSED, "transformers 5.23, core_model_loading.py: experts are stacked on loading")
@rule("vllm/experts", REFUSED, "vLLM 0.32.0, model_executor/models/qwen3_moe.py: weights of all experts are expected")
@rule("llama.cpp/experts", REFUSED, "llama.cpp (llama-cpp-python 0.3.36), conversion/llama.py: 'Unprocessed experts'")
@rule("mlx/experts", REFUSED, "mlx-lm 0.32.2, models/mixtral.py: sanitize looks every expert up")
def _every_expert(checkpoint: Checkpoint) -> Iterator[str]:
    count = _setting(checkpoint, _COUNTS)
    for layer, experts in _experts(checkpoint).items():
        if isinstance(count, int) and experts != set(range(count)):
            yield f"layer {layer} has {len(experts)} experts, up to number {max(experts)}; config.json says {count}"
            return


@rule(
    "llama.cpp/mixed-layers",
    REFUSED,
    "llama.cpp (llama-cpp-python 0.3.36), gguf tensor tables; measured: 'Can not map tensor'",
)
def _mixed_layers(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type not in ("qwen2_moe", "qwen3_moe"):
        return
    sparse = set(_experts(checkpoint))
    dense = {layer_of(name) for name in checkpoint.tensors if name.endswith(".mlp.down_proj.weight")} - sparse
    if sparse and dense:
        layers = ", ".join(str(layer) for layer in sorted(layer for layer in dense if layer is not None))
        yield f"layers {layers} are dense and the others have experts, which {checkpoint.model_type} has no tensors for"


@rule("mlx/mixed-layers", REFUSED, "mlx-lm 0.32.2, models/qwen2_moe.py: every layer has experts; measured")
def _mixed_layers_of_mlx(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type == "qwen2_moe":
        yield from _mixed_layers(checkpoint)


@rule("mlx/fused-experts", REFUSED, "mlx-lm 0.32.2, models/qwen3_moe.py: sanitize stacks experts stored one by one")
def _fused_experts_of_mlx(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):
        yield from _fused(checkpoint)


@rule(
    "llama.cpp/fused-experts", REFUSED, "llama.cpp (llama-cpp-python 0.3.36), conversion/llama.py: no case for stacks"
)
def _fused_experts_of_llama_cpp(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type == "mixtral":
        yield from _fused(checkpoint)


def _fused(checkpoint: Checkpoint) -> Iterator[str]:
    fused = [name for name in checkpoint.tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    if fused:
        yield f"{some(fused)}: the experts are stored fused, expected one by one"


# Routers --------------------------------------------------------------------------------------------------------------


def _setting(checkpoint: Checkpoint, names: tuple[str, ...]) -> object:
    """The first of some settings that the config has."""
    return next((checkpoint.text_config[name] for name in names if name in checkpoint.text_config), None)


# Whether an engine divides the weights of the chosen experts by their sum, by model type; the config has no say there.
_LLAMA_CPP_NORMALISES = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
_MLX_NORMALISES = {"qwen2_moe": False}
_VLLM_NORMALISES = {"olmoe": False}


@rule(
    "llama.cpp/top-k", SILENT, "measured with llama-cpp-python 0.3.36: it does not ask the config, 0.6 to 0.9 nats off"
)
def _top_k_of_llama_cpp(checkpoint: Checkpoint) -> Iterator[str]:
    yield from _top_k(checkpoint, _LLAMA_CPP_NORMALISES)


@rule("mlx/top-k", SILENT, "measured with mlx-lm 0.32.2, models/qwen2_moe.py: it does not ask the config, 0.6 nats off")
def _top_k_of_mlx(checkpoint: Checkpoint) -> Iterator[str]:
    yield from _top_k(checkpoint, _MLX_NORMALISES)


@rule("vllm/top-k", SILENT, "measured with vLLM 0.32.0, models/olmoe.py: it does not ask the config, 2 nats off")
def _top_k_of_vllm(checkpoint: Checkpoint) -> Iterator[str]:
    yield from _top_k(checkpoint, _VLLM_NORMALISES)


def _top_k(checkpoint: Checkpoint, normalises: dict[str, bool]) -> Iterator[str]:
    theirs = normalises.get(checkpoint.model_type)
    ours = bool(checkpoint.config.get("norm_topk_prob", False))
    if theirs is None or theirs == ours or _setting(checkpoint, _CHOSEN) == _setting(checkpoint, _COUNTS):
        return
    does = "normalised" if theirs else "left as they are"
    yield f"norm_topk_prob is {str(ours).lower()}, and the weights of the chosen experts will be {does} nevertheless"


@rule(
    "llama.cpp/shared-gate",
    SILENT,
    "llama.cpp (llama-cpp-python 0.3.36), src/models/qwen2moe.cpp: sigmoid(x) is taken as silu(x) / x; measured: NaN",
)
def _shared_gate(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type != "qwen2_moe":
        return
    gates = [name for name in checkpoint.tensors if name.endswith(".shared_expert_gate.weight")]
    zero = [name for name in gates if not _has_values(checkpoint.tensors[name])]
    if zero:
        yield f"{some(zero)}: all zeros, of which NaN is made; any other values would do"


@rule("mlx/router-bias", SILENT, "mlx-lm 0.32.2, models/ernie4_5_moe.py: sanitize drops it; measured: 2 nats off")
def _router_bias(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type != "ernie4_5_moe":
        return
    found = [name for name, tensor in checkpoint.tensors.items() if _is_bias(name) and _has_values(tensor)]
    if found:
        yield f"{some(found)}: not zero, and left out, so that other experts are chosen"


def _is_bias(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def _has_values(tensor: StoredTensor) -> bool:
    """Whether any byte is set, of a tensor with a number for each expert, or for each hidden channel."""
    return any(read_bytes(tensor.source, tensor.offset, min(tensor.nbytes, 1 << 16)))


# The config, the tokenizer --------------------------------------------------------------------------------------------


@rule(
    "llama.cpp/shared-experts",
    REFUSED,
    f"{_CONVERSION}/ernie.py: their width is taken for intermediate_size // num_key_value_heads",
)
def _shared_experts(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type != "ernie4_5_moe":
        return
    names = ("moe_num_shared_experts", "moe_intermediate_size", "intermediate_size", "num_key_value_heads")
    shared, width, dense, heads = (checkpoint.config.get(name) for name in names)
    if not (isinstance(shared, int) and isinstance(width, int) and isinstance(dense, int) and isinstance(heads, int)):
        return
    if shared > 0 and heads > 0 and dense // heads != shared * width:
        yield f"the shared experts are {shared * width} wide, and will be taken to be {dense // heads} wide"


@rule(
    "llama.cpp/config-fields",
    REFUSED,
    f"{_CONVERSION}/hunyuan.py: set_gguf_parameters; transformers 5 does not write them",
    "add them to config.json, with one number for each layer",
)
def _fields_of_hunyuan(checkpoint: Checkpoint) -> Iterator[str]:
    names = ("moe_intermediate_size", "moe_topk", "num_shared_expert")
    wrong = [name for name in names if not isinstance(checkpoint.config.get(name), list)]
    if checkpoint.model_type == "hunyuan_v1_moe" and wrong:
        yield f"config.json has {some(wrong)} not as a list, expected a number for each layer"


# What the converter looks up in a tokenizer, by model type.
_GLM_TOKENS = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")


@rule("llama.cpp/own-tokenizer", REFUSED, f"{_CONVERSION}/base.py: _set_vocab_glm, and hunyuan.py: set_vocab; measured")
def _own_tokenizer(checkpoint: Checkpoint) -> Iterator[str]:
    names = checkpoint.folder.names()
    if checkpoint.model_type == "hunyuan_v1_moe" and not any(name.startswith("tokenization_") for name in names):
        yield "there is no tokenization_*.py, and the converter knows no other tokenizer than HunYuan's own"
    if checkpoint.model_type in ("qwen2_moe", "qwen3_moe") and not {"tokenizer.json", "merges.txt"} & set(names):
        yield "there is no tokenizer.json, and the converter knows no tokenizer here but those with merges"
    if checkpoint.model_type == "glm4_moe":
        source = checkpoint.folder.open("tokenizer.json") if "tokenizer.json" in names else None
        content = b"" if source is None else read_bytes(source, 0, source.size)
        missing = [token for token in _GLM_TOKENS if token.encode() not in content]
        if missing:
            yield f"the tokenizer has no {some(missing)}, and the converter knows no other tokenizer than GLM's own"
