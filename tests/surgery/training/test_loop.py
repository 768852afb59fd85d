"""The loop against a plain one written by hand, against transformers' Trainer, and against itself in other portions."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

from surgery.errors import NonFiniteError, OptionError
from surgery.training.batches import Schedule
from surgery.training.options import TrainOptions
from surgery.training.rates import rate
from tests.surgery.training import making
from tests.tools import tree


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.checkpoint(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.texts(tmp_path_factory.mktemp("data") / "texts.jsonl")


HOW: dict[str, Any] = {
    "steps": 20,
    "batch_size": 4,
    "gradient_accumulation": 2,
    "learning_rate": 2e-3,
    "schedule": "linear",
    "warmup": 4,
    "weight_decay": 0.1,
    "max_length": 64,
    "over_length": "truncate",
    "seed": 3,
}


def rows(number: int = 48, limit: int = 64) -> list[list[int]]:
    """The paragraphs as tokens, each ended and cut, without any of our code."""
    tokenizer = making.tokenizer()
    found = tokenizer(making.paragraphs()[:number])["input_ids"]
    return [[*row, tokenizer.eos_token_id][:limit] for row in found]


def padded(chosen: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels and mask, all [B, n]."""
    width = max(map(len, chosen))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in chosen])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen])
    return ids, ids.masked_fill(mask == 0, -100), mask


def windows(how: dict[str, Any], number: int = 48) -> list[list[list[int]]]:
    """The rows of each pass of each step."""
    schedule = Schedule(number, how["batch_size"], how["gradient_accumulation"], how["seed"])
    return [schedule.window(step) for step in range(how["steps"])]


def by_hand(model: Any, how: dict[str, Any]) -> list[float]:
    """Training as one would write it down: all rows of a step in one batch, and the mean over its tokens."""
    model.train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": how["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how["learning_rate"], betas=(0.9, 0.999), eps=1e-8)
    tokens, losses = rows(), []
    for step, window in enumerate(windows(how)):
        warm = how["warmup"]
        share = step / warm if step < warm else (how["steps"] - step) / (how["steps"] - warm)
        for group in optimizer.param_groups:
            group["lr"] = how["learning_rate"] * share
        ids, labels, mask = padded([tokens[item] for batch in window for item in batch])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_a_plain_loop(base: Path, data: Path, tmp_path: Path) -> None:
    """Twenty steps of accumulation, decay, warm-up and clipping; 1e-5 is some forty roundings of a float32 loss."""
    making.run(base, data, tmp_path / "out", **HOW)
    found = making.losses(tmp_path / "out")
    assert found == pytest.approx(by_hand(making.model(), HOW), abs=1e-5, rel=0)
    assert found[-1] < found[0] - 0.5


class Ordered(transformers.Trainer):
    """Trainer that takes the rows in the order they are in."""

    def _get_train_sampler(self, *_: Any) -> Any:
        rows: Any = self.train_dataset
        return torch.utils.data.SequentialSampler(rows)


def by_trainer(model: Any, how: dict[str, Any], folder: Path) -> list[float]:
    """The same rows in the same order through transformers' Trainer."""
    tokens = rows()
    order = [tokens[item] for window in windows(how) for batch in window for item in batch]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=how["steps"],
        per_device_train_batch_size=how["batch_size"],
        gradient_accumulation_steps=how["gradient_accumulation"],
        learning_rate=how["learning_rate"],
        lr_scheduler_type=how["schedule"],
        warmup_steps=how["warmup"],
        weight_decay=how["weight_decay"],
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )

    def collate(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, labels, mask = padded([row["input_ids"] for row in chosen])
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    trainer = Ordered(model, arguments, data_collator=collate, train_dataset=[{"input_ids": row} for row in order])
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_losses_are_those_of_transformers(base: Path, data: Path, tmp_path: Path) -> None:
    """Of its Trainer, for the first twenty steps, at the same rates."""
    making.run(base, data, tmp_path / "out", **HOW)
    reference = by_trainer(making.model(), HOW, tmp_path / "trainer")
    # Trainer leaves norms and biases without decay, which in a Llama are the vectors.
    assert making.losses(tmp_path / "out") == pytest.approx(reference, abs=1e-5, rel=0)


@pytest.mark.parametrize("portions", [(1, 8), (4, 2), (2, 4)])
def test_portions_do_not_matter(portions: tuple[int, int], base: Path, data: Path, tmp_path: Path) -> None:
    """Rows of a step may come in any portions: the loss is by token, however long the rows of a portion are."""
    batch, accumulation = portions
    how = {**HOW, "steps": 6, "batch_size": 8, "gradient_accumulation": 1, "optimizer": "adamw"}
    making.run(base, data, tmp_path / "whole", **how)
    making.run(base, data, tmp_path / "parts", **{**how, "batch_size": batch, "gradient_accumulation": accumulation})
    assert making.losses(tmp_path / "parts") == pytest.approx(making.losses(tmp_path / "whole"), abs=1e-5, rel=0)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_rates_are_those_of_transformers(schedule: str, warmup: int) -> None:
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = transformers.get_scheduler(name, optimizer, warmup, 12)
    options = TrainOptions(data="x", schedule=schedule, warmup=warmup)
    for step in range(12):
        assert rate(step, 12, options) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_the_rate_falls_to_its_floor() -> None:
    """LIMA's: from 1e-5 to 1e-6."""
    options = TrainOptions(data="x", schedule="linear", final_rate=0.1)
    assert rate(0, 100, options) == 1
    assert rate(99, 100, options) == pytest.approx(0.1 + 0.9 / 100)
    assert rate(50, 100, TrainOptions(data="x", warmup=0.5)) == 1


def test_an_epoch_has_every_item_once() -> None:
    """In another order each time, and the last batch takes what is left."""
    schedule = Schedule(items=11, batch=3, accumulation=2, seed=0)
    assert (schedule.passes_per_epoch, schedule.steps_per_epoch) == (4, 2)
    epochs = [[item for step in (2 * e, 2 * e + 1) for rows in schedule.window(step) for item in rows] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]
    assert [len(rows) for rows in schedule.window(1)] == [3, 2]
    assert schedule.epoch(3) == 1.5


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_packed_examples_do_not_see_each_other(kind: str, data: Path, tmp_path: Path) -> None:
    """The loss of packed rows is that of the same examples each in a row of its own."""
    settings = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    base = making.checkpoint(tmp_path / "model", kind, **settings)
    how = {"steps": 1, "max_length": 128, "over_length": "truncate", "learning_rate": 1e-3, "router_aux_loss": 0.0}
    packed = making.run(base, data, tmp_path / "packed", packing=True, batch_size=48, **how)
    apart = making.run(base, data, tmp_path / "apart", batch_size=48, **how)
    assert packed.data.examples == apart.data.examples == 48
    assert packed.data.rows <= 40 < apart.data.rows
    assert packed.data.predictions == apart.data.predictions
    assert making.losses(tmp_path / "packed") == pytest.approx(making.losses(tmp_path / "apart"), abs=2e-6)
    norms = [making.log(tmp_path / name)[0]["gradient_norm"] for name in ("packed", "apart")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


# What ends a run ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(data: Path, tmp_path: Path) -> None:
    """The batch is named, nothing is at the target, and the state before it is kept."""
    made = making.model()
    with torch.no_grad():
        made.model.embed_tokens.weight[made.config.vocab_size - 5 :] = float("inf")
    base = making.checkpoint(tmp_path / "model", made=made)
    with pytest.raises(NonFiniteError) as caught:
        making.run(base, data, tmp_path / "out", steps=5, batch_size=2, max_length=64, over_length="truncate")
    message = str(caught.value)
    assert message.startswith("The loss is nan in step ")
    assert f"{data}, line " in message
    assert not (tmp_path / "out").exists()
    kept = load_file(next((tmp_path / ".out.partial" / "state").glob("*/main.safetensors")))
    assert all(not torch.isnan(tensor).any() for name, tensor in kept.items() if name.startswith("weight/"))


def test_a_run_without_patience_stops(base: Path, data: Path, tmp_path: Path) -> None:
    """After two evaluations that are no better, with the weights of the best."""
    how = {"steps": 40, "eval_every": 1, "patience": 2, "learning_rate": 1.0, "eval_split": 8, "max_grad_norm": 0.0}
    report = making.run(base, data, tmp_path / "out", max_length=64, over_length="truncate", **how)
    assert report.done < 40
    assert report.written == report.best_step == report.done - 2
    evaluated = {line["step"]: line["eval_loss"] for line in making.log(tmp_path / "out") if "eval_loss" in line}
    assert evaluated[report.written] == min(evaluated.values()) == report.best_loss


def test_the_held_out_loss_is_what_it_says(base: Path, data: Path, tmp_path: Path) -> None:
    """Of the weights that were written, on examples that were not trained on."""
    held = making.jsonl(tmp_path / "held.jsonl", ({"text": text} for text in making.paragraphs()[60:75]))
    making.run(base, data, tmp_path / "out", steps=4, eval_data=str(held), eval_every=2, learning_rate=2e-3)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = making.tokenizer()
    total = count = 0.0
    for text in making.paragraphs()[60:75]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    (last,) = [line for line in making.log(tmp_path / "out") if "eval_loss" in line][-1:]
    assert last["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert last["eval_predictions"] == count


def test_runs_are_repeatable(base: Path, data: Path, tmp_path: Path) -> None:
    """The same seed gives the same bytes, dropout and all; another seed does not."""
    base = making.checkpoint(tmp_path / "model", "gpt2")
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        making.run(base, data, tmp_path / name, steps=3, batch_size=2, max_length=64, over_length="truncate", seed=seed)
    one, same, other = (tree(tmp_path / name)["model.safetensors"] for name in ("one", "same", "other"))
    assert one == same
    assert one != other


def test_activation_checkpointing_changes_nothing_but_memory(data: Path, tmp_path: Path) -> None:
    base = making.checkpoint(tmp_path / "model", "mixtral")
    how = {"steps": 2, "max_length": 64, "over_length": "truncate", "learning_rate": 1e-3, "router_z_loss": 0.1}
    making.run(base, data, tmp_path / "plain", **how)
    making.run(base, data, tmp_path / "again", activation_checkpointing=True, **how)
    assert making.losses(tmp_path / "again") == pytest.approx(making.losses(tmp_path / "plain"), abs=1e-6)


def test_a_method_that_is_not_known_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--method sorcery is not known; it is one of full"):
        making.run(base, data, tmp_path / "out", method="sorcery")
    assert not (tmp_path / ".out.partial").exists()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
