"""Mixtures of experts of both kinds: their losses, and what the log says about their routers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery
from surgery.errors import OptionError
from surgery.training.routers import Routers
from tests.surgery.training import making

STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
KINDS = {
    "native": ("llama", {"experts": 4}),
    "shipped": ("gpt2", {"experts": 4}),
    "expert-choice": ("gpt2", {"experts": 4, "router": "expert-choice", "capacity": 1.0, "allow_future": True}),
}


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("upcycled"), {}
    for name, (kind, how) in KINDS.items():
        dense = making.checkpoint(folder / f"{name}-dense", kind, **(STILL if kind == "gpt2" else {}))
        surgery.upcycle(dense, output=folder / name, router_init="normal:0.5", **how)  # type: ignore[arg-type]  # keywords of a table
        found[name] = folder / name
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "texts.jsonl", 16)


HOW: dict[str, Any] = {
    "steps": 3, "batch_size": 4, "gradient_accumulation": 2, "learning_rate": 1e-3, "max_length": 64,
    "over_length": "truncate", "router_aux_loss": 0.02, "router_z_loss": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_trains(kind: str, upcycled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Loads again as what it was; the log has shares that add up to one, entropy, and uncovered tokens."""
    making.run(upcycled[kind], data, tmp_path / "out", **HOW)
    lines = [line for line in making.log(tmp_path / "out") if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert len(line["load"]) == 2
        for layer, shares in line["load"].items():
            assert len(shares) == 4
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert 0 < line["router_entropy"][layer] <= math.log(4) + 1e-6
            assert (line["uncovered"][layer] > 0) == (kind == "expert-choice")
        assert line["z_loss"] > 0
        assert (line["aux_loss"] == 0) == (kind == "expert-choice")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == transformers.AutoConfig.from_pretrained(upcycled[kind]).model_type
    before, after = (surgery.inspect(str(place)).as_dict() for place in (upcycled[kind], tmp_path / "out"))
    assert before["parts"] == after["parts"]
    assert surgery.verify(tmp_path / "out").passed


def test_the_load_balancing_loss_is_that_of_transformers(upcycled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Of the native kind, for one pass; padding does not count."""
    how = {**HOW, "steps": 1, "batch_size": 16, "gradient_accumulation": 1}
    making.run(upcycled["native"], data, tmp_path / "out", **how)
    (line,) = making.log(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(upcycled["native"])
    tokenizer = making.tokenizer()
    rows = [[*row, 0][:64] for row in tokenizer(making.paragraphs()[:16])["input_ids"]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        outputs = model(ids, attention_mask=mask, output_router_logits=True)
    assert line["aux_loss"] == pytest.approx(float(outputs.aux_loss), rel=1e-5)
    z = [logits.view(*mask.shape, -1)[mask.bool()].logsumexp(-1).square().mean() for logits in outputs.router_logits]
    assert line["z_loss"] == pytest.approx(float(torch.stack(z).mean()), rel=1e-5)


def test_losses_of_routers_reach_them(upcycled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """A large z-loss makes logits small."""
    how = {**HOW, "steps": 15, "learning_rate": 5e-3, "router_aux_loss": 0.0}
    for kind in ("native", "shipped"):
        making.run(upcycled[kind], data, tmp_path / f"{kind}-z", **{**how, "router_z_loss": 1.0})
        lines = making.log(tmp_path / f"{kind}-z")
        assert lines[-1]["z_loss"] < 0.5 * lines[0]["z_loss"]


def test_the_portions_of_a_step_do_not_matter(upcycled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The routers' losses are means over tokens, weighted by what each pass has to learn."""
    for batch, accumulation in ((8, 1), (4, 2)):
        how = {**HOW, "batch_size": batch, "gradient_accumulation": accumulation, "steps": 1, "router_aux_loss": 0.0}
        making.run(upcycled["shipped"], data, tmp_path / f"{batch}", **how)
    whole, parts = (making.log(tmp_path / name)[0] for name in ("8", "4"))
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    assert parts["z_loss"] == pytest.approx(whole["z_loss"], rel=2e-2)  # counted by predictions, not by tokens
    assert parts["load"] == whole["load"]


def test_experts_that_choose_cannot_have_packed_rows(upcycled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="with expert choice the tokens of a row compete"):
        making.run(upcycled["expert-choice"], data, tmp_path / "out", packing=True, **HOW)


def test_switch_drops_what_is_beyond_capacity() -> None:
    """Load and uncovered tokens are counted after that."""
    model = making.model("switch").eval()
    routers = Routers.of(model, None, None)
    assert routers is not None
    ids = torch.randint(1, 64, (2, 20))
    mask = torch.ones_like(ids)
    outputs = model(ids, attention_mask=mask, decoder_input_ids=ids[:, :8], **routers.call)
    routings = routers.routings(outputs, mask)
    assert set(routings) == {"encoder.0", "decoder.0"}
    routers.observe(routings)
    figures = routers.figures()
    assert all(share > 0 for share in [figures["uncovered"][name] for name in routings if name.startswith("encoder")])
    most = {name: int(routing.taken.sum(1).max()) for name, routing in routings.items()}
    assert max(most.values()) == 3


def test_a_dense_model_has_no_routers() -> None:
    assert Routers.of(making.model(), None, None) is None


@pytest.mark.pictures
def test_pictures_of_a_run(upcycled: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Loss, and the experts' load over time: pictures that can be opened, of a size that can be looked at."""
    from PIL import Image

    making.run(upcycled["native"], data, tmp_path / "out", eval_split=4, **HOW)
    for name in ("loss.png", "experts.png"):
        with Image.open(tmp_path / "out" / "training" / name) as picture:
            assert picture.width > 500
            assert picture.height > 300
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
