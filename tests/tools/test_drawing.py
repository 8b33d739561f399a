"""Drawing on frames: a WebP in a page moves, and a repeated last frame is shown once."""

import base64

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mplug2.predictor import WordAttention
from mplug2.tools.drawing import data_uri
from mplug2.tools.plots import draw_attention


def test_a_video_moves_and_a_repeated_last_frame_is_shown_once(tmp_path):
    frames = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 100, 200, 200, 200)])
    file = tmp_path / "a.webp"
    file.write_bytes(base64.b64decode(data_uri(frames).split(",")[1]))
    with Image.open(file) as image:
        assert image.n_frames == 3
        image.seek(1)
        assert image.convert("RGB").getpixel((4, 4)) == (100, 100, 100)


def test_the_attention_has_a_row_of_frames_for_each_word_and_its_folder_may_be_new(tmp_path, monkeypatch):
    first, *rest = (Image.new("RGB", (8, 8), (value, 0, 0)) for value in (50, 100, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    words, drawn = [WordAttention(word, "decoder", torch.full((3, 2, 2), 1 / 24)) for word in ("red", "seven")], []
    monkeypatch.setattr(Figure, "savefig", lambda figure, out, **_: drawn.append((figure, out.parent.is_dir())))
    draw_attention(tmp_path / "a.gif", 3, words, "a title", tmp_path / "new" / "folder" / "a.png")
    (figure, folder_exists), = drawn
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert folder_exists and [image[0, 0, 0] for image in images[:3]] == [50, 100, 200] and len(images) == 3 * 3
    assert texts == ["a title", "red\n50% on patches\ndecoder", "seven\n50% on patches\ndecoder"]
    with pytest.raises(ValueError, match="the model wrote nothing about it"):
        draw_attention(tmp_path / "a.gif", 3, [], "a title", tmp_path / "a.png")
