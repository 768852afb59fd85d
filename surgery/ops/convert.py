"""`convert ADAPTER --to FORMAT`: the same adapter as another tool writes it.

Numbers move as bytes wherever the target can express their scale and orientation; what is transposed, filled up with
zeros, or multiplied is computed once, from recipes (`formats.recipes`), and the report says how many.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint import Checkpoint
from surgery.errors import FormatError, InputError, OptionError, UnsupportedError
from surgery.folder import Folder
from surgery.formats.diffusers import write_diffusers
from surgery.formats.exchange import COMPONENTS, Exchange, Written, pad_ranks
from surgery.formats.kohya import write_kohya
from surgery.formats.mlx import write_mlx
from surgery.formats.peft import effective_alpha, guess_component, one_component, portable, write_peft
from surgery.formats.reading import FORMATS, read_exchange
from surgery.formats.recipes import Recipe, RecipeStep, Scaled, step_for
from surgery.hashing import hash_tensor
from surgery.layout import single_file
from surgery.operation import RunOptions, check_paths, staged, summarise
from surgery.ops.directory import head_tied_to
from surgery.ops.moe_layouts import LAYOUTS, to_fused, to_per_expert
from surgery.peft_format import PREFIX
from surgery.plan import Plan
from surgery.provenance import Input
from surgery.reports import ConvertReport
from surgery.sites import memory_names


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to make of an adapter.

    Attributes:
        to: `peft`, `kohya`, `diffusers` or `mlx`.
        experts: `fused` or `per-expert`; None leaves experts as they are.
        component: which part of a pipeline, to choose one or to name it where the adapter does not.
        portable: fold scales into B, so that one alpha serves all modules and no reader can mistake them.
        pad_ranks: fill up all modules with zeros to the largest rank.
        base_name: what the result should call its base; by default what the adapter calls it.
    """

    to: str
    experts: str | None = None
    component: str | None = None
    portable: bool = False
    pad_ranks: bool = False
    base_name: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("to", FORMATS), ("experts", LAYOUTS), ("component", COMPONENTS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise OptionError(f"--{name} is {value!r}, expected one of {', '.join(allowed)}.")
        if self.experts is not None and self.to != "peft":
            raise OptionError(f"--experts chooses a layout of PEFT's, and --to is {self.to!r}; leave it out.")


def _refuse_tied_embeddings(exchange: Exchange, bases: Mapping[str, Checkpoint], options: ConvertOptions) -> None:
    """MLX applies the LoRA of a tied embedding to the head as well, without a word (mlx-lm 0.32.2, 2 nats off)."""
    base = bases.get("")
    tied = None if base is None or options.to != "mlx" else head_tied_to(base)
    if base is not None and tied is not None:
        for factors in exchange.modules:
            if factors.embedding and f"{factors.module}.weight" == tied.name:
                raise UnsupportedError(
                    f"{factors.module!r} has factors, and {base.label} has its head tied to it: MLX would add them to "
                    "the head too; merge the adapter with `surgery merge`."
                )


def convert(
    place: Folder | Path,
    bases: Mapping[str, Checkpoint],
    output: str | os.PathLike[str],
    options: ConvertOptions,
    run_options: RunOptions,
) -> ConvertReport:
    """Write the adapter at `place` in another format to the folder `output`.

    Args:
        place: the folder or file of an adapter in any known format.
        bases: the models it belongs to, by component (``""`` for all); needed where names depend on them.
        output: the target.
        options: what to make of it.
        run_options: how.
    """
    target = Path(output)
    if target.suffix == ".safetensors":
        raise OptionError(f"--output is {target}, expected a folder: the file will be in it, beside surgery.json.")
    source = read_exchange(place, bases)
    inputs = (Input("adapter", source.files),)
    check_paths(target, inputs, run_options.overwrite)
    exchange = _arranged(source, bases, options)
    _refuse_tied_embeddings(exchange, bases, options)
    written = _written(exchange, bases, options, target)
    steps = tuple(step_for(key, recipe) for key, recipe in written.tensors.items())
    layout = single_file(written.file, [step.writes[0] for step in steps], written.metadata)
    plan = Plan(steps, layout, written.files, written.carried)
    error = _alpha_error(exchange) if options.to == "kohya" else 0.0
    notes = [*exchange.notes, *written.notes]
    if error:
        notes.append(f"An alpha is stored as float32, which changes a scale by {error:.1g} of it at most.")
    report = ConvertReport(
        output=str(target),
        plan=summarise([plan], target, run_options.settings),
        source_format=source.format,
        target_format=options.to,
        modules=len(exchange.modules),
        tensors=len(steps),
        moved=sum(not isinstance(step, RecipeStep) for step in steps),
        scaled=sum(_is_scaled(recipe) for recipe in written.tensors.values()),
        scale_error=error,
        parameters=sum(_count(recipe) for recipe in written.tensors.values()),
        nbytes=layout.nbytes,
        file=written.file,
        notes=tuple(dict.fromkeys(notes)),
        dry_run=run_options.dry_run,
    )
    if run_options.dry_run:
        return report
    with staged(target, plan, ("convert", options), run_options) as run:
        run.execute(plan, "converting")
        run.finish("convert", options, inputs, report.numbers())
    return report


def _arranged(exchange: Exchange, bases: Mapping[str, Checkpoint], options: ConvertOptions) -> Exchange:
    """The adapter with the modules, names, ranks and scales that are asked for."""
    if not exchange.modules:
        raise InputError(f"{exchange.label} has no factors, so there is nothing to convert.")
    if options.to != "peft":
        exchange = _without_copies_of_the_base(exchange, bases.get(""))
    if options.to in ("kohya", "diffusers"):
        exchange = guess_component(exchange, options.component)
        if options.component is not None:
            chosen = [one for one in exchange.modules if one.component == options.component]
            if not chosen:
                one_component(exchange, options.component)  # says which there are
            exchange = exchange.with_modules(chosen)
    else:
        exchange = one_component(exchange, options.component)
    if options.experts is not None:
        if "" not in bases:
            raise InputError(
                f"Where the experts of {exchange.label} lie depends on the model; name its base with --base."
            )
        exchange = (to_fused if options.experts == "fused" else to_per_expert)(exchange, bases[""])
    elif options.to == "mlx" and "" in bases:
        exchange = to_fused(exchange, bases[""])
    if options.pad_ranks:
        stacked = [one.module for one in exchange.modules if one.experts]
        if stacked:
            raise OptionError(f"--pad-ranks is for modules of their own, and {stacked[0]!r} is a stack of experts.")
        most = max(one.rank for one in exchange.modules)
        smaller = sum(one.rank != most for one in exchange.modules)
        note = [f"{smaller} modules are filled up with zeros to rank {most}."] if smaller else []
        exchange = exchange.with_modules(pad_ranks(exchange.modules), *note)
    return portable(exchange) if options.portable and options.to != "mlx" else exchange


def _without_copies_of_the_base(exchange: Exchange, base: Checkpoint | None) -> Exchange:
    """Leave out what PEFT stores of the base itself: the weight below a LoRA on an embedding or a head.

    Only where the base is at hand and says the same to the bit.
    """
    names = {} if base is None else {memory: stored for stored, memory in memory_names(base).items()}
    copies = []
    for key, tensor in exchange.saved.items():
        module, marker, _ = key.removeprefix(PREFIX).rpartition(".base_layer.weight")
        if not marker or base is None or f"{module}.weight" not in names:
            continue
        own = base.tensors[names[f"{module}.weight"]]
        if (own.dtype, own.shape) == (tensor.dtype, tensor.shape) and hash_tensor(own) == hash_tensor(tensor):
            copies.append(key)
    if not copies:
        return exchange
    left = {key: tensor for key, tensor in exchange.saved.items() if key not in copies}
    note = f"{len(copies)} copies of the base's own weights are left out."
    return replace(exchange, saved=left, notes=(*exchange.notes, note))


def _written(exchange: Exchange, bases: Mapping[str, Checkpoint], options: ConvertOptions, target: Path) -> Written:
    if options.to == "kohya":
        return write_kohya(exchange, f"{target.name}.safetensors")
    if options.to == "diffusers":
        return write_diffusers(exchange)
    if options.to == "mlx":
        return write_mlx(exchange, bases.get(""), options.base_name)
    return write_peft(exchange, options.base_name)


def _alpha_error(exchange: Exchange) -> float:
    """The largest relative error of a scale from storing its alpha as float32."""
    errors = [0.0]
    for factors in exchange.modules:
        alpha = effective_alpha(factors)
        try:
            stored = struct.unpack("<f", struct.pack("<f", alpha))[0]
        except OverflowError:
            stored = math.inf
        if alpha and (not stored or not math.isfinite(stored)):
            raise FormatError(f"{exchange.label}: the alpha of {factors.name!r}, {alpha:g}, is beyond float32.")
        errors += [abs(stored / alpha - 1)] if alpha else []
    return max(errors)


def _is_scaled(recipe: Recipe) -> bool:
    if isinstance(recipe, Scaled):
        return True
    inner = [part for _, part in getattr(recipe, "parts", ())] + [getattr(recipe, "of", None)]
    return any(_is_scaled(part) for part in inner if isinstance(part, Recipe))


def _count(recipe: Recipe) -> int:
    return math.prod(recipe.shape)
