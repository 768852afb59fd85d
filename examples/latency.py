"""What adapters cost when a model runs, and what LoRA saves when it is trained (Hu et al. 2021, sections 3 to 5).

forward   one forward pass of the base, of LoRA merged into it by `surgery merge`, of LoRA beside it, of bottleneck
          adapters (two to a layer, and one), and of a prefix, at batch sizes 1 and 8. The paper measures +20.7% and
          +30.3% for adapters of 11 million parameters on GPT-2 medium with one sequence of 128 tokens, +2 to 3% with 32
          of 512, and nothing for merged LoRA (table 1).
training  one step of full tuning and one of LoRA: the paper says LoRA is 25% faster.

The model is a GPT-2 with random weights: latency does not depend on their values. Adapters are as large for the model
as the paper's are for GPT-2 medium. Variants take turns, in another order each round, so that other work on the machine
slows all of them alike; ratios are of the same round. Where cores are shared, processor time is the better figure.

    python examples/latency.py [--size SIZE] [--device DEVICE] [--dtype DTYPE] [--length N] [--rounds N] [--seed N]
                               [--threads N] [--quick] [--folder FOLDER]

Tables are printed; `latency.json` and `latency.png` are written into the folder. On a GPU, `--size medium --device
cuda` is the paper's model.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.table import Table
from show import console, heading, steps
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging
from tuning import write_json

import surgery
from surgery.training.methods import MethodOptions, apply_method, load_method
from surgery.training.options import TrainOptions
from surgery.training.rates import make_optimizer

BATCHES = (1, 8)
BASE = "base"
MERGED = "LoRA, merged"


@dataclass(frozen=True)
class Size:
    """A GPT-2: `hidden` wide, with so many layers, heads and words."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 50257


SIZES = {
    "quick": Size(64, 2, 2, 512),
    "tiny": Size(256, 6, 4, 2048),
    "small": Size(768, 12, 12),
    "medium": Size(1024, 24, 16),
    "large": Size(1280, 36, 20),
    "xl": Size(1600, 48, 25),
}


@dataclass(frozen=True)
class Timing:
    """How long one turn took, by round, in seconds: by the clock, and of the processor."""

    wall: list[float]
    cpu: list[float]


@dataclass(frozen=True)
class Row:
    """One variant at one batch size: its timing, over so many passes a turn, and the base's in the same rounds."""

    name: str
    batch: int
    passes: int
    parameters: int
    timing: Timing
    base: Timing

    def ratios(self, clock: str) -> list[float]:
        """Over the base's time, round by round; `clock` is `wall` or `cpu`."""
        return [own / base for own, base in zip(getattr(self.timing, clock), getattr(self.base, clock), strict=True)]


def methods(size: Size) -> dict[str, MethodOptions]:
    """What is put beside the model: LoRA as in the paper, and adapters of the share that 11M have in GPT-2 medium."""
    return {
        "LoRA": MethodOptions("lora", rank=4, targets="c_attn"),
        "adapter-h": MethodOptions("adapter-h", rank=max(1, round(112 * size.hidden / 1024))),
        "adapter-l": MethodOptions("adapter-l", rank=max(1, round(224 * size.hidden / 1024))),
        "prefix": MethodOptions("prefix", prompt_tokens=16),
    }


def make_base(folder: Path, size: Size, length: int, seed: int) -> Path:
    """A GPT-2 with random weights and no dropout, on disk."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=size.hidden,
        n_layer=size.layers,
        n_head=size.heads,
        vocab_size=size.vocabulary,
        n_positions=max(1024, 2 * length),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(place: Path, device: str, dtype: torch.dtype) -> Any:
    """A checkpoint, ready to run."""
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    return model.to(device)


def make_variants(folder: Path, size: Size, base: Path, device: str, dtype: torch.dtype) -> dict[str, tuple[Any, int]]:
    """Every variant, ready to run, and how many parameters it adds; adapters are saved and loaded as users do it."""

    def model(place: Path) -> Any:
        return load(place, device, dtype).eval()

    found: dict[str, tuple[Any, int]] = {BASE: (model(base), 0), MERGED: (None, 0)}
    for name, options in methods(size).items():
        place = folder / name
        prepared = apply_method(AutoModelForCausalLM.from_pretrained(base), options)
        disturb(prepared.model)
        prepared.save(place)
        found[name] = (load_method(model(base), place).to(device).eval(), prepared.trainable)
        if name == "LoRA":
            surgery.merge(base, place, output=folder / "merged", hash=False)
            found[MERGED] = (model(folder / "merged"), 0)
    return found


@torch.no_grad()
def disturb(model: Any) -> None:
    """Adapters begin as the identity; this gives them something to do, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.02)


def clock(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of one call, by the clock and of the processor; a GPU is waited for."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def take_turns(
    label: str, works: Mapping[str, Callable[[], object]], rounds: int, device: str, seed: int
) -> dict[str, Timing]:
    """Time every work once a round, in an order drawn anew; two rounds before that do not count."""
    found = {name: Timing([], []) for name in works}
    order = random.Random(seed)
    with steps(label, rounds + 2) as step:
        for number in range(-2, rounds):
            for name in order.sample([*works], len(works)):
                wall, cpu = clock(works[name], device)
                if number >= 0:
                    found[name].wall.append(wall)
                    found[name].cpu.append(cpu)
            step(f"{len(works)} variants")
    return found


@torch.no_grad()
def measure_forward(variants: dict[str, tuple[Any, int]], ids: torch.Tensor, rounds: int, seed: int) -> list[Row]:
    """Forward passes of every variant over `ids` [B, T]; fewer rows, more passes to one timing."""
    batch, passes = len(ids), max(BATCHES) // len(ids)
    works = {name: forward(model, ids, passes) for name, (model, _) in variants.items()}
    found = take_turns(f"forward passes, batch {batch}", works, rounds, ids.device.type, seed)
    return [Row(name, batch, passes, variants[name][1], found[name], found[BASE]) for name in found]


def forward(model: Any, ids: torch.Tensor, times: int) -> Callable[[], object]:
    """Forward passes, without a cache of keys and values, which a single pass has no use for."""

    def work() -> None:
        for _ in range(times):
            model(input_ids=ids, use_cache=False)

    return work


def measure_training(base: Path, ids: torch.Tensor, rounds: int, seed: int, dtype: torch.dtype) -> list[Row]:
    """Training steps of full tuning and of LoRA on the same rows, with `train`'s optimiser and its float32 weights."""
    chosen = {
        "full": TrainOptions(data="", method="full"),
        "LoRA, q k v": TrainOptions(data="", method="lora", rank=4, targets="c_attn"),
        "LoRA, all linear": TrainOptions(data="", method="lora", rank=16),
    }
    works: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for name, options in chosen.items():
        model = load(base, str(ids.device), torch.float32)
        prepared = apply_method(model.train(), options, learning_rate=1e-5)
        works[name] = training_step(prepared.model, make_optimizer(prepared.optimizer_groups(), options), ids, dtype)
        sizes[name] = prepared.trainable
    found = take_turns("training steps", works, rounds, ids.device.type, seed)
    return [Row(name, len(ids), 1, sizes[name], found[name], found["full"]) for name in found]


def training_step(model: Any, optimizer: Any, ids: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Forward, backward, update."""

    def step() -> None:
        with torch.autocast(ids.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits  # [B, T, V]
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def show(title: str, rows: Sequence[Row], reference: str) -> None:
    """Medians of both clocks, and of the ratios round by round with their quartiles."""
    heading(title)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "batch", "parameters", "wall ms", f"wall / {reference}", "CPU ms", f"CPU / {reference}"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        cells = []
        for kind in ("wall", "cpu"):
            ratios = row.ratios(kind)
            low, high = spread(ratios)
            cells.append(f"{1000 * median(getattr(row.timing, kind)) / row.passes:.2f}")
            cells.append(f"{median(ratios):.3f} ({low:.3f} to {high:.3f})" if row.name != reference else "1")
        table.add_row(row.name, str(row.batch), f"{row.parameters:,}", *cells)
    console.print(table)


def draw(forward_rows: Sequence[Row], training_rows: Sequence[Row], kind: str, file: Path) -> None:
    """The ratios as bars with their quartiles, variants on the left and training on the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(2, 1))
    batches = sorted({row.batch for row in forward_rows})
    for number, batch in enumerate(batches):
        own = [row for row in forward_rows if row.batch == batch and row.name != BASE]
        at = [index + 0.4 * (number - (len(batches) - 1) / 2) for index in range(len(own))]
        _bars(axes[0], at, own, kind, 0.38, f"batch {batch}")
        axes[0].set_xticks(range(len(own)), [row.name for row in own])
    _bars(axes[1], range(len(training_rows)), training_rows, kind, 0.6, "")
    axes[1].set_xticks(range(len(training_rows)), [row.name for row in training_rows])
    axes[0].set(title="forward pass", ylabel=f"{kind} time / base's")
    axes[1].set(title="training step", ylabel=f"{kind} time / full tuning's")
    axes[0].legend()
    for axis in axes:
        axis.axhline(1, color="grey", linestyle=":")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _bars(axis: Any, at: Sequence[float], rows: Sequence[Row], kind: str, width: float, label: str) -> None:
    middles = [median(row.ratios(kind)) for row in rows]
    ends = [spread(row.ratios(kind)) for row in rows]
    errors = [
        [middle - low for middle, (low, _) in zip(middles, ends, strict=True)],
        [high - middle for middle, (_, high) in zip(middles, ends, strict=True)],
    ]
    axis.bar(at, middles, width, yerr=errors, label=label)


def main() -> None:
    """Make the model and its variants, time them, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES], default="tiny", help="of the GPT-2 (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and passes")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="timings of each variant (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and order (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the processor (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a model too small to say anything, five rounds")
    parser.add_argument("--folder", type=Path, default=Path(".demo/latency"), help="where to work")
    given = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers annotates little
    torch.set_num_threads(given.threads)
    name, rounds, length = ("quick", 5, 32) if given.quick else (given.size, given.rounds, given.length)
    size, dtype = SIZES[name], getattr(torch, given.dtype)
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    base = make_base(given.folder / "base", size, length, given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    ids = torch.randint(size.vocabulary, (max(BATCHES), length), generator=generator).to(given.device)
    variants = make_variants(given.folder, size, base, given.device, dtype)
    forward_rows = [row for batch in BATCHES for row in measure_forward(variants, ids[:batch], rounds, given.seed)]
    variants.clear()
    training_rows = measure_training(base, ids, rounds, given.seed, dtype)
    where = f"GPT-2 {name} ({size.hidden} x {size.layers}), {length} tokens, {given.dtype}, {given.device}"
    show(f"One forward pass: {where}; medians of {rounds} rounds, quartiles", forward_rows, BASE)
    show(f"One training step: {where}", training_rows, "full")
    content = {
        "settings": {key: str(value) for key, value in vars(given).items()}
        | {"size": name, "torch": torch.__version__},
        "forward": [asdict(row) for row in forward_rows],
        "training": [asdict(row) for row in training_rows],
    }
    write_json(given.folder / "latency.json", content)
    kind = "cpu" if given.device == "cpu" else "wall"
    draw(forward_rows, training_rows, kind, given.folder / "latency.png")
    console.print(f"\n{given.folder / 'latency.json'}, {given.folder / 'latency.png'}")


if __name__ == "__main__":
    main()
