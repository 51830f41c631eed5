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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("sample") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 0, "prompt": "TILDA:\n"}))
    return str(out_dir / "checkpoints" / "last.pt")


@pytest.fixture
def writer(checkpoint):
    return sample.Writer(checkpoint, "cpu", "off")


def call(capsys, checkpoint, *flags) -> tuple[int, str, str]:
    code = sample.main(["--checkpoint", checkpoint, "--device", "cpu", "--amp", "off", *map(str, flags)])
    return code, *capsys.readouterr()


def written(writer, **request) -> list[str]:
    pieces = list(writer.write(sample.Request(**request)))
    return ["".join(of_one) for of_one in zip(*pieces, strict=True)]


def test_the_same_seed_gives_the_same_text(checkpoint, capsys):
    flags = ["--prompt", r"AMBROSE:\nCome", "--max_new_tokens", 8]
    texts = [call(capsys, checkpoint, *flags, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("AMBROSE:\nCome") and texts[0].endswith("\n")


def test_a_sample_depends_on_its_seed_alone(writer):
    three = written(writer, prompt="TILDA:", num_samples=3, seed=5)
    assert three == [written(writer, prompt="TILDA:", seed=seed)[0] for seed in (5, 6, 7)]
    assert len(set(three)) == 3


def test_the_prompt_of_training_is_the_default_and_samples_are_apart(checkpoint, capsys):
    code, out, err = call(capsys, checkpoint, "--num_samples", 3, "--max_new_tokens", 3)
    parts = out.split(f"\n{sample.RULE}\n")
    assert code == 0 and len(parts) == 3 and all(part.startswith("TILDA:\n") for part in parts)
    assert re.fullmatch(r"sample.py: 9 tokens in [\d.]+ s, \d+ tok/s\n", err)


@pytest.mark.parametrize("request_", [{"temperature": 0.0}, {"top_k": 5}, {"top_k": 0, "top_p": 0.5}])
def test_tokens_are_those_of_the_whole_model_without_a_cache(writer, request_):
    """Each token picked from the logits of the model read anew from the start, with the same random numbers."""
    request = sample.Request(prompt="Come in", max_new_tokens=40, **request_)
    ids, generator = torch.tensor([writer.encode(request.prompt)[0]]), torch.Generator().manual_seed(request.seed)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            logits = writer.model(ids)[0][:, -1]
        new = train.pick_token(logits, request.temperature, request.top_k, [generator], request.top_p)
        ids = torch.cat((ids, new), dim=1)
    expected = writer.tokenizer.decode(ids[0].tolist())
    assert "Come in" + written(writer, **vars(request))[0] == expected.rstrip("\ufffd")


def test_a_character_comes_when_it_is_whole(writer, monkeypatch):
    text = "\u2603 \U0001f642\u00e9"  # the first two take several tokens each
    ids = writer.tokenizer.encode(text) + writer.tokenizer.encode("\u2603")[:1]
    assert len(ids) == 5
    monkeypatch.setattr(writer.model, "stream", lambda rows, *_, **__: iter(torch.tensor(ids).view(-1, 1, 1)))
    pieces = [piece for (piece,) in writer.write(sample.Request())]
    assert len(pieces) == len(ids) and "".join(pieces) == text and "" in pieces


def test_pieces_come_as_they_are_written(writer):
    """The second token isn't computed before the first was handed over."""
    calls = []
    writer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    real = writer.model.hidden
    writer.model.hidden = lambda *args: (calls.append(1), real(*args))[1]
    pieces = writer.write(sample.Request(max_new_tokens=5))
    for done in range(1, 6):
        next(pieces)
        assert len(calls) == done


def test_a_prompt_longer_than_the_context_is_cropped_and_it_says_so(checkpoint, writer, capsys):
    long = "word " * 100
    ids, cut = writer.encode(long)
    assert len(ids) == 64 and cut == len(writer.tokenizer.encode(long)) - 64
    code, out, err = call(capsys, checkpoint, "--prompt", long, "--max_new_tokens", 2)
    assert code == 0 and out.startswith(long)
    assert f"the prompt is {cut} tokens longer than the context: only its last 64 are read" in err


def test_text_goes_on_beyond_the_context(writer):
    """With a window that slides by half: when 64 tokens are full, the newer 32 begin the next."""
    window, expected = writer.encode("Come")[0], []
    for _ in range(150):
        if len(window) > 64:
            window = window[-32:]
        with torch.no_grad():
            expected.append(writer.model(torch.tensor([window]))[0][0, -1].argmax().item())
        window = [*window, expected[-1]]
    (text,) = written(writer, prompt="Come", max_new_tokens=150, temperature=0.0)
    assert text == writer.tokenizer.decode(expected).rstrip("\ufffd")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_gives_the_same_product(dtype, bias, monkeypatch):
    linear, x = torch.nn.Linear(48, 80, bias), torch.randn(2, 3, 48)
    plain = sample.prepared(linear, dtype, on_cpu=False)
    for packed in (sample.prepared(linear, dtype, on_cpu=True), None):
        if not packed:  # a torch without the operators
            monkeypatch.setattr(sample.PackedLinear, "forward", lambda *_: torch.ops.mkldnn.not_there())
            packed = sample.prepared(linear, dtype, on_cpu=True)
            assert type(packed) is torch.nn.Linear
        with torch.no_grad():
            y = packed(x.to(dtype))
            torch.testing.assert_close(y, plain(x.to(dtype)))
        assert y.dtype == dtype and y.shape == (2, 3, 80)


def test_half_precision_is_that_of_autocast_with_each_matrix_cast_once(checkpoint):
    writer = sample.Writer(checkpoint, "cpu", "bf16")
    request, ids = sample.Request(prompt="Come in", temperature=0.0, max_new_tokens=30), None
    content, casts = train.load_checkpoint(checkpoint), []
    plain = train.GPT(train.GPTConfig(**content["model_config"])).eval()
    plain.load_state_dict(content["model"])
    ids = torch.tensor([writer.encode(request.prompt)[0]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain.generate(ids, 30, temperature=0)[0, ids.size(1) :].tolist()
    assert written(writer, **vars(request))[0] == writer.tokenizer.decode(expected).rstrip("\ufffd")

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in str(func) and args[0].dim() == 2 and args[0].numel() >= 16 * 16:
                casts.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with Casts():
        written(writer, **vars(request))
    weights = {p.shape for p in plain.parameters() if p.dim() == 2}
    assert not weights & set(casts)


def test_an_empty_prompt_is_a_line_break(checkpoint, capsys, writer):
    assert writer.encode("") == (writer.tokenizer.encode("\n"), 0)
    code, out, _ = call(capsys, checkpoint, "--prompt", "", "--max_new_tokens", 2)
    assert code == 0 and out.startswith("\n")


def test_prompts_from_stdin_and_files(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("S\u00e9verin:\n".encode())))
    assert call(capsys, checkpoint, "--prompt", "-", "--max_new_tokens", 1)[1].startswith("S\u00e9verin:\n")
    file = tmp_path / "scene.txt"
    file.write_text(r"A \n stays as it is", encoding="utf-8-sig")
    out = call(capsys, checkpoint, "--prompt", f"@{file}", "--max_new_tokens", 1)[1]
    assert out.startswith(r"A \n stays as it is")
    assert call(capsys, checkpoint, "--prompt", r"\@home", "--max_new_tokens", 1)[1].startswith("@home")
    file.write_bytes(b"\xef\xbb\xbfTILDA:\r\nCome")
    assert sample.read_prompt(f"@{file}") == "TILDA:\nCome"  # line breaks as in training
    file.write_bytes(b"\xff\xff\xff")
    code, _, err = call(capsys, checkpoint, "--prompt", f"@{file}")
    assert code == 2 and str(file) in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no stdin" in call(capsys, checkpoint, "--prompt", "-")[2]
    code, _, err = call(capsys, checkpoint, "--prompt", "@nowhere.txt", "--top_k", -1)
    assert code == 2 and "prompt: nowhere.txt can't be read" in err and "top_k -1 is out of bounds" in err


def test_json_is_one_object_for_programs(checkpoint, capsys):
    code, out, err = call(capsys, checkpoint, "--json", "--prompt", "TILDA:", "--num_samples", 2, "--max_new_tokens", 5)
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and "tok/s" in err
    assert [one["seed"] for one in found["samples"]] == [1337, 1338]
    assert found["request"]["prompt"] == "TILDA:" and found["tokens"] == 10 and found["step"] == 6
    plain = call(capsys, checkpoint, "--prompt", "TILDA:", "--max_new_tokens", 5)[1]
    assert plain == "TILDA:" + found["samples"][0]["text"] + "\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_written(checkpoint, capsys, monkeypatch, as_json):
    def write(self, request):
        yield ["Come", "Set"]
        yield [" in", " down"]
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Writer, "write", write)
    code, out, err = call(capsys, checkpoint, "--prompt", "A: ", "--num_samples", 2, *["--json"] * as_json)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    if as_json:
        assert [one["text"] for one in json.loads(out)["samples"]] == ["Come in", "Set down"]
        assert json.loads(out)["interrupted"]
    else:
        assert out == f"A: Come in\n{sample.RULE}\nA: Set down\n"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_real_ctrl_c_and_a_reader_that_leaves(checkpoint):
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", checkpoint, "--device", "cpu"]
    endless = [*command, "--max_new_tokens", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(endless, **pipes) as process:
        process.stdout.read(20)  # it writes
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out.endswith("\n") and "interrupted" in err and "Traceback" not in err
    with subprocess.Popen([*command, "--prompt", "-"], stdin=subprocess.PIPE, **pipes) as process:
        time.sleep(4)  # it waits for a prompt
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
    assert process.returncode == 130 and err == "sample.py: interrupted before the first token\n"
    with subprocess.Popen(endless, **pipes) as process:
        process.stdout.read(20)
        process.stdout.close()
        start = time.monotonic()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0 and "Traceback" not in err and "Exception" not in err
        assert time.monotonic() - start < 30


def test_a_full_memory_is_one_sentence(checkpoint, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(sample.Writer, "write", full)
    code, _, err = call(capsys, checkpoint)
    assert code == 1 and err == "sample.py: the memory is full: lower --num_samples or --max_new_tokens\n"


def test_problems_are_sentences(checkpoint, capsys):
    assert sample.main(["--checkpoint", "nowhere.pt"]) == 1
    assert capsys.readouterr().err == "sample.py: checkpoint nowhere.pt doesn't exist: check the path\n"
    code, _, err = call(capsys, checkpoint, "--temperature", "nan", "--num_samples", 0, "--top_p", 0, "--seed", -1)
    assert code == 2
    assert err.splitlines() == [
        "sample.py: num_samples 0 is out of bounds: use 1 to 100",
        "sample.py: temperature nan is out of bounds: use 0.0 to 100.0",
        "sample.py: top_p 0.0 is out of bounds: use 0.01 to 1.0",
        "sample.py: seed -1 is out of bounds: use 0 to 9223372036854775807",
    ]
    assert sample.main(["--checkpoint", checkpoint, "--device", "cuda"]) == 2 or torch.cuda.is_available()
    assert sample.Request(top_k=1.5).problems() == {
        "top_k": "top_k 1.5 isn't a whole number: use one from 0 to 1000000"
    }


def test_a_checkpoint_that_lacks_its_shape_is_one_sentence(checkpoint, tmp_path, capsys):
    content = train.load_checkpoint(checkpoint)
    for part, value in (("model_config", None), ("model_config", {"n_layer": 1}), ("tokenizer", {}), ("model", {})):
        torch.save(content | {part: value}, tmp_path / "odd.pt")
        code, _, err = call(capsys, str(tmp_path / "odd.pt"))
        assert code == 1 and "lacks what a model needs" in err and err.count("\n") == 1


# ---- a model of characters ----


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("characters") / "out"
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 0, "tokenizer": "char"}))
    return str(out_dir / "checkpoints" / "last.pt")


def test_a_model_of_characters_writes_characters_of_its_text(characters, capsys):
    code, out, err = call(capsys, characters, "--prompt", "AMBROSE:", "--max_new_tokens", 30)
    assert code == 0 and out.startswith("AMBROSE:") and len(out) == len("AMBROSE:") + 30 + 1
    assert "30 tokens in" in err


def test_a_character_that_it_does_not_know_is_one_sentence(characters, capsys):
    code, out, err = call(capsys, characters, "--prompt", "€")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "and not '€': leave them out of the prompt" in err


def test_where_the_text_has_no_line_break_an_empty_prompt_is_its_first_character(characters, tmp_path, capsys):
    content = train.load_checkpoint(characters)
    vocabulary = ["\r" if c == "\n" else c for c in content["tokenizer"]["vocabulary"]]
    changed = {"tokenizer": content["tokenizer"] | {"vocabulary": vocabulary}}
    torch.save(content | changed | {"config": content["config"] | {"prompt": "€"}}, tmp_path / "odd.pt")
    assert sample.Writer(tmp_path / "odd.pt", "cpu", "off").trained_prompt == vocabulary[0]
    assert call(capsys, str(tmp_path / "odd.pt"), "--max_new_tokens", 3)[0] == 0
    assert call(capsys, str(tmp_path / "odd.pt"), "--max_new_tokens", 3, "--prompt", "")[0] == 0
