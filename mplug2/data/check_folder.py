"""Check a folder of our JSONL files and its media before any training: everything that is wrong with it, at once."""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import av
from PIL import Image

from mplug2.data.check import print_report
from mplug2.data.media import MediaError, kind_of, read_image, read_video
from mplug2.data.record_fields import short
from mplug2.data.records import Record, RecordError, available, read_records
from mplug2.data.text import Tokenizer, clean
from mplug2.data.text_check import describe_equal, describe_unknown, equal_captions, record_texts, unknown_words

LABELS = 8
"""Number of labels that are listed with their counts."""


def check_folder(root: Path, decode: int = 32, tokenizer: Path | None = None) -> None:
    """Print what the folder has: records, media, texts, labels.

    Decodes `decode` media files per file of records, or all if that is 0. Raises RecordError if a line is invalid, a
    media file is missing or unreadable, or a text has no words; everything is printed before.
    """
    vocabulary = Tokenizer.load(tokenizer) if tokenizer else None
    problems, missing, unreadable = [], set(), set()
    owners: dict[tuple[str, Path], set[str]] = defaultdict(set)
    for task, splits in available(root).items():
        for split in splits:
            try:
                records = read_records(root, task, split)
            except RecordError as error:
                problems += str(error).splitlines()
                print(f"{task}.{split}: invalid, see below")
                continue
            media = media_kinds(records)
            print(f"{task}.{split}: {len(records):,} records, {len(media):,} media files")
            for path in media:
                owners[task, path].add(split)
            absent = {path for path in media if not os.path.isfile(path)}  # False for names that no file can have
            missing |= absent
            unreadable |= set(describe_media([path for path in media if path not in absent], media, decode))
            problems += describe_texts(f"{task}.{split}", records, vocabulary)
            describe_copies(records)
            describe_labels(records)
    print_report("missing", sorted(map(str, missing)))
    print_report("unreadable", sorted(unreadable))
    shared = {key: sorted(splits) for key, splits in owners.items() if len(splits) > 1}
    print_report("files named by several splits of a task",
                 sorted(f"{path}: {task}, {' and '.join(splits)}" for (task, path), splits in shared.items()))
    print_report("invalid lines and texts without words", problems)
    if problems or missing or unreadable:
        raise RecordError(f"{root}: {len(problems):,} invalid lines, {len(missing):,} missing and {len(unreadable):,} "
                          "unreadable media files; fix or remove them (training skips files that cannot be decoded)")


def media_kinds(records: Sequence[Record]) -> dict[Path, str]:
    """The media files of some records, and what they are named as: "image" or "video"."""
    media = {path: "image" for record in records for path in (record.image, *record.images) if path}
    return media | {record.video: "video" for record in records if record.video}


def describe_media(paths: Sequence[Path], kinds: dict[Path, str], decode: int) -> list[str]:
    """Print the sizes, rates and rotations of some media files; the error messages of those that cannot be decoded."""
    chosen = random.Random(0).sample(list(paths), min(decode, len(paths))) if decode else paths
    sizes, rates, rotated, errors = [], [], 0, []
    for path in chosen:
        try:
            frames = read_video(path, 1) if kinds[path] == "video" else read_image(path)
            sizes.append(frames.shape[1:3])
            if kind_of(path) == "video":
                rate, rotation = video_header(path)
                rates += [rate] if rate else []
                rotated += bool(rotation)
        except MediaError as error:
            errors.append(str(error))
    if sizes:
        heights, widths = zip(*sizes)
        print(f"  {len(sizes):,} decoded: {min(widths)} x {min(heights)} to {max(widths)} x {max(heights)} pixels"
              + (f", {min(rates):g} to {max(rates):g} frames per second" if rates else "")
              + (f", {rotated:,} videos have a rotation in their header" if rotated else ""))
    return errors


def video_header(path: Path) -> tuple[float, int]:
    """Frames per second (0 if unknown) and rotation, in degrees, of a video or an animation."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rotation = next((frame.rotation for frame in container.decode(stream)), 0)
            return float(stream.average_rate or 0), rotation
    except (av.FFmpegError, IndexError):  # an animation that Pillow reads and FFmpeg does not
        with Image.open(path) as image:
            image.load()  # a WebP has no duration before
            return 1000 / image.info["duration"] if image.info.get("duration") else 0.0, 0


def describe_texts(name: str, records: Sequence[Record], tokenizer: Tokenizer | None) -> list[str]:
    """Print the longest text, unknown words and equal captions; an error message for each text without words."""
    texts = {text: record.source for record in records for text in record_texts(record)}
    if not texts:
        return []
    words = {text: len(clean(text, 10**6).split()) for text in texts}
    longest = max(texts, key=words.__getitem__)
    tokens = f", {tokenizer.lengths([clean(longest, 10**6)])[0]:,} tokens" if tokenizer and words[longest] else ""
    print(f"  longest text: {words[longest]:,} words{tokens}, {texts[longest]}")
    if tokenizer and (unknown := unknown_words(texts, tokenizer, 10**6)):
        print("  " + describe_unknown("unknown words", unknown, sum(words.values())))
    if equal := equal_captions(records):
        print("  " + describe_equal("equal captions", equal))
    return [f"{source}: the text {short(text)} has no words; remove it"
            for text, source in texts.items() if not words[text]]


def describe_copies(records: Sequence[Record]) -> None:
    """Print how many records occur more than once, with or without texts."""
    if copies := [key for key, count in Counter(
            (record.video or record.image or record.images, record.captions, record.qa, record.text, record.texts,
             record.label, record.box) for record in records).items() if count > 1]:
        print(f"  {len(copies):,} records occur more than once")


def describe_labels(records: Sequence[Record]) -> None:
    """Print how often each label occurs, the most frequent first, or the range of numbers."""
    counts = Counter(record.label for record in records if record.label is not None)
    if counts and all(isinstance(label, float) for label in counts):
        print(f"  labels: numbers from {min(counts):g} to {max(counts):g}")
    elif counts:
        listed = ", ".join(f"{label} {count:,}" for label, count in counts.most_common(LABELS))
        more = f", and {len(counts) - LABELS:,} more, at least {min(counts.values()):,} each"
        print(f"  labels: {listed}{more if len(counts) > LABELS else ''}")
