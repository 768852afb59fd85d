"""Refusing to merge what was made for another base, on the evidence of hashes.

Before the work, a few of the tensors that an adapter changes are hashed and compared with what its `surgery.json` has
on record of its base; after it, when every tensor has been read and hashed anyway, all of them. A base that is itself
an output is also known by its own record: an adapter of the base that it was merged from is of the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from surgery.adapter import Adapter
from surgery.belonging import Belonging, judge, recorded_hashes
from surgery.checkpoint import Checkpoint
from surgery.errors import MismatchError
from surgery.hashing import HashBook
from surgery.ops.fitting import Change
from surgery.provenance import read_provenance

# What the look before the work may read: so many tensors of each adapter, and so many bytes.
_PROBED = 4
_PROBED_BYTES = 64_000_000


def changed_by(changes: Mapping[str, Change], number: int) -> list[str]:
    """Tensors of the base that adapter `number` adds to."""
    return [
        name
        for name, change in changes.items()
        if change.base is not None
        and any(part.adapter == number for block in change.blocks for part in block.contributions)
    ]


def refuse_by_probe(base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change]) -> None:
    """Look at the smallest tensors. Raises `MismatchError` for an adapter that was made for another base."""
    hashes = HashBook()

    def probe(names: list[str]) -> list[str]:
        ordered = sorted(names, key=lambda name: (base.tensors[name].nbytes, name))[:_PROBED]
        return [name for name in ordered if base.tensors[name].nbytes <= _PROBED_BYTES // _PROBED]

    _refuse(base, adapters, changes, lambda name: hashes.require(base.tensors[name]), probe)
    hashes.save()


def refuse_by_hashes(
    base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change], hashes: HashBook
) -> None:
    """Look at every tensor whose hash is known by now. Raises `MismatchError` likewise."""
    _refuse(base, adapters, changes, lambda name: hashes.get(base.tensors[name]), lambda names: names)


def note_other_base(base: Checkpoint, tuned: Checkpoint) -> tuple[str, ...]:
    """What to say of an extraction whose TUNED has another base than BASE on record. It may be meant so."""
    recorded, source = recorded_hashes(read_provenance(tuned.folder), "base")
    # A fine-tune changes matrices; norms it may well leave as they are.
    tensors = [base.tensors[name] for name in recorded if name in base.tensors and len(base.tensors[name].shape) > 1]
    names = [tensor.name for tensor in sorted(tensors, key=lambda tensor: (tensor.nbytes, tensor.name))]
    hashes = HashBook()
    probed = [name for name in names[:_PROBED] if base.tensors[name].nbytes <= _PROBED_BYTES // _PROBED]
    verdict = judge(recorded, probed, lambda name: hashes.require(base.tensors[name]), source)
    if not verdict.refuted:
        return ()
    return (
        f"{tuned.label} was made from another base than {base.label}: tensor {verdict.different[0]!r} is not the one "
        f"of {source} that its surgery.json has on record.",
    )


def _refuse(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    changes: Mapping[str, Change],
    found: Callable[[str], str | None],
    chosen: Callable[[list[str]], list[str]],
) -> None:
    ancestors: Mapping[str, str] | None = None
    for number, adapter in enumerate(adapters):
        recorded, source = recorded_hashes(read_provenance(adapter.files.folder), "base")
        if not recorded:
            continue
        names = chosen([name for name in changed_by(changes, number) if name in recorded])
        verdict = judge(recorded, names, found, source)
        if not verdict.refuted:
            continue
        if ancestors is None:
            ancestors, _ = recorded_hashes(read_provenance(base.folder), "base")
        if ancestors and judge(recorded, names, ancestors.get).proved:
            continue
        raise MismatchError(_sentence(base, adapter, verdict))


def _sentence(base: Checkpoint, adapter: Adapter, verdict: Belonging) -> str:
    return (
        f"{adapter.label} was made for another base than {base.label}: tensor {verdict.different[0]!r} is not the one "
        f"of {verdict.source} that its surgery.json has on record; --any-base takes it all the same."
    )
