"""The training loop. One step: forward and backward passes over its window, clip, update, log, evaluate, save.

The loss of a step is the sum over all its predictions divided by their number, whatever the number of forward passes
and processes it is spread over: two passes of four rows give the gradient of one pass of eight.

Nothing that the next pass depends on is hidden: order and batches follow from the seed (`batches`), learning rates from
the step, and the rest is in the state (`state`). So an interrupted run goes on bit for bit, from any pass.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import NonFiniteError
from surgery.training import state, zero
from surgery.training.batches import Batch, share
from surgery.training.engine import Engine
from surgery.training.evaluation import evaluate, predictions_of, silenced
from surgery.training.examples import Examples
from surgery.training.options import TrainOptions
from surgery.training.rates import rate
from surgery.training.routers import Routers
from surgery.training.tasks import model_inputs
from surgery.training.work import Line, Work, schedule_of

if TYPE_CHECKING:
    import torch


class Loop:
    """A run under way. `accelerator` is accelerate's; it knows devices, processes and precision."""

    def __init__(self, work: Work, accelerator: Any) -> None:
        import torch

        options = work.options
        self.work, self.accelerator = work, accelerator
        self.schedule = schedule_of(work.examples, options, accelerator.num_processes)
        self.position = state.Position(threads=torch.get_num_threads())
        self.routers = Routers.of(work.prepared.model, options.router_aux_loss, options.router_z_loss)
        groups = work.prepared.optimizer_groups(options.weight_decay)
        self.peaks = [group["lr"] for group in groups]
        self.engine = engine_for(accelerator, work.prepared.model, groups, options)
        self.model = self.engine.model
        self.stopping = False
        self.resumed = 0
        self.loss = self._zero()  # of this process, over the passes of the step so far
        self.aux, self.z = self._zero(), self._zero()
        self.since, self.since_tokens = time.monotonic(), 0

    def run(self, resume: bool) -> state.Position:
        """Train to the end, from the start or from the saved state. Raises `KeyboardInterrupt` when told to stop."""
        position, work = self.position, self.work
        self.model.train()
        if resume:
            position = self._load()
            self.resumed = position.step
        self._open_log()
        work.progress.start(work.steps, position.step)
        try:
            with self._signals():
                while position.step < work.steps and not self._patience_is_over():
                    self._step()
        finally:
            work.progress.stop()
            self.log.close()
        return self.position

    # A step -----------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        work, position, options = self.work, self.position, self.work.options
        window = self.schedule.window(position.step)
        predictions = sum(work.examples.count(rows) for rows in window)
        begun = time.monotonic()
        for number, batch in self._batches(window, position.passes):
            last = number == len(window) - 1
            with self.engine.passing(last):
                self._pass(batch, predictions)
            position.passes = number + 1
            if not last and self._must_stop(within=True):
                self._interrupt(begun)
        loss = self._sum(self.loss)
        self._check_finite(loss, 0.0, window)
        rates = [peak * rate(position.step, work.steps, options) for peak in self.peaks]
        for group, value in zip(self.engine.groups(), rates, strict=True):
            group["lr"] = value
        norm = self.engine.update(lambda norm: self._check_finite(loss, norm, window))
        position.passes, position.step = 0, position.step + 1
        size = sum(work.examples.size(rows) for rows in window)
        position.tokens += size
        self.since_tokens += size
        position.seconds += time.monotonic() - begun
        position.last_loss = loss
        position.first_loss = loss if position.first_loss is None else position.first_loss
        self._report(loss, norm, max(rates))
        self.loss, self.aux, self.z = self._zero(), self._zero(), self._zero()
        self._after()

    def _pass(self, batch: Batch, predictions: int) -> None:
        """One forward and backward pass: the loss is this process's part of the step's mean."""
        task = self.work.task
        batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
        asked = self.routers.call if self.routers is not None else {}
        outputs = self.model(**model_inputs(self.work.prepared, task, batch), **asked)
        # Processes average their gradients; the sum over all of them is what is wanted.
        scale = self.accelerator.num_processes / predictions
        own = task.loss(outputs.logits, batch["labels"])
        loss = own * scale
        self.loss += own.detach() / predictions
        if self.routers is not None and (routings := self.routers.routings(outputs, batch.get("attention_mask"))):
            aux, z = self.routers.loss(routings, outputs)
            part = predictions_of(batch["labels"], task) * scale
            loss = loss + part * (self.routers.aux * aux + self.routers.z * z)
            self.aux += part / self.accelerator.num_processes * aux.detach()
            self.z += part / self.accelerator.num_processes * z.detach()
            self.routers.observe(routings)
        self.engine.backward(loss)

    def _batches(self, window: list[list[int]], first: int) -> Iterator[tuple[int, Batch]]:
        """This process's batches of a step, each made while the one before it is computed."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes

        def make(rows: list[int]) -> Batch:
            mine = share(rows, process, processes)
            # A process without rows of its own takes part all the same: it looks at a row and learns nothing from it.
            batch = self.work.batch(self.work.examples, mine or rows[:1])
            return batch if mine else silenced(batch)

        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(make, rows) for rows in window[first : first + 1]]
            for number in range(first, len(window)):
                batch = coming.pop().result()
                if number + 1 < len(window):
                    coming.append(pool.submit(make, window[number + 1]))
                yield number, batch

    def _check_finite(self, loss: float, norm: float, window: list[list[int]]) -> None:
        """Stop before an update that would spoil the weights."""
        # In float16 the scaler skips steps whose gradients overflow, and goes on with a smaller scale.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            return
        position = self.position
        self.engine.discard()
        self.loss, self.aux, self.z = self._zero(), self._zero(), self._zero()
        position.passes = 0
        if self.engine.kept:
            self.save()
        kept = "before that step" if self.engine.kept else "that was saved last"
        places = self.work.examples.places([item for rows in window for item in rows])
        shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
        what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradients is {norm}"
        raise NonFiniteError(
            f"The {what} in step {position.step + 1}, whose batch is {shown}; the state {kept} is kept in "
            f"{self.work.root}. Look at the data, or begin anew with a lower --learning-rate."
        )

    def _after(self) -> None:
        """What is due between two steps."""
        options, position, work = self.work.options, self.position, self.work
        done = position.step == work.steps
        every = options.eval_every or max(1, work.steps // 10)
        if work.held_out is not None and (done or position.step % every == 0):
            self._evaluate(work.held_out)
        if not done and self._must_stop(within=False):
            self._interrupt(None)
        if not done and position.step % (options.save_every or max(1, work.steps // 10)) == 0:
            self.save()

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self, examples: Examples) -> None:
        found = evaluate(self.model, self.work, examples, self.accelerator)
        position = self.position
        position.eval_loss = found["eval_loss"]
        if position.best_loss is None or found["eval_loss"] < position.best_loss:
            position.best_loss, position.best_step, position.stale = found["eval_loss"], position.step, 0
            if self.work.options.keep == "best":
                weights = self.engine.trained_weights()
                if self.accelerator.is_main_process:
                    state.save_best(self.work.root, weights)
        else:
            position.stale += 1
        self._write({"step": position.step, **found})

    def _patience_is_over(self) -> bool:
        patience = self.work.options.patience
        return patience is not None and self.position.stale >= patience

    def weights(self) -> dict[str, torch.Tensor] | None:
        """What is to be written of a model that is spread over processes, by its names; None for one that is not.

        Every process must ask; the first one gets the tensors, those of the best evaluation where these are kept.
        """
        found = self.engine.weights()
        if found and self.work.options.keep == "best" and self.position.best_loss is not None:
            for name, tensor in state.load_best(self.work.root).items():
                found[name].copy_(tensor)
        return found

    # The log ----------------------------------------------------------------------------------------------------------

    def _report(self, loss: float, norm: float, rate: float) -> None:
        position, options = self.position, self.work.options
        line: Line = {
            "step": position.step,
            "epoch": round(self.schedule.epoch(position.step), 6),
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": position.tokens,
        }
        if self.routers is not None:
            line |= {"aux_loss": self._sum(self.aux), "z_loss": self._sum(self.z)}
        now = time.monotonic()
        elapsed = now - self.since
        line["tokens_per_second"] = round(self.since_tokens / elapsed, 1) if elapsed else 0.0
        line["peak_memory"] = peak_memory()
        if position.step % options.log_every == 0 or position.step == self.work.steps:
            if self.routers is not None:
                line |= self.routers.figures(lambda sums: self.accelerator.reduce(sums, "sum"))
            self._write(line)
            self.since, self.since_tokens = now, 0
        self.work.progress.step(line)

    def _write(self, line: Line) -> None:
        """A line of the log, to the file and to the trackers. Its end is part of the state."""
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["step"])
        if self.accelerator.is_main_process:
            self.log.write((json.dumps(line) + "\n").encode())
            self.log.flush()
            self.position.log_bytes = self.log.tell()

    def _open_log(self) -> None:
        place = self.work.root / "log.jsonl" if self.accelerator.is_main_process else Path(os.devnull)
        self.log = open(place, "r+b" if place.exists() and self.accelerator.is_main_process else "wb")  # noqa: SIM115 - `run` closes it
        if self.accelerator.is_main_process:
            self.log.truncate(self.position.log_bytes)  # what follows was written after the state was
            self.log.seek(self.position.log_bytes)

    # The state --------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the state, as it is between two forward passes."""
        common, own = self.engine.state()
        own |= {f"random/{name}": tensor for name, tensor in state.random_tensors().items()}
        if self.routers is not None:
            own |= {f"router/{name}": sums for name, sums in self.routers.sums.items()}
        own |= {"sum/loss": self.loss, "sum/aux": self.aux, "sum/z": self.z}
        main = None
        if self.accelerator.is_main_process:
            main = common
            if self.accelerator.scaler is not None:
                main |= {f"scaler/{n}": _tensor(v) for n, v in self.accelerator.scaler.state_dict().items()}
        process = self.accelerator.process_index
        state.save(self.work.root, self.position, main, own, process, self.accelerator.wait_for_everyone)

    def _load(self) -> state.Position:
        self.position, main, own = state.load(self.work.root, self.accelerator.process_index)
        self.engine.put_state(main, own)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict({n: t.item() for n, t in state.below(main, "scaler/").items()})
        device = self.accelerator.device
        self.loss, self.aux, self.z = (own[f"sum/{name}"].to(device) for name in ("loss", "aux", "z"))
        if self.routers is not None:
            self.routers.sums |= {name: sums.to(device) for name, sums in state.below(own, "router/").items()}
        state.put_random(state.below(own, "random/"))  # last: nothing before the next pass may draw
        return self.position

    def _must_stop(self, within: bool) -> bool:
        """Whether to end here. Several processes, each told at its own time, agree at the end of a step."""
        if within and not self.engine.stops_anywhere:
            return False
        if self.accelerator.num_processes == 1:
            return self.stopping
        return self._sum(self._zero() + int(self.stopping)) > 0

    def _interrupt(self, begun: float | None) -> None:
        self.position.seconds += time.monotonic() - begun if begun is not None else 0.0
        self.save()
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, or a polite request to end, ends the run after the pass that is under way; a second one at once."""

        def stop(_signal: int, _frame: object) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self.work.progress.note("Stopping after this batch; the state is being saved.")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # Small things -----------------------------------------------------------------------------------------------------

    def _zero(self) -> torch.Tensor:
        import torch

        return torch.zeros((), device=self.accelerator.device)

    def _sum(self, value: torch.Tensor) -> float:
        """The sum over all processes."""
        return float(self.accelerator.reduce(value, reduction="sum"))


def engine_for(accelerator: Any, model: Any, groups: list[dict[str, Any]], options: TrainOptions) -> Engine:
    """A model ready to be trained, by DeepSpeed where `accelerate launch` was told so."""
    kind = zero.ZeroEngine if zero.is_asked() else Engine
    return kind(accelerator, model, groups, options)


def peak_memory() -> int:
    """Bytes at most so far: of the GPU where there is one, else of this process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _tensor(value: float) -> torch.Tensor:
    import torch

    return torch.tensor(value, dtype=torch.float64)
