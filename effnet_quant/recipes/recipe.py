"""Reads recipes and combines the values of precision, platform, model and mode; later ones override earlier ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from effnet_quant.errors import UserError
from effnet_quant.files import possible_path
from effnet_quant.recipes.bounded_yaml import parse_yaml, read_yaml

SECTIONS = ("precision", "platform", "models", "mode", "model_mode")
Recipes = dict[str, dict[str, Any]]
_LEVELS = {"precision": 2, "platform": 2, "models": 4, "mode": 2, "model_mode": 3}  # of names, above the values


def load_recipes(path: str | Path | None = None) -> Recipes:
    """Read the package's recipes, then those of a file in the same form, such as NVIDIA's configs.yml, which override them.

    Returns:
        Values by section and name: ``precision[name]``, ``platform[name]``, ``models[model][platform][precision]``,
        ``mode[name]``, ``model_mode[model][mode]``.

    Raises:
        UserError: the file is missing or has another form.
    """
    recipes: Recipes = {section: {} for section in SECTIONS}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".yml"):
            _merge(recipes, _sections(parse_yaml(file.read_text(encoding="utf-8"), file.name), file.name))
    if path is not None:
        if not possible_path(path).is_file():
            raise UserError(f"there is no recipe file {path}; check the path.")
        own = _sections(read_yaml(path), str(path))
        if not any(own.values()):
            raise UserError(f"{path} holds no recipes: it has none of the sections {', '.join(SECTIONS)}.")
        _merge(recipes, own)
    return recipes


def resolve(recipes: Recipes, *, model: str, mode: str, platform: str, precision: str) -> dict[str, Any]:
    """Combine the values for one run.

    Raises:
        UserError: there is no such model, mode, platform or precision. The sentence names the nearest.
    """
    by_platform = _pick(recipes["models"], model, "model")
    by_precision = _pick(by_platform, platform, f"platform for {model}")
    of_model = _pick(recipes["model_mode"], model, "model_mode", optional=True)
    return {
        "arch": model,  # unless a user's recipe overrides it
        **_pick(recipes["precision"], precision, "precision"),
        **_pick(recipes["platform"], platform, "platform", optional=True),
        **_pick(by_precision, precision, f"precision for {model} on {platform}"),
        **_pick(recipes["mode"], mode, "mode"),
        **_pick(of_model, mode, f"model_mode of {model}", optional=True),
    }


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names closest to ``name``; all of them if none is close."""
    known = list(known)
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known)


def _pick(values: dict[str, Any], name: str, what: str, *, optional: bool = False) -> dict[str, Any]:
    if name not in values and not optional:
        raise UserError(f"there is no {what} '{name}' in the recipes; did you mean: {nearest(name, values)}?")
    chosen = values.get(name) or {}
    if not isinstance(chosen, dict):
        raise UserError(f"the recipe of {what} '{name}' is {chosen!r}, not a mapping from keys to values; correct it.")
    return chosen


def _sections(content: Any, source: str) -> Recipes:
    if not isinstance(content, dict):
        raise UserError(f"{source} holds no recipes: it has none of the sections {', '.join(SECTIONS)}.")
    for name in content:  # sections of other names may hold YAML anchors
        if name not in SECTIONS and (close := difflib.get_close_matches(str(name), SECTIONS)):
            raise UserError(f"{source} has an unknown section '{name}'; did you mean: {close[0]}?")
    sections = {section: content.get(section) or {} for section in SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{source}: each of the sections {', '.join(SECTIONS)} is a mapping from names to values.")
        _check_values(section, _LEVELS[name], f"{source}: {name}")
    return sections


def _check_values(values: dict[Any, Any], levels: int, place: str) -> None:
    """Raises UserError unless single values stand below ``levels`` of names. Their keys are checked elsewhere."""
    for name, value in values.items():
        if levels > 1 and not isinstance(name, str):
            raise UserError(f"{place}: {name!r:.40} is no name; put it in quotes.")
        if levels > 1 and isinstance(value, dict):
            _check_values(value, levels - 1, f"{place}: {name}")
        elif levels > 1 and value is not None:
            raise UserError(f"{place}: '{name}' is {value!r:.40}, not a mapping from names to values; correct it.")
        elif isinstance(value, (dict, list, tuple, set, bytes)):
            raise UserError(f"{place}: {name} is {value!r:.40}, not a single value; correct it.")


def _merge(base: dict[str, Any], own: dict[str, Any]) -> None:
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            base[name] = dict(base[name])  # a copy, because a YAML alias is one object in several places
            _merge(base[name], value)
        else:
            base[name] = value
