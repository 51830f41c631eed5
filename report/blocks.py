"""The blocks that tell of one run, as Markdown. COMPARE and HELDOUT are in published.py, FLAGS is in flags.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime

from report.log import Line, Log
from report.markdown import code, duration, fence, plain, table
from report.run import FORMATS, Row, Run, finite, thin, under_or_not

METRICS_ROWS = 6  # evenly spaced; the best of each loss may add one more
SAMPLE_LINES = 200
SAMPLE_CHARACTERS = 30_000
LOG_OPENING = 4  # lines before the first step
LOG_STEPS = 5  # evenly spaced, the first and the last among them
LOG_CLOSING = 3  # lines behind the last step
LOG_LINES = LOG_OPENING + LOG_STEPS + LOG_CLOSING  # in all, at most; a log that has no more is shown whole
LOG_CHARACTERS = 300  # of a line
GPT2_SETTINGS = {"block_size", "n_layer", "n_head", "n_embd", "tokenizer"}  # other programs have other models
MODEL_HEADER = ("Model and training", "")
LOSSES = ("loss", "avg_loss", "val_loss")


# ---- SUMMARY ----


def summary(run: Run) -> str:
    """When, how it ended, the losses, the target, and what is not on record."""
    lines = []
    when = time_of(run)
    if when:
        lines.append(f"Updated: **{moment(when)}** (the run's own time)")
    lines.append(f"Run directory: {code(run.folder)}")
    lines.append(f"Ended: {how_it_ended(run)}")
    lines += losses(run)
    lines.append(final_loss(run))
    lines += cost(run)
    lines += load(run)
    logged = f"Logged rows: **{len(run.rows)}**"
    if not run.rows:
        logged += ", no step has been logged yet"
    lines.append(logged)
    return "\n".join(f"- {line}" for line in lines)


def time_of(run: Run) -> str | None:
    """When the run ended, or else of its last word, or else when it began."""
    if run.text("end"):
        return run.text("end")
    closing = run.log.closing()
    if closing:
        time, _ = closing[-1]
        return time
    return run.text("start")


def moment(text: str) -> str:
    """A time as people write it."""
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return plain(text)
    zone = f" {at:%Z}" if at.tzinfo else ""
    return f"{at:%Y-%m-%d %H:%M:%S}{zone}"


def how_it_ended(run: Run) -> str:
    ended = run.text("ended")
    if ended:
        step = run.number("steps")
        where = "" if step is None else f" at step {step:.0f}"
        return f"**{plain(ended)}**{where}"
    if "ended" in run.record:
        return "not yet: still running, or stopped without a word"
    messages = [code(message) for _, message in run.log.closing()[-3:]]
    if not messages:
        return "not on record"
    return f"not on record; the log closes with {', '.join(messages)}"


def losses(run: Run) -> Iterator[str]:
    """The best and the last, each with its step."""
    remarks = {"loss": "", "avg_loss": f" ({run.averaged_over()})", "val_loss": ""}
    if run.measure() == "avg_loss":
        remarks["loss"] = " (one step)"
    for key, remark in remarks.items():
        best = run.best(key)
        if best:
            yield f"Best {key}: **{figure(best, key)}** at step **{best['step']}**{remark}"
    with_loss = [row for row in run.rows if "loss" in row]
    if with_loss:
        last = with_loss[-1]
        yield f"Last logged loss: **{figure(last, 'loss')}** at step **{last['step']}**"


def final_loss(run: Run) -> str:
    """Was the target met? Only the proof, final_loss, can tell."""
    target = run.target_loss()
    final = run.number("final_loss")
    if final is not None:
        text = f"final_loss, over {run.proven_over()}: **{final:.6f}**"
        if target:
            text += f", {under_or_not(final, target)} the target of {target:g}"
    elif "final_loss" in run.record:
        text = "final_loss: none"
        if target:
            text += f", the target of {target:g} was not reached"
    else:
        text = "Not on record: final_loss"
        if target:
            text += f", and so whether the target of {target:g} was met; tokens and time to it"
    return text


def cost(run: Run) -> Iterator[str]:
    """Tokens and time until the target, or else those of the whole run."""
    to_target = run.number("tokens_to_target")
    seconds_to_target = run.number("seconds_to_target")
    tokens = run.number("tokens")
    seconds = run.number("seconds")
    if to_target is not None:
        text = f"To the target: **{to_target:,.0f} tokens**"
        if seconds_to_target is not None:
            text += f" in **{duration(seconds_to_target)}**"
        yield text
    elif tokens and seconds:
        yield f"Trained: {tokens:,.0f} tokens in {duration(seconds)}"


def load(run: Run) -> Iterator[str]:
    """How evenly the experts shared the work at the end, where there are any."""
    rows = run.with_figure("busiest")
    if not rows:
        return
    text = f"Experts: at the end the busiest one of a layer had **{rows[-1]['busiest']:.0%}** of its work"
    number = finite(run.settings().get("n_expert"))
    if number and number > 0:
        text += f" (evenly shared: {1 / number:.0%})"
    yield text


def figure(row: Row, key: str) -> str:
    """A row's figure as tables show it, empty where it has none."""
    if key not in row:
        return ""
    return format(row[key], FORMATS[key])


# ---- MODEL ----


def model(run: Run) -> str:
    """What the model is, its size, and what it was trained on."""
    settings = run.settings()
    rows = []
    for what, value in sizes(run, settings).items():
        if value:
            rows.append([what, f"{value:,.0f}"])
    for what, name in {"Tokenizer": "tokenizer", "Optimizer": "optimizer"}.items():
        if isinstance(settings.get(name), str):
            rows.append([what, code(settings[name])])
    if not rows:
        return "It is not on record what the model is."
    return f"{what_it_is(run, settings)}\n\n{table(MODEL_HEADER, rows)}"


def what_it_is(run: Run, settings: dict) -> str:
    """A sentence; and one more where the architecture is known to be GPT-2's."""
    corpus = run.part("corpus").get("file", settings.get("input_file"))
    origin = run.text("origin")
    text = "This model was trained"
    if "origin" in run.record and not origin:
        text += " from scratch"
    if isinstance(corpus, str):
        text += f" on {code(corpus)}"
    if origin:
        text += f", beginning with the weights in {code(origin)}"
    text += "."
    if settings.get("arch", "gpt2") == "gpt2" and settings.keys() >= GPT2_SETTINGS:
        text += (
            " It is a GPT-2: a transformer that reads the tokens so far and gives a probability to each token that may"
            " come next. In each of its blocks, attention and an MLP add to what is known of a token. The head uses the"
            " matrix of the token embedding again."
        )
    return text


def sizes(run: Run, settings: dict) -> dict[str, float | None]:
    """{what: how many}, None where that isn't on record."""
    batch = [finite(settings.get(name)) for name in ("batch_size", "seq_len", "grad_accum")]
    processes = run.number("processes")
    tokens_per_step = None
    if processes and None not in batch:
        tokens_per_step = math.prod(batch) * processes
    corpus = run.part("corpus")
    return {
        "Parameters": run.number("parameters"),
        "Blocks": finite(settings.get("n_layer")),
        "Attention heads in a block": finite(settings.get("n_head")),
        "Width": finite(settings.get("n_embd")),
        "Context, tokens": finite(settings.get("block_size")),
        "Window in training, tokens": finite(settings.get("seq_len")),
        "Tokens in a step": tokens_per_step,
        "Tokens of the text": finite(corpus.get("tokens")),
        "of which are held out": finite(corpus.get("held_out")),
    }


# ---- METRICS ----


def metrics(run: Run) -> str:
    """A few evenly spaced rows of the CSV, its first, its last and the best of each loss among them."""
    if not run.rows:
        return "No step has been logged yet."
    best = best_rows(run)
    shown = {row["step"] for row in best.values()}
    for i in thin(len(run.rows), METRICS_ROWS):
        shown.add(run.rows[i]["step"])
    rows = [row for row in run.rows if row["step"] in shown]
    note = f"{len(rows)} of {len(run.rows)} logged rows."
    if best:
        note += " The lowest of each loss is bold."
    return "\n".join([metrics_table(rows, best), "", note, *learned(run)])


def best_rows(run: Run) -> dict[str, Row]:
    """{loss: the row with the lowest}."""
    found = {}
    for key in LOSSES:
        row = run.best(key)
        if row:
            found[key] = row
    return found


def metrics_table(rows: Sequence[Row], best: dict[str, Row]) -> str:
    """Only the columns that any of the rows has."""
    columns = [key for key in FORMATS if any(key in row for row in rows)]
    lines = []
    for row in rows:
        cells = []
        for key in columns:
            bold = "**" if best.get(key) is row else ""
            cells.append(f"{bold}{figure(row, key)}{bold}")
        lines.append(cells)
    return table(columns, lines, "---:")


def learned(run: Run) -> Iterator[str]:
    """What is known by heart: recall, and the samples' own words of the text."""
    recall = run.number("recall")
    at_windows = run.number("recall_at_windows")
    if recall is not None:
        places = finite(run.settings().get("recall_places"))
        where = f"up to {places:.0f} places" if places else "places"
        yield ""
        yield (
            f"- recall: **{recall:.4f}** of the next 32 tokens come back exactly by greedy decoding, after 32 tokens of"
            f" the text from {where} drawn by seed"
        )
    if at_windows is not None:
        yield f"- recall_at_windows: **{at_windows:.4f}**, the same where windows of training begin"
    verbatim = verbatim_runs(run)
    if verbatim:
        yield (
            "- Longest run of each sample that stands in the text word for word, in characters: " + ", ".join(verbatim)
        )


def verbatim_runs(run: Run) -> list[str]:
    """Of each sample, how many of its characters; [] where run.json doesn't say it of all of them."""
    samples = run.record.get("samples")
    if not isinstance(samples, list):
        return []
    found = []
    for sample in samples:
        if not isinstance(sample, dict):
            return []
        verbatim = finite(sample.get("verbatim"))
        characters = finite(sample.get("characters"))
        if verbatim is None or characters is None:
            return []
        found.append(f"**{verbatim:.0f}** of {characters:.0f}")
    return found


# ---- SAMPLES ----


def samples(run: Run) -> str:
    """The latest sample, whole; one that is very long is cut between two prompts, or else between two lines."""
    step, text = run.latest_sample()
    if not text.strip():
        return "No sample has been written yet."
    head = "The latest sample:"
    if step is not None:
        head = f"What the model wrote at step {step}:"
    lines = text.split("\n")
    kept = lines[: end_of_sample(lines)]
    if len(kept) == len(lines):
        return f"{head}\n\n{fence(text)}"
    parts = [head]
    if kept:
        parts.append(fence("\n".join(kept).rstrip("\n")))
    parts.append(f"{len(lines) - len(kept):,} more lines are left out.")
    return "\n\n".join(parts)


def end_of_sample(lines: Sequence[str]) -> int:
    """How many of its lines are shown."""
    fits = 0
    characters = 0
    for line in lines[:SAMPLE_LINES]:
        characters += len(line)
        if characters > SAMPLE_CHARACTERS:
            break
        fits += 1
    if fits == len(lines):
        return fits
    for i in range(fits - 1, 0, -1):
        if lines[i].startswith("PROMPT:"):
            return i
    return fits


# ---- LOGS ----


def logs(run: Run) -> str:
    """The log's opening, a few steps, evenly spaced, and its closing."""
    log = run.log
    if log.is_empty():
        return "No log has been written yet."
    shown = lines_to_show(log)
    text = fence("\n".join(cut(line) for _, line in shown).strip("\n"))
    if len(shown) == log.count:
        return text
    return f"{text}\n\n{len(shown)} of {log.count:,} lines of the log."


def lines_to_show(log: Log) -> list[Line]:
    """The lines that tell most, in order."""
    if log.count <= LOG_LINES:
        return log.opening
    steps = log.some_steps()
    if not steps:
        edge = LOG_LINES // 2
        return log.opening[:edge] + log.behind[-edge:]
    first_step, _ = steps[0]
    shown = set(log.opening[: min(LOG_OPENING, first_step)])
    for i in thin(len(steps), LOG_STEPS):
        shown.add(steps[i])
    shown.update(closing_lines(log.behind))
    return sorted(shown)


def closing_lines(behind: Sequence[Line]) -> Sequence[Line]:
    """The log's last line, and before it those in which it is said how the run ended, if it is."""
    if len(behind) <= LOG_CLOSING:
        return behind
    first = len(behind) - LOG_CLOSING
    for i, (_, line) in enumerate(behind):
        if "| Ended:" in line:
            first = min(first, i)
    return [*behind[first : first + LOG_CLOSING - 1], behind[-1]]


def cut(line: str) -> str:
    """The line's beginning, if it is very long."""
    more = len(line) - LOG_CHARACTERS
    if more <= 0:
        return line
    return f"{line[:LOG_CHARACTERS]} [... {more:,} more characters ...]"


# ---- REPRODUCE ----


def reproduce(run: Run) -> str:
    """The exact command, and all that its result depends on."""
    if not run.record:
        return "There is no run.json, so only the log tells how this run was made."
    lines = facts(run)
    resumed = run.record.get("resumed")
    if isinstance(resumed, list) and resumed:
        times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
        lines.append(f"- Resumed {times}, at last by {code(str(resumed[-1]))}")
    parts = []
    command = run.text("command")
    if command:
        parts.append(fence(command, "sh"))
    if lines:
        parts.append("\n".join(lines))
    if not parts:
        return "run.json says nothing of how to repeat this run."
    return "\n\n".join(parts)


def facts(run: Run) -> list[str]:
    """A line for each that is on record."""
    versions = [f"{name} {version}" for name, version in run.part("versions").items()]
    corpus = run.part("corpus")
    commit = run.text("git_commit") or ""
    values = {
        "Seed": run.record.get("seed"),
        "Git commit": commit.removesuffix("-dirty"),
        "Device": run.text("device"),
        "Precision": run.text("precision"),
        "Processes": run.record.get("processes"),
        "Versions": ", ".join(versions),
        "Text": corpus.get("file"),
        "SHA-256 of the text": corpus.get("sha256"),
    }
    remarks = {}
    if commit.endswith("-dirty"):
        remarks["Git commit"] = " and changes since"
    lines = []
    for name, value in values.items():
        if value not in (None, ""):
            lines.append(f"- {name}: {code(str(value))}{remarks.get(name, '')}")
    return lines
