"""Rules on adapters that mlx-lm has. Sources: `lint_subject`."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.ops.lint import REFUSED, Rules, some
from surgery.ops.lint_subject import TO_MLX, TO_PEFT, AdapterFiles, is_router
from surgery.ops.lint_tables import MLX_OWN_ROUTERS

rule: Rules[AdapterFiles] = Rules()


@rule("mlx/parameters", REFUSED, "mlx-lm 0.32.2, tuner/utils.py: linear_to_lora_layers", TO_PEFT)
def _mlx_parameters(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.format != "mlx" or adapter.config.get("fine_tune_type") == "full":
        return
    parameters = adapter.config.get("lora_parameters")
    missing = [
        name for name in ("rank", "scale", "dropout") if not isinstance(parameters, dict) or name not in parameters
    ]
    if missing:
        yield f"lora_parameters has no {some(missing)}"
    if "num_layers" not in adapter.config:
        yield "adapter_config.json has no 'num_layers'"


@rule(
    "mlx/keys",
    REFUSED,
    "mlx-lm 0.32.2, tuner/utils.py: load_adapters, 'not an adapter parameter in the model'",
    TO_PEFT,
)
def _mlx_keys(adapter: AdapterFiles) -> Iterator[str]:
    wrong = [key for key in adapter.files.tensors if key.rpartition(".")[2] not in ("lora_a", "lora_b", "m")]
    if adapter.format == "mlx" and wrong and adapter.config.get("fine_tune_type") != "full":
        yield f"{some(wrong)}: expected lora_a, lora_b and m only"


@rule("mlx/rank", REFUSED, "mlx-lm 0.32.2, tuner/utils.py: load_adapters compares shapes", TO_MLX)
def _mlx_rank(adapter: AdapterFiles) -> Iterator[str]:
    parameters = adapter.config.get("lora_parameters")
    rank = parameters.get("rank") if isinstance(parameters, dict) else None
    for key, tensor in adapter.files.tensors.items():
        is_a = adapter.format == "mlx" and key.endswith(".lora_a") and len(tensor.shape) in (2, 3)
        if is_a and tensor.shape[1] != rank:
            yield f"{key!r} has rank {tensor.shape[1]}, lora_parameters say {rank!r}"
            return


@rule("mlx/router", REFUSED, 'mlx-lm 0.32.2, tuner/utils.py: to_lora, "Can\'t convert layer of type MoEGate to LoRA"')
def _mlx_router(adapter: AdapterFiles) -> Iterator[str]:
    if adapter.format != "mlx" or adapter.base is None or adapter.base.model_type not in MLX_OWN_ROUTERS:
        return
    routers = [key for key in adapter.files.tensors if key.endswith(".lora_a") and is_router(key.rpartition(".")[0])]
    if routers:
        yield f"{some(routers)}: the router of a {adapter.base.model_type} takes no LoRA; extract with other --targets"
