"""The web page: its server's rules, and a real browser."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import gradio_client
import pytest
import torch
from conftest import PLAY, ROOT, TINY

import app
import train
import update_readme
from support import door, text
from support.checkpoint import load_checkpoint
from support.inference import PAGE_BOUNDS
from support.tokenizer import load_tokenizer

HOW_IT_WORKS = ROOT / "docs" / "how-it-works.md"
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
READER = SimpleNamespace(session_hash="reads", state=SimpleNamespace(came=0.0, read=["reads"]))


def updates(page, **changes) -> list[list]:
    return list(page.write(READER, *(VALUES | changes).values()))


def texts_of(update) -> list[str]:
    """What the boxes show, without what is marked in it and the note below it."""
    texts = []
    for box in update[: app.BOXES]:
        if box["visible"]:
            shown = re.sub("</?mark>|<pre>\n|</pre>.*", "", box["value"], flags=re.S)
            texts.append(html.unescape(shown))
    return texts


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
        ("max_new_tokens", "", "this is empty: enter a number from 1 to 1,000"),
        ("max_new_tokens", 1001, "1,001 is out of bounds: use 1 to 1,000"),
        ("max_new_tokens", 10**30, "is out of bounds: use 1 to 1,000"),
        ("max_new_tokens", "5", "'5' isn't a whole number: use one from 1 to 1,000"),
        ("num_samples", 5, "5 is out of bounds: use 1 to 4"),
        ("num_samples", 0, "0 is out of bounds: use 1 to 4"),
        ("num_samples", 1.5, "1.5 isn't a whole number: use one from 1 to 4"),
        ("temperature", None, "this is empty: enter a number from 0.0 to 100.0"),
        ("temperature", 100.5, "100.5 is out of bounds: use 0.0 to 100.0"),
        ("temperature", float("nan"), "nan is out of bounds: use 0.0 to 100.0"),
        ("top_k", -1, "-1 is out of bounds: use 0 to 1,000,000"),
        ("seed", {"a": 1}, "isn't a whole number: use one from 0 to 9,007,199,254,740,991"),
        ("seed", True, "isn't a whole number"),
        ("seed", ["x" * 1000], "x...x"),  # not all of it is told again
        ("prompt", "x" * 20_001, "20,001 characters are too many: at most 20,000"),
        ("prompt", "a\ud800", "half a character stands in it"),
        ("prompt", 5, "5 isn't a text: type a prompt"),
        ("prompt", None, "None isn't a text: type a prompt"),
        ("prompt", ["a"], "['a'] isn't a text: type a prompt"),
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
    assert f"at most {PAGE_BOUNDS['max_new_tokens'][1]:,};" in app.INFO["max_new_tokens"]


@pytest.mark.parametrize("field", ["max_new_tokens", "num_samples", "temperature", "top_k", "seed"])
def test_who_does_what_an_error_says_is_not_refused_again(page, field):
    (only,) = updates(page, **{field: 10**30})
    most = fields_of(only)[field]["info"].split(" to ")[-1].replace(",", "")
    values = VALUES | {field: float(most) if "." in most else int(most)}
    assert page.problems(app.read_request(**values)) == {}


def test_text_that_looks_like_html_is_shown_as_it_is(page):
    prompt = "\n<script>alert(1)</script> & <mark>"
    (*_, last) = updates(page, prompt=prompt)
    assert texts_of(last)[0].startswith(prompt)
    assert "<script" not in last[0]["value"]


def test_for_who_never_comes_to_read_nothing_is_written(page, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE", 0.0)
    monkeypatch.setattr(page.writer, "write", None)
    away = SimpleNamespace(session_hash="away", state=READER.state)
    assert list(page.write(away, *VALUES.values())) == []
    assert list(page.write_text(away, "TILDA:")) == []


# ---- what stands in the training text, and what to ask ----


def marked(shown: str) -> list[str]:
    return [html.unescape(piece) for piece in re.findall("<mark>(.*?)</mark>", shown, flags=re.S)]


def test_what_stands_word_for_word_in_the_training_text_is_marked(page):
    known = page.text[500:600]
    shown = page.show(f"TILDA:\n\u2603{known}\u2603 no", 7)
    assert marked(shown) == [known]
    assert "100 of 105 new characters stand in the training text word for word, in pieces of 40 or more" in shown


def test_the_prompt_is_not_marked_but_counts_for_what_follows_it(page):
    """A few characters after a prompt from the text are what the text goes on with."""
    shown = page.show(page.text[500:580], 570 - 500)
    assert marked(shown) == [page.text[570:580]]
    assert "10 of 10 new characters" in shown


def test_where_the_text_is_not_there_or_is_another_nothing_is_said_of_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "find_text", lambda given, sha256: text.find_text(given, sha256[::-1]))
    page = app.Page(checkpoint, "cpu", "off")
    assert page.text == ""
    assert "word for word" not in page.show("TILDA:", 0)
    assert page.examples()[0] == "TILDA:\n"
    app.build(page)


def test_examples_are_the_runs_own_prompt_and_openings_of_its_text(page):
    first, *others = page.examples()
    assert first == "TILDA:\n"
    assert len(others) == 3
    assert all(other in page.text for other in others)


def test_without_the_text_the_prompts_of_the_record_are_examples(checkpoint, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(checkpoint.parent.parent, folder)
    page = app.Page(folder / "checkpoints" / "best.pt", "cpu", "off")
    page.text = ""
    record = json.loads((folder / "run.json").read_text())
    for samples, found in (
        ([{"prompt": "KNOWN"}], ["TILDA:\n", "KNOWN"]),
        ([{"prompt": "TILDA:\n"}], ["TILDA:\n"]),
        ("odd", ["TILDA:\n"]),
        ([None], ["TILDA:\n"]),
    ):
        (folder / "run.json").write_text(json.dumps(record | {"samples": samples}))
        assert page.examples() == found


def test_examples_are_those_that_the_model_can_read(page, monkeypatch):
    char = load_tokenizer("char", sorted(set("TILDA:\n")))
    monkeypatch.setattr(page.writer, "tokenizer", char)
    assert page.examples() == ["TILDA:\n"]


def test_to_recite_is_to_take_the_likeliest_tokens_after_the_first_lines(page):
    prompt, _, num_samples, temperature = page.recital()
    assert page.text.startswith(prompt)
    assert prompt.endswith("\n")
    assert (num_samples, temperature) == (1, 0)


# ---- the checkpoint, and the records beside it ----


def test_with_a_checkpoint_that_is_not_there_the_page_says_what_to_do(tmp_path):
    page = app.Page(tmp_path / "out" / "checkpoints" / "none.pt")
    assert "doesn't exist" in page.status()
    assert "python train.py --preset demo" in page.status()
    assert "aren't beside the checkpoint" in page.training()[0]
    shown = [block.value for block in app.build(page).blocks.values() if isinstance(block, app.gr.Markdown)]
    assert page.status() in shown


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_checkpoint_that_is_a_pipe_is_told_on_the_page_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "best.pt")
    assert "is a pipe or a device" in app.Page(tmp_path / "best.pt").status()


@pytest.mark.parametrize(
    ("step", "weight", "words"), [("seven", 0.0, "of this program"), (5, math.nan, "isn't finite")]
)
def test_a_checkpoint_that_makes_no_sense_is_told_on_the_page(checkpoint, tmp_path, step, weight, words):
    content = load_checkpoint(checkpoint)
    content["step"] = step
    content["model"]["transformer.wte.weight"][0, 0] = weight
    torch.save(content, tmp_path / "best.pt")
    page = app.Page(tmp_path / "best.pt")
    assert words in page.status()
    assert page.writer is None


def test_the_run_is_shown_with_its_curve_and_what_it_learned(page):
    text, curve = page.training()
    assert "steps done" in text
    assert "Longest run of each sample" in text
    assert curve.startswith("<svg")
    data = re.search(r'download="report.html" href="data:text/html;base64,([^"]+)"', curve)[1]
    assert "<h2>How its text grew</h2>" in base64.b64decode(data).decode()


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
    shape = {"n_embd": 256, "n_layer": 6, "steps": 4}
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
    expect(tab, ".sample pre:visible").to_have_count(3)
    expect(tab, "#line").to_contain_text("30 of 30 tokens")
    tab.locator("#num_samples input[type=range]").press("ArrowLeft")
    tab.click("#generate")
    expect(tab, ".sample pre:visible").to_have_count(2)
    expect(tab, "#line").to_contain_text("30 of 30 tokens")
    texts = [box.inner_text() for box in tab.locator(".sample pre:visible").all()]
    assert len(texts) == 2
    assert all(text.startswith("AMBROSE:\n") and len(text) > 20 for text in texts)


@needs_chromium
def test_a_browser_marks_what_is_wrong_until_it_is_right(tab):
    tab.fill("#max_new_tokens input[type=number]", "4")
    tab.fill("#top_k input", "")
    tab.click("#generate")
    expect(tab, "#top_k").to_contain_text("this is empty: enter a number from 0 to 1,000,000")
    expect(tab, "#line").to_contain_text("Please put right what is marked.")
    tab.fill("#top_k input", "4")
    tab.fill("#temperature input", "")
    tab.click("#generate")
    expect(tab, "#temperature").to_contain_text("this is empty")
    expect(tab, "#top_k").not_to_contain_text("empty")
    tab.fill("#temperature input", "0.5")
    tab.click("#generate")
    expect(tab, "#line").to_contain_text("4 of 4 tokens")


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_fits_a_phone_and_a_desk_by_day_and_by_night(browser, checkpoint, tmp_path, width, scheme):
    path = tmp_path / "report.html"
    assert update_readme.main(["--run_dir", str(checkpoint.parent.parent), "--html", str(path)]) == 0
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        tab = context.new_page()
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)")
        assert not [url for url in asked if not url.startswith(("file:", "data:"))]


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
    opening = text.draw_prompts(PLAY.read_text(encoding="utf-8"), "BIANCA:\n", 4, seed=0)[1]
    tab.get_by_text(opening.replace("\n", " ").strip()).click()
    expect(tab, "#prompt textarea").to_have_value(opening)
    tab.get_by_role("tab", name="Training").click()
    expect(tab, "#summary").to_contain_text("steps done")
    expect(tab, "#curve svg").to_be_visible()


@needs_chromium
def test_a_click_asks_for_what_the_model_knows_by_heart(tab):
    tab.get_by_text("How the training text begins").click()
    expect(tab, "#temperature input").to_have_value("0")
    tab.fill("#max_new_tokens input[type=number]", "8")
    tab.click("#generate")
    expect(tab, "#line").to_contain_text("8 of 8 tokens")
    expect(tab, "#sample_1").to_contain_text("new characters stand in the training text word for word")
    assert PLAY.read_text(encoding="utf-8").startswith(tab.input_value("#prompt textarea"))


@needs_chromium
def test_the_numbers_begin_at_what_is_allowed(tab):
    for name in ("max_new_tokens", "num_samples"):
        least, most = PAGE_BOUNDS[name]
        expect(tab, f"#{name} input[type=range]").to_have_attribute("min", str(least))
        expect(tab, f"#{name} input[type=range]").to_have_attribute("max", str(most))


@needs_chromium
def test_text_that_looks_like_html_does_nothing_in_a_browser(tab):
    prompt = "<script>document.title = 'bad'</script> ${1 + 1} {{value}} <img src=x onerror=\"document.title = 'bad'\">"
    tab.fill("#prompt textarea", prompt)
    tab.fill("#max_new_tokens input[type=number]", "3")
    tab.click("#generate")
    expect(tab, "#line").to_contain_text("3 of 3 tokens")
    assert tab.inner_text("#sample_1 pre").startswith(prompt)
    assert tab.title() == "GPT-2 from scratch"


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


# ---- programs that ask ----


def post(url: str, body: bytes, **headers) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"} | headers)
    return urllib.request.urlopen(request, timeout=30).read()


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


def test_the_call_that_the_docs_show_gives_plain_text(url):
    (call,) = re.findall("```python\n(from gradio_client .*?)```", HOW_IT_WORKS.read_text(), flags=re.S)
    assert "http://127.0.0.1:7860" in call
    found = {}
    exec(call.replace("http://127.0.0.1:7860", url), found)
    assert found["text"].startswith("TILDA:")
    assert len(found["text"]) > 15


def test_a_program_gets_the_same_text_for_the_same_seed_and_sees_it_grow(client):
    asked = {"prompt": "TILDA:", "max_new_tokens": 60, "seed": 5, "api_name": "/write"}
    job = client.submit(**asked)
    whole = job.result()
    parts = job.outputs()
    assert len(parts) > 1
    assert all(whole.startswith(part) for part in parts)
    assert client.predict(**asked) == whole


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"max_new_tokens": 5000, "seed": -1},
            "max_new_tokens: 5,000 is out of bounds: use 1 to 1,000\nseed: -1 is out",
        ),
        ({"temperature": "hot"}, "temperature: 'hot' isn't a number"),
        ({"prompt": ["A"]}, r"prompt: \['A'\] isn't a text"),
        ({"prompt": None}, "prompt: None isn't a text"),
    ],
)
def test_a_program_is_told_what_to_put_right(client, asked, said):
    with pytest.raises(gradio_client.exceptions.AppError, match=said):
        client.predict(**{"prompt": "A"} | asked, api_name="/write")


def test_half_a_character_is_refused(url):
    event = json.loads(post(f"{url}/gradio_api/call/write", b'{"data": ["a\\ud800", 5, 1, 0, 1]}'))["event_id"]
    answer = urllib.request.urlopen(f"{url}/gradio_api/call/write/{event}", timeout=30).read()
    assert b"half a character" in answer


def test_nothing_but_to_write_is_offered_to_programs(client):
    offered = client.view_api(return_format="dict", print_info=False)
    assert list(offered["named_endpoints"]) == ["/write"]
    assert offered["unnamed_endpoints"] == {}


def test_clients_that_never_read_fill_no_queue(url, client):
    """Each would cost a thousand tokens otherwise."""
    asked = json.dumps({"data": ["TILDA:", 1000, 0.9, 50, 1]}).encode()
    events = [json.loads(post(f"{url}/gradio_api/call/write", asked))["event_id"] for _ in range(app.QUEUE)]
    start = time.monotonic()
    assert client.predict(prompt="TILDA:", max_new_tokens=3, api_name="/write").startswith("TILDA:")
    assert time.monotonic() - start < door.PATIENCE + 15
    late = urllib.request.urlopen(f"{url}/gradio_api/call/write/{events[-1]}", timeout=30).read()
    assert b"TILDA" not in late


def test_there_is_no_door_past_the_queue(url):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        post(f"{url}/gradio_api/run/write", b'{"data": []}')


@pytest.mark.parametrize(
    ("path", "body", "headers", "code"),
    [
        ("queue/join", b"{}", {"Host": "evil.com"}, 400),
        ("queue/join", b" " * (2 << 20), {}, 413),
        ("upload", b"", {"Content-Type": "multipart/form-data; boundary=a"}, 403),
        ("call/write", b'{"data": [{"path": "http://127.0.0.1:9/", "meta": {"_type": "gradio.FileData"}}]}', {}, 403),
    ],
)
def test_what_the_page_has_no_use_for_does_not_come_in(url, path, body, headers, code):
    with pytest.raises(urllib.error.HTTPError, match=str(code)):
        post(f"{url}/gradio_api/{path}", body, **headers)


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
    settings = {**TINY, "out_dir": str(tmp_path / "out"), "num_prompts": 1, "tokenizer": "char", "prompt": "TILDA:"}
    train.train(train.TrainConfig(**settings))
    page = app.Page(tmp_path / "out" / "checkpoints" / "last.pt", "cpu", "off")
    (update,) = updates(page, prompt="€")
    prompt = fields_of(update)["prompt"]
    assert "and not '€'" in prompt["info"]
    assert prompt["elem_classes"] == ["wrong"]
    assert texts_of(updates(page, prompt="AMBROSE:")[-1])[0].startswith("AMBROSE:")
    app.build(page)
