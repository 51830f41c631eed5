"""Ctrl-C, and a memory that is too small, while a program is still being imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

# Stands in the place of a large package: Ctrl-C comes while that is imported.
CTRL_C = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
raise ImportError("as libraries do when one of their modules can't be imported")
"""


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("train.py", "torch"),
        ("sample.py", "torch"),
        ("export_hf.py", "huggingface_hub"),
        ("app.py", "gradio"),
        ("update_readme.py", "tqdm"),
    ],
)
def test_ctrl_c_while_a_program_is_imported_is_one_line(program, package, tmp_path):
    (tmp_path / f"{package}.py").write_text(CTRL_C)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / program), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr == f"{program}: interrupted\n"
    assert done.returncode == 130


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "ImportError('libtorch_cpu.so: failed to map segment from shared object')",
            "too small to begin (ImportError: lib",
        ),
        ("MemoryError()", "too small to begin (MemoryError)"),
        ("RuntimeError('std::bad_alloc')", "too small to begin (RuntimeError: std::bad_alloc)"),
    ],
)
def test_a_memory_in_which_torch_cannot_be_imported_is_one_line(fault, said, tmp_path):
    (tmp_path / "torch.py").write_text(f"raise {fault}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "sample.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == 1


def test_any_other_fault_of_an_import_keeps_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / "sample.py")], env=environment, capture_output=True, text=True)
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("ImportError: broken\n")


def test_where_another_program_imports_ours_ctrl_c_is_its_own_affair():
    code = "import os, signal\nfrom support import cli\nprint(signal.getsignal(2) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n"


def test_a_background_job_goes_on_ignoring_ctrl_c(tmp_path):
    (tmp_path / "tqdm.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\ntqdm = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = f'trap "" INT; exec "{sys.executable}" "{ROOT / "update_readme.py"}" --help'
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
