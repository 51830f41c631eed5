"""The block FLAGS: train.py's flags and presets, read from the source, since importing train.py would import torch."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from report.markdown import code, plain, table
from report.run import ReadmeError

HEADER = ("Flag", "Default", "What it does")


def flags(train_file: Path, presets_file: Path) -> str:
    """The table of the flags, and below it what each preset stands for."""
    presets = read_presets(presets_file)
    rows = read_flags(train_file, list(presets))
    lines = [table(HEADER, rows), ""]
    for name, settings in presets.items():
        lines.append(f"`--preset {name}` stands for {as_typed(settings)}.")
    return "\n".join(lines)


def read_presets(path: Path) -> dict[str, dict]:
    """PRESETS = {name: {flag: value}} of the presets' source."""
    try:
        for node in parse(path):
            if assigned_name(node) == "PRESETS":
                presets = ast.literal_eval(node.value)
                return {name: dict(settings) for name, settings in presets.items()}
    except (SyntaxError, ValueError, TypeError, AttributeError):
        pass  # the source isn't Python, or PRESETS isn't a literal: the same sentence serves
    raise ReadmeError(f"{path}: there is no PRESETS, a dict of literal dicts: remove the block FLAGS")


def read_flags(path: Path, preset_names: Sequence[str]) -> list[tuple[str, str, str]]:
    """The rows of the table, from the class TrainConfig of train.py's source."""
    try:
        for node in parse(path):
            if isinstance(node, ast.ClassDef) and node.name == "TrainConfig":
                return list(flag_rows(node, preset_names))
    except (SyntaxError, ValueError, TypeError, AttributeError):
        pass
    raise ReadmeError(f"{path}: there is no TrainConfig of flag(...) fields: remove the block FLAGS")


def parse(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except OSError as e:
        raise ReadmeError(f"{path} can't be read ({e.strerror}), and the block FLAGS comes from it") from None


def assigned_name(node: ast.stmt) -> str:
    """The name that a statement `NAME = ...` or `NAME: type = ...` sets; "" for any other statement."""
    target = None
    if isinstance(node, ast.AnnAssign):
        target = node.target
    elif isinstance(node, ast.Assign):
        target = node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def flag_rows(config: ast.ClassDef, preset_names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """A row for each field `name: type = flag(default, "help", "Group", rule=...)`, and one for each group's name."""
    for node in config.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        name = assigned_name(node)
        default, text, *group = [ast.literal_eval(argument) for argument in node.value.args]
        if group:
            yield f"**{group[0]}**", "", ""
        about = plain(text)
        choices = choices_of(node.value, name, preset_names)
        if choices:
            about += f" ({' or '.join(map(code, choices))})"
        yield code(f"--{name}"), shown_default(default), about


def choices_of(call: ast.Call, name: str, preset_names: Sequence[str]) -> list[str]:
    """What the flag may be set to; [] where it takes any value. The empty choice, which means none, isn't shown."""
    for keyword in call.keywords:
        if keyword.arg == "choices":
            if name == "preset":
                return list(preset_names)  # the source may name them by a variable
            return [choice for choice in ast.literal_eval(keyword.value) if choice]
    return []


def shown_default(value) -> str:
    if value is False or value is None or value == "":
        return ""
    return code(repr(value))


def as_typed(settings: dict) -> str:
    """A preset's settings, as they would be typed."""
    words = []
    for key, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        else:
            words += [f"--{key}", str(value).replace("\n", r"\n")]
    if not words:
        return "the defaults"
    return code(shlex.join(words))
