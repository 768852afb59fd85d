"""Rules on checkpoints of any kind; those on mixtures of experts are in `lint_mixtures`. Sources as in `lint_adapters`.

Beside those: transformers 5.23, mlx-lm 0.32.2 (`utils.py`, `models/`), llama.cpp's `conversion/` as of
llama-cpp-python 0.3.36, vLLM 0.32.0 (`config/model.py`, `model_executor/models/`).
"""

from __future__ import annotations

from collections.abc import Iterator

from surgery.checkpoint import Checkpoint, StoredTensor
from surgery.families import part_of
from surgery.hashing import hash_tensor
from surgery.moe_families import MODEL_TYPE_PREFIX
from surgery.ops.lint import REFUSED, SILENT, WARNING, Rules, some
from surgery.ops.lint_tables import (
    LLAMA_CPP_ARCHITECTURES,
    MLX_MODEL_TYPES,
    MLX_RENAMED,
    MLX_REQUIRED,
    MLX_ROPE_DEFAULT,
)
from surgery.sites import vocabulary_of

rule: Rules[Checkpoint] = Rules()
_CONVERT = "llama.cpp (llama-cpp-python 0.3.36), conversion/base.py"


def _mlx_type(checkpoint: Checkpoint) -> str:
    return MLX_RENAMED.get(checkpoint.model_type, checkpoint.model_type)


# The config -----------------------------------------------------------------------------------------------------------


@rule("peft/config", REFUSED, "transformers 5.23, AutoConfig")
@rule("vllm/config", REFUSED, "vLLM 0.32.0, transformers_utils/config.py: get_config")
@rule("llama.cpp/config", REFUSED, f"{_CONVERT}: load_hparams")
@rule("mlx/config", REFUSED, "mlx-lm 0.32.2, utils.py: load_config")
@rule("sglang/config", REFUSED, "transformers 5.23, AutoConfig, through which SGLang reads it")
@rule("lorax/config", REFUSED, "transformers 5.23, AutoConfig, through which LoRAX reads it")
def _config(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.model_type:
        yield "config.json is missing, or names no model_type; copy it from the model's own repository"


@rule("vllm/architectures", REFUSED, "vLLM 0.32.0, model_executor/models/registry.py: resolve_model_cls")
@rule("llama.cpp/architectures", REFUSED, f"{_CONVERT}: get_model_architecture")
def _architectures(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type and not checkpoint.architecture:
        yield "config.json names no class in 'architectures', expected one such as 'LlamaForCausalLM'"


@rule(
    "peft/own-code",
    WARNING,
    "transformers 5.23, dynamic_module_utils.py: resolve_trust_remote_code",
    "import surgery.moe",
)
def _own_code(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type.startswith(MODEL_TYPE_PREFIX) and "auto_map" in checkpoint.config:
        yield (
            "its code travels with it: it needs trust_remote_code=True, or the line `import surgery.moe`, which "
            "registers the same classes"
        )


@rule("vllm/own-code", REFUSED, "vLLM 0.32.0, transformers_utils/config.py: get_config; with the option it was not run")
def _own_code_in_vllm(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type.startswith(MODEL_TYPE_PREFIX) and "auto_map" in checkpoint.config:
        yield (
            f"the model type is {checkpoint.model_type!r}, which vLLM does not have, and it runs a checkpoint's own "
            "code only with --trust-remote-code"
        )


@rule("vllm/encoder-decoder", REFUSED, "vLLM 0.32.0, model_executor/models/registry.py: it has none of these")
def _encoder_decoder(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.architecture.startswith(("T5", "MT5", "M2M100", "NllbMoe", "SwitchTransformers")):
        yield f"the architecture is {checkpoint.architecture!r}, an encoder-decoder that vLLM does not have"


@rule("mlx/head", REFUSED, "mlx-lm 0.32.2, utils.py: load_model, whose models end in a language head")
def _head(checkpoint: Checkpoint) -> Iterator[str]:
    known = checkpoint.model_type and _mlx_type(checkpoint) in MLX_MODEL_TYPES
    if known and checkpoint.architecture.endswith(("Classification", "QuestionAnswering")):
        yield f"the architecture is {checkpoint.architecture!r}, whose head no model of mlx-lm has"


@rule(
    "llama.cpp/n-ctx",
    REFUSED,
    "measured with llama-cpp-python 0.3.36: KeyError 'n_ctx', which transformers 5 no longer writes",
    'add "n_ctx" to config.json, with the value of n_positions',
)
def _n_ctx(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type == "gpt2" and "n_ctx" not in checkpoint.config:
        yield "config.json of a GPT-2 has no 'n_ctx', expected the length of the context"


@rule("mlx/dtypes", REFUSED, "measured with mlx-lm 0.32.2: 'unsupported dtype F64'")
def _float64(checkpoint: Checkpoint) -> Iterator[str]:
    found = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype.name == "F64"]
    if found:
        yield f"{some(found)}: float64, expected float32 or less"


@rule("llama.cpp/architecture", REFUSED, "llama.cpp (llama-cpp-python 0.3.36), conversion/__init__.py: TEXT_MODEL_MAP")
def _llama_cpp_architecture(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.architecture and checkpoint.architecture not in LLAMA_CPP_ARCHITECTURES:
        yield f"the architecture is {checkpoint.architecture!r}, which the converter does not know"


@rule("mlx/model-type", REFUSED, "mlx-lm 0.32.2, utils.py: 'Model type ... not supported'")
def _mlx_model_type(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.model_type and _mlx_type(checkpoint) not in MLX_MODEL_TYPES:
        yield f"the model type is {checkpoint.model_type!r}, which mlx-lm does not have"


@rule(
    "mlx/config-fields",
    REFUSED,
    "mlx-lm 0.32.2, models/: ModelArgs; measured with Qwen3-MoE as transformers 5 saves it",
)
def _mlx_fields(checkpoint: Checkpoint) -> Iterator[str]:
    required = MLX_REQUIRED.get(_mlx_type(checkpoint), frozenset())
    missing = sorted(required - checkpoint.config.keys())
    if missing:
        yield f"config.json has no {some(missing)}; add what transformers writes elsewhere or leaves to its defaults"


@rule("mlx/rope-theta", SILENT, "mlx-lm 0.32.2, models/: ModelArgs; measured: Mixtral 2.47 nats off")
def _mlx_rope_theta(checkpoint: Checkpoint) -> Iterator[str]:
    default = MLX_ROPE_DEFAULT.get(_mlx_type(checkpoint))
    nested = checkpoint.config.get("rope_parameters")
    if default is None or "rope_theta" in checkpoint.config or not isinstance(nested, dict):
        return
    theta = nested.get("rope_theta")
    if isinstance(theta, int | float) and theta != default:
        yield f"rope_theta is {theta:g}, in rope_parameters only: it is taken for {default:g}; add it beside them"


# Weights --------------------------------------------------------------------------------------------------------------


@rule("peft/vocabulary", REFUSED, "transformers 5.23, from_pretrained: 'size mismatch'")
@rule("vllm/vocabulary", REFUSED, "vLLM 0.32.0, layers/vocab_parallel_embedding.py: weight_loader")
@rule("llama.cpp/vocabulary", REFUSED, "llama.cpp, src/llama-model.cpp: token_embd has n_vocab rows")
@rule("mlx/vocabulary", REFUSED, "mlx-lm 0.32.2, utils.py: load_weights compares shapes")
def _vocabulary(checkpoint: Checkpoint) -> Iterator[str]:
    expected = vocabulary_of(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight"))
        if is_table and expected is not None and len(tensor.shape) == 2 and tensor.shape[0] != expected:
            yield f"{name!r} has {tensor.shape[0]} rows, config.json says vocab_size {expected}"


@rule("vllm/tied-head", SILENT, "vLLM 0.32.0, models/llama.py: a tied lm_head is not loaded")
@rule("mlx/tied-head", SILENT, "mlx-lm 0.32.2, models/llama.py: sanitize drops a tied lm_head")
def _tied_head(checkpoint: Checkpoint) -> Iterator[str]:
    head = checkpoint.tensors.get("lm_head.weight")
    tied = checkpoint.text_config.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings"))
    if head is None or tied is not True:
        return
    table = _embedding(checkpoint, head)
    if table is not None and (table.dtype != head.dtype or hash_tensor(table) != hash_tensor(head)):
        yield (
            f"tie_word_embeddings is set, and 'lm_head.weight' differs from {table.name!r}: the head is ignored; set "
            "it to false in config.json"
        )


def _embedding(checkpoint: Checkpoint, head: StoredTensor) -> StoredTensor | None:
    found = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if tensor.shape == head.shape and part_of(name, tensor.shape) == "embeddings"
    ]
    return found[0] if len(found) == 1 else None


@rule("vllm/float32", WARNING, "vLLM 0.32.0, config/model.py: _resolve_auto_dtype", "vllm serve ... --dtype float32")
def _float32(checkpoint: Checkpoint) -> Iterator[str]:
    named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if named == "float32":
        yield "the weights are float32: they are rounded to 16 bits unless --dtype float32 is given"


@rule("mlx/weights", REFUSED, "mlx-lm 0.32.2, utils.py: load_model reads model*.safetensors")
def _mlx_weights(checkpoint: Checkpoint) -> Iterator[str]:
    wrong = [
        name for name in checkpoint.weights.names if not (name.startswith("model") and name.endswith(".safetensors"))
    ]
    if wrong:
        yield f"the weights are in {some(wrong)}, expected model.safetensors or its shards"


@rule("llama.cpp/tokenizer", REFUSED, f"{_CONVERT}: set_vocab", "copy the tokenizer's files from the base")
@rule("mlx/tokenizer", REFUSED, "mlx-lm 0.32.2, utils.py: load_tokenizer", "copy the tokenizer's files from the base")
@rule(
    "vllm/tokenizer",
    WARNING,
    "vLLM 0.32.0: without one only token ids can be served",
    "vllm serve ... --skip-tokenizer-init",
)
def _tokenizer(checkpoint: Checkpoint) -> Iterator[str]:
    known = {"tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "vocab.txt"}
    if checkpoint.path is not None and checkpoint.path.is_file():
        return
    if not known & set(checkpoint.folder.names()):
        yield "there is no tokenizer in the folder"
