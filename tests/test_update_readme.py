"""update_readme.py: the golden runs, how files are planned and written, and the command line."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from markdown_it import MarkdownIt
from run_kit import GOLDEN, assert_sound_markdown, block, in_tmp_path, run_dir_fixture, update, write_readme  # noqa: F401  (fixtures)

import update_readme


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["own", "foreign"])
def test_golden(name, bom, newline, tmp_path):
    """A run of this program, and one of another project: three columns, Windows paths, a log and a CSV that are still
    being written. With CRLF in all files too, and with a byte order mark."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "out" / name)
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.write_bytes(bom.encode() + path.read_bytes().replace(b"\n", newline.encode()))
    readme = tmp_path / "README.md"
    shutil.move(folder / "before.md", readme)
    for _ in range(2):
        assert update_readme.main(["--run_dir", f"out/{name}"]) == 0
        assert readme.read_bytes().decode() == (folder / "after.md").read_bytes().decode()
        assert update_readme.main(["--run_dir", f"out/{name}", "--check"]) == 0
    assert_sound_markdown(readme.read_text())


def test_bytes_outside_the_blocks_are_kept(run_dir, tmp_path):
    readme = tmp_path / "README.md"
    before = b"\xef\xbb\xbfcaf\xe9 \r\n\n  tail  \r<!--AUTO:SUMMARY:START-->  \r\n"
    after = b"  <!--AUTO:SUMMARY:END-->\n\n\n\x00\xff\tno newline at the end"
    readme.write_bytes(before + b"old" + b"\r\n" + after)
    assert update() == 0
    data = readme.read_bytes()
    assert data.startswith(before) and data.endswith(after)
    inside = data[len(before) : -len(after)]
    assert inside.count(b"\n") == inside.count(b"\r\n") > 5 and b"Best loss" in inside


def test_check_and_diff_write_nothing(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    before = readme.read_bytes()
    assert update("--check") == 5
    assert "README.md: is stale: python update_readme.py --run_dir out/own" in capsys.readouterr().out
    assert update("--diff") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("assets/curve.svg: would be drawn anew\n--- README.md\n+++ README.md (updated)\n@@")
    assert "-old\n" in shown and "+- Best loss: **0.089094**" in shown
    assert update("--check", "--diff") == 5
    assert readme.read_bytes() == before and not (tmp_path / "assets").exists()
    assert update() == 0
    assert update("--check") == 0
    (tmp_path / "assets" / "curve.svg").write_text("another picture")
    assert update("--check") == 5


def test_a_current_file_is_not_written_again(run_dir, tmp_path, monkeypatch):
    write_readme(tmp_path, "SUMMARY", "CURVE")
    assert update() == 0
    monkeypatch.setattr(update_readme.Change, "stage", lambda change: pytest.fail(f"{change.path} written"))
    assert update() == 0


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
def test_mode_and_link_are_kept(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    (tmp_path / "docs").mkdir()
    target = readme.rename(tmp_path / "docs" / "real.md")
    target.chmod(0o640)
    readme.symlink_to(target)
    assert update() == 0
    assert readme.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert "Best loss" in target.read_text()


@pytest.mark.skipif(os.name != "posix", reason="links of POSIX")
def test_behind_a_link_pictures_lie_beside_the_text(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    (tmp_path / "docs").mkdir()
    target = readme.rename(tmp_path / "docs" / "real.md")
    readme.symlink_to(os.path.join("docs", "real.md"))
    assert update() == 0
    assert (tmp_path / "docs" / "assets" / "curve.svg").is_file()
    assert not (tmp_path / "assets").exists()
    assert "](assets/curve.svg)" in target.read_text()
    assert "Run directory: `../out/own`" in target.read_text()
    for path in (readme, target):
        assert update("--check", "--readme", path) == 0


def test_a_file_that_cannot_be_written_is_left_alone(run_dir, tmp_path, monkeypatch, capsys):
    readme = write_readme(tmp_path, "SUMMARY")
    before = readme.read_bytes()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert update() == 1
    words = "README.md can't be written: it is another user's, or the disk is read-only\n"
    assert capsys.readouterr().err == words
    assert readme.read_bytes() == before


def test_where_there_is_no_place_for_a_cache_nothing_is_said_of_it(run_dir, tmp_path):
    """As in a container: matplotlib would fill the terminal with it."""
    write_readme(tmp_path, "CURVE")
    nowhere = {"HOME": os.devnull, "XDG_CONFIG_HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}
    command = [sys.executable, str(ROOT / "update_readme.py"), "--run_dir", "out/own"]
    done = subprocess.run(command, env={**os.environ, **nowhere}, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
@pytest.mark.parametrize("name", ["README.md", "assets/curve.svg"])
def test_a_file_that_is_write_protected_or_has_other_names_is_left_alone(run_dir, tmp_path, capsys, name):
    write_readme(tmp_path, "SUMMARY", "CURVE")
    assert update() == 0
    path = tmp_path / name
    write_readme(tmp_path, "SUMMARY", "CURVE")  # to be filled again
    (tmp_path / "assets" / "curve.svg").write_bytes(b"old")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    path.chmod(0o444)
    assert update() == 1
    assert capsys.readouterr().err == f"{name} is write-protected: chmod u+w {name} permits it\n"
    path.chmod(0o644)
    os.link(path, tmp_path / "other")
    assert update() == 1
    assert f"{name} has other names (hard links), which would keep the old text" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == before
    (tmp_path / "other").unlink()
    assert update() == 0


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX")
def test_what_killed_processes_left_is_removed_and_what_others_write_stays(run_dir, tmp_path):
    write_readme(tmp_path, "SUMMARY", "CURVE")
    killed = "import os, update_readme as u; os.replace = lambda *_: os.kill(os.getpid(), 9); u.main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shutil.copytree(run_dir, tmp_path / "out", dirs_exist_ok=True)
    assert subprocess.run([sys.executable, "-c", killed], env=environment).returncode == -9
    (left,) = tmp_path.glob(".README.md.*.part")
    assert len(list(tmp_path.rglob(".*.part"))) == 2
    running = tmp_path / f".README.md.{os.getppid()}.7.part"
    mine = tmp_path / ".README.md.mine.part"
    for path in (running, mine):
        path.touch()
    assert update("--check") == 5
    assert left.exists()  # nothing is changed
    assert update() == 0
    assert set(tmp_path.rglob(".*.part")) == {running, mine}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_files_and_no_other(call, run_dir, tmp_path, monkeypatch, capsys):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    before = readme.read_bytes()
    (tmp_path / "assets").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert update() == 1
    assert "No space left on device" in capsys.readouterr().err
    assert readme.read_bytes() == before
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "assets" / "curve.svg").exists()


def test_all_files_are_whole_on_the_disk_before_the_first_is_replaced(run_dir, tmp_path, monkeypatch):
    write_readme(tmp_path, "SUMMARY", "CURVE")
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (events.append(name), real(*a)))
    assert update() == 0
    assert events == ["fsync", "fsync", "replace", "replace"]


def test_a_readme_and_its_pictures_elsewhere(run_dir, tmp_path):
    (tmp_path / "my docs").mkdir()
    readme = write_readme(tmp_path / "my docs", "SUMMARY", "CURVE")
    assert update("--readme", readme, "--assets_dir", tmp_path / "pictures (all)") == 0
    assert (tmp_path / "pictures (all)" / "curve.svg").exists()
    (image,) = (c for t in MarkdownIt().parse(readme.read_text()) for c in t.children or [] if c.type == "image")
    assert image.attrs["src"] == "../pictures%20%28all%29/curve.svg"
    assert update("--readme", readme) == 0
    assert (tmp_path / "my docs" / "assets" / "curve.svg").exists()


def test_blocks_that_the_readme_lacks_are_named(run_dir, tmp_path, capsys):
    write_readme(tmp_path, "SUMMARY", "LOGS", "METRICS", "SAMPLES")
    assert update() == 0
    assert (
        "README.md has no block MODEL, CURVE, REPRODUCE, COMPARE, HELDOUT, FLAGS: left alone\n"
        in capsys.readouterr().out
    )
    write_readme(tmp_path / "docs", "SUMMARY", "CURVE", "HELDOUT")
    assert update() == 0
    words = "README.md and docs/README.md have no block MODEL, REPRODUCE, COMPARE, FLAGS: left alone\n"
    assert capsys.readouterr().out.count("left alone") == 1
    assert update() == 0 and words in capsys.readouterr().out


# ---- several files ----


def test_by_default_the_docs_with_blocks_are_written_too(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY")
    results = write_readme(tmp_path / "docs", "CURVE", "METRICS")
    other = tmp_path / "docs" / "other.md"
    other.write_text("No marker: `<!--AUTO:LOGS:START-->` is code.\n")
    (tmp_path / "docs" / "folder.md").mkdir()
    assert update("--check") == 5
    assert capsys.readouterr().out.count("is stale") == 3
    assert update() == 0
    assert "other.md" not in capsys.readouterr().out
    assert "Run directory: `out/own`" in block(readme, "SUMMARY")
    assert block(results, "CURVE").endswith("](../assets/curve.svg)")
    assert (tmp_path / "assets" / "curve.svg").exists() and not (tmp_path / "docs" / "assets").exists()
    assert update("--check") == 0
    results.write_text(results.read_text().replace("9.946480", "1"))
    assert update("--check") == 5


def test_a_readme_without_blocks_is_passed_over_if_the_docs_have_some(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path)
    before = readme.read_bytes()
    assert update() == 1
    assert capsys.readouterr().err.startswith("README.md has no block: put ")
    write_readme(tmp_path / "docs", "CURVE")
    assert update() == 0
    assert readme.read_bytes() == before and (tmp_path / "assets" / "curve.svg").exists()


def test_a_broken_marker_in_a_file_of_docs_is_an_error(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY")
    before = readme.read_bytes()
    write_readme(tmp_path / "docs", text="one\n<!-- AUTO:LOGS:START -->\n")
    assert update() == 1
    assert capsys.readouterr().err.startswith("docs/README.md:2: <!-- AUTO:LOGS:START --> is no marker: ")
    assert readme.read_bytes() == before


def test_files_that_are_named_are_written_together(run_dir, tmp_path, capsys):
    """Pictures stand beside the first; one block may stand in several files; a file named twice is one."""
    first = write_readme(tmp_path / "one", "CURVE")
    second = write_readme(tmp_path / "two" / "deep", "CURVE", "LOGS")
    unnamed = write_readme(tmp_path, "SUMMARY")
    before = unnamed.read_bytes()
    files = ["--readme", first, second, first, tmp_path / "two" / ".." / "one" / "README.md"]
    assert update(*files) == 0
    assert capsys.readouterr().out.count("written") == 3
    assert block(first, "CURVE").endswith("](assets/curve.svg)")
    assert block(second, "CURVE").endswith("](../../one/assets/curve.svg)")
    assert unnamed.read_bytes() == before
    assert update(*files, "--check") == 0
    assert update("--readme", first, "nothing.md") == 2
    third = write_readme(tmp_path / "three")
    assert update("--readme", first, third) == 1
    assert f"{third} has no block: put" in capsys.readouterr().err


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_of_several_files_all_are_written_or_none(replaced, run_dir, tmp_path, monkeypatch):
    """Even if the disk fails between two of them."""
    write_readme(tmp_path, "SUMMARY", "CURVE")
    write_readme(tmp_path / "docs", "METRICS")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.md")}
    real = os.replace
    calls = []

    def fails_later(*names):
        calls.append(names)
        if len(calls) > replaced:
            raise OSError(5, "Input/output error")
        real(*names)

    monkeypatch.setattr(os, "replace", fails_later)
    assert update() == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.md")} == before
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.svg"))


# ---- a README of one's own ----


def test_init_writes_a_readme_with_every_block_which_a_run_then_fills(run_dir, tmp_path, capsys):
    assert update("--init", "mine.md") == 0
    command = re.search("To fill it: python update_readme.py (.*)", capsys.readouterr().out)[1]
    template = (tmp_path / "mine.md").read_text(encoding="utf-8")
    assert f"python update_readme.py {command}\n" in template
    assert sorted(re.findall("<!--AUTO:([A-Z]+):START-->", template)) == sorted(update_readme.NAMES)
    assert not (tmp_path / "assets").exists()
    assert update_readme.main(shlex.split(command)) == 0
    assert "left alone" not in capsys.readouterr().out
    filled = (tmp_path / "mine.md").read_text(encoding="utf-8")
    assert "- Best loss: **0.089094**" in filled and "](assets/curve.svg)" in filled
    assert_sound_markdown(filled)
    assert update_readme.main([*shlex.split(command), "--check"]) == 0


def test_what_the_template_says_outside_its_blocks_stays_when_it_is_filled(run_dir, tmp_path):
    assert update("--init", "mine.md") == 0
    before = (tmp_path / "mine.md").read_text(encoding="utf-8")
    assert update("--readme", "mine.md") == 0
    after = (tmp_path / "mine.md").read_text(encoding="utf-8")
    empty = re.sub(r"(<!--AUTO:[A-Z]+:START-->\n).*?(?=<!--AUTO:[A-Z]+:END-->)", r"\1", after, flags=re.S)
    assert empty == before


def test_init_replaces_no_file(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "SUMMARY")
    before = readme.read_bytes()
    assert update("--init", readme) == 2
    assert f"{readme} is there already: name a new file with --init" in capsys.readouterr().err
    assert readme.read_bytes() == before


@pytest.mark.parametrize("also", [["--check"], ["--diff"], ["--readme", "mine.md"]])
def test_init_does_one_thing_at_a_time(run_dir, tmp_path, capsys, also):
    assert update("--init", "mine.md", *also) == 2
    assert "--init only writes a new file: leave out " in capsys.readouterr().err
    assert not (tmp_path / "mine.md").exists()


def test_plot_is_another_name_of_curve(run_dir, tmp_path, capsys):
    readme = write_readme(tmp_path, "PLOT", "SUMMARY")
    assert update() == 0
    assert "](assets/curve.svg)" in block(readme, "PLOT")
    assert "no block MODEL, METRICS," in capsys.readouterr().out
    readme = write_readme(tmp_path, "PLOT", "CURVE")
    assert update() == 0
    assert block(readme, "PLOT") == block(readme, "CURVE") != "old"
    assert update("--check") == 0
    assert capsys.readouterr().out.count("assets/curve.svg: already up to date") == 2


def test_usage_errors(run_dir, tmp_path, capsys):
    assert update("--readme", "nothing.md") == 2
    assert capsys.readouterr().err == "update_readme.py: nothing.md isn't a file: name one with --readme\n"
    with pytest.raises(SystemExit) as e:
        update("--che")
    assert e.value.code == 2


def test_a_full_memory_is_one_line(run_dir, tmp_path, monkeypatch, capsys):
    write_readme(tmp_path, "SUMMARY")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(update_readme, "read_run", full)
    assert update() == 1
    assert capsys.readouterr().err == "update_readme.py: the memory is full: stop other programs\n"


def test_ctrl_c_is_one_line_and_changes_nothing(run_dir, tmp_path, monkeypatch, capsys):
    readme = write_readme(tmp_path, "SUMMARY", "CURVE")
    before = readme.read_bytes()
    real = os.replace

    def interrupted(source, target):
        if target == readme:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert update() == 130
    assert capsys.readouterr().err == "update_readme.py: interrupted\n"
    assert readme.read_bytes() == before
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.svg"))


def test_it_imports_neither_torch_nor_train_py(run_dir, tmp_path):
    write_readme(tmp_path, *update_readme.NAMES)
    code = "import sys, update_readme as u; u.main(['--run_dir', 'out/own']); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "report.pictures" in loaded
    shared = [name for name in loaded if name.split(".")[0] in ("torch", "train", "support")]
    assert shared == ["support", "support.importing"]  # which is about starting a program, and of no run


def test_the_readme_of_this_project_is_current(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert update_readme.main(["--run_dir", "records/shakespeare", "--check"]) == 0


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_the_readme_of_this_project_is_sound_markdown(path):
    assert assert_sound_markdown(path.read_text(encoding="utf-8"))


def test_the_same_command_from_elsewhere_gives_the_same_bytes(run_dir, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    readme = write_readme(tmp_path / "docs", "SUMMARY", "CURVE")
    assert update("--readme", "docs/README.md") == 0
    assert "Run directory: `../out/own`" in readme.read_text()
    monkeypatch.chdir(tmp_path / "docs")
    assert update_readme.main(["--run_dir", "../out/own", "--check"]) == 0
    assert update_readme.main(["--run_dir", str(run_dir), "--readme", str(readme), "--check"]) == 0


def test_the_remedy_of_check_is_the_whole_command(run_dir, tmp_path, capsys):
    (tmp_path / "my docs").mkdir()
    write_readme(tmp_path / "my docs", "SUMMARY")
    assert update("--readme", "my docs/README.md", "--assets_dir", "a b", "--check") == 5
    command = re.search("is stale: python update_readme.py (.*) brings it up to date", capsys.readouterr().out)[1]
    assert update_readme.main(shlex.split(command)) == 0
    assert update("--readme", "my docs/README.md", "--assets_dir", "a b", "--check") == 0
    write_readme(tmp_path / "docs", "LOGS")
    assert update("--readme", "my docs/README.md", "docs/README.md", "--check") == 5
    command = re.search("is stale: python update_readme.py (.*) brings it up to date", capsys.readouterr().out)[1]
    assert update_readme.main(shlex.split(command)) == 0
    assert update("--readme", "my docs/README.md", "docs/README.md", "--check") == 0


def test_a_diff_is_a_patch(run_dir, tmp_path, capfdbinary):
    if not shutil.which("patch"):
        pytest.skip("there is no patch program")
    readme = write_readme(tmp_path, "SUMMARY", "LOGS", text="# T\r\n\n{}no end")
    assert update("--diff") == 0
    (tmp_path / "x.patch").write_bytes(capfdbinary.readouterr().out)
    copy = tmp_path / "copy.md"
    shutil.copy(readme, copy)
    subprocess.run(["patch", "--binary", "-s", str(copy), "x.patch"], check=True)
    assert update() == 0
    assert copy.read_bytes() == readme.read_bytes()


def test_a_terminal_that_lacks_characters_or_is_closed(run_dir, tmp_path):
    write_readme(tmp_path, "SUMMARY", text="caf\u00e9 \U0001f600\n{}")
    script = str(ROOT / "update_readme.py")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, script, "--run_dir", "out/own", "--diff"]
    shown = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert b"caf\\xe9" in shown.stdout and b"Traceback" not in shown.stderr
    if os.name == "posix":
        for end in (">&-", ">/dev/full", "2>&-"):
            done = subprocess.run(f"{shlex.join(command[:-1])} {end}", shell=True, capture_output=True)
            assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("name", ["a" * 300, "nothing.md", "out"])
def test_readmes_that_cannot_be(name, run_dir, tmp_path, capsys):
    assert update("--readme", name) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("update_readme.py: ") and err.count("\n") == 1


def test_a_loop_of_links_is_one_sentence(run_dir, tmp_path, capsys):
    write_readme(tmp_path, "CURVE")
    os.symlink("assets", tmp_path / "assets")
    assert update() == 1
    assert capsys.readouterr().err.count("\n") == 1
