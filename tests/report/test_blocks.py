"""report/blocks.py: what the blocks say of a run, and that no content breaks out of them."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_kit import (  # noqa: F401  (fixtures)
    GOLDEN,
    RULE,
    assert_sound_markdown,
    block,
    in_tmp_path,
    put_record,
    run_dir_fixture,
    update,
    write_csv,
    write_readme,
)

import update_readme
from report import blocks


def test_a_run_that_was_only_opened(run_dir, tmp_path):
    readme = write_readme(tmp_path, *update_readme.NAMES)
    (run_dir / "logs" / "train_metrics.csv").unlink()
    (run_dir / "samples" / "samples.txt").write_text("")
    log = run_dir / "logs" / "train.log"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    record = json.loads((run_dir / "run.json").read_text())
    nothing = {"ended": None, "end": None, "final_loss": None, "tokens_to_target": None, "steps": 0, "tokens": 0}
    (run_dir / "run.json").write_text(json.dumps(record | nothing))
    assert update() == 0
    summary = block(readme, "SUMMARY")
    assert "Ended: not yet: still running, or stopped without a word" in summary
    assert "final_loss: none, the target of 0.1 was not reached" in summary and "no step has been logged yet" in summary
    assert block(readme, "METRICS") == "No step has been logged yet."
    assert block(readme, "SAMPLES") == "No sample has been written yet."
    assert block(readme, "CURVE") == "There is no curve yet, since no step has been logged."
    assert "Tokens per step: 256\n```" in block(readme, "LOGS")
    assert not (tmp_path / "assets").exists()


def test_the_log_is_thinned_and_says_how_much(run_dir, tmp_path):
    """Its opening, evenly spaced steps, and how it ended."""
    readme = write_readme(tmp_path, "LOGS")
    log = (run_dir / "logs" / "train.log").read_text().splitlines()
    extra = [f"2026-01-02 10:00:00,005 | INFO | opening {i}" for i in range(9)]
    closing = [f"2026-01-02 10:01:00,000 | INFO | closing {i}" for i in range(9)]
    (run_dir / "logs" / "train.log").write_text("\n".join([*log[:4], *extra, *log[4:], *closing, ""]))
    assert update() == 0
    lines = block(readme, "LOGS").splitlines()
    shown = lines[1:-3]
    assert shown[:5] == log[:5]
    steps = [line.split("step ")[1].split("/")[0] for line in shown if "step " in line and "loss" in line]
    assert steps == ["1", "16", "30", "44", "59"]
    assert shown[-3:] == [*log[-2:], closing[-1]]
    assert len(shown) == blocks.LOG_LINES
    assert lines[-1] == f"12 of {len(log) + 18} lines of the log."


def test_a_last_line_of_a_traceback_is_shown(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    with open(run_dir / "logs" / "train.log", "a") as f:
        f.write("Traceback (most recent call last):\nRuntimeError: CUDA out of memory")
    assert update() == 0
    assert "RuntimeError: CUDA out of memory\n```" in block(readme, "LOGS")


def test_a_long_log_without_steps_shows_both_ends(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    lines = [f"2026-01-02 10:00:00,001 | INFO | line {i}" for i in range(60)]
    (run_dir / "logs" / "train.log").write_text("\n".join(lines) + "\n")
    assert update() == 0
    shown = block(readme, "LOGS").splitlines()
    assert shown[1:-3] == lines[:6] + lines[-6:]
    assert shown[-1] == "12 of 60 lines of the log."


def test_a_long_log_line_is_cut_and_says_so(run_dir, tmp_path):
    readme = write_readme(tmp_path, "LOGS")
    (run_dir / "logs" / "train.log").write_text(f"2026-01-02 10:00:00,001 | INFO | {'x' * 1_000_000}\n")
    assert update() == 0
    line = block(readme, "LOGS").splitlines()[1]
    assert line == f"2026-01-02 10:00:00,001 | INFO | {'x' * 267} [... 999,733 more characters ...]"


def test_the_latest_sample_with_output_is_shown_whole(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SAMPLES")
    with open(run_dir / "samples" / "samples.txt", "a") as f:
        f.write(f"{RULE}\nSTEP 60\n\nPROMPT:\nTILDA:\nOUTPUT:\n")  # still being written
    assert update() == 0
    expected = (GOLDEN / "own" / "samples" / "samples.txt").read_text().split("STEP 59\n")[1].strip("\n")
    assert block(readme, "SAMPLES") == f"What the model wrote at step 59:\n\n```text\n{expected}\n```"


def test_a_very_long_sample_is_cut_at_a_border_and_says_so(run_dir, tmp_path):
    readme, path = write_readme(tmp_path, "SAMPLES"), run_dir / "samples" / "samples.txt"
    verse = [f"line {i}" for i in range(150)]
    parts = ["PROMPT:\nA\nOUTPUT:", *verse, "", "PROMPT:\nB\nOUTPUT:", *verse]
    path.write_text("\n".join([RULE, "STEP 9", "", *parts, ""]))
    assert update() == 0
    shown = block(readme, "SAMPLES")
    assert "PROMPT:\nB" not in shown and shown.count("\nline 149\n") == 1 and "153 more lines are left out" in shown
    path.write_text("\n".join([RULE, "STEP 9", "", "PROMPT:\nA\nOUTPUT:", *verse, *verse, ""]))
    assert update() == 0
    assert "\nline 46\n```\n\n103 more lines are left out." in block(readme, "SAMPLES")


def test_samples_of_another_form_are_taken_whole(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SAMPLES")
    (run_dir / "samples" / "samples.txt").write_text("just\ntext\n")
    assert update() == 0
    assert block(readme, "SAMPLES") == "The latest sample:\n\n```text\njust\ntext\n```"


def test_the_first_of_equal_losses_is_the_best_and_always_in_the_table(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY", "METRICS")
    rows = "".join(f"{i},{1 if i in (38, 42) else 5}\n" for i in range(1, 101))
    write_csv(run_dir, f"step,loss\n{rows}")
    assert update() == 0
    assert "Best loss: **1.000000** at step **38**" in block(readme, "SUMMARY")
    assert block(readme, "METRICS").count("| **1.000000** |") == 1 and "| 38 | **1.000000** |" in block(
        readme, "METRICS"
    )
    assert "7 of 100 logged rows" in block(readme, "METRICS")


@pytest.mark.parametrize(("final", "verdict"), [(0.0999, "under the target"), (0.1, "not under the target")])
def test_the_target_is_strict(final, verdict, run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "final_loss": final, "seconds_to_target": 119.6}))
    assert update() == 0
    assert f"**{final:.6f}**, {verdict} of 0.1" in block(readme, "SUMMARY")
    assert "**15,104 tokens** in **2 min 00 s**" in block(readme, "SUMMARY")


def test_a_run_that_ended_without_the_target(run_dir, tmp_path):
    readme = write_readme(tmp_path, "SUMMARY")
    record = json.loads((run_dir / "run.json").read_text())
    nothing = {"ended": "steps done", "final_loss": None, "tokens_to_target": None}
    (run_dir / "run.json").write_text(json.dumps({**record, **nothing}))
    assert update() == 0
    assert "Trained: 15,104 tokens in 1 h 02 min" in block(readme, "SUMMARY")


@pytest.mark.parametrize("config", [{"recall_places": 40}, {}])
def test_what_was_learned_stands_below_the_metrics(run_dir, tmp_path, config):
    readme = write_readme(tmp_path, "METRICS")
    assert update() == 0 and "recall" not in block(readme, "METRICS")
    samples = [{"prompt": "A", "characters": 640, "verbatim": 93}, {"prompt": "B", "characters": 7, "verbatim": 7}]
    put_record(run_dir, recall=0.875, recall_at_windows=0.96875, samples=samples, config=config)
    assert update() == 0
    first, windows, second = block(readme, "METRICS").split("\n")[-3:]
    assert windows == "- recall_at_windows: **0.9688**, the same where windows of training begin"
    assert "recall: **0.8750** of the next 32 tokens" in first and ("up to 40 places" in first) == bool(config)
    assert second.endswith("in characters: **93** of 640, **7** of 7")
    assert_sound_markdown(readme.read_text())
    for odd in ([1], "x", [{}], [{"verbatim": "a", "characters": None}], {}):
        put_record(run_dir, samples=odd, recall="high", recall_at_windows=None)
        assert update() == 0 and "recall" not in block(readme, "METRICS")


SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 64, "tokenizer": "char", "optimizer": "muon"}
BATCH = {"batch_size": 4, "seq_len": 32, "grad_accum": 2}


def test_the_model_is_described_by_what_the_run_has_on_record(run_dir, tmp_path):
    readme = write_readme(tmp_path, "MODEL")
    corpus = {"file": "data/*play*.txt", "tokens": 2547, "held_out": 0}
    put_record(run_dir, config=SHAPE | BATCH, origin=None, processes=2, parameters=12345, corpus=corpus)
    assert update() == 0
    said = block(readme, "MODEL")
    assert said.startswith("This model was trained from scratch on `data/*play*.txt`. It is a GPT-2: ")
    for row in ("Parameters | 12,345", "Blocks | 2", "Width | 48", "Tokens in a step | 512", "Tokenizer | `char`"):
        assert f"| {row} |" in said
    assert "held out" not in said
    assert_sound_markdown(readme.read_text())


@pytest.mark.parametrize(
    ("changes", "begin"),
    [
        (
            {"origin": "hf"},
            "This model was trained on `data/sample.txt`, beginning with the weights in `hf`. It is a GPT-2",
        ),
        ({"config": SHAPE | {"arch": "mla_moe"}}, "This model was trained from scratch on `data/sample.txt`.\n\n|"),
        ({"config": {"n_layer": 3}}, "This model was trained from scratch on `data/sample.txt`.\n\n|"),
        ({"config": None, "parameters": None, "corpus": {}}, "It is not on record what the model is."),
    ],
)
def test_of_a_model_nothing_is_said_that_is_not_on_record(run_dir, tmp_path, changes, begin):
    readme = write_readme(tmp_path, "MODEL")
    put_record(run_dir, **{"config": SHAPE, "origin": None} | changes)
    assert update() == 0
    assert block(readme, "MODEL").startswith(begin)


def test_a_run_that_does_not_say_where_its_weights_began_is_not_called_from_scratch(run_dir, tmp_path):
    readme = write_readme(tmp_path, "MODEL")
    put_record(run_dir, config=SHAPE)
    assert update() == 0
    assert block(readme, "MODEL").startswith("This model was trained on ")


def test_a_foreign_record_breaks_nothing(run_dir, tmp_path):
    readme = write_readme(tmp_path, *update_readme.NAMES)
    odd = {key: [1, {"a": None}] for key in json.loads((run_dir / "run.json").read_text())}
    for record in (odd, dict.fromkeys(odd, 3), dict.fromkeys(odd, "*x* | <b>"), {"other": True}, {}):
        (run_dir / "run.json").write_text(json.dumps(record))
        assert update() == 0
        tokens = assert_sound_markdown(readme.read_text())
        assert not any(child.type in ("html_inline", "em_open") for t in tokens for child in t.children or [])


PIECES = [
    *["```", "~~~", "````", "\n", "\r\n", "\r", "\t", " ", "|", "\\", "<b>", "-->", "<!--", "</details>"],
    *["\x1b[31m", "\0", "\x0c", "\x85", "\u2028", "\u202e", "\ud800", "# ", "- ", "> ", "    ", "$x$", "[a](b)"],
    *[f"<!--AUTO:{name}:{edge}-->" for name in update_readme.NAMES for edge in ("START", "END")],
]


HOSTILE = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=30).map("".join)


@settings(max_examples=15, deadline=None)
@given(sample=st.lists(HOSTILE, max_size=4), line=HOSTILE, ended=HOSTILE, command=HOSTILE)
def test_no_content_breaks_out_of_its_block(tmp_path_factory, sample, line, ended, command):
    folder = tmp_path_factory.mktemp("run")
    run_dir = shutil.copytree(GOLDEN / "own", folder / "run")
    sample_file, log = run_dir / "samples" / "samples.txt", run_dir / "logs" / "train.log"
    outputs = "".join(f"PROMPT:\n{text}\nOUTPUT:\n{text}\n\n" for text in sample)
    sample_file.write_bytes(f"{RULE}\nSTEP 3\n\n{outputs}".encode("utf-8", "surrogatepass"))
    log.write_bytes(log.read_bytes() + f"2026-01-02 10:00:41,000 | INFO | {line}\n".encode("utf-8", "surrogatepass"))
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(record | {"ended": ended, "command": command, "device": line}))
    names = [name for name in update_readme.NAMES if name != "CURVE"]
    readme = write_readme(folder, *names)
    argv = ["--run_dir", str(run_dir), "--readme", str(readme)]
    assert update_readme.main(argv) == 0
    text = readme.read_bytes().decode()
    assert re.findall("<!--AUTO:(.*?)-->", text) == [f"{name}:{edge}" for name in names for edge in ("START", "END")]
    tokens = assert_sound_markdown(text)
    assert [t.content for t in tokens if t.type == "html_block"] == [
        f"<!--AUTO:{name}:{edge}-->\n" for name in names for edge in ("START", "END")
    ]
    assert [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"] == ["Title", "End"]
    assert not any(child.type == "html_inline" for t in tokens for child in t.children or [])
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text)
    assert update_readme.main([*argv, "--check"]) == 0  # twice is once
