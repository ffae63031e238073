"""Reading a configuration: strict YAML, `base:` files, --set section.key=value, one-line errors."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from fastdcd import shipped
from fastdcd.config import Config, Data
from fastdcd.losses.terms import loss_section
from pipelines.base import BACKENDS, loader_class
from pipelines.files import user_path

# More than any experiment needs. A file may come from a stranger: reading it takes bounded time and memory.
MOST_BYTES, MOST_FILES, MOST_VALUES, DEEPEST = 2**18, 100, 10_000, 20

Kind = TypeVar("Kind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every program that works from a config: --config FILE and --set section.key=value ..."""
    parser.add_argument(
        "--config", type=user_path, required=True, metavar="FILE", help="the experiment's YAML file"
    )
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
    path = shipped.find(path)
    tree = _read(path, (), [])
    override_tree(tree, overrides)
    config = parse(tree, str(path))
    if config.run.dir is not None:
        return config
    # configs/cifar100/x.yaml -> runs/cifar100/x
    names = path.with_suffix("").parts
    below = names[names.index("configs") + 1 :] if "configs" in names else names[-1:]
    return replace(config, run=replace(config.run, dir=Path("runs", *below)))


def loads(text: str, source: str) -> Config:
    """Read what `dump` gave; plugins are not imported. Raises ValueError if it is of another version."""
    return parse_as(config_type(), _yaml(text, source), source)


def override_tree(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put values given as section.key=value into a nested dictionary. Raises ValueError for another form."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override}: expected section.key=value")
        parts = key.strip().split(".")
        if not all(parts):
            raise ValueError(f"--set {override}: got the key {key!r}, expected section.key=value")
        node = tree
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {override}: {part} is not a section")
        node[parts[-1]] = _yaml(text, f"--set {override}")


def parse(tree: Mapping[str, Any], source: str) -> Config:
    """Check a nested dictionary against Config. Raises ValueError with one line a mistake."""
    _import_plugins(tree.get("plugins", []), source)
    return parse_as(config_type(), tree, source)


def config_type() -> type[Config]:
    """Config with the keys of all loss terms and loaders that are registered."""
    loss: Any = loss_section()
    return _config_type(loss, tuple((name, loader_class(name)) for name in BACKENDS))


@functools.cache
def _config_type(loss: Any, loaders: tuple[tuple[str, Any], ...]) -> type[Config]:
    keys = [
        (key.name, get_type_hints(loader.Options, include_extras=True)[key.name], key)
        for _, loader in loaders
        for key in fields(loader.Options)
    ]
    keys = [(name, hint, field(default=key.default)) for name, hint, key in keys]
    known = {each.name for each in fields(Data)}
    if taken := [name for name, *_ in keys if name in known]:
        raise ValueError(
            f"data.{taken[0]} is a key of all loaders: none may have an option of its own of this name"
        )
    made = make_dataclass(
        "Data", keys, bases=(Data,), frozen=True, kw_only=True, namespace={"loaders": dict(loaders)}
    )
    sections = [("data", made, field()), ("loss", loss, field(default_factory=loss))]
    return make_dataclass("Config", sections, bases=(Config,), frozen=True, kw_only=True)


def _import_plugins(paths: Any, source: str) -> None:
    """Import each Python file once. Raises ValueError if one is missing or fails."""
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{source}: plugins: got {paths!r}, expected a list of Python files")
    for path in map(user_path, paths):
        name = f"fastdcd_plugin_{path.resolve()}"
        if name in sys.modules:
            continue
        if not path.is_file():
            raise ValueError(f"{source}: plugins: no such file: {path}")
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{source}: plugins: {path}: expected a Python file (.py)")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up in it
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ValueError(
                f"{source}: plugins: {path} fails on import: {type(error).__name__}: {error}"
            ) from error


def parse_as(kind: type[Kind], tree: Mapping[str, Any], source: str) -> Kind:
    """Check a nested dictionary against a dataclass of sections. Raises ValueError with one line a mistake."""
    try:
        # Strict JSON mode: lists become tuples and strings paths, but "3" is no number.
        return TypeAdapter(kind).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {_explain(each, kind)}" for each in error.errors())) from None


def dump(cfg: Config) -> str:
    """The complete configuration as YAML: what a run stores, and what `load` and `loads` read again."""
    tree = json.loads(TypeAdapter(type(cfg)).dump_json(cfg))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key may stand only once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for each, _ in node.value:
        key = loader.construct_object(each)
        if not isinstance(key, str | int) or isinstance(key, bool):
            message = f"the key {each.value!r} is a {type(key).__name__}, expected a name or a whole number"
            raise yaml.constructor.ConstructorError(None, None, message, each.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is a duplicate", node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _yaml(text: str, source: str) -> Any:
    try:
        _measure(text)
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, a date that does not exist
        raise ValueError(f"{source}: a value cannot be read: {error}") from None


def _measure(text: str) -> None:
    """Raises YAMLError if the document is nested too deeply or has too many values once aliases are filled
    in: a few lines of aliases of aliases stand for billions."""
    sizes: dict[str | None, int] = {}  # of anchors
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values before it
    values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            values += sizes.get(anchor, MOST_VALUES)  # not known: of a node inside itself
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            sizes |= {anchor: 1} if anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes |= {anchor: values - before} if anchor else {}
        if values > MOST_VALUES or len(open_nodes) > DEEPEST:
            message = f"more than {MOST_VALUES} values, or nested more than {DEEPEST} deep"
            raise yaml.constructor.ConstructorError(None, None, message, event.start_mark)  # type: ignore[arg-type]


def _read(path: Path, above: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """A file with its bases; `above` are the files it is a base of, `read` collects all."""
    if not path.is_file():
        whose = f" (a base of {above[-1]})" if above else ""
        if path.exists():
            raise ValueError(f"{path}: not a file{whose}")
        near = difflib.get_close_matches(str(path.with_suffix("")), shipped.names(), n=1)
        raise ValueError(f"{path}: no such config file{whose}" + (f"; did you mean {near[0]}?" if near else ""))
    if path.resolve() in above:
        raise ValueError(f"{path}: is its own base")
    read.append(path)
    if len(read) > MOST_FILES:
        raise ValueError(f"{path}: more than {MOST_FILES} files are its bases, or bases of these")
    tree = _yaml(_text(path), str(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected sections (data, student, ...), got {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base: got {bases!r}, expected a path or a list of paths")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = _merge(merged, _read(path.parent / user_path(base), (*above, path.resolve()), read))
    return _merge(merged, tree)


def _text(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: larger than {MOST_BYTES // 1024} KiB: no config of an experiment")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start})") from None


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
        location = [str(part) for part in error["loc"]]  # its last part is the user's, whatever it looks like
        return f"{'.'.join(location)}: no such key; {_nearest(location, kind)}"
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
