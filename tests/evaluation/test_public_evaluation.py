"""From mock downloads in the published layout to metrics: write the records, evaluate, and write submissions."""

import json

import downloads
import pytest
import torch
from helpers import small

import eval as evaluation
import train
from mplug2.checkpoint import PreprocessConfig, save_model
from mplug2.data.__main__ import main
from mplug2.data.records import RecordError
from mplug2.data.samples import read_samples
from mplug2.data.text import Tokenizer
from mplug2.evaluation.captions import bleu, bleu_counts, cider_d, rouge_l
from mplug2.model.mplug2 import MPLUG2
from mplug2.tasks import INSTRUCTIONS, PROMPTS

pytestmark = pytest.mark.usefixtures("no_curves")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with all modules and random weights."""
    words = "a cat plays is playing two men talk woman cooks quickly someone food dog number 0 1 2 3 baby it red yes no"
    tokenizer = Tokenizer.train([words, *PROMPTS.values(), *INSTRUCTIONS.values()], 300)
    torch.manual_seed(0)
    model = MPLUG2(small(vocab_size=len(tokenizer), max_positions=32), "pretrain")
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model.eval(), tokenizer, PreprocessConfig(frames=4))
    return folder


def run(checkpoint, data, *more: str) -> tuple[dict, list[dict]]:
    metrics = evaluation.main(["--checkpoint", str(checkpoint), "--data", str(data), *more])
    predictions = (checkpoint / "eval" / "predictions.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in predictions]


def test_zero_shot_captions_and_retrieval_of_msrvtt(checkpoint, tmp_path, capsys):
    downloads.make("msrvtt_caption", tmp_path / "msrvtt")
    downloads.make("msrvtt_retrieval", tmp_path / "retrieval")
    main(["msrvtt_caption", str(tmp_path / "msrvtt"), "--out", str(tmp_path / "captions")])
    main(["msrvtt_retrieval", str(tmp_path / "retrieval"), "--out", str(tmp_path / "pairs")])
    metrics, predictions = run(checkpoint, tmp_path / "captions", "--splits", "test", "--beams", "2")
    assert "caption metrics: this repository, on lower-case words without punctuation\n" in capsys.readouterr().out
    (written,) = predictions
    assert (written["task"], written["id"]) == ("video_caption", "video2")
    assert written["truth"] == ["a woman cooks", "someone cooks food"]
    corpus = [written["truth"]], [written["prediction"]]
    assert metrics["test/caption_bleu4"] == pytest.approx(bleu(bleu_counts(*corpus).sum(axis=0))[3])
    assert metrics["test/caption_cider"] == pytest.approx(cider_d(*corpus).mean())
    assert metrics["test/caption_rouge_l"] == pytest.approx(sum(rouge_l(*corpus)))
    metrics, _ = run(checkpoint, tmp_path / "pairs", "--splits", "test")
    assert metrics["test/t2v_r1"] == metrics["test/v2t_median_rank"] == 1  # a gallery of one


def test_zero_shot_captions_and_retrieval_of_coco(checkpoint, tmp_path):
    downloads.make("coco", tmp_path / "coco")
    main(["coco", str(tmp_path / "coco"), "--out", str(tmp_path / "data")])
    metrics, predictions = run(checkpoint, tmp_path / "data", "--splits", "val,test")
    assert {line["id"] for line in predictions} == {"102", "103"}
    assert {"val/image_caption_cider", "test/t2i_r10", "test/i2t_median_rank"} <= set(metrics)


def test_a_recipe_fine_tunes_on_what_was_written(checkpoint, tmp_path):
    """One video with two captions, ten epochs, batches of two: ten steps with augmentation, then an evaluation."""
    downloads.make("msrvtt_caption", tmp_path / "msrvtt")
    main(["msrvtt_caption", str(tmp_path / "msrvtt"), "--out", str(tmp_path / "data")])
    metrics = train.main([
        "--recipe", "msrvtt_caption", "--init", str(checkpoint), "--data", str(tmp_path / "data"), "--batch-size", "2",
        "--frames", "2", "--precision", "float32", "--device", "cpu", "--out", str(tmp_path / "runs"),
    ])
    assert "caption_cider" in metrics
    settings = json.loads((tmp_path / "runs" / "msrvtt_caption" / "settings.json").read_text())["train"]
    assert (settings["max_steps"], settings["epochs"], settings["augment"]) == (10, None, "finetune")


def test_unlabelled_records_are_not_trained_on(tmp_path):
    downloads.write_image(tmp_path / "a.png")
    downloads.lines(tmp_path / "image_caption.train.jsonl", {"image": "a.png", "unlabelled": True})
    with pytest.raises(RecordError, match="image_caption.train.jsonl:1: this record is unlabelled"):
        read_samples(tmp_path, "image_caption", "train")


def test_every_caption_may_be_a_query(checkpoint, tmp_path):
    """Two images with two captions each make four text queries, as in COCO's protocol, not two."""
    for number in range(2):
        downloads.write_image(tmp_path / f"{number}{'x' * number}.png")
    downloads.lines(tmp_path / "image_retrieval.test.jsonl", *(
        {"image": f"{n}{'x' * n}.png", "captions": [f"a dog {n}", f"two men {n}"]} for n in range(2)
    ))
    first, _ = run(checkpoint, tmp_path)
    every, _ = run(checkpoint, tmp_path, "--all-captions")
    assert first["test/t2i_r1"] * 2 == int(first["test/t2i_r1"] * 2)
    predictor = evaluation.load(str(checkpoint))
    images = [tmp_path / "0.png", tmp_path / "1x.png"]
    scores = predictor.similarity(images, ["a dog 0", "two men 0", "a dog 1", "two men 1"]).T
    hits = [scores[q, q // 2] > scores[q, 1 - q // 2] for q in range(4)]
    assert every["test/t2i_r1"] == pytest.approx(sum(map(float, hits)) / 4)
    best = [max(scores[2 * v, v], scores[2 * v + 1, v]) > max(scores[2 - 2 * v, v], scores[3 - 2 * v, v])
            for v in range(2)]
    assert every["test/i2t_r1"] == pytest.approx(sum(map(float, best)) / 2)


def test_predictions_are_written_for_the_servers_of_benchmarks(checkpoint, tmp_path, capsys):
    downloads.make("vqav2", tmp_path / "vqa")
    main(["vqav2", str(tmp_path / "vqa"), "--out", str(tmp_path / "vqa_data")])
    metrics, _ = run(checkpoint, tmp_path / "vqa_data", "--splits", "test-dev,val", "--server", "vqav2")
    assert "for the server of vqav2" in capsys.readouterr().out
    sent = json.loads((checkpoint / "eval" / "vqav2_test-dev.json").read_text())
    assert [answer["question_id"] for answer in sent] == [458752000]
    assert not any(name.startswith("test-dev") for name in metrics) and 0 <= metrics["val/image_vqa_accuracy"] <= 1
    downloads.make("nocaps", tmp_path / "nocaps")
    main(["nocaps", str(tmp_path / "nocaps"), "--out", str(tmp_path / "nocaps_data")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluation.main(["--checkpoint", str(checkpoint), "--server", "coco"])
    assert "server='coco': expected one of vqav2, nocaps" in capsys.readouterr().err
