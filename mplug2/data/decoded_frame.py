"""From a decoded frame of a video to what is meant to be seen: RGB, upright, on white, in standard dynamic range."""

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from mplug2.data.hdr import TRANSFERS, to_sdr
from mplug2.data.images import on_white
from mplug2.data.media_errors import UnclearImageError

NO_ALPHA = ("is HEVC with an alpha layer, which this FFmpeg cannot decode; convert it, on an Apple device, to ProRes "
            "4444, or elsewhere get its WebM (VP9): they keep the transparency")


def codec_of(stream: VideoStream) -> str:
    """Name of the codec, whichever decoder is in use: "av1", not "libdav1d"."""
    return stream.codec_context.codec.canonical_name


def has_alpha_layer(stream: VideoStream) -> bool:
    """Whether an HEVC file says that it has a layer with the transparency: an SEI message, type 165, in its header."""
    return codec_of(stream) == "hevc" and b"\x4e\x01\xa5" in (stream.codec_context.extradata or b"")


class Converter:
    """Called with a decoded frame, it returns uint8 (H, W, 3).

    Frames of another size than (width, height) are resized to it before they are turned.
    UnclearImageError if the file declares transparency that the frames do not have: FFmpeg would show it as black.
    """

    def __init__(self, stream: VideoStream, size: tuple[int, int]):
        self.time_base, self.size, self.needs_alpha = stream.time_base, size, has_alpha_layer(stream)
        self.graphs: dict[tuple, av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        has_alpha = any(component.is_alpha for component in frame.format.components)
        if self.needs_alpha and not has_alpha:
            raise UnclearImageError(NO_ALPHA)
        transfer = TRANSFERS.get(frame.color_trc)
        if transfer:
            image = to_sdr(self.convert(frame, "rgb48le"), transfer)
        elif has_alpha:
            image = np.asarray(on_white(Image.fromarray(self.convert(frame, "rgba"))).convert("RGB"))
        else:
            image = self.convert(frame, "rgb24")
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return upright(image, np.frombuffer(bytes(matrix), np.int32)) if matrix is not None else image

    def convert(self, frame: av.VideoFrame, pixel_format: str) -> np.ndarray:
        key = frame.width, frame.height, frame.format.name, pixel_format
        if key not in self.graphs:
            graph = self.graphs[key] = av.filter.Graph()
            graph.threads = 1
            scale = "threads=1" if self.size == key[:2] else f"{self.size[0]}:{self.size[1]}:threads=1"
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=self.time_base
            )
            sink = graph.add("buffersink")
            graph.link_nodes(source, graph.add("scale", scale), graph.add("format", pixel_format), sink).configure()
        self.graphs[key].push(frame)
        return self.graphs[key].pull().to_ndarray()


def upright(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Apply a display matrix, nine numbers (a, b, u, c, d, v, x, y, w), to (H, W, 3): quarter turns and mirrorings.

    The pixel at column p and row q is shown at column a p + c q + x and row b p + d q + y.
    """
    a, b, c, d = matrix[[0, 1, 3, 4]].astype(np.int64)
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
