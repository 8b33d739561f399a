"""Benchmark of reading videos and photos: CPU time of `read_video` against imageio, which decodes in order.

    python -m mplug2.tools.bench --media                # files that it writes: 30 s and 4 min of H.264, and a photo
    python -m mplug2.tools.bench --media --files docs/examples/blue_seven_left.gif    # your files, with commas

Each file has its own process, where both readers take turns. They read frames as in training: a random one of each
segment, the same for both. The garbage collector is frozen, as in a worker of the loader, because imageio collects
garbage whenever it closes a file.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import imageio
import imageio.v3 as iio
import numpy as np
from imageio.core.v3_plugin_api import PluginV3
from PIL import Image

from mplug2.data.frame_choice import segment_indices
from mplug2.data.media import read_image, read_video, to_pixels

FRAMES, SIZE = 4, 224


def read_in_order(path: Path, frames: int | None, rng: np.random.Generator | None = None) -> np.ndarray:
    """Decode from the start to the last chosen frame, as `read_video` did before it could seek: (t, H, W, 3).

    The number of frames is that of the header, or else all frames are counted first.
    """
    def decode(file: PluginV3, pixel_format: str, select: str):
        filters = [("select", select), ("scale", "threads=1"), ("format", pixel_format)]
        return file.iter(filter_sequence=filters, format=pixel_format, thread_count=1)

    with iio.imopen(Path(path), "r", plugin="pyav") as file:
        total = file.properties().n_images
        if total <= 0:
            with iio.imopen(Path(path), "r", plugin="pyav") as counted:
                total = sum(1 for _ in decode(counted, "gray", "1"))
        numbers = list(range(total)) if frames is None else segment_indices(total, frames, rng).tolist()
        wanted = sorted(set(numbers))
        select = "1" if frames is None else "+".join(f"eq(n,{number})" for number in wanted)
        kept = dict(zip(wanted, decode(file, "rgb24", select)))
    return np.stack([kept[number] for number in numbers])


def measure_video(path: Path, frames: int | None, repeats: int) -> dict[str, float]:
    """Median CPU seconds of both readers, and whether they give the same frames. Raises MediaError, or ValueError."""
    gc.freeze()
    found = read_video(path, frames)
    try:
        same = np.array_equal(read_in_order(path, frames), found)
    except (OSError, KeyError) as error:  # among them: fewer frames than its header says
        raise ValueError(f"{path} cannot be read by imageio ({error!r}): nothing to compare with") from error
    times = {read_in_order: [], read_video: []}
    for seed in range(repeats):
        for read, measured in times.items():
            rng = np.random.default_rng(seed)
            start = time.process_time()
            read(path, frames, rng)
            measured.append(time.process_time() - start)
    return {"reference_s": statistics.median(times[read_in_order]), "s": statistics.median(times[read_video]),
            "same": same}


def measure_photo(path: Path, repeats: int) -> dict[str, float]:
    """Median CPU seconds from a photo to pixels, decoded whole and at a reduced size."""
    times: dict[int | None, list[float]] = {None: [], 2 * SIZE: []}
    for _ in range(repeats):
        for min_side, measured in times.items():
            start = time.process_time()
            to_pixels(read_image(path, min_side), SIZE)
            measured.append(time.process_time() - start)
    return {"reference_s": statistics.median(times[None]), "s": statistics.median(times[2 * SIZE])}


def write_h264(
    path: Path, length: int, rate: int, keys: int | None, width: int = 320, height: int = 240
) -> Path:
    """`length` seconds of video: a texture that moves, with a cut every 6 seconds.

    There is a key frame at least every `keys` frames; None leaves it to x264 (250).
    """
    rng, block = np.random.default_rng(0), width // 40
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options={"g": str(keys)} if keys else {})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(length * rate):
            place = number % (6 * rate)
            if place == 0:
                texture = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8).repeat(block, 0).repeat(block, 1)
            frame = texture[place: place + height, 2 * place: 2 * place + width]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def copy_packets(path: Path, copy: Path) -> Path:
    """The same packets in another container."""
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return copy


def write_files(folder: Path, lengths: tuple[int, int]) -> dict[str, tuple[Path, int | None]]:
    """Videos by name, and how many frames to read from each. None: all."""
    short, long = lengths
    two_seconds = write_h264(folder / "short.mp4", short, 30, 60)
    minutes = write_h264(folder / "long.mp4", long, 25, 50)
    return {
        f"{short} s, mp4": (two_seconds, FRAMES),
        f"{short} s, mp4, sparse key frames": (write_h264(folder / "sparse.mp4", short, 30, None), FRAMES),
        f"{long} s, mp4": (minutes, FRAMES), f"{long} s, mkv": (copy_packets(minutes, folder / "long.mkv"), FRAMES),
        f"{short} s, mp4, all frames": (two_seconds, None),
    }


def bench_media(
    files: list[Path], repeats: int, in_new_process: Callable[..., dict], lengths: tuple[int, int] = (30, 240)
) -> dict[str, float]:
    """Measure `files`, or files of these lengths in seconds that it writes. Returns the numbers that `--json` saves."""
    found: dict[str, float] = {}

    def row(name: str, result: dict[str, float], note: str) -> None:
        ratio = result["reference_s"] / result["s"]
        print(f"{name:<34}{1000 * result['reference_s']:>14.1f}{1000 * result['s']:>10.1f}{ratio:>8.1f}  {note}",
              flush=True)
        key = "_".join(name.replace(",", "").split())
        found.update({f"{key}_reference_s": result["reference_s"], f"{key}_s": result["s"], f"{key}_ratio": ratio})

    with tempfile.TemporaryDirectory() as folder:
        if files:
            videos = {f"{path.name}{', all frames' * (frames is None)}": (path, frames)
                      for path in files for frames in (FRAMES, None)}
        else:
            videos = write_files(Path(folder), lengths)
        print(f"{FRAMES} frames unless noted; CPU time; PyAV {av.__version__}, imageio {imageio.__version__}\n")
        print(f"{'':<34}{'imageio, ms':>14}{'ours, ms':>10}{'ratio':>8}")
        for name, (path, frames) in videos.items():
            result = in_new_process(measure_video, path, frames, repeats)
            row(name, result, "bit-identical" if result["same"] else "other frames or pixels")
        if not files:
            photo = Path(folder) / "photo.jpg"
            noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC).save(photo, quality=90)
            row("photo, 12 megapixels", in_new_process(measure_photo, photo, repeats), f"to {SIZE} x {SIZE} pixels")
    return found
