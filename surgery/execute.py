"""The one loop: read what a step needs, let it compute, write what it makes.

Steps run in threads, each step on one: the work inside (reading, torch, BLAKE3) releases the interpreter's lock, and
with one thread to a factorisation the bytes do not depend on how many threads there are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

from surgery.checkpoint import StoredTensor, expect, expect_nothing
from surgery.errors import OptionError
from surgery.hashing import HashBook, hash_tensor, new_hash
from surgery.header import build_header
from surgery.layout import TensorSpec
from surgery.plan import Plan, Step, StepResult
from surgery.sharing import Copies, TensorCache
from surgery.tiling import tiles
from surgery.writer import Staging

if TYPE_CHECKING:
    import torch
    from blake3 import blake3

_COPY_CHUNK = 64 << 20
_FETCH_CHUNK = 2 << 20


class Progress(Protocol):
    """Told how many bytes there are to go through, and then how many have been."""

    def start(self, total: int, label: str) -> None: ...
    def advance(self, count: int) -> None: ...
    def stop(self) -> None: ...


class NoProgress:
    """Says nothing."""

    def start(self, total: int, label: str) -> None: ...
    def advance(self, count: int) -> None: ...
    def stop(self) -> None: ...


_MOST_THREADS = 8


def default_threads() -> int:
    """The processors this process may use, up to eight: beyond that the disk sets the pace, and each holds memory."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, _MOST_THREADS)


@dataclass(frozen=True)
class Settings:
    """How to run a plan: nothing here changes the bytes of the output, except `device` across kinds of device.

    Attributes:
        threads: steps at a time at most; fewer run where they would take more than half of the free memory.
        device: where steps compute: `cpu`, `cuda` or `cuda:N`.
        hash: whether to hash every input and output tensor.
        progress: told about the bytes as they pass.
    """

    threads: int = field(default_factory=default_threads)
    device: str = "cpu"
    hash: bool = True
    progress: Progress = field(default_factory=NoProgress)


class Cancelled(Exception):  # noqa: N818 - a signal, not an error
    """Another step failed, or the user interrupted: stop at the next chunk."""


@dataclass(frozen=True)
class Outcome:
    """What one finished step leaves in the journal."""

    step: str
    report: Mapping[str, object]
    outputs: Mapping[str, str]


@dataclass
class Execution:
    """The results of a plan: an outcome for each step, in the plan's order, and how many steps an earlier run did."""

    outcomes: list[Outcome]
    resumed: int

    @property
    def outputs(self) -> dict[str, str]:
        """Hash of every output tensor; empty without hashing."""
        return {name: digest for outcome in self.outcomes for name, digest in outcome.outputs.items()}

    def reports(self) -> dict[str, Mapping[str, object]]:
        """What each step found out, by the step's name, for those that found out anything."""
        return {outcome.step: outcome.report for outcome in self.outcomes if outcome.report}


def execute(plan: Plan, staging: Staging, settings: Settings, hashes: HashBook, label: str = "") -> Execution:
    """Run every step of a plan that the staging folder does not already hold the result of."""
    plan.check()
    staging.lay_out(plan.layout, plan.subfolder)
    for name, data in plan.files.items():
        staging.write_file(name, data)
    for name, source in plan.carried:
        staging.carry(name, source)
    known = {step.name: staging.done[step.name] for step in plan.steps if step.name in staging.done}
    pending = [step for step in plan.steps if step.name not in known]
    fresh: dict[str, Outcome] = {}
    settings.progress.start(_work(pending, hashes), label)
    expect(tensor for step in pending for tensor in step.reads)
    try:
        with one_torch_thread() if plan.computes else contextlib.nullcontext():
            _run_all(pending, staging, settings, hashes, fresh)
    finally:
        settings.progress.stop()
        hashes.save()
        expect_nothing(tensor for step in pending for tensor in step.reads)
    carried = [source for _, source in plan.carried]
    for source in {id(source): source for source in (*(t.source for t in plan.inputs), *carried)}.values():
        source.check_unchanged()
    outcomes = [fresh.get(step.name) or _restored(step, known[step.name]) for step in plan.steps]
    return Execution(outcomes, len(known))


def _work(steps: list[Step], hashes: HashBook) -> int:
    """Bytes that `StepIO` will report: every read, and the separate read that hashes what is copied."""
    total = 0
    for step in steps:
        total += sum(tensor.nbytes for tensor in step.reads)
        if hashes.enabled and not step.computes:
            apart = [tensor for tensor in step.reads if tensor.source.fileno() is not None]
            total += sum(tensor.nbytes for tensor in apart if hashes.get(tensor) is None)
    return total


def _affordable(steps: list[Step], threads: int) -> int:
    """As many threads as asked for, or as few as keep the largest steps together within half of the free memory."""
    largest = max((step.scratch for step in steps), default=0)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    fitting = free // 2 // largest if largest and free else threads
    return max(1, min(threads, fitting))


def _run_all(
    steps: list[Step], staging: Staging, settings: Settings, hashes: HashBook, fresh: dict[str, Outcome]
) -> None:
    cancelled = threading.Event()
    cache, copies = TensorCache(), Copies()
    local = threading.local()

    def work(step: Step) -> None:
        if cancelled.is_set():
            return
        if not hasattr(local, "buffers"):
            local.buffers = {}
        io = StepIO(staging, settings, hashes, cancelled, local.buffers, cache, copies)
        with contextlib.suppress(Cancelled):
            result = step.run(io)
            fresh[step.name] = io.finish(step, result)

    with ThreadPoolExecutor(_affordable(steps, settings.threads), thread_name_prefix="surgery") as pool:
        futures = [pool.submit(work, step) for step in steps]
        try:
            # Waiting with a time limit lets an interrupt through at once.
            while wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION).not_done:
                failed = [f for f in futures if f.done() and not f.cancelled() and f.exception() is not None]
                if failed:
                    break
        finally:
            cancelled_early = any(not future.done() for future in futures)
            if cancelled_early:
                cancelled.set()
                pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


class StepIO:
    """What a step sees of the world. Every byte it reads or writes passes here, and is hashed and counted here."""

    def __init__(
        self,
        staging: Staging,
        settings: Settings,
        hashes: HashBook,
        cancelled: threading.Event,
        buffers: dict[str, torch.Tensor],
        cache: TensorCache,
        copies: Copies,
    ) -> None:
        self.device = settings.device
        self._staging = staging
        self._progress = settings.progress
        self._hashes = hashes
        self._cancelled = cancelled
        self._buffers = buffers
        self._cache = cache
        self._copies = copies
        self._writing: dict[str, tuple[int, blake3 | None]] = {}
        self._copied: set[str] = set()
        self._outputs: dict[str, str] = {}

    def still_wanted(self) -> None:
        """Raise if the work was cancelled: for long arithmetic between one read or write and the next."""
        self._advance(0)

    def _advance(self, count: int) -> None:
        if self._cancelled.is_set():
            raise Cancelled
        self._progress.advance(count)

    def buffer(self, slot: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements of memory that this thread keeps for `slot`: valid until the slot is asked for again.

        Fresh memory costs a page fault for every 4 KiB, as much as the arithmetic on it.
        """
        import torch

        key = f"{slot}:{dtype}"
        held = self._buffers.get(key)
        if held is None or held.numel() < count:
            self._buffers.pop(key, None)
            held = self._buffers[key] = torch.empty(count, dtype=dtype)
        return held[:count]

    def read(self, tensor: StoredTensor, slot: str | None = None) -> torch.Tensor:
        """A whole stored tensor, in its own dtype and shape: in new memory, or in this thread's memory for `slot`."""
        import torch

        raw = (
            torch.empty(tensor.nbytes, dtype=torch.uint8)
            if slot is None
            else self.buffer(slot, tensor.nbytes, torch.uint8)
        )
        view = raw.numpy().data
        if tensor.nbytes:
            tensor.source.read_into(tensor.offset, view)
        if self._wants_hash(tensor):
            hasher = new_hash()
            hasher.update(view)
            self._hashes.put(tensor, hasher.hexdigest())
        self._advance(tensor.nbytes)
        return raw.view(tensor.dtype.to_torch).view(tensor.shape)

    def read_range(self, tensor: StoredTensor, begin: int, end: int) -> bytearray:
        """Bytes `begin` to `end` of a stored tensor, for a step that does without torch."""
        raw = bytearray(end - begin)
        tensor.source.read_into(tensor.offset + begin, memoryview(raw))
        self._advance(len(raw))
        return raw

    def hash_if_wanted(self, tensor: StoredTensor) -> None:
        """Hash a tensor that was read in ranges: a second reading, as of what is copied."""
        if self._wants_hash(tensor):
            self.hash(tensor)

    def shared(self, tensor: StoredTensor) -> torch.Tensor:
        """A whole stored tensor that other steps read as well; it must not be written to."""
        return self._cache.get(tensor, self.read)

    def chunks(
        self,
        *tensors: StoredTensor,
        block: int | None = None,
        whole: bool = False,
        ranges: Iterable[tuple[int, int]] | None = None,
        hashed: bool = True,
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Go through tensors of equal shape together, some rows at a time.

        Yields the row range and a matrix (end - begin, columns) of each tensor, in its own dtype; the matrices are
        overwritten by the next round. With `whole`, everything comes in one round; `ranges` are the rows of each round,
        all of them in order. Without `hashed` nothing becomes known of what the tensors hash to.
        """
        import torch

        rows, columns = tensors[0].rows, tensors[0].columns
        hashers = [new_hash() if hashed and self._wants_hash(tensor) else None for tensor in tensors]
        if ranges is None:
            ranges = [(0, rows)] if whole or rows * columns == 0 else tiles(rows, columns, block)
        for begin, end in ranges:
            found = []
            for number, (tensor, hasher) in enumerate(zip(tensors, hashers, strict=True)):
                width = tensor.dtype.bits // 8 * columns
                raw = self.buffer(f"chunk{number}", (end - begin) * width, torch.uint8)
                if raw.numel():
                    view = raw.numpy().data
                    tensor.source.read_into(tensor.offset + begin * width, view)
                    if hasher is not None:
                        hasher.update(view)
                found.append(raw.view(tensor.dtype.to_torch).view(end - begin, columns))
                self._advance(raw.numel())
            yield begin, end, found
        for tensor, hasher in zip(tensors, hashers, strict=True):
            if hasher is not None:
                self._hashes.put(tensor, hasher.hexdigest())

    def write(self, output: TensorSpec, begin: int, rows: torch.Tensor) -> None:
        """Write a matrix of rows that starts at row `begin`; the rows of one output come in order, from one step."""
        import torch

        if not rows.numel():
            return
        width = output.dtype.bits // 8 * (output.shape[-1] if output.shape else 1)
        if begin * width != self._writing.get(output.name, (0, None))[0]:
            raise ValueError(f"{output.name}: row {begin} written out of order")
        self.write_bytes(output, rows.contiguous().view(-1).view(torch.uint8).numpy().data)

    def write_bytes(self, output: TensorSpec, data: memoryview) -> None:
        """Write the next bytes of an output tensor."""
        position, hasher = self._writing.get(output.name, (0, new_hash() if self._hashes.enabled else None))
        self._staging.write(output.name, position, data)
        if hasher is not None:
            hasher.update(data)
        self._writing[output.name] = (position + len(data), hasher)

    def copy(self, output: TensorSpec, source: StoredTensor) -> None:
        """Copy a stored tensor to an output tensor of the same bytes; it is read a second time only to be hashed.

        What is no local file is read once, hashed on the way, however many copies there are.
        """
        if source.source.fileno() is None:
            self._copies.make(source, output.name, partial(self._fetch, source), self._repeat)
            self._copied.add(output.name)
            if self._hashes.enabled:
                self._outputs[output.name] = self._hashes.require(source)
            return
        for begin in range(0, source.nbytes, _COPY_CHUNK):
            end = min(begin + _COPY_CHUNK, source.nbytes)
            self._staging.copy(output.name, source, begin, end)
            self._advance(end - begin)
        self._copied.add(output.name)
        if self._hashes.enabled:
            if (digest := self._hashes.get(source)) is None:
                digest = hash_tensor(source, self._advance)
                self._hashes.put(source, digest)
            self._outputs[output.name] = digest

    def _fetch(self, source: StoredTensor, output: str) -> None:
        """Write a stored tensor to an output tensor, through memory."""
        hasher = new_hash() if self._hashes.enabled and self._hashes.get(source) is None else None
        view = memoryview(bytearray(min(_FETCH_CHUNK, source.nbytes)))
        for begin in range(0, source.nbytes, _FETCH_CHUNK):
            part = view[: min(_FETCH_CHUNK, source.nbytes - begin)]
            source.source.read_into(source.offset + begin, part)
            if hasher is not None:
                hasher.update(part)
            self._staging.write(output, begin, part)
            self._advance(len(part))
        if hasher is not None:
            self._hashes.put(source, hasher.hexdigest())

    def _repeat(self, written: str, output: str) -> None:
        """Copy an output tensor to another."""
        self._advance(self._staging.copy_written(written, output))

    def hash(self, tensor: StoredTensor) -> str:
        """The hash of a stored tensor, read for nothing else."""
        if (digest := self._hashes.get(tensor)) is None:
            digest = hash_tensor(tensor, self._advance)
            self._hashes.put(tensor, digest)
        return digest

    def _wants_hash(self, tensor: StoredTensor) -> bool:
        return self._hashes.enabled and not tensor.is_slice and self._hashes.get(tensor) is None

    def finish(self, step: Step, result: StepResult) -> Outcome:
        """Check that the step wrote all it promised, keep its parts, and note it as done."""
        for spec in step.writes:
            if spec.name in self._copied:
                continue
            position, hasher = self._writing.pop(spec.name, (0, None))
            if position != spec.nbytes:
                raise ValueError(f"{spec.name}: {position} of {spec.nbytes} bytes written")
            if self._hashes.enabled:
                self._outputs[spec.name] = (hasher or new_hash()).hexdigest()
        if result.tensors:
            self._write_part(step.name, result.tensors)
        outcome = Outcome(step.name, dict(result.report), dict(self._outputs))
        self._staging.record(step.name, {"report": outcome.report, "outputs": outcome.outputs})
        return outcome

    def _write_part(self, step: str, tensors: Mapping[str, torch.Tensor]) -> None:
        import torch

        from surgery.dtypes import from_torch

        specs, data = [], []
        for name, tensor in tensors.items():
            dtype = from_torch(tensor.dtype)
            assert dtype is not None
            specs.append((name, dtype, tuple(tensor.shape)))
            data.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._staging.write_part(step, build_header(specs)[0], data)


def _restored(step: Step, entry: Mapping[str, object]) -> Outcome:
    """The outcome of a step that an earlier run finished, from its journal line."""
    report, outputs = entry.get("report"), entry.get("outputs")
    assert isinstance(report, dict)
    assert isinstance(outputs, dict)
    return Outcome(step.name, report, outputs)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread to a call while steps run side by side, and then as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU; anything else is checked for presence."""
    if device == "cpu":
        return device
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"The device {device!r} is not available here; use cpu or auto.") from error
    return device
