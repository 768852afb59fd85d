"""What there is to load, and the folders in which it is made."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from consumers import models

Write = Callable[[Path], object]
"""Makes an artefact at a path where nothing is yet."""


@dataclass(frozen=True)
class Artefact:
    """Something to load.

    Attributes:
        name: `family/artefact`.
        what: how it came to be, for the table.
        group: `written` by this project, `trained` by PEFT, or made to be `refused`.
        path: its folder.
        base: the checkpoint that an adapter acts on; for a checkpoint, itself.
        engines: the only ones to give it to; none for all.
        means: the artefact that says the same: an adapter before it was converted, say; none if only itself does.
    """

    name: str
    what: str
    group: str
    path: Path
    base: Path
    engines: tuple[str, ...] = ()
    means: str = ""

    @property
    def is_adapter(self) -> bool:
        return self.path != self.base

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]


class Workshop:
    """Makes artefacts in a folder: `bases/`, `tuned/`, `all/` (everything tuned), `adapters/`, `checkpoints/`.

    Attributes:
        all: what there is so far, by name.
        unconverted: adapters that `convert --to mlx` refuses, with what it says.
    """

    def __init__(self, root: Path, only: str = "") -> None:
        self.root, self.only = root, only
        self.all: dict[str, Artefact] = {}
        self.unconverted: dict[str, str] = {}

    @property
    def made(self) -> list[Artefact]:
        """What was asked for; others were made because something is made of them."""
        return [one for one in self.all.values() if self.only in one.name]

    @property
    def needed(self) -> list[Artefact]:
        """What was asked for, and what says what that means: others, and the bases."""
        names = {name for one in self.made for name in (one.name, one.means, f"{one.family}/saved")}
        return [one for one in self.all.values() if one.name in names]

    def wants(self, family: str) -> bool:
        """Whether anything of a family may be among what is to be made."""
        return "/" not in self.only or self.only.partition("/")[0] == family

    def base(self, family: str) -> Path:
        return self._model("bases", family, lambda: models.make(family))

    def base32(self, family: str) -> Path:
        """The same weights in float32, to be merged into without rounding."""
        return self._model("bases32", family, lambda: models.make(family), torch.float32)

    def older(self, family: str) -> Path:
        """The base with a config that mlx-lm, too, understands in full."""
        folder = self.root / "older" / family
        return folder if folder.exists() else models.older_config(self.base(family), folder)

    def tuned(self, family: str) -> Path:
        return self._model("tuned", family, lambda: models.fine_tune(models.make(family)))

    def tuned_otherwise(self, family: str) -> Path:
        return self._model("other", family, lambda: models.fine_tune(models.make(family), seed=2))

    def tuned_throughout(self, family: str) -> Path:
        return self._model("all", family, lambda: models.fine_tune(models.make(family), everything=True))

    def _model(self, kind: str, family: str, make: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Path:
        folder = self.root / kind / family
        return folder if folder.exists() else models.save(make(), folder, dtype)

    def found(self, group: str, name: str, what: str, folder: Path) -> None:
        """Add a checkpoint that is there already."""
        self.all[name] = Artefact(name, what, group, folder, folder)

    def adapter(self, name: str) -> Path:
        """The folder of an adapter that was made."""
        return self.all[name].path

    def add(
        self,
        group: str,
        name: str,
        what: str,
        write: Write,
        base: Path | None = None,
        *,
        means: str = "",
        engines: tuple[str, ...] = (),
    ) -> None:
        """Let `write` make the artefact, in a fresh folder of its own."""
        folder = self.root / ("adapters" if base else "checkpoints") / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(folder)
        self.all[name] = Artefact(name, what, group, folder, base or folder, engines, means)
