"""The benchmark of media: both readers give the same frames, and the numbers are saved."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from video_files import counter, numbers_of, write_video

from mplug2.data.frame_choice import segment_indices
from mplug2.tools import bench, bench_media


def here(function, *arguments):
    return function(*arguments)


@pytest.mark.slow
def test_the_reference_reads_in_order(tmp_path):
    for suffix in (".mp4", ".webm"):  # the header of WebM has no number of frames
        path = write_video(tmp_path / f"a{suffix}", counter(50))
        assert numbers_of(bench_media.read_in_order(path, 4)) == segment_indices(50, 4).tolist()
        assert numbers_of(bench_media.read_in_order(path, None)) == list(range(50))


@pytest.mark.slow
def test_files_that_it_writes_are_read_alike(capsys):
    """Six seconds and eight, in place of thirty and 240."""
    found = bench_media.bench_media([], 1, here, lengths=(6, 8))
    printed = capsys.readouterr().out
    for name in ("6_s_mp4", "6_s_mp4_sparse_key_frames", "8_s_mp4", "8_s_mkv", "6_s_mp4_all_frames",
                 "photo_12_megapixels"):
        assert found[f"{name}_ratio"] == pytest.approx(found[f"{name}_reference_s"] / found[f"{name}_s"])
    assert printed.count("bit-identical") == 5 and "other frames" not in printed
    assert found["photo_12_megapixels_ratio"] > 2


def test_both_readers_read_the_same_frames_in_turns_and_are_measured_by_cpu_time(tmp_path, monkeypatch):
    """The reference takes 4 s and ours 1 s, and both get generators with the same seeds."""
    now, drawn = [0.0], {"reference": [], "ours": []}

    def reader(name, seconds):
        def read(path, frames, rng=None):
            if rng is not None:
                drawn[name].append(rng.integers(10**9))
                now[0] += seconds
            return np.zeros(1)
        return read

    monkeypatch.setattr(bench_media, "read_in_order", reader("reference", 4))
    monkeypatch.setattr(bench_media, "read_video", reader("ours", 1))
    monkeypatch.setattr(bench_media, "time", SimpleNamespace(process_time=lambda: now[0]))
    assert bench_media.measure_video(tmp_path, 4, 3) == {"reference_s": 4, "s": 1, "same": True}
    assert drawn["reference"] == drawn["ours"] and len(set(drawn["ours"])) == 3


def test_a_row_of_the_table_by_hand(tmp_path, capsys):
    found = bench_media.bench_media([tmp_path / "a.mp4"], 1, lambda *_: {"reference_s": 0.5, "s": 0.25, "same": False})
    assert found["a.mp4_ratio"] == 2 and found["a.mp4_reference_s"] == 0.5 and found["a.mp4_s"] == 0.25
    assert "a.mp4 500.0 250.0 2.0 other frames or pixels" in " ".join(capsys.readouterr().out.split())


def test_files_that_are_given(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "in_new_process", here)
    path = write_video(tmp_path / "a.mp4", np.repeat(counter(30), 2, axis=1))
    bench.main(["--media", "--files", str(path), "--repeats", "1", "--json", str(tmp_path / "media.json")])
    assert set(json.loads((tmp_path / "media.json").read_text())) == {
        f"a.mp4{more}_{what}" for more in ("", "_all_frames") for what in ("s", "reference_s", "ratio")}
    for name, message in (("gone.mp4", "does not exist"), ("short.avi", "short.avi cannot be read by imageio")):
        if name == "short.avi":  # its header says that it has 60 frames
            content = bytearray(write_video(tmp_path / name, counter(30)).read_bytes())
            content[content.index(b"strh") + 40] = 60
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit):
            bench.main(["--media", "--files", str(tmp_path / name), "--repeats", "1"])
        assert message in capsys.readouterr().err
