"""The upcycling experiment in its quick form: what holds by construction, and that operations are counted right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from upcycling_curves import SIZES, ablations, compare, experiment, main_mixture, tune
from upcycling_data import NOISE, SEEN, noisy
from upcycling_flops import forward_flops
from upcycling_probe import least_squares
from upcycling_runs import Bench, Mixture, Point, Run
from upcycling_tables import Arms, crossings, gains, mean, stays_below

import surgery

CONTEXT = 16


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are slower on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Operations -----------------------------------------------------------------------------------------------------------


def make_llama(folder: Path) -> Path:
    """Width 32, 2 layers, 4 heads of 8, keys and values of 2; MLP 48; 50 tokens."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_vit(folder: Path) -> Path:
    """Width 32, 2 layers, 4 heads; MLP 48; 16 patches of 4 pixels and the class token; 6 classes."""
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2,
        num_channels=1,
    )  # fmt: skip
    config.num_labels = 6
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


def counted(folder: Path) -> int:
    """What torch counts while one example goes through the stored model."""
    if "patch_size" in json.loads((folder / "config.json").read_bytes()):
        model = AutoModelForImageClassification.from_pretrained(folder, attn_implementation="eager")
        inputs = {"pixel_values": torch.rand(1, 1, 8, 8)}
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        inputs = {"input_ids": torch.randint(50, (1, CONTEXT))}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def test_operations_of_dense_models_by_hand_and_by_torch(tmp_path: Path) -> None:
    llama, vit = make_llama(tmp_path / "llama"), make_vit(tmp_path / "vit")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # queries and output, keys and values, gate, up and down
    by_hand = CONTEXT * 2 * (2 * layer + 32 * 50) + 2 * 4 * CONTEXT * CONTEXT * 32
    assert forward_flops(llama, CONTEXT) == by_hand
    layer = 4 * 32 * 32 + 2 * 32 * 48
    by_hand = 17 * 2 * 2 * layer + 16 * 2 * 4 * 32 + 2 * 32 * 6 + 2 * 4 * 17 * 17 * 32
    assert forward_flops(vit, 0) == by_hand
    for folder in (llama, vit):
        assert counted(folder) == forward_flops(folder, CONTEXT)


@pytest.mark.parametrize(
    "mixture",
    [
        Mixture(experts=4),
        Mixture(experts=6, count=3, layers="all"),
        Mixture(experts=8, router="expert-choice", layers="all"),
        Mixture(experts=32, router="expert-choice", count=1),
        Mixture(experts=2, router="expert-choice", count=3),
        Mixture(experts=4, router="expert-choice", group="batch"),
    ],
    ids=str,
)
def test_operations_of_mixtures_are_those_that_torch_counts(tmp_path: Path, mixture: Mixture) -> None:
    make = make_llama if mixture.router == "top-k" else make_vit
    dense = make(tmp_path / "dense")
    made = tmp_path / "moe"
    surgery.upcycle(dense, output=made, verify=False, hash=False, **mixture.options())
    found = forward_flops(made, CONTEXT)
    if mixture.group == "batch":  # of one picture the rounding shows
        assert found <= counted(made) <= 1.1 * found
    else:
        assert counted(made) == found


def test_operations_of_a_native_mixture_are_those_of_the_shipped_one(tmp_path: Path) -> None:
    dense = make_llama(tmp_path / "dense")
    mixture = Mixture(experts=4, layers="all")
    surgery.upcycle(dense, output=tmp_path / "shipped", verify=False, hash=False, **mixture.options())
    native = mixture.options() | {"target": "mixtral"}
    surgery.upcycle(dense, output=tmp_path / "native", verify=False, hash=False, **native)
    assert forward_flops(tmp_path / "native", CONTEXT) == forward_flops(tmp_path / "shipped", CONTEXT)


# Comparing ------------------------------------------------------------------------------------------------------------


def made_run(step_flops: int, *losses: float) -> Run:
    """A run measured every ten steps."""
    points = tuple(Point(10 * number, loss, 0.5) for number, loss in enumerate(losses))
    return Run("run", 0, 100, step_flops, points, 0.0, "folder")


def test_losses_between_evaluations_lie_on_a_straight_line() -> None:
    run = made_run(2, 4.0, 3.0, 2.5)
    assert [run.at(flops) for flops in (0, 10, 20, 30, 40)] == [4.0, 3.5, 3.0, 2.75, 2.5]
    assert run.at(40.1) is None
    assert [run.reaches(loss) for loss in (5.0, 4.0, 3.5, 2.75, 2.4)] == [0.0, 0.0, 10.0, 30.0, None]


def test_equal_steps_and_equal_operations_are_told_apart() -> None:
    """The upcycled model costs twice as much a step: in ten steps it gets what the dense model gets in twenty."""
    arms = Arms(made_run(1, 5.0, 4.0), made_run(1, 4.0, 3.0, 2.0, 1.0, 0.5), made_run(2, 4.0, 2.5, 0.2))
    assert arms.gain(at_equal_flops=False) == pytest.approx(2.0 - 0.2)
    assert arms.gain(at_equal_flops=True) == pytest.approx(0.5 - 0.2)
    # Above the dense curve after 20 operations (2.5 against 2.0), below after 40; the first training took 10.
    assert stays_below(arms) == 4.0
    assert stays_below(dataclasses.replace(arms, upcycled=made_run(2, 4.0, 1.0, 0.6))) is None
    found = dataclasses.replace(arms, scratch=made_run(2, 6.0, 5.0, 3.0, 1.0))
    assert crossings([found, arms]) == {
        "upcycled stays below dense from": "400%, 400%",
        "from scratch reaches the dense model's first loss at": "300%",
        "from scratch reaches the upcycled model's last loss at": "not within 600%",
    }


def test_means_and_gains_over_seeds() -> None:
    assert mean([1.0, 3.0]) == "2.000 ± 1.414"
    assert mean([1.0]) == "1.000"
    assert mean([1.0, None]) == "-"
    assert gains([0.5, -0.1]) == "+0.200 ± 0.424 (1/2)"


def test_the_probe_tells_what_lies_apart() -> None:
    random = np.random.default_rng(0)
    classes = np.repeat([3, 7, 9], 10)
    centres = {3: [5.0, 0.0], 7: [0.0, 5.0], 9: [-5.0, -5.0]}
    shots = np.array([centres[name] for name in classes]) + random.standard_normal((30, 2))
    assert list(least_squares(shots, classes, np.array([[6.0, 0.0], [0.0, 4.0], [-4.0, -5.0]]))) == [3, 7, 9]


def test_noise_fits_into_bytes() -> None:
    images = np.zeros((50, 8, 8))
    made = noisy(images, np.random.default_rng(0))
    assert made.shape == (50, 1, 8, 8)
    back = made / 255 * 3 - 1
    assert abs(back.mean()) < 0.05
    assert back.std() == pytest.approx(NOISE, rel=0.05)


# The experiment -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are kept that tests share."""
    return tmp_path_factory.mktemp("curves")


@pytest.mark.slow
def test_the_quick_experiment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and vision, one seed: every run is there, starts where it should, and is not made twice."""
    settings = SIZES["quick"]
    benches = {setting.kind: Bench(folder, setting, "cpu") for setting in settings}
    experiment(("text", "vision"), benches, [0], folder)
    shown = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_bytes())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for setting in settings:
        (arms,) = results[setting.kind]
        assert f"{setting.kind}: held-out loss" in shown
        dense, continued, upcycled, scratch = (arms[name] for name in ("dense", "continued", "upcycled", "scratch"))
        # Both go on from the dense model, to the bit; the mixture with normalised weights is the same function.
        assert continued["points"][0]["loss"] == dense["points"][-1]["loss"]
        if setting.kind == "text":
            assert upcycled["points"][0]["loss"] == pytest.approx(continued["points"][0]["loss"], abs=1e-5)
        guess = np.log(setting.vocabulary if setting.kind == "text" else len(SEEN))
        assert scratch["points"][0]["loss"] == pytest.approx(guess, rel=0.1)
        assert scratch["parameters"] == upcycled["parameters"] > dense["parameters"]
        assert scratch["step_flops"] == upcycled["step_flops"] > dense["step_flops"] == continued["step_flops"]
        assert [arms[name]["points"][-1]["step"] for name in ("dense", "upcycled", "scratch")] == [
            setting.before, setting.more, setting.before + setting.more,
        ]  # fmt: skip
        # The dense model has had as many operations as the mixture, and less than a step more.
        cost = upcycled["points"][-1]["step"] * upcycled["step_flops"]
        assert 0 <= continued["points"][-1]["step"] * continued["step_flops"] - cost < continued["step_flops"]
    assert compare(benches["text"], main_mixture(settings[0]), 0).dense.points
    assert "steps in" not in capsys.readouterr().out, "what is done is not done again"


@pytest.mark.slow
def test_a_model_is_tuned_and_probed_on_other_digits(folder: Path) -> None:
    setting = SIZES["quick"][1]
    found = tune(Bench(folder, setting, "cpu"), main_mixture(setting), 0)
    assert [item.arm for item in found][1:3] == ["dense, trained on", "upcycled"]
    for item in found:
        # A fresh head of ten: nothing is known at first.
        assert item.run.points[0].loss == pytest.approx(np.log(10), rel=0.1)
        assert item.probe is not None
        assert 0.15 < item.probe <= 1


def test_an_ablation_changes_one_thing(tmp_path: Path) -> None:
    """Each is a mixture that can be made, and differs from the first in the router or in one field."""
    setting = dataclasses.replace(SIZES["small"][1], hidden=16, heads=2, intermediate=16)
    chosen = list(ablations(setting).values())
    base = dataclasses.asdict(chosen[0])
    for mixture in chosen[1:]:
        changed = {name for name, value in dataclasses.asdict(mixture).items() if value != base[name]}
        assert len(changed - {"router", "group"}) == 1 or changed == {"router"} or mixture.count == 1
    assert len(set(chosen)) == len(chosen)
    dense = tmp_path / "dense"
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=2,
        num_channels=1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(dense)
    for mixture in chosen:
        report = surgery.upcycle(
            dense, output=tmp_path / "moe", overwrite=True, dry_run=True, hash=False, **mixture.options()
        )
        (stack,) = report.stacks
        assert (stack.experts, stack.top_k or stack.capacity) == (mixture.experts, mixture.count)
