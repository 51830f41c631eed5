"""benchmarks/, experiments/ and assets/screenshots.py: they can be started, and their small functions do what they say.
Nothing here is timed."""

from __future__ import annotations

import dataclasses
import importlib
import json

import pytest
import torch
from conftest import PLAY, ROOT, tiny_flags

import train
from support.inference import Request, Writer, generate
from support.kernels import attention_by_products
from support.presets import PRESETS

BENCHMARKS = ("billion", "checkpoints", "gpu_check", "growth", "large_text", "onnx_check", "overhead", "sampling")
BENCHMARKS += ("scaling", "throughput")
EXPERIMENTS = ("embeddings", "four_errors", "muon_for_experts", "muon_sweep", "recipe")

with pytest.MonkeyPatch.context() as patch:  # where the scripts find each other
    for folder in ("benchmarks", "experiments", "assets"):
        patch.syspath_prepend(str(ROOT / folder))
    scripts = {name: importlib.import_module(name) for name in (*BENCHMARKS, *EXPERIMENTS, "screenshots")}
    common = importlib.import_module("common")
    peers = importlib.import_module("peers")

checkpoints = scripts["checkpoints"]
embeddings = scripts["embeddings"]
growth = scripts["growth"]
large_text = scripts["large_text"]
onnx_check = scripts["onnx_check"]
overhead = scripts["overhead"]
muon_sweep = scripts["muon_sweep"]
recipe = scripts["recipe"]
sampling = scripts["sampling"]
scaling = scripts["scaling"]
throughput = scripts["throughput"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    assert train.main(tiny_flags(folder)) == 0
    return folder


@pytest.mark.parametrize("name", scripts)
def test_each_script_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as end:
        scripts[name].main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"{name}.py" in shown.splitlines()[0]
    assert "examples:" in shown


@pytest.mark.parametrize("name", scripts)
def test_an_unknown_flag_is_refused(name):
    with pytest.raises(SystemExit) as end:
        scripts[name].main(["--nonsense"])
    assert end.value.code == 2


# ---- common.py ----


def test_a_spread_is_the_median_and_both_ends():
    assert common.spread([3.0, 1.0, 2.0]) == "2.0 (1.0 to 3.0)"
    assert common.spread([3.0, 1.0, 2.0], 0) == "2 (1 to 3)"


def test_a_table_is_markdown(capsys):
    common.print_header("a", "b")
    common.print_row("x", 1)
    assert capsys.readouterr().out == "| a | b |\n| --- | --- |\n| x | 1 |\n"


def test_a_function_runs_in_a_process_of_its_own():
    assert common.apart(growth.doubled, 5) == [1, 2, 4]


def test_what_fails_apart_is_told_in_its_last_words():
    with pytest.raises(common.Failed, match="nonsense"):
        common.apart(common.run_train, ["--steps", "1", "--nonsense"])


def test_a_watched_method_leaves_a_span_and_does_its_work():
    class Owner:
        def double(self, number):
            return 2 * number

    spans = []
    common.watch(Owner, "double", spans)
    assert Owner().double(4) == 8
    name, begin, end = spans[0]
    assert name == "double"
    assert begin <= end


# ---- checkpoints.py and overhead.py: from spans to costs ----

ALONE = [("train_step", float(i), i + 1.0) for i in range(10)]  # ten steps of a second each, nothing between them


def test_a_save_costs_what_the_steps_beside_it_take_longer():
    steps = [0.0, 1.0, 2.0, 3.0, 4.5, 6.0, 7.0, 8.0]  # from 3.0 on, two steps take half a second longer
    spans = [("train_step", begin, begin + 0.9) for begin in steps]
    spans += [("save", 3.9, 4.2), ("write", 4.2, 5.9)]
    found = checkpoints.costs(spans)
    assert found["step"] == pytest.approx(1.0)
    assert found["held"] == pytest.approx(0.3)
    assert found["write"] == pytest.approx(1.7)
    assert found["lost"] == pytest.approx(1.0)


def test_the_save_at_the_end_of_a_run_costs_training_nothing():
    at_the_end = [("save", 10.0, 14.0), ("write", 14.0, 20.0)]
    assert checkpoints.costs([*ALONE, *at_the_end]) == {"step": 1.0, "held": 0.0, "write": 0.0, "lost": 0.0}


def test_a_write_that_never_ends_is_no_measurement():
    with pytest.raises(SystemExit, match="--every"):
        checkpoints.costs([*ALONE, ("save", 0.5, 0.6), ("write", 0.6, 20.0)])


def test_saves_come_by_steps_and_by_minutes():
    assert checkpoints.saves_per_step(1.0, save_every=100, save_minutes=15) == 1 / 100
    assert checkpoints.saves_per_step(20.0, save_every=100, save_minutes=15) == 3 / 100  # after 15, 30 and 33 minutes


def test_the_speed_at_default_intervals_counts_what_is_lost():
    run = {"step": 1.0, "held": 0.1, "write": 2.0, "lost": 10.0, "tokens": 1000, "memory": 5e9}
    row = checkpoints.table_row("in the background", [run], save_every=90, save_minutes=15)
    expected = ["in the background", "0.10 s", "2.00 s", "10.00 s", "1000.0", "900.0 (-10.00%)", "5.00 GB"]
    assert row == expected


def test_the_loop_costs_what_is_left_beside_its_parts():
    spans = []
    for i in range(10):
        spans.append(("train_step", i * 2.0, i * 2.0 + 1.0))
        spans.append(("log_step", i * 2.0 + 1.0, i * 2.0 + 1.25))
    spans.append(("write_samples", 13.25, 13.75))
    found = overhead.loop_costs(spans)
    assert found["step"] == 1.0
    assert found["line"] == 0.25
    assert found["samples"] == 0.5
    assert found["rest"] == pytest.approx(0.75 - 0.5 / 4)  # of four rounds, one had the samples


@pytest.mark.parametrize(
    "script, arguments",
    [
        pytest.param(checkpoints, ["waited for"], id="saves", marks=pytest.mark.slow),
        pytest.param(overhead, [], id="loop"),
    ],
)
def test_a_run_leaves_a_span_of_each_part(script, arguments, tmp_path):
    flags = [*common.SMALL, "--input_file", str(PLAY), "--out_dir", str(tmp_path / "out"), "--steps", "4"]
    flags += ["--save_every", "2", "--sample_every", "2", "--max_new_tokens", "2", "--device", "cpu"]
    if script is overhead:
        spans = common.apart(script.timed_run, flags, 0.0)
        parts = {"train_step", "log_step", "write_samples"}
    else:
        spans, memory = common.apart(script.timed_run, *arguments, flags)
        parts = {"train_step", "save", "write"}
        assert memory > 1e8
    names = [name for name, _, _ in spans]
    assert set(names) == parts
    assert names.count("train_step") == 4


# ---- growth.py and large_text.py ----


def test_one_thing_is_varied_at_a_time():
    base = peers.Setup(batch_size=8, seq_len=256)
    rows = list(growth.variations(base, largest=4, sequences=(64,), depths=(3,)))
    sizes = [(setup.batch_size, setup.seq_len, setup.grad_accum, setup.n_layer) for _, setup in rows]
    assert sizes[:3] == [(1, 256, 1, 12), (2, 256, 1, 12), (4, 256, 1, 12)]
    assert sizes[3:5] == [(8, 64, 1, 12), (32, 64, 1, 12)]
    assert sizes[5:8] == [(1, 256, 2, 12), (1, 256, 4, 12), (1, 256, 8, 12)]
    assert sizes[8:] == [(8, 256, 1, 3)]


def test_the_made_text_has_its_size_and_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        large_text.write_text(tmp_path / name, 1)
    made = (tmp_path / "a").read_bytes()
    assert 1_000_000 <= len(made) < 1_050_000
    assert made == (tmp_path / "b").read_bytes()


# ---- throughput.py and peers.py ----


def test_the_batches_are_long_enough_for_any_setup():
    batcher = peers.make_batcher(peers.Setup(batch_size=16, seq_len=256))
    idx, targets = batcher.next_batch()
    assert idx.shape == (16, 256)
    assert torch.equal(idx.flatten()[1:], targets.flatten()[:-1])


def test_a_preset_brings_its_own_batch():
    setup = peers.Setup(batch_size=8, seq_len=64)
    of = {}
    for name, peer in peers.PEERS.items():
        mine = peer.setup(setup)
        of[name] = (mine.batch_size, mine.seq_len)
    assert of["train.py"] == (8, 64)
    assert of["train.py --preset shakespeare"] == (8, 256)
    assert of["train.py --preset adamw"] == (1, 1024)
    assert of["train.py --preset demo"] == (1, 256)


def test_what_is_left_out_is_a_peer():
    for names in peers.UNUSUAL.values():
        assert set(names) < set(peers.PEERS)


def test_torch_s_own_attention_is_the_same_attention():
    q, k, v = torch.randn(3, 2, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(peers.torch_attention(q, k, v, 0.0), attention_by_products(q, k, v, 0.0))


@pytest.mark.parametrize("name", ["train.py --amp off", "train.py --preset shakespeare", "plain loop, fp32"])
def test_a_peer_trains(name, monkeypatch):
    monkeypatch.setattr(train, "attention_by_products", train.attention_by_products)  # put back after the test
    setup = peers.Setup(batch_size=1, seq_len=8, n_layer=1)
    peer = peers.PEERS[name]
    step = peer.make(setup, peers.make_batcher(setup), **peer.options)
    assert step().item() == pytest.approx(10.9, abs=1)  # log 50,257 = 10.8
    plain = name.startswith("plain")
    assert (train.attention_by_products is peers.torch_attention) == plain


def test_a_peer_that_fails_is_named_and_left_out(monkeypatch, capsys):
    def apart(function, name, sizes):
        if name == "plain loop, fp32":
            raise common.Failed("no such package")
        return {"rate": 100.0, "losses": [10.9]}

    monkeypatch.setattr(throughput, "apart", apart)
    results = throughput.take_turns(["train.py", "plain loop, fp32"], peers.Setup(), rounds=2, quick=False)
    assert list(results) == ["train.py"]
    assert len(results["train.py"]) == 2
    assert "plain loop, fp32 is left out: no such package" in capsys.readouterr().err


def test_a_row_compares_the_turns_of_the_same_round():
    turns = [{"rate": rate, "memory": 2e9, "share": 0.5, "tokens": "8 x 256 x 1"} for rate in (100.0, 200.0)]
    mine = [{"rate": 300.0}, {"rate": 400.0}]
    row = throughput.table_row("peer", turns, mine)
    assert row == ["peer", "8 x 256 x 1", "150 (100 to 200)", "2.50", "2.0 GB", "0.50 (0.50 to 0.50)"]
    assert throughput.table_row("peer", turns, [])[3] == "-"


# ---- sampling.py ----


def test_both_ways_of_sampling_write_the_same_text(run_dir):
    writer = Writer(run_dir / "checkpoints" / "last.pt", train.ARCHITECTURES, device="cpu", amp="off")
    request = Request("BIANCA:\n", max_new_tokens=6, temperature=0)
    text = sampling.cached(writer, request)
    assert text
    assert sampling.uncached(writer, request) == text


def test_the_sampling_table_has_a_row_for_each_precision(run_dir, capsys):
    sampling.main(["--checkpoint", str(run_dir / "checkpoints" / "last.pt"), "--tokens", "4", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("| fp32")


# ---- experiments/ ----


def test_the_embedding_table_counts_every_token_once(run_dir, capsys):
    embeddings.main(["--checkpoint", str(run_dir / "checkpoints" / "last.pt")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("last.pt, step 6")
    cells = [line.split("|")[2].strip().replace(",", "") for line in lines if line.count("|") > 2]
    assert sum(int(cell) for cell in cells if cell.isdigit()) == 50257


def test_moving_together_is_told_from_moving_apart():
    before = torch.zeros(2, 2)
    together = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    apart = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert embeddings.distances(before, together) == (5.0, 5.0, 5.0)
    assert embeddings.distances(before, apart) == (5.0, 5.0, 0.0)


def test_embeddings_of_loaded_weights_have_no_drawn_beginning():
    with pytest.raises(SystemExit, match="hf"):
        embeddings.initial_embedding({"origin": "hf"})


def test_a_set_of_flags_is_read_or_refused():
    assert recipe.read_set(["--lr", "4e-4", "--batch_size", "2"]) == {"lr": 4e-4, "batch_size": 2}
    with pytest.raises(ValueError, match=r"'x' isn't a number.*preset has no effect"):
        recipe.read_set(["--lr", "x", "--preset", "demo"])


def test_the_slice_is_the_beginning_of_the_text():
    beginning, tokens = recipe.cut_text(str(PLAY), 100)
    assert PLAY.read_text(encoding="utf-8").startswith(beginning)
    assert abs(tokens - 100) <= 1


def test_a_line_has_the_loss_after_each_pass_and_the_tokens_to_the_target():
    losses = (9.0, 0.05, 2.0, 0.5, 0.09, 0.08)
    rows = []
    for i, loss in enumerate(losses, 1):
        rows.append({"step": str(i), "tokens": str(i * 1000), "avg_loss": str(loss)})
    assert recipe.cells(rows, a_pass=2, passes=3, target=0.1) == ["0.050", "0.500", "0.080", "2,000"]
    assert recipe.cells(rows[:3], a_pass=2, passes=3, target=0.01) == ["0.050", "", "", "not in these"]


def test_a_run_that_fails_gives_its_reason(tmp_path):
    with pytest.raises(ValueError, match="doesn't exist"):
        recipe.run(["--input_file", str(tmp_path / "none.txt")], tmp_path / "out", threads=1)


# ---- scaling.py ----


def test_more_gpus_are_never_worth_more_than_their_number():
    for one in scaling.TRAININGS:
        for way in ("ddp", "fsdp", "hsdp"):
            shares = [scaling.efficiency(one, way, gpus) for gpus in (1, 8, 64, 512)]
            assert shares == sorted(shares, reverse=True)
            assert shares[0] == 1


def test_what_travels_is_eight_bytes_a_parameter_or_twelve():
    """On two GPUs of a machine, half of it is each one's own."""
    one = scaling.XL
    hops = 3 * 49 * one.cluster.hop
    assert scaling.traffic_seconds(one, "ddp", 2) == pytest.approx(4 * one.parameters / 370e9, rel=0.05)
    assert scaling.traffic_seconds(one, "fsdp", 2) - hops == pytest.approx(6 * one.parameters / 370e9)
    assert scaling.traffic_seconds(one, "hsdp", 2) == scaling.traffic_seconds(one, "fsdp", 2)


def test_predictions_are_near_what_others_measured():
    for _, what, predicted, measured in scaling.checks():
        assert float(predicted) == pytest.approx(float(measured), rel=0.1 if "seconds" in what else 0.015)


def test_a_step_of_eight_windows_has_no_work_for_more_gpus(capsys):
    scaling.main([])
    recipe = capsys.readouterr().out.split("--preset shakespeare")[1]
    assert "| 8 | 1 |" in recipe
    assert "| 16 | a step has only 8 |" in recipe


# ---- muon_sweep.py ----

SMALL_RECIPE = "--n_layer 1 --n_head 2 --n_embd 16 --batch_size 2 --seq_len 32 --steps 8 --warmup_steps 3 --tokens 500"


@pytest.mark.parametrize("shift", [False, True])
def test_a_recipe_is_trained_as_train_py_does_it(tiny, make_trainer, shift):
    config = tiny(**PRESETS["shakespeare"] | {"batch_size": 2, "steps": 8, "warmup_steps": 3, "shift_windows": shift})
    config = dataclasses.replace(config, n_layer=1, block_size=1024, amp="auto")
    trainer = make_trainer(config)
    tokens = trainer.batcher.tokens
    words = SMALL_RECIPE.replace("--tokens 500", "--shift_windows" if shift else "")
    run = muon_sweep.Run(words, tokens, torch.device("cpu"))
    before = [p.detach().clone() for p in run.model.parameters()]
    for _ in range(8):
        trainer.train_step()
        over = run.advance()
        assert run.losses[run.done - 1].item() == pytest.approx(trainer.progress.loss.item(), abs=1e-4)
    assert over
    assert run.a_pass == trainer.batcher.n_batches
    for first, a, b in zip(before, trainer.model.parameters(), run.model.parameters(), strict=True):
        assert (a - b).norm() < 0.01 * (a - first).norm()


@pytest.mark.parametrize("way", ["--attention whole", "--attention heads --mlp_block 8", "--way mud1", "--anneal flat"])
def test_a_recipe_may_have_what_train_py_has_not(way):
    tokens = torch.arange(500).numpy()
    usual = muon_sweep.Run(SMALL_RECIPE, tokens, torch.device("cpu"))
    other = muon_sweep.Run(f"{SMALL_RECIPE} {way}", tokens, torch.device("cpu"))
    for run in (usual, other):
        while not run.advance():
            pass
    assert usual.losses[0] == other.losses[0]
    assert usual.losses[-1] != other.losses[-1]
    assert other.row()["steps"] == 8
    assert len(other.row()["avg_loss"]) == 1


def test_heads_and_neurons_stand_one_above_another_or_side_by_side():
    run = muon_sweep.Run(
        f"{SMALL_RECIPE} --attention heads --mlp_block 8", torch.arange(500).numpy(), torch.device("cpu")
    )
    torch.manual_seed(0)
    into = torch.randn(1, 48, 16)
    out_of = torch.randn(1, 16, 64)
    assert run.cut("attn.c_attn.weight", into).shape == (1, 6, 8, 16)
    assert torch.equal(run.cut("attn.c_attn.weight", into)[0, 1], into[0, 8:16])
    assert run.cut("mlp.c_proj.weight", out_of).shape == (1, 8, 16, 8)
    assert torch.equal(run.cut("mlp.c_proj.weight", out_of)[0, 1], out_of[0, :, 8:16])
    for name, stack in (("attn.c_attn.weight", into), ("mlp.c_proj.weight", out_of)):
        done = run.cut(name, run.orthogonalized(name, stack))
        values = torch.linalg.svdvals(done) / (0.2 * 16**0.5)
        assert values.min() > 0.5
        assert values.max() < 1.2


def test_decorrelated_rows_are_nearly_orthogonal():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 32)
    x[:, 1] += 3 * x[:, 0]
    done = muon_sweep.decorrelated(x, 2)
    before = torch.linalg.svdvals(torch.nn.functional.normalize(x, dim=2))
    after = torch.linalg.svdvals(done)
    assert (after - 1).abs().max() < 0.2 < (before - 1).abs().max()
    torch.testing.assert_close(muon_sweep.decorrelated(x.mT, 2), done.mT)


def test_a_recipe_that_is_behind_ends():
    tokens = torch.arange(500).numpy()
    for most, steps in (("1", 8), ("99", 16)):
        words = f"{SMALL_RECIPE} --steps 16 --behind 1:{most}"
        run = muon_sweep.Run(words, tokens, torch.device("cpu"))
        while not run.advance():
            pass
        assert run.done == steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--way mud3", "invalid choice: 'mud3'"),
        ("--attention head", "invalid choice: 'head'"),
        ("--anneal flatt", "invalid choice: 'flatt'"),
        ("--mlp_block 1000", "--mlp_block 1000 doesn't divide the 3072 neurons of a block"),
        ("--behind 2.9", "--behind 2.9 isn't PASS:LOSS, as 4:2.9"),
        ("--rate 3", "unrecognized arguments: --rate 3"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_before_the_first_run(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        muon_sweep.main(["", words, "--input_file", "not there"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_recipe_that_breaks_ends_and_is_still_json():
    run = muon_sweep.Run(f"{SMALL_RECIPE} --lr 1e30 --steps 99", torch.arange(500).numpy(), torch.device("cpu"))
    while not run.advance():
        pass
    assert run.done == 8  # a pass
    assert json.dumps(run.row(), allow_nan=False)


# ---- onnx_check.py ----


class Theirs:
    """Stands for a model of optimum: writes what ours writes, but for one token that is wrong."""

    def __init__(self, model, wrong_at: int):
        self.model = model
        self.wrong_at = wrong_at

    def generate(self, idx, attention_mask, do_sample, max_new_tokens):
        written = generate(self.model, idx, max_new_tokens, temperature=0)
        written[0, idx.size(1) + self.wrong_at :] += 1
        return written


@pytest.mark.parametrize("wrong_at", [0, 3, 8])
def test_onnx_check_counts_tokens_up_to_the_first_that_differs(run_dir, wrong_at):
    writer = Writer(run_dir / "checkpoints" / "best.pt", train.ARCHITECTURES, "cpu", "off")

    def tokens(prompt):
        return {"input_ids": writer.tokenizer.encode(prompt)}

    theirs = Theirs(writer.model, wrong_at)
    assert onnx_check.compare(writer, theirs, tokens, "TILDA:", 8) == wrong_at
    assert onnx_check.compare(writer, theirs, lambda prompt: {"input_ids": [5]}, "TILDA:", 8) == 0


def test_onnx_check_says_what_is_missing(run_dir, tmp_path, capsys):
    flags = ["--checkpoint", str(run_dir / "checkpoints" / "best.pt"), "--onnx", str(tmp_path)]
    assert onnx_check.main(flags) == 2
    assert capsys.readouterr().err.count("\n") == 1
