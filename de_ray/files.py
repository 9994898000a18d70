"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import secrets
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file; what was there before stays until the new one is complete on disk.

    Raises:
        IsADirectoryError: the path is a folder's.
        OSError: the folder is missing or cannot be written; it names `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the path of a file to write")
    # Not `tempfile`: its files are readable by their owner alone.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder may be none
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # not the temporary file's name
        raise


def write_new(path: str, option: str, data: bytes) -> None:
    """Write a file as a whole; see `require_new`."""
    require_new(path, option)
    write_atomically(path, data)


def require_new(path: str, option: str) -> None:
    """Raise where a file is already there, or its folder is not.

    Raises:
        FileExistsError, FileNotFoundError: naming the option.
    """
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{option}={path!r}: no such folder")
    if Path(path).exists():
        raise FileExistsError(f"{option}={path!r}: there is such a file already; remove it, or name another")


def unwritable(folder: Path) -> str | None:
    """Why a folder cannot be made and written to, in the system's words; None: it can. Leaves nothing behind.

    Permissions alone do not tell: to root, who has all of them, read-only disks and `/proc` still say no.
    """
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
            return os.strerror(errno.EACCES)
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__
