"""Check a download of a public data set, report what it has, and convert it to our JSONL files."""

import json
import os
import random
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mplug2.data.adapters import PUBLISHED, read
from mplug2.data.adapters.source import Files, ParsedRecord
from mplug2.data.media import MediaError, read_image, read_video, to_frames, to_pixels
from mplug2.data.record_fields import has_gallery

SHOWN = 10
"""Number of names that a list shows; the rest is counted."""
TILE = 192
"""Height and width of the frames of a preview, in pixels."""


def check_dataset(name: str, files: Files, out: Path | None, decode: int, preview: Path | None) -> None:
    """Read and report a download; write it into the folder `out`, if given.

    Decodes `decode` media files per split, or all if that is 0. Draws samples into the image file `preview`. Raises
    ValueError if there is no record, or none whose media exist.
    """
    parts: dict[tuple[str, str], list[ParsedRecord]] = defaultdict(list)
    for record in read(name, files):
        parts[record.task, record.split].append(record)
    if not parts:
        raise ValueError(f"{files.root}: the annotations of {name} have no records; download them again")
    complete = {part: [record for record in records if not files.missing.intersection(named_media(record))]
                for part, records in parts.items()}
    if not any(complete.values()):
        raise ValueError(f"{files.root} has none of the {len(files.missing):,} media files of the annotations, such as "
                         f"{min(files.missing)}; unpack the media there")
    print_counts(name, parts)
    if files.absent:
        print(f"no annotations: {', '.join(files.absent)}")
    print_report("missing", sorted(files.missing))
    print_report("unreadable", unreadable(files, parts, decode))
    if files.faulty:
        print_report("invalid in the published file, left out", files.faulty)
    if files.duplicates:
        print_report("names that several files have; the first one is used (choose with --prefer FOLDER)",
                     [f"{name}: {', '.join(paths)}" for name, paths in sorted(files.duplicates.items())])
    print_leaks(parts)
    if out:
        refused = [part for part, records in parts.items()
                   if records[0].fields.get("unlabelled") and len(complete[part]) < len(records)]
        write(out, files.root, {part: records for part, records in complete.items() if part not in refused})
        for (task, split), records in parts.items():
            left_out = len(records) - len(complete[task, split])
            if (task, split) in refused:
                print(f"{task}.{split}: not written, {left_out:,} of {len(records):,} records have no media; "
                      "the server of the benchmark only accepts complete predictions")
            elif left_out:
                note = "" if split == "train" else "; scores on this split are not comparable with published ones"
                print(f"{task}.{split}: {left_out:,} of {len(records):,} records left out, media missing{note}")
        print(f"written: {out}")
    samples = [records[len(records) // 2] for records in complete.values() if records]
    draw_samples(samples, files.root, preview or (out or Path()) / f"{name}.png")


def print_counts(name: str, parts: dict[tuple[str, str], list[ParsedRecord]]) -> None:
    """Print the number of records and media files of each split, next to the published number."""
    unit, published = PUBLISHED.get(name, ("records", {}))
    print(f"{'':<34}{'records':>10}{'media':>10}{'published ' + unit:>20}")
    for (task, split), records in parts.items():
        counts = {"records": len(records), "media": len({path for record in records for path in named_media(record)})}
        expected = published.get(split)
        verdict = "" if expected is None else "equal" if expected == counts[unit] else "DIFFERENT"
        print(f"{task + '.' + split:<34}{counts['records']:>10,}{counts['media']:>10,}"
              f"{'' if expected is None else f'{expected:,}':>20} {verdict}".rstrip())


def print_leaks(parts: dict[tuple[str, str], list[ParsedRecord]]) -> None:
    """Report media files that two splits of a task name, or two records of a retrieval split with different meanings.

    Both are signs of a wrong pairing. Splits without labels may share their files with others.
    """
    between, within = [], []
    first: dict[tuple[str, str], tuple[str, str]] = {}  # task and file -> split and positive_id
    for (task, split), records in parts.items():
        for record in records:
            for path in named_media(record) if not record.fields.get("unlabelled") else ():
                meaning = record.fields.get("positive_id") or record.source
                other, other_meaning = first.setdefault((task, path), (split, meaning))
                if other != split:
                    between.append(f"{path}: {task}.{other} and {task}.{split}")
                elif has_gallery(task) and other_meaning != meaning:
                    within.append(f"{path}: again at {record.source}")
    if between:
        print_report("files named by two splits: check that they are not trained on and tested on",
                     list(dict.fromkeys(between)))
    if within:
        print_report("files named by two records of a retrieval split: each is a wrong answer for the other's texts",
                     list(dict.fromkeys(within)))


def named_media(record: ParsedRecord) -> list[str]:
    """The images and videos that a record names, relative to the download."""
    fields = record.fields
    return [fields[name] for name in ("image", "video") if name in fields] + fields.get("images", [])


def unreadable(files: Files, parts: dict[tuple[str, str], list[ParsedRecord]], limit: int) -> list[str]:
    """Decode `limit` media files of each split, or all if that is 0; returns the error messages."""
    errors = []
    for (_, split), records in parts.items():
        kinds = {path: "video" if "video" in record.fields else "image"
                 for record in records for path in named_media(record)}
        existing = sorted(set(kinds) - files.missing)
        chosen = random.Random(split).sample(existing, min(limit, len(existing))) if limit else existing
        for path in chosen:
            try:
                load(files.root / path, kinds[path])
            except MediaError as error:
                errors.append(str(error))
    return sorted(set(errors))


def load(path: Path, kind: str) -> np.ndarray:
    """An image, or four frames of a video: uint8 (t, H, W, 3)."""
    return read_video(path, 4) if kind == "video" else read_image(path)


def print_report(what: str, names: list[str]) -> None:
    """Print how many names there are, and the first `SHOWN` of them."""
    print(f"{what}: {len(names):,}" + "".join(f"\n  {name}" for name in names[:SHOWN])
          + (f"\n  and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""))


def write(out: Path, root: Path, parts: dict[tuple[str, str], list[ParsedRecord]]) -> None:
    """Write `out/<task>.<split>.jsonl`. Paths lead through the link `out/media` into the download.

    A published id that several records of a file share is left out, because ids must be unique.
    """
    names = [f"{task}.{split}.jsonl" for (task, split), records in parts.items() if records]
    if existing := [name for name in names if (out / name).exists()]:
        raise FileExistsError(f"{out} already contains {', '.join(existing)}; remove them, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    link = out / "media"
    if not link.is_symlink():
        link.symlink_to(root, target_is_directory=True)
    elif os.path.realpath(link) != os.path.realpath(root):
        raise FileExistsError(f"{link} links to {os.readlink(link)}, not to {root}; choose another folder")
    for (task, split), records in parts.items():
        if not records:
            continue
        ids = Counter(record.fields.get("id") for record in records)
        with (out / f"{task}.{split}.jsonl").open("w", encoding="utf-8") as file:
            for record in records:
                fields = {name: value for name, value in record.fields.items() if name != "id" or ids[value] == 1}
                for name in ("image", "video"):
                    if name in fields:
                        fields[name] = f"media/{fields[name]}"
                if "images" in fields:
                    fields["images"] = [f"media/{path}" for path in fields["images"]]
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def draw_samples(samples: list[ParsedRecord], root: Path, path: Path) -> None:
    """Print one record of each task, and draw its media above its other fields into an image file."""
    by_task = {record.task: record for record in samples}
    rows = []
    for task, record in by_task.items():
        kind = "video" if "video" in record.fields else "image"
        fields = {key: value for key, value in record.fields.items() if key not in ("image", "video", "images")}
        text = json.dumps(fields, ensure_ascii=False)
        print(f"{task}: {text[:400]}\n  from {record.source}")
        try:
            frames = [to_frames(to_pixels(load(root / name, kind), TILE)) for name in named_media(record)]
        except MediaError:
            continue  # listed as unreadable
        if frames:
            rows.append(draw_sample(np.concatenate(frames), f"{task}: {text}", record))
    if rows:
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
        tops = np.cumsum([0] + [row.height for row in rows])
        for row, top in zip(rows, tops):
            sheet.paste(row, (0, int(top)))
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        print(f"preview: {path}")


def draw_sample(frames: np.ndarray, text: str, record: ParsedRecord) -> Image.Image:
    """Frames side by side, with the box of the record, above a text."""
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    if "box" in record.fields:
        cx, cy, width, height = (TILE * value for value in record.fields["box"])
        corners = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        ImageDraw.Draw(strip).rectangle(corners, outline="red", width=2)
    text = text.encode("latin1", "replace").decode("latin1")  # all that Pillow's default font can draw
    lines = textwrap.wrap(text, 110)[:5]
    row = Image.new("RGB", (max(strip.width, 700), strip.height + 14 * len(lines) + 10), "white")
    row.paste(strip, (0, 0))
    ImageDraw.Draw(row).multiline_text((4, strip.height + 2), "\n".join(lines), fill="black", spacing=2)
    return row
