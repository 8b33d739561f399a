"""The demo: what the page computes, and the page itself in Chromium (marked `browser`; needs the extra `demo`)."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from predictors import make_predictor, write_media

from mplug2.data.media import MediaError
from mplug2.demo import views
from mplug2.demo.__main__ import main
from mplug2.demo.settings import DemoSettings
from tiny_data.world import COLOR_NAMES, DIGITS

ROOT = Path(__file__).parents[1]
PRETRAINED, EXAMPLES = ROOT / "tiny_data" / "pretrained", ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def predictor() -> views.VisualPredictor:
    return views.open_checkpoint(PRETRAINED)


@pytest.fixture(scope="module")
def visual() -> views.Visual:
    return views.draw_scene("moves right", 7, "red")


# ---- images and videos -----------------------------------------------------------------------------------------------


@given(st.sampled_from(list(views.MOTIONS)), st.integers(0, 9), st.sampled_from(COLOR_NAMES),
       st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=30, deadline=None)
def test_a_scene_has_the_frames_and_the_questions_of_the_tiny_world(motion, digit, color, speed):
    two = motion.startswith("two")
    if two and (digit == 3 or color == "blue"):
        with pytest.raises(ValueError, match="choose another digit and another color"):
            views.draw_scene(motion, digit, color, 3, "blue", speed)
        return
    made = views.draw_scene(motion, digit, color, 3, "blue", speed)
    assert made.frames.shape == (1 if "image" in motion else 4, 32, 32, 3) and made.frames.dtype == np.uint8
    assert made.modality == ("image" if "image" in motion else "video")
    assert any(answer in (DIGITS[digit], color) for _, answer in made.asked) and all(answer for _, answer in made.asked)


def test_speed_holds_the_last_frame_or_shows_the_first_half():
    frames = views.draw_scene("moves right", 7, "red").frames
    assert np.array_equal(views.draw_scene("moves right", 7, "red", speed=2).frames, frames[[0, 2, 3, 3]])
    assert np.array_equal(views.draw_scene("moves right", 7, "red", speed=0.5).frames, frames[[0, 0, 1, 1]])


@given(st.integers(3, 8))
def test_orders_of_frames(t):
    frames = np.arange(t)[:, None, None, None].repeat(3, 3).astype(np.uint8)
    video = views.Visual(frames, "video", (("which digit is it", "seven"),))
    found = {name: views.reorder(video, name).frames[:, 0, 0, 0].tolist() for name in views.ORDERS}
    assert found["as they are"] == list(range(t)) and found["reverse"] == list(range(t))[::-1]
    assert sorted(found["shuffle"]) == list(range(t)) and found["shuffle"] not in (found["reverse"], list(range(t)))
    assert found["freeze"] == [0] * t and found["repeat"] == [i // 2 for i in range(t)]
    with pytest.raises(ValueError, match="load it again"):
        views.reorder(None, "reverse")
    assert [views.reorder(video, name).asked[0][1] for name in ("as they are", "reverse")] == ["seven", ""]


def test_a_drawing_is_cut_out_and_centered_with_its_aspect():
    drawing = np.full((240, 240), 255, np.uint8)
    drawing[40:200, 20:40] = 0  # a one: 160 high, 20 wide, at the left
    stroke = views.stroke_of(drawing)
    assert stroke.shape == (8, 8) and stroke.max() == 1 and stroke.min() == 0
    assert (stroke[:, 3:5] > 0).all() and not stroke[:, :3].any() and not stroke[:, 5:].any()
    with pytest.raises(ValueError, match="the drawing is empty"):
        views.stroke_of(np.full((9, 9, 4), 255, np.uint8))
    drawn = views.draw_scene("moves right", 7, "red", drawing=drawing)
    assert "" in dict(drawn.asked).values() and "red" in dict(drawn.asked).values()  # nobody knows the digit


def test_a_file_is_shown_as_the_model_sees_it_and_an_error_has_no_path(predictor, tmp_path):
    path = write_media(tmp_path / "a.mp4", 0, 9)
    made = views.read_visual(path, predictor)
    assert made.frames.shape == (4, 32, 32, 3) and made.modality == "video"
    assert predictor.caption([made]) == predictor.caption([path])
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(MediaError, match="b.mp4") as refused:
        views.read_visual(tmp_path / "b.mp4", predictor)
    assert str(tmp_path) not in str(refused.value)


# ---- what the model does ---------------------------------------------------------------------------------------------


def test_without_the_local_temporal_modules_the_order_of_frames_is_not_seen(predictor, visual):
    """With them, reversing the frames changes the answer; without, V' of a frame does not depend on its place."""
    back = views.reorder(visual, "reverse")
    question = "does it move right or left"
    assert [predictor.answer([one], [question])[0] for one in (visual, back)] == ["right", "left"]
    with views.local_temporal_off(predictor):
        one, two = predictor.answer([visual], [question]), predictor.answer([back], [question])
        vectors = predictor.embed([visual]), predictor.embed([back])
    assert one == two
    torch.testing.assert_close(*vectors, atol=1e-4, rtol=1e-4)
    assert predictor.answer([visual], [question]) == ["right"]  # they are back


@pytest.mark.parametrize("question", ["", "which digit is it"])
def test_words_have_their_probabilities_and_attention_over_all_patches(predictor, visual, question):
    written, words = predictor.trace(visual, question)
    asked = len(question.split())
    assert " ".join(word.text for word in words[asked:]) == written
    assert [word.text for word in words[:asked]] == question.split()
    for word in words:
        assert word.maps and all(grid.shape[1:] == (4, 4, 4) and (grid.sum(dim=(1, 2, 3)) <= 1.001).all()
                                 for grid in word.maps.values())
    for word in words[asked:]:
        assert 0 < word.probability <= 1 and word.others[0][1] >= word.probability - 1e-6
        assert (word.text, pytest.approx(word.probability, abs=1e-6)) in word.others  # greedy: the most likely one
    assert [word.probability for word in words[:asked]] == [None] * asked


def test_texts_beams_latents_and_boxes(predictor, visual):
    rows = views.fitting_texts(predictor, visual, ["a blue two", "", "a red seven moving right"])
    assert [row[0] for row in rows] == ["a red seven moving right", "a blue two"] and rows[0][2] > 0.9 > rows[1][2]
    assert rows[0][1] == pytest.approx(predictor.similarity([visual], ["a red seven moving right"]).item(), abs=1e-6)
    with pytest.raises(ValueError, match="no text"):
        views.fitting_texts(predictor, visual, [" "])
    tree = views.beam_tree(predictor, visual)
    assert tree.startswith("<ul><li>") and tree.count("<b>") >= 5 and "red" in tree and tree.count("score") == 5
    assert len(views.latent_images(predictor, visual)) == predictor.model.config.latents
    with pytest.raises(ValueError, match="has no box_head"):
        views.boxed(predictor, visual, "the red seven")


def test_more_texts_than_are_quick_to_compare_are_refused(predictor, visual):
    texts = [f"a red {digit}" for digit in DIGITS] * 2
    assert len(views.fitting_texts(predictor, visual, texts)) == 20
    with pytest.raises(ValueError, match="21 texts: at most 20 are compared at once; leave some out"):
        views.fitting_texts(predictor, visual, [*texts, "a two"])


@pytest.mark.parametrize("port", [-1, 0, 99999999])
def test_impossible_ports_are_refused(port, capsys):
    with pytest.raises(SystemExit):
        main(["--port", str(port)])
    assert f"port={port}: expected a number from 1 to 65535" in capsys.readouterr().err


def test_a_box_is_drawn_where_the_model_predicts_it(monkeypatch):
    model = make_predictor("grounding")
    predictor = views.VisualPredictor(model.model, model.tokenizer, model.preprocess)
    monkeypatch.setattr(predictor, "predict_boxes", lambda *_: torch.tensor([[0.5, 0.5, 0.5, 0.25]]))
    shown = views.boxed(predictor, views.Visual(np.zeros((1, 32, 32, 3), np.uint8)), "a red one")
    rows, columns = np.nonzero(shown[:, :, 0])
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 60, 24, 72)


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mplug2.demo.page", None)
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 1 and "pip install -e '.[demo]'" in capsys.readouterr().err


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_page():
    """A function that serves the page with some settings and opens it in headless Chromium. Requests of the page to
    any other address are kept in `elsewhere`."""
    pytest.importorskip("gradio", reason="the demo needs its extra: pip install -e '.[demo]'")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    from browser import NAMES
    from processes import free_port

    from mplug2.demo.page import serve
    browser = next(filter(None, map(shutil.which, NAMES)))
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])

        def open_one(**settings):
            port = free_port()
            serve(DemoSettings(port=port, **settings), block=False)
            opened = chromium.new_page(viewport={"width": 1180, "height": 1500})
            opened.elsewhere = []
            opened.on("request", lambda request: opened.elsewhere.append(request.url) if not request.url.startswith(
                (f"http://127.0.0.1:{port}/", "data:", "blob:")) else None)
            opened.address = f"http://127.0.0.1:{port}"
            opened.goto(opened.address)
            return opened

        yield open_one
        chromium.close()


@pytest.fixture(scope="module")
def page(open_page):
    """The page of the shipped checkpoint."""
    return open_page()


def wait_for(page, condition: str) -> None:
    page.wait_for_function(f"() => {{ {condition} }}", timeout=60_000)


CAPTION = "const caption = document.querySelector('#caption textarea')?.value ?? '';"
ANSWERS = "const answers = document.querySelector('#answers')?.innerText ?? '';"


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_page_captions_and_answers_what_is_drawn_and_changed(page):
    wait_for(page, CAPTION + "return caption.includes('seven') && caption.includes('right')")
    wait_for(page, ANSWERS + "return answers.includes('does it move right or left')")
    page.get_by_label("reverse").check()
    wait_for(page, CAPTION + "return caption.includes('left')")
    page.get_by_label("as they are").check()
    wait_for(page, CAPTION + "return caption.includes('right')")
    page.locator("#temporal input").uncheck()  # now the order of the frames changes nothing but the frames
    captions, rows = [], []
    for order in ("reverse", "as they are"):
        before = page.get_attribute("#frames img", "src")
        page.get_by_label(order).check()
        wait_for(page, f"return document.querySelector('#frames img').getAttribute('src') !== {json.dumps(before)}")
        captions.append(page.input_value("#caption textarea"))
        rows.append(page.locator("#answers tr").filter(has_text="does it move").inner_text().split("\t"))
    assert captions[0] == captions[1]
    (_, reversed_answer, _), (_, answer, true) = rows  # the truth is right, and in reverse left: a coin flip
    assert reversed_answer == answer in ("left", "right") and true == "right"
    page.locator("#temporal input").check()
    page.locator("#question input").fill("which color is it")
    page.locator("#question input").press("Enter")
    wait_for(page, "return document.querySelector('#words')?.innerText.includes('color')")
    wait_for(page, "return document.querySelector('#explained')?.innerText.startsWith('red: written with probability')")
    assert page.locator("#attention img").count() == 1
    assert page.elsewhere == []


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_what_belongs_to_an_older_video_is_not_shown(page):
    """The question is asked again, its words show their attention, and the result of a tab is removed."""
    page.goto(page.address)
    wait_for(page, "return document.querySelector('#explained')?.innerText.startsWith('right: written')")
    page.locator("#question input").fill("does it move left or right")
    page.locator("#question input").press("Enter")
    wait_for(page, "return document.querySelectorAll('#words [role=button]').length === 7")
    page.get_by_role("button", name="Compare the texts").click()
    wait_for(page, "return document.querySelector('#fits').innerText.includes('a blue two')")
    before = page.get_attribute("#attention img", "src")
    page.get_by_label("reverse").check()
    wait_for(page, "return document.querySelector('#explained').innerText.startsWith('left: written')")
    assert page.locator("#words [role=button]").count() == 7 and page.get_attribute("#attention img", "src") != before
    wait_for(page, "return document.querySelector('#fits').innerText.trim() === ''")
    page.locator("#question input").fill("")
    page.locator("#question input").press("Enter")
    wait_for(page, "return document.querySelectorAll('#words [role=button]').length === 9")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_word_is_chosen_by_pointing_at_it(page):
    """With the layer and the head that are chosen."""
    page.goto(page.address)
    wait_for(page, "return document.querySelector('#explained')?.innerText.startsWith('right: written')")
    before = page.get_attribute("#attention img", "src")
    page.locator("#words [role=button]").nth(2).hover()
    wait_for(page, "return document.querySelector('#explained').innerText.startsWith('seven: written')")
    wait_for(page, f"return document.querySelector('#attention img').getAttribute('src') !== {json.dumps(before)}")
    before = page.get_attribute("#attention img", "src")
    page.locator("#layer input").click()
    page.get_by_role("option", name="1", exact=True).click()
    wait_for(page, f"return document.querySelector('#attention img').getAttribute('src') !== {json.dumps(before)}")
    assert page.inner_text("#explained").startswith("seven: ")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_uploads_above_the_limit_of_a_request_are_refused_unread(page):
    from mplug2.demo.page import REQUEST_LIMIT

    for length, status in ((REQUEST_LIMIT + 1, 413), (None, 413), (0, 400)):
        connection = http.client.HTTPConnection(page.address.removeprefix("http://"), timeout=30)
        connection.putrequest("POST", "/gradio_api/upload")
        if length is not None:
            connection.putheader("Content-Length", str(length))
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_digit_is_drawn_with_the_mouse(page):
    """An empty drawing is refused. Nobody knows which digit was drawn, so its true answer is left empty."""
    page.goto(page.address)
    wait_for(page, CAPTION + "return caption.includes('right')")
    page.get_by_text("Draw the digit yourself").click()
    canvas = page.locator("#drawing canvas").last
    canvas.wait_for()
    page.locator("#use_drawing").click()
    wait_for(page, "return document.body.innerText.includes('the drawing is empty: choose the brush')")
    page.locator("#drawing button[aria-label=Brush]").click()
    time.sleep(1)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 60, steps=12)
    page.mouse.up()
    time.sleep(1)
    page.locator("#use_drawing").click()
    wait_for(page, ANSWERS + "return /what digit is this\\t\\w+\\t\\n/.test(answers)")
    assert "red" in page.input_value("#caption textarea") and "right" in page.input_value("#caption textarea")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_video_is_uploaded_captioned_and_deleted(page):
    from mplug2.demo.page import UPLOADS

    page.goto(page.address)
    wait_for(page, CAPTION + "return caption.includes('right')")
    page.get_by_text("Upload an image, GIF, or video").click()
    page.locator("#upload input[type=file]").set_input_files(EXAMPLES / "blue_seven_left.gif")
    wait_for(page, CAPTION + "return caption.includes('blue') && caption.includes('left')")
    assert not list(Path(UPLOADS.name).rglob("*.gif"))


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_wrong_and_too_large_files_are_a_sentence_in_the_page(page, tmp_path):
    """The next file is read as if nothing had happened."""
    from mplug2.demo.page import UPLOADS

    (tmp_path / "note.mp4").write_bytes(b"<html>not a video</html>")
    with open(tmp_path / "large.mp4", "wb") as large:
        large.truncate(51 * 2**20)
    page.goto(page.address)
    wait_for(page, CAPTION + "return caption.includes('right')")
    page.get_by_text("Upload an image, GIF, or video").click()
    for name, problem in (("large.mp4", "exceed the maximum allowed size of 50.0 Mb"), ("note.mp4", "is an HTML page")):
        page.locator("#upload input[type=file]").set_input_files(tmp_path / name)
        wait_for(page, f"const text = document.body.innerText; return text.includes('{name}')"
                       f" && text.includes('{problem}')")
        assert "Traceback" not in page.inner_text("body") and str(tmp_path) not in page.inner_text("body")
        assert UPLOADS.name not in page.inner_text("body") and not list(Path(UPLOADS.name).rglob(name))
        page.goto(page.address)
        wait_for(page, CAPTION + "return caption.includes('right')")
        page.get_by_text("Upload an image, GIF, or video").click()
    page.locator("#upload input[type=file]").set_input_files(write_media(tmp_path / "one.png", 0, 1))
    wait_for(page, ANSWERS + "return answers.includes('which color came first')")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_folder_is_searched_and_its_files_are_deleted(page, tmp_path):
    from mplug2.demo.page import UPLOADS

    def search(*names: str) -> None:
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names[1:]:
            source = EXAMPLES / name
            (folder / name).write_bytes(source.read_bytes() if source.exists() else b"damaged")
        page.goto(page.address)
        wait_for(page, CAPTION + "return caption.includes('right')")
        page.get_by_role("tab", name="Search", exact=True).click()
        page.locator("#folder input[type=file]").set_input_files(folder)
        wait_for(page, f"return document.querySelector('#folder').innerText.includes('{names[-1].split('.')[0]}')")
        page.get_by_role("button", name="Search", exact=True).click()

    search("good", "red_seven_growing.gif", "blue_seven_left.gif", "note.txt")
    wait_for(page, "return /blue_seven_left.gif\\t[\\d.]+\\n\\s*red_seven_growing.gif"
                   "/.test(document.querySelector('#found').innerText)")
    assert page.inner_text("#found").count("\t") == 3 and not list(Path(UPLOADS.name).rglob("*.gif"))
    page.fill("#query textarea", "a red seven growing")  # the same folder again, whose files are gone
    page.get_by_role("button", name="Search", exact=True).click()
    wait_for(page, "return /red_seven_growing.gif\\t[\\d.]+\\n\\s*blue_seven_left.gif"
                   "/.test(document.querySelector('#found').innerText)")
    search("without", "note.txt")
    wait_for(page, "return document.body.innerText.includes('the folder has 0 images, GIFs and videos: choose one')")
    search("bad", "red_seven_growing.gif", "broken.gif")
    wait_for(page, "return document.body.innerText.includes('broken.gif cannot be decoded')")
    assert UPLOADS.name not in page.inner_text("body") and not list(Path(UPLOADS.name).rglob("*.gif"))


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_server_that_is_terminated_leaves_no_uploads_and_a_port_in_use_is_refused(page, tmp_path):
    from processes import free_port

    port = str(free_port())
    command = [sys.executable, "-m", "mplug2.demo", "--port", port]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        while server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.2)
        (uploads,) = tmp_path.glob("mplug2_demo_*")
        (uploads / "one.gif").write_bytes(b"an upload that nobody has read")
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 1 and f"cannot listen on 127.0.0.1:{port}" in second.stderr
        assert "choose another one with --port" in second.stderr and "Traceback" not in second.stderr
    finally:
        server.terminate()
    assert server.wait(60) == 128 + signal.SIGTERM and not list(tmp_path.glob("mplug2_demo_*"))


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_word_is_chosen_with_the_keyboard(page):
    page.goto(page.address)
    wait_for(page, "return document.querySelectorAll('#words [role=button]').length === 8")
    page.locator("#words [role=button]").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    wait_for(page, "return document.querySelector('#explained')?.innerText.startsWith('seven: written with')")
    wait_for(page, "return document.querySelectorAll('#attention img').length === 1")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_odd_questions_and_hasty_clicks(page):
    """Emoji are not words, and markup is text. The last of several choices counts, in each of two tabs."""
    page.goto(page.address)
    wait_for(page, CAPTION + "return caption.includes('right')")
    question = page.locator("#question input")
    for text, shown in (
        ("\N{GRINNING FACE}", "no question: write one, with letters or digits"),
        ("zebra " * 400, "tokens with [CLS] and [SEP], more than max_length=32: shorten it"),
        ("which color is it <img src=x onerror=document.title='run'>", "which \ncolor \nis \nit \ni \n##m"),
    ):
        question.fill(text)
        question.press("Enter")
        wait_for(page, f"return document.body.innerText.includes({json.dumps(shown)})")
    assert page.title() == "mPLUG-2"
    other = page.context.browser.new_page()
    other.goto(page.address)
    wait_for(other, CAPTION + "return caption.includes('right')")
    for name in ("reverse", "shuffle", "freeze", "reverse"):
        page.get_by_label(name).check()
    other.get_by_label("freeze").check()
    wait_for(page, CAPTION + "return caption.includes('left')")
    wait_for(other, CAPTION + "return !caption.includes('left') && !caption.includes('right')")
    other.close()
    assert "left" in page.input_value("#caption textarea")


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_browser_refuses_every_other_address(page):
    """Also another name of this computer, with any protocol."""
    other = page.context.browser.new_page()
    other.goto(page.address)
    other.evaluate("""() => {
        window.refused = [];
        document.addEventListener('securitypolicyviolation', event => refused.push(event.blockedURI));
        const there = '//localhost:' + location.port;
        fetch('http:' + there).catch(() => {});
        try { new WebSocket('ws:' + there); } catch {}
        for (const name of ['img', 'script', 'iframe']) {
            const element = document.createElement(name);
            element.src = 'http:' + there;
            document.body.append(element);
        }
    }""")
    wait_for(other, "return refused.filter(address => address.includes('//localhost:')).length === 5")
    other.close()


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_two_models_are_compared_side_by_side(open_page, page, tmp_path):
    """By default the model is compared with itself, without its local temporal modules."""
    make_predictor("pretrain").save(tmp_path / "untrained")
    page.goto(page.address)
    for opened, name in ((page, "pretrained, local temporal modules off"),
                         (open_page(compare=str(tmp_path / "untrained")), "untrained")):
        wait_for(opened, CAPTION + "return caption.includes('right')")
        opened.get_by_role("tab", name="Compare", exact=True).click()
        opened.get_by_role("button", name="Compare", exact=True).click()
        wait_for(opened, "return document.querySelector('#comparison').innerText.includes('how many digits')")
        rows = [line.split("\t") for line in opened.inner_text("#comparison").splitlines() if "\t" in line]
        assert rows[0][1:] == ["pretrained", name] and rows[1][:2] == ["caption", "a red seven that moves to the right"]
        assert ["does it move right or left", "right"] in [row[:2] for row in rows]
        assert rows[1][2] != rows[1][1] and opened.elsewhere == []


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_a_checkpoint_for_grounding_shows_frames_and_a_box_but_no_caption(open_page, tmp_path):
    make_predictor("grounding").save(tmp_path / "grounding")
    opened = open_page(checkpoint=str(tmp_path / "grounding"))
    wait_for(opened, CAPTION + "return caption.includes('this model has no decoder')")
    wait_for(opened, "return document.querySelector('#frames img')")
    opened.get_by_role("tab", name="Grounding", exact=True).click()
    opened.get_by_role("button", name="Find it", exact=True).click()
    wait_for(opened, "return document.querySelector('#box img')?.naturalWidth === 96")
    opened.get_by_role("tab", name="Compare", exact=True).click()
    opened.get_by_role("button", name="Compare", exact=True).click()
    wait_for(opened, "return document.body.innerText.includes(\"'grounding' has no decoder\")")
    assert opened.elsewhere == []


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_the_page_has_no_horizontal_scroll_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(page.address)
    wait_for(page, CAPTION + "return caption.length > 3")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
