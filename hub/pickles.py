"""Finding pickles by what is in a file, and saying what they would import. Nothing is ever unpickled.

A pickle is a program that whoever loads it runs. Of each one the names that it imports are told from its opcodes; how
the stack stands at the moment is followed only as far as Python's own pickler goes, and what goes further counts as
hidden on purpose. The verdict is for people: no list of names makes a pickle safe from its reader's point of view.
Source: Python's `pickletools`; the formats of `torch.save` (a zip archive with `data.pkl`, before 1.6 several pickles
in a row), `joblib.dump` and `numpy.save`; the names are those that torch's own `weights_only` unpickler allows.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from surgery.errors import SurgeryError
from surgery.source import Source

# Of what `look` finds. Whoever keeps verdicts looks again at files whose verdict has another one: raise it with every
# change that has `look` find more, or say something else.
LOOK_VERSION = 1
SAFE, SUSPICIOUS, UNSAFE = "safe", "suspicious", "unsafe"
# Suffixes that say pickle. `.bin` does not: many things are called so.
SUFFIXES = (".pkl", ".pickle", ".joblib", ".dill", ".pt", ".pth", ".ckpt")
_HEAD = 512
# Bytes of one pickle that are looked at (a checkpoint's, without its tensors, has one or two MB), its opcodes, and the
# bytes of an archive that are read to find its members.
_MAX_PICKLE = 16 << 20
_MAX_OPCODES = 500_000
_MAX_ARCHIVE = 64 << 20
_MAX_MEMBERS = 100
_MAX_IMPORTS = 200

_HARMLESS = re.compile(
    r"torch\._utils\._rebuild_(tensor(_v2|_v3)?|parameter(_with_state)?|qtensor|sparse_tensor|meta_tensor_no_storage"
    r"|device_tensor_from_(numpy|cpu_tensor)|wrapper_subclass|nested_tensor)"
    r"|torch\.([A-Z][A-Za-z0-9]*)?Storage|torch\.storage\.(Typed|Untyped|_Legacy)Storage|torch\.(Size|device|Tensor)"
    r"|torch\.(float|double|half|bfloat|u?int|short|long|bool|complex|quint|qint|float8_)[a-z0-9_]*"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout|collections\.(OrderedDict|defaultdict|Counter)"
    r"|numpy\.(_?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|ndarray|dtype|[a-z]*int\d+|float\d+|bool_)"
    r"|numpy\.dtypes\.[A-Z][A-Za-z0-9]*DType|_codecs\.encode|(copyreg|copy_reg)\._reconstructor"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|complex|bytearray|bytes|str|bool|slice|range"
    r"|object)|datetime\.(date|time|datetime|timedelta|timezone)"
)
_DANGEROUS = frozenset({
    "__builtin__", "_io", "_pickle", "asyncio", "bdb", "builtins", "cProfile", "code", "codeop", "commands", "ctypes",
    "dill", "doctest", "functools", "http", "importlib", "inspect", "io", "joblib", "marshal", "multiprocessing", "nt",
    "operator", "os", "pathlib", "pdb", "pickle", "pip", "pkgutil", "platform", "posix", "profile", "pty", "pydoc",
    "requests", "runpy", "setuptools", "shutil", "signal", "smtplib", "socket", "ssl", "subprocess", "sys", "tempfile",
    "threading", "timeit", "trace", "types", "urllib", "venv", "webbrowser", "zipimport",
})  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_STRINGS = frozenset({
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING",
})  # fmt: skip
# What may be written in more ways than `pickletools` reads.
_VALUES = _STRINGS | {"INT", "LONG", "FLOAT"}
# What its readers say of an argument that goes on beyond the data.
_TOO_SHORT = re.compile(r"expected (\d+) bytes in a |not enough data in stream|no newline found")
_PUTS, _GETS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"}), frozenset({"GET", "BINGET", "LONG_BINGET"})
_CALLS = frozenset({"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"})


@dataclass(frozen=True)
class Pickled:
    """What was found in a file.

    Attributes:
        level: `safe` where it imports only what tensors are made with, `unsafe` where it imports what runs commands,
            reads files or hides, `suspicious` for all between and for what could not be looked through.
        imports: `module.name`, with `?` for what is hidden.
        message: one sentence.
    """

    level: str
    imports: tuple[str, ...]
    message: str


def look(source: Source) -> Pickled | None:
    """What a file imports if it is a pickle, or an archive with one; None for all else. No content makes it raise."""
    head = _read(source, 0, min(source.size, _HEAD))
    if head.startswith(b"PK\x03\x04"):
        return _in_archive(source)
    if head.startswith(b"\x93NUMPY"):
        if re.search(rb"'descr':[^}]*'\|?O", head) is None:
            return None
        return Pickled(SUSPICIOUS, (), "It is an array of objects, which numpy keeps as a pickle.")
    reading = _begin(head)
    if not _is_pickle(reading) and reading.cut and source.size > len(head):
        # What comes first may be long, and mean nothing.
        reading = _begin(_read(source, 0, min(source.size, _MAX_PICKLE)))
        if not _is_pickle(reading) and reading.cut and reading.needed <= source.size and source.size > reading.seen:
            return Pickled(SUSPICIOUS, (), "It begins like a pickle, with more than can be looked through.")
    if not _is_pickle(reading):
        return None
    return _verdict([_read(source, 0, min(source.size, _MAX_PICKLE))], source.size > _MAX_PICKLE)


def is_called_so(path: str) -> bool:
    """Whether the name of a file says that it is a pickle."""
    return path.lower().endswith(SUFFIXES)


def sniff(path: str, sample: bytes) -> bool:
    """Whether a file is a pickle, as far as its name and its first bytes tell."""
    if is_called_so(path):
        return True
    if sample.startswith(b"PK\x03\x04"):
        return b"data.pkl" in sample
    return _is_pickle(_begin(sample))


def judged(path: str, found: Pickled | None) -> Pickled | None:
    """The same together with the name of the file."""
    if found is not None or not is_called_so(path):
        return found
    return Pickled(SUSPICIOUS, (), "It is called like a pickle, and could not be looked into.")


def _read(source: Source, begin: int, size: int) -> bytes:
    data = bytearray(size)
    source.read_into(begin, memoryview(data))
    return bytes(data)


def _begin(head: bytes) -> _Reading:
    reading = _Reading(head)
    reading.run()
    return reading


def _is_pickle(reading: _Reading) -> bool:
    """A pickle of protocol 2 or later says so; an older one is known by calling what it imported."""
    # Other files may begin with these two bytes.
    return reading.calls or (reading.says_so and reading.count >= 3)


class _Reading:
    """The opcodes of one pickle, as far as they go.

    Attributes:
        imports: what it imports, in order, without repeats.
        calls: whether it imports something by a name that can be one, and then calls something.
        whole: whether it comes to its end.
        length: bytes up to there.
        says_so: whether it begins as one of protocol 2 or later.
        count: opcodes that were gone through.
        cut: whether it may go on beyond the bytes that were given, or beyond the opcodes that are gone through.
        needed: how many bytes there have to be for that, as far as it is said.
        seen: how many were gone through, or given if those ended.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.says_so = data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        self.count = 0
        self.cut = False
        self.needed = 0
        self.seen = len(data)
        self.imports: dict[str, None] = {}
        self.calls = False
        self.whole = False
        self.length = 0
        # Strings that are on top of the stack for certain; what lies below is not known.
        self._top: list[str | None] = []
        self._memo: dict[int, str | None] = {}
        self._depth = 0
        self._marks: list[int] = []

    def run(self, most: int = _MAX_OPCODES) -> int:
        """Go through it. Returns how many opcodes there were."""
        try:
            for opcode, argument, position in self._opcodes():
                if not self._stand(opcode):
                    break
                self.count += 1
                self._step(opcode.name, argument)
                if opcode.name == "STOP":
                    self.whole, self.length = True, position + 1
                elif self.count >= most:
                    self.cut, self.seen = True, position
                    break
        except (ValueError, struct.error, OverflowError):
            pass  # as far as it went is what a reader would have run
        return self.count

    def _opcodes(self) -> Iterator[tuple[pickletools.OpcodeInfo, object, int]]:
        """Each opcode with its argument, and where it begins, as `pickletools.genops` has them.

        That stops at values which readers take: numbers such as `0x10`, text in other encodings. Those are None here.
        """
        file = io.BytesIO(self._data)
        while True:
            position = file.tell()
            code = file.read(1)
            if not code:
                self.cut = True
                return
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                return
            argument: object = None
            if opcode.arg is not None:
                try:
                    argument = opcode.arg.reader(file)
                except (ValueError, struct.error, OverflowError) as error:
                    if (short := _TOO_SHORT.match(str(error))) is not None:
                        self.cut, self.needed = True, position + int(short[1] or 0)
                        return
                    if opcode.name not in _VALUES:
                        return
            yield opcode, argument, position
            if opcode.name == "STOP":
                return

    def _stand(self, opcode: pickletools.OpcodeInfo) -> bool:
        """Whether the stack has what an opcode takes: where it has not, a reader stops too; and how it is after it."""
        before = opcode.stack_before
        if opcode.name == "MARK":
            self._marks.append(self._depth)
            return True
        if opcode.name == "POP" and self._marks and self._marks[-1] == self._depth:
            self._marks.pop()
            return True
        taken = len(before)
        if pickletools.markobject in before:
            if not self._marks:
                return False
            self._depth, taken = self._marks.pop(), before.index(pickletools.markobject)
        if self._depth < taken:
            return False
        self._depth += len(opcode.stack_after) - taken
        return True

    def _step(self, name: str, argument: object) -> None:
        if name in _STRINGS:
            self._top.append(argument if isinstance(argument, str) else None)
        elif name in _GETS:
            self._top.append(self._memo.get(argument) if isinstance(argument, int) else None)
        elif name in _PUTS and isinstance(argument, int):
            self._memo[argument] = self._top[-1] if self._top else None
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top[-1] if self._top else None
        elif name not in ("PROTO", "FRAME"):
            if name in ("GLOBAL", "INST"):
                self._import(*str(argument).partition(" ")[::2])
            elif name == "STACK_GLOBAL":
                module, attribute = self._top[-2:] if len(self._top) >= 2 else (None, None)
                self._import(module or "?", attribute or "?")
            elif name.startswith("EXT"):
                self._import("?", "?")
            self.calls = self.calls or (name in _CALLS and bool(self.imports))
            self._top.clear()

    def _import(self, module: str, name: str) -> None:
        hidden = "?" in (module, name)
        if hidden or (_NAME.fullmatch(module) and _NAME.fullmatch(name)):
            if len(self.imports) < _MAX_IMPORTS:
                self.imports[f"{module}.{name}"] = None
        elif self.imports or self._data[:1] == b"\x80":
            self.imports["?.?"] = None


def level_of(name: str) -> str:
    """What is to be thought of an import."""
    if _HARMLESS.fullmatch(name):
        return SAFE
    return UNSAFE if "?" in name or name.partition(".")[0] in _DANGEROUS else SUSPICIOUS


def _verdict(pickles: list[bytes], cut: bool = False) -> Pickled:
    imports: dict[str, None] = {}
    whole = not cut
    room = _MAX_OPCODES
    for data in pickles:
        # torch.save of old wrote several in a row, and then the tensors.
        for reading, count in _in_a_row(data, room):
            imports |= reading.imports
            whole = whole and reading.whole
            room -= count
    levels = {level_of(name) for name in imports}
    if UNSAFE in levels:
        bad = [name for name in imports if level_of(name) == UNSAFE]
        return Pickled(UNSAFE, tuple(imports), f"It is a pickle that imports {', '.join(bad[:5])}.")
    if not whole:
        return Pickled(SUSPICIOUS, tuple(imports), "It is a pickle that could not be looked through to its end.")
    if SUSPICIOUS in levels:
        odd = [name for name in imports if level_of(name) == SUSPICIOUS]
        return Pickled(SUSPICIOUS, tuple(imports), f"It is a pickle that imports {', '.join(odd[:5])}.")
    return Pickled(SAFE, tuple(imports), "It is a pickle that imports only what tensors are made with.")


def _in_a_row(data: bytes, room: int) -> Iterator[tuple[_Reading, int]]:
    """Pickle after pickle, each with the number of its opcodes, of which there may be `room` together."""
    for number in range(_MAX_MEMBERS):
        reading = _Reading(data)
        count = reading.run(max(room, 1))
        room -= count
        if number and not reading.whole and not reading.imports:
            return  # what follows the last of them are tensors
        yield reading, count
        if not reading.whole:
            return
        data = data[reading.length :]
        if not data:
            return


class _Archive(io.RawIOBase):
    """A source as a file, of which only so much is read."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._place = 0
        self._room = _MAX_ARCHIVE

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._source.size}[whence]
        if start + offset < 0:
            raise ValueError("a place before the beginning")
        self._place = start + offset
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._source.size - self._place, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > self._room:
            raise ValueError("too much to read")
        self._room -= count
        data = _read(self._source, self._place, count)
        self._place += count
        return data


def _in_archive(source: Source) -> Pickled | None:
    try:
        with zipfile.ZipFile(_Archive(source)) as archive:
            members = [item for item in archive.infolist() if item.filename.lower().endswith(".pkl")]
            if not members:
                return None
            pickles = []
            for member in members[:_MAX_MEMBERS]:
                with archive.open(member) as file:
                    pickles.append(file.read(_MAX_PICKLE + 1))
                if sum(map(len, pickles)) > _MAX_PICKLE:
                    break
            cut = len(pickles) < len(members) or sum(map(len, pickles)) > _MAX_PICKLE
    # What zipfile and its decoders raise for archives that are damaged, encrypted or packed in other ways.
    except (zipfile.BadZipFile, ValueError, RuntimeError, OSError, EOFError, zlib.error, struct.error, SurgeryError):
        return Pickled(SUSPICIOUS, (), "It is an archive that could not be looked into.")
    return _verdict(pickles, cut)
