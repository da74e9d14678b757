"""Objects under one URL, by fsspec, with time limits, retries and complete error messages."""

import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from unicl_fast.system.installation import install_command
from unicl_fast.system.phases import mark_progress
from unicl_fast.system.untrusted_files import MOST_BYTES, open_file
from unicl_fast.system.wording import without_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CONNECTIONS = 8  # concurrent requests of one process: a store gives about 50 MB/s for each
TRANSFER_BYTES = 8 << 20  # size of a request when reading a whole object
TRIES = 6
FIRST_PAUSE_SECONDS = 0.5
"""Doubled after each try, plus or minus a quarter, so that ranks spread out."""
ANSWER_SECONDS = 60.0
"""Time limit of one answer. All tries together stay below run.timeout_seconds' default, so that an
error names the store before the watchdog acts."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://(.+)", re.DOTALL)
_S3 = ("s3", "s3a")
# Faults of settings, not of the network: retrying does not help.
_NOT_TRANSIENT = (NotImplementedError, TypeError)
_NO_KEYS = ("NoCredentialsError", "PartialCredentialsError")
_LISTS_NOTHING = ("http", "https")
# An object needs no folder here, and making a missing one would create a bucket.
_IN_BUCKETS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "http", "https")
_jitter = random.Random()


class StorageError(RuntimeError):
    """A request to a store finally failed; the message names it."""


class _IncompleteError(Exception):
    """Fewer or more bytes came than requested."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """Size in bytes and version of an object."""

    size: int
    version: str
    """Its ETag, or the time it was written; changes with the object, and can be empty."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a URL (s3://bucket/folder) instead of a path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def split_url(url: str) -> tuple[str, str]:
    """The URL of an object's bucket or server, which all its objects share, and the rest."""
    protocol, _, place = url.partition("://")
    host, _, name = place.partition("/")
    if host and name:
        return f"{protocol}://{host}", name
    above, _, name = url.rpartition("/")  # file:///folder/name
    return above, name


class ObjectStore:
    """The objects under one URL, as names below it; safe in several threads and after a fork."""

    def __init__(self, url: str) -> None:
        """Connects at the first request; ValueError for a URL that is not a folder's.

        Keys, regions and endpoints come from the usual places of the store's client and fsspec
        (~/.aws, AWS_..., FSSPEC_S3_..., ~/.config/fsspec).
        """
        match = _URL.fullmatch(url)
        if match is None or "::" in url or "?" in url or "#" in url:
            raise ValueError(
                f"{without_secrets(url)} is not the URL of a folder: expected is for example "
                "s3://bucket/folder, with nothing after a ? or # and without ::"
            )
        self._address = url.rstrip("/")
        self.url = without_secrets(self._address)
        """For messages and files, without user and password."""
        self._protocol = match.group(1).lower()
        self.read_bytes = 0
        """Bytes that this process has read."""
        self._systems: dict[int, Any] = {}
        self._counting = threading.Lock()

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rsplit("/", 1)[-1]

    def url_of(self, name: str) -> str:
        """An object's URL for messages, without user, password and query."""
        name, mark, _ = name.partition("?")
        return (f"{self.url}/{name}" if name else self.url) + ("?..." if mark else "")

    def read(self, name: str, start: int, end: int) -> bytes:
        """Reads bytes [start, end); raises FileNotFoundError or, after retries, StorageError."""
        if end <= start:
            return b""

        def attempt() -> bytes:
            data = self._read_up_to(name, start, end)
            if len(data) != end - start:
                raise _IncompleteError(f"{len(data)} bytes came, {end - start} were requested")
            return data

        what = f"{self.url_of(name)}, bytes {start} to {end - 1}"
        return self._retry(what, "be read", attempt)

    def read_whole(self, name: str) -> bytes | None:
        """Reads a whole small object; None if it does not exist. ValueError if it is large."""
        url = self.url_of(name)
        try:
            data = self._retry(url, "be read", lambda: self._read_up_to(name, 0, MOST_BYTES + 1))
        except FileNotFoundError:
            return None
        if len(data) > MOST_BYTES:
            raise ValueError(f"{url} is too large: at most {MOST_BYTES:,} bytes are read")
        return data

    def _read_up_to(self, name: str, start: int, end: int) -> bytes:
        data: bytes = self._call("cat_file", self._path(name), start=start, end=end)
        with self._counting:
            self.read_bytes += len(data)
        return data

    def find(self, name: str) -> StoredObject | None:
        """Size and version of an object; None if it does not exist."""

        def attempt() -> StoredObject:
            info = self._call("info", self._path(name))
            if info.get("type") == "directory":  # a prefix of other objects' names
                raise FileNotFoundError(self.url_of(name))
            size = info.get("size")
            if size is None:
                raise TypeError("it does not say how large it is, and so cannot be read in ranges")
            return StoredObject(int(size), _version_in(info))

        try:
            return self._retry(self.url_of(name), "be asked for its size", attempt)
        except FileNotFoundError:
            return None

    def list_objects(self) -> dict[str, StoredObject] | None:
        """All objects below the URL by name (with / in folders); None if it cannot list."""
        if self._protocol in _LISTS_NOTHING:
            return None
        root = self._path("")

        def attempt() -> dict[str, StoredObject]:
            found = self._call("find", root, detail=True)
            return {
                path.removeprefix(root).lstrip("/"): StoredObject(
                    int(info.get("size") or 0), _version_in(info)
                )
                for path, info in found.items()
                if info.get("type") != "directory"
            }

        try:
            return self._retry(self.url, "be listed", attempt)
        except FileNotFoundError:
            return {}

    def find_all(self, names: Iterable[str]) -> dict[str, StoredObject | None]:
        """`find` for several objects, by a single listing if the store can list."""
        wanted = list(names)
        if (listed := self.list_objects()) is not None:
            return {name: listed.get(name) for name in wanted}
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="unicl-storage") as pool:
            return dict(zip(wanted, pool.map(self.find, wanted), strict=True))

    def fetch_file(self, name: str, path: Path, *, size: int) -> str:
        """Copies an object into a file, replacing it; otherwise as `checksum_of`."""
        with open_file(path, "wb") as file:
            return self.checksum_of(name, size=size, take=file.write)

    def checksum_of(
        self, name: str, *, size: int, take: Callable[[bytes], object] = lambda piece: None
    ) -> str:
        """XXH3-64 in hexadecimal of an object of `size` bytes, which is read once.

        Its pieces go to `take` in order; a few are fetched ahead. Raises as `read`.
        """
        digest = xxhash.xxh3_64()
        starts = range(0, size, TRANSFER_BYTES)
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="unicl-storage") as pool:
            for first in range(0, len(starts), CONNECTIONS):
                for data in pool.map(
                    lambda start: self.read(name, start, min(start + TRANSFER_BYTES, size)),
                    starts[first : first + CONNECTIONS],
                ):
                    take(data)
                    digest.update(data)
                    mark_progress()
        return digest.hexdigest()

    def write_file(self, path: Path, name: str) -> None:
        """Writes a file as an object, with its folder; StorageError if that is impossible."""
        # each part may need the time limit of an answer
        limit = ANSWER_SECONDS * (1 + path.stat().st_size // TRANSFER_BYTES)

        def attempt() -> None:
            put = functools.partial(
                self._call, "put_file", str(path), self._path(name), seconds=limit
            )
            try:
                put()
            except FileNotFoundError:
                if self._protocol in _IN_BUCKETS:
                    raise
                self._call("makedirs", self._path(name).rpartition("/")[0], exist_ok=True)
                put()

        try:
            self._retry(self.url_of(name), "be written", attempt)
        except FileNotFoundError as error:
            place = "bucket" if self._protocol in _IN_BUCKETS else "folder"
            raise StorageError(
                f"{self.url_of(name)} cannot be written: the {place} that it is to lie in does not "
                f"exist ({_describe(error.__cause__ or error)}); see that the URL is right, or "
                f"make the {place}, then start again"
            ) from error

    def _retry(self, what: str, deed: str, attempt: Callable[[], Result]) -> Result:
        """Calls `attempt` until it succeeds or retrying is pointless."""
        pause = FIRST_PAUSE_SECONDS
        self._system()  # faults of the URL or the installation are raised unchanged
        for number in range(1, TRIES + 1):
            try:
                return attempt()
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{what}: there is no such object") from error
            except PermissionError as error:
                raise StorageError(
                    f"{what} may not {deed}: {_describe(error)}; see that the keys are set "
                    "and allow it, and that the URL is right"
                ) from error
            except Exception as error:  # clients raise many kinds
                if isinstance(error, _NOT_TRANSIENT) or type(error).__name__ in _NO_KEYS:
                    raise StorageError(f"{what} cannot {deed}: {_describe(error)}") from error
                if number == TRIES:
                    raise StorageError(
                        f"{what} could not {deed}: {_describe(error)} ({number} tries); see that "
                        "the store can be reached and answers within "
                        f"{ANSWER_SECONDS:g} s, then start again: nothing was lost, and "
                        "--resume auto resumes a training run"
                    ) from error
                seconds = pause * _jitter.uniform(0.75, 1.25)
                logger.warning(
                    "STORAGE: %s could not %s: %s; try %d of %d in %.1f s",
                    what, deed, _describe(error), number + 1, TRIES, seconds,
                )  # fmt: skip
                time.sleep(seconds)
                pause *= 2
        raise AssertionError("unreachable")

    def _call(self, method: str, *arguments: Any, seconds: float = 0, **keywords: Any) -> Any:
        """Calls a method of the file system, with a time limit if it is asynchronous."""
        system = self._system()
        if not system.async_impl:
            return getattr(system, method)(*arguments, **keywords)
        from fsspec.asyn import sync

        limit = seconds or ANSWER_SECONDS
        function = getattr(system, f"_{method}")
        try:
            return sync(system.loop, function, *arguments, timeout=limit, **keywords)
        except Exception as error:
            if self._protocol not in _LISTS_NOTHING:
                raise
            raise _meaning_of(error) from error

    def _system(self) -> Any:
        """This process's connection, since none may be used after a fork."""
        system = self._systems.get(os.getpid())
        if system is None:
            system = self._systems.setdefault(os.getpid(), _connect(self._protocol, self.url))
        return system

    def _path(self, name: str) -> str:
        address = f"{self._address}/{name}" if name else self._address
        return str(self._system()._strip_protocol(address))


def _version_in(info: Mapping[str, Any]) -> str:
    """An object's version, under any client's name for it."""
    plain = {name.lower().replace("-", "").replace("_", ""): value for name, value in info.items()}
    for name in ("etag", "contentmd5", "lastmodified", "updated", "mtime", "created"):
        if plain.get(name):
            return str(plain[name])
    return ""


def _connect(protocol: str, url: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        # only our tries count: botocore's inside s3fs's inside ours would make 180
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        once = {"retries": {"max_attempts": 1}, "max_pool_connections": 4 * CONNECTIONS}
        options["config_kwargs"] = once | configured
    try:
        system = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        how = install_command("remote") if protocol in _S3 else str(error)
        raise ValueError(f"{url}: {protocol}:// needs one more package: {how}") from error
    except ValueError as error:  # an unknown protocol
        raise ValueError(
            f"{url}: {error}; known are s3, gs, http, https, and what fsspec lists by "
            "fsspec.available_protocols()"
        ) from error
    if protocol in _LISTS_NOTHING:
        system._cat_file = functools.partial(_read_http, system)
    if hasattr(system, "retries"):
        system.retries = 1
    return system


async def _read_http(system: Any, url: str, *, start: int, end: int) -> bytes:
    """As fsspec's, but reads no more than asked for and a block: a server can send anything."""
    session = await system.set_session()
    headers = {**system.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
    options = {**system.kwargs, "headers": headers}
    data = bytearray()
    async with session.get(system.encode_url(url), **options) as answer:
        answer.raise_for_status()
        async for block in answer.content.iter_chunked(1 << 20):
            data += block
            if len(data) > end - start:
                break
    return bytes(data)


def _meaning_of(error: Exception) -> Exception:
    """An HTTP error by its status: fsspec calls a server that is down a file that is missing."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(error, "status", 0)
    if status in (404, 410):
        return FileNotFoundError(_describe(error))
    return PermissionError(_describe(error)) if status in (401, 403) else error


def _describe(error: BaseException) -> str:
    """A client's error in one line."""
    text = without_secrets(" ".join(str(error).split()))[:300]
    if isinstance(error, _IncompleteError):
        return text
    if isinstance(error, TimeoutError) and not text:
        return "no answer came in time"
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind
