"""Files that survive a crash: replaced whole or not at all, on each operating system and on a full disk."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from checkpoint_kit import needs_root, no_space, small_disk, start_process
from conftest import rows_of, tiny_flags

import train
from support import files
from support.cli import STOP_SIGNALS, UsageError
from support.files import PatientFile, append_whole, atomic_write, rewrite_with
from support.rundir import RunDirectory

# ---- whole or not at all ----


def write(path, data: bytes, **options) -> None:
    with atomic_write(path, **options) as f:
        f.write(data)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as f:
        f.write(b"half of the n")
        raise RuntimeError("power cut")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    with atomic_write(path) as f:
        f.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_fault_that_names_no_file_gets_its_name(tmp_path):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "file"):
        no_space()
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError) as caught, files.whole_folder(tmp_path / "folder"):
        no_space()
    assert caught.value.filename == str(tmp_path / "folder")


def test_two_processes_that_write_the_same_file_at_once_dont_meet(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as f:
        f.write(b"first")
        other = start_process(write, path, b"second")
        other.join()
        assert other.exitcode == 0
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
@pytest.mark.parametrize("way", [atomic_write, files.whole_folder])
def test_what_a_killed_process_left_is_removed_by_the_next_and_what_others_write_stays(tmp_path, way):
    path = tmp_path / "name"
    process = start_process(write_until_killed, way, path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(f".{process.pid}.part")
    others = [
        left.name.replace(str(process.pid), str(os.getppid())),  # which runs
        left.name.replace("name", "name.txt"),
        left.name.replace("name", "name.of-another-machine"),
    ]
    for name in others:
        (tmp_path / name).touch()
    with way(path):
        assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == sorted(["name", *others])


def write_until_killed(kind, path) -> None:
    with kind(path):
        os.kill(os.getpid(), signal.SIGKILL)


def write_folder(folder) -> None:
    with files.whole_folder(folder) as part:
        (part / "more").mkdir()
        (part / "more" / "card").write_bytes(b"new")
        (part / "model").write_bytes(bytes(60_000))


def test_where_a_folder_stands_in_a_files_place_no_file_is_moved(tmp_path):
    folder = tmp_path / "folder"
    (folder / "model").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        write_folder(folder)
    assert caught.value.filename == str(folder / "model")
    assert not (folder / "more" / "card").exists()
    assert os.listdir(tmp_path) == ["folder"]


def test_where_a_file_stands_in_a_folders_place_no_file_is_moved(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "more").write_bytes(b"mine")
    (folder / "model").write_bytes(b"old")
    with pytest.raises(NotADirectoryError) as caught:
        write_folder(folder)
    assert caught.value.filename == str(folder / "more")
    assert (folder / "model").read_bytes() == b"old"
    assert (folder / "more").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["folder"]


@needs_root
def test_a_folder_that_is_a_disk_of_its_own_gets_all_of_the_files_or_none(tmp_path):
    folder = tmp_path / "disk"
    with small_disk(folder, "40k"):
        (folder / "model").write_bytes(b"old")
        with pytest.raises(OSError) as caught:
            write_folder(folder)
        assert (folder / "model").read_bytes() == b"old"
        assert os.listdir(folder) == ["model"]
        assert caught.value.filename == str(folder)
        subprocess.run(["mount", "-o", "remount,size=200k", str(folder)], check=True)
        write_folder(folder)
        assert (folder / "model").stat().st_size == 60_000
        assert (folder / "more" / "card").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["disk"]


def test_a_written_file_has_the_usual_mode(tmp_path):
    write(tmp_path / "atomic", b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_file_before_is_kept_under_another_name(tmp_path):
    for data in (b"1", b"2", b"3"):
        write(tmp_path / "file", data, previous=tmp_path / "previous")
    assert (tmp_path / "file").read_bytes() == b"3"
    assert (tmp_path / "previous").read_bytes() == b"2"
    assert sorted(os.listdir(tmp_path)) == ["file", "previous"]


def test_a_file_system_without_links_keeps_the_file_before_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_the_file_before_is_kept_under_another_name(tmp_path)


needs_advice = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="posix_fadvise is of Linux")


@needs_advice
def test_only_a_file_that_nobody_reads_soon_is_dropped_from_the_cache(tmp_path, monkeypatch):
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *_: dropped.append(os.fstat(handle).st_ino))
    write(tmp_path / "rows", b"read soon")
    write(tmp_path / "checkpoint", b"not read soon", cached=False)
    assert dropped == [(tmp_path / "checkpoint").stat().st_ino]


@needs_advice
def test_a_file_system_that_knows_no_advice_is_no_hindrance(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "posix_fadvise", unknown)
    write(tmp_path / "file", b"data", cached=False)
    assert (tmp_path / "file").read_bytes() == b"data"


def test_a_system_that_has_no_advice_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    write(tmp_path / "file", b"data", cached=False)
    assert (tmp_path / "file").read_bytes() == b"data"


# ---- files that only grow ----


def test_an_append_that_finds_no_room_leaves_nothing_behind(tmp_path, monkeypatch):
    class HalfFull(io.FileIO):
        """Takes half of what it is given."""

        def write(self, data):
            return super().write(data[: len(data) // 2])

    append_whole(tmp_path / "rows", b"1\n")
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda path, mode, buffering: HalfFull(path, "a"), raising=False)
        with pytest.raises(OSError, match="No space left on device"):
            append_whole(tmp_path / "rows", b"22\n")
    assert (tmp_path / "rows").read_bytes() == b"1\n"
    append_whole(tmp_path / "rows", b"22\n")
    assert (tmp_path / "rows").read_bytes() == b"1\n22\n"


def test_what_the_disk_has_no_room_for_is_written_with_the_next_text(tmp_path):
    said = []
    file = PatientFile(tmp_path / "rows", said.append)
    file.append("1\n")
    file.write = no_space
    file.append("2\n")
    file.append("3\n")
    assert len(said) == 1  # once, and not for each row
    assert "can't be written (No space left on device): what is missing is kept in memory" in said[0]
    assert (tmp_path / "rows").read_text() == "1\n"
    with pytest.raises(OSError, match="No space left on device"):
        file.catch_up()
    file.write = append_whole
    file.append("4\n")
    assert (tmp_path / "rows").read_text() == "1\n2\n3\n4\n"


def test_a_sample_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    said = []
    file = PatientFile(tmp_path / "samples.txt", said.append, rewrite_with)
    file.append("first\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        file.append("second\n")
    assert len(said) == 1
    assert (tmp_path / "samples.txt").read_text() == "first\n"
    assert os.listdir(tmp_path) == ["samples.txt"]
    file.catch_up()
    assert (tmp_path / "samples.txt").read_text() == "first\nsecond\n"


# ---- operating systems ----


def test_macos_empties_the_drive_s_own_cache(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    calls = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, call: calls.append(call))
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    write(tmp_path / "file", b"")
    assert calls == [51, "fsync"]  # the file, then its folder


def test_a_drive_of_macos_that_knows_no_such_call_gets_a_plain_fsync(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    calls = []

    def unknown(handle, call):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", unknown)
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync"))
    files.sync_file(0)
    assert calls == ["fsync"]


def test_windows_opens_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    files.sync_folder(tmp_path)


class HeldByAnother:
    """In the place of os.replace: fails twice, as while another program has the target open."""

    def __init__(self):
        self.attempts = 0
        self.real = os.replace

    def __call__(self, source, target):
        self.attempts += 1
        if self.attempts < 3:
            raise PermissionError(errno.EACCES, "Access is denied")
        self.real(source, target)


def test_windows_waits_for_a_file_that_another_program_has_open(tmp_path, monkeypatch):
    slept = []
    (tmp_path / "a").write_text("new")
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "replace", HeldByAnother())
    monkeypatch.setattr(time, "sleep", slept.append)
    files.replace(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"
    assert len(slept) == 2


def test_elsewhere_a_permission_error_means_what_it_says(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("new")
    monkeypatch.setattr(files, "WINDOWS", False)
    monkeypatch.setattr(os, "replace", HeldByAnother())
    with pytest.raises(PermissionError):
        files.replace(tmp_path / "a", tmp_path / "b")


def test_windows_locks_by_its_own_call(tmp_path, monkeypatch):
    calls = []

    def locking(handle, mode, size):
        calls.append((os.lseek(handle, 0, os.SEEK_CUR), mode, size))

    def taken(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    msvcrt = types.SimpleNamespace(LK_NBLCK=3, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(files, "WINDOWS", True)
    with RunDirectory(tmp_path).lock():
        assert (tmp_path / "lock").read_text() == str(os.getpid())  # the text is not what is locked
    assert calls == [(1 << 30, 3, 1)]
    msvcrt.locking = taken
    with pytest.raises(UsageError, match="is in use by another run"), RunDirectory(tmp_path).lock():
        pass


def test_stop_signals_are_those_that_the_system_has():
    assert {signal.SIGINT, signal.SIGTERM} <= set(STOP_SIGNALS)
    assert len(STOP_SIGNALS) == (3 if hasattr(signal, "SIGBREAK") else 2)


def test_a_spawned_process_can_train(tmp_path):
    """As macOS and Windows start processes: the modules are imported anew there, with no side effects."""
    flags = tiny_flags(tmp_path / "out", tokenizer="char", num_prompts=0)
    process = multiprocessing.get_context("spawn").Process(target=train.main, args=(flags,))
    process.start()
    process.join()
    assert len(rows_of(tmp_path / "out")) == 6
