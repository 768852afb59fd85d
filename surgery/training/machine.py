"""Other people's machinery: accelerate's state, trackers, and the bars of transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from surgery.errors import OptionError, UnsupportedError
from surgery.training import zero
from surgery.training.options import TrainOptions
from surgery.training.text import transformers_package

TRACKERS = ("tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab")


@contextlib.contextmanager
def accelerated(options: TrainOptions, device: str, trackers: Sequence[str]) -> Iterator[Any]:
    """Accelerate's accelerator for a run; what it keeps globally goes with it."""
    import torch
    from accelerate.accelerator import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    # accelerate imports DeepSpeed wherever it is installed, which prints what it guesses to standard output.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    named = [check_tracker(name) for name in trackers]
    if device not in ("auto", "cpu"):
        if not torch.cuda.is_available():
            raise OptionError(f"--device is {device}, and there is no GPU that torch can use.")
        torch.cuda.set_device(device if ":" in device else 0)
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched:
        AcceleratorState._reset_state(reset_partial_state=True)
    if zero.is_asked() and not torch.cuda.is_available():
        device = "cpu"  # accelerate would take each process for a run of its own
    on_gpu = device != "cpu" and torch.cuda.is_available()
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    if options.optimizer == "adamw-8bit" and not _importable("bitsandbytes"):
        raise OptionError("--optimizer adamw-8bit needs the package 'bitsandbytes', which is not installed.")
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=named or None,
        project_dir=None if not named else os.getcwd(),
    )
    try:
        _shard_on_cpus(accelerator)
        check_kind(accelerator)
        yield accelerator
    finally:
        if not launched:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            PartialState._reset_state()


def _shard_on_cpus(accelerator: Any) -> None:
    """Shard the model where that was asked for and there are no GPUs.

    accelerate's own code for it runs on CPUs, but is reached on GPUs only: it would train data-parallel in silence.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Both, as accelerate does: the one is written over by the other now and then.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def check_kind(accelerator: Any) -> None:
    """Make sharding ready. Raises `UnsupportedError` where processes share a model in a way that is not known here."""
    from accelerate.utils import DistributedType

    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UnsupportedError(
                "Training over FSDP1 is not there; set fsdp_version: 2, as examples/accelerate/fsdp2.yaml has it."
            )
        if accelerator.mixed_precision == "fp16":
            raise UnsupportedError("--precision fp16 does not go with FSDP2; use bf16 or fp32.")
        if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise UnsupportedError(
                "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights, which methods and "
                "fresh heads need; set it to false, as examples/accelerate/fsdp2.yaml has it."
            )
        _reduce_in_float32(accelerator)
    elif kind.value not in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
        raise UnsupportedError(
            f"Training over {str(kind).rpartition('.')[2]} is not there; shard the model with FSDP2, as "
            "examples/accelerate/fsdp2.yaml has it, or launch data-parallel processes, as ddp.yaml has them."
        )


def _reduce_in_float32(accelerator: Any) -> None:
    """Compute in bfloat16 if that is asked for, but add up gradients in float32, as a single process does."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def check_tracker(name: str) -> str:
    """A tracker's name, if accelerate knows it and its package is there: accelerate itself goes on without."""
    from accelerate.tracking import get_available_trackers

    if name not in TRACKERS:
        raise OptionError(f"--track is {name!r}, expected {', '.join(TRACKERS)}.")
    if name not in {str(getattr(found, "value", found)) for found in get_available_trackers()}:
        raise OptionError(f"--track {name} needs the package of that name, which is not installed.")
    return name


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and from advising for a while."""
    logging = transformers_package().utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
