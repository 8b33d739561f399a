"""The emoji data: splits by concept, the files that are written, and the errors if npm or a package fails."""

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mplug2.data.media import kind_of, read_video
from mplug2.data.records import read_records
from mplug2.data.samples import read_samples
from tiny_data import emoji
from tiny_data.emoji import Emoji

points = st.sampled_from(["1F44B", "1F3C3", "1F9D1", "1F468", "1F469", "1F4BB", "2764", "1F600"])
TONES, MARKS = ["", "1F3FB", "1F3FF"], ["", "200D-2642-FE0F", "200D-2640", "200D-27A1-FE0F"]


@given(st.lists(points, min_size=1, max_size=3), st.sampled_from(TONES), st.sampled_from(MARKS))
def test_tones_genders_and_directions_of_a_concept_share_its_split(parts, tone, mark):
    plain = Emoji("-".join(parts), "x", (), "people and body")
    varied = Emoji("-".join(part for part in (parts[0], tone, mark, *parts[1:]) if part), "x", (), "people and body")
    woman = Emoji("-".join("1F469" if part == "1F468" else part for part in parts), "x", (), "people and body")
    assert plain.concept == varied.concept == woman.concept
    assert plain.split == woman.split
    assert varied.split == (None if tone and plain.split != "train" else plain.split)


def test_splits_have_their_shares_and_flags_are_for_training():
    splits = [Emoji(f"{code:X}", "x", (), "objects").split for code in range(0x1F300, 0x1FA00)]
    for split, share in (("test", 0.15), ("val", 0.05)):
        assert abs(splits.count(split) / len(splits) - share) < 0.02
    assert {Emoji(f"{code:X}", "x", (), "flags").split for code in range(0x1F300, 0x1FA00)} == {"train"}


def test_captions_are_the_name_and_the_name_with_keywords():
    assert Emoji("1F44B", "waving hand", ("bye", "cya", "hand"), "people").captions == [
        "waving hand", "waving hand, bye, cya", "waving hand, hand",
    ]


def webp(frames: int, seed: int) -> bytes:
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    images = [Image.fromarray(rng.integers(0, 255, (20, 20, 4), dtype=np.uint8)) for _ in range(frames)]
    images[0].save(buffer, "WEBP", save_all=frames > 1, append_images=images[1:], lossless=True)
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def package(folder, name: str, version: str, files: dict[str, bytes]) -> None:
    files = {"package.json": json.dumps({"name": name, "version": version}).encode(), **files}
    with tarfile.open(folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz", "w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """32 hands, each with a skin tone, in packages with the published layout. No minimum number is checked."""
    monkeypatch.setattr(emoji, "check_counts", lambda *_: None)
    folder = tmp_path / "packages"
    folder.mkdir()
    codes = [f"{code:X}" for code in range(0x1F440, 0x1F460)]
    names = [{"label": "regional indicator A", "hexcode": "1F1E6"}] + [
        {"label": f"hand {code}", "hexcode": code, "tags": ["wave"], "group": 1,
         "skins": [{"label": f"hand {code}: dark skin tone", "hexcode": f"{code}-1F3FF", "group": 1}]}
        for code in codes
    ]
    package(folder, emoji.NAME_PACKAGE, "17.0.0", {
        "en/data.json": json.dumps(names).encode(),
        "en/messages.json": json.dumps({"groups": [{"order": 1, "message": "people & body"}]}).encode(),
    })
    entries = [
        {"unified": code, "image": f"{code.lower()}.png",
         "skin_variations": {"1F3FF": {"unified": f"{code}-1F3FF", "image": f"{code.lower()}-1f3ff.png"}}}
        for code in codes
    ]
    images = {f"img/google/64/{form['image']}": png() for entry in entries
              for form in (entry, entry["skin_variations"]["1F3FF"])}
    package(folder, emoji.IMAGE_PACKAGE, "16.0.0", {"emoji.json": json.dumps(entries).encode(), **images})
    for number, name in enumerate(emoji.CLIP_PACKAGES):
        own = codes[number::4]
        package(folder, name, "1.0.0", {
            **{f"assets/{code.lower()}-fe0f.webp": webp(20, int(code, 16)) for code in own[1:]},
            f"assets/{own[0].lower()}.webp": webp(1, 0), "assets/ffff.webp": webp(20, 0),
        })
    return folder


def test_images_videos_and_records_are_written(packages, tmp_path, capsys):
    out = tmp_path / "data"
    emoji.main(["--out", str(out), "--packages", str(packages)])
    assert "video_caption.test_still" in capsys.readouterr().out
    seen = {}
    for split in ("train", "val", "test"):
        for modality in ("image", "video"):
            records = read_records(out, f"{modality}_caption", split)
            codes = {record.positive_id for record in records}
            seen.setdefault(split, set()).update(code.split("-")[0] for code in codes)
            assert any("1F3FF" in code for code in codes) == (split == "train" and modality == "image")
            assert records[0].captions[0].startswith("hand 1F4")
            asked = [question for record in read_records(out, f"{modality}_qa", split) for question in record.qa]
            assert {question.answers for question in asked} == {("people and body",)}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    assert len(read_records(out, "video_caption", "train")) < len(read_records(out, "image_caption", "train"))
    assert set(read_samples(out, "pretrain", "train")) == {"image", "video"}
    for clip, still, mixed in zip(*(read_records(out, "video_caption", split)
                                    for split in ("test", "test_still", "test_shuffled")), strict=True):
        frames, held, shuffled = (read_video(record.video, 4) for record in (clip, still, mixed))
        assert {kind_of(record.video) for record in (clip, still, mixed)} == {"video"}
        assert (np.ptp(held.astype(int), axis=0) <= 1).all()
        np.testing.assert_allclose(held[0].astype(int), frames[1], atol=1)
        order = [int(np.abs(frames.astype(int) - frame).mean(axis=(1, 2, 3)).argmin()) for frame in shuffled]
        assert sorted(order) == [0, 1, 2, 3] and order not in ([0, 1, 2, 3], [3, 2, 1, 0])


def test_frames_are_evenly_spaced_and_on_white_and_are_stored_without_loss(tmp_path):
    buffer = io.BytesIO()
    images = [Image.new("RGBA", (64, 64), (5 * number, 0, 0)) for number in range(40)]
    for image in images:
        image.paste((0, 0, 0, 0), (0, 0, 32, 64))  # the left half is transparent
    images[0].save(buffer, "WEBP", save_all=True, append_images=images[1:], lossless=True)
    frames = emoji.read_frames(buffer.getvalue(), "1F600")
    assert frames[:, 32, 48, 0].tolist() == [5 * (number * 40 // 16) for number in range(16)]
    assert (frames[:, :, :24] == 255).all()
    noise = np.random.default_rng(0).integers(0, 256, frames.shape).astype(np.uint8)
    emoji.save_clip(noise, tmp_path / "a.webp")
    found = read_video(tmp_path / "a.webp", 16).astype(int)
    assert np.abs(found - noise)[:, -1, -1].max() <= 1  # the corner tells equal frames apart
    found[:, -1, -1] = noise[:, -1, -1]
    assert (found == noise).all()


def test_shuffled_quarters_have_every_order_except_the_original_and_its_reverse():
    frames = np.arange(16)[:, None, None, None] * np.ones((1, 1, 1, 1), int)
    orders = {tuple(emoji.shuffled(frames, f"{code:X}")[::4, 0, 0, 0] // 4) for code in range(0x1F300, 0x1F400)}
    assert len(orders) == 24 - 2 and not orders & {(0, 1, 2, 3), (3, 2, 1, 0)}


def test_a_package_that_is_damaged_missing_or_wrong_is_named(packages, tmp_path, capsys):
    def error() -> str:
        with pytest.raises(SystemExit):
            emoji.main(["--out", str(tmp_path / "data"), "--packages", str(packages)])
        return capsys.readouterr().err

    path = packages / "emojibase-data-17.0.0.tgz"
    content = path.read_bytes()
    path.write_bytes(content[:200])
    assert "emojibase-data-17.0.0.tgz is not a complete package" in error()
    path.unlink()
    assert "has no emojibase-data-17.*.tgz; fetch it with `npm pack emojibase-data@17`" in error()
    package(packages, "emojibase-data", "17.0.0", {"package.json": b'{"name": "other", "version": "17.0.0"}'})
    assert "is other 17.0.0, expected emojibase-data 17" in error()
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / "x").touch()
    assert "is not empty" in error()


def test_too_few_emoji_are_refused():
    with pytest.raises(ValueError, match="only 1 emoji have a name and image data.*1 have no name, such as FF"):
        emoji.check_counts({("image_caption", "train"): [{}]}, ["FF"])


def test_npm_fetches_the_packages_and_a_missing_npm_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="`npm` was not found.*install Node.js.*emojibase-data@17"):
        emoji.fetch(tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho $3 >> asked\n")
    npm.chmod(0o755)
    emoji.fetch(tmp_path)
    assert (tmp_path / "asked").read_text().split() == [f"{name}@{v}" for name, v in emoji.VERSIONS.items()]
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    with pytest.raises(ValueError, match="npm pack emoji-datasource-google@16 failed: no network"):
        emoji.fetch(tmp_path)
