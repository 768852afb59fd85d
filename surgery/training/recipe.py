"""Recipes: named sets of options, as YAML beside this file. What is given explicitly comes before a recipe."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from surgery.errors import FormatError, MissingExtraError, OptionError
from surgery.training.methods.options import MethodOptions, parse_rate
from surgery.training.options import TrainOptions

FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Those that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The options of a recipe of the package, or of a YAML file.

    Raises:
        OptionError: no such recipe, or an option that there is not.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("pyyaml", "train") from error
    place = FOLDER / f"{name}.yaml" if name in recipe_names() else Path(name)
    if not place.is_file():
        raise OptionError(f"--recipe is {name!r}, expected {', '.join(recipe_names())} or a YAML file.")
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{place} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{place} holds no options, expected lines such as learning_rate: 1.0e-5.")
    return {_known(str(key), f"The recipe {name}"): _typed(str(key), value) for key, value in content.items()}


def parse_setting(text: str) -> tuple[str, Any]:
    """One `KEY=VALUE` of `--set`, by the type of the option."""
    key, sign, value = text.partition("=")
    key = key.strip().removeprefix("--").replace("-", "_")
    if not sign:
        raise OptionError(f"--set is {text!r}, expected KEY=VALUE.")
    return _known(key, "--set"), _typed(key, value.strip())


def with_recipe(recipe: str | None, given: Mapping[str, Any]) -> TrainOptions:
    """Options from a recipe, if one is named, and from what was given."""
    options = read_recipe(recipe) if recipe is not None else {}
    if given.get("method") not in (None, options.get("method")):
        # A recipe's rank and targets are its method's.
        options = {name: value for name, value in options.items() if name not in MethodOptions.__dataclass_fields__}
    options |= given
    # A number of steps replaces a recipe's number of epochs, and the other way round.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if given.get(one) is not None and given.get(other) is None:
            options.pop(other, None)
    return TrainOptions(**options)


def _known(key: str, where: str) -> str:
    names = [field.name for field in fields(TrainOptions)]
    if key not in names:
        from difflib import get_close_matches

        near = "".join(f" Did you mean {match}?" for match in get_close_matches(key, names, 1))
        raise OptionError(f"{where} has the option {key!r}, which there is not.{near}")
    return key


def _typed(key: str, value: Any) -> Any:
    """A value as the option's type has it. `none` is None where that may be."""
    if key in ("train", "freeze"):
        patterns = value if isinstance(value, list) else [value]
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise OptionError(f"{key} is {value!r}, expected a pattern or a list of them.")
        return tuple(parse_rate(pattern) if key == "train" else pattern for pattern in patterns)
    hint = typing.get_type_hints(TrainOptions)[key]
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] or [hint]
    (kind,) = kinds
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if kind is hint:
            raise OptionError(f"{key} is none, expected {kind.__name__}.")
        return None
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
        if kind in (int, float) and isinstance(value, bool):
            raise ValueError
        return kind(value)
    except (ValueError, KeyError) as error:
        raise OptionError(f"{key} is {value!r}, expected {kind.__name__}.") from error
