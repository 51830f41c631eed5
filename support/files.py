"""Files that survive a crash: atomic writes, locks, fsync. Where operating systems differ, and nowhere else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

WINDOWS = os.name == "nt"


def keep_heap() -> None:
    """Has glibc keep freed memory. By default it gives each step's activations back to the kernel, which then zeroes
    the same pages again for the next step: a third of the time on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def sync_file(handle: int) -> None:
    """Has what was written to a file reach the disk. On macOS, fsync alone leaves it in the drive's own cache."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # a network drive knows no such call
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Has a new name in a folder reach the disk. Windows can't open a folder, and writes names by itself."""
    if WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_from_cache(handle: int) -> None:
    """Tells Linux that nobody reads a synced file soon: a checkpoint would drive out what others keep in the page
    cache."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # of this file system; then the cache keeps it for a while
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def odd_kind(path: str | Path) -> str:
    """What stands at a path in the place of a file: opening a pipe would wait for ever. "" for a file, and where there
    is nothing."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link that leads nowhere ({os.readlink(path)})"
    if os.path.isdir(path):
        return "a folder"
    if os.path.exists(path) and not os.path.isfile(path):
        return "a pipe or a device"
    return ""


@contextlib.contextmanager
def naming(path: Path):
    """Gives an OSError that names no file, as of a full disk, this one's name."""
    try:
        yield
    except OSError as e:
        if e.errno and e.filename is None:
            e.filename = str(path)
        raise


def part_beside(path: Path) -> Path:
    """Where a process makes what will stand at `path`: no two of them in the same place, since two runs may fetch or
    tokenize the same text at once. What processes of this machine that are dead left of it is removed."""
    name = f"{path.name}.{platform.node()}"  # in a network drive's folder, another machine has the same numbers
    for part in path.parent.glob(f"{glob.escape(name)}.*.part"):
        number = part.name[len(name) + 1 : -len(".part")]
        if number.isdigit() and not is_running(int(number)):
            remove(part)
    return path.with_name(f"{name}.{os.getpid()}.part")


def is_running(number: int) -> bool:
    """Is there a process of this number? On Windows that can't be asked, but a file that is open can't be removed."""
    if WINDOWS:
        return False
    try:
        os.kill(number, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, as far as it can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None, cached: bool = True):
    """A binary file that takes the place of `path` when it is whole and on the disk, and never before. The file that
    stood there is kept as `previous`. Without `cached`, its bytes don't stay in the page cache."""
    part = part_beside(path)
    try:
        with naming(path), open(part, "wb") as f:  # not NamedTemporaryFile: its mode 0600 would outlive the rename
            yield f
            f.flush()
            sync_file(f.fileno())
            if not cached:
                drop_from_cache(f.fileno())
        if previous and path.exists():
            keep_as(path, previous)
        replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def keep_as(path: Path, previous: Path) -> None:
    """Gives a file a second name, under which it stays when another takes its place: no moment is without a `path`."""
    part = previous.with_name(f"{previous.name}.part")
    try:
        part.unlink(missing_ok=True)
        os.link(path, part)
        replace(part, previous)
        part.unlink(missing_ok=True)  # a rename between two names of one file does nothing
    except OSError:  # a file system without links: for a moment there is only `previous`, which resuming finds too
        replace(path, previous)


def replace(source: Path, target: Path) -> None:
    """os.replace. On Windows it fails while another program, such as a virus scanner, has the target open."""
    pauses = (0.1, 0.3, 1.0, 3.0) if WINDOWS else ()
    for seconds in pauses:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def lock_file(file) -> None:
    """Takes the lock on an open file, which ends with this process however that ends. Raises OSError if it is taken.

    Not flock: a forked helper, such as torch.compile's, would hold it on when this process is dead."""
    if WINDOWS:
        import msvcrt

        file.seek(1 << 30)  # far behind the text, which others may then read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def append_whole(path: Path, data: bytes) -> None:
    """Appends all of the bytes, or none of them. Raises OSError."""
    with open(path, "ab", buffering=0) as f:
        end = os.fstat(f.fileno()).st_size
        if f.write(data) < len(data):
            f.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rewrite_with(path: Path, data: bytes) -> None:
    """Appends by writing the whole file anew: for what is long enough to be torn by a kill. Raises OSError."""
    before = path.read_bytes() if path.exists() else b""
    with atomic_write(path) as f:
        f.write(before + data)


@contextlib.contextmanager
def whole_folder(folder: Path):
    """A folder beside `folder` to write files into, which move there when all are written. A fault leaves nothing of
    them; a kill leaves a folder that ends in .part, which the next try removes."""
    folder = folder.resolve()
    part = part_beside(folder.with_name(f".{folder.name}"))
    remove(part)
    try:
        part.mkdir(parents=True)
    except OSError as e:
        e.filename = str(folder)  # what was asked for, and not what nobody has heard of
        raise
    try:
        with naming(folder):
            yield part
            move_files(part, folder)
    finally:
        remove(part)


def move_files(source: Path, target: Path) -> None:
    """In one step where there is no target yet. Else file by file, and what the target holds beside them stays."""
    if not target.exists():
        source.rename(target)
        return
    check_places(source, target)
    if source.stat().st_dev == target.stat().st_dev:
        for_each_file(source, target, replace)
    else:  # a disk of its own, which may be full: all of them are brought there first, since a rename tears no file
        inside = part_beside(target / f".{target.name}")
        try:
            for_each_file(source, inside, copy)
            for_each_file(inside, target, replace)
        finally:
            remove(inside)


def for_each_file(source: Path, target: Path, do: Callable[[Path, Path], None]) -> None:
    """Calls `do` with each file of a folder and its place in the other one."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            do(path, place)


def check_places(source: Path, target: Path) -> None:
    """Raises OSError where a file would meet a folder, or a folder a file: before any has been moved."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if place.exists() and place.is_dir() != path.is_dir():
            number = errno.EISDIR if place.is_dir() else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(place))


def copy(source: Path, target: Path) -> None:
    """Unlike shutil.copy, it doesn't say of a full disk that it was the source's."""
    with open(source, "rb") as there, open(target, "wb") as here:
        shutil.copyfileobj(there, here)
    shutil.copymode(source, target)


class PatientFile:
    """A text file that only grows. What the disk has no room for is kept in memory, and written with the next text."""

    def __init__(self, path: Path, warn: Callable[[str], None], write: Callable[[Path, bytes], None] = append_whole):
        self.path = path
        self.warn = warn
        self.write = write
        self.unwritten = ""

    def append(self, text: str) -> None:
        complained = bool(self.unwritten)
        self.unwritten += text
        try:
            self.catch_up()
        except OSError as e:
            if not complained:
                self.warn(f"{self.path} can't be written ({e.strerror}): what is missing is kept in memory")

    def catch_up(self) -> None:
        """Writes what couldn't be written before. Raises OSError if it still can't."""
        if not self.unwritten:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.write(self.path, self.unwritten.encode("utf-8", "replace"))
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(self.path)) from None
        self.unwritten = ""

    def sync(self) -> None:
        """Has it reach the disk."""
        if self.path.exists():
            with open(self.path, "rb+") as f:
                sync_file(f.fileno())

    def starts_empty(self) -> bool:
        """Is there nothing before the next text?"""
        return not self.unwritten and not self.path.exists()
