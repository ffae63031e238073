"""Addresses of remote data, opened through fsspec; their errors in one line, without credentials."""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

ATTEMPTS = 4  # of a read that fails
PAUSE = 0.5  # seconds before the second; each further one waits twice as long


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A kind of address.

    Attributes:
        example: what one looks like.
        module: what fsspec needs for it.
        install: what pip is to install where that is missing.
        login: where credentials come from: never from the address.
        lists: whether what lies below an address can be listed.
        writes: whether `push` writes there; else what does.
        read_options: of fsspec's cat_file.
    """

    example: str
    module: str
    install: str
    login: str
    lists: bool = True
    writes: bool = False
    instead: str = ""
    read_options: Mapping[str, Any] = field(default_factory=dict)


_WEB = Scheme(
    example="https://HOST/FILE.tar",
    module="aiohttp",
    install="'fastdcd[remote]'",
    login="a signed address may have expired",
    lists=False,
    instead="your server's own upload",
)
SCHEMES = {
    "hf": Scheme(
        example="hf://datasets/OWNER/NAME",
        module="huggingface_hub",
        install="huggingface_hub",
        login="private and gated repositories need `hf auth login` or HF_TOKEN",
        instead="`hf upload-large-folder`",
        read_options={"cache_type": "none"},
    ),
    "s3": Scheme(
        example="s3://BUCKET/FOLDER",
        module="s3fs",
        install="'fastdcd[remote]'",
        login="credentials come from ~/.aws or AWS_PROFILE, AWS_ACCESS_KEY_ID ...; AWS_ENDPOINT_URL names other stores",
        writes=True,
    ),
    "gs": Scheme(
        example="gs://BUCKET/FOLDER",
        module="gcsfs",
        install="'fastdcd[gcs]'",
        login="credentials come from `gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS",
        writes=True,
    ),
    "https": _WEB,
    "http": _WEB,
}


def is_url(text: str) -> bool:
    """Whether a user's text is an address and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def without_secrets(text: str) -> str:
    """Text of a message: the query of an address (a signature), a password in it, and values of the environment that
    are credentials are left out."""
    text = re.sub(r"//[^/\s@]*@", "//***@", text)
    text = re.sub(r"\?[^\s'\"?]*=[^\s'\"]*", "?...", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", name):
            text = text.replace(value, "***")
    return text


@dataclass(frozen=True)
class Address:
    """An address that is well-formed, with its file system.

    Attributes:
        url: as given, without a / at the end.
        fs: fsspec's file system.
        path: the same place as `fs` names it.
    """

    url: str
    scheme: Scheme
    fs: Any
    path: str

    def __str__(self) -> str:
        return without_secrets(self.url)

    def below(self, name: str) -> str:
        """The path of `name`, relative with / between its parts, below this address."""
        return f"{self.path}/{name}"

    def at(self, url: str) -> Address:
        """Another address of the same file system. Raises ValueError as `open_address` does."""
        url, scheme = _checked(url)
        assert scheme is self.scheme
        return Address(url, scheme, self.fs, self.fs._strip_protocol(url))

    def read(self, path: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end` of an object, tried several times. Safe to call from several threads.

        Raises ValueError if it is not there or may not be read, OSError if the connection fails or is cut off.
        """
        if start == end:
            return b""
        what = without_secrets(path if "://" in path else f"{self.url.partition('://')[0]}://{path}")
        for attempt in range(ATTEMPTS):
            try:
                data: bytes = self.fs.cat_file(path, start=start, end=end, **self.scheme.read_options)
                if len(data) == end - start:
                    return data
                failure = f"got {len(data):,} of {end - start:,} bytes from {start:,} on"
                if len(data) > end - start:
                    failure += "; its server does not serve parts of a file"
            except Exception as error:
                if attempt == ATTEMPTS - 1 or isinstance(error, FileNotFoundError | PermissionError):
                    with explained(what, self.scheme):
                        raise
            else:
                if attempt == ATTEMPTS - 1:
                    raise OSError(f"{what}: cut off ({failure}); the same command continues")
            time.sleep(PAUSE * 2**attempt)
        raise AssertionError


def open_address(url: str) -> Address:
    """Check an address and open its file system; nothing is read yet.

    Raises ValueError for an address that cannot be right or holds credentials, and for a package that is missing.
    """
    url, scheme = _checked(url)
    shown = without_secrets(url)
    try:
        importlib.import_module(scheme.module)
    except ImportError as error:
        raise ValueError(f"{shown}: needs a package ({error}): pip install {scheme.install}") from None
    import fsspec.core

    with explained(shown, scheme):
        fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return Address(url, scheme, fs, path)


def _checked(url: str) -> tuple[str, Scheme]:
    """An address as it is used, and its kind. Raises ValueError for what cannot be one."""
    name, _, rest = url.partition("://")
    name, shown = name.lower(), without_secrets(url)
    scheme = SCHEMES.get(name)
    if scheme is None:
        known = ", ".join(each.example for other, each in SCHEMES.items() if other != "http")
        raise ValueError(f"{shown}: addresses of {name}:// are not known; expected {known}, or a path")
    host, _, path = rest.rstrip("/").partition("/")
    if "@" in host:
        raise ValueError(
            f"{shown}: an address with credentials in it would end up in logs and histories; {scheme.login}"
        )
    if not host or not url.isprintable() or ".." in path.split("/"):
        raise ValueError(f"{shown!r}: not an address; expected one like {scheme.example}")
    if name == "hf" and (host not in ("datasets", "buckets") or "/" not in path):
        raise ValueError(f"{shown}: not a dataset of the Hub; expected {scheme.example}")
    return f"{name}://{rest.rstrip('/')}", scheme


# Errors of the stores' own libraries that are the user's to mend, by name: nothing here imports those libraries.
_CREDENTIALS = frozenset(
    [
        "NoCredentialsError",
        "PartialCredentialsError",
        "TokenRetrievalError",
        "ProfileNotFound",
        "RefreshError",
        "DefaultCredentialsError",
        "GatedRepoError",
    ]
)


@contextmanager
def explained(what: object, scheme: Scheme) -> Iterator[None]:
    """What the stores' libraries raise, in one line: ValueError for what is not there or not allowed, else OSError."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{what}: no such object, folder or bucket ({scheme.login})") from None
    except PermissionError as error:
        raise ValueError(f"{what}: access denied ({first_line(error)}); {scheme.login}") from None
    except Exception as error:
        if type(error).__name__ in _CREDENTIALS:
            raise ValueError(f"{what}: no credentials ({first_line(error)}); {scheme.login}") from None
        if isinstance(error, ValueError):
            raise ValueError(f"{what}: {first_line(error)}") from None
        raise OSError(
            f"{what}: {type(error).__name__}: {first_line(error)}; the same command continues where this one stopped"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, in one line and without secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_secrets(lines[0])[:200] if lines else type(error).__name__
