"""The facts of a commit: what its files are, read from headers, configs and the card, the same wherever it came in.

`facts_of` is what both `push` into a folder and a server call when they commit. Files come from strangers: no more than
so many bytes of them are read, never the data of a tensor, and whatever is wrong with them keeps the facts out, with a
sentence why, and the commit not.

    version       of these rules; a commit with an earlier one can be examined again (`hub reindex`)
    kind          adapter, dense, moe
    relation      to what it was made from: adapter, merge, upcycle, finetune, quantized
    parents       each: source, role, relation, and where known revision and weights (hash of all tensors)
    base, base_revision, base_weights      of the first parent
    method        of an adapter: lora, dora, or PEFT's name of another
    ranks, targets, modules, task          of an adapter
    family, architecture, experts          of a checkpoint
    parameters, tensors, dtype, dtypes     dtypes: parameters by stored dtype
    shapes        of the weights that an adapter changes, or that a checkpoint has, see `examining.shape_key`
    weights       one hash for all tensors, where those of every file are known
    operation, inputs                      of surgery.json
    card          the keys of the card's front matter that a list shows
    unread        why there is no more than this
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.belonging import weights_id
from surgery.errors import FormatError, InputError, SurgeryError
from surgery.folder import Folder, WithoutRecords
from surgery.hub.interfaces import Content, FileEntry, Metadata
from surgery.hub.parcel import MAX_CARD
from surgery.hub.server.content_folder import ContentFolder
from surgery.hub.server.front_matter import CARD, parse
from surgery.source import NotAFile, Source, read_bytes

if TYPE_CHECKING:
    from surgery.hub.examining import Examined

FACTS_VERSION = 2
# Headers, indices, configs and surgery.json of one commit together. Taking JSON apart takes some forty times its size.
MOST_READ = 24_000_000
_MOST_FILES = 4096  # with weights
_MOST_ITEMS = 64
_LONGEST = 256
_SHOWN = ("tags", "license", "library_name", "pipeline_tag", "base_model", "base_model_relation", "language",
          "datasets")  # fmt: skip
_RELATIONS = ("adapter", "merge", "finetune", "quantized", "upcycle")
# One commit at a time is taken apart, so that many hostile ones take no more memory than one.
_one = threading.Lock()


class TooMuchToReadError(SurgeryError):
    """A commit has more headers and configs than are looked into."""


class _Budget:
    """How many bytes may still be read."""

    def __init__(self, label: str, left: int) -> None:
        self.label, self.left, self.limit = label, left, left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise TooMuchToReadError(f"{self.label} has more than {self.limit:,} bytes of headers and configs.")


class _BoundedSource(NotAFile):
    """A source that counts what is read of it, and is no file: nothing is unpickled, mapped or hashed from it."""

    def __init__(self, source: Source, budget: _Budget) -> None:
        self._source, self._budget = source, budget

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._budget.take(buffer.nbytes)
        self._source.read_into(offset, buffer)


class BoundedFolder(WithoutRecords):
    """A folder of which no more than `limit` bytes are read; then `FormatError`."""

    def __init__(self, under: Folder, limit: int = MOST_READ) -> None:
        self._under = under
        self._budget = _Budget(under.label, limit)

    @property
    def label(self) -> str:
        return self._under.label

    @property
    def provenance(self) -> Mapping[str, str]:
        return self._under.provenance

    def names(self) -> Sequence[str]:
        return self._under.names()

    def open(self, name: str) -> Source:
        return _BoundedSource(self._under.open(name), self._budget)


def stored_facts(
    content: Content, metadata: Metadata, files: Sequence[FileEntry], name: str, kind: str = "model"
) -> dict[str, object]:
    """The facts of files in a registry; of a dataset those of its card."""
    sums = {entry.path: entry.sha256 for entry in files}
    folder = ContentFolder(content, files, name)
    return facts_of(folder, lambda path: metadata.tensor_hashes(sums[path]), kind == "model")


def facts_of(
    folder: Folder, hashes: Callable[[str], Mapping[str, str] | None], weights: bool = True
) -> dict[str, object]:
    """The facts of a folder. Never raises.

    Args:
        folder: a commit's files, or any others.
        hashes: gives the BLAKE3-256 of a file's tensors where they are known.
        weights: whether to look at more than the card.
    """
    facts: dict[str, object] = {}
    card: Mapping[str, object] = {}
    with _one:
        bounded = BoundedFolder(folder)
        try:
            card = read_card(bounded)
            facts |= {"card": shown} if (shown := _shown(card)) else {}
            facts |= _examined(bounded, card, hashes) if weights else {}
        except SurgeryError as error:
            facts["unread"] = error.message[:500]
        except Exception as error:  # a stranger's config may trip what trusts one, and a commit may not fail by it
            facts["unread"] = (
                f"{folder.label} has a config or a header that cannot be understood ({type(error).__name__})."
            )
    return facts | {"version": FACTS_VERSION}


def _examined(
    folder: Folder, card: Mapping[str, object], hashes: Callable[[str], Mapping[str, str] | None]
) -> dict[str, object]:
    from surgery.hub.examining import examine

    names = folder.names()
    weights = [name for name in names if name.endswith((".safetensors", ".bin")) and "/" not in name]
    if not weights:
        return parent_facts({}, {}, card)
    if len(weights) > _MOST_FILES:
        raise FormatError(
            f"{folder.label} has {len(weights)} files with weights; at most {_MOST_FILES} are looked into."
        )
    found = examine(folder, check=False)
    facts = dict(found.facts) | parent_facts(found.facts, found.files.config, card)
    if (whole := _all_hashes(found, hashes)) is not None:
        facts["weights"] = weights_id(whole)
    return facts


def _all_hashes(found: Examined, hashes: Callable[[str], Mapping[str, str] | None]) -> Mapping[str, str] | None:
    """The hash of every tensor, if that of every tensor is known."""
    whole: dict[str, str] = {}
    for name in found.files.weights.names:
        whole |= hashes(name) or {}
    return {name: whole[name] for name in found.files.tensors} if whole.keys() >= found.files.tensors.keys() else None


# The card -------------------------------------------------------------------------------------------------------------


def read_card(folder: Folder) -> Mapping[str, object]:
    """The front matter of a folder's card; an empty object where there is none that can be read."""
    if CARD not in folder.names() or (source := folder.open(CARD)).size > MAX_CARD:
        return {}
    try:
        return parse(read_bytes(source, 0, source.size).decode())
    except (InputError, UnicodeDecodeError):
        return {}


def _shown(card: Mapping[str, object]) -> dict[str, object]:
    """Those keys of a card that a list needs, no longer than a list should be."""
    found: dict[str, object] = {}
    for key in _SHOWN:
        value = card.get(key)
        if isinstance(value, str) and 0 < len(value) <= _LONGEST:
            found[key] = value
        elif isinstance(value, list):
            found[key] = [item for item in value if isinstance(item, str) and 0 < len(item) <= _LONGEST][:_MOST_ITEMS]
    return found


# Parents --------------------------------------------------------------------------------------------------------------


def parent_facts(
    facts: Mapping[str, object], config: Mapping[str, object], card: Mapping[str, object]
) -> dict[str, object]:
    """What something was made from: from its config and `surgery.json`, and the card where these know no better.

    A base that they name without a namespace is a folder's name; if the card names exactly one base, that is what it is
    called. Further bases of the card are added.

    Args:
        facts: of `examine`: kind, base, operation and inputs.
        config: `config.json`, to tell quantised models.
        card: the front matter.
    """
    is_adapter = facts.get("kind") == "adapter"
    declared = card.get("base_model_relation")
    relation = declared if isinstance(declared, str) and declared in _RELATIONS else None
    named = [name for name in _texts(card.get("base_model")) if 0 < len(name) <= _LONGEST][:_MOST_ITEMS]
    parents = _recorded(facts, is_adapter)
    if is_adapter and isinstance(base := facts.get("base"), str):
        first = next((parent for parent in parents if parent["role"] == "base"), None)
        if first is None:
            first = {"role": "base", "relation": "adapter"}
            parents.insert(0, first)
        first["source"] = base[:_LONGEST]
        if isinstance(revision := facts.get("base_revision"), str):
            first["revision"] = revision[:_LONGEST]
    if parents and len(named) == 1 and named[0].count("/") == 1 and parents[0]["source"].count("/") != 1:
        parents[0]["source"] = named[0]
    known = {parent["source"].lower() for parent in parents}
    other = "adapter" if is_adapter else "quantized" if config.get("quantization_config") else "finetune"
    added = relation or other
    parents += [{"source": name, "role": "base", "relation": added} for name in named if name.lower() not in known]
    found: dict[str, object] = {"parents": parents[:_MOST_ITEMS]} if parents else {}
    if is_adapter:
        found["relation"] = "adapter"
    elif parents:
        ways = [parent["relation"] for parent in parents if parent["relation"] in _RELATIONS]
        found["relation"] = relation if relation and not facts.get("operation") else (ways or ["finetune"])[0]
    if parents:
        found["base"] = parents[0]["source"]
        if "weights" in parents[0]:
            found["base_weights"] = parents[0]["weights"]
    return found


def _recorded(facts: Mapping[str, object], is_adapter: bool) -> list[dict[str, str]]:
    """The inputs of `surgery.json` as parents, the one that others are added to first."""
    operation = str(facts.get("operation") or "")
    inputs = facts.get("inputs")
    found = []
    for item in inputs if isinstance(inputs, list) else []:
        if not isinstance(item, dict) or not isinstance(item.get("source"), str):
            continue
        role = str(item.get("role") or "base")
        parent = {key: str(item[key])[:_LONGEST] for key in ("source", "revision", "weights") if item.get(key)}
        found.append({**parent, "role": role, "relation": relation_of(operation, role, is_adapter)})
    order = ("base", "merged", "dense", "mixture", "expert")
    return sorted(found, key=lambda parent: order.index(parent["role"]) if parent["role"] in order else len(order))


def relation_of(operation: str, role: str, is_adapter: bool) -> str:
    """What an output is to an input that played `role` in an operation."""
    if role in ("dense", "expert"):
        return "upcycle"
    if role == "tuned":
        return "extract"
    if is_adapter:
        return "adapter" if role == "base" else operation or "adapter"
    if operation == "upcycle":
        return "upcycle"
    if operation in ("merge", "subtract", "switch"):
        return "merge"
    return "finetune" if role == "base" else operation or "finetune"


def _texts(value: object) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    return [item for item in listed if isinstance(item, str)]
