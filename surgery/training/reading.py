"""Rows of data from a file, a folder or the Hub, through `datasets`, with the file and line of each for errors."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, InputError, MissingExtraError
from surgery.hashing import new_hash

_BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_TEXT = (".txt", ".md", ".py", ".rst")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_ARRAYS = ".npz"
KINDS = {
    "tokens": ("input_ids",),
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "image": ("image", "label"),
    "label": ("text", "label"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Rows:
    """Examples as they are stored.

    Attributes:
        dataset: the rows.
        label: what the user called them.
        kind: one of `KINDS`: what an example is, by the columns there are.
        digest: BLAKE3-256 of the files, or the fingerprint of a data set on the Hub.
        files: those read, in order.
    """

    dataset: Any = field(repr=False)
    label: str
    kind: str
    digest: str
    files: Sequence[Path] = ()

    def place(self, row: int) -> str:
        """Where a row lies: file and line where that can be told."""
        if len(self.files) != 1:
            return f"{self.label}, example {row + 1}"
        (file,) = self.files
        builder = _BUILDERS.get(file.suffix.lower())
        line = None
        if builder == "json" and file.suffix.lower() != ".json":
            line = _nth(_jsonl_lines(file), row)
        elif builder == "csv":
            line = _nth(_csv_lines(file), row)
        return f"{file}, example {row + 1}" if line is None else f"{file}, line {line}"

    def fault(self, error: Exception) -> FormatError:
        """What is wrong with the files, where reading the rows raised `error`."""
        found = (text for file in self.files for text in _faults(_BUILDERS.get(file.suffix.lower(), ""), file))
        return FormatError(next(found, None) or f"{self.label} cannot be read: {_reason(error)}.")


def datasets_package() -> Any:
    """The package, or the error that names the extra."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    return datasets


def read_rows(source: str) -> Rows:
    """Open data. Raises `InputError` naming file and line where something is wrong with it."""
    place = Path(source)
    if not place.exists():
        return _from_hub(source)
    files = _files(place)
    if not files:
        raise InputError(f"{source} holds no files of a kind that is known: {', '.join([*_BUILDERS, *_TEXT])}, images.")
    if files[0].suffix == _ARRAYS:
        return Rows(_arrays(files[0]), source, "image", _digest(files), files)
    if place.is_dir() and files[0].suffix.lower() in _IMAGES:
        found = _load("imagefolder", source, files, data_dir=str(place), drop_labels=False)
    elif files[0].suffix.lower() in _TEXT:
        found = _load("text", source, files, data_files=[str(file) for file in files], sample_by="document")
    else:
        options: dict[str, Any] = {"sep": "\t"} if files[0].suffix.lower() == ".tsv" else {}
        builder = _BUILDERS[files[0].suffix.lower()]
        found = _load(builder, source, files, data_files=[str(file) for file in files], **options)
    return Rows(found, source, _kind(source, found), _digest(files), files)


def _files(place: Path) -> list[Path]:
    """The files of a source that are all of one kind; of a folder the kind that comes first in the list."""
    if place.is_file():
        if place.suffix.lower() not in (*_BUILDERS, *_TEXT, _ARRAYS):
            known = ", ".join((*_BUILDERS, *_TEXT, _ARRAYS))
            raise InputError(f"{place} is of no kind that is known here: {known}, or a folder of such or of images.")
        return [place]
    found = [path for path in sorted(place.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    for suffixes in (*((suffix,) for suffix in _BUILDERS), _IMAGES, _TEXT):
        if chosen := [path for path in found if path.suffix.lower() in suffixes]:
            return chosen
    return []


def _load(builder: str, source: str, files: Sequence[Path], **options: Any) -> Any:
    datasets = datasets_package()
    try:
        with quiet_datasets():
            found = datasets.load_dataset(builder, split="train", **options)
    except Exception as error:  # `datasets` raises whatever its readers do
        # Whatever it is, the reason lies in the file; its own message names neither file nor line.
        problem = next((text for file in files for text in _faults(builder, file)), None)
        raise FormatError(problem or f"{source} cannot be read: {_reason(error)}.") from error
    if not len(found):
        raise InputError(f"{source} holds no examples.")
    return found


def _from_hub(source: str) -> Rows:
    name, _, split = source.partition(":")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (*_BUILDERS, *_TEXT, _ARRAYS):
        raise InputError(f"{source} does not exist.")
    datasets = datasets_package()
    try:
        with quiet_datasets():
            found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # `datasets` raises whatever its readers do
        raise InputError(f"{source} is neither a path nor a data set that can be fetched: {_reason(error)}.") from error
    return Rows(found, source, _kind(source, found), str(found._fingerprint))


def _kind(source: str, dataset: Any) -> str:
    columns = set(dataset.column_names)
    for kind, needed in KINDS.items():
        if columns >= set(needed):
            return kind
    raise InputError(
        f"{source} has the columns {', '.join(map(repr, sorted(columns)))}, expected 'text', 'prompt' and "
        "'completion', 'messages', 'text' and 'label', 'image' and 'label', or 'input_ids'."
    )


def _arrays(file: Path) -> Any:
    """`images` [N, H, W], [N, H, W, C] or [N, C, H, W] and `labels` [N] of a file that numpy wrote."""
    import numpy as np

    datasets = datasets_package()
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("images", "labels") if name in content}
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is no archive of arrays that numpy can read: {_reason(error)}.") from error
    if len(arrays) < 2 or len(arrays["images"]) != len(arrays["labels"]) or arrays["images"].ndim not in (3, 4):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "neither"
        raise InputError(f"{file} has {shapes}, expected images of N x H x W (x C) and as many labels.")
    images, labels = arrays["images"], arrays["labels"]
    if not len(images):
        raise InputError(f"{file} holds no examples.")
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise InputError(
            f"{file} has labels of {labels.dtype} {list(labels.shape)}, expected a whole number for each image."
        )
    shape = images.shape[1:]
    kind = datasets.Array2D if len(shape) == 2 else datasets.Array3D
    features = datasets.Features({"image": kind(shape, str(images.dtype)), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": list(images), "label": labels.astype("int64")}, features=features)


# Where a fault lies ---------------------------------------------------------------------------------------------------


def _faults(builder: str, file: Path) -> Iterator[str]:
    """A sentence for each thing that is wrong with a file."""
    if file.stat().st_size == 0:
        yield f"{file} is empty."
    elif builder == "json":
        whole = file.read_bytes()
        for number, line in enumerate(whole.split(b"\n") if file.suffix.lower() != ".json" else [whole], 1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except ValueError as error:
                yield f"{file}, line {number}: not JSON ({_reason(error)}), expected one object to a line."
                continue
            if not isinstance(content, dict) and file.suffix.lower() != ".json":
                yield f"{file}, line {number}: {type(content).__name__}, expected an object."
    elif builder == "csv":
        width = 0
        try:
            with open(file, newline="", encoding="utf-8") as opened:
                reader = csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                for row in reader:
                    width = width or len(row)
                    if row and len(row) != width:
                        yield f"{file}, line {reader.line_num}: {len(row)} fields, expected {width}."
        except (UnicodeDecodeError, csv.Error) as error:
            yield f"{file} is no CSV in UTF-8: {_reason(error)}."


def _jsonl_lines(file: Path) -> Iterator[int]:
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number


def _csv_lines(file: Path) -> Iterator[int]:
    with open(file, newline="", encoding="utf-8", errors="replace") as opened:
        reader = csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        next(reader, None)
        before = reader.line_num
        for row in reader:
            if row:
                yield before + 1
            before = reader.line_num


def _nth(numbers: Iterator[int], index: int) -> int | None:
    return next((number for position, number in enumerate(numbers) if position == index), None)


def _digest(files: Sequence[Path]) -> str:
    """BLAKE3-256 of one file's bytes, or of the names and hashes of several."""
    digests = []
    for file in files:
        hasher = new_hash()
        with open(file, "rb") as opened:
            while chunk := opened.read(4 << 20):
                hasher.update(chunk)
        digests.append(hasher.hexdigest())
    if len(digests) == 1:
        return digests[0]
    hasher = new_hash()
    for file, digest in zip(files, digests, strict=True):
        hasher.update(f"{file.name}\0{digest}\n".encode(errors="surrogateescape"))
    return hasher.hexdigest()


def _reason(error: BaseException) -> str:
    """The last words of what went wrong, as part of a sentence."""
    cause = error.__cause__ or error
    text = cause.msg if isinstance(cause, json.JSONDecodeError) else str(cause)
    lines = text.strip().splitlines() or [type(cause).__name__]
    return lines[0].rstrip(".")


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from drawing bars of its own for a while."""
    datasets = datasets_package()
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    level: Callable[[int], None] = datasets.utils.logging.set_verbosity
    before = datasets.utils.logging.get_verbosity()
    level(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        level(before)
        if shown:
            datasets.enable_progress_bars()


def source_name(source: str) -> str:
    """What to call data in an output: a file's name without its path, or an id."""
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) else source
