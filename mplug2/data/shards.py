"""Tar shards, for data sets that do not fit in a folder: `pack` writes them; `shard_stream.py` trains on them.

A shard follows the WebDataset convention: the files of a sample are neighbors in a tar and share their name up to the
first dot, such as `000012.json` and `000012.mp4`. `shards.json` lists the shards of a folder and their sizes.

    video-000000.tar  video-000001.tar ...  image-000000.tar ...  text-000000.tar ...  shards.json

Shards of other programs (img2dataset, video2dataset, webdataset) are read as they are: an image or a video with its
caption in a `.txt`, or under "caption" in a `.json`. Their samples are counted once, and listed in `shards.json`.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mplug2.data.media import MEDIA_SUFFIXES, VIDEO_SUFFIXES
from mplug2.data.records import Question, RecordError
from mplug2.data.samples import Sample, read_samples
from mplug2.data.text import clean

INDEX = "shards.json"
MAX_BYTES = int(os.environ.get("MPLUG2_MAX_MEMBER", 2**30))
"""Larger members of a shard are not read: a damaged header can promise any size. No flag, as every reader needs it."""
MAX_SOURCE = 400
"""Letters of the name of a sample that are kept for messages."""
DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, MemoryError)
"""What `tarfile` raises for headers that are damaged, or made to do harm."""


def pack(root: Path | str, out: Path | str, split: str = "train", samples_per_shard: int = 1000) -> dict[str, int]:
    """Write the pre-training records in the folder `root` as shards into `out`; returns the samples of each batch type.

    Media files are copied unchanged. A shard, and the index, appear only once they are complete. Raises ValueError for
    a folder that already has shards, FileNotFoundError for missing records or media.
    """
    out = Path(out)
    if (out / INDEX).exists():
        raise ValueError(f"{out} already contains shards ({INDEX}); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[dict]] = {}
    for kind, samples in read_samples(Path(root), "pretrain", split).items():
        for first in range(0, len(samples), samples_per_shard):
            name, part = f"{kind}-{first // samples_per_shard:06d}.tar", samples[first: first + samples_per_shard]
            with tarfile.open(out / f".{name}.part", "w") as tar:
                for number, sample in enumerate(part, start=first):
                    _write_sample(tar, f"{number:09d}", sample)
            os.replace(out / f".{name}.part", out / name)
            index.setdefault(kind, []).append({"file": name, "samples": len(part)})
    (out / f".{INDEX}.part").write_text(json.dumps({"format": 1, "kinds": index}, indent=1) + "\n")
    os.replace(out / f".{INDEX}.part", out / INDEX)
    return {kind: sum(shard["samples"] for shard in shards) for kind, shards in index.items()}


def _write_sample(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    texts = {
        "source": sample.source, "positive_id": sample.positive_id, "captions": sample.captions,
        "qa": [{"question": q.question, "answers": q.answers, "kind": q.kind} for q in sample.qa],
    }
    files = {"json": json.dumps(texts).encode()}
    if sample.media:
        if not os.path.isfile(sample.media):
            raise FileNotFoundError(f"{sample.source}: {sample.media} does not exist; add the file, or remove the line")
        files[sample.media.suffix[1:].lower()] = sample.media.read_bytes()
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def is_shards(root: Path | str) -> bool:
    """Whether the folder has an index of shards, or tars and no JSONL files."""
    root = Path(root)
    return (root / INDEX).is_file() or (any(root.glob("*.tar")) and not any(root.glob("*.jsonl")))


def index_shards(root: Path, before: dict) -> dict[str, list[dict]]:
    """List the tars that another program wrote, by batch type, and write the index where the folder allows it.

    The batch type of a tar is that of its first sample. The index of an earlier run (`before`) is used again if it has
    the same tars with the same sizes.
    """
    tars = {path.name: path.stat().st_size for path in sorted(root.glob("*.tar"))}
    if before["bytes"] == tars:
        return before["kinds"]
    index: dict[str, list[dict]] = {}
    for name in tqdm(tars, desc=f"counting samples in {root}", unit=" tar"):
        kind, samples = count_samples(root / name)
        if samples:
            index.setdefault(kind, []).append({"file": name, "samples": samples})
    if not index:
        raise FileNotFoundError(f"{root}: none of its {len(tars)} tars has a sample; expected images or videos with a "
                                ".txt or .json next to each")
    with suppress(OSError):  # a folder without write permission
        part = root / f".{INDEX}.{os.getpid()}.part"
        part.write_text(json.dumps({"format": 1, "bytes": tars, "kinds": index}, indent=1) + "\n")
        os.replace(part, root / INDEX)
    return index


def count_samples(path: Path) -> tuple[str, int]:
    """The batch type of a tar's first sample, and the number of its samples. Only the headers are read."""
    key, count, suffixes = None, 0, set()
    with suppress(*DAMAGE), tarfile.open(path) as tar:  # of a tar that is cut off, the part before
        for name, suffix, _ in _files(tar):
            key, count = name, count + (name != key)
            if count == 1:
                suffixes.add(ending(suffix))
    if suffixes & {*VIDEO_SUFFIXES}:
        return "video", count
    return "image" if suffixes & {*MEDIA_SUFFIXES} else "text", count


@dataclass(frozen=True)
class ShardSet:
    """The shards of one batch type in a folder."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Number of samples in each shard."""

    def __len__(self) -> int:
        """Number of samples in all shards."""
        return sum(self.sizes)


def read_shards(root: Path | str) -> dict[str, ShardSet]:
    """The shards of a folder, by batch type: those that `pack` wrote, or those of another program.

    Raises ValueError for an index that cannot be read, FileNotFoundError for a shard that is missing.
    """
    root = Path(root)
    try:
        index = json.loads((root / INDEX).read_text()) if (root / INDEX).is_file() else {"bytes": None}
        kinds = index_shards(root, index) if "bytes" in index else index["kinds"]
        found = {
            kind: ShardSet(tuple(root / shard["file"] for shard in shards), tuple(int(s["samples"]) for s in shards))
            for kind, shards in kinds.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / INDEX} is not an index of shards ({type(error).__name__}: {error}); "
                         "write it with python -m mplug2.data pack") from error
    for shards in found.values():
        for path in shards.paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is listed in {root / INDEX} but missing; copy it there, or pack again")
    return found


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, suffix, member) of each file of a sample. The key is the name up to the first dot after the last slash.

    Files without a dot, and hidden ones such as the `._*` of macOS, belong to no sample, as in WebDataset.
    """
    for member in tar:
        if member.size < 0 or tar.offset <= member.offset:  # tarfile would read this member again, for ever
            raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
        folder, file = os.path.split(member.name)
        start, _, suffix = file.partition(".")
        if member.isfile() and start and suffix:
            yield f"{folder}/{start}", suffix, member
        tar.members.clear()  # tarfile would keep all headers


def read_members(path: Path, first: int, stop: int) -> Iterator[tuple[int, dict[str, bytes] | str]]:
    """Samples `first` to `stop` of a shard as (number, content): the files by suffix, or an error message."""
    number, key, files = -1, None, {}
    try:
        with tarfile.open(path) as tar:
            for name, suffix, member in _files(tar):
                if name != key:
                    if first <= number < stop:
                        yield number, files
                    number, key, files = number + 1, name, {}
                if number >= stop:
                    return
                if number >= first and not isinstance(files, str):
                    if member.size > MAX_BYTES:
                        files = (f"{member.name} has {member.size:,} bytes; at most {MAX_BYTES:,} are read (the "
                                 "environment variable MPLUG2_MAX_MEMBER)")
                        continue
                    content = tar.extractfile(member).read()
                    if len(content) < member.size:
                        raise tarfile.ReadError(f"{len(content)} of the {member.size} bytes of {member.name}")
                    files[suffix] = content
        if first <= number < stop:
            yield number, files
        number, problem = number + 1, "the shard ends before it"
    except (*DAMAGE, OSError) as error:
        problem = f"the shard cannot be read beyond this point ({error})"
    for lost in range(max(number, first), stop):
        yield lost, problem


def parse_sample(path: Path, number: int, files: dict[str, bytes]) -> tuple[Sample, str | None]:
    """A sample without its media, and the suffix of its media file. RecordError if it is incomplete."""
    media = [suffix for suffix in files if ending(suffix) in MEDIA_SUFFIXES]
    if len(media) > 1:
        raise RecordError(f"found {len(media)} media files ({', '.join(media)}); expected one")
    try:
        texts = json.loads(files["json"]) if "json" in files else {}
        if "captions" not in texts:
            texts = _captioned(texts, files)
        for old, name in (("where", "source"), ("meaning", "positive_id")):  # old spellings
            if old in texts:
                texts.setdefault(name, texts.pop(old))
        sample = Sample(
            source=f"{path}:{number} ({_printable(texts['source'])})", positive_id=_int64(texts["positive_id"]),
            captions=_texts(texts["captions"]), qa=tuple(map(_question, _list(texts["qa"]))),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise RecordError(f"not a sample: its .json or .txt is missing or damaged ({type(error).__name__}: {error})"
                          ) from error
    if not sample.captions:  # other ranks have captions and their losses
        raise RecordError("captions: found []; expected a list of one or more strings")
    return sample, media[0] if media else None


def _captioned(texts: dict, files: dict[str, bytes]) -> dict:
    """The fields of a sample of another program, whose caption is in its .json or its .txt. Samples with the same
    caption are positives of each other."""
    caption = texts.get("caption")
    if caption is None:
        if "txt" not in files:
            raise ValueError("there is no caption in a .json or .txt")
        caption = files["txt"].decode("utf-8").strip()
    digest = hashlib.sha256(clean(_text(caption)).encode()).digest()
    return {"source": texts.get("key", "caption"), "positive_id": int.from_bytes(digest[:7], "big"),
            "captions": [caption], "qa": []}


def _question(fields: dict) -> Question:
    """A list of answers; a single text is one answer."""
    answers, kind = fields["answers"], fields.get("kind")
    answers = _texts([answers] if isinstance(answers, str) else answers)
    if not answers or not isinstance(kind, str | None):
        raise ValueError(f"answers {answers!r:.40}, kind {kind!r:.40}: expected answers, and a text or null")
    return Question(_text(fields["question"]), answers, kind)


def _texts(values: object) -> tuple[str, ...]:
    return tuple(map(_text, _list(values)))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {value!r:.40}, expected a text")
    return value


def _list(value: object) -> list:
    if not isinstance(value, list):
        raise TypeError(f"found {value!r:.40}, expected a list")
    return value


def _int64(value: object) -> int:
    if isinstance(value, bool | float) or not -(2**63) <= (number := int(value)) < 2**63:
        raise ValueError(f"found {str(value):.40}, expected an integer of 64 bits")
    return number


def _printable(value: object) -> str:
    """The start of any value, for messages on one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(value)[:MAX_SOURCE])


def ending(suffix: str) -> str:
    """The last part of a suffix, such as .mp4 of seg1.mp4, in lower case."""
    return "." + suffix.rpartition(".")[2].lower()
