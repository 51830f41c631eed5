"""--dry_run says what a run would take, and leaves nothing behind."""

from __future__ import annotations

import train


def test_a_dry_run_says_what_a_run_would_take_and_leaves_nothing(tmp_path, monkeypatch, quick, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert train.train(quick(dry_run=True, steps=40))["exit_code"] == 0
    told = capsys.readouterr().out
    for word in ("Parameters: ", "Memory: at least", "Disk: ", "Length: 40 steps", "Learning rate: ", "Speed: "):
        assert word in told
    assert not list(tmp_path.iterdir())
