"""What lies at an address: the files, their sizes, and the checksums that `push` left beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from fastdcd.remote.address import Address, explained, first_line, open_address
from pipelines.files import expand_braces
from pipelines.formats.checked import MAX_JSON, Record, parse_record, read_record
from pipelines.image_folder import check_name

MANIFEST = ".fastdcd-files.json"  # beside what was pushed, and in a folder that is staged
_FORMAT = "fastdcd-files-1"


class Entry(Record):
    """A file: its size, and what tells its content from another: SHA-256, or whatever the store calls its version."""

    bytes: NonNegativeInt
    sha256: str = ""
    version: str = ""


class Manifest(Record):
    """The files of a folder by their relative names.

    Attributes:
        complete: false while they are being pushed.
        source: the address that a local folder was staged from; "" for what lies at an address.
    """

    format: str
    complete: bool
    source: str = ""
    files: dict[str, Entry]


def manifest_of(files: Mapping[str, Entry], *, complete: bool = True, source: str = "") -> str:
    """A manifest as JSON."""
    entries = {name: files[name].model_dump(exclude_defaults=True) for name in sorted(files)}
    tree = {"format": _FORMAT, "complete": complete, "source": source, "files": entries}
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """What a local folder was staged from; None if it was not. Raises ValueError for a damaged manifest."""
    path = folder / MANIFEST
    return read_record(path, Manifest, "remove it and stage again") if path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files at an address.

    Attributes:
        address: of the folder that they lie in.
        files: by names relative to it.
        paths: of the objects, as the address's file system names them.
        inside: the rest of the address, where it leads into an archive (data.zip/train); else "".
        single: the address names one file.
    """

    address: Address
    files: dict[str, Entry]
    paths: dict[str, str]
    inside: str = ""
    single: bool = False


def fetch_manifest(address: Address) -> Manifest | None:
    """The manifest that `push` left at an address; None if there is none. Raises ValueError if it is damaged."""
    if not address.scheme.lists and "?" in address.url:
        return None  # a signed address is of one file
    path = address.below(MANIFEST)
    with explained(address, address.scheme):
        try:
            size = address.fs.info(path)["size"]
        except FileNotFoundError:
            return None
        except PermissionError:
            if address.scheme.lists:  # stores answer so for what is not there, to who may not list
                raise
            return None
    if size is None or size > MAX_JSON:
        return None  # a page that a web server has for everything
    data = address.read(path, 0, size)
    where = f"{address}/{MANIFEST}"
    if not address.scheme.lists and not data.startswith(b"{"):
        return None
    found = parse_record(data, Manifest, where, "push again")
    if found.format != _FORMAT:
        raise ValueError(f"{where}: format {found.format!r}, expected {_FORMAT!r}; push again with this version")
    return found


def list_files(url: str) -> Listing:
    """Everything at an address: what `push` left there, the objects below it, those that a pattern matches, or one.

    Raises ValueError if there is nothing, the push is not finished, or a name leads outside.
    """
    urls = expand_braces(url)
    first = open_address(urls[0])
    expanded = [first, *map(first.at, urls[1:])]
    if len(expanded) > 1 or (first.scheme.lists and re.search(r"[*\[]", first.url)):
        found = {path: about for address in expanded for path, about in _matches(address).items()}
        return _listing(_common(expanded), found)
    if (pushed := fetch_manifest(first)) is not None:
        if not pushed.complete:
            raise ValueError(f"{first}: its push is not finished; run `fastdcd push` there again")
        for name in pushed.files:
            check_name(first, name)
        return Listing(
            address=first, files=dict(pushed.files), paths={name: first.below(name) for name in pushed.files}
        )
    found = _below(first)
    return _listing(first, found) if found and first.path not in found else _file(first)


def _below(address: Address) -> dict[str, Any]:
    if not address.scheme.lists:
        return {}
    with explained(address, address.scheme):
        try:
            found = address.fs.find(address.path, detail=True)
        except FileNotFoundError:
            return {}
    return {path: about for path, about in found.items() if about["type"] == "file"}


def _matches(address: Address) -> dict[str, Any]:
    """The objects that an address names, with * and [] as in a shell. Raises ValueError if there is none."""
    if not address.scheme.lists:
        listing = _file(address)
        return {listing.paths[name]: {"size": about.bytes} for name, about in listing.files.items()}
    with explained(address, address.scheme):
        found = address.fs.glob(address.path, detail=True)
    found = {path: about for path, about in found.items() if about["type"] == "file"}
    if not found:
        raise ValueError(f"{address}: no object matches; {address.scheme.login}")
    return found


def _common(addresses: list[Address]) -> Address:
    """The folder above all patterns."""
    parts = [re.split(r"/(?=[^/]*[*\[])", address.url)[0] for address in addresses]
    split = [part.split("/") for part in parts]
    same = 0
    while all(len(each) > same + 1 for each in split) and len({each[same] for each in split}) == 1:
        same += 1
    if len(addresses) == 1:
        same = len(split[0])
    return addresses[0].at("/".join(split[0][:same]))


def _listing(folder: Address, found: Mapping[str, Any]) -> Listing:
    files, paths = {}, {}
    for path, about in sorted(found.items()):
        name = path.removeprefix(f"{folder.path}/")
        if not name or name.endswith("/"):  # a folder, as consoles of stores make them
            continue
        check_name(folder, name)
        if about.get("size") is None:
            raise ValueError(f"{folder}/{name}: its server does not say how large it is; download it by hand")
        files[name], paths[name] = Entry(bytes=int(about["size"]), **_versions(about)), path
    if not files:
        raise ValueError(f"{folder}: nothing there but empty folders")
    return Listing(address=folder, files=files, paths=paths)


def _file(address: Address) -> Listing:
    """The one file that an address names, or that it leads into. Raises ValueError if there is none."""
    inside: list[str] = []
    at, reason = address, ""
    while True:
        with explained(address, address.scheme):
            try:
                about = at.fs.info(at.path)
            except FileNotFoundError as error:
                about = {}
                if error.__cause__ and not reason:  # fsspec says so of every failure of the web
                    reason = f" ({first_line(error.__cause__)})"
        if about.get("type") == "file" and about.get("size") is not None:
            break
        archive = re.fullmatch(r"(.+/[^/]+\.(?:zip|tar|gz|tgz))/(.+)", at.url)
        if about or not archive:  # a folder with nothing in it, or nothing
            hint = "" if address.scheme.lists else "a web server's folder cannot be listed, name a file; "
            raise ValueError(f"{address}: nothing there{reason}; {hint}{address.scheme.login}")
        inside.insert(0, archive[2])
        at = address.at(archive[1])
    plain = at.url if at.scheme.lists else at.url.partition("?")[0]  # a signature is no part of a name
    above, _, name = plain.rpartition("/")
    check_name(address, name)
    folder = address.at(above)
    return Listing(
        address=folder,
        files={name: Entry(bytes=int(about["size"]), **_versions(about))},
        paths={name: at.path},
        inside="/".join(inside),
        single=True,
    )


def _versions(about: Mapping[str, Any]) -> dict[str, str]:
    """What a store says of an object's content. Only the Hub's SHA-256 is one: an ETag may be a digest of digests."""
    lfs = about.get("lfs")
    sha256 = (lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)) or ""
    names = ("ETag", "etag", "md5Hash", "xet_hash", "blob_id")
    version = next((str(about[name]) for name in names if about.get(name)), "")
    return {"sha256": str(sha256), "version": version.strip('"')}
