"""Does an adapter belong to a base? Decided by the hashes that `surgery.json` has on record, tensor by tensor.

An adapter that was extracted or trained from a base names the BLAKE3-256 of every tensor of that base. A base belongs
to it if the tensors that the adapter changes have those hashes; one that differs proves another base. Without a record
there is no telling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from surgery.hashing import new_hash


@dataclass(frozen=True)
class Belonging:
    """The evidence.

    Attributes:
        equal: tensors that have the hash on record.
        different: tensors that have another, or that the recorded base does not have.
        unknown: tensors without a hash on record, or without one to compare it with.
        source: what the record calls the base.
    """

    equal: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    source: str | None = None

    @property
    def proved(self) -> bool:
        """Every tensor is the recorded base's."""
        return bool(self.equal) and not self.different and not self.unknown

    @property
    def refuted(self) -> bool:
        """Some tensor is not."""
        return bool(self.different)


def recorded_hashes(provenance: Mapping[str, object] | None, role: str) -> tuple[Mapping[str, str], str | None]:
    """The hash of each tensor of the input that played `role`, and what that input was called.

    Empty where `surgery.json` names no such input, several, or no hashes (`--no-hash`).
    """
    inputs = provenance.get("inputs") if provenance is not None else None
    listed = inputs if isinstance(inputs, list) else []
    found = [item for item in listed if isinstance(item, dict) and item.get("role") == role]
    if len(found) != 1:
        return {}, None
    source = found[0].get("source")
    return recorded_tensors(found[0].get("tensors")), source if isinstance(source, str) else None


def recorded_outputs(provenance: Mapping[str, object] | None) -> Mapping[str, str]:
    """The hash of each tensor that an operation wrote."""
    return recorded_tensors(provenance.get("outputs") if provenance is not None else None)


def recorded_tensors(tensors: object) -> Mapping[str, str]:
    """The hash of each tensor of an entry of `surgery.json` that has one."""
    if not isinstance(tensors, dict):
        return {}
    return {
        name: entry["blake3"]
        for name, entry in tensors.items()
        if isinstance(entry, dict) and isinstance(entry.get("blake3"), str)
    }


def judge(
    recorded: Mapping[str, str], names: Iterable[str], found: Callable[[str], str | None], source: str | None = None
) -> Belonging:
    """Compare the recorded hashes of the tensors `names` with those `found` gives.

    Args:
        recorded: hash of each tensor of the recorded base; empty where there is no record.
        names: the tensors that count: those the adapter changes.
        found: the hash that a tensor has in the base at hand, or None where it is not known.
        source: what the record calls the base.
    """
    equal: list[str] = []
    different: list[str] = []
    unknown: list[str] = []
    for name in names:
        expected = recorded.get(name)
        digest = found(name) if expected is not None else None
        if expected is None or digest is None:
            unknown.append(name)
        else:
            (equal if digest == expected else different).append(name)
    return Belonging(tuple(equal), tuple(different), tuple(unknown), source)


def weights_id(hashes: Mapping[str, str]) -> str:
    """One hash for a set of tensors: BLAKE3-256 of their names and hashes, in order of names."""
    hasher = new_hash()
    for name in sorted(hashes):
        hasher.update(f"{name}\0{hashes[name]}\n".encode())
    return hasher.hexdigest()
