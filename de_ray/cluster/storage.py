"""Storage that outlives the machines: a run's folder is mirrored there, and Tune keeps its records there."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from de_ray.files import write_atomically

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

log = logging.getLogger(__name__)

RECORDS = "sweep"
"""In a run's folder: Tune's, of no use for continuing a run."""


def location(storage: str, folder: Path) -> str:
    """Where a run's folder lies in a storage: under the last two parts of its path, problem-method/time."""
    folder = folder.absolute()
    return f"{storage.rstrip('/')}/{folder.parent.name}/{folder.name}"


def open_storage(uri: str) -> tuple["AbstractFileSystem", str]:
    """The file system of an address, and the path there.

    Args:
        uri: s3://BUCKET/FOLDER, any other address that fsspec knows, or a path.

    Raises:
        ValueError: the package for such addresses is missing, or there is none.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(uri)
    except ImportError as error:
        raise ValueError(f"{uri}: {error}; for s3:// run: pip install 'de-ray[aws]'") from error


def tune_storage(place: Path | str) -> dict[str, object]:
    """Arguments of `tune.RunConfig` for a folder or an address.

    The file system is fsspec's, so that one set of credentials and endpoints serves Tune as well.
    """
    if isinstance(place, Path) or "://" not in place:
        return {"storage_path": str(Path(place).resolve())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = open_storage(place)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


class Mirror:
    """A copy of a run's folder in a storage, brought up to date as the run goes on.

    Args:
        folder: of the run.
        storage: see `ClusterConfig.storage`; None, or a disk that the folder is on already: nothing is copied.

    Raises:
        ValueError: see `open_storage`.
        OSError: it cannot be reached.
    """

    def __init__(self, folder: Path, storage: str | None) -> None:
        self._folder = folder
        self._sent: dict[str, tuple[int, int]] = {}  # file -> (ns, bytes)
        self.uri: str | None = None
        if storage is not None and not folder.resolve().is_relative_to(Path(storage).resolve()):
            self.uri = location(storage, folder)
            self._filesystem, self._root = open_storage(self.uri)
            self._is_local = "file" in (self._filesystem.protocol, *self._filesystem.protocol)

    def push(self, final: bool = False) -> None:
        """Copy what is new and remove what has gone.

        A failure is a warning, since the next push makes up for it.

        Raises:
            OSError: it failed, and this is the last push.
        """
        if self.uri is None:
            return
        try:
            self._push()
        except Exception as error:  # noqa: BLE001, whatever a store's client may raise
            reason = f"{self.uri} was not brought up to date ({type(error).__name__}: {error})"
            if final:
                raise OSError(f"{reason}; the results are in {self._folder}") from error
            log.warning("%s; it is tried again after the next step", reason)

    def _push(self) -> None:
        files = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_file() and not path.name.startswith(".") and name.partition("/")[0] != RECORDS:
                files[name] = path.stat().st_mtime_ns, path.stat().st_size
        for name, state in files.items():
            if self._sent.get(name) != state:
                self._put(name)
                self._sent[name] = state
        for name in self._sent.keys() - files.keys():
            self._filesystem.rm_file(f"{self._root}/{name}")
            del self._sent[name]

    def _put(self, name: str) -> None:
        source, target = self._folder / name, f"{self._root}/{name}"
        if self._is_local:  # elsewhere an object appears as a whole
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, source.read_bytes())
        else:
            self._filesystem.put_file(str(source), target)


def fetch(uri: str) -> Path:
    """Copy a run's mirror to where a run of this machine would be, `outputs/problem-method/time`; returns that folder.

    What is there already stays: it is the same, or newer.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: see `open_storage`.
    """
    filesystem, root = open_storage(uri.rstrip("/"))
    names = [path[len(root):].lstrip("/") for path in filesystem.find(root)]
    if not names:
        raise FileNotFoundError(f"resume={uri}: nothing there; expected the mirror of a run, such as "
                                "s3://BUCKET/FOLDER/digits-directed/...")
    folder = Path("outputs", *Path(root).parts[-2:])
    for name in names:
        target = folder / name
        if Path(name).parts[0] != RECORDS and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            filesystem.get_file(f"{root}/{name}", str(part))
            shutil.move(part, target)
    return folder
