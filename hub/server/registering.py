"""Taking in a shard: files become visible only when everything that is said of them has been proved.

For each file: that its xorbs are stored, and that this person uploaded them or belongs to who did; that each range of
chunks is there and has the length that is said; that the sender knows the hashes of these chunks; that the file's Xet
hash follows from them; and, by putting it together once, that its SHA-256 is the one that is said. The recipe that is
then written names the xorbs in which the chunks really lie (`surgery.hub.xet.placement`).
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Collection, Mapping

from surgery.errors import FormatError, InputError, IntegrityError
from surgery.hub.interfaces import Content
from surgery.hub.passing import PassingTensors
from surgery.hub.server.interfaces import ChunkIndex
from surgery.hub.server.placing import lost, placement_of, touch_xorbs
from surgery.hub.xet import hashes
from surgery.hub.xet.placement import Placement, joined
from surgery.hub.xet.recipes import AssembledSource, Recipe
from surgery.hub.xet.shards import ShardFile, Term, read_files

Note = Callable[[Mapping[str, Mapping[str, str]]], None]
# Of a file: raises where this server does not take one of so many bytes.
Check = Callable[[str, int], None]
# Chunks that the files of a shard may have together: half a terabyte as clients cut files, twice that in the longest
# chunks. A shard of a few kilobytes may name the same ones again and again.
MAX_CHUNKS = 1 << 23


def register(
    content: Content,
    index: ChunkIndex,
    data: bytes,
    visible: Collection[str],
    holders: Collection[str],
    note: Note,
    check: Check = lambda _sha256, _size: None,
) -> None:
    """Take in a shard. Raises `FormatError`, `InputError` or `IntegrityError`, and keeps what came before.

    Args:
        content: where the xorbs are.
        index: who has them.
        data: the shard.
        visible: the namespaces whose xorbs may be referred to.
        holders: the namespaces that have the files from now on.
        note: told the hashes of the tensors of safetensors files, which are taken in passing.
        check: asked of each file before it is put together.
    """
    files = read_files(data)
    count = sum(term.end - term.begin for file in files for term in file.terms)
    if count > MAX_CHUNKS:
        raise InputError(f"The shard has files of {count} chunks, more than {MAX_CHUNKS}; send fewer at once.")
    for file in files:
        _register(content, index, file, visible, holders, note, check)


def _register(
    content: Content,
    index: ChunkIndex,
    file: ShardFile,
    visible: Collection[str],
    holders: Collection[str],
    note: Note,
    check: Check,
) -> None:
    name = hashes.text(file.digest)
    if file.sha256 is None or len(file.proofs) != len(file.terms):
        raise FormatError(f"File {name} of the shard comes without its SHA-256, or without the proof of its ranges.")
    sha256 = hashes.text(file.sha256)
    check(sha256, file.size)
    xorbs = {term.xorb for term in file.terms}
    for xorb in index.unheld(xorbs, visible):
        raise InputError(f"File {name} of the shard refers to xorb {hashes.text(xorb)}, which was not uploaded.")
    try:
        placed = {xorb: placement_of(content, index, xorb) for xorb in xorbs}
    except FormatError:  # gc was killed before it could forget one
        raise InputError(f"File {name} of the shard refers to a xorb that is gone; upload it again.") from None
    # Each made once, however often it is named.
    known_chunks = {xorb: found.index.chunks(0, len(found.index)) for xorb, found in placed.items()}
    chunks: list[tuple[bytes, int]] = []
    terms: list[Term] = []
    for term, proof in zip(file.terms, file.proofs, strict=True):
        stored = placed[term.xorb].index
        if term.end > len(stored) or stored.size(term.begin, term.end) != term.size:
            raise FormatError(f"File {name} of the shard refers to chunks {term.begin} to {term.end} of xorb "
                              f"{hashes.text(term.xorb)}, which has {len(stored)}, or other lengths.")  # fmt: skip
        found = known_chunks[term.xorb][term.begin : term.end]
        if hashes.range_hash(digest for digest, _ in found) != proof:
            raise IntegrityError(f"File {name} of the shard comes with a wrong proof of its chunks.")
        chunks += found
        terms += placed[term.xorb].within(term.begin, term.end)
    if hashes.file_hash(chunks) != file.digest:
        raise IntegrityError(f"File {name} of the shard has another hash than its chunks give.")
    if lost(content, terms):
        raise InputError(f"File {name} of the shard refers to a xorb that is gone; upload it again.")
    recipe = Recipe(sha256, file.digest, joined(terms))
    known = content.recipe(sha256)
    if known is not None and (known.digest != file.digest or lost(content, known.terms)):
        known = None
    if known is None and _sha256(content, recipe, note) != sha256:
        raise IntegrityError(f"File {name} of the shard does not have the SHA-256 {sha256}.")
    asked_for = {digest for digest, _ in chunks if hashes.is_asked_for(digest)}
    if chunks:
        asked_for.add(chunks[0][0])
    with index.keeping():
        touch_xorbs(content, {term.xorb for term in recipe.terms})
        if known is None or not content.touch(sha256):
            content.keep_recipe(recipe)
        index.add_file(recipe, xorbs, _whole(file.terms, placed), holders, asked_for)


def _whole(terms: Collection[Term], placed: Mapping[bytes, Placement]) -> set[bytes]:
    """The xorbs of which these terms name every chunk."""
    reached = dict.fromkeys(placed, 0)
    for term in sorted(terms, key=lambda term: term.begin):
        if term.begin <= reached[term.xorb]:
            reached[term.xorb] = max(reached[term.xorb], term.end)
    return {xorb for xorb, end in reached.items() if end == len(placed[xorb].index)}


def _sha256(content: Content, recipe: Recipe, note: Note) -> str:
    """The SHA-256 of a file put together; one thread unpacks and another hashes, the file and its tensors."""
    source = AssembledSource(hashes.text(recipe.digest), recipe, content.open_xorb)
    hasher = hashlib.sha256()
    tensors = PassingTensors(source.size)
    waiting: queue.Queue[bytes | memoryview | None] = queue.Queue(64)

    def hash_all() -> None:
        while (block := waiting.get()) is not None:
            hasher.update(block)
            tensors.update(block)

    thread = threading.Thread(target=hash_all, name="sha256")
    thread.start()
    try:
        for block in source.blocks():
            waiting.put(block)
    finally:
        waiting.put(None)
        thread.join()
    if hasher.hexdigest() == recipe.sha256 and (found := tensors.hashes) is not None:
        note({recipe.sha256: found})
    return hasher.hexdigest()
