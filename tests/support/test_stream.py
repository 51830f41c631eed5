"""Streamed documents: what is read of them, in which order, and how a run goes on with them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, log_of, rows_of, same_weights, tiny_flags, weights_of, without_times

import export_hf
import train
import update_readme
from support import stream
from support.checkpoint import load_checkpoint
from support.cli import RunError, UsageError
from support.machine import Runtime
from support.tokenizer import load_tokenizer

pytest.importorskip("datasets")
CPU = Runtime(torch.device("cpu"), None, None, "")


@pytest.fixture
def shards(tmp_path):
    """--dataset of three files with seven documents each, all different."""
    for shard in range(3):
        with (tmp_path / f"part-{shard}.jsonl").open("w") as f:
            for i in range(7):
                f.write(json.dumps({"text": f"Shard {shard} has a document of number {i}.", "id": i}) + "\n")
    return f"jsonl:{tmp_path}/part-*.jsonl"


@pytest.fixture
def config(shards):
    return train.TrainConfig(dataset=shards, seq_len=16, batch_size=2, grad_accum=2, target_loss=0, steps=1)


def texts_of(documents: stream.Documents, count: int | None = None) -> list[str]:
    """So many, or an epoch."""
    if count is None:
        return list(iter(lambda: documents.next(ends=True), None))
    return [documents.next() for _ in range(count)]


def batcher_of(config, runtime=CPU) -> stream.StreamBatcher:
    tokenizer, corpus = stream.open_dataset(config)
    return corpus.batches(config, tokenizer, runtime)


# ---- documents ----


def test_an_epoch_has_each_document_once_and_the_shards_in_another_order_than_the_one_before(shards):
    documents = stream.Documents(stream.source_of(shards, "text"), seed=1)
    epochs = [texts_of(documents) for _ in range(4)]
    assert all(len(set(epoch)) == 21 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = stream.Documents(stream.source_of(shards, "text"), seed=1)
    assert [texts_of(again) for _ in range(4)] == epochs


def test_processes_share_the_documents(shards):
    source = stream.source_of(shards, "text")
    shares = [texts_of(stream.Documents(source, seed=1, rank=rank, processes=2)) for rank in range(2)]
    assert len(shares[0]) + len(shares[1]) == 21
    assert not set(shares[0]) & set(shares[1])


def test_documents_go_on_exactly_three_times_in_a_shard_and_over_the_end_of_an_epoch(shards):
    source = stream.source_of(shards, "text")
    whole = texts_of(stream.Documents(source, seed=1), 60)
    told = []
    state = None
    for count in (5, 4, 12, 25, 14):  # the third one ends where the epoch does
        documents = stream.Documents(source, seed=1)
        if state:
            documents.load_state_dict(json.loads(json.dumps(state)))
        told += texts_of(documents, count)
        state = documents.state_dict()
    assert told == whole


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_texts_and_parquet_are_read_too(kind, tmp_path):
    import datasets

    documents = ["One.\n\nThe same one.", "Two."]
    for i, text in enumerate(documents):
        if kind == "text":
            (tmp_path / f"{i}.text").write_text(text)
        else:
            datasets.Dataset.from_dict({"body": [text]}).to_parquet(tmp_path / f"{i}.parquet")
    source = stream.source_of(f"{kind}:{tmp_path}/**/*.{kind}", "body")
    assert texts_of(stream.Documents(source)) == documents


def test_a_field_that_is_not_there_is_named_with_those_that_are(shards):
    with pytest.raises(UsageError, match=r"has no field 'body', but id, text: choose one by --text_field"):
        stream.Documents(stream.source_of(shards, "body")).next()
    with pytest.raises(UsageError, match=r"holds int, not text"):
        stream.Documents(stream.source_of(shards, "id")).next()


def test_documents_without_any_text_are_an_error_and_no_endless_search(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n' * 3)
    with pytest.raises(RunError, match="has no text in its field 'text'"):
        stream.Documents(stream.source_of(f"jsonl:{tmp_path}/a.jsonl", "text")).next()


# ---- batches ----


def test_rows_follow_each_other_and_overlap_by_one_token(config):
    batcher = batcher_of(config)
    rows = [batcher.next_batch() for _ in range(9)]
    read = torch.cat([idx.flatten() for idx, _ in rows]).tolist()
    targets = torch.cat([targets.flatten() for _, targets in rows]).tolist()
    assert targets[:-1] == read[1:]
    tokenizer = load_tokenizer()
    documents = stream.Documents(stream.source_of(config.dataset, "text"), seed=config.seed)
    expected = []
    while len(expected) < len(read):
        expected += [*tokenizer.encode(documents.next()), tokenizer.end_of_text]
    assert read == expected[: len(read)]


def test_batches_go_on_exactly(config):
    whole = batcher_of(config)
    expected = [whole.next_batch()[0] for _ in range(60)]
    assert whole.passes() > 2
    told = []
    state = None
    for count in (6, 2, 32, 20):  # whole steps of two batches
        batcher = batcher_of(config)
        if state:
            batcher.load_state_dict(state)
        told += [batcher.next_batch()[0] for _ in range(count)]
        state = batcher.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(told, expected, strict=True))


def test_a_held_out_document_is_never_trained_on(config):
    config.val_documents = 4
    tokenizer, corpus = stream.open_dataset(config)
    held_out = tokenizer.decode(corpus.tokens.tolist()).split("<|endoftext|>")[:-1]
    assert held_out == [f"Shard 0 has a document of number {i}." for i in range(4)]
    batcher = corpus.batches(config, tokenizer, CPU)
    read = tokenizer.decode(torch.cat([batcher.next_batch()[0].flatten() for _ in range(40)]).tolist())
    assert batcher.passes() >= 1
    assert "Shard 0 has a document of number 5." in read
    assert not any(document in read for document in held_out)


def test_another_number_of_processes_does_not_share_the_stream_anew(config):
    state = batcher_of(config).state_dict()
    two = batcher_of(config, Runtime(torch.device("cpu"), None, None, "", rank=0, world_size=2))
    with pytest.raises(UsageError, match="was read by 1 processes, and 2 are here"):
        two.load_state_dict(state)


# ---- the network ----


def test_a_fault_of_the_network_is_tried_again_later_each_time(config, monkeypatch):
    waits = []
    monkeypatch.setattr(stream.time, "sleep", waits.append)
    faults = iter([ConnectionError("gone"), TimeoutError("slow")])
    real = stream.Documents.read

    def read(self):
        fault = next(faults, None)
        if fault:
            raise fault
        return real(self)

    expected = batcher_of(config).next_batch()[0]
    batcher = batcher_of(config)
    monkeypatch.setattr(stream.Documents, "read", read)
    assert torch.equal(batcher.next_batch()[0], expected)
    assert waits == [1, 2]


def broken_after(documents: int, monkeypatch) -> None:
    """The network is gone for good after so many reads."""
    reads = itertools.count()
    real = stream.Documents.read

    def read(self):
        if next(reads) >= documents:
            raise ConnectionError("Name or service not known")
        return real(self)

    monkeypatch.setattr(stream.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(stream.Documents, "read", read)


SETTINGS = {"steps": 12, "save_every": 100, "num_prompts": 1, "seq_len": 16, "batch_size": 2, "target_loss": 0}


def flags(out, shards, **changes) -> list[str]:
    words = tiny_flags(out, **SETTINGS | {"dataset": shards} | changes)
    at = words.index("--input_file")
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize("documents", [45, 46, 47])  # a step takes two or three: so also in the middle of one
def test_a_stream_that_breaks_off_leaves_a_checkpoint_and_the_run_goes_on_exactly(
    tmp_path, shards, monkeypatch, capsys, documents
):
    assert train.main(flags(tmp_path / "whole", shards)) == 0
    with monkeypatch.context() as patch:
        broken_after(documents, patch)
        assert train.main(flags(tmp_path / "broken", shards)) == 1
    said = capsys.readouterr().err
    assert "can't be read (ConnectionError: Name or service not known), tried 7 times" in said
    step = load_checkpoint(tmp_path / "broken" / "checkpoints" / "last.pt")["step"]
    assert 1 < step < 12
    record = json.loads((tmp_path / "broken" / "run.json").read_text())
    assert record["ended"].startswith("failed: jsonl:")
    assert train.main(flags(tmp_path / "broken", shards, resume="auto")) == 0
    assert without_times(rows_of(tmp_path / "broken")) == without_times(rows_of(tmp_path / "whole"))
    assert same_weights(weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole"))


# ---- a run ----


def test_a_run_on_a_stream_claims_no_pass(tmp_path, shards, monkeypatch):
    out = tmp_path / "out"
    changes = {"val_documents": 4, "avg_steps": 5, "target_loss": 20, "eval_every": 5}
    assert train.main(flags(out, shards, **changes)) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["ended"] == "target reached"
    assert record["steps"] == 5  # no mean of five steps is there before
    assert record["corpus"]["tokens"] is None
    log = log_of(out)
    assert "proving it over the held-out documents" in log
    assert "a stream, without a pass" in log
    readme = tmp_path / "mine.md"
    assert update_readme.main(["--init", str(readme)]) == 0
    assert update_readme.main(["--readme", str(readme), "--run_dir", str(out)]) == 0
    text = readme.read_text()
    summary = text[text.index("SUMMARY:START") : text.index("SUMMARY:END")]
    assert "final_loss, over the held-out documents" in summary
    assert "(the last 5 steps)" in summary
    assert "full pass" not in summary
    assert export_hf.main(["--checkpoint", str(out / "checkpoints/best.pt"), "--out_dir", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "on the documents of `jsonl:" in card
    assert "pass of the text" not in card
    assert "by heart" not in card


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": "jsonl:nowhere/*.jsonl"}, "names no file"),
        ({"dataset": "csv:a.csv"}, "isn't a data set: use jsonl:FILES"),
        ({"target_loss": 0.1}, "target_loss can't be proven on a stream without held-out documents"),
        ({"tokenizer": "char"}, "tokenizer char needs to see all of a text"),
        ({"val_fraction": 0.1}, "val_fraction needs a text that has an end"),
        ({"steps": None, "epochs": 2}, "a stream has no pass to count: add --steps_per_epoch"),
        ({"dataset": "", "val_documents": 3}, "val_documents and val_dataset are of --dataset"),
    ],
)
def test_settings_that_a_stream_cannot_have_are_told(config, changes, sentence):
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(UsageError, match=sentence):
        config.validate()


def test_without_the_library_one_sentence_says_how_to_get_it(config, monkeypatch):
    monkeypatch.setattr(stream, "is_installed", lambda: False)
    with pytest.raises(UsageError, match=r"pip install -r requirements-data.txt"):
        config.validate()
    assert (ROOT / "requirements-data.txt").exists()


def test_the_releases_of_the_library_that_lose_their_place_are_refused(monkeypatch):
    for version, good in {"4.8.4": False, "4.8.5": True, "5.0.0": False, "5.0.1": True}.items():
        monkeypatch.setattr(stream.importlib.metadata, "version", lambda name, version=version: version)
        assert stream.is_installed() == good


def test_ids_are_kept_as_the_held_out_text_has_them(config):
    config.val_documents = 2
    tokenizer, corpus = stream.open_dataset(config)
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens[-1] == tokenizer.end_of_text
