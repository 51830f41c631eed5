"""Text from a checkpoint."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import sample
import train
from support.checkpoint import load_checkpoint, load_model
from support.inference import Request, Writer, generate, pick_token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("sample") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 0, "prompt": "TILDA:\n"}))
    return str(out_dir / "checkpoints" / "last.pt")


@pytest.fixture
def writer(checkpoint):
    return Writer(checkpoint, train.ARCHITECTURES, "cpu", "off")


def call(capsys, checkpoint, *flags) -> tuple[int, str, str]:
    exit_code = sample.main(["--checkpoint", checkpoint, "--device", "cpu", "--amp", "off", *map(str, flags)])
    out, err = capsys.readouterr()
    return exit_code, out, err


def written(writer, **request) -> list[str]:
    pieces = list(writer.write(Request(**request)))
    return ["".join(of_one) for of_one in zip(*pieces, strict=True)]


# ---- what is written ----


def test_the_same_seed_gives_the_same_text(checkpoint, capsys):
    flags = ["--prompt", r"AMBROSE:\nCome", "--max_new_tokens", 8]
    texts = [call(capsys, checkpoint, *flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("AMBROSE:\nCome")
    assert texts[0].endswith("\n")


def test_a_sample_depends_on_its_seed_alone(writer):
    three = written(writer, prompt="TILDA:", num_samples=3, seed=5)
    assert three == [written(writer, prompt="TILDA:", seed=seed)[0] for seed in (5, 6, 7)]
    assert len(set(three)) == 3


def test_the_prompt_of_training_is_the_default_and_samples_are_apart(checkpoint, capsys):
    exit_code, out, err = call(capsys, checkpoint, "--num_samples", 3, "--max_new_tokens", 3)
    parts = out.split(f"\n{sample.RULE}\n")
    assert exit_code == 0
    assert len(parts) == 3
    assert all(part.startswith("TILDA:\n") for part in parts)
    assert re.fullmatch(r"sample.py: 9 tokens in [\d.]+ s, \d+ tok/s\n", err)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.5}])
def test_tokens_are_those_of_the_whole_model_without_a_cache(writer, settings):
    """Each token picked from the logits of the model read anew from the start, with the same random numbers."""
    request = Request(prompt="Come in", max_new_tokens=40, **settings)
    ids = torch.tensor([writer.encode(request.prompt)[0]])
    generator = torch.Generator().manual_seed(request.seed)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            logits = writer.model(ids)[0][:, -1]
        new = pick_token(logits, request.temperature, request.top_k, [generator], request.top_p)
        ids = torch.cat((ids, new), dim=1)
    expected = writer.tokenizer.decode(ids[0].tolist())
    assert "Come in" + written(writer, **vars(request))[0] == expected.rstrip("\ufffd")


def test_a_prompt_longer_than_the_context_is_cropped_and_it_says_so(checkpoint, writer, capsys):
    long = "word " * 100
    ids, cut = writer.encode(long)
    assert len(ids) == 64
    assert cut == len(writer.tokenizer.encode(long)) - 64
    exit_code, out, err = call(capsys, checkpoint, "--prompt", long, "--max_new_tokens", 2)
    assert exit_code == 0
    assert out.startswith(long)
    assert f"the prompt is {cut} tokens longer than the context: only its last 64 are read" in err


def test_text_goes_on_beyond_the_context(writer):
    """With a window that slides by half: when 64 tokens are full, the newer 32 begin the next."""
    window = writer.encode("Come")[0]
    expected = []
    for _ in range(150):
        if len(window) > 64:
            window = window[-32:]
        with torch.no_grad():
            expected.append(writer.model(torch.tensor([window]))[0][0, -1].argmax().item())
        window = [*window, expected[-1]]
    (text,) = written(writer, prompt="Come", max_new_tokens=150, temperature=0.0)
    assert text == writer.tokenizer.decode(expected).rstrip("\ufffd")


def test_an_empty_prompt_is_a_line_break(checkpoint, capsys, writer):
    assert writer.encode("") == (writer.tokenizer.encode("\n"), 0)
    exit_code, out, _ = call(capsys, checkpoint, "--prompt", "", "--max_new_tokens", 2)
    assert exit_code == 0
    assert out.startswith("\n")


# ---- how it is written ----


def test_a_character_comes_when_it_is_whole(writer, monkeypatch):
    text = "\u2603 \U0001f642\u00e9"  # the first two take several tokens each
    ids = writer.tokenizer.encode(text) + writer.tokenizer.encode("\u2603")[:1]
    assert len(ids) == 5
    tokens = torch.tensor(ids).view(-1, 1, 1)
    monkeypatch.setattr("support.inference.stream", lambda *_: iter(tokens))
    pieces = [piece for (piece,) in writer.write(Request())]
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "" in pieces


def test_pieces_come_as_they_are_written(writer, monkeypatch):
    """The second token isn't computed before the first was handed over."""
    calls = []
    real = writer.model.hidden

    def counted(*args):
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(writer.model, "hidden", counted)
    pieces = writer.write(Request(max_new_tokens=5))
    for done in range(1, 6):
        next(pieces)
        assert len(calls) == done


class Casts(TorchDispatchMode):
    """Notes the shape of each matrix that is cast to another type."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_to_copy" in str(func) and args[0].dim() == 2 and args[0].numel() >= 16 * 16:
            self.shapes.add(args[0].shape)
        return func(*args, **(kwargs or {}))


def test_half_precision_is_that_of_autocast_with_each_matrix_cast_once(checkpoint):
    writer = Writer(checkpoint, train.ARCHITECTURES, "cpu", "bf16")
    request = Request(prompt="Come in", temperature=0.0, max_new_tokens=30)
    plain, tokenizer, _ = load_model(checkpoint, train.ARCHITECTURES)
    ids = torch.tensor([writer.encode(request.prompt)[0]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(plain.eval(), ids, 30, temperature=0)[0, ids.size(1) :].tolist()
    with Casts() as casts:
        (text,) = written(writer, **vars(request))
    assert text == tokenizer.decode(expected).rstrip("\ufffd")
    assert not casts.shapes & {p.shape for p in plain.parameters() if p.dim() == 2}


def test_json_is_one_object_for_programs(checkpoint, capsys):
    flags = ["--prompt", "TILDA:", "--max_new_tokens", 5]
    exit_code, out, err = call(capsys, checkpoint, "--json", "--num_samples", 2, *flags)
    found = json.loads(out)
    assert exit_code == 0
    assert out.count("\n") == 1
    assert "tok/s" in err
    assert [one["seed"] for one in found["samples"]] == [1337, 1338]
    assert found["request"]["prompt"] == "TILDA:"
    assert (found["tokens"], found["step"], found["interrupted"]) == (10, 6, False)
    plain = call(capsys, checkpoint, *flags)[1]
    assert plain == "TILDA:" + found["samples"][0]["text"] + "\n"


# ---- the prompt ----


def test_a_prompt_from_stdin(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("S\u00e9verin:\n".encode())))
    assert call(capsys, checkpoint, "--prompt", "-", "--max_new_tokens", 1)[1].startswith("S\u00e9verin:\n")
    monkeypatch.setattr(sys, "stdin", None)
    exit_code, _, err = call(capsys, checkpoint, "--prompt", "-")
    assert exit_code == 2
    assert "there is no stdin" in err


def test_a_prompt_from_a_file_is_read_as_in_training(checkpoint, capsys, tmp_path):
    file = tmp_path / "scene.txt"
    file.write_text(r"A \n stays as it is", encoding="utf-8-sig")
    out = call(capsys, checkpoint, "--prompt", f"@{file}", "--max_new_tokens", 1)[1]
    assert out.startswith(r"A \n stays as it is")
    file.write_bytes(b"\xef\xbb\xbfTILDA:\r\nCome")
    assert sample.read_prompt(f"@{file}") == "TILDA:\nCome"
    file.write_bytes(b"\xff\xff\xff")
    exit_code, _, err = call(capsys, checkpoint, "--prompt", f"@{file}")
    assert exit_code == 2
    assert str(file) in err
    assert err.count("\n") == 1


def test_a_prompt_on_the_command_line_may_have_escapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stdin").write_text("a file of this name")
    assert sample.read_prompt(r"A:\n\\n") == "A:\n\\n"
    assert sample.read_prompt(r"\@home") == "@home"
    assert sample.read_prompt("@stdin") == "a file of this name"


# ---- which checkpoint ----


def put_run(folder, weights: bytes, name: str, saved_at: int) -> None:
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(weights)
    os.utime(path, (saved_at, saved_at))


def test_without_a_checkpoint_the_newest_run_writes(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with open(checkpoint, "rb") as f:
        weights = f.read()
    put_run(tmp_path / "out_old", weights, "best.pt", saved_at=1000)
    put_run(tmp_path / "out_new", weights, "best.pt", saved_at=2000)
    put_run(tmp_path / "out_new", weights, "last.pt", saved_at=9000)  # its best.pt counts
    put_run(tmp_path / "another", weights, "best.pt", saved_at=9000)
    put_run(tmp_path / "out_empty", b"", "previous.pt", saved_at=9000)
    flags = ["--max_new_tokens", "1", "--device", "cpu", "--json"]
    newest = os.path.join("out_new", "checkpoints", "best.pt")
    assert sample.main(flags) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["checkpoint"] == newest
    assert err.startswith(f"sample.py: reading {newest}, of the newest run in out*/\n")
    put_run(tmp_path / "out_unfinished", weights, "last.pt", saved_at=3000)  # has no best.pt yet
    assert sample.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == os.path.join("out_unfinished", "checkpoints", "last.pt")


def test_where_there_is_no_run_one_sentence_says_what_to_type(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert sample.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "python train.py --preset demo" in err
    assert "--checkpoint" in err


# ---- how it ends ----


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_written(checkpoint, capsys, monkeypatch, as_json):
    def write(self, request):
        yield ["Come", "Set"]
        yield [" in", " down"]
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", write)
    flags = ["--json"] if as_json else []
    exit_code, out, err = call(capsys, checkpoint, "--prompt", "A: ", "--num_samples", 2, *flags)
    assert exit_code == 130
    assert "interrupted" in err
    if as_json:
        assert [one["text"] for one in json.loads(out)["samples"]] == ["Come in", "Set down"]
        assert json.loads(out)["interrupted"]
    else:
        assert out == f"A: Come in\n{sample.RULE}\nA: Set down\n"


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def command(checkpoint, *flags) -> list[str]:
    return [sys.executable, str(ROOT / "sample.py"), "--checkpoint", checkpoint, "--device", "cpu", *flags]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_ctrl_c_in_the_middle_of_a_sample(checkpoint):
    with subprocess.Popen(command(checkpoint, "--max_new_tokens", "100000"), **PIPES) as process:
        process.stdout.read(20)  # it writes
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert "interrupted" in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_ctrl_c_before_the_first_token(checkpoint, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(command(checkpoint, "--prompt", f"@{pipe}"), **PIPES) as process, open(pipe, "w"):
        process.send_signal(signal.SIGINT)  # it has opened its side of the pipe, and waits for a prompt
        err = process.stderr.read()
    assert process.returncode == 130
    assert err == "sample.py: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_reader_that_leaves_ends_it(checkpoint):
    with subprocess.Popen(command(checkpoint, "--max_new_tokens", "100000"), **PIPES) as process:
        process.stdout.read(20)
        process.stdout.close()
        start = time.monotonic()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert time.monotonic() - start < 30
    assert "Traceback" not in err
    assert "Exception" not in err


def test_a_full_memory_is_one_sentence(checkpoint, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Writer, "write", full)
    exit_code, _, err = call(capsys, checkpoint)
    assert exit_code == 1
    assert err == "sample.py: the memory is full: lower --num_samples or --max_new_tokens\n"


# ---- problems ----


def test_all_problems_are_said_at_once(checkpoint, capsys):
    wrong = ["--temperature", "nan", "--num_samples", 0, "--top_p", 0, "--seed", -1, "--top_k", "few"]
    exit_code, out, err = call(capsys, checkpoint, *wrong, "--max_new_tokens", 1.5, "--prompt", "@nowhere.txt")
    assert (exit_code, out) == (2, "")
    assert err.splitlines() == [
        "sample.py: num_samples 0 is out of bounds: use 1 to 100",
        "sample.py: max_new_tokens 1.5 isn't a whole number: use one from 1 to 100,000",
        "sample.py: temperature nan is out of bounds: use 0.0 to 100.0",
        "sample.py: top_k 'few' isn't a whole number: use one from 0 to 1,000,000",
        "sample.py: top_p 0 is out of bounds: use 0.01 to 1.0",
        "sample.py: seed -1 is out of bounds: use 0 to 9,223,372,036,854,775,807",
        "sample.py: prompt: nowhere.txt can't be read (No such file or directory): check its name; a prompt that begins"
        r" with @ is written \@",
    ]


def test_a_bound_itself_is_allowed():
    assert Request(num_samples=100, max_new_tokens=1, temperature=0, top_k=0, top_p=1, seed=2**63 - 1).problems() == {}


def test_narrower_bounds_are_those_that_are_told():
    problems = Request(num_samples=5).problems({"num_samples": (1, 4)})
    assert problems == {"num_samples": "5 is out of bounds: use 1 to 4"}


def test_a_checkpoint_that_is_not_there_is_one_sentence(capsys):
    assert sample.main(["--checkpoint", "nowhere.pt"]) == 2
    assert capsys.readouterr().err == "sample.py: checkpoint nowhere.pt doesn't exist: check the path\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_sentence(checkpoint, capsys):
    assert sample.main(["--checkpoint", checkpoint, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "sample.py: device cuda isn't available here: use --device auto\n"


@pytest.mark.parametrize(
    ("part", "value"), [("model_config", None), ("model_config", {"n_layer": 1}), ("tokenizer", {}), ("model", {})]
)
def test_a_checkpoint_that_lacks_its_shape_is_one_sentence(checkpoint, tmp_path, capsys, part, value):
    torch.save(load_checkpoint(checkpoint) | {part: value}, tmp_path / "odd.pt")
    exit_code, _, err = call(capsys, str(tmp_path / "odd.pt"))
    assert exit_code == 1
    assert "lacks what a model needs" in err
    assert err.count("\n") == 1


# ---- a model of characters ----


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("characters") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 0, "tokenizer": "char"}))
    return str(out_dir / "checkpoints" / "last.pt")


def test_a_model_of_characters_writes_characters_of_its_text(characters, capsys):
    exit_code, out, err = call(capsys, characters, "--prompt", "AMBROSE:", "--max_new_tokens", 30)
    assert exit_code == 0
    assert out.startswith("AMBROSE:")
    assert len(out) == len("AMBROSE:") + 30 + 1
    assert "30 tokens in" in err


def test_a_character_that_it_does_not_know_is_one_sentence(characters, capsys):
    exit_code, out, err = call(capsys, characters, "--prompt", "€")
    assert (exit_code, out) == (2, "")
    assert err.count("\n") == 1
    assert "and not '€': leave them out of the prompt" in err


def test_where_the_text_has_no_line_break_an_empty_prompt_is_its_first_character(characters, tmp_path, capsys):
    content = load_checkpoint(characters)
    vocabulary = ["\r" if c == "\n" else c for c in content["tokenizer"]["vocabulary"]]
    content["tokenizer"]["vocabulary"] = vocabulary
    content["config"]["prompt"] = "€"
    odd = str(tmp_path / "odd.pt")
    torch.save(content, odd)
    assert Writer(odd, train.ARCHITECTURES, "cpu", "off").trained_prompt == vocabulary[0]
    assert call(capsys, odd, "--max_new_tokens", 3)[0] == 0
    assert call(capsys, odd, "--max_new_tokens", 3, "--prompt", "")[0] == 0
