"""What a folder holds, and what is wrong with it: from headers and configs, before a byte of data is read.

Push refuses a folder that the libraries it is meant for would refuse, or load wrongly without a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from surgery.adapter import Adapter, read_adapter
from surgery.belonging import recorded_hashes, recorded_outputs, recorded_tensors, weights_id
from surgery.checkpoint import Checkpoint, read_adapter_files, read_checkpoint
from surgery.errors import SurgeryError
from surgery.folder import Folder
from surgery.names import expert_of, layer_of
from surgery.ops.inspection import experts_of
from surgery.patterns import compile_pattern
from surgery.provenance import FILE_NAME, read_provenance
from surgery.sites import Site, find_sites

# Modules that hold the token embedding, as transformers' models store it.
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# A list among the facts has no more items than this.
_MOST = 256


@dataclass(frozen=True)
class Examined:
    """A folder as an adapter or a checkpoint.

    Attributes:
        files: its weights and config.
        facts: what a list or a search shows of it; JSON values only.
        problems: one sentence for each reason to refuse it.
        notes: what is worth saying and no reason to refuse.
        provenance: its `surgery.json`, if it has one.
    """

    files: Checkpoint
    facts: Mapping[str, object]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, object] | None = field(default=None, repr=False)

    @property
    def expected_hashes(self) -> Mapping[str, str]:
        """What `surgery.json` says each tensor hashes to."""
        return recorded_outputs(self.provenance)


def examine(folder: Folder, check: bool = True) -> Examined:
    """Read the headers and configs of a folder. Raises what reading raises where it holds no weights at all.

    Without `check` nothing is looked at but what the facts need, and there are no problems.
    """
    names = set(folder.names())
    provenance = read_provenance(folder)
    whole = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"}
    if "adapter_config.json" in names and not names & whole:
        found = _examine_adapter(folder, provenance, check)
    else:
        found = _examine_checkpoint(read_checkpoint(folder), provenance, check)
    if not check:
        return found
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
    notes = (f"{', '.join(pickled)} may hold pickled code; safetensors cannot.",) if pickled else ()
    problems = (*found.problems, *_provenance_problems(found.files, provenance))
    return Examined(found.files, found.facts, problems, (*found.notes, *notes), provenance)


def _provenance_problems(files: Checkpoint, provenance: Mapping[str, object] | None) -> list[str]:
    """Whether `surgery.json` speaks of these tensors."""
    outputs = provenance.get("outputs") if provenance is not None else None
    if not isinstance(outputs, dict):
        return []
    changed = [name for name in outputs if name not in files.tensors] + [n for n in files.tensors if n not in outputs]
    if not changed:
        return []
    return [
        f"{FILE_NAME} is not of these weights: tensor {changed[0]!r} is only in one of the two; remove {FILE_NAME}, or "
        "make the output again."
    ]


# Adapters -------------------------------------------------------------------------------------------------------------


def _examine_adapter(folder: Folder, provenance: Mapping[str, object] | None, check: bool) -> Examined:
    files = read_adapter_files(folder)
    base = files.config.get("base_model_name_or_path")
    revision = files.config.get("revision")
    facts = _common(files, "adapter", provenance) | {
        "base": base if isinstance(base, str) and base else None,
        "base_revision": revision if isinstance(revision, str) else None,
        "method": str(files.config.get("peft_type") or "unknown").lower(),
        "task": files.config.get("task_type") if isinstance(files.config.get("task_type"), str) else None,
    }
    recorded, _ = recorded_hashes(provenance, "base")
    if recorded:
        facts["base_weights"] = weights_id(recorded)
    if files.config.get("peft_type") != "LORA":
        return Examined(files, facts, (), ("Only LoRA adapters in PEFT's format are checked against their config.",))
    try:
        adapter = read_adapter(folder)
    except SurgeryError as error:
        return Examined(files, facts, error.problems or (error.message,))
    ranks = sorted({_rank(adapter, lora.A.shape[0]) for lora in adapter.loras})
    targets = Counter(lora.module.rpartition(".")[2] for lora in adapter.loras)
    facts |= {"ranks": ranks[:_MOST], "targets": sorted(targets)[:_MOST], "modules": len(adapter.loras)}
    facts |= _shapes(_factor_shapes(adapter))
    if any(lora.magnitude is not None for lora in adapter.loras):
        facts["method"] = "dora"
    return Examined(files, facts, tuple(_adapter_problems(adapter)) if check else ())


def _factor_shapes(adapter: Adapter) -> Iterator[tuple[int, int]]:
    """Rows and columns of the weights that factors are for; not of those that the adapter brings itself, resized."""
    for lora in adapter.loras:
        if f"{lora.module}.weight" not in adapter.saved:
            yield prod(lora.A.shape[1:]), lora.B.shape[0]


def _shapes(found: Iterable[tuple[int, int]]) -> dict[str, object]:
    """Each shape once, either side first; none where there are too many to be of use."""
    keys = {shape_key(*sides) for sides in found}
    return {"shapes": sorted(keys)} if 0 < len(keys) <= _MOST else {}


def shape_key(rows: int, columns: int) -> str:
    """The two sides of a weight, the longer first, so that its orientation does not matter: `4096x1024`."""
    return f"{max(rows, columns)}x{min(rows, columns)}"


def _rank(adapter: Adapter, rows: int) -> int:
    """The rank of a module whose lora_A has so many rows: of stacked experts, the one that the config names."""
    rank = adapter.config.get("r")
    stacked = adapter.target_parameters and isinstance(rank, int) and rank and rows % rank == 0
    return rank if stacked and isinstance(rank, int) else rows


def _adapter_problems(adapter: Adapter) -> list[str]:
    problems = []
    if not adapter.loras and not adapter.saved and not adapter.tokens:
        problems.append("The adapter holds neither factors nor anything else.")
    base = adapter.config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        problems.append(
            "adapter_config.json does not name the base (base_model_name_or_path), so nobody can tell what it is for."
        )
    targets = _targets(adapter)
    for lora in adapter.loras:
        rank = _rank(adapter, lora.A.shape[0])
        try:
            if not adapter.target_parameters:
                if not adapter.expected_rank(lora.module, rank):
                    problems.append(
                        f"{lora.module!r} has rank {rank}, which adapter_config.json does not give it "
                        f"(r is {adapter.config.get('r')})."
                    )
                if targets is not None and not _is_target(targets, lora.module):
                    problems.append(
                        f"{lora.module!r} has factors, but target_modules does not name it: PEFT would leave them out."
                    )
            adapter.scale(lora.module, rank)
        except SurgeryError as error:
            problems.append(error.message)
    return problems


def _targets(adapter: Adapter) -> list[str] | re.Pattern[str] | None:
    """What `target_modules` names; None where it cannot be told from the adapter alone."""
    value = adapter.config.get("target_modules")
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    if isinstance(value, str) and value != "all-linear":
        return compile_pattern(value)
    return None


def _is_target(targets: list[str] | re.Pattern[str], module: str) -> bool:
    if isinstance(targets, re.Pattern):
        return targets.fullmatch(module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _examine_checkpoint(files: Checkpoint, provenance: Mapping[str, object] | None, check: bool) -> Examined:
    sites = find_sites(files)
    experts = experts_of(files, sites)
    facts = _common(files, "moe" if experts else "dense", provenance) | {
        "family": files.model_type or None,
        "architecture": files.architecture or None,
        "base": _first_source(provenance, ("base", "merged", "checkpoint")),
    }
    if experts:
        facts["experts"] = experts.experts
    facts |= _shapes(_weight_shapes(files, sites))
    if not check:
        return Examined(files, facts, ())
    notes = () if files.config else ("There is no config.json, so the weights are checked against nothing.",)
    return Examined(files, facts, tuple(_config_problems(files)), notes)


def _weight_shapes(files: Checkpoint, sites: Mapping[str, Site]) -> Iterator[tuple[int, int]]:
    """Rows and columns of every weight, as transformers has it in memory and as it is stored."""
    for site in sites.values():
        yield site.out_features, site.in_features
    for tensor in files.tensors.values():
        if len(tensor.shape) > 1:
            yield tensor.shape[0], prod(tensor.shape[1:])
        if len(tensor.shape) == 3:  # a stack of experts
            yield tensor.shape[1], tensor.shape[2]


def _config_problems(files: Checkpoint) -> list[str]:
    """Where the config and the stored tensors contradict each other. What cannot be told is passed over."""
    if files.config.get("is_encoder_decoder") or files.config.get("quantization_config"):
        return []
    config = files.text_config
    problems = []
    vocabulary, hidden = config.get("vocab_size"), config.get("hidden_size", config.get("n_embd"))
    narrow = any(key in config for key in ("embedding_size", "word_embed_proj_dim", "hidden_size_per_layer_input"))
    for name, tensor in files.tensors.items():
        if _EMBEDDING.fullmatch(name) is None or len(tensor.shape) != 2:
            continue
        if isinstance(vocabulary, int) and tensor.shape[0] != vocabulary:
            problems.append(f"{name} has {tensor.shape[0]} rows, but config.json has vocab_size {vocabulary}.")
        if isinstance(hidden, int) and not narrow and tensor.shape[1] != hidden:
            problems.append(f"{name} has {tensor.shape[1]} columns, but config.json has hidden_size {hidden}.")
    found = {layer for name in files.tensors if (layer := layer_of(name)) is not None}
    layers = next((config[key] for key in _LAYERS if isinstance(config.get(key), int)), None)
    if found and isinstance(layers, int) and max(found) + 1 < layers:
        problems.append(f"The weights have {max(found) + 1} layers, but config.json has {layers}.")
    numbers = [expert for name in files.tensors if (expert := expert_of(name)) is not None]
    experts = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int)), None)
    if numbers and isinstance(experts, int) and max(numbers) + 1 != experts:
        problems.append(f"The weights have {max(numbers) + 1} experts, but config.json has {experts}.")
    return problems


# Both -----------------------------------------------------------------------------------------------------------------


def _common(files: Checkpoint, kind: str, provenance: Mapping[str, object] | None) -> dict[str, object]:
    dtypes, numbers = Counter[str](), Counter[str]()
    for tensor in files.tensors.values():
        dtypes[tensor.dtype.name] += tensor.nbytes
        numbers[tensor.dtype.name] += tensor.numel
    facts: dict[str, object] = {
        "kind": kind,
        "parameters": files.parameters,
        "tensors": len(files.tensors),
        "dtype": dtypes.most_common(1)[0][0] if dtypes else None,
        "dtypes": dict(sorted(numbers.items())),
    }
    if provenance is not None:
        facts["operation"] = str(provenance.get("operation"))
        facts["inputs"] = _lineage(provenance)
    return facts


def _lineage(provenance: Mapping[str, object]) -> list[dict[str, str]]:
    """Role, source and revision of each input, and the one hash of its tensors."""
    inputs = provenance.get("inputs")
    found = []
    for item in inputs[:_MOST] if isinstance(inputs, list) else []:
        if isinstance(item, dict):
            kept = {key: item[key] for key in ("role", "source", "revision") if isinstance(item.get(key), str)}
            if hashes := recorded_tensors(item.get("tensors")):
                kept["weights"] = weights_id(hashes)
            found.append(kept)
    return found


def _first_source(provenance: Mapping[str, object] | None, roles: tuple[str, ...]) -> str | None:
    lineage = _lineage(provenance) if provenance is not None else []
    for role in roles:
        for item in lineage:
            if item.get("role") == role:
                return item.get("source")
    return None
