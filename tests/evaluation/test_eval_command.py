"""eval.py as a user calls it: nothing that was computed is lost, and nothing that was asked for is ignored."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from predictors import make_predictor, write_media, write_records
from processes import Processes
from runs import refused

import eval as evaluation
from mplug2.evaluation import own_files
from mplug2.evaluation.results import write_whole
from mplug2.inference import BatchRunner, Inference
from mplug2.predictor import Generation
from mplug2.training.fault_tolerance import Watchdog

LABELS = {"video_classification": ("no", "yes"), "text_pair_classification": ()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    make_predictor(",".join(["pretrain", *LABELS]), classes=LABELS).save(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Captions and questions of three videos."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        write_media(folder / f"{i}.gif", i, 4)
        write_media(folder / f"{i}.png", i, 1)
    write_records(folder, "video_caption.test", [{"video": f"{i}.gif", "captions": ["a red one"]} for i in range(3)])
    asked = [{"question": "which colour is it", "answers": ["red"]}]
    write_records(folder, "video_qa.test", [{"video": f"{i}.gif", "qa": asked} for i in range(3)])
    return folder


def arguments(checkpoint: Path, data: Path, *more: object) -> list[str]:
    return list(map(str, ["--checkpoint", checkpoint, "--data", data, "--out", data / "out", "--splits", "test",
                          "--device", "cpu", *more]))


def of_files(checkpoint: Path, data: Path, *more: object) -> list[str]:
    return list(map(str, ["--checkpoint", checkpoint, "--input", data, "--output", data / "found.jsonl",
                          "--device", "cpu", *more]))


def written(data: Path) -> list[dict]:
    return [json.loads(line) for line in (data / "found.jsonl").read_text().splitlines()]


# ---- scored evaluations ----------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_found_before_anything_is_computed(checkpoint, data, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("it computes"))
    (data / "file").touch()
    for more in (["--out", data / "file"], ["--json", data], ["--json", data / "file" / "x.json"]):
        said = refused(capsys, evaluation.main, arguments(checkpoint, data, *more), 1)
        assert "cannot be written" in said and "choose another place with --out or --json" in said
    assert not (data / "out" / "metrics.json").exists()


def test_files_of_other_tasks_and_a_broken_training_split_do_not_cost_the_results(checkpoint, data, capsys):
    (data / "video_caption.test.jsonl").write_text("broken\n")
    assert "qa_accuracy" in evaluation.main(arguments(checkpoint, data, "--task", "video_qa")).popitem()[0]
    assert "chance" in capsys.readouterr().out
    other = shutil.copytree(data, data / "other")
    (other / "video_qa.train.jsonl").write_text("broken\n")
    assert evaluation.main(arguments(checkpoint, other, "--task", "video_qa"))
    said = capsys.readouterr()
    assert "warning: the chance level failed" in said.err and "qa_accuracy" in said.out and "on one page" in said.out


def test_a_submission_is_checked_first_and_what_is_found_later_costs_only_the_submission(
    checkpoint, data, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("it computes"))
        said = refused(capsys, evaluation.main, arguments(checkpoint, data, "--server", "nocaps"), 1)
    assert "has no image_caption.test.jsonl; leave the split test out of --splits" in said
    write_records(data, "image_caption.test", [
        {"image": f"{i}.png", "captions": ["red"], "id": str(i)} for i in range(3)])
    sent = arguments(checkpoint, data, "--server", "nocaps", "--task", "image_caption", "--min-length", "1")
    evaluation.main(sent)
    assert f"for the server of nocaps: {data}/out/nocaps_test.json" in capsys.readouterr().out
    complete = (data / "out/nocaps_test.json").read_text()
    assert len(json.loads(complete)) == 3
    (data / "1.png").write_bytes(b"damaged")
    said = refused(capsys, evaluation.main, [*sent, "--max-skipped", "0.5"], 1)
    assert "1 of 3 predictions are missing, such as that of id 1" in said
    assert json.loads((data / "out/metrics.json").read_text())["records"]["test"]["scored"] == 2
    assert (data / "out/nocaps_test.json").read_text() == complete


def test_an_evaluation_that_fails_leaves_the_files_of_an_earlier_one(checkpoint, data, capsys, monkeypatch):
    of_captions = arguments(checkpoint, data, "--task", "video_caption", "--json", data / "flat.json")
    evaluation.main(of_captions)
    files = [data / "flat.json", data / "out/predictions.jsonl", data / "out/report.html"]
    complete = [file.read_text() for file in files]
    (data / "1.gif").write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        evaluation.main(of_captions)
    said = capsys.readouterr()
    assert "1 of 3 records were skipped" in said.err and said.out.count("test: scored 2 of 3 records") == 1
    assert f"metrics: {data}/out/refused/metrics.json" in said.out and [file.read_text() for file in files] == complete
    assert len((data / "out/refused/predictions.jsonl").read_text().splitlines()) == 2
    assert (data / "out/refused/report.html").exists()

    def full_disk(self, text, **_):
        self.open("w").write(text[:9])
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(SystemExit):
            evaluation.main([*of_captions, "--max-skipped", "1"])
    assert "No space left on device" in capsys.readouterr().err and [file.read_text() for file in files] == complete


def test_a_file_is_written_behind_a_link_and_into_a_pipe(tmp_path):
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        for name in ("link", "pipe"):
            write_whole(tmp_path / name, "text")
        assert read.result(timeout=10) == "text"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    assert {path.name for path in tmp_path.iterdir()} == {"link", "target", "pipe"} and (tmp_path / "pipe").is_fifo()


def test_unknown_words_are_refused_before_the_evaluation_or_allowed(checkpoint, data, capsys, monkeypatch):
    """The vocabulary has no Greek letters. Both splits are checked before one is refused."""
    asked = [{"question": "which colour is it", "answers": [answer]} for answer in ("red", "κοκκινο")]
    for split in ("test", "val"):
        write_records(data, f"video_qa.{split}", [{"video": "0.gif", "qa": asked}])
    write_records(data, "video_caption.val", [{"video": "0.gif", "captions": ["ενα κοκκινο one"]}])
    both = arguments(checkpoint, data, "--splits", "test,val")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("it computes"))
        said = refused(capsys, evaluation.main, both, 1)
        assert "video_caption, val: 66.7% of the words are unknown to the vocabulary, such as 'ενα'" in said
        assert "At most 20% are allowed (--max-unknown)" in said and "(train.py --tokenizer)" in said
        said = refused(capsys, evaluation.main, [*both, "--max-unknown", "0.05"], 1)
        assert said.count("video_qa, test: 10.0% of the words are unknown") == said.count("video_qa, val: 10.0%") == 1
    evaluation.main([*both, "--max-unknown", "0.7"])
    said = capsys.readouterr().err
    assert "video_caption, val: 66.7% of the words are unknown" in said
    assert "video_qa, test: 1 of 2 questions have only answers of unknown words, such as 'κοκκινο'" in said


@pytest.mark.parametrize("flag", ["--task", "--splits"])
def test_lists_of_names_are_read_in_the_same_way(checkpoint, data, capsys, flag):
    name = {"--task": "video_qa", "--splits": "test"}[flag]
    said = refused(capsys, evaluation.main, arguments(checkpoint, data, flag, f"{name},"), 1)
    assert f"{flag[2:]}='{name},': name 2 of the list is empty" in said
    said = refused(capsys, evaluation.main, arguments(checkpoint, data, flag, f"{name}, {name}"), 1)
    assert f"'{name}' is named twice" in said


def test_what_the_papers_pipeline_needs_is_checked_first(checkpoint, data, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    said = refused(capsys, evaluation.main, arguments(checkpoint, data, "--paper-captions"), 2)
    assert "--paper-captions needs the package pycocoevalcap" in said


def test_the_watchdog_covers_start_up_and_every_batch(checkpoint, data, monkeypatch):
    heard, heartbeat = [], Watchdog.heartbeat

    def noted(self, step, activity, **more):
        heard.append((step, activity, self.timeout, self.program))
        heartbeat(self, step, activity, **more)

    monkeypatch.setattr(Watchdog, "heartbeat", noted)
    evaluation.main(arguments(checkpoint, data, "--task", "video_qa", "--batch-size", "1", "--timeout", "99"))
    assert heard[0] == (0, "starting", 99, "eval.py")
    assert heard[1:] == [(number, "evaluating", 99, "eval.py") for number in (1, 2, 3)]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_an_error_of_both_ranks_is_printed_once(checkpoint, data):
    """One video is a pipe that nobody writes to. Exit codes are those of torchrun."""
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2".split()

    def run(*more: object) -> str:
        program = [sys.executable, *torchrun, str(Path(evaluation.__file__))]
        done = subprocess.run([*program, *arguments(checkpoint, data, *more)], capture_output=True, text=True,
                              timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 1
        return done.stderr

    assert run("--checkpoint", data).count("is not a checkpoint: it does not contain config.json") == 1
    assert run("--splits", "none").count("has none of the splits none; it has test") == 1
    (data / "1.gif").unlink()
    os.mkfifo(data / "1.gif")
    said = run("--task", "video_qa", "--batch-size", "1", "--timeout", "3")
    assert "eval.py: no progress for 10 x 3 s (--timeout): rank 1 of 2 blocks the others" in said, said
    assert "rank 0 of 2: 2 steps done, evaluating" in said and "--resume" not in said
    assert not (data / "out/metrics.json").exists()


def test_a_named_task_without_records_is_refused_and_a_split_that_is_missing_is_named(checkpoint, data, capsys):
    said = refused(capsys, evaluation.main, arguments(checkpoint, data, "--task", "video_qa,image_qa"), 1)
    assert "has no records of image_qa in the splits test; leave it out of --task" in said
    evaluation.main(arguments(checkpoint, data, "--splits", "test, dev", "--task", "video_qa"))
    assert "(--data); it has no split dev" in capsys.readouterr().out.splitlines()[0]


def test_a_text_cannot_be_longer_than_the_longest(checkpoint, data, capsys):
    said = refused(capsys, evaluation.main, arguments(checkpoint, data, "--min-length", "21"), 1)
    assert "min_length=21: a text has at most" in said and "raise --max-length" in said


def test_unlabelled_records_are_no_queries_and_do_not_count_as_scored(checkpoint, data, capsys):
    write_records(data, "video_retrieval.test", [
        {"video": "0.gif", "unlabelled": True}, {"video": "1.gif", "captions": ["a red one"]}])
    write_records(data, "video_caption.test", [{"video": "0.gif", "unlabelled": True}])
    found = evaluation.main(arguments(checkpoint, data, "--task", "video_retrieval,video_caption"))
    assert found["test/t2v_r1"] == 1 and "test/caption_exact" not in found
    said = capsys.readouterr().out
    assert "test: video_caption: the records have no truth, so they are predicted, but not scored" in said
    metrics = json.loads((data / "out/metrics.json").read_text())
    assert metrics["records"] == {"test": {"scored": 1, "total": 3}}


def test_labels_that_no_prediction_can_match_are_reported_before_the_evaluation(checkpoint, data, capsys, monkeypatch):
    write_records(data, "video_classification.test", [
        {"video": f"{i}.gif", "label": label} for i, label in enumerate(["yes", "Yes"])])
    evaluation.main(arguments(checkpoint, data, "--task", "video_classification"))
    expected = "video_classification, test: 1 labels are not among the 2 classes that are predicted, such as 'Yes'"
    assert expected in capsys.readouterr().err
    write_records(data, "image_classification.test", [{"image": "0.png", "label": "seven"}])  # without a head
    write_records(data, "image_classification.train", [{"image": "0.png", "label": "red"}])
    evaluation.main(arguments(checkpoint, data, "--task", "image_classification"))
    assert "1 labels are not among the 1 classes that are predicted, such as 'seven'" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: pytest.fail("it computes"))
    write_records(data, "text_pair_classification.test", [{"texts": ["red", "blue"], "label": "yes"}] * 2)
    said = refused(capsys, evaluation.main, arguments(checkpoint, data, "--task", "text_pair_classification"), 1)
    assert "text_pair_classification.test.jsonl:1: found the label 'yes', but this model predicts numbers" in said


# ---- files of the user's ---------------------------------------------------------------------------------------------


def test_flags_of_scored_evaluations_are_refused_with_files_of_ones_own(checkpoint, data, capsys):
    said = refused(capsys, evaluation.main, of_files(checkpoint, data, "--answers", "train", "--limit", "2"), 2)
    assert "answers, limit: only for records; leave out with --input" in said
    one = ["--checkpoint", checkpoint, "--input", data / "0.gif", "--output", data / "found.jsonl"]
    assert "expected a folder or a pattern as --input" in refused(capsys, evaluation.main, one, 2)


def test_a_search_names_the_files_that_it_could_not_read(checkpoint, data, capsys):
    (data / "1.gif").write_bytes(b"damaged")
    evaluation.main(["--checkpoint", str(checkpoint), "--input", str(data), "--find", "a red one", "--device", "cpu"])
    *found, skipped = capsys.readouterr().out.splitlines()
    assert len(found) == 5 and skipped.startswith(f"skipped: {data / '1.gif'} cannot be decoded")


def test_another_rank_gets_the_files_that_are_left_from_the_main_one_and_writes_nothing(tmp_path, monkeypatch):
    seen, said, files = [], [], [Path("0.png"), Path("1.png")]
    monkeypatch.setattr(own_files, "run_on_main", lambda *_: None)
    monkeypatch.setattr(own_files, "all_gather_object", lambda todo: [files[1:], todo])
    predictor = SimpleNamespace(inference=Inference(rank=1, world_size=2), device="cpu", is_main=False, unreadable={},
                                caption=lambda chunk, **_: seen.append(chunk) or ["a"] * len(chunk))
    own_files.write(predictor, files, "", Generation(), tmp_path / "found.jsonl", "model", said.append)
    assert seen == [files[1:]] and list(tmp_path.iterdir()) == []
    assert said == [f"{tmp_path}/found.jsonl: 2 of 2 files, 1 of them in earlier calls"]


def test_empty_captions_are_written_and_a_first_line_that_was_cut_off_is_removed(tmp_path):
    out, files, said = tmp_path / "found.jsonl", [Path("0.png"), Path("1.png"), Path("2.png")], []
    predictor = SimpleNamespace(inference=Inference(), device="cpu", is_main=True, unreadable={},
                                caption=lambda chunk, **_: ["", "a", None][: len(chunk)])
    out.write_text('{"file": "0')
    own_files.write(predictor, files, "", Generation(), out, "model", said.append)
    assert [line["caption"] for line in own_files.read_results(out)] == ["", "a"]
    assert said == [f"{out}: 2 of 3 files"]
    out.write_text('{"file": "0')
    assert own_files.read_results(out) == [] and out.read_text() == ""


def test_a_search_prints_the_ten_best_files():
    files = [Path(f"{i}.png") for i in range(12)]
    predictor = SimpleNamespace(embed_texts=lambda _: torch.ones(1, 1), unreadable={},
                                embed_media=lambda _: torch.arange(12.0)[:, None])
    lines: list[str] = []
    own_files.print_best(predictor, files, "a text", lines.append)
    assert [line.split()[1] for line in lines] == [f"{i}.png" for i in range(11, 1, -1)]


@pytest.mark.parametrize("contents", ["# notes\n", '{"a": 1}', '{"a": 1}\n', '{"file": "a"}\n', "[1]\n", "7\n", "text"])
def test_a_file_of_something_else_is_never_overwritten(checkpoint, data, capsys, contents):
    (data / "found.jsonl").write_text(contents)
    said = refused(capsys, evaluation.main, of_files(checkpoint, data), 1)
    assert "has lines that are no captions or answers of eval.py; name another file with --output" in said
    assert (data / "found.jsonl").read_text() == contents


def test_captions_of_another_search_are_written_again_and_the_last_line_says_how_many_there_were(
    checkpoint, data, capsys
):
    evaluation.main(of_files(checkpoint, data, "--output", data / "a new folder" / "found.jsonl"))
    evaluation.main(of_files(checkpoint, data))
    assert "6 of 6 files\n" in capsys.readouterr().out
    evaluation.main(of_files(checkpoint, data))
    assert "6 of 6 files, 6 of them in earlier calls" in capsys.readouterr().out
    assert len(written(data)) == 6
    for _ in range(2):
        evaluation.main(of_files(checkpoint, data, "--beams", "2", "--max-length", "3"))
        assert [line.get("search") for line in written(data)[6:]] == [{"beams": 2, "max_length": 3}] * 6
    whole = (data / "found.jsonl").read_bytes()
    for cut in (1, 20, len(whole) - 5):
        (data / "found.jsonl").write_bytes(whole[:-cut])
        evaluation.main(of_files(checkpoint, data))
        evaluation.main(of_files(checkpoint, data, "--beams", "2", "--max-length", "3"))
        assert sorted(map(str, written(data))) == sorted(map(str, map(json.loads, whole.splitlines())))


def stop_after(checkpoint: Path, data: Path, batches: int) -> tuple[int, list[str]]:
    """Caption the files, with a SIGINT to this process in one of the batches: the exit code, and the files done."""
    encode, count = BatchRunner.vision_tokens, iter(range(batches))

    def interrupted(self, pixels):
        if os.environ.get("RANK", "0") == "0" and next(count, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, pixels)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(BatchRunner, "vision_tokens", interrupted)
        evaluation.main(of_files(checkpoint, data, "--batch-size", "1"))
    return stopped.value.code, [Path(line["file"]).name for line in written(data)]


def test_nothing_that_was_written_before_a_signal_is_lost(checkpoint, data, capfd):
    assert stop_after(checkpoint, data, 1) == (130, ["0.gif", "1.gif"])
    said = capfd.readouterr()
    assert "found.jsonl: 2 of 6 files; the same command continues" in said.out
    assert said.err.splitlines()[1:] == ["stopping after this batch; press Ctrl-C again to quit now",
                                         "eval.py: stopped by SIGINT"]
    evaluation.main(of_files(checkpoint, data))
    assert len({line["file"] for line in written(data)}) == len(written(data)) == 6


def captions_on_a_rank(checkpoint: Path, data: Path) -> None:
    evaluation.main(of_files(checkpoint, data, "--batch-size", "1"))


def attention_on_a_rank(checkpoint: Path, data: Path) -> None:
    evaluation.main(["--checkpoint", str(checkpoint), "--input", str(data / "0.gif"), "--device", "cpu",
                     "--attention", str(data / "attention.png")])


@pytest.mark.slow
def test_two_processes_stop_and_continue_together(checkpoint, data, tmp_path):
    """Only the main process sees the file of captions: the others may be machines with disks of their own."""
    evaluation.main(of_files(checkpoint, data))
    one = written(data)
    other = shutil.copytree(data, tmp_path / "other")
    (data / "found.jsonl").unlink()
    processes = Processes(2)
    try:
        found = processes.run(stop_after, (checkpoint, data, 1), (checkpoint, data, 1), joined=False)
        assert found[0][0] == found[1][0] == 130 and 2 <= len(written(data)) < 6
        paths = [(checkpoint, data), (checkpoint, data)]
        processes.run(captions_on_a_rank, *paths, joined=False)
        assert sorted(map(str, written(data))) == sorted(map(str, one))
        assert written(other) == one
        processes.run(attention_on_a_rank, *paths, joined=False)
        assert (data / "attention.png").exists()
    finally:
        assert processes.close() == [0, 0]
