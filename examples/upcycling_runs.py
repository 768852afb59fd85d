"""The runs of `upcycling_curves.py`: train a dense model, upcycle it, train on, or train a mixture from scratch.

All training is `surgery.train`, all upcycling `surgery.upcycle`. Runs are kept, in a folder for each setting, and are
not done again: parts share them, and an interrupted experiment goes on in the middle of a run.

Every run of a comparison has the same data, order of batches (by the seed), learning rate and batch. The rate is
constant after a short warm-up and the same before and after upcycling, so that each point of a curve is what that much
training gives. The optimiser starts anew, also for the dense model that is trained on.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from show import console, steps
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from upcycling_data import SEEN, Data, picture_files, text_files
from upcycling_flops import TRAINING, forward_flops

import surgery
import surgery.moe  # so that transformers knows the classes that upcycled checkpoints ship
from surgery.checkpoint import open_checkpoint

WARMUP = 10
AUXILIARY, Z = 0.01, 0.001  # as the recipe `upcycle` has them; a dense model has neither


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One kind of model, and how long it is trained.

    Attributes:
        kind: `text` or `vision`.
        hidden, layers, heads, intermediate: of the dense model.
        experts: of the mixtures, unless an ablation says otherwise.
        before: steps of the dense model's first training.
        more: steps of an upcycled model after it.
        tuning: steps on the other task.
        batch: examples of a step.
        rate: the learning rate.
        tuning_rate: on the other task.
        every: steps between evaluations.
        measured: examples that are held out, at most.
        draws: how often each digit is there, with other noise.
        vocabulary, context, characters: of text.
    """

    kind: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    experts: int
    before: int
    more: int
    tuning: int
    batch: int
    rate: float
    tuning_rate: float
    every: int
    measured: int = 2000
    draws: int = 16
    vocabulary: int = 512
    context: int = 128
    characters: int = 1_200_000


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How a dense model is upcycled; `count` is K of top-k and C of expert choice."""

    experts: int
    router: str = "top-k"
    count: int = 2
    layers: str = "last:half"
    combine: str = "normalized"
    router_init: str = "normal:0.02"
    group: str = "sequence"
    init: str = "copy"

    def options(self) -> dict[str, Any]:
        """For `surgery.upcycle`. No native format of a Llama has mixtures in some layers and no shared expert."""
        chosen = asdict(self)
        count = chosen.pop("count")
        chosen["target"] = "shipped"
        return chosen | ({"top_k": count} if self.router == "top-k" else {"capacity": float(count)})


@dataclass(frozen=True)
class Point:
    """A model after some steps, on what is held out. Accuracy is of tokens or of pictures."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: the folder of what it wrote.
        seed: of everything random.
        parameters: of the model.
        step_flops: operations of a step.
        points: the first one before training.
        uncovered: tokens that no expert took, over the last evaluations of the log; 0 without mixtures.
        folder: where the trained model is.
    """

    name: str
    seed: int
    parameters: int
    step_flops: int
    points: tuple[Point, ...]
    uncovered: float
    folder: str

    @property
    def last(self) -> Point:
        return self.points[-1]

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.last.step * self.step_flops

    def at(self, flops: float, of: str = "loss") -> float | None:
        """Loss or accuracy after so many operations, in a straight line between evaluations; None if never reached."""
        places = [point.step * self.step_flops for point in self.points]
        if flops > places[-1]:
            return None
        after = next(number for number, place in enumerate(places) if place >= flops)
        high = float(getattr(self.points[after], of))
        if after == 0:
            return high
        low = float(getattr(self.points[after - 1], of))
        share = (flops - places[after - 1]) / (places[after] - places[after - 1])
        return low + share * (high - low)

    def reaches(self, loss: float) -> float | None:
        """Operations until the loss is first as low as this, in a straight line between evaluations; None if never."""
        before: Point | None = None
        for point in self.points:
            if point.loss <= loss:
                if before is None:
                    return 0.0
                share = (before.loss - loss) / (before.loss - point.loss)
                return (before.step + share * (point.step - before.step)) * self.step_flops
            before = point
        return None


class Bench:
    """Makes the runs of one kind of model, each once."""

    def __init__(self, folder: Path, setting: Setting, device: str) -> None:
        # Another setting is another folder, so that nothing is taken for what it is not.
        self.folder = folder / f"{setting.kind}-{zlib.crc32(repr(setting).encode()):08x}"
        self.setting, self.device = setting, device
        place = self.folder / "data"
        if setting.kind == "text":
            self.data = text_files(place, setting.vocabulary, setting.context, setting.characters, setting.measured)
        else:
            self.data = picture_files(place, setting.draws, setting.measured)

    # The arms ---------------------------------------------------------------------------------------------------------

    def dense(self, seed: int) -> Run:
        """The dense model's first training."""
        return self._run("dense", seed, self.setting.before, lambda place: self._fresh_dense(place, seed))

    def continued(self, flops: int, seed: int) -> Run:
        """The dense model trained on until it has had at least so many operations more."""
        start = self.dense(seed)
        count = -(-flops // start.step_flops)
        return self._run(f"continued-{count}", seed, count, lambda place: _copy(start, place))

    def upcycled(self, mixture: Mixture, seed: int) -> Run:
        """The dense model upcycled and trained on."""

        def make(place: Path) -> None:
            start = self.dense(seed).folder
            surgery.upcycle(
                start, output=place, overwrite=True, verify=False, hash=False, seed=seed, **mixture.options()
            )

        return self._run(f"upcycled-{_label(mixture)}", seed, self.setting.more, make)

    def scratch(self, mixture: Mixture, seed: int) -> Run:
        """The same mixture with fresh weights everywhere, trained for as many steps as the others in all."""

        def make(place: Path) -> None:
            shape = Path(self.upcycled(mixture, seed).folder)
            config = AutoConfig.from_pretrained(shape)
            auto = AutoModelForCausalLM if self.setting.kind == "text" else AutoModelForImageClassification
            torch.manual_seed(seed)
            model: Any = auto.from_config(config)  # type: ignore[no-untyped-call]  # transformers annotates little
            model.save_pretrained(place)

        return self._run(f"scratch-{_label(mixture)}", seed, self.setting.before + self.setting.more, make)

    def tuned(self, run: Run, seed: int) -> Run:
        """What a run wrote, tuned on the other task; pictures get a fresh head for its classes."""
        data = replace(self.data, train=self.data.other_train, held_out=self.data.other_held_out)
        return self._run(f"tuned-{run.name}", seed, self.setting.tuning, lambda place: _copy(run, place), data)

    # One run ----------------------------------------------------------------------------------------------------------

    def _run(self, name: str, seed: int, count: int, make: Callable[[Path], None], data: Data | None = None) -> Run:
        """Make what the run begins with, measure it, train it and measure it again and again."""
        place = self.folder / f"{name}-{seed}"
        record = place.with_name(f"{place.name}.json")
        if record.is_file():
            return _run_of(json.loads(record.read_text(encoding="utf-8")))
        start = place.with_name(place.name + "-start")
        if not start.exists():  # else it is of a run that was interrupted, and `surgery.train` goes on with that one
            making = place.with_name(place.name + "-making")
            shutil.rmtree(making, ignore_errors=True)
            make(making)
            making.rename(start)
        order = seed if name == "dense" else seed + 1000  # of batches: not once more that of the first training
        points = [self._before(start, place.with_name(place.name + "-measured"), order, data)]
        label = f"{self.setting.kind} {name}, seed {seed}"
        with steps(label, count) as step:
            log = self._train(start, place, count, order, data, progress=_Shown(step))
        points += [_point(line) for line in log if "eval_loss" in line]
        console.print(f"{label}: loss {points[0].loss:.4f} to {points[-1].loss:.4f}")
        uncovered = [share for line in log[-20:] for share in (line.get("uncovered") or {}).values()]
        run = Run(
            name,
            seed,
            sum(tensor.numel for tensor in open_checkpoint(start).tensors.values()),
            TRAINING * self.setting.batch * forward_flops(start, self.setting.context),
            tuple(points),
            sum(uncovered) / max(1, len(uncovered)),
            str(place),
        )
        shutil.rmtree(start)
        record.write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")
        return run

    def _before(self, start: Path, output: Path, seed: int, data: Data | None) -> Point:
        """The held-out loss before training, measured as it is later on: a step at a rate of zero changes nothing."""
        log = self._train(start, output, 1, seed, data, learning_rate=0.0)
        shutil.rmtree(output)
        return replace(_point(log[-1]), step=0)

    def _train(
        self, start: Path, output: Path, count: int, seed: int, data: Data | None, **options: Any
    ) -> list[dict[str, Any]]:
        setting, used = self.setting, data or self.data
        tuning = data is not None
        given: dict[str, Any] = {
            "method": "full",
            "learning_rate": setting.tuning_rate if tuning else setting.rate,
            "schedule": "constant",
            "warmup": WARMUP,
            "batch_size": setting.batch,
            "router_aux_loss": AUXILIARY,
            "router_z_loss": Z,
            "seed": seed,
            "new_head": tuning and setting.kind == "vision",
        }
        surgery.train(
            start,
            data=used.train,
            eval_data=str(used.held_out),
            output=output,
            overwrite=True,
            hash=False,
            steps=count,
            eval_every=setting.every,
            save_every=max(1000, setting.every),
            keep="last",
            device=self.device,
            **{**given, **options},
        )
        lines = (output / "training" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _fresh_dense(self, place: Path, seed: int) -> None:
        setting = self.setting
        torch.manual_seed(seed)
        shape: dict[str, Any] = {
            "hidden_size": setting.hidden,
            "intermediate_size": setting.intermediate,
            "num_hidden_layers": setting.layers,
            "num_attention_heads": setting.heads,
        }
        if setting.kind == "text":
            config = LlamaConfig(
                vocab_size=setting.vocabulary,
                max_position_embeddings=setting.context,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=0,
                **shape,
            )
            LlamaForCausalLM(config).save_pretrained(place)
            return
        pictures = ViTConfig(image_size=8, patch_size=2, num_channels=1, **shape)
        pictures.num_labels = len(SEEN)
        ViTForImageClassification(pictures).save_pretrained(place)


class _Shown:
    """Tells a bar about each step."""

    def __init__(self, step: Callable[[str], None]) -> None:
        self._step = step

    def start(self, steps: int, done: int) -> None:  # noqa: ARG002 - the bar knows how many there are
        for _ in range(done):
            self._step("done before")

    def step(self, line: dict[str, Any]) -> None:
        self._step(f"loss {line['loss']:.3f}")

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


def _point(line: dict[str, Any]) -> Point:
    accuracy = line["eval_accuracy"] if "eval_accuracy" in line else line["eval_token_accuracy"]
    return Point(line["step"], line["eval_loss"], accuracy)


def _run_of(stored: dict[str, Any]) -> Run:
    return Run(**{**stored, "points": tuple(Point(**point) for point in stored["points"])})


def _copy(run: Run, place: Path) -> None:
    shutil.copytree(run.folder, place)


def _label(mixture: Mixture) -> str:
    """A mixture as a part of a folder's name: experts, K or C, layers, and whatever else is not as by default."""
    usual = {field.name: field.default for field in fields(Mixture)}
    parts = [f"{mixture.experts}x{mixture.count}", mixture.router, mixture.layers]
    rest = ("combine", "router_init", "group", "init")
    parts += [str(getattr(mixture, name)) for name in rest if getattr(mixture, name) != usual[name]]
    return "-".join(parts).replace(":", "").replace("%", "")
