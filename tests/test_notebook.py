"""The notebook: what is committed of it, and that it runs from top to bottom."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "train_gpt2.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SHORT = "--n_layer 1 --n_head 2 --n_embd 32 --steps 12 --max_new_tokens 5 --recall_places 2 --no_mfu --target_loss 0"


def test_no_output_is_committed():
    assert CODE
    for cell in CODE:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_torch_is_never_installed():
    text = "".join("".join(cell["source"]) for cell in CODE)
    assert 'not package.startswith("torch")' in text
    assert "-r requirements" not in text  # which would bring another torch than the platform's


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_again_after_a_disconnect(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    program = tmp_path / "program"
    ignored = shutil.ignore_patterns(".git", "out*", ".venv", "records", "tests", "__pycache__", ".gpu", ".whl")
    shutil.copytree(ROOT, program, ignore=ignored)
    monkeypatch.setenv("MORE_FLAGS", SHORT)
    shown = []
    for _ in range(2):
        notebook = nbformat.read(program / "notebooks" / "train_gpt2.ipynb", as_version=4)
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(program / "notebooks")}})
        client.execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
        shown.append("".join(output.get("text", "") for output in outputs))
    assert "Ended: steps done at step 12" in shown[0]
    assert "Nothing to do: this run has ended" in shown[1]
    assert (program / "out_notebook" / "hf" / "model.safetensors").exists()
