"""Where a store's files lie and how one is written: aside, whole, and then under its name."""

from __future__ import annotations

import os
import posixpath
import re
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import (
    Any,
    Container,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)
from urllib.parse import quote, unquote

from plarv_schemas import arrow
from plarv_schemas.arrow_columns import TableName
from plarv_schemas.events import digest
from plarv_schemas.pyarrow_types import RecordBatch, Schema, require_pyarrow
from plarv_sinks.store_layout import filled, group_rows, options

__all__ = [
    "FRESH",
    "RUN_KEY",
    "Place",
    "Prepared",
    "StoreFiles",
    "StoredFile",
    "fresh_path",
    "shown",
    "steps_place",
    "table_path",
]

RUN_KEY = b"argus.run_id"  # in a file's metadata, where all its rows are of one run
FRESH = "fresh"
_ASIDE = "_aside"  # readers of the tables never look into a folder of this name
_STALE_S = 86_400.0
_MAX_NAME = 180  # of a folder, in characters; file systems take 255
_LONG = "="  # which is quoted in a run's id

_URI = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_SECRET = re.compile(r"//.*@")
_PART = re.compile(r"^([a-z_]+)=(.*)$")
_FRESH_NAME = re.compile(r"^p(\d+)-([0-9a-z]+)-(\d+)-(\d+)\.parquet$")


class Place(NamedTuple):
    """A range of offsets of a topic's partition: what a fresh file holds, by its name."""

    topic_id: str  # 12 hex digits: a topic that was made anew has another one
    partition: int
    first: int
    last: int

    @property
    def source(self) -> str:
        """The partition, as the files' metadata name it."""
        return f"{self.topic_id}/{self.partition}"


class Prepared(NamedTuple):
    """A file that is whole and has no name yet: where it lies, and where it goes."""

    aside: str
    path: str


class StoredFile(NamedTuple):
    """One Parquet file of a store."""

    path: str  # below the store's root
    table: str
    date: str  # YYYY-MM-DD, UTC
    run_id: Optional[str]  # where the folder's name says that it holds one run alone
    place: Optional[Place]  # of a fresh file
    size: int

    @classmethod
    def at(cls, path: str, size: int = 0) -> Optional[StoredFile]:
        """The file of this path; None: it is none of a store's."""
        *folders, name = path.split("/")
        if not name.endswith(".parquet") or name.startswith((".", "_")):
            return None
        keys: Dict[str, str] = {}
        for folder in folders:
            part = _PART.match(folder)
            if part is not None and _LONG not in part.group(2):
                keys[part.group(1)] = unquote(part.group(2))
        if "table" not in keys or "date" not in keys:
            return None
        place: Optional[Place] = None
        if folders[0] == FRESH:
            found = _FRESH_NAME.match(name)
            if found is None:
                return None
            partition, topic_id, first, last = found.groups()
            place = Place(topic_id, int(partition), int(first), int(last))
        return cls(path, keys["table"], keys["date"], keys.get("run_id"), place, size)


def shown(location: Union[str, Path]) -> str:
    """A path or URI as it is told: without a key in it.

    >>> shown("s3://name:sec/ret@bucket/argus?region=eu")
    's3://***@bucket/argus?region=eu'
    """
    return _SECRET.sub("//***@", str(location))


def table_path(table: TableName, date: str, run_id: Optional[str] = None) -> str:
    """The folder of a table's day, or of one run's in it.

    >>> table_path("steps", "2026-11-23", "a/b")
    'table=steps/date=2026-11-23/run_id=a%2Fb'
    """
    path = f"table={table}/date={date}"
    return path if run_id is None else f"{path}/run_id={_run_folder(run_id)}"


def steps_place(date: str, run_id: str) -> Tuple[str, Schema]:
    """The folder of a run's steps of a day, and the schema of the files in it.

    They have no column ``run_id`` where the folder's name says it.
    """
    folder, schema = table_path("steps", date, run_id), arrow.file_schema("steps")
    if _LONG in _run_folder(run_id):
        return folder, schema
    fields = [field for field in schema if field.name != "run_id"]
    metadata = {**(schema.metadata or {}), RUN_KEY: run_id.encode("utf-8")}
    made: Schema = require_pyarrow().schema(fields, metadata)
    return folder, made


def _run_folder(run_id: str) -> str:
    """A run's id as a folder's name; of a very long one its beginning, and what tells it apart."""
    name = quote(run_id, safe="")
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}{_LONG}{digest(run_id)}"


def fresh_path(table: TableName, date: str, place: Place) -> str:
    """The path of what was read from a range of offsets.

    >>> fresh_path("steps", "2026-11-23", Place("0f3a", 3, 70, 81))
    'fresh/table=steps/date=2026-11-23/p00003-0f3a-000000000070-000000000081.parquet'
    """
    name = f"p{place.partition:05d}-{place.topic_id}-{place.first:012d}-{place.last:012d}"
    return f"{FRESH}/{table_path(table, date)}/{name}.parquet"


class StoreFiles:
    """The files below a local path or a URI that ``pyarrow.fs`` knows (``s3://``, ``gs://``).

    OSError: as the file system has it. ValueError: a URI that pyarrow cannot open.
    """

    def __init__(self, location: Union[str, Path]) -> None:
        self._fs: Any = require_pyarrow("pyarrow.fs")
        text = str(location)
        self.given = text
        self.location = shown(text)
        self._given, _, self._options = text.partition("?")
        if _URI.match(text):
            try:
                self._files, self._root = self._fs.FileSystem.from_uri(text)
            except require_pyarrow().ArrowException as error:
                raise ValueError(str(error).replace(text, self.location)) from error
        else:
            self._files, self._root = self._fs.LocalFileSystem(), os.path.abspath(text)
        self.is_local = isinstance(self._files, self._fs.LocalFileSystem)

    def local(self, path: str) -> Path:
        """Where a file of a local store lies."""
        return Path(self._root) / path

    def uri(self, path: str) -> str:
        """How a file is named to others: its path, or its URI."""
        if self.is_local:
            return self._full(path)
        options = f"?{self._options}" if self._options else ""
        return posixpath.join(self._given, path) + options

    def listed(self, folder: str) -> List[StoredFile]:
        """The store's files below ``folder``, by path."""
        found: List[StoredFile] = []
        for path, size in self._below(folder):
            file = StoredFile.at(path, size)
            if file is not None:
                found.append(file)
        return sorted(found)

    def folders(self, folder: str) -> List[str]:
        """The paths of the folders in ``folder``."""
        selector = self._fs.FileSelector(self._full(folder), allow_not_found=True)
        infos = self._files.get_file_info(selector)
        return sorted(
            self._inner(info.path) for info in infos if info.type == self._fs.FileType.Directory
        )

    def names(self, folder: str) -> List[str]:
        """The paths of all files in ``folder``, whatever they are."""
        return sorted(path for path, _ in self._below(folder))

    def exists(self, path: str) -> bool:
        """Whether there is a file of this path."""
        (info,) = self._files.get_file_info([self._full(path)])
        return bool(info.type == self._fs.FileType.File)

    def open(self, path: str) -> Any:
        """A ``pyarrow.parquet.ParquetFile``. FileNotFoundError, OSError, ArrowException."""
        parquet = require_pyarrow("pyarrow.parquet")
        return parquet.ParquetFile(self._full(path), filesystem=self._files)

    def dataset(self, paths: Sequence[str]) -> Any:
        """A ``pyarrow.dataset.Dataset`` of these files, with the folders' names as columns."""
        pa, dataset = require_pyarrow(), require_pyarrow("pyarrow.dataset")
        keys = pa.schema([(name, pa.string()) for name in ("table", "date", "run_id")])
        return dataset.dataset(
            [self._full(path) for path in paths],
            filesystem=self._files,
            format="parquet",
            partitioning=dataset.partitioning(keys, flavor="hive"),
            partition_base_dir=self._root,
        )

    def read(self, path: str) -> bytes:
        """A small file, whole."""
        with self._files.open_input_stream(self._full(path)) as stream:
            data: bytes = stream.read()
        return data

    def put(self, path: str, data: bytes) -> None:
        """Writes a small file: whole, or not at all. OSError."""
        aside = self._aside(path)
        with self._files.open_output_stream(self._full(aside)) as stream:
            stream.write(data)
        if self.is_local:
            _sync(self._full(aside))
        self.publish([Prepared(aside, path)])

    def prepare(
        self, path: str, schema: Schema, batches: Iterable[RecordBatch], *, sync: bool = True
    ) -> Prepared:
        """Writes a table's file aside, where readers do not look; :meth:`publish` names it.

        ``sync=False``: whoever publishes it sees to it that it is on the disk.

        ``schema`` has the table's file columns, or some of them: those are taken of the batches.
        OSError: nothing was written.
        """
        aside = self._aside(path)
        parquet = require_pyarrow("pyarrow.parquet")
        try:
            with self._files.open_output_stream(self._full(aside)) as stream, parquet.ParquetWriter(
                stream, schema, **options(schema)
            ) as writer:
                for batch in batches:
                    writer.write_batch(filled(batch, schema), row_group_size=group_rows(batch))
            if self.is_local and sync:
                _sync(self._full(aside))
        except BaseException:
            self.discard([Prepared(aside, path)])
            raise
        return Prepared(aside, path)

    def publish(self, prepared: Sequence[Prepared]) -> None:
        """Gives the files their names, one after the other: each is there as a whole.

        OSError: none of them is there.
        """
        try:
            for aside, path in prepared:
                self.move(aside, path)
                if self.is_local:
                    _sync(posixpath.dirname(self._full(path)))
        except BaseException:
            for _, path in reversed(prepared):  # the last one says that the others count
                with suppress(OSError):
                    self.remove(path)
            self.discard(prepared)
            raise

    def discard(self, prepared: Sequence[Prepared]) -> None:
        """Removes what was prepared and is not to be published."""
        for aside, _ in prepared:
            with suppress(OSError):
                self._files.delete_file(self._full(aside))

    def write(self, path: str, schema: Schema, batches: Iterable[RecordBatch]) -> None:
        """Prepares and publishes one file."""
        self.publish([self.prepare(path, schema, batches)])

    def move(self, path: str, target: str) -> None:
        """Renames a file; what had the name is gone."""
        self._make_folder(target)
        self._files.move(self._full(path), self._full(target))

    def remove(self, path: str) -> None:
        """Removes a file, where it is there."""
        with suppress(FileNotFoundError):
            self._files.delete_file(self._full(path))

    def sweep(self, kept: Container[str]) -> None:
        """Removes what writers that were killed left aside a day ago or longer, but ``kept``."""
        if not self.is_local or not self.local(_ASIDE).is_dir():
            return
        for path in self.local(_ASIDE).iterdir():
            with suppress(OSError):
                old = time.time() - path.stat().st_mtime > _STALE_S
                if old and f"{_ASIDE}/{path.name}" not in kept:
                    path.unlink()

    def _below(self, folder: str) -> Iterator[Any]:
        selector = self._fs.FileSelector(self._full(folder), allow_not_found=True, recursive=True)
        for info in self._files.get_file_info(selector):
            if info.type == self._fs.FileType.File:
                yield self._inner(info.path), info.size

    def _aside(self, path: str) -> str:
        """A path of its own, of no table."""
        aside = f"{_ASIDE}/{uuid.uuid4().hex}-{posixpath.basename(path)}"
        self._make_folder(aside)
        return aside

    def _make_folder(self, path: str) -> None:
        if self.is_local:
            os.makedirs(posixpath.dirname(self._full(path)), exist_ok=True)

    def _full(self, path: str) -> str:
        return posixpath.join(self._root, path) if path else str(self._root)

    def _inner(self, path: str) -> str:
        return posixpath.relpath(path, self._root)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
