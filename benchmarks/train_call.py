"""Train once, by us or by a peer, on the same rows in the same order, and note the time of the steps and the losses.

python train_call.py ours|resumed|trainer|sft CHECKPOINT OUT METHOD STEPS BATCH LENGTH CALLS

Appends to CALLS: seconds of wall clock and of processor from the third step to the last, the tokens in them, and all
losses. `resumed` is ours, stopped in the middle by a signal and given again. METHOD is `full` or `lora`. What loading,
saving and the first steps take is not counted.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

FIRST = 2  # steps that are not timed
ROWS, SEED = 64, 0
RATE = {"full": 1e-4, "lora": 1e-3}


class Clock:
    """The time at the end of each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def used(self) -> dict[str, float]:
        return {"wall": self.wall[-1] - self.wall[FIRST - 1], "cpu": self.cpu[-1] - self.cpu[FIRST - 1]}


def main() -> None:
    who, checkpoint, out, method, steps, batch, length, calls = sys.argv[1:]
    torch.set_num_threads(1)
    clock, number = Clock(), int(steps)
    rows = _rows(json.loads(Path(checkpoint, "config.json").read_text())["vocab_size"], int(length))
    if who in ("ours", "resumed"):
        stop = number // 2 if who == "resumed" else None
        losses = _ours(checkpoint, out, method, number, int(batch), rows, clock, stop)
    else:
        losses = _peer(who, checkpoint, out, method, number, int(batch), rows, clock)
    tokens = (number - FIRST) * int(batch) * int(length)
    with open(calls, "a") as file:
        file.write(json.dumps({**clock.used(), "tokens": tokens, "losses": losses}) + "\n")


def _rows(vocabulary: int, length: int) -> list[list[int]]:
    found: list[list[int]] = torch.randint(
        vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(SEED)
    ).tolist()
    return found


def _ours(
    checkpoint: str,
    out: str,
    method: str,
    steps: int,
    batch: int,
    rows: list[list[int]],
    clock: Clock,
    stop: int | None,
) -> list[float]:
    """The losses; with `stop`, of a run that was stopped after that step and has gone on."""
    import surgery
    from surgery.training.work import Line, Silent

    class Ticking(Silent):
        def step(self, line: Line) -> None:
            clock.tick()
            if line["step"] == stop and len(clock.wall) == stop:
                signal.raise_signal(signal.SIGINT)

    data = Path(out).with_suffix(".jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    how: dict[str, Any] = {
        "data": data, "output": out, "method": method, "steps": steps, "batch_size": batch,
        "learning_rate": RATE[method], "schedule": "constant", "seed": SEED, "save_every": steps, "hash": False,
        "device": "cpu",
    }  # fmt: skip
    if stop is not None:
        try:
            surgery.train(checkpoint, **how, progress=Ticking())
        except KeyboardInterrupt:
            pass
        else:
            raise SystemExit("The run was not stopped.")
    surgery.train(checkpoint, **how, progress=Ticking())
    data.unlink()
    lines = [json.loads(line) for line in Path(out, "training", "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def _peer(
    who: str, checkpoint: str, out: str, method: str, steps: int, batch: int, rows: list[list[int]], clock: Clock
) -> list[float]:
    from datasets import Dataset

    from surgery.training.batches import Schedule

    # The rows in our order, which the sampler leaves as they are.
    schedule = Schedule(ROWS, batch, 1, SEED)
    order = [item for step in range(steps) for chosen in schedule.window(step) for item in chosen]
    data: Any = Dataset.from_dict({"input_ids": [rows[item] for item in order]})
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    trainer = _trainer(who, model, data, Path(out), steps, batch, RATE[method])
    trainer.add_callback(Ticking())
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def _trainer(who: str, model: Any, data: Any, out: Path, steps: int, batch: int, rate: float) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": SEED,
        "train_sampling_strategy": "sequential",
    }
    if who == "trainer":

        def collate(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            ids = torch.tensor([row["input_ids"] for row in chosen])
            return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

        return Trainer(model, TrainingArguments(**settings), data_collator=collate, train_dataset=data)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    # Rows are tokens already; what pads them has to have a name all the same.
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    config = SFTConfig(**settings, max_length=None, gradient_checkpointing=False, bf16=False)
    return SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)


if __name__ == "__main__":
    main()
