"""Where runs are compared: figures and samples go to TensorBoard (--tensorboard), to Trackio (--trackio), or to both.
Each is imported only where it is asked for, and a fault of one ends it, never the run."""

from __future__ import annotations

import importlib.util
import logging
import textwrap
from collections.abc import Iterator, Sequence

from support.cli import RunError
from support.rundir import RunDirectory

FIGURES = ("loss", "avg_loss", "val_loss", "lr", "grad_norm", "tok_per_s", "load_entropy", "busiest")


def problems(config) -> Iterator[tuple[str, str]]:
    """Yields (a flag, what to do) where its package isn't there. `config` is train.py's TrainConfig."""
    for name in BOARDS:
        if getattr(config, name) and not importlib.util.find_spec(name):
            yield name, f"{name} isn't installed: pip install {name}, or leave --{name} out"


class Boards:
    """Those that a run was asked for, behind one interface; there may be none."""

    def __init__(self, log: logging.Logger):
        self.log = log
        self.boards: dict[str, TensorBoard | Trackio] = {}

    def open(self, config, run_dir: RunDirectory, step: int) -> None:
        """Goes on at the step that the run goes on from. Raises RunError for a board that can't be opened."""
        for name, board in BOARDS.items():
            if getattr(config, name):
                try:
                    self.boards[name] = board(config, run_dir, step)
                except Exception as e:  # a broken installation can raise anything
                    raise RunError(f"{name} doesn't work here ({e!r:.80}): leave --{name} out") from e

    def add_row(self, row: dict) -> None:
        """A row of the CSV."""
        figures = {name: row[name] for name in FIGURES if row.get(name, "") != ""}
        self.call("add_figures", figures, row["step"])

    def add_samples(self, texts: Sequence[tuple[str, str]], step: int) -> None:
        """As Markdown: four blanks keep the lines as they are."""
        samples = {}
        for i, (prompt, text) in enumerate(texts):
            samples[f"sample {i}"] = textwrap.indent(prompt + text, "    ", lambda line: True)
        self.call("add_texts", samples, step)

    def flush(self) -> None:
        self.call("flush")

    def close(self) -> None:
        self.call("close")

    def call(self, name: str, *args) -> None:
        for board in list(self.boards):
            try:
                getattr(self.boards[board], name)(*args)
            except Exception as e:  # its thread's, such as a full disk
                del self.boards[board]
                self.log.warning(f"{board} can't be written to ({e!r:.80}): from here on it is left out")


class TensorBoard:
    """Event files in out_dir/tensorboard."""

    def __init__(self, config, run_dir: RunDirectory, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # hides what an earlier start wrote past `step`, since that is made again
        self.writer = SummaryWriter(run_dir.board, purge_step=step + 1)

    def add_figures(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def add_texts(self, texts: dict[str, str], step: int) -> None:
        for name, text in texts.items():
            self.writer.add_text(name, text, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """Trackio's own data base on this machine, `trackio show` opens it. A run that goes on adds to the same one; steps
    that it makes again after a kill stand there twice, with the same figures."""

    def __init__(self, config, run_dir: RunDirectory, step: int):
        import trackio

        self.trackio = trackio
        trackio.init(
            project="train-gpt2",
            name=str(run_dir.root.resolve()),
            config={"preset": config.preset, "arch": config.arch, "lr": config.lr, "steps": config.steps},
            resume="allow" if step else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def add_figures(self, figures: dict[str, float], step: int) -> None:
        self.trackio.log(figures, step=step)

    def add_texts(self, texts: dict[str, str], step: int) -> None:
        self.trackio.log({name: self.trackio.Markdown(text) for name, text in texts.items()}, step=step)

    def flush(self) -> None:
        """It sends what it has by itself, twice a second."""

    def close(self) -> None:
        self.trackio.finish()


BOARDS = {"tensorboard": TensorBoard, "trackio": Trackio}
