"""Drawing on frames: a WebP in a page moves, and a repeated last frame is shown once."""

import base64

import numpy as np
from PIL import Image

from mplug2.tools.drawing import data_uri


def test_a_video_moves_and_a_repeated_last_frame_is_shown_once(tmp_path):
    frames = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 100, 200, 200, 200)])
    file = tmp_path / "a.webp"
    file.write_bytes(base64.b64decode(data_uri(frames).split(",")[1]))
    with Image.open(file) as image:
        assert image.n_frames == 3
        image.seek(1)
        assert image.convert("RGB").getpixel((4, 4)) == (100, 100, 100)
