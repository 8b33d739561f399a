"""Video files: FFmpeg, through PyAV, decodes what the chosen frames need and no more.

    packets --Timeline--> when each frame is shown --choose_frames--> chosen frames --seek, decode--> RGB

A video file is a sequence of packets, one for each frame. Most of them hold the difference to other frames, so decoding
can only start at a key frame. The packets alone, without decoding, say how many frames there are, when each frame is
shown, and where the key frames lie. A chosen frame then costs the decoding from the last key frame before it. In any
doubt (packets without times, codecs with other rules, damage) the file is decoded in order, from its start. Both ways
give the same frames, bit by bit.

Everything runs in one thread: the workers of a loader already run in parallel.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, compress, islice, pairwise
from operator import add
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from mplug2.data.decoded_frame import NO_ALPHA, Converter, codec_of, has_alpha_layer
from mplug2.data.frame_choice import choose_frames
from mplug2.data.media_errors import ADVICE, MediaError, media_error

SEEKABLE = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "av1", "mjpeg")
"""Codecs with one packet for each frame, and with key frames that need nothing before them. The tests compare them with
decoding in order."""
SKIPPABLE = ("h264", "mpeg4", "mpeg1video", "mpeg2video")
"""Of these, codecs that mark frames which no other frame refers to, so that the decoder may leave them out."""
FLUSHED = ("h264", "hevc")
"""Codecs whose decoders hold frames back, to put them into order, and give them all when no packet follows."""
PROGRESSIVE = 1  # FFmpeg's AV_FIELD_PROGRESSIVE; 0 is unknown, and higher numbers are the orders of two fields
RAW_FORMATS = ("h264", "hevc", "m4v", "mpegvideo", "mjpeg", "obu", "vc1")
"""Streams without a container: FFmpeg makes up the times of their frames."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop the transparency


class Doubt(Exception):
    """Seeking might not give the frames that decoding in order gives."""


@dataclass(frozen=True)
class Timeline:
    """What the packets say. Times are integers, in units of the stream's time base."""

    starts: Sequence[int]
    """When each frame is shown, ascending: a range at a constant rate. 0, 1, 2, ... if the packets do not say."""
    sizes: Sequence[int] = ()
    """Size in bytes of each packet, in the order of the file."""
    times: Sequence[int] = ()
    """Presentation time of each packet; empty if it is only known to be one of `starts`."""
    keys: Sequence[tuple[int, int, int]] = ()
    """Presentation time, decoding time, and number in `sizes` of each key frame. Empty if seeking is in doubt."""

    def durations(self) -> np.ndarray:
        """The last frame is shown for as long as the median frame."""
        if isinstance(self.starts, range):
            return np.full(len(self.starts), self.starts.step)
        shown = np.diff(self.starts)
        return np.append(shown, np.median(shown) if len(shown) else 1)


def read_frames(path: Path | str, frames: int | None, rng: np.random.Generator | None) -> np.ndarray:
    """The chosen frames of a video file: uint8 (t, H, W, 3). Raises MediaError, or whatever FFmpeg raises."""
    numbers, timeline = None, None
    if frames is not None:
        with _open(path) as (container, stream):
            timeline = read_timeline(path, container, stream)
            if timeline.starts:
                if 2 * len(timeline.starts) < stream.frames:  # a hint, to be checked
                    _check_length(path, len(timeline.starts), _promised(container, stream))
                numbers = choose_frames(timeline.durations(), frames, rng)
                with suppress(Doubt, av.FFmpegError):
                    return _decode_by_seeking(container, stream, timeline, numbers)
    kept, starts, promised = _decode_in_order(path, numbers)
    if not starts:
        with _open(path) as (_, stream):
            problem = NO_ALPHA if has_alpha_layer(stream) else f"has no frame that can be decoded; {ADVICE}"
        raise media_error(path, "a video", problem)
    if numbers is None or not set(numbers) <= kept.keys():  # all frames, or the file ends before the last chosen one
        _check_length(path, len(starts), promised)
        if frames is None:
            numbers = list(kept)
        else:
            numbers = choose_frames(Timeline(starts).durations(), frames, rng)
            kept, _, _ = _decode_in_order(path, numbers)
    return np.stack([kept[number] for number in numbers])


@contextmanager
def _open(path: Path | str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, preferably of more than one frame. MediaError if there is none."""
    # The prefix and the list of protocols keep a file name, or a play list, from being taken for an address.
    with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        streams.sort(key=lambda stream: stream.frames == 1)  # a preview image may come before the video
        if not streams:
            others = sorted({"a cover image" if s.type == "video" else s.type for s in container.streams})
            raise media_error(path, "a video", f"has no video stream, only {', '.join(others) or 'a header'}; "
                              "download it again with its video, or leave it out")
        streams[0].codec_context.thread_count = 1
        yield container, streams[0]


def _is_cover(stream: VideoStream) -> bool:
    """Whether it is the cover image of an audio file."""
    return bool(stream.disposition & Disposition.attached_pic)


def _promised(container: InputContainer, stream: VideoStream) -> int:
    """How many frames the index of an MP4 file lists. The numbers that other formats give are only hints: 0."""
    is_mp4 = "mp4" in container.format.name
    return sum(not entry.is_discard for entry in stream.index_entries) if is_mp4 else 0


def _check_length(path: Path | str, found: int, promised: int) -> None:
    if 2 * found < promised:
        raise MediaError(f"{path} promises {promised} frames, but only {found} can be decoded; {ADVICE}")


# ---- what the packets say --------------------------------------------------------------------------------------------


def read_timeline(path: Path | str, container: InputContainer, stream: VideoStream) -> Timeline:
    packets = container.demux(stream)
    head = list(islice(packets, 2))
    if "mp4" in container.format.name and len(head) == 2 and codec_of(stream) in SEEKABLE and not _is_fragmented(path):
        if timeline := _timeline_of_index(path, stream, *head):
            return timeline
    timeline = _timeline_of_packets(stream, chain(head, packets))
    return Timeline(range(len(timeline.starts))) if container.format.name in RAW_FORMATS else timeline


def _timeline_of_index(path: Path | str, stream: VideoStream, first: av.Packet, second: av.Packet) -> Timeline | None:
    """The timeline of an MP4 file of constant rate, from its index and its first two packets: the others stay unread.

    The index holds decoding times. At a constant rate they are the presentation times, except for a constant delay.
    None if the rate varies, the file ends early, or frames are cut off by edits.
    """
    entries = [(entry.timestamp, entry.size, entry.pos, entry.is_keyframe, entry.is_discard)
               for entry in stream.index_entries]
    if len(entries) < 2:
        return None
    times, sizes, positions, key_flags, discards = zip(*entries)  # whole columns: a video of an hour has 90,000 entries
    step = times[1] - times[0]
    if step <= 0 or times != tuple(range(times[0], times[-1] + 1, step)):
        return None
    if any(discards) or max(map(add, positions, sizes)) > os.path.getsize(path):
        return None
    if None in (first.pts, second.pts) or not first.is_keyframe or first.dts != times[0]:
        return None
    if second.pts <= first.pts:  # earlier frames after the first key frame cannot be decoded
        return None
    delay = first.pts - first.dts
    keys = [(times[i] + delay, times[i], i) for i in compress(range(len(times)), key_flags)]
    return Timeline(range(first.pts, times[-1] + delay + 1, step), sizes, keys=keys)


def _is_fragmented(path: Path | str) -> bool:
    """Whether an MP4 file has fragments ("moof"), whose frames the index may lack: FFmpeg need not read them all."""
    position = 0
    with open(path, "rb") as file:
        while len(head := file.read(16)) >= 8:
            size, kind = struct.unpack_from(">I4s", head)
            if kind == b"moof":
                return True
            if size == 1 and len(head) == 16:  # the size is a 64-bit number after the name
                size, = struct.unpack_from(">Q", head, 8)
            if size < 8:  # 0: up to the end of the file
                break
            position += size
            file.seek(position)
    return False


def _timeline_of_packets(stream: VideoStream, packets: Iterable[av.Packet]) -> Timeline:
    """The timeline of any file: all packets are read, none is decoded."""
    codec = codec_of(stream)
    rows = [(packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_corrupt, _is_shown(packet, codec))
            for packet in packets if packet.size]
    if rows and rows[-1][4]:  # the file ends within this packet
        rows.pop()
    shown = [pts for pts, _, _, _, _, is_shown in rows if is_shown]
    in_order = _ascends([dts for _, dts, *_ in rows if dts is not None])  # no: two recordings in one file, for example
    if None in shown or len(set(shown)) < len(shown) or not in_order:
        return Timeline(range(len(shown)))
    keys = [(pts, pts if dts is None else dts, i) for i, (pts, dts, _, is_key, _, _) in enumerate(rows) if is_key]
    key_times = [pts for pts, _, _ in keys]
    # The same delay everywhere, although the decoder reorders frames: these are times of decoding (AVI).
    delays = {pts - dts for pts, dts, *_ in rows if None not in (pts, dts)}
    certain = (
        codec in SEEKABLE and not _has_alpha(stream) and not any(is_corrupt for _, _, _, _, is_corrupt, _ in rows)
        and not (stream.codec_context.has_b_frames and len(delays) == 1)
        and bool(keys) and None not in key_times and _ascends(key_times)
        and keys[0][2] == 0 and min(shown) >= key_times[0]  # frames before the first key frame cannot be decoded
    )
    times, sizes = [pts for pts, *_ in rows], [size for _, _, size, *_ in rows]
    return Timeline(sorted(shown), sizes, times, keys if certain else [])


def _ascends(times: list[int]) -> bool:
    return all(earlier < later for earlier, later in pairwise(times))


def _is_shown(packet: av.Packet, codec: str) -> bool:
    """Whether the packet becomes a frame. MP4 edits hide frames; VP8 has hidden reference frames (bit 4 of byte 0)."""
    hidden = codec == "vp8" and not memoryview(packet)[0] & 0x10
    return not (packet.is_discard or hidden)


def _has_alpha(stream: VideoStream) -> bool:
    return codec_of(stream) in ALPHA_DECODERS and stream.metadata.get("alpha_mode") == "1"


# ---- decoding --------------------------------------------------------------------------------------------------------


def _decode_by_seeking(
    container: InputContainer, stream: VideoStream, timeline: Timeline, numbers: list[int]
) -> np.ndarray:
    """Frames (t, H, W, 3) with these numbers. Raises Doubt or FFmpegError."""
    context = stream.codec_context
    converter = Converter(stream, (context.width, context.height))
    kept: dict[int, np.ndarray] = {}
    times = sorted({timeline.starts[number] for number in numbers})
    known = timeline.starts if isinstance(timeline.starts, range) else set(timeline.starts)
    while times:
        key = bisect_right(timeline.keys, times[0], key=lambda key: key[0]) - 1
        after = timeline.keys[key + 1][0] if key + 1 < len(timeline.keys) else times[-1] + 1
        group = [times[0], *(time for time in times[1:] if time < after)]
        for frame in _decode_group(container, stream, timeline, known, key, group):
            if (frame.width, frame.height) != (context.width, context.height) or frame.is_corrupt:
                raise Doubt
            kept[frame.pts] = converter(frame)
        times = times[len(group):]
    return np.stack([kept[timeline.starts[number]] for number in numbers])


def _decode_group(
    container: InputContainer, stream: VideoStream, timeline: Timeline, known: Container[int], key: int,
    times: list[int],
) -> Iterator[av.VideoFrame]:
    """The frames that are shown at `times`, decoded from key frame number `key`, or one before it.

    Doubt if the packets are not those of the timeline, if their times are not `known`, or if a frame does not come.
    """
    context, codec, missing, unsent = stream.codec_context, codec_of(stream), set(times), set(times)
    packets, packet, position = _packets_from_key(container, stream, timeline.keys[: key + 1], times[0])
    while True:
        is_frame = packet.size and _is_shown(packet, codec)
        if packet.size:
            if packet.size != timeline.sizes[position] or (is_frame and packet.pts not in known) or (
                    timeline.times and packet.pts != timeline.times[position]):
                raise Doubt
            position += 1
        skip = "NONREF" if codec in SKIPPABLE and is_frame and packet.pts not in missing else "DEFAULT"
        if context.skip_frame != skip:
            context.skip_frame = skip
        frames = context.decode(packet)
        unsent.discard(packet.pts)
        flush = codec in FLUSHED and packet.size and not unsent and context.field_order <= PROGRESSIVE
        if flush:  # the decoder has all it needs: it need not wait for packets that follow
            frames += context.decode(None)
        for frame in frames:
            if flush and frame.interlaced_frame:  # the other field of its last frame may be in the next packet
                raise Doubt
            if frame.pts in missing:
                missing.remove(frame.pts)
                yield frame
            elif missing and (frame.pts is None or frame.pts > times[-1]):
                raise Doubt
        if not missing:
            context.skip_frame = "DEFAULT"
            return
        if flush or not packet.size:  # the end of the file
            raise Doubt
        packet = next(packets)


def _packets_from_key(
    container: InputContainer, stream: VideoStream, keys: Sequence[tuple[int, int, int]], time: int
) -> tuple[Iterator[av.Packet], av.Packet, int]:
    """Packets after a key frame, its own packet and its number: the last key frame that is not shown after `time`.

    Frames that follow a key frame in the file may be shown before it, and need what comes before it (open GOP).
    """
    by_presentation = any(name in container.format.name for name in ("mp4", "matroska"))
    for shown, decoded, position in keys[: -4: -1]:
        # Where a container counts in presentation times, a seek to the decoding time ends a whole group earlier.
        for target in dict.fromkeys((shown, decoded) if by_presentation else (decoded,)):
            container.seek(target, stream=stream)
            packets = container.demux(stream)
            for packet in packets:  # a seek may end earlier
                if packet.is_keyframe and packet.pts is not None and packet.pts >= shown:
                    if packet.pts <= time:
                        return packets, packet, position
                    break  # the seek ended later, or this key frame is shown later than the index let expect
    raise Doubt


def _decode_in_order(
    path: Path | str, numbers: list[int] | None
) -> tuple[dict[int, np.ndarray], list[int], int]:
    """Decode from the start to the last of these frames, or all for None; to the end, or the first damage, at most.

    Returns the frames, converted, by number; when each decoded frame is shown; and how many frames the file promises.
    """
    wanted = None if numbers is None else set(numbers)
    kept: dict[int, np.ndarray] = {}
    starts: list[int | None] = []
    with _open(path) as (container, stream):
        promised = _promised(container, stream)
        decoder = stream.codec_context
        if _has_alpha(stream):
            decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
            decoder.thread_count = 1
        with suppress(av.FFmpegError):
            for packet in container.demux(stream):
                for frame in decoder.decode(packet):
                    if not starts:
                        converter = Converter(stream, (frame.width, frame.height))
                    if wanted is None or len(starts) in wanted:
                        kept[len(starts)] = converter(frame)
                    starts.append(frame.pts)
                    if wanted is not None and len(kept) == len(wanted):
                        return kept, starts, promised
    if None in starts or any(later <= earlier for earlier, later in pairwise(starts)):
        starts = list(range(len(starts)))
    return kept, starts, promised
