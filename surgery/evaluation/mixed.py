"""Many LoRA adapters in one forward pass over one frozen base: every row of a batch has its own.

Each layer computes x W for the whole batch at once. What an adapter adds, (x A^T) B^T, is computed for runs of rows
that share an adapter: runs of equal length in one batched product with ranks padded by zeros, others one by one. The
scale (alpha/r, or alpha/sqrt(r)) is folded into B once. LoRA's authors name as its limitation that a batch has one
adapter (Hu et al. 2021, section 4.2); grouping rows is what Punica's SGMV and S-LoRA do on GPUs.

B: rows of a batch     n: tokens of a row     r: rank     R: largest rank at a module     K: adapters
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from surgery.adapter import Adapter
from surgery.errors import OptionError, UnsupportedError
from surgery.evaluation.sources import alone_by_files, alone_by_model, is_conv1d
from surgery.ops.deltas import PlainReader

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Rows `begin` to `end` of a batch, which share the adapter `slot`."""

    slot: int
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Which rows of a batch are whose.

    Attributes:
        rows: B.
        runs: of rows with an adapter, in order; rows of the base alone are in none.
        slots: of the runs, where all are of the same length and follow one another, so that one batched product does
            for all of them; None otherwise.
        index: int64 [len(slots)], the same on the device.
    """

    rows: int
    runs: tuple[Run, ...]
    slots: tuple[int, ...] | None
    index: Tensor | None = field(repr=False, default=None)

    @classmethod
    def of(cls, slots: Sequence[int], device: Any = "cpu") -> Layout:
        """For the adapter of each row, -1 for the base alone."""
        import torch

        runs, begin = [], 0
        for slot, rows in groupby(slots):
            end = begin + len(list(rows))
            if slot >= 0:
                runs.append(Run(slot, begin, end))
            begin = end
        lengths = {run.end - run.begin for run in runs}
        gapless = all(one.end == two.begin for one, two in pairwise(runs))
        if len(runs) < 2 or len(lengths) != 1 or not gapless:
            return cls(len(slots), tuple(runs), None)
        chosen = tuple(run.slot for run in runs)
        return cls(len(slots), tuple(runs), chosen, torch.tensor(chosen, device=device))


class Branches:
    """What all adapters add to one module.

    Attributes:
        A: [K, R, in]; for an embedding [K, in, R].
        B: [K, R, out], scaled.
        ranks: of each adapter; 0 for one that leaves the module alone.
        embedding: whether the module takes token ids.
    """

    def __init__(self, A: Tensor, B: Tensor, ranks: Sequence[int], embedding: bool) -> None:
        self.A, self.B, self.ranks, self.embedding = A, B, tuple(ranks), embedding
        self._whole = tuple(range(len(self.ranks)))

    def add_to(self, out: Tensor, x: Tensor, layout: Layout) -> Tensor:
        """The output with what the adapters add for the input `x`: changed in place where that is safe.

        Args:
            out: [B', ..., out].
            x: [B', ..., in], or token ids [B', ...]. B' is a multiple of B: beams, or tokens laid flat.
            layout: of the batch.
        """
        import torch

        if x.shape[0] % layout.rows:
            raise UnsupportedError(
                f"A layer with adapters was called with {x.shape[0]} rows for a batch of {layout.rows}: the model "
                "mixes rows, so each adapter needs a pass of its own."
            )
        times = x.shape[0] // layout.rows
        if (torch.is_grad_enabled() and out.requires_grad) or not out.is_contiguous():
            out = out.clone(memory_format=torch.contiguous_format)
        if layout.slots is not None:
            self._batched(out, x, layout, times)
            return out
        for run in layout.runs:
            if rank := self.ranks[run.slot]:
                rows = slice(run.begin * times, run.end * times)
                self._single(out[rows], x[rows], run.slot, rank)
        return out

    def _single(self, out: Tensor, x: Tensor, slot: int, rank: int) -> None:
        import torch

        B = self.B[slot, :rank]
        if self.embedding:
            low = torch.nn.functional.embedding(x, self.A[slot, :, :rank]).flatten(0, -2)
        else:
            low = x.flatten(0, -2).to(self.A.dtype) @ self.A[slot, :rank].T
        _accumulate(out.view(-1, out.shape[-1]), low, B)

    def _batched(self, out: Tensor, x: Tensor, layout: Layout, times: int) -> None:
        import torch

        assert layout.slots is not None
        groups = len(layout.slots)
        rows = slice(layout.runs[0].begin * times, layout.runs[-1].end * times)
        A, B = self.A, self.B
        if layout.slots != self._whole:
            A, B = A[layout.index], B[layout.index]
        if self.embedding:
            ids = x[rows].reshape(groups, -1)
            low = torch.stack([torch.nn.functional.embedding(i, table) for i, table in zip(ids, A, strict=True)])
        else:
            low = torch.bmm(x[rows].reshape(groups, -1, x.shape[-1]).to(A.dtype), A.transpose(1, 2))
        _accumulate(out[rows].view(groups, -1, out.shape[-1]), low, B)


def _accumulate(out: Tensor, low: Tensor, B: Tensor) -> None:
    """Add low B to `out`, for matrices or for batches of them."""
    import torch

    if out.dtype != B.dtype or torch.is_autocast_enabled(out.device.type):
        out.add_((low @ B.to(low.dtype)).to(out.dtype))
    elif out.dim() == 2:
        out.addmm_(low, B)
    else:
        out.baddbmm_(low, B)


class MixedAdapters:
    """LoRA adapters laid on a frozen model, of which every row of a batch chooses one, or none.

    >>> mixed = MixedAdapters(model, [first, second])  # doctest: +SKIP
    >>> with mixed.rows(["first", None, "second", "first"]):  # doctest: +SKIP
    ...     model.generate(**batch)

    Outside of `rows` the model is the base, untouched. Rows that share an adapter should stand together: each run of
    them is a product of its own. For inference: the adapters get no gradients.

    Attributes:
        names: of the adapters, in order.
    """

    def __init__(self, model: Any, adapters: Sequence[Adapter], names: Sequence[str] | None = None) -> None:
        """Read the factors and hook them onto the modules.

        Args:
            model: of transformers, on its device and in its dtype, which the factors get.
            adapters: opened; the weight of each counts.
            names: what `rows` calls them; the names of their folders by default.

        Raises:
            UnsupportedError: an adapter that cannot share a pass: a DoRA, one with `modules_to_save`, ...
            MismatchError: an adapter of another base.
        """
        self.names = tuple(names) if names is not None else tuple(_name(adapter) for adapter in adapters)
        if len(set(self.names)) != len(self.names) or len(self.names) != len(adapters):
            raise OptionError(f"The adapters are called {', '.join(self.names)}; each needs a name of its own.")
        for adapter in adapters:
            reason = alone_by_files(adapter) or alone_by_model(adapter, model)
            if reason is not None:
                raise UnsupportedError(f"{adapter.label} {reason}, so it cannot share a batch with other adapters.")
        self._layout: Layout | None = None
        self._device = next(model.parameters()).device
        modules = dict(model.named_modules())
        found = {lora.module: None for adapter in adapters for lora in adapter.loras}
        self._handles = [
            modules[name].register_forward_hook(self._hook(_branches(adapters, name, modules[name]))) for name in found
        ]

    def _hook(self, branches: Branches) -> Any:
        def add(_module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
            if self._layout is None or not self._layout.runs:
                return output
            return branches.add_to(output, inputs[0], self._layout)

        return add

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it, row i of every batch is that of the adapter `names[i]`, or of the base where that is None."""
        known = {name: slot for slot, name in enumerate(self.names)} | {None: -1}
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            raise OptionError(f"There is no adapter {unknown!r}; there are {', '.join(self.names)}.")
        before, self._layout = self._layout, Layout.of([known[name] for name in names], self._device)
        try:
            yield
        finally:
            self._layout = before

    def close(self) -> None:
        """Take the adapters off again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> MixedAdapters:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _branches(adapters: Sequence[Adapter], name: str, module: Any) -> Branches:
    """The factors of all adapters at one module, padded to the largest rank."""
    import torch

    weight = module.weight
    out, wide = weight.shape
    embedding = isinstance(module, torch.nn.Embedding)
    if embedding or is_conv1d(module):
        out, wide = wide, out
    loras = [next((lora for lora in adapter.loras if lora.module == name), None) for adapter in adapters]
    ranks = [0 if lora is None else lora.A.shape[0] for lora in loras]
    R, K = max(ranks), len(adapters)
    wider = torch.promote_types(weight.dtype, torch.float32)
    A = torch.zeros((K, wide, R) if embedding else (K, R, wide), dtype=wider)
    B = torch.zeros(K, R, out, dtype=wider)
    reader = PlainReader()
    for slot, (adapter, lora) in enumerate(zip(adapters, loras, strict=True)):
        if lora is not None:
            (A[slot].T if embedding else A[slot])[: ranks[slot]] = reader.read(lora.A)
            B[slot, : ranks[slot]] = reader.read(lora.B).T.to(wider) * adapter.scale(name, ranks[slot])
    place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    return Branches(A.to(**place), B.to(**place), ranks, embedding)


def _name(adapter: Adapter) -> str:
    from pathlib import Path

    return Path(adapter.label.rstrip("/")).name or adapter.label
