"""What the steps of a plan share: tensors that several of them read, and copies of one stored tensor."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from surgery.checkpoint import StoredTensor

if TYPE_CHECKING:
    import torch


class TensorCache:
    """Tensors that several steps read, such as the stacked factors of a layer's experts; the latest, up to a limit."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[str, str, int, str], torch.Tensor] = OrderedDict()
        self._mutex = threading.Lock()

    def get(self, tensor: StoredTensor, load: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        """The tensor, read with `load` if it is not at hand. It is shared: not to be written to."""
        with self._mutex:
            if tensor.key not in self._held:
                self._held[tensor.key] = load(tensor)
                while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._limit:
                    self._held.popitem(last=False)
            self._held.move_to_end(tensor.key)
            return self._held[tensor.key]


class Copies:
    """Which output tensors have the bytes of stored tensors that are not on this disk, so that each is fetched once."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, int, str], Future[str]] = {}
        self._mutex = threading.Lock()

    def make(
        self, source: StoredTensor, output: str, fetch: Callable[[str], None], repeat: Callable[[str, str], None]
    ) -> None:
        """Fill `output` by `fetch`, or by `repeat` from an output that has the same bytes already."""
        with self._mutex:
            first = source.key not in self._made
            made = self._made.setdefault(source.key, Future())
        if not first:
            return repeat(made.result(), output)
        try:
            fetch(output)
        except BaseException as error:  # those who wait for these bytes fail as well
            made.set_exception(error)
            raise
        return made.set_result(output)
