"""Reading a configuration: strict YAML, `base:` files, --set section.key=value, one-line errors."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from fastdcd.config import Config

Kind = TypeVar("Kind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every program that works from a config: --config FILE and --set section.key=value ..."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the experiment's YAML file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The argument --set section.key=value ..."""
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="override the file; the value is YAML",
    )


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply overrides of the form section.key=value (the value is YAML).

    Raises ValueError, one line a mistake: the key's path, what was got, what was expected, the nearest key.
    """
    tree = _read(path, ())
    override_tree(tree, overrides)
    config = parse(tree, str(path))
    if config.run.dir is None:
        # configs/cifar100/x.yaml -> runs/cifar100/x
        names = path.with_suffix("").parts
        below = names[names.index("configs") + 1 :] if "configs" in names else names[-1:]
        tree.setdefault("run", {})["dir"] = str(Path("runs", *below))
        config = parse(tree, str(path))
    return config


def override_tree(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put values given as section.key=value into a nested dictionary. Raises ValueError for another form."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: expected section.key=value")
        parts = key.strip().split(".")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {override}: {part} is not a section")
        node[parts[-1]] = _yaml(text, f"--set {override}")


def parse(tree: Mapping[str, Any], source: str) -> Config:
    """Check a nested dictionary against Config. Raises ValueError with one line a mistake."""
    return parse_as(Config, tree, source)


def parse_as(kind: type[Kind], tree: Mapping[str, Any], source: str) -> Kind:
    """Check a nested dictionary against a dataclass of sections. Raises ValueError with one line a mistake."""
    try:
        # Strict JSON mode: lists become tuples and strings paths, but "3" is no number.
        return TypeAdapter(kind).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {_explain(each, kind)}" for each in error.errors())) from None


def dump(config: Config) -> str:
    """The complete configuration as YAML: what a run stores, and what `load` reads again."""
    tree = json.loads(TypeAdapter(Config).dump_json(config))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key may stand only once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such config file")
    if path.resolve() in seen:
        raise ValueError(f"{path}: is its own base")
    tree = _yaml(path.read_text(), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections (data, student, ...), got {type(tree).__name__}")
    bases = tree.pop("base", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        merged = _merge(merged, _read(path.parent / base, (*seen, path.resolve())))
    return _merge(merged, tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        # only sections merge: a value that is itself a mapping (image_size by epoch) replaces the other
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _explain(error: Any, kind: type) -> str:
    # pydantic puts the branch of a union into the path (constrained-int): not a name the user wrote
    location = [str(part) for part in error["loc"] if re.fullmatch(r"\w+", str(part))]
    path = ".".join(location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{path}: no such key; {_nearest(location, kind)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{path}: is missing and has no default"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: got {error['input']!r}; {message[0].lower()}{message[1:]}"


def _nearest(location: Sequence[str], kind: type) -> str:
    """What the user may have meant by an unknown key: a similar one beside it, or the same in another section."""
    section, key = list(location[:-1]), location[-1]
    known = _keys_at(section, kind)
    near = [[*section, name] for name in difflib.get_close_matches(key, known, n=1)]
    elsewhere = [[name, key] for name in _keys_at([], kind) if key in _keys_at([name], kind)]
    for candidate in near + elsewhere:
        return f"did you mean {'.'.join(candidate)}?"
    return f"known: {', '.join(known)}"


def _keys_at(location: Sequence[str], kind: type) -> list[str]:
    node: Any = kind
    for part in location:
        node = get_type_hints(node).get(part)
    return [each.name for each in fields(node)] if is_dataclass(node) else []
