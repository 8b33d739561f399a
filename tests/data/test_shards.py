"""Tar shards: what is packed is what is read; streams are divided, shuffled, mixed and resumed; damage is skipped."""

import io
import json
import runpy
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from data_helpers import VIDEOS, dataset, hostile_versions, write_gif, write_records
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mplug2.data import shards as shards_module
from mplug2.data.__main__ import main
from mplug2.data.batches import Collate, MixedBatches
from mplug2.data.media import MediaError
from mplug2.data.samples import check_texts, read_samples
from mplug2.data.shard_stream import (
    MixedStream,
    Reader,
    ReaderState,
    ReadPlan,
    ShardRange,
    assign,
    stream_batches,
)
from mplug2.data.shards import ShardSet, is_shards, pack, read_shards


@pytest.fixture(scope="module")
def packed(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    assert pack(root, out, samples_per_shard=2) == {"video": 6, "image": 5, "text": 7}
    return out


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_shards_follow_the_webdataset_convention_and_contain_the_files_unchanged(root, packed):
    assert is_shards(packed) and not is_shards(root)
    assert sorted(path.name for path in packed.iterdir()) == [
        *(f"image-00000{i}.tar" for i in range(3)), "shards.json", *(f"text-00000{i}.tar" for i in range(4)),
        *(f"video-00000{i}.tar" for i in range(3)),
    ]
    with tarfile.open(packed / "video-000001.tar") as tar:
        assert tar.getnames() == ["000000002.json", "000000002.gif", "000000003.json", "000000003.gif"]
        assert tar.extractfile("000000003.gif").read() == (root / "3.gif").read_bytes()
        texts = json.load(tar.extractfile("000000002.json"))
    assert texts["captions"] == ["a green one moving left", "a green one going left"] and len(texts["qa"]) == 3
    shards = read_shards(packed)
    assert {kind: (len(found), found.sizes) for kind, found in shards.items()} == {
        "video": (6, (2, 2, 2)), "image": (5, (2, 2, 1)), "text": (7, (2, 2, 2, 1)),
    }


def test_pack_runs_from_the_command_line_and_explains_its_errors(root, tmp_path, capsys):
    main(["pack", str(root), str(tmp_path / "out")])
    assert "6 video, 5 image, 7 text" in capsys.readouterr().out
    for arguments, message in (
        ((root, tmp_path / "out"), "already contains shards (shards.json); choose another folder"),
        ((tmp_path / "nowhere", tmp_path / "b"), "nowhere is not a folder"),
        ((root, tmp_path / "b", "--split", "val"), "no data for pretrain, split val"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["pack", *map(str, arguments)])
        assert stopped.value.code == 1 and message in capsys.readouterr().err
    write_records(tmp_path, "video_caption.train", [{"video": "gone.gif", "captions": ["a"]}])
    with pytest.raises(FileNotFoundError, match="video_caption.train.jsonl:1: .*gone.gif does not exist; add the file"):
        pack(tmp_path, tmp_path / "c")
    assert not is_shards(tmp_path / "c")


def test_an_invalid_index_is_named(tmp_path):
    for text, message in (("{", "is not an index of shards"), ('{"kinds": {"video": [{}]}}', "is not an index"),
                          ('{"kinds": {"video": [{"file": "a.tar", "samples": 3}]}}', "a.tar is listed .*missing")):
        (tmp_path / "shards.json").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_shards(tmp_path)


# ---- which reader reads which samples --------------------------------------------------------------------------------


class Numbers(Reader):
    """A reader whose samples are only their keys."""

    def _read(self, ranges: tuple[ShardRange, ...], start: int, count: int) -> list[tuple]:
        every = [(one.epoch, one.shard, i, {}) for one in ranges for i in range(one.first, one.stop)]
        return every[start: start + count]

    def _item(self, epoch: int, shard: int, number: int, files: dict) -> dict:
        return {"key": (epoch, shard, number)}


class Seed:
    seed = 7


def numbers(shards: ShardSet, plan: ReadPlan, reader: int, window: int, at: tuple[int, int] = (0, 0)) -> Numbers:
    return Numbers(shards, "video", Seed, None, plan, reader, window, at)


@st.composite
def streams(draw: st.DrawFn) -> dict:
    sizes = draw(st.lists(st.integers(1, 7), min_size=3, max_size=8))
    return dict(shards=ShardSet(tuple(Path(f"{i}.tar") for i in range(len(sizes))), tuple(sizes)),
                window=draw(st.integers(1, 6)))


def every(shards: ShardSet, epochs: int) -> list[tuple[int, int, int]]:
    """The keys of all samples of some epochs."""
    return [(e, s, i) for e in range(epochs) for s, size in enumerate(shards.sizes) for i in range(size)]


@settings(max_examples=25, deadline=None)
@given(streams(), st.integers(1, 3))
def test_all_readers_together_read_every_sample_once_per_epoch(drawn, readers):
    shards, plan, seen = drawn["shards"], ReadPlan(readers), []
    for number in range(readers):
        reader = numbers(plan=plan, reader=number, **drawn)
        for epoch in range(3):
            ranges = plan.round(shards, number, 1 + epoch, (7, *b"video"))
            seen += [next(reader)["key"] for one in ranges for _ in range(one.stop)]
            assert {key[0] for key in seen[-1:]} == {epoch}
    assert Counter(seen) == Counter(every(shards, 3))


def test_samples_are_shuffled_within_their_window():
    shards = ShardSet((Path("0.tar"), Path("1.tar")), (100, 100))
    reader = numbers(shards, ReadPlan(1), 0, 50)
    order = [key[1] * 100 + key[2] for key in (next(reader)["key"] for _ in range(200))]
    order = order if order[0] < 100 else [(number + 100) % 200 for number in order]
    for start in range(0, 200, 50):
        assert sorted(order[start: start + 50]) == list(range(start, start + 50)) != order[start: start + 50]


@settings(max_examples=40, deadline=None)
@given(streams(), st.integers(0, 60))
def test_a_reader_resumes_at_the_exact_sample(drawn, done):
    whole = numbers(plan=ReadPlan(2), reader=1, **drawn)
    for _ in range(done):
        next(whole)
    resumed = numbers(plan=ReadPlan(2), reader=1, at=whole.at, **drawn)
    assert [next(resumed)["key"] for _ in range(30)] == [next(whole)["key"] for _ in range(30)]


@settings(max_examples=40, deadline=None)
@given(streams(), st.lists(st.integers(0, 40), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 3))
def test_another_number_of_readers_loses_no_sample_and_repeats_only_begun_windows(drawn, done, later, last):
    """Two changes: the rest is assigned to `later` readers, and their rest to `last` readers."""
    shards, window, seen = drawn["shards"], drawn["window"], Counter()
    plan, counts = ReadPlan(len(done)), done
    for readers in (later, last, None):
        at = {}
        for number, count in enumerate(counts):
            reader = numbers(shards, plan, number, window)
            for _ in range(count):
                seen[next(reader)["key"]] += 1
            at[number] = reader.at
        if readers:
            plan = assign(shards, plan, at, readers, window, (7, *b"video"))
            counts = [done[0]] * readers
    left = assign(shards, plan, at, 1, window, (7, *b"video"))
    seen.update((one.epoch, one.shard, i) for one in left.leftovers[0] for i in range(one.first, one.stop))
    expected = set(every(shards, left.epoch))
    assert set(seen) == expected  # nothing is lost in any epoch that was begun
    assert sum(seen.values()) - len(expected) <= window * (len(done) + later + last)
    assert max(seen.values(), default=1) <= 4


# ---- batches ---------------------------------------------------------------------------------------------------------


def batches_of(
    root: Path, tokenizer, steps: int, start: int = 0, state: dict | None = None, workers: int = 0,
    rank: int = 0, world: int = 1, window: int = 2, mixed: Path | None = None,
) -> tuple[list[dict], ReaderState]:
    """The batches of a run from step `start` on, and the state of its readers afterwards."""
    shards = read_shards(root)
    samples = {f"{kind}@1": found for kind, found in read_samples(mixed, "pretrain", "train").items()} if mixed else {}
    streams = {**shards, **samples}
    batches = MixedBatches({name: len(found) for name, found in streams.items()}, {name: 1.0 for name in streams},
                           2 * world, steps, 0, start, rank, world)
    reader_state = ReaderState(shards, world * max(1, workers), window, 0, state or {})
    found = list(stream_batches(
        dataset(samples), shards, batches, Collate(tokenizer), reader_state, 30, workers, pin=False
    ))
    for batch in found:
        reader_state.advance(batch)
    return found, reader_state


def sources(batches: list[dict]) -> list[list[str]]:
    return [batch["source"] for batch in batches]


def test_samples_from_shards_are_those_of_the_folder(root, packed, tokenizer):
    batches, _ = batches_of(packed, tokenizer, 9)
    assert Counter(batch["kind"] for batch in batches) == {"video": 3, "image": 3, "text": 3}
    videos = [source for batch in batches if batch["kind"] == "video" for source in batch["source"]]
    file = root / "video_caption.train.jsonl"
    assert {source.split("(")[1] for source in videos} == {f"{file}:{i + 1})" for i in range(6)}
    samples = {sample.source: sample for sample in read_samples(root, "pretrain", "train")["video"]}
    for batch in batches:
        if batch["kind"] == "video":
            assert batch["pixels"].shape == (2, 3, 4, 8, 8) and batch["errors"] == []
            expected = [samples[source.split("(")[1][:-1]].positive_id for source in batch["source"]]
            assert batch["positive_id"].tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_equals_the_uninterrupted_stream(root, packed, tokenizer, workers):
    """All random choices included; shards mixed with a folder."""
    if workers:
        root = None
    whole, _ = batches_of(packed, tokenizer, 14, workers=workers, mixed=root)
    for stop in (3, 8):
        before, reader_state = batches_of(packed, tokenizer, stop, workers=workers, mixed=root)
        assert sources(before) == sources(whole[:stop])
        state = json.loads(json.dumps(reader_state.collected([reader_state])))  # through a checkpoint
        state = {name: {**of_stream, "at": {int(r): at for r, at in of_stream["at"].items()}}
                 for name, of_stream in state.items()}
        after, _ = batches_of(packed, tokenizer, 14, stop, state, workers=workers, mixed=root)
        assert sources(after) == sources(whole[stop:])
        for one, other in zip(after, whole[stop:]):
            assert one["caption_ids"].equal(other["caption_ids"]) and one["masked_ids"].equal(other["masked_ids"])
            assert "pixels" not in one or one["pixels"].equal(other["pixels"])


def test_ranks_and_workers_have_shards_of_their_own(packed, tokenizer):
    found = [batches_of(packed, tokenizer, 6, rank=rank, world=2)[0] for rank in range(2)]
    assert [batch["kind"] for batch in found[0]] == [batch["kind"] for batch in found[1]]
    files = [{source.split(":")[0] for batch in batches[:3] for source in batch["source"]} for batches in found]
    assert not files[0] & files[1]
    with pytest.raises(ValueError, match="3 shards of video for 4 readers .*; pack with fewer samples per shard"):
        batches_of(packed, tokenizer, 3, world=4)


def test_every_worker_takes_turns_in_every_stream(packed, tokenizer):
    """Three batch types and three workers: no worker reads all of one type, and every sample appears once per epoch."""
    found, reader_state = batches_of(packed, tokenizer, 9, workers=3)
    assert [batch["kind"] for batch in found] == [batch["kind"] for batch in batches_of(packed, tokenizer, 9)[0]]
    assert {stream: sorted(at) for stream, at in reader_state.at.items()} == dict.fromkeys(reader_state.at, [0, 1, 2])
    videos = [source for batch in found if batch["kind"] == "video" for source in batch["source"]]
    assert len(videos) == len(set(videos)) == 6


def test_each_worker_of_each_rank_is_a_reader_of_its_own(root, tmp_path, tokenizer):
    pack(root, tmp_path / "out", samples_per_shard=1)
    shards, readers = read_shards(tmp_path / "out"), []
    for rank, worker in product(range(2), range(2)):
        batches = MixedBatches({name: len(found) for name, found in shards.items()}, dict.fromkeys(shards, 1.0),
                               2, 6, 0, rank=rank, world_size=2)
        stream = MixedStream(dataset({}), shards, batches, Collate(tokenizer), ReaderState(shards, 4, 2, 0, {}), 30,
                             worker, 2)
        readers.append({batch["position"][1] for batch in stream})
    assert readers == [{0}, {1}, {2}, {3}]


def test_a_checkpoint_has_the_furthest_position_of_each_reader_on_any_rank():
    shards = {"video": ShardSet((Path("0.tar"), Path("1.tar")), (9, 9))}
    states = [ReaderState(shards, 2, 4, 0, {}) for _ in range(2)]
    for state, positions in zip(states, ({0: (1, 7), 1: (1, 2)}, {0: (1, 3), 1: (2, 0)})):
        state.at["video"] = positions
    for order in (states, states[::-1]):
        assert states[0].collected(order)["video"]["at"] == {0: (1, 7), 1: (2, 0)}


# ---- damage ----------------------------------------------------------------------------------------------------------


def broken(root: Path, out: Path, change) -> Path:
    """Shards whose only video shard has the (name, content) pairs that `change` returns."""
    pack(root, out, samples_per_shard=VIDEOS)
    path = out / "video-000000.tar"
    with tarfile.open(path) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for name, content in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out


def read_videos(root: Path, tokenizer, steps: int = 3) -> tuple[list[str], list[str]]:
    batches, _ = batches_of(root, tokenizer, 3 * steps)
    videos = [batch for batch in batches if batch["kind"] == "video"]
    return [source for batch in videos for source in batch["source"]], [e for batch in videos for e in batch["errors"]]


def test_corrupt_members_are_skipped_and_named(root, tmp_path, tokenizer):
    def change(members: list) -> list:
        changed = dict(members)
        changed["000000000.gif"] = b"GIF89a, but not for long"
        changed["000000002.json"] = b"{"
        changed["000000003.json"] = json.dumps({**json.loads(changed["000000003.json"]), "captions": ["?!"]}).encode()
        del changed["000000004.gif"]
        changed["000000005.json"] = json.dumps({**json.loads(changed["000000005.json"]), "captions": []}).encode()
        return list(changed.items())

    found, errors = read_videos(broken(root, tmp_path / "out", change), tokenizer)
    assert {source.split(":")[1].split(" ")[0] for source in found} == {"1"}
    reasons = dict(error.split("video-000000.tar:", 1)[1].split(": ", 1) for error in errors)
    assert sorted(reasons) == ["0", "2", "3", "4", "5"]
    assert "cannot be" in reasons["0"] and "not a sample" in reasons["2"]
    assert "has no words" in reasons["3"] and "there is no video file" in reasons["4"]
    assert "captions: found []; expected a list of one or more strings" in reasons["5"]


def test_a_truncated_shard_gives_its_complete_samples(root, tmp_path, tokenizer):
    out = broken(root, tmp_path / "out", lambda members: members)
    path = out / "video-000000.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmember("000000004.gif").offset_data + 10
    path.write_bytes(path.read_bytes()[:cut])
    found, errors = read_videos(out, tokenizer)
    assert {source.split(":")[1].split(" ")[0] for source in found} == {"0", "1", "2", "3"}
    assert {error.split(".tar:")[1].split(":")[0] for error in errors} == {"4", "5"}
    assert all("cannot be read beyond this point" in error or "ends before it" in error for error in errors)


def test_a_run_stops_if_all_samples_are_corrupt(root, tmp_path, tokenizer):
    out = broken(root, tmp_path / "out", lambda members: [(name, b"") for name, _ in members])
    with pytest.raises(MediaError, match=r"12 samples in a row cannot be read; the first: .*video-000000.tar:"):
        read_videos(out, tokenizer)


def test_a_tar_made_by_another_program_can_be_read(tmp_path, tokenizer):
    """Folders in the names, files of a sample in another order, and members that are not files."""
    write_gif(tmp_path / "a.gif", 1)
    texts = json.dumps({"source": "the web", "positive_id": 3, "captions": ["a red three"], "qa": []}).encode()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("clips")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in (("clips/a.gif", (tmp_path / "a.gif").read_bytes()), ("clips/a.json", texts)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "shards.json").write_text('{"kinds": {"video": [{"file": "x.tar", "samples": 1}]}}')
    (batch,), _ = batches_of(tmp_path, tokenizer, 1)
    assert batch["source"] == [f"{tmp_path / 'x.tar'}:0 (the web)"] * 2 and batch["positive_id"].tolist() == [3, 3]


def test_the_old_names_of_fields_are_still_read(root, tmp_path, tokenizer):
    """Shards that were packed with `where` and `meaning` give the same batches as new ones."""
    def change(members: list) -> list:
        renamed = []
        for name, content in members:
            if name.endswith(".json"):
                fields = json.loads(content)
                fields["where"], fields["meaning"] = fields.pop("source"), fields.pop("positive_id")
                content = json.dumps(fields).encode()
            renamed.append((name, content))
        return renamed

    new, _ = batches_of(broken(root, tmp_path / "new", lambda members: members), tokenizer, 3)
    old, _ = batches_of(broken(root, tmp_path / "old", change), tokenizer, 3)
    for one, other in zip(new, old, strict=True):
        assert one["positive_id"].equal(other["positive_id"]) and len(set(one["positive_id"].tolist())) > 1
        names = [[source.split("(")[1] for source in batch["source"]] for batch in (one, other)]
        assert names[0] == names[1]


# ---- shards of other programs ----------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def web(tmp_path) -> Path:
    """As img2dataset writes it: .jpg, .txt and .json with more fields; and a tar of video2dataset, without .json."""
    image, video = io.BytesIO(), tmp_path / "a.mp4"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "JPEG")
    iio.imwrite(video, np.zeros((6, 16, 16, 3), np.uint8), plugin="pyav", codec="libx264", fps=5)
    images: dict[str, bytes] = {}
    for number, caption in enumerate(("a red three", "a blue one", "a red three")):
        key = f"{number:08d}"
        found = {"caption": caption, "url": "https://x", "key": key, "status": "success", "width": 8, "exif": "{}"}
        images |= {f"{key}.jpg": image.getvalue(), f"{key}.json": json.dumps(found).encode(),
                   f"{key}.txt": b"not this one"}
    write_tar(tmp_path / "web" / "00000.tar", images)
    write_tar(tmp_path / "web" / "00001.tar", {
        "clips/a.seg1.mp4": video.read_bytes(), "clips/a.txt": b"a green one\n", "clips/b.mp4": video.read_bytes(),
        "clips/b.txt": b"a red three"})
    (tmp_path / "web" / "00000_stats.json").write_text("{}")
    return tmp_path / "web"


def test_shards_of_other_programs_are_read_as_they_are(web, tokenizer):
    assert is_shards(web)
    assert {kind: found.sizes for kind, found in read_shards(web).items()} == {"image": (3,), "video": (2,)}
    batches, _ = batches_of(web, tokenizer, 8)
    errors = [error for batch in batches for error in batch["errors"]]
    sources = {source for batch in batches for source in batch["source"]}
    assert not errors and {source.rpartition("/")[2] for source in sources} == {
        "00000.tar:0 (00000000)", "00000.tar:1 (00000001)", "00000.tar:2 (00000002)", "00001.tar:0 (caption)",
        "00001.tar:1 (caption)"}
    ids = {source.rpartition("/")[2].split(" ")[0]: group for batch in batches
           for source, group in zip(batch["source"], batch["positive_id"].tolist())}
    assert ids["00000.tar:0"] == ids["00000.tar:2"] == ids["00001.tar:1"]  # the same caption
    assert len(set(ids.values())) == 3


def test_their_samples_are_counted_once_and_again_when_a_tar_is_added(web, monkeypatch):
    read_shards(web)
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "count_samples", None)  # not called
        assert read_shards(web)["image"].sizes == (3,)
    write_tar(web / "00002.tar", {"a.png": b"", "a.txt": b"a"})
    assert read_shards(web)["image"].sizes == (3, 1)
    (web / "shards.json").unlink()
    monkeypatch.setattr(shards_module.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    assert read_shards(web)["image"].sizes == (3, 1)
    empty = web.parent / "empty"
    write_tar(empty / "0.tar", {})
    with pytest.raises(FileNotFoundError, match="none of its 1 tars has a sample"):
        read_shards(empty)


def test_the_first_sample_of_a_tar_decides_its_batch_type_and_records_make_a_folder(tmp_path):
    write_tar(tmp_path / "web" / "0.tar", {"a.png": b"", "a.txt": b"a", "b.mp4": b"", "b.txt": b"b"})
    assert shards_module.count_samples(tmp_path / "web" / "0.tar") == ("image", 2)
    assert is_shards(tmp_path / "web")
    write_records(tmp_path / "web", "image_caption.train", [{"image": "a.png", "captions": ["a"]}])
    assert not is_shards(tmp_path / "web")


def test_captions_that_differ_in_case_and_punctuation_are_positives_and_suffixes_may_be_in_capitals():
    (one, suffix), (other, _), (third, _) = (
        shards_module.parse_sample(Path("a.tar"), 0, {"JPG": b"", "txt": text})
        for text in (b"A red three!", b"a red three", b"a red one"))
    assert suffix == "JPG" and one.positive_id == other.positive_id != third.positive_id


@pytest.mark.parametrize("first", range(5))
def test_every_sample_that_was_asked_for_is_given_or_reported_once(tmp_path, first):
    """Of a tar that should have five samples, but has three."""
    write_tar(tmp_path / "web" / "0.tar", {f"{number}.txt": b"a" for number in range(3)})
    found = list(shards_module.read_members(tmp_path / "web" / "0.tar", first, 5))
    assert [number for number, _ in found] == list(range(first, 5))
    for number, content in found:
        assert content == ({"txt": b"a"} if number < 3 else "the shard ends before it")


def test_hostile_samples_are_skipped_and_named(root, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_BYTES", 50_000)
    bad = {"0": b"[" * 20_000, "1": b'{"caption": 7}', "2": b'{"caption": NaN}', "3": b"\xff\xfe",
           "4": b'{"caption": null}', "5": b'["a"]', "6": b" " * 50_001}
    gif = (root / "0.gif").read_bytes()
    members = {f"{name}.{end}": content for name, text in bad.items()
               for end, content in (("mp4", gif), ("json", text))}
    members |= {"7." + "x" * 300: b"x", "7.gif": gif, "7.txt": b"a red three", "8.gif": gif, "8.png": gif,
                "8.txt": b"a red three", "9.gif": gif, "9.txt": b"\xff\xfe"}
    write_tar(tmp_path / "web" / "0.tar", members)
    batches, _ = batches_of(tmp_path / "web", tokenizer, 3)
    assert {source.split(":")[1] for batch in batches for source in batch["source"]} == {"7 (caption)"}
    errors = {error.split(".tar:")[1].split(": ")[0]: error for batch in batches for error in batch["errors"]}
    assert sorted(errors) == ["0", "1", "2", "3", "4", "5", "6", "8", "9"]
    assert "no caption in a .json or .txt" in errors["4"]
    assert "RecursionError" in errors["0"] and "found 7, expected a text" in errors["1"] and "found nan" in errors["2"]
    assert "6.json has 50,001 bytes; at most 50,000 are read" in errors["6"] and "found 2 media files" in errors["8"]


@pytest.mark.parametrize("change, message", [
    ({"qa": [{"question": "is it red", "answers": ["yes"], "kind": 3}]}, "kind 3: expected answers"),
    ({"qa": [{"question": "is it red", "answers": ["yes"], "kind": ["a"]}]}, "a text or null"),
    ({"qa": [{"question": "is it red", "answers": []}]}, "answers (), kind None: expected answers"),
    ({"qa": [{"question": "is it red", "answers": [None]}]}, "found None, expected a text"),
    ({"qa": [3]}, "not a sample"), ({"qa": {"question": "is it red"}}, "not a sample"),
    ({"positive_id": 10**30}, "expected an integer of 64 bits"),
    ({"positive_id": 2**63}, "expected an integer of 64 bits"),
    ({"positive_id": -2**63 - 1}, "expected an integer of 64 bits"),
    ({"positive_id": float("inf")}, "found inf, expected an integer"),
    ({"positive_id": float("nan")}, "not a sample"), ({"positive_id": True}, "expected an integer of 64 bits"),
    ({"positive_id": 3.7}, "found 3.7, expected an integer"), ({"qa": {}}, "found {}, expected a list"),
    ({"qa": [{"question": "is it red", "answers": {"yes": 1}}]}, "expected a list"),
    ({"captions": [3]}, "found 3, expected a text"),
    ({"captions": "a red one"}, "found 'a red one', expected a list"),
])
def test_a_damaged_field_costs_its_sample_and_not_the_run(root, tmp_path, tokenizer, change, message):
    def damaged(members: list) -> list:
        fields = json.loads(dict(members)["000000002.json"]) | change
        return list((dict(members) | {"000000002.json": json.dumps(fields).encode()}).items())

    found, errors = read_videos(broken(root, tmp_path / "out", damaged), tokenizer)
    assert len({source.split(" ")[0] for source in found}) == VIDEOS - 1
    assert errors and all(".tar:2: " in error and message in error for error in errors), errors


OWN = {"source": "x.jsonl:3", "positive_id": 5, "captions": ["a red three"],
       "qa": [{"question": "which color", "answers": ["red"], "kind": "color"}]}


@pytest.mark.parametrize("fields", [
    OWN, {"where": "x", "meaning": 5, "captions": ["a red three"], "qa": []}, {"caption": "a red three", "key": "1"}])
def test_a_hostile_value_at_any_depth_costs_at_most_its_sample(root, tokenizer, fields):
    samples = dataset({})
    reader = Reader(ShardSet((Path("a.tar"),), (1,)), "image", samples,
                    lambda found: check_texts(found, tokenizer, samples.max_positions, 30), ReadPlan(1), 0, 1)
    used = 0
    for where, changed in hostile_versions(fields):
        item = reader._item(0, 0, 0, {"json": json.dumps(changed).encode(), "gif": (root / "0.gif").read_bytes()})
        if isinstance(item, str):
            assert item.startswith("a.tar:0: ") and len(item) < 600, (where, item)
        else:
            used += 1
            source, = Collate(tokenizer)([item | {"errors": []}])["source"]
            assert source.isprintable() and source.encode() and len(source) < 500, (where, source)
    assert used > 10


def damaged_headers() -> Iterator[bytes]:
    """Tars whose headers have sums that are right, and values that are not: names, sizes, nested headers."""
    for size in (-700, 2**70, 10 * 2**40):
        for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            member = tarfile.TarInfo("b.json")
            member.type, member.size = kind, size
            yield member.tobuf(tarfile.GNU_FORMAT)
    longname = tarfile.TarInfo("././@LongLink")
    longname.type = tarfile.GNUTYPE_LONGNAME
    yield longname.tobuf(tarfile.GNU_FORMAT) * 3000


@pytest.mark.timeout(60)
def test_damaged_headers_end_a_shard_and_not_the_run(tmp_path):
    """`tarfile` reads a member of a negative size again and again."""
    write_tar(tmp_path / "web" / "0.tar", {"a.txt": b"a red three"})
    start = (tmp_path / "web" / "0.tar").read_bytes()[:1024]
    for header in damaged_headers():
        (tmp_path / "web" / "0.tar").write_bytes(start + header + bytes(10240))
        kind, count = shards_module.count_samples(tmp_path / "web" / "0.tar")
        assert kind == "text" and count in (1, 2)
        first, *rest = shards_module.read_members(tmp_path / "web" / "0.tar", 0, 3)
        assert first == (0, {"txt": b"a red three"}) or "cannot be read beyond this point" in first[1]
        assert [number for number, _ in rest] == [1, 2] and all(isinstance(files, str) for _, files in rest)


def test_files_that_belong_to_no_sample_are_passed_over(root, tmp_path, tokenizer):
    """As in WebDataset: names without a dot, and hidden files, which macOS adds to every tar."""
    gif = (root / "0.gif").read_bytes()
    write_tar(tmp_path / "web" / "0.tar", {
        "LICENSE": b"MIT", "._1.gif": b"\0\5\x16\7", "1.gif": gif, "1.txt": b"a red three", "d/._2.gif": b"\0",
        "d/.DS_Store": b"", "d/2.gif": gif, "d/2.txt": b"a blue one"})
    assert read_shards(tmp_path / "web")["image"].sizes == (2,)
    batches, _ = batches_of(tmp_path / "web", tokenizer, 2)
    assert not any(batch["errors"] for batch in batches)


def test_files_with_the_same_name_in_neighboring_folders_are_two_samples(root, tmp_path, tokenizer):
    gif = (root / "0.gif").read_bytes()
    write_tar(tmp_path / "web" / "0.tar", {
        "a/0001.gif": gif, "a/0001.txt": b"a red three", "b/0001.gif": gif, "b/0001.txt": b"a blue one"})
    assert read_shards(tmp_path / "web")["image"].sizes == (2,)
    batches, _ = batches_of(tmp_path / "web", tokenizer, 2)
    assert not any(batch["errors"] for batch in batches)
    assert len({source for batch in batches for source in batch["source"]}) == 2


def test_a_shard_is_opened_once_for_all_windows_of_an_epoch(root, tmp_path, tokenizer, monkeypatch):
    """To find a sample, all headers before it have to be read: with a new start for each window, the cost of a shard
    would grow with the square of its size."""
    gif = (root / "0.gif").read_bytes()
    members = {f"{k:03d}.{end}": content for k in range(30) for end, content in (("gif", gif), ("txt", b"a red three"))}
    write_tar(tmp_path / "web" / "0.tar", members)
    samples, opened = dataset({}), []
    monkeypatch.setattr(shards_module.tarfile, "open",
                        lambda *args, open=tarfile.open: opened.append(open(*args)) or opened[-1])
    one = ShardSet((tmp_path / "web" / "0.tar",), (30,))
    reader = Reader(one, "image", samples, lambda _: None, ReadPlan(1), 0, window=4)
    sources = [next(reader)["source"].split(" ")[0] for _ in range(60)]
    assert [set(sources[epoch: epoch + 30]) for epoch in (0, 30)] == [{f"{one.paths[0]}:{k}" for k in range(30)}] * 2
    assert len(opened) == 2 and all(len(tar.members) < 2 for tar in opened)
    later = Reader(one, "image", samples, lambda _: None, ReadPlan(1), 0, window=4, at=(1, 13))  # within a window
    assert [next(later)["source"].split(" ")[0] for _ in range(17)] == sources[13:30]


def test_the_largest_size_of_a_member_is_a_setting_of_the_environment(monkeypatch):
    monkeypatch.delenv("MPLUG2_MAX_MEMBER", raising=False)
    assert runpy.run_path(shards_module.__file__)["MAX_BYTES"] == 2**30
    monkeypatch.setenv("MPLUG2_MAX_MEMBER", "5000")
    assert runpy.run_path(shards_module.__file__)["MAX_BYTES"] == 5000


def test_a_single_text_is_one_answer(root, tmp_path, tokenizer):
    def change(members: list) -> list:
        changed = dict(members)
        for name, content in members:
            if name.endswith(".json"):
                question = {"question": "what color is it", "answers": "red"}
                changed[name] = json.dumps({**json.loads(content), "qa": [question]}).encode()
        return list(changed.items())

    batches, _ = batches_of(broken(root, tmp_path / "out", change), tokenizer, 3)
    batch = next(batch for batch in batches if batch["kind"] == "video")
    texts = set(tokenizer.decode(batch["answer_ids"]))
    assert "red" in texts and not texts & {"r", "e", "d"}
