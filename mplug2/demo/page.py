"""The page of the demo, in Gradio. It computes nothing itself: see `views.py`.

It binds to this computer alone unless --host says otherwise, sends nothing anywhere, and loads no fonts or scripts from
the net.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: it asks at import
os.environ.setdefault("GRADIO_TEMP_DIR", (UPLOADS := TemporaryDirectory(prefix="mplug2_demo_")).name)

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402
from torch import Tensor  # noqa: E402

from mplug2.data.media import is_media  # noqa: E402
from mplug2.data.text import clean  # noqa: E402
from mplug2.demo import views  # noqa: E402
from mplug2.demo.settings import ROOT, DemoSettings  # noqa: E402
from mplug2.predictor import Word  # noqa: E402
from tiny_data.world import COLOR_NAMES, DIGITS  # noqa: E402

UPLOAD_LIMIT, REQUEST_LIMIT, SEARCH_LIMIT = "50mb", 500 * 2**20, 200
"""Largest file, bytes of all files that are uploaded at once, and most files that are searched."""
KEEP_SECONDS = 600
"""Uploads that are older are deleted; all of them are when the server stops."""
DECODING = {
    "greedy, after the prompt": {}, "beam search (5)": {"beams": 5}, "greedy, without prompt": {"prompted": False},
    "by instruction": {"instructed": True},
}
NOTHING_WRITTEN = "this model has no decoder: it writes nothing; a tab whose head it does not have says so"
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' blob: data:"
"""Content-Security-Policy: the browser refuses everything that does not come from this server."""
CSS = """
.gradio-container {max-width: 1100px !important; margin: 0 auto !important}
footer {display: none !important}
.tab-wrapper, .tab-container {flex-wrap: wrap !important; height: auto !important; min-width: 0 !important}
#latents .thumbnail-item {aspect-ratio: 4 / 1 !important}
#latents .grid-wrap {max-height: none !important; overflow: visible !important; padding-top: 32px}
#frames img, #attention img, #latents img, #box img {image-rendering: pixelated; object-fit: contain}
#frames img, #attention img, #box img {padding-top: 26px}
#tree ul {font-size: 1em}
"""
HOVER = """() => {
    let resting;
    document.addEventListener('mouseover', ({target}) => {
        clearTimeout(resting);
        const word = target.closest('#words [role=button]');
        if (word) resting = setTimeout(() => word.click(), 100);
    });
}"""
"""A word is chosen when the mouse rests on it; one that the mouse only passes is not."""
INTRO = """# mPLUG-2, {name}
Change the video and watch what the model writes. {known}"""
SWITCH = ("Off: the outputs of these modules are zero, in the same weights, without training again. The vision encoder "
          "then cannot see the order of the frames. A model that was trained without them is a different one.")


def guard(app: Callable) -> Callable:
    """ASGI middleware that adds `POLICY` to every response, and refuses a request above `REQUEST_LIMIT` unread."""
    async def serve(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        http = scope["type"] == "http"
        if http and scope["method"] == "POST" and not 0 <= _length(scope) <= REQUEST_LIMIT:
            answer = PlainTextResponse(f"at most {REQUEST_LIMIT >> 20} MB at once: upload fewer files", 413)
            return await answer(scope, receive, send_with_policy)
        await app(scope, receive, send_with_policy if http else send)

    return serve


def _length(scope: dict) -> int:
    """Bytes of the body of a request; -1 if it does not say."""
    return int(dict(scope["headers"]).get(b"content-length", -1))


class Demo:
    """The functions behind the page, for one model and one to compare it with. One of them runs at a time."""

    def __init__(self, checkpoint: str | Path, compare: str | Path | None = None):
        self.name = Path(checkpoint).name
        self.predictor = views.open_checkpoint(checkpoint)
        self.other = views.open_checkpoint(compare) if compare else None
        self.other_name = Path(compare).name if compare else f"{self.name}, local temporal modules off"
        self.lock = Lock()

    def guarded(self, function: Callable) -> Callable:
        """Run alone, and show what is wrong with an input as a sentence in the page."""
        @functools.wraps(function)
        def run(*args):
            with self.lock:
                try:
                    return function(*args)
                except ValueError as error:
                    raise gr.Error(str(error), print_exception=False, duration=None) from None
        return run

    def draw(self, *scene_and_drawing) -> views.Visual:
        *scene, drawing = scene_and_drawing
        if not drawing or drawing["composite"] is None:
            raise ValueError("the drawing is empty: choose the brush at its left, and draw a digit")
        return self.make(*scene, drawing["composite"])

    def make(self, motion, digit, color, digit2, color2, speed, handwriting, drawing=None) -> views.Visual:
        return views.draw_scene(motion, DIGITS.index(digit), color, DIGITS.index(digit2), color2, float(speed),
                                int(handwriting), drawing)

    def upload(self, path: str | None) -> views.Visual:
        if not path:
            raise ValueError("no file: drop an image, a GIF, or a video")
        try:
            return views.read_visual(path, self.predictor)
        finally:
            Path(path).unlink(missing_ok=True)

    def show(self, visual, order, temporal, decoding):
        """Frames as the model sees them, its caption, and the answers to the suggested questions."""
        visual = views.reorder(visual, order)
        if "decoder" not in self.predictor.model.components:
            return views.strip(visual.frames), NOTHING_WRITTEN, ""
        with views.local_temporal_off(self.predictor, not temporal):
            (text,) = self.predictor.caption([visual], **DECODING[decoding])
            rows = views.answers(self.predictor, visual) if "fusion" in self.predictor.model.components else []
        return views.strip(visual.frames), text, _table(("question", "answer", "true answer"), rows)

    def trace(self, visual, order, temporal, decoding, question) -> list[Word]:
        """The words of a question and its answer, or, without a question, of the caption."""
        if not question and "decoder" not in self.predictor.model.components:
            return []
        how = {} if question else DECODING[decoding]
        with views.local_temporal_off(self.predictor, not temporal):
            question = _with_words(question, "question") if question else ""
            return self.predictor.trace(views.reorder(visual, order), question, **how)[1]

    def attention(self, visual, order, words, index, layer, head):
        """Where a word attends in one layer, by one head or by all; nothing if there is no such word."""
        if not 0 <= index < len(words):
            return None, ""
        word = words[index]
        names = list(word.maps)
        if not names:
            raise ValueError(f"the word {word.text!r} has no cross-attention to the video in this model")
        weights = word.maps[names[min(int(layer), len(names)) - 1]]
        weights = weights.mean(dim=0) if head == "all" else weights[min(int(head), len(weights)) - 1]
        side = f"written with probability {word.probability:.1%}; most likely here: " + ", ".join(
            f"{other} {p:.1%}" for other, p in word.others) if word.others else "a word of the question"
        text = f"**{word.text}**: {side}. {weights.sum():.0%} of this attention is on patches of the frames."
        return views.strip(views.reorder(visual, order).frames, weights.cpu().numpy()), text

    def fit(self, visual, order, temporal, texts):
        with views.local_temporal_off(self.predictor, not temporal):
            rows = views.fitting_texts(self.predictor, views.reorder(visual, order), texts.splitlines())
        return _table(("text", "cosine", "matching probability"), [(a, f"{b:.2f}", f"{c:.1%}") for a, b, c in rows])

    def read_folder(self, files) -> list[tuple[str, Tensor]]:
        """The names and unit vectors of the images and videos of an uploaded folder, whose files are deleted."""
        paths = [Path(file) for file in files if is_media(file)]
        try:
            if not 1 <= len(paths) <= SEARCH_LIMIT:
                raise ValueError(f"the folder has {len(paths)} images, GIFs and videos: choose one with 1 to "
                                 f"{SEARCH_LIMIT}")
            return self.embed(paths)
        finally:
            for file in files:
                Path(file).unlink(missing_ok=True)

    def embed(self, paths: list[Path]) -> list[tuple[str, Tensor]]:
        with views.names_only(paths):
            return [(path.name, vector) for path, vector in zip(paths, self.predictor.embed_media(paths))]

    def search(self, files, vectors: list[tuple[str, Tensor]], text: str) -> str:
        """What `read_folder` has made of the uploaded files, or the examples, by their cosine with a text."""
        if files and not vectors:
            raise ValueError("the folder is not read yet, or has a file that cannot be read: wait, or choose another")
        (query,) = self.predictor.embed_texts([_with_words(text, "text")])
        vectors = vectors or self.embed(sorted((ROOT / "docs/examples").glob("*.gif")))
        rows = sorted(((float(query @ vector), name) for name, vector in vectors), key=lambda row: (-row[0], row[1]))
        return _table(("file", "cosine"), [(name, f"{score:.2f}") for score, name in rows])

    def beams(self, visual, order, temporal, question):
        with views.local_temporal_off(self.predictor, not temporal):
            question = _with_words(question, "question") if question.strip() else ""
            return views.beam_tree(self.predictor, views.reorder(visual, order), question)

    def latents(self, visual, order, temporal):
        with views.local_temporal_off(self.predictor, not temporal):
            return views.latent_images(self.predictor, views.reorder(visual, order))

    def compare(self, visual, order):
        """Caption and answers of both models, on the same frames."""
        visual = views.reorder(visual, order)
        other = self.other or self.predictor
        for predictor in (self.predictor, other):
            predictor.model.require("decoder")
            predictor.model.require("fusion")
        one = [self.predictor.caption([visual])[0], *(row[1] for row in views.answers(self.predictor, visual))]
        with views.local_temporal_off(other, self.other is None):
            two = [other.caption([visual])[0], *(row[1] for row in views.answers(other, visual))]
        rows = zip(["caption", *(question for question, _ in visual.asked)], one, two)
        return _table(("", self.name, self.other_name), list(rows))

    def box(self, visual, text):
        return views.boxed(self.predictor, visual, _with_words(text, "text"))


def _with_words(text: str | None, what: str) -> str:
    """The text. Raises ValueError if nothing is left of it after `clean`: punctuation and emoji are not words."""
    if not clean(text or ""):
        raise ValueError(f"no {what}: write one, with letters or digits")
    return text


def _table(names: tuple[str, ...], rows: list[tuple]) -> str:
    """Rows as an HTML table. Texts of users and models are escaped."""
    line = "".join(f"<th style='text-align:left;padding:2px 12px'>{views.escape(name)}</th>" for name in names)
    lines = ["".join(f"<td style='padding:2px 12px'>{views.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{line}</tr>{''.join(f'<tr>{each}</tr>' for each in lines)}</table>"


def _highlighted(words: list[Word]) -> list[tuple[str, float | None]]:
    """Words for gr.HighlightedText: colored by probability."""
    return [(word.text + " ", word.probability) for word in words]


def _source(demo: Demo) -> gr.State:
    """The controls that make or upload a video. Returns its state."""
    with gr.Row():
        motion = gr.Dropdown(list(views.MOTIONS), value="moves right", label="Motion", elem_id="motion")
        speed = gr.Radio(["0.5", "1", "2"], value="1", label="Speed")
    with gr.Row():
        digit = gr.Dropdown(list(DIGITS), value="seven", label="Digit", elem_id="digit")
        color = gr.Dropdown(list(COLOR_NAMES), value="red", label="Color", elem_id="color")
    with gr.Row(visible=False) as second:
        digit2 = gr.Dropdown(list(DIGITS), value="three", label="Second digit")
        color2 = gr.Dropdown(list(COLOR_NAMES), value="blue", label="Its color")
    handwriting = gr.Slider(0, 40, 0, step=1, label="Handwriting (of people that training never saw)")
    with gr.Accordion("Draw the digit yourself", open=False):
        drawing = gr.Sketchpad(type="numpy", label="Choose the brush, and draw one digit, large", height=260,
                               canvas_size=(240, 240), layers=False, elem_id="drawing",
                               brush=gr.Brush(default_size=22, colors=["#000000"]))
        use_drawing = gr.Button("Use the drawing", elem_id="use_drawing")
    with gr.Accordion("Upload an image, GIF, or video", open=False):
        file = gr.File(label=f"At most {UPLOAD_LIMIT.upper()}; deleted as soon as it is read", elem_id="upload")
    first = demo.make("moves right", "seven", "red", "three", "blue", 1, 0)
    visual = gr.State(first, time_to_live=3600)
    scene = [motion, digit, color, digit2, color2, speed, handwriting]
    motion.change(lambda kind: gr.update(visible=kind.startswith("two")), motion, second)
    for each in scene:
        each.input(demo.guarded(demo.make), scene, visual)
    use_drawing.click(demo.guarded(demo.draw), [*scene, drawing], visual)
    file.upload(demo.guarded(demo.upload), file, visual)
    return visual


def _tabs(demo: Demo, visual: gr.State, order: gr.Radio, temporal: gr.Checkbox) -> None:
    """What else the model can do with the video. A result is removed when the video changes."""
    now, run = [visual, order, temporal], demo.guarded
    with gr.Tab("Which text fits"):
        texts = gr.Textbox("a red seven moving right\na red seven moving left\na blue two", lines=4, max_length=2000,
                           label="Texts, one in each line")
        fits = gr.HTML(elem_id="fits")
        gr.Button("Compare the texts").click(run(demo.fit), [*now, texts], fits)
        gr.Markdown("Cosine: contrastive head, each side encoded alone. Probability: matching head, after fusion.")
    with gr.Tab("Search"):
        folder = gr.File(file_count="directory", label="A folder (empty: the six videos of docs/examples)",
                         elem_id="folder")
        query, found = gr.Textbox("a blue seven moving left", label="Text", elem_id="query"), gr.HTML(elem_id="found")
        vectors = gr.State([], time_to_live=3600)
        emptied = folder.change(lambda: ([], ""), None, [vectors, found])
        emptied.then(lambda files: run(demo.read_folder)(files) if files else [], folder, vectors)
        gr.Button("Search").click(run(demo.search), [folder, vectors, query], found)
    with gr.Tab("Beam search"):
        question, tree = gr.Textbox(label="Question (empty: the caption)"), gr.HTML(elem_id="tree")
        gr.Button("Search with 5 beams").click(run(demo.beams), [*now, question], tree)
        gr.Markdown("Bold: the best hypothesis. Those without an end were cut when the best one ended.")
    with gr.Tab("Latents"):
        gallery = gr.Gallery(columns=2, height="auto", buttons=["fullscreen"], object_fit="contain", elem_id="latents",
                             label="Brighter: the latent gathers more from this patch")
        gr.Button("Show the latents").click(run(demo.latents), now, gallery)
    with gr.Tab("Compare"):
        comparison = gr.HTML(elem_id="comparison")
        gr.Button("Compare").click(run(demo.compare), [visual, order], comparison)
        gr.Markdown(f"**{demo.name}** next to **{demo.other_name}**. Choose another model with `--compare DIR`.")
    with gr.Tab("Grounding"):
        text = gr.Textbox("the red seven", label="What to find in the first frame")
        box = gr.Image(label="Box", buttons=["fullscreen"], height=260, elem_id="box")
        gr.Button("Find it").click(run(demo.box), [visual, text], box)
    gr.on([each.change for each in now], lambda: ("", "", "", None, None), None,
          [fits, tree, comparison, gallery, box], show_progress="hidden")


def _words(demo: Demo, page: gr.Blocks, inputs: list) -> None:
    """The words of the answer, or of the caption, with what one of them attends to: the last, until one is chosen."""
    config = demo.predictor.model.config
    layers = max(config.fusion_layers, config.decoder_layers)
    words, chosen = gr.State([]), gr.State(-1)
    shown = gr.HighlightedText(label="Words of the answer, or of the caption: point at one, or choose it",
                               elem_id="words", show_legend=False)
    heat = gr.Image(label="Its attention", elem_id="attention", height=150, buttons=["fullscreen"])
    explained = gr.Markdown(elem_id="explained")
    with gr.Row():
        layer = gr.Dropdown([str(i + 1) for i in range(layers)], value=str(layers), label="Layer", elem_id="layer",
                            info="of fusion (question) or decoder; the last, if there are fewer")
        head = gr.Dropdown(["all", *(str(i + 1) for i in range(config.heads))], value="all", label="Head",
                           elem_id="head", info="of this layer, or the mean of all")

    def write(*values):
        *now, layer_now, head_now = values
        found = demo.trace(*now)
        last = len(found) - 1
        return found, _highlighted(found), last, *demo.attention(now[0], now[1], found, last, layer_now, head_now)

    def choose(event: gr.SelectData, *values):
        *now, layer_now, head_now = values
        return event.index, *demo.attention(*now, event.index, layer_now, head_now)

    visual, order = inputs[:2]
    every = {"show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([page.load, *(each.change for each in inputs)], demo.guarded(write),
          [*inputs, layer, head], [words, shown, chosen, heat, explained], **every)
    shown.select(demo.guarded(choose), [visual, order, words, layer, head], [chosen, heat, explained], **every)
    gr.on([layer.change, head.change], demo.guarded(demo.attention), [visual, order, words, chosen, layer, head],
          [heat, explained], **every)


def build(demo: Demo) -> gr.Blocks:
    """The page."""
    known = "This small model knows ten digits, six colors, and how they move, and nothing else."
    with gr.Blocks(title="mPLUG-2", analytics_enabled=False, delete_cache=(KEEP_SECONDS, KEEP_SECONDS)) as page:
        gr.Markdown(INTRO.format(name=demo.name, known=known if demo.name == "pretrained" else ""))
        with gr.Row():
            with gr.Column():
                visual = _source(demo)
                frames = gr.Image(label="The frames that the model sees", elem_id="frames", height=150,
                                  buttons=["fullscreen"])
                order = gr.Radio(list(views.ORDERS), value="as they are", label="Frames", elem_id="order")
                temporal = gr.Checkbox(True, label="Local temporal modules", info=SWITCH, elem_id="temporal")
            with gr.Column():
                caption = gr.Textbox(label="Caption", elem_id="caption")
                decoding = gr.Radio(list(DECODING), value=list(DECODING)[0], label="How captions are written")
                table = gr.HTML(elem_id="answers")
                question = gr.Dropdown(["", *views.GENERAL_QUESTIONS], value="", allow_custom_value=True,
                                       label="Ask (choose or write, then Enter)", elem_id="question")
                _words(demo, page, [visual, order, temporal, decoding, question])
        inputs = [visual, order, temporal, decoding]
        gr.on([page.load, *(each.change for each in inputs)], demo.guarded(demo.show), inputs, [frames, caption, table],
              show_progress="hidden", trigger_mode="always_last")
        _tabs(demo, visual, order, temporal)
    return page


def serve(settings: DemoSettings, block: bool = True):
    """Serve the page. Returns what Gradio's `launch` returns; with `block` it waits until the server is stopped.

    Raises ValueError for a folder that is not a checkpoint, OSError for an address that it cannot listen on.
    """
    page = build(Demo(settings.checkpoint, settings.compare or None))
    sans = ["system-ui", "sans-serif"]  # names of fonts that every computer has: the defaults come from the net
    theme = gr.themes.Default(font=sans, font_mono=["ui-monospace", "monospace"]).set(
        block_info_text_color="*neutral_500")  # the default is too pale to read
    try:
        return page.launch(
            server_name=settings.host, server_port=settings.port, max_file_size=UPLOAD_LIMIT, show_error=False,
            prevent_thread_lock=not block, share=False, theme=theme, css=CSS, js=HOVER, quiet=not block,
            app_kwargs={"middleware": [Middleware(guard)]},
        )
    except OSError as error:
        raise OSError(f"cannot listen on {settings.host}:{settings.port}: another program may use the port; choose "
                      "another one with --port") from error
