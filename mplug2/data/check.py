"""Check a download of a public data set, report what is there, and write it as our JSONL files."""

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

SHOWN = 10
"""How many names of a kind are listed before the rest is counted."""
TILE = 192


def check_dataset(name: str, root: Path, out: Path | None, decode: int, picture: Path | None) -> None:
    """Read everything, report it, and write what was asked for."""
    files = Files(root)
    parts: dict[tuple[str, str], list[ParsedRecord]] = defaultdict(list)
    for found in read(name, files):
        parts[found.task, found.split].append(found)
    if not parts:
        raise ValueError(f"{root}: the annotations of {name} have no record; fetch them again")

    unit, published = PUBLISHED.get(name, ("records", {}))
    print(f"{'':<34}{'records':>10}{'media':>10}{'published ' + unit:>20}")
    for (task, split), records in parts.items():
        counts = {"records": len(records), "media": len({path for found in records for path in media_of(found)})}
        wanted = published.get(split)
        verdict = "" if wanted is None else "equal" if wanted == counts[unit] else "DIFFERENT"
        print(f"{task + '.' + split:<34}{counts['records']:>10,}{counts['media']:>10,}"
              f"{'' if wanted is None else f'{wanted:,}':>20} {verdict}".rstrip())
    absent = sorted(set(published) - {split for _, split in parts})
    if absent:
        print(f"not there: {', '.join(absent)}")

    broken = unreadable(files, parts, decode)
    print_report("missing", sorted(files.missing))
    print_report("unreadable", broken)
    if files.faulty:
        print_report("at fault as published, and left out", files.faulty)
    whole = {part: [found for found in records if not files.missing.intersection(media_of(found))]
             for part, records in parts.items()}
    if out:
        write(out, files.root, whole)
        for (task, split), records in parts.items():
            left = len(records) - len(whole[task, split])
            if left:
                note = "" if split == "train" else ": numbers on this split are not comparable with others'"
                print(f"{task}.{split}: {left:,} of {len(records):,} records left out, their media are missing{note}")
        print(f"written: {out}")
    samples = [records[len(records) // 2] for records in whole.values() if records]
    show(samples, files.root, picture or (out or Path()) / f"{name}.png")


def media_of(found: ParsedRecord) -> list[str]:
    """The pictures and clips that a record names, relative to the download."""
    return [found.fields[name] for name in ("image", "video") if name in found.fields] + found.fields.get("images", [])


def unreadable(files: Files, parts: dict[tuple[str, str], list[ParsedRecord]], limit: int) -> list[str]:
    """Decode some media of each split, or all; the messages of those that fail."""
    errors = []
    for (_, split), records in parts.items():
        kinds = {path: "video" if "video" in found.fields else "image" for found in records for path in media_of(found)}
        there = sorted(set(kinds) - files.missing)
        chosen = random.Random(split).sample(there, min(limit, len(there))) if limit else there
        for path in chosen:
            try:
                load(files.root / path, kinds[path])
            except MediaError as error:
                errors.append(str(error))
    return sorted(set(errors))


def load(path: Path, kind: str) -> np.ndarray:
    return read_video(path, 4) if kind == "video" else read_image(path)


def print_report(what: str, names: list[str]) -> None:
    print(f"{what}: {len(names):,}" + "".join(f"\n  {name}" for name in names[:SHOWN])
          + (f"\n  and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""))


def write(out: Path, root: Path, parts: dict[tuple[str, str], list[ParsedRecord]]) -> None:
    """`out/<task>.<split>.jsonl`, whose paths lead through the link `out/media` into the download. A published id that
    several records of a file share is left out: ours are unique."""
    names = [f"{task}.{split}.jsonl" for (task, split), records in parts.items() if records]
    if taken := [name for name in names if (out / name).exists()]:
        raise FileExistsError(f"{out} has {', '.join(taken)} already; remove them, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    link = out / "media"
    if not link.is_symlink():
        link.symlink_to(root, target_is_directory=True)
    elif os.path.realpath(link) != os.path.realpath(root):
        raise FileExistsError(f"{link} leads to {os.readlink(link)}, not to {root}; choose another folder")
    for (task, split), records in parts.items():
        if not records:
            continue
        ids = Counter(found.fields.get("id") for found in records)
        with (out / f"{task}.{split}.jsonl").open("w", encoding="utf-8") as file:
            for found in records:
                fields = {name: value for name, value in found.fields.items() if name != "id" or ids[value] == 1}
                for name in ("image", "video"):
                    if name in fields:
                        fields[name] = f"media/{fields[name]}"
                if "images" in fields:
                    fields["images"] = [f"media/{path}" for path in fields["images"]]
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def show(samples: list[ParsedRecord], root: Path, path: Path) -> None:
    """Draw one record of each task, the media above what the record says of them; print it where there are none."""
    by_task = {found.task: found for found in samples}
    rows = []
    for task, found in by_task.items():
        kind = "video" if "video" in found.fields else "image"
        said = {key: value for key, value in found.fields.items() if key not in ("image", "video", "images")}
        print(f"{task}: {json.dumps(said, ensure_ascii=False)[:400]}\n  from {found.source}")
        try:
            frames = [to_frames(to_pixels(load(root / name, kind), TILE)) for name in media_of(found)]
        except MediaError:
            continue  # it is among the unreadable ones above
        if frames:
            rows.append(drawn(np.concatenate(frames), f"{task}: {json.dumps(said, ensure_ascii=False)}", found))
    if rows:
        sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
        tops = np.cumsum([0] + [row.height for row in rows])
        for row, top in zip(rows, tops):
            sheet.paste(row, (0, int(top)))
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        print(f"sample: {path}")


def drawn(frames: np.ndarray, text: str, found: ParsedRecord) -> Image.Image:
    """Frames side by side, the box of the record on them, its text below."""
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    if "box" in found.fields:
        cx, cy, width, height = (TILE * value for value in found.fields["box"])
        corners = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        ImageDraw.Draw(strip).rectangle(corners, outline="red", width=2)
    lines = textwrap.wrap(text.encode("latin1", "replace").decode("latin1"), 110)[:5]  # what the plain font can draw
    row = Image.new("RGB", (max(strip.width, 700), strip.height + 14 * len(lines) + 10), "white")
    row.paste(strip, (0, 0))
    ImageDraw.Draw(row).multiline_text((4, strip.height + 2), "\n".join(lines), fill="black", spacing=2)
    return row
