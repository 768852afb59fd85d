"""The state of a run on disk: everything that the next forward pass depends on, so that it goes on bit for bit.

    <staging>/state/
        run.json             what is being trained, and how; another command is refused
        log.jsonl            the log so far
        latest.json          the name of the folder that counts, written last
        <step>-<pass>/       main.safetensors (weights, optimiser), process-<r>.safetensors (gradients, random numbers)
        best.safetensors     the weights of the best evaluation

Weights and optimiser of a model that is spread over processes are in the files of the processes, each its shards.
A folder is complete before `latest.json` names it, and the one before is removed after that. Tensors only, no pickles.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import FormatError, OptionError, OutputError
from surgery.training.sharding import like, shard
from surgery.writer import staging_folder, sync

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        step: steps that are done.
        passes: forward passes of the next step that are done; their gradients are in the state.
        tokens: read so far, padding not counted.
        seconds: spent training.
        log_bytes: of the log that belong to what is done.
        best_loss: of the best evaluation; None before the first.
        best_step: when that was.
        stale: evaluations since then.
        first_loss, last_loss: of the first step and of the latest one.
        eval_loss: of the latest evaluation.
        threads: that torch computes with; sums have other bits with another number of them.
    """

    step: int = 0
    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    eval_loss: float | None = None
    threads: int = 0


def check_same(root: Path, run: Mapping[str, object], target: Path) -> bool:
    """Note what is being trained, or hold it against what an interrupted run noted. True if that goes on.

    Raises:
        OptionError: the arguments are others; the differences are named.
    """
    place = root / "run.json"
    run = json.loads(json.dumps(run))  # as it will be read
    if (root / "latest.json").is_file() and place.is_file():
        earlier = _json(place)
        names = sorted(name for name in {*earlier, *run} if earlier.get(name) != run.get(name))
        differences = [f"{name} was {earlier.get(name)!r} and is {run.get(name)!r}" for name in names]
        if differences:
            raise OptionError(
                f"An interrupted run lies in {staging_folder(target)}, begun with other arguments: "
                f"{'; '.join(differences)}; give the same ones to go on, or delete the folder to begin anew."
            )
        return True
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    place.write_text(json.dumps(run, indent=1))
    return False


@contextlib.contextmanager
def same_threads(root: Path) -> Iterator[None]:
    """Compute with as many threads as the interrupted run in `root` did, if there is one: the bits depend on it."""
    import torch

    before = torch.get_num_threads()
    try:
        saved = _json(root / "latest.json").get("threads") if (root / "latest.json").is_file() else None
        if isinstance(saved, int) and 0 < saved <= 1024:
            torch.set_num_threads(saved)
        yield
    finally:
        torch.set_num_threads(before)


def save(
    root: Path, position: Position, main: Tensors | None, own: Tensors, process: int, wait: Callable[[], None]
) -> None:
    """Write the state. Called by all processes; `main` is given by the first one, and `wait` waits for all of them."""
    name = f"{position.step}-{position.passes}"
    place = root / name
    with full_disk(root):
        place.mkdir(exist_ok=True)
        _write(place / f"process-{process}.safetensors", own)
        if main is not None:
            _write(place / "main.safetensors", main)
        wait()
        if main is not None:
            _replace(root / "latest.json", json.dumps({"state": name, **asdict(position)}).encode())
            for other in root.iterdir():
                if other.is_dir() and other.name != name:
                    shutil.rmtree(other, ignore_errors=True)
    wait()


def load(root: Path, process: int) -> tuple[Position, Tensors, Tensors]:
    """The position, the tensors of all and those of one process."""
    from safetensors.torch import load_file

    found = _json(root / "latest.json")
    try:
        place = root / str(found.pop("state"))
        position = Position(**found)
        return position, load_file(place / "main.safetensors"), load_file(place / f"process-{process}.safetensors")
    except (OSError, KeyError, TypeError) as error:
        raise FormatError(
            f"The state in {root} cannot be read ({error}); delete {root.parent} to begin anew."
        ) from error


def save_best(root: Path, weights: Tensors) -> None:
    """Keep the weights of an evaluation that is better than all before."""
    with full_disk(root):
        _write(root / "best.safetensors", weights)


def load_best(root: Path) -> Tensors:
    """The weights of the best evaluation."""
    from safetensors.torch import load_file

    return load_file(root / "best.safetensors")


# Tensors of a model, an optimiser, and the random numbers -------------------------------------------------------------


def weights_of(model: Any) -> Tensors:
    """Everything of a model that training changes: trainable parameters and buffers that it stores, by name."""
    # First, since it takes back what an evaluation has gathered of a sharded model, which frees those parameters.
    stored = model.state_dict()
    parameters = dict(model.named_parameters())
    found = {name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    return found | {name: stored[name] for name in stored if name in buffers}


def put_weights(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into a model, in place; into one that is spread over processes, the shards of this one."""
    import torch

    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            shard(places[name]).copy_(tensor)


def optimizer_tensors(optimizer: Any) -> Tensors:
    """The optimiser's memory, by number of the parameter and name."""
    import torch

    found: Tensors = {}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            found[f"{number}/{name}"] = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    return found


def put_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the optimiser its memory back; learning rates are set before every step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = like(parameters[int(number)], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors() -> Tensors:
    """The state of every generator of random numbers, as tensors."""
    import numpy as np
    import torch

    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, second = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.rest": torch.tensor([float(place), float(has_gauss), float(gauss)], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.rest": torch.tensor([float(version), float("nan") if second is None else second], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def put_random(tensors: Mapping[str, torch.Tensor]) -> None:
    """Set every generator of random numbers."""
    import math

    import numpy as np
    import torch

    torch.set_rng_state(tensors["torch"])
    place, has_gauss, gauss = tensors["numpy.rest"].tolist()
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), int(place), int(has_gauss), gauss))
    version, second = tensors["python.rest"].tolist()
    random.setstate((int(version), tuple(tensors["python"].tolist()), None if math.isnan(second) else second))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def below(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tensors:
    """Those whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(root: Path) -> Iterator[None]:
    """Say in one sentence that the state cannot be written, and what is left."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "os error 122" in str(error)
        why = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        kept = "the last good one is kept; " if (root / "latest.json").is_file() else ""
        cause = error if isinstance(error, OSError) else OSError(errno.ENOSPC if full else errno.EIO, str(error))
        raise OutputError(
            f"The state of the run cannot be written to {root}: {why}; {kept}"
            "free some space and run the same command again to go on."
        ) from cause


def _write(path: Path, tensors: Tensors) -> None:
    """Write tensors to a file that appears whole; of those that are spread over processes, what is here."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".part")
    try:
        save_file({n: shard(tensor).detach().cpu().contiguous().clone() for n, tensor in tensors.items()}, temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}); delete {path.parent.parent} to begin anew.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} is no object; delete {path.parent.parent} to begin anew.")
    return found
