"""Runs in a storage that outlives the machine: any that fsspec reaches (s3://, gs://, sftp://, file:// …), beside the run's folder on this machine, its spool.

A run is trained in the spool. What its files have become is copied behind the training, after each checkpoint and at the end, and then a manifest is
written that names them, with their checksums: what no manifest names is not there, so a copy that was broken off is never taken for a whole one.
The one before is kept too, should it be damaged.

Which storage that is, is told by the command line alone, and what opens it by fsspec's own configuration: no workflow has a say in either.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from .. import pulse
from ..atomic import replacing
from ..errors import RunError, WorkflowError
from ..settings import user_folder
from ..workflow.host import host
from . import lock, manifests
from .folder import WRITTEN
from .manifests import NUMBERED, Manifest

T = TypeVar("T")
WAITS = (1.0, 4.0, 16.0)  # seconds before what failed is tried again
_FOLLOWED = 3  # times that a copy takes up what was saved meanwhile


def is_url(place: str) -> bool:
    """Whether it is an address of fsspec's, and no folder."""
    return "://" in place


def default_spool(url: str) -> Path:
    """In the user's folder of caches, one for each address."""
    name = re.sub(r"[^0-9A-Za-z.]+", "-", url.rstrip("/")).strip("-.")[-60:]
    folder = user_folder("XDG_CACHE_HOME", ".cache", windows=("LOCALAPPDATA", "Local"), mac="Caches")
    return folder / "runs" / f"{name}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:8]}"


class Storage:
    """A folder of runs in a storage, and the spool: the folder on this machine in which they are trained. Of the first process alone."""

    def __init__(self, url: str, spool: Path):
        """Raises `WorkflowError`, one line, for what fsspec cannot open; nothing is asked of the storage yet."""
        self.url, self.spool = url.rstrip("/"), spool
        try:
            from fsspec.core import url_to_fs

            if urllib.parse.urlsplit(url.rpartition("::")[2]).password is not None:  # it would be shown, and kept by shells
                raise WorkflowError("--output: found a password in the address; accepted: an address without one, and credentials where fsspec looks for "
                                    "them (docs/clusters.md)")
            self._fs, self._root = url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise WorkflowError(f"--output: {self.url} cannot be opened: {_said(error)}; accepted: a folder, or an address of fsspec's with its packages "
                                'installed (pip install "comfy-dancegrpo[storage]", and s3fs for s3://, gcsfs for gs:// …)') from None
        self._known: dict[str, Manifest | None] = {}
        self._mirrors: dict[Path, Mirror] = {}

    # -- what is there -------------------------------------------------------------------------------------------------------------
    def has(self, name: str) -> bool:
        """Whether there is a run of this name. Raises `RunError` where the storage does not answer."""
        if name not in self._known:
            self._known[name] = self._asked(lambda: self.newest(name))
        return bool(self._known[name] and self._known[name].texts)

    def fetch(self, name: str, on_existing: str) -> None:
        """Brings the run into the spool, where that has none or an older one: its newest whole checkpoint, and all but the checkpoints before it.

        For "new", one that is not finished is left where it is: the run is to take another name. Raises `RunError` where the storage does not answer, or
        the spool and the storage have gone different ways.
        """
        self._known.pop(name, None)
        folder = self.spool / name
        if not self.has(name) or on_existing == "restart" or on_existing == "new" and not self._known[name].finished:
            return
        held = lock.take(folder)
        if held is None:  # it is trained there now, which whoever claims it is told
            return
        try:
            there, mark, here = self._known[name], manifests.read_mark(folder), manifests.iterations(folder)
            if here is not None and (mark.get("writer") == there.writer or mark.get("seen") == there.seen):
                return  # it is as far, or further
            if here and here > mark.get("iterations", 0):
                raise RunError(f"run {name!r} has gone on in {folder} ({here} iterations) and from another spool in {self.url} ({there.iterations}); "
                               "accepted: another --run, or that folder moved away")
            self._bring(folder, there)
        finally:
            held.release()

    def newest(self, name: str) -> Manifest | None:
        """The newest whole manifest of a run; a damaged one is named."""
        self._fs.invalidate_cache()
        for number in sorted(self._numbers(name), reverse=True):
            path = self._path(name, manifests.name_of(number))
            try:
                return Manifest.read(self._fs.cat_file(path))
            except (ValueError, KeyError, TypeError) as error:
                host().say(f"{self._shown(name, manifests.name_of(number))} is damaged ({_said(error)}); the one before is used")
        return None

    def _numbers(self, name: str) -> list[int]:
        try:
            paths = self._fs.ls(self._path(name), detail=False)
        except FileNotFoundError:
            return []
        return [int(found[1]) for path in paths if (found := manifests.NAME.fullmatch(path.rstrip("/").rpartition("/")[2]))]

    def _bring(self, folder: Path, there: Manifest) -> None:
        host().say(f"run {folder.name!r} is fetched from {self.url} to {folder}")
        (folder / "run.json").unlink(missing_ok=True)  # comes last again: a folder without one is fetched anew
        for path in folder.iterdir():
            if path.name != "live":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        numbered = sorted((name for name in there.files if NUMBERED.fullmatch(name)), reverse=True)
        for name in numbered:
            if self._fetched(folder, name, there.files[name]):
                break
            host().say(f"{self._shown(folder.name, name)} is not whole; the one before is used")
        for name, told in there.files.items():
            if name not in numbered and name not in there.texts:
                self._fetched(folder, name, told)
        for name in sorted(there.texts, key=lambda name: name == "run.json"):
            if (path := manifests.place(folder, name)) is not None:
                with replacing(path) as beside:
                    beside.write_bytes(there.texts[name].encode("utf-8"))
        manifests.write_mark(folder, uuid.uuid4().hex, there)

    def _fetched(self, folder: Path, name: str, told: tuple[int, str]) -> bool:
        """Copies one file; whether it came as the manifest has it. A name that leaves the folder is no file."""
        path = manifests.place(folder, name)
        if path is None:
            return False

        def copy() -> bool:
            try:
                with self._fs.open(self._path(folder.name, name), "rb") as source, replacing(path) as beside, beside.open("wb") as target:
                    if manifests.copied(source, target, lambda count: pulse.tell()) != told:
                        raise _NotWhole
            except (_NotWhole, FileNotFoundError):
                return False
            return True

        return self._asked(copy)

    def _asked(self, ask: Callable[[], T]) -> T:
        """Tries, and tries again. Raises `RunError`: before anything is trained, a storage that does not answer is to be known of."""
        try:
            return tried(ask)
        except Exception as error:  # whatever a storage's package raises
            raise RunError(f"{self.url} does not answer: {_said(error)}; accepted: a storage that can be read and written, or --output with a folder") from error

    # -- what is copied there ------------------------------------------------------------------------------------------------------
    def follow(self, folder: Path, kept: int) -> None:
        """From now on `changed(folder)` copies this run, whose folder is made. kept: of its checkpoints, as `checkpoints.save` has it."""
        mirror = self._mirrors.get(folder)
        if mirror is None or mirror.mark != manifests.read_mark(folder).get("writer"):  # a run that starts over has none
            self._mirrors[folder] = Mirror(self, folder, self._known.get(folder.name), kept)

    def changed(self, folder: Path) -> None:
        """A checkpoint is on the disk: it, and all else that is new, is copied behind whatever comes next."""
        if folder in self._mirrors:
            self._mirrors[folder].changed()

    def close(self) -> str:
        """Copies what is new, and waits until it is there; what is not is told in one line, "" where all is."""
        for mirror in self._mirrors.values():
            mirror.changed()
        return "; ".join(filter(None, [mirror.settled() for mirror in self._mirrors.values()]))

    def write(self, name: str, file: str, source: BinaryIO, tell: Callable[[int], None] = lambda count: None) -> tuple[int, str]:
        """`manifests.copied`, of an open file to the storage."""
        path = self._path(name, file)
        try:
            target = self._fs.open(path, "wb")
        except FileNotFoundError:  # where folders have to be made
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            target = self._fs.open(path, "wb")
        with target:
            return manifests.copied(source, target, tell)

    def remove(self, name: str, files: list[str]) -> None:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name, file))

    def unnamed(self, name: str, manifest: Manifest) -> list[str]:
        """The files there, of those that a run writes, which the manifest does not name."""
        self._fs.invalidate_cache()
        found = [path[len(self._path(name)) + 1:] for path in self._fs.find(self._path(name))]
        return [file for file in found if file.split("/")[0] in WRITTEN and file not in manifest.files]

    def old_manifests(self, name: str, number: int) -> list[str]:
        return [manifests.name_of(found) for found in self._numbers(name) if found < number - 1]

    def _path(self, *names: str) -> str:
        return "/".join((self._root.rstrip("/"), *names))

    def _shown(self, *names: str) -> str:
        return "/".join((self.url, *names))


class Mirror:
    """Copies one run to the storage, in a thread of its own, one copy at a time."""

    def __init__(self, storage: Storage, folder: Path, there: Manifest | None, kept: int):
        """there: what the storage has of it. A spool that was not fetched from it, nor wrote it, starts the run over there too."""
        self._storage, self._folder, self._kept = storage, folder, kept
        mark = manifests.read_mark(folder)
        self.mark = mark.get("writer") or uuid.uuid4().hex
        self._last, self._over = there, there is not None and not mark
        self._files: dict[str, tuple[int, str]] = {} if there is None or self._over else dict(there.files)
        self._tidy = False  # whether what no manifest names has been looked for: of copies that were broken off, and of a former run
        self._seen: dict[str, tuple[int, int]] = {}  # a file's size and time when it was copied
        self._elsewhere = {name for name in self._files if NUMBERED.fullmatch(name) and not (folder / name).is_file()}  # which were not fetched
        self._guard, self._thread, self._due, self._bytes = threading.Lock(), None, False, 0
        self._failed, self._others = "", False
        if not mark:
            manifests.write_mark(folder, self.mark, None)

    def changed(self) -> None:
        with self._guard:
            self._due = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="storage", daemon=True)  # whoever asks twice to stop is not to wait
                self._thread.start()

    def settled(self) -> str:
        """When all is copied: "", or the line about what is not."""
        while (thread := self._thread) is not None:
            before = self._bytes
            thread.join(1.0)
            if self._bytes != before:
                pulse.tell()
        if not self._failed or not self._folder.exists():
            if self._folder.exists():
                host().say(f"run {self._folder.name!r} is in {self._storage.url}/{self._folder.name}")
            return ""
        again = "" if self._others else '; the same command with --resume copies it'
        return f"run {self._folder.name!r} is not whole in {self._storage.url} ({self._failed}): all of it is in {self._folder}{again}"

    def _work(self) -> None:
        while True:
            with self._guard:
                if not self._due or self._others:
                    self._thread = None
                    return
                self._due = False
            try:
                tried(self._copy, but=_Others)
                if self._failed:
                    host().say(f"{self._storage.url} takes files again: all of run {self._folder.name!r} is there")
                self._failed = ""
            except Exception as error:  # whatever a storage's package raises: no copy is worth a run
                if not self._failed:
                    host().say(f"WARNING: run {self._folder.name!r} cannot be copied to {self._storage.url} ({_said(error)}); it goes on in {self._folder}")
                self._failed, self._others = _said(error), isinstance(error, _Others)

    def _copy(self) -> None:
        """One copy: files, then the manifest that names them, then what it no longer names goes."""
        name, storage = self._folder.name, self._storage
        if not (self._folder / "run.json").is_file():  # nothing was done, or not yet
            return
        there = storage.newest(name)
        if there is not None and there.writer != self.mark and (self._last is None or there.seen != self._last.seen):
            raise _Others("another process has written it since")
        if there is None:  # someone has emptied it
            self._files, self._elsewhere = {}, set()
            self._seen.clear()
        self._last = there
        if self._over:  # the former run ends here: none of its files is to be taken for one of the new run's
            self._write(Manifest(0, self.mark, 0, {}, {}))
            self._over = False
        for _ in range(_FOLLOWED):
            found = manifests.files(self._folder)
            for file in sorted(sorted(found, reverse=True), key=lambda file: not NUMBERED.fullmatch(file)):  # the newest checkpoint first
                self._copy_file(file, found[file])
            texts = manifests.texts(found)
            if {file for file in manifests.files(self._folder) if NUMBERED.fullmatch(file)} <= self._files.keys():
                break  # else the texts may tell of a checkpoint that is not there
        numbered = sorted(file for file in {*found, *self._elsewhere} if NUMBERED.fullmatch(file))
        self._elsewhere -= set(numbered[:-self._kept] if self._kept else ())
        gone = [file for file in self._files if file not in found and file not in self._elsewhere]
        for file in gone:
            del self._files[file]
        iterations = manifests.iterations(self._folder) or 0
        self._write(Manifest(0, self.mark, iterations, texts, dict(self._files)))
        manifests.write_mark(self._folder, self.mark, self._last)
        storage.remove(name, [*(gone if self._tidy else storage.unnamed(name, self._last)), *storage.old_manifests(name, self._last.number)])
        self._tidy = True

    def _copy_file(self, name: str, path: Path) -> None:
        try:
            with path.open("rb") as source:
                status = os.fstat(source.fileno())
                now = status.st_size, status.st_mtime_ns
                if self._seen.get(name) == now:
                    return
                told = self._files.get(name)
                if told is None or told[0] != status.st_size or told != manifests.copied(source):  # what was fetched is there already
                    source.seek(0)
                    self._files[name] = self._storage.write(self._folder.name, name, source, self._count)
                self._seen[name] = now
        except FileNotFoundError:
            if path.exists():  # it was the storage's
                raise

    def _write(self, manifest: Manifest) -> None:
        manifest = manifest._replace(number=self._last.number + 1 if self._last is not None else 1)
        self._storage.write(self._folder.name, manifests.name_of(manifest.number), io.BytesIO(manifest.data()))
        self._last = manifest

    def _count(self, count: int) -> None:
        self._bytes += count


class _NotWhole(Exception):
    """A file differs from what the manifest says."""


class _Others(Exception):
    """Someone else writes the run."""


def tried(work: Callable[[], T], but: type[BaseException] = PermissionError) -> T:
    """Calls `work` until it succeeds, or has failed once more than there are `WAITS`. Errors that stay (`but`, and a lack of rights) are raised at once."""
    for wait in (*WAITS, None):
        try:
            return work()
        except (but, PermissionError):
            raise
        except Exception:
            if wait is None:
                raise
            time.sleep(wait)
    raise AssertionError  # the last one returns or raises


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
