"""The web page: its server's rules, and a real browser."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gradio_client
import pytest
import torch
from conftest import ROOT, TINY

import app
import train

CHROMIUM = ""
for name in ("chromium", "chromium-browser", "google-chrome"):
    CHROMIUM = CHROMIUM or shutil.which(name) or ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("app") / "out"
    settings = {"out_dir": str(out_dir), "steps": 45, "num_prompts": 1, "prompt": "TILDA:\n"}
    train.train(train.TrainConfig(**{**TINY, **settings}))
    return out_dir / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def page(checkpoint):
    return app.Page(checkpoint, "cpu", "off")


VALUES = {"prompt": "TILDA:", "max_new_tokens": 5, "num_samples": 2, "temperature": 0.9, "top_k": 50, "seed": 1}


def updates(page, **changes) -> list[list]:
    return list(page.write(*(VALUES | changes).values()))


def texts_of(update) -> list[str]:
    return [box["value"] for box in update[: app.BOXES] if box["visible"]]


def fields_of(update) -> dict[str, dict]:
    return dict(zip(app.FIELDS, update[app.BOXES : -1], strict=True))


# ---- what the server answers ----


def test_each_sample_has_a_box_of_its_own(page):
    last = updates(page, num_samples=3)[-1]
    assert [box["visible"] for box in last[: app.BOXES]] == [True, True, True, False]
    texts = texts_of(last)
    assert all(text.startswith("TILDA:") and len(text) > 8 for text in texts)
    assert len(set(texts)) == 3
    assert "5 of 5 tokens" in last[-1]


def test_text_streams_in(page):
    all_updates = updates(page, max_new_tokens=400)
    lengths = [len(texts_of(update)[0]) for update in all_updates]
    assert len(lengths) > 2
    assert lengths == sorted(set(lengths))


def test_the_same_seed_gives_the_same_text(page):
    assert texts_of(updates(page)[-1]) == texts_of(updates(page)[-1]) != texts_of(updates(page, seed=2)[-1])


def test_numbers_of_a_browser_may_all_be_floats(page):
    assert texts_of(updates(page, max_new_tokens=5.0, top_k=50.0, seed=1.0)[-1]) == texts_of(updates(page)[-1])


def test_an_empty_prompt_starts_from_a_line_break(page):
    assert texts_of(updates(page, prompt="")[-1])[0]


def test_of_a_long_prompt_the_end_is_read_and_the_page_says_so(page):
    assert "its last 64 tokens are read" in updates(page, prompt="word " * 99)[-1][-1]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_new_tokens", None, "this is empty: enter a number from 1 to 1,000"),
        ("max_new_tokens", 0, "this is empty: enter a number from 1 to 1,000"),
        ("max_new_tokens", 1001, "1,001 is out of bounds: use 1 to 1,000"),
        ("max_new_tokens", 10**30, "is out of bounds: use 1 to 1,000"),
        ("max_new_tokens", "5", "'5' isn't a whole number: use one from 1 to 1,000"),
        ("num_samples", 5, "5 is out of bounds: use 1 to 4"),
        ("num_samples", 0, "this is empty: enter a number from 1 to 4"),
        ("num_samples", 1.5, "1.5 isn't a whole number: use one from 1 to 4"),
        ("temperature", None, "this is empty: enter a number from 0.0 to 5.0"),
        ("temperature", 5.5, "5.5 is out of bounds: use 0.0 to 5.0"),
        ("temperature", float("nan"), "nan is out of bounds: use 0.0 to 5.0"),
        ("top_k", -1, "-1 is out of bounds: use 0 to 50,257"),
        ("seed", {"a": 1}, "isn't a whole number: use one from 0 to 4,294,967,295"),
        ("seed", True, "isn't a whole number"),
        ("prompt", "x" * 20_001, "20,001 characters are too many: at most 20,000"),
    ],
)
def test_wrong_input_is_said_beside_its_field_whatever_the_browser_sends(page, monkeypatch, field, value, said):
    monkeypatch.setattr(page.writer, "write", None)  # nothing is computed
    (only,) = updates(page, **{field: value})
    fields = fields_of(only)
    assert said in fields[field]["info"]
    assert fields[field]["elem_classes"] == ["wrong"]
    assert all(fields[name]["info"] == app.INFO[name] for name in app.FIELDS if name != field)
    assert only[-1] == "Please put right what is marked."


def test_the_page_tells_its_own_bound_of_the_length():
    assert f"at most {app.BOUNDS['max_new_tokens'][1]:,};" in app.INFO["max_new_tokens"]


# ---- the checkpoint, and the records beside it ----


def test_with_a_checkpoint_that_is_not_there_the_page_says_what_to_do(tmp_path):
    page = app.Page(tmp_path / "out" / "checkpoints" / "none.pt")
    assert "doesn't exist" in page.status()
    assert "python train.py --preset demo" in page.status()
    (only,) = updates(page)
    assert only[-1] == page.status()
    assert "aren't beside the checkpoint" in page.training()[0]
    app.build(page)


def test_the_run_is_shown_with_its_curve_and_what_it_learned(page):
    text, curve = page.training()
    assert "steps done" in text
    assert "Longest run of each sample" in text
    assert curve.startswith("<svg")


def test_records_that_cannot_be_read_are_one_sentence(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    shutil.copyfile(checkpoint, tmp_path / "checkpoints" / "best.pt")
    (tmp_path / "run.json").write_text("{")
    text, curve = app.Page(tmp_path / "checkpoints" / "best.pt", "cpu", "off").training()
    assert "aren't there" in text
    assert "isn't JSON" in text
    assert curve == ""


def test_the_records_of_another_run_are_not_shown(checkpoint, tmp_path):
    """Above a checkpoint that stands elsewhere there may be anybody's logs."""
    elsewhere = tmp_path / "project" / "best.pt"
    elsewhere.parent.mkdir()
    shutil.copyfile(checkpoint, elsewhere)
    shutil.copytree(checkpoint.parent.parent / "logs", tmp_path / "logs")
    shutil.copyfile(checkpoint.parent.parent / "run.json", tmp_path / "run.json")
    assert "aren't beside the checkpoint" in app.Page(elsewhere, "cpu", "off").training()[0]


# ---- in a browser ----


@contextlib.contextmanager
def served(*flags):
    """The page's address; it runs in a process of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu", "--amp", "off", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


PALE = """() => {
    const parts = colour => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
    const light = colour => {
        const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = parts(colour).map(c => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if ((parts(colour)[3] ?? 1) > 0.5) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const words = [...document.querySelectorAll("body *")].filter(element =>
        [...element.childNodes].some(node => node.nodeType == 3 && node.textContent.trim())
        && element.checkVisibility({opacityProperty: true, visibilityProperty: true}) && element.offsetWidth > 1);
    return words.map(element => {
        const [a, b] = [light(getComputedStyle(element).color), light(paper(element))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim().slice(0, 40)];
    });
}"""  # the contrast of all words with what they stand on: WCAG 2, criterion 1.4.3


def pale_words(tab) -> list:
    found = tab.evaluate(PALE)
    assert len(found) > 15
    return [words for words in found if words[0] < 4.5]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page with a model that is large enough for a thousand tokens to take seconds."""
    out_dir = tmp_path_factory.mktemp("browser") / "out"
    shape = {"n_embd": 256, "n_layer": 6, "steps": 45}
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "num_prompts": 0, **shape}))
    with served("--checkpoint", str(out_dir / "checkpoints" / "best.pt")) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Faults:
    """What goes wrong in a tab, and which other hosts it asks."""

    def __init__(self, tab, url):
        self.found = []
        self.url = url
        tab.on("console", self.add_message)
        tab.on("pageerror", lambda error: self.found.append(str(error)))
        tab.on("request", self.add_request)

    def add_message(self, message) -> None:
        if message.type == "error":
            self.found.append(message.text)

    def add_request(self, request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.found.append(request.url)


@pytest.fixture
def tab(browser, url):
    """A tab that has the page open. At the end, nothing went wrong in it."""
    tab = browser.new_page(viewport={"width": 1200, "height": 1000})
    faults = Faults(tab, url)
    tab.goto(url)
    expect(tab, "#generate").to_be_visible()
    yield tab
    tab.close()
    assert faults.found == []


def expect(tab, selector, **options):
    from playwright.sync_api import expect

    expect.set_options(timeout=30_000)
    return expect(tab.locator(selector, **options))


needs_chromium = pytest.mark.skipif(
    not (CHROMIUM or os.environ.get("CI")), reason="needs chromium: apt-get install chromium"
)


@needs_chromium
def test_a_browser_shows_as_many_samples_as_were_asked_for(tab):
    expect(tab, "#status").to_contain_text("step 4")
    tab.fill("#prompt textarea", "AMBROSE:\n")
    tab.fill("#max_new_tokens input[type=number]", "30")
    tab.locator("#num_samples input[type=range]").press("ArrowRight")
    tab.click("#generate")
    expect(tab, ".sample textarea:visible").to_have_count(3)
    expect(tab, "#line").to_contain_text("30 of 30 tokens")
    tab.locator("#num_samples input[type=range]").press("ArrowLeft")
    tab.click("#generate")
    expect(tab, ".sample textarea:visible").to_have_count(2)
    expect(tab, "#line").to_contain_text("30 of 30 tokens")
    texts = [box.input_value() for box in tab.locator(".sample textarea:visible").all()]
    assert len(texts) == 2
    assert all(text.startswith("AMBROSE:\n") and len(text) > 20 for text in texts)


@needs_chromium
def test_a_browser_marks_what_is_wrong_until_it_is_right(tab):
    tab.fill("#max_new_tokens input[type=number]", "")
    tab.click("#generate")
    expect(tab, "#max_new_tokens").to_contain_text("this is empty: enter a number from 1 to 1,000")
    expect(tab, "#line").to_contain_text("Please put right what is marked.")
    tab.fill("#max_new_tokens input[type=number]", "4")
    tab.fill("#temperature input", "")
    tab.click("#generate")
    expect(tab, "#temperature").to_contain_text("this is empty")
    expect(tab, "#max_new_tokens").not_to_contain_text("empty")
    tab.fill("#temperature input", "0.5")
    tab.click("#generate")
    expect(tab, "#line").to_contain_text("4 of 4 tokens")


@needs_chromium
def test_a_second_user_waits_until_the_first_one_stops(tab, browser, url):
    second = browser.new_page()
    second.goto(url)
    tab.fill("#max_new_tokens input[type=number]", "1000")
    second.fill("#max_new_tokens input[type=number]", "3")
    tab.click("#generate")
    expect(tab, "#line").to_contain_text("of 1,000 tokens")
    second.click("#generate")
    time.sleep(0.5)
    assert "of 3 tokens" not in second.inner_text("#line")
    tab.click("#stop")
    expect(second, "#line").to_contain_text("3 of 3 tokens")
    assert "1,000 of 1,000" not in tab.inner_text("#line")
    second.close()


@needs_chromium
def test_a_click_takes_an_example_and_the_other_tab_shows_the_run(tab):
    tab.get_by_text("KING HENRY").click()
    tab.wait_for_function("document.querySelector('#prompt textarea').value == 'KING HENRY'")
    tab.get_by_role("tab", name="Training").click()
    expect(tab, "#summary").to_contain_text("steps done")
    expect(tab, "#curve svg").to_be_visible()


@needs_chromium
def test_all_words_can_be_read_also_on_a_phone_and_in_the_dark(tab, browser, url):
    assert pale_words(tab) == []
    phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
    phone.goto(url)
    expect(phone, "#generate").to_be_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360  # nothing to scroll sideways
    assert phone.evaluate("document.body.classList.contains('dark')")
    assert pale_words(phone) == []
    phone.close()


def test_a_program_that_uses_the_pages_own_door_is_told_the_same_each_time(url):
    client = gradio_client.Client(url, verbose=False)
    for _ in range(2):
        assert "Please put right" in client.predict("A", 5000, 2, 0.9, 50, 1, api_name="/write")[-1]


def test_there_is_no_door_past_the_queue(url):
    door = f"{url}/gradio_api/run/write"
    request = urllib.request.Request(door, b'{"data": []}', {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(request)


# ---- the command line ----


def test_a_port_that_is_taken_is_one_sentence(checkpoint, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "--port", str(s.getsockname()[1])]
        assert app.main(flags) == 1
    assert capsys.readouterr().err.rstrip().endswith("choose another --host or --port")


def test_flags_that_cannot_be_are_told_at_once(capsys):
    assert app.main(["--port", "99999", "--device", "cpu", "--amp", "fp16"]) == 2
    err = capsys.readouterr().err
    assert "port 99999 isn't from 1 to 65535" in err
    assert "amp fp16 on a CPU" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_one_sentence(capsys):
    assert app.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "app.py: device cuda isn't available here: use --device auto\n"


def test_where_there_is_no_run_one_sentence_says_what_to_type(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert app.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "python train.py --preset demo" in err


# ---- a model of characters ----


def test_a_character_that_the_model_does_not_know_is_marked_at_the_prompt(tmp_path):
    settings = {**TINY, "out_dir": str(tmp_path / "out"), "num_prompts": 0, "tokenizer": "char"}
    train.train(train.TrainConfig(**settings))
    page = app.Page(tmp_path / "out" / "checkpoints" / "last.pt", "cpu", "off")
    (update,) = updates(page, prompt="€")
    prompt = fields_of(update)["prompt"]
    assert "and not '€'" in prompt["info"]
    assert prompt["elem_classes"] == ["wrong"]
    assert texts_of(updates(page, prompt="AMBROSE:")[-1])[0].startswith("AMBROSE:")
    app.build(page)


def test_examples_are_those_that_the_model_can_read(page):
    assert page.examples()[0] == "TILDA:\n"
    assert set(app.EXAMPLES) <= set(page.examples())
    known = page.writer.tokenizer
    vocabulary = tuple("BIANC:\n")
    page.writer.tokenizer = type(known)("char", 7, list, bytes, vocabulary=vocabulary)
    try:
        assert page.examples() == ["TILDA:\n", "BIANCA:\n"]
    finally:
        page.writer.tokenizer = known
