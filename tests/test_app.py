"""The web page: its server's rules, a real browser, and the folder of a Space."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import gradio_client
import pytest
from conftest import ROOT, TINY

import app
import train

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("app") / "out"
    train.train(
        train.TrainConfig(**{**TINY, "out_dir": str(out_dir), "steps": 45, "num_prompts": 1, "prompt": "TILDA:\n"})
    )
    return out_dir / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def page(checkpoint):
    return app.Page(str(checkpoint), "cpu", "off")


VALUES = {"prompt": "TILDA:", "max_new_tokens": 5, "num_samples": 2, "temperature": 0.9, "top_k": 50, "seed": 1}


def updates(page, **changes) -> list[list]:
    return list(page.write(*(VALUES | changes).values()))


# ---- what the server answers ----


def test_text_grows_in_as_many_boxes_as_samples(page):
    *_, last = updates(page, num_samples=3)
    boxes = last[: app.MOST["num_samples"]]
    assert [box["visible"] for box in boxes] == [True, True, True, False]
    texts = [box["value"] for box in boxes[:3]]
    assert all(text.startswith("TILDA:") and len(text) > 8 for text in texts) and len(set(texts)) == 3
    assert "5 of 5 tokens" in last[-1]
    slow = updates(page, max_new_tokens=400)
    lengths = [len(update[0]["value"]) for update in slow]
    assert len(slow) > 2 and lengths == sorted(set(lengths))  # it streams
    assert texts[0] == updates(page)[-1][0]["value"] != updates(page, seed=2)[-1][0]["value"]
    assert updates(page, prompt="")[-1][0]["value"]  # an empty prompt starts from a line break
    assert f"its last {page.writer.context} tokens are read" in updates(page, prompt="word " * 99)[-1][-1]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_new_tokens", None, "this is empty: enter a number up to 1,000"),
        ("max_new_tokens", 0, "this is empty: enter a number up to 1,000"),
        ("max_new_tokens", 1001, "1,001 is too much: at most 1,000"),
        ("max_new_tokens", 10**30, "is out of bounds"),
        ("max_new_tokens", "5", "isn't a whole number"),
        ("num_samples", 5, "5 is too much: at most 4"),
        ("num_samples", 0, "this is empty: enter a number up to 4"),
        ("temperature", None, "this is empty"),
        ("temperature", 5.5, "5.5 is too much: at most 5.0"),
        ("num_samples", 1.5, "1.5 isn't a whole number"),
        ("temperature", float("nan"), "nan is out of bounds"),
        ("top_k", -1, "-1 is out of bounds"),
        ("seed", {"a": 1}, "isn't a whole number"),
        ("prompt", "x" * 20_001, "20,001 characters are too many: at most 20,000"),
    ],
)
def test_wrong_input_is_said_beside_its_field_whatever_the_browser_sends(page, monkeypatch, field, value, said):
    monkeypatch.setattr(page.writer, "write", None)  # nothing is computed
    (only,) = updates(page, **{field: value})
    infos = dict(zip(app.FIELDS, only[app.MOST["num_samples"] : -1], strict=True))
    assert said in infos[field]["info"] and infos[field]["elem_classes"] == ["wrong"]
    assert all(infos[name]["info"] == app.INFO[name] for name in app.FIELDS if name != field)
    assert only[-1] == "Please put right what is marked."


def test_without_a_checkpoint_the_page_says_what_to_do(tmp_path):
    page = app.Page(str(tmp_path / "out" / "checkpoints" / "none.pt"))
    assert "doesn't exist" in page.status() and "python train.py --preset demo" in page.status()
    (only,) = updates(page)
    assert only[-1] == page.status()
    assert "aren't beside the checkpoint" in page.training()[0]
    app.build(page)


def test_the_records_of_another_run_are_not_shown(checkpoint, tmp_path):
    """Above a checkpoint that stands elsewhere there may be anybody's logs."""
    elsewhere = tmp_path / "project" / "best.pt"
    elsewhere.parent.mkdir()
    shutil.copyfile(checkpoint, elsewhere)
    shutil.copytree(checkpoint.parent.parent / "logs", tmp_path / "logs")
    shutil.copyfile(checkpoint.parent.parent / "run.json", tmp_path / "run.json")
    assert "aren't beside the checkpoint" in app.Page(str(elsewhere), "cpu", "off").training()[0]


# ---- in a browser ----


@contextlib.contextmanager
def served(*flags):
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


@pytest.mark.skipif(not (CHROMIUM or os.environ.get("CI")), reason="needs chromium: apt-get install chromium")
def test_the_page_in_a_real_browser(tmp_path):
    from playwright.sync_api import expect, sync_playwright

    shape = {"n_embd": 256, "n_layer": 6, "steps": 45}  # large enough that a thousand tokens take seconds
    train.train(train.TrainConfig(**{**TINY, "out_dir": str(tmp_path / "out"), "num_prompts": 0, **shape}))
    with (
        served("--checkpoint", str(tmp_path / "out" / "checkpoints" / "best.pt")) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 1000})
        faults, foreign = [], []
        tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on(
            "request",
            lambda request: None if request.url.startswith((url, "data:", "blob:")) else foreign.append(request.url),
        )
        tab.goto(url)
        expect(tab.locator("#status")).to_contain_text("step 4")
        expect(tab.locator("#generate")).to_be_visible()
        assert pale_words(tab) == []
        tab.fill("#prompt textarea", "AMBROSE:\n")
        tab.fill("#max_new_tokens input[type=number]", "30")
        tab.locator("#num_samples input[type=range]").press("ArrowRight")
        tab.click("#generate")
        expect(tab.locator(".sample textarea:visible")).to_have_count(3, timeout=30_000)
        expect(tab.locator("#line")).to_contain_text("30 of 30 tokens", timeout=30_000)
        tab.locator("#num_samples input[type=range]").press("ArrowLeft")
        tab.click("#generate")
        expect(tab.locator(".sample textarea:visible")).to_have_count(2, timeout=30_000)
        expect(tab.locator("#line")).to_contain_text("30 of 30 tokens", timeout=30_000)
        texts = [box.input_value() for box in tab.locator(".sample textarea:visible").all()]
        assert len(texts) == 2 and all(text.startswith("AMBROSE:\n") and len(text) > 20 for text in texts)
        tab.fill("#max_new_tokens input[type=number]", "")
        tab.click("#generate")
        expect(tab.locator("#max_new_tokens")).to_contain_text("this is empty: enter a number up to 1,000")
        expect(tab.locator("#line")).to_contain_text("Please put right what is marked.")
        tab.fill("#max_new_tokens input[type=number]", "4")
        tab.fill("#temperature input", "")
        tab.click("#generate")
        expect(tab.locator("#temperature")).to_contain_text("this is empty")
        expect(tab.locator("#max_new_tokens")).not_to_contain_text("empty")
        tab.fill("#temperature input", "0.5")
        tab.click("#generate")
        expect(tab.locator("#line")).to_contain_text("4 of 4 tokens")
        second = browser.new_page()  # another user, who waits while the first one's text is written
        second.goto(url)
        tab.fill("#max_new_tokens input[type=number]", "1000")
        second.fill("#max_new_tokens input[type=number]", "3")
        tab.click("#generate")
        expect(tab.locator("#line")).to_contain_text("of 1,000 tokens")
        second.click("#generate")
        time.sleep(0.5)
        assert "of 3 tokens" not in second.inner_text("#line")
        tab.click("#stop")
        expect(second.locator("#line")).to_contain_text("3 of 3 tokens", timeout=30_000)
        assert "1,000 of 1,000" not in tab.inner_text("#line")
        client = gradio_client.Client(url, verbose=False)
        for _ in range(2):  # a program that uses the page's own door is told the same, also the second time
            assert "Please put right" in client.predict("A", 5000, 2, 0.9, 50, 1, api_name="/write")[-1]
        past_the_queue = urllib.request.Request(
            f"{url}/gradio_api/run/write", b'{"data": []}', {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(past_the_queue)
        tab.get_by_text("KING HENRY").click()
        expect(tab.locator("#prompt textarea")).to_have_value("KING HENRY")
        tab.get_by_role("tab", name="Training").click()
        expect(tab.locator("#summary")).to_contain_text("steps done")
        expect(tab.locator("#curve svg")).to_be_visible()
        phone = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
        phone.goto(url)
        expect(phone.locator("#generate")).to_be_visible()
        assert phone.evaluate("document.documentElement.scrollWidth") <= 360  # nothing to scroll sideways
        assert phone.evaluate("document.body.classList.contains('dark')")
        assert pale_words(phone) == []
        browser.close()
        assert not faults and not foreign


# ---- a Space ----


def test_a_space_has_all_that_it_needs(checkpoint, tmp_path, capsys):
    folder = tmp_path / "space"
    assert app.main(["--checkpoint", str(checkpoint), "--make_space", str(folder)]) == 0
    front = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    settings = dict(re.findall(r"^(\w+): (.*)$", front, re.M))
    assert settings["sdk"] == "gradio" and settings["sdk_version"] == app.gr.__version__
    assert (folder / settings["app_file"]).is_file()
    needed = (folder / "requirements.txt").read_text(encoding="utf-8")
    assert "torch" in needed and "export_hf" not in needed
    code = (
        "import app; p = app.Page('out/checkpoints/best.pt'); print(p.status()); app.build(p); print(p.training()[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "step 4" in done.stdout and "steps done" in done.stdout, done.stderr
    assert app.main(["--checkpoint", str(checkpoint), "--make_space", str(folder)]) == 2
    assert "isn't empty" in capsys.readouterr().err
    assert app.main(["--checkpoint", "nowhere.pt", "--make_space", str(tmp_path / "other")]) == 1


def test_a_port_that_is_taken_is_one_sentence(checkpoint, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "--port", str(s.getsockname()[1])]
        assert app.main(flags) == 1
    assert capsys.readouterr().err.rstrip().endswith("choose another --host or --port")
    assert app.main(["--port", "99999"]) == 2
    if not train.device_present("cuda"):
        assert app.main(["--device", "cuda"]) == 2


# ---- a model of characters ----


def test_a_character_that_the_model_does_not_know_is_marked_at_the_prompt(tmp_path):
    settings = {**TINY, "out_dir": str(tmp_path / "out"), "num_prompts": 0, "tokenizer": "char"}
    train.train(train.TrainConfig(**settings))
    page = app.Page(str(tmp_path / "out" / "checkpoints" / "last.pt"), "cpu", "off")
    (update,) = updates(page, prompt="€")
    prompt = update[app.MOST["num_samples"]]
    assert "and not '€'" in prompt["info"] and prompt["elem_classes"] == ["wrong"]
    assert updates(page, prompt="AMBROSE:")[-1][0]["value"].startswith("AMBROSE:")
    app.build(page)  # without the example prompts that it can't read
