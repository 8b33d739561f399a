"""Inference and evaluation: results in the order of the inputs, metrics of the predictions, helpful errors."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from predictors import make_predictor, write_media, write_records

import mplug2
import tiny_data
from mplug2.checkpoint import save_model
from mplug2.data.media import MediaError, read_media, to_pixels
from mplug2.data.media_batches import Medium
from mplug2.data.records import read_records
from mplug2.data.text import clean
from mplug2.evaluation import retrieval
from mplug2.evaluation.chance import chance_level
from mplug2.evaluation.data import EvalOptions, EvalSplit
from mplug2.evaluation.evaluate import evaluate
from mplug2.evaluation.predictions import Prediction
from mplug2.evaluation.retrieval import evaluate_retrieval
from mplug2.generation import beam_search, best_texts, greedy, rank_answers
from mplug2.inference import Inference, repeat_to
from mplug2.model.mplug2 import answer_memory
from mplug2.predictor import Predictor
from mplug2.tasks import INSTRUCTIONS, PROMPTS
from mplug2.tools.plots import draw_curves

QUESTIONS = ("which colour is it", "is it red", "which digit", "up or down")
COLORS = ("red", "green", "blue")
TEXTS = ("a red one", "two moving left", "three up", "green and blue", "down right", "a digit")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return make_predictor()


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> list[Path]:
    """Images and videos, mixed."""
    folder = tmp_path_factory.mktemp("media")
    kinds = [("a.gif", 6), ("b.png", 1), ("c.mp4", 5), ("d.gif", 1), ("e.jpg", 1), ("f.gif", 2), ("g.png", 1)]
    return [write_media(folder / name, i, frames) for i, (name, frames) in enumerate(kinds)]


# ---- inference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(predictor, media) -> dict:
    """The model's outputs for each file, computed for that file alone."""
    return {
        "captions": [predictor.caption([path])[0] for path in media],
        "answers": [[predictor.answer([path], [question])[0] for question in QUESTIONS] for path in media],
        "vectors": torch.cat([predictor.embed([path]) for path in media]),
    }


def test_the_model_of_these_tests_distinguishes_its_inputs(alone):
    """Otherwise the next test could not fail."""
    assert len(set(alone["captions"])) > 2
    assert len({answers[0] for answers in alone["answers"]}) > 3
    assert len(set(alone["answers"][0])) > 2
    assert len({tuple(row) for row in alone["vectors"].round(decimals=3).tolist()}) == 7


def test_a_text_starts_with_cls_and_the_words_of_the_prompt(predictor):
    ids, word = predictor.start(2, "a video of"), predictor.tokenizer.lengths
    assert word(["a video of"]) == [5] and ids.shape == (2, 4)  # [CLS] and three words, without [SEP]
    assert predictor.tokenizer.decode(ids) == ["a video of"] * 2 and (ids[:, 0] == predictor.tokenizer.cls).all()
    assert predictor.start(3).tolist() == [[predictor.tokenizer.cls]] * 3


def test_each_text_is_encoded_once_in_batches(predictor):
    with patch.object(predictor.model, "encode_text", wraps=predictor.model.encode_text) as encoded:
        vectors = predictor.embed_texts(TEXTS[:5])
    assert [len(call.args[0]) for call in encoded.call_args_list] == [2, 3] and len(vectors) == 5


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.integers(1, 4))
def test_results_come_in_the_order_of_the_paths_whatever_the_batches(predictor, media, alone, order, batch_size):
    """Images and videos, mixed, some of them twice."""
    batched = Predictor(predictor.model, predictor.tokenizer, predictor.preprocess, Inference(batch_size))
    paths, asked = [media[i] for i in order], [(i + k) % 4 for k, i in enumerate(order)]
    assert batched.caption(paths) == [alone["captions"][i] for i in order]
    expected = [alone["answers"][i][question] for i, question in zip(order, asked)]
    assert batched.answer(paths, [QUESTIONS[question] for question in asked]) == expected
    torch.testing.assert_close(batched.embed(paths), alone["vectors"][order], rtol=1e-4, atol=1e-4)


def test_a_caption_continues_the_prompt_of_its_modality(predictor, media):
    """From V' of four frames for a video, and of one for an image. A GIF with one frame is an image."""
    gif, still_gif, jpeg = media[0], media[3], media[4]
    for path, prompt, frames in ((gif, "a video of", 4), (still_gif, "a picture of", 1), (jpeg, "a picture of", 1)):
        pixels = to_pixels(read_media(path, 4), 8)
        assert pixels.shape[1] == frames
        ids = predictor.tokenizer.encode([prompt], special=False)[0][0].tolist()
        with torch.no_grad():
            vision, written = predictor.model.encode_vision(pixels[None]), [predictor.tokenizer.cls, *ids]
            while len(written) < 1 + len(ids) + 20 and len(written) < 24 and written[-1] != predictor.tokenizer.sep:
                row = torch.tensor([written])
                written.append(int(predictor.model.decode(row, row > -1, vision)[0, -1].argmax()))
        assert predictor.caption([path]) == predictor.tokenizer.decode([written[1 + len(ids):]])


def test_a_model_of_single_frames_still_treats_a_video_as_a_video(media):
    predictor = make_predictor(frames=1)
    modalities = []
    predictor.on_media(media, lambda _, modality, indices: modalities.extend((i, modality) for i in indices) or indices)
    expected = ["video", "image", "video", "image", "image", "video", "image"]
    assert [modality for _, modality in sorted(modalities)] == expected


def test_captions_can_be_searched_by_beams(predictor, media):
    found = predictor.caption(media[:2], beams=3, max_length=6)
    for path, prompt, text in zip(media[:2], PROMPTS.values(), found, strict=True):  # a video, then an image
        vision = torch.stack(predictor.encode_media([path]))
        start = predictor.tokenizer.encode([prompt])[0][:, :-1]
        best = beam_search(predictor.model, vision, start, predictor.special_tokens, beams=3, max_length=6)
        assert text == predictor.tokenizer.decode(best_texts(best, predictor.special_tokens))[0]


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("beams", [1, 3])
def test_lengths_that_are_asked_for_hold_with_any_search_whatever_the_checkpoint_says(media, beams, length):
    """Even of a model that would rather end each text at once."""
    other = make_predictor()
    other.preprocess = dataclasses.replace(other.preprocess, max_length=3)
    other.model.decoder.head.bias.data[other.tokenizer.sep] = 50.0
    asked = dict(beams=beams, min_length=length, max_length=length)
    with patch.object(other.tokenizer, "decode", wraps=other.tokenizer.decode) as decoded:
        other.caption(media[:2], **asked)
        other.answer(media[:2], QUESTIONS[:2], **asked)
        other.answer(None, QUESTIONS[:2], **asked)
    assert [len(ids) for call in decoded.call_args_list for ids in call.args[0]] == [length] * 6


@pytest.mark.parametrize("beams", [1, 3])
def test_a_caption_by_instruction_is_the_answer_to_the_instruction(predictor, media, beams):
    found = predictor.caption(media[:2], beams=beams, max_length=6, instructed=True)
    for path, instruction, text in zip(media[:2], INSTRUCTIONS.values(), found, strict=True):  # a video, then an image
        vision, (ids, mask) = torch.stack(predictor.encode_media([path])), predictor.tokenizer.encode([instruction])
        with torch.no_grad():
            memory, memory_mask = predictor.model.instruction_memory(vision, ids, mask)
        best = beam_search(predictor.model, memory, predictor.start(1), predictor.special_tokens, beams, beams > 1, 6,
                           memory_mask=memory_mask)
        assert text == predictor.tokenizer.decode(best_texts(best, predictor.special_tokens))[0]
    answers = predictor.answer(media[:2], [*INSTRUCTIONS.values()], max_length=6)
    assert predictor.caption(media[:2], max_length=6, instructed=True) == answers


def test_an_answer_from_a_list_is_the_most_likely_one(predictor, media):
    answers = ["red", "two", "left", "no", "yes"]
    chosen = predictor.answer(media, [QUESTIONS[0]] * len(media), answer_list=answers)
    for path, text in zip(media, chosen, strict=True):
        likely = predictor.likelihood([path] * len(answers), answers, [QUESTIONS[0]] * len(answers))
        assert text == answers[int(np.argmax(likely))]
    assert len(set(chosen)) > 1


def test_an_explanation_is_the_mean_over_the_heads_of_the_last_cross_attention(predictor, media):
    written, words = predictor.trace(media[0], QUESTIONS[0])
    again, shown = predictor.explain(media[0], QUESTIONS[0])
    assert written == again and [word.text for word in words] == [word.word for word in shown]
    for word, one in zip(words, shown):
        assert list(word.maps)[-1] == one.module and len(word.maps[one.module]) > 1  # heads
        torch.testing.assert_close(one.map, sum(word.maps[one.module]) / len(word.maps[one.module]))


def test_without_media_the_answer_is_decoded_from_the_text_alone(predictor):
    questions = ["which digit is it there is a red seven", "what colour is it", "is it a red one moving left"]
    found = predictor.answer(None, questions, max_length=6)
    for question, text in zip(questions, found, strict=True):
        ids, mask = predictor.tokenizer.encode([question])
        with torch.no_grad():
            memory = predictor.model.encode_text(ids, mask)
            expected = greedy(predictor.model, memory, predictor.start(1), predictor.special_tokens, 6)
        assert text == predictor.tokenizer.decode(expected)[0]
    assert set(predictor.answer(None, questions, ["seven", "red"])) <= {"seven", "red"}


@pytest.mark.parametrize("asked", [True, False])
def test_the_likelihood_of_a_text_is_the_product_of_its_tokens_probabilities(predictor, media, asked):
    """Token by token, for each file alone, equals all files at once; the texts have different lengths."""
    model, tokenizer = predictor.model, predictor.tokenizer
    texts, questions = ["red", "two moving left", "", "a red one"], QUESTIONS if asked else None
    expected = []
    for path, text, question in zip(media, texts, QUESTIONS):
        memory, prompt = predictor.encode_media([path])[0][None], "" if asked else PROMPTS[["video", "image"][
            path.suffix == ".png" or path.name == "d.gif"]]
        memory_mask = None
        if asked:
            text_memory, mask = predictor.encode_text([question])
            memory, memory_mask = answer_memory(*model.fuse(memory, text_memory, mask), mask)
        ids, chance = predictor.start(1, prompt), 1.0
        for token in tokenizer.encode([text + "[SEP]"], special=False)[0][0].tolist():
            logits = model.decode(ids, torch.ones_like(ids, dtype=torch.bool), memory, memory_mask)
            chance *= logits[0, -1].softmax(dim=-1)[token].item()
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        expected.append(chance)
    found = predictor.likelihood(media[:4], texts, questions)
    assert found == pytest.approx(expected, rel=1e-3)
    assert len({f"{value:.2g}" for value in found}) == 4


def test_a_model_without_a_decoder_shows_the_attention_of_the_words_of_a_text(media):
    written, words = make_predictor("visual_entailment").explain(media[1], "which colour is it")
    assert written == "" and [word.word for word in words] == ["which", "colour", "is", "it"]
    assert {word.module.split(".")[0] for word in words} == {"fusion"}


def test_a_file_with_several_questions_is_read_and_encoded_once(predictor, media):
    with patch.object(predictor.model, "encode_vision", wraps=predictor.model.encode_vision) as encode:
        predictor.answer([media[0]] * 3, QUESTIONS[:3])
    assert [call.args[0].shape[0] for call in encode.call_args_list] == [1]


@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"answer_list": TEXTS}], ids=["greedy", "beams", "ranked"])
def test_keys_and_values_of_a_file_are_computed_once_for_all_its_questions(media, settings, monkeypatch):
    """In every cross-attention of fusion and decoder. Each question adds its own words only."""
    predictor, rows, asked = make_predictor(batch_size=8), Counter(), [*QUESTIONS, *QUESTIONS[:3]]
    for name, module in predictor.model.named_modules():
        if name.startswith(("fusion", "decoder")) and name.endswith("key_value"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: rows.update({name: inputs[0][..., 0].numel()}))
    answers = predictor.answer([media[0]] * 4 + [media[2]] * 3, asked, **settings)
    v = [predictor.encode_media([file])[0].shape[0] for file in (media[0], media[2])]
    l = [predictor.encode_text(part)[1].numel() for part in (asked[:4], asked[4:])]
    assert {name: count for name, count in rows.items() if name.startswith("decoder")} == {
        f"decoder.layers.{i}.cross_attention.key_value": sum(v) + sum(l) for i in range(2)}
    assert {count for name, count in rows.items() if name.startswith("fusion")} == {sum(v)}

    def and_joined(function):
        def compare(model, memory, *others, **named):
            """The plain form, one memory for each question, has the same ids, scores, and probabilities."""
            found = function(model, memory, *others, **named)
            rows.clear()
            joined = torch.cat([repeat_to(memory.vision, len(memory.text)), memory.text], dim=1)
            plain = function(model, joined, *others, **named)
            assert rows["decoder.layers.0.cross_attention.key_value"] == joined[..., 0].numel()
            if function is rank_answers:
                torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)
            if function is beam_search:
                scores = [[score for beams in one for score, _ in beams] for one in (found, plain)]
                assert scores[0] == pytest.approx(scores[1], abs=1e-6)
            return plain
        return compare

    for function in (greedy, beam_search, rank_answers):
        monkeypatch.setattr(mplug2.predictor, function.__name__, and_joined(function))
    assert predictor.answer([media[0]] * 4 + [media[2]] * 3, asked, **settings) == answers


def test_embeddings_are_unit_vectors_of_media_and_texts_and_similarity_their_cosines(predictor, media):
    texts = ["a red one", "two moving left"]
    mixed = predictor.embed([texts[0], media[0], media[1], texts[1], media[2]])
    assert mixed.shape == (5, 5)
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(mixed[[1, 2, 4]], predictor.embed(media[:3]))
    torch.testing.assert_close(mixed[[0, 3]], predictor.embed(texts))
    similarity = predictor.similarity([str(path) for path in media[:3]], texts)
    torch.testing.assert_close(similarity, mixed[[1, 2, 4]] @ mixed[[0, 3]].T)
    assert similarity.unique().numel() == 6


def test_matching_gives_each_pair_a_probability(predictor, media):
    vision = torch.stack(predictor.encode_media([media[1], media[3], media[4]]))
    texts = ["a red one", "two moving left", "three"]
    together = predictor.match_probability(vision, texts)
    assert together.shape == (3,) and ((together > 0) & (together < 1)).all()
    alone = torch.cat([predictor.match_probability(vision[i: i + 1], texts[i: i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    shared = predictor.match_probability(vision[:1], texts)  # one image, all texts
    torch.testing.assert_close(shared, predictor.match_probability(
        vision[:1].expand(3, -1, -1), texts), rtol=1e-4, atol=1e-5)


def test_text_is_cleaned_before_it_is_encoded(predictor, media):
    assert predictor.embed(["A RED, one!"]).equal(predictor.embed(["a red one"]))
    assert predictor.embed(["a " * 12 + "red"]).equal(predictor.embed(["a " * 12]))  # max_words


def test_inputs_that_do_not_fit_are_refused(predictor, media, tmp_path):
    path = str(media[0])
    for wrong in (
        lambda: predictor.caption(path), lambda: predictor.caption(media[0]), lambda: predictor.embed("a red one"),
        lambda: predictor.answer(path, ["which"]), lambda: predictor.answer([path], "which colour"),
        lambda: predictor.similarity(path, ["a"]), lambda: predictor.similarity([path], "a"),
    ):
        with pytest.raises(TypeError, match="found the single '.*': expected a list of paths or texts"):
            wrong()
    with pytest.raises(ValueError, match="2 media, but 1 questions: expected one question per medium"):
        predictor.answer(media[:2], ["which colour"])
    with pytest.raises(MediaError, match="nowhere.gif does not exist"):
        predictor.caption([tmp_path / "nowhere.gif"])
    with pytest.raises(MediaError, match="notes.txt: suffix '.txt' is not that of an image or a video"):
        predictor.caption([tmp_path / "notes.txt"])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(MediaError, match="broken.png cannot be decoded"):
        predictor.embed([media[0], tmp_path / "broken.png"])
    with pytest.raises(ValueError, match="text 0 of 1 is empty"):
        predictor.answer([media[0]], ["?"])
    with pytest.raises(ValueError, match="has [0-9]+ tokens.* more than max_length=24"):
        predictor.embed(["leftleft " * 12])  # each word is two tokens or more


def test_a_model_without_the_modules_says_so(media):
    captioner, retriever = make_predictor("video_caption"), make_predictor("image_retrieval")
    with pytest.raises(ValueError, match="a model for the task 'video_caption' has no text_encoder; build it for an"):
        captioner.answer(media[:1], ["which colour"])
    with pytest.raises(ValueError, match="'video_caption' has no contrastive_vision"):
        captioner.embed(media[:1])
    with pytest.raises(ValueError, match="'image_retrieval' has no decoder"):
        retriever.caption(media[:1])


def test_load_opens_a_checkpoint_as_any_smaller_model(predictor, media, tmp_path):
    save_model(tmp_path, predictor.model, predictor.tokenizer, predictor.preprocess)
    loaded = mplug2.load(tmp_path)
    assert loaded.caption(media) == predictor.caption(media)
    assert loaded.preprocess == predictor.preprocess
    captioner = mplug2.load(str(tmp_path), task="video_caption")
    assert captioner.caption(media) == predictor.caption(media)
    assert not hasattr(captioner.model, "fusion")
    assert not captioner.model.training


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Six videos in two galleries, and four images; some records have the same `positive_id`."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        write_media(folder / f"{i}.gif", i, 4)
    for i in range(4):
        write_media(folder / f"{i}.png", 50 + i, 1)
    clips = [
        {"video": f"{i}.gif", "captions": [f"A {COLORS[i % 3]} one, moving left", COLORS[i % 3]]} for i in range(6)
    ]
    images = [{"image": f"{i}.png", "captions": [f"a {COLORS[i % 3]} two"]} for i in range(4)]
    write_records(folder, "video_caption.test", clips)
    write_records(folder, "image_caption.test", images)
    write_records(folder, "video_retrieval.test", [
        {"video": f"{i}.gif", "captions": [TEXTS[i], "another"], "positive_id": str(i % 3 if i < 4 else i),
         "gallery": "long" if i < 4 else "short"} for i in range(6)
    ])
    write_records(folder, "image_retrieval.test", images)
    write_records(folder, "video_qa.test", [
        {"video": f"{i}.gif", "qa": [
            {"question": "Which colour is it?", "answers": [COLORS[i % 3]], "kind": "color"},
            {"question": "is it one", "answers": ["yes", "Yeah"], "kind": "yesno"},
            {"question": "which", "answers": ["one"]},
        ]} for i in range(6)
    ])
    return folder


class Oracle(Predictor):
    """Knows every color, and the caption of every second file, for which it also answers "yes"."""

    def caption(self, media: list[Medium], **settings) -> list[str]:
        paths = [medium.paths[0] for medium in media]
        right = {".gif": "a {} one moving left", ".png": "a {} two"}
        numbers = [int(path.stem) for path in paths]
        return ["nonsense" if number % 2 else right[path.suffix].format(COLORS[number % 3])
                for number, path in zip(numbers, paths)]

    def answer(self, media: list[Medium], questions: list[str], **settings) -> list[str]:
        numbers = [int(medium.paths[0].stem) for medium in media]
        return [COLORS[number % 3] if "colour" in question else "no" if number % 2 else "yes"
                for number, question in zip(numbers, questions)]


def test_captions_and_answers_are_scored_by_kind(root, predictor):
    oracle = Oracle(predictor.model, predictor.tokenizer, predictor.preprocess)
    result = evaluate(oracle, EvalSplit(root, "test"))
    metrics, predictions = result.metrics, result.predictions
    assert result.records == 6 + 6 + 6 + 4 + 4 and result.skipped == {}
    assert metrics["caption_exact"] == metrics["image_caption_exact"] == 0.5
    assert metrics["qa_color"] == 1.0 and metrics["qa_yesno"] == 0.5 and metrics["qa_accuracy"] == 0.5
    assert 0 < metrics["caption_bleu4"] < 1 and metrics["caption_cider"] > 0
    galleries = {f"{way}_{key}" for way in ("t2v", "v2t", "t2i", "i2t")
                 for key in ("r1", "r5", "r10", "median_rank", "r1_rerank")}
    scores = ("exact", "cider", "bleu4", "rouge_l")
    described = {f"{prefix}caption_{key}" for prefix in ("", "image_") for key in scores}
    assert set(metrics) == galleries | described | {"qa_color", "qa_yesno", "qa_accuracy"}
    assert predictions[0] == Prediction(
        "video_caption", (root / "0.gif",), "", "a red one moving left", ("a red one moving left", "red"),
        "video_caption.test.jsonl:1",
    )
    assert predictions[6] == Prediction("video_qa", (root / "0.gif",), "Which colour is it?", "red", ("red",),
                                        "video_qa.test.jsonl:1")
    assert [prediction.right for prediction in predictions[:2]] == [True, False]
    retrieved = [prediction for prediction in predictions if "retrieval" in prediction.task]
    assert len(predictions) - len(retrieved) == 6 + 18 + 4
    for medium, directions in (("video", ("t2v", "v2t")), ("image", ("t2i", "i2t"))):
        records = read_records(root, f"{medium}_retrieval", "test")
        found = [prediction for prediction in retrieved if prediction.task.startswith(medium)]
        for way in directions:  # a text finds the id of a record, and a file finds a text
            of_way = [prediction for prediction in found if (not prediction.media) == way.startswith("t")]
            assert sorted(p.id for p in of_way) == sorted(record.id for record in records)
            sizes = Counter(record.gallery for record in records)
            of_gallery = {record.id: record.gallery for record in records}
            shares = [(p.prediction in p.truth) / sizes[of_gallery[p.id]] / len(sizes) for p in of_way]
            assert sum(shares) == pytest.approx(metrics[f"{way}_r1_rerank"])
        for p in found:
            (record,) = [record for record in records if record.id == p.id]
            path, text = record.video or record.image, record.captions[0]
            if not p.media:
                assert p.question == text and p.id in p.truth
            else:
                assert p.media == (path,) and text in p.truth


def by_hand(scores: torch.Tensor, positive_ids: list[str], k: int) -> float:
    """Fraction of the rows with a right answer among their k best columns."""
    best = scores.argsort(dim=1, descending=True)[:, :k].tolist()
    return sum(positive_ids[i] in [positive_ids[j] for j in row] for i, row in enumerate(best)) / len(best)


def test_retrieval_is_the_mean_over_galleries_by_cosine_then_by_the_matching_head(root, predictor):
    metrics = evaluate(predictor, EvalSplit(root, "test")).metrics
    expected: dict[str, list[float]] = {}
    records = read_records(root, "video_retrieval", "test")
    for gallery in ("long", "short"):
        chosen = [record for record in records if record.gallery == gallery]
        texts, positive_ids = [record.captions[0] for record in chosen], [record.positive_id for record in chosen]
        cosines = predictor.similarity([record.video for record in chosen], texts)
        vision = torch.stack(predictor.encode_media([record.video for record in chosen]))
        match = torch.stack([predictor.match_probability(row.expand(len(texts), -1, -1), texts) for row in vision])
        for way, by_cosine, by_match in (("t2v", cosines.T, match.T), ("v2t", cosines, match)):
            for key, scores, k in (("r1", by_cosine, 1), ("r5", by_cosine, 5), ("r1_rerank", by_match, 1)):
                expected.setdefault(f"{way}_{key}", []).append(by_hand(scores, positive_ids, k))
    for key, values in expected.items():
        assert metrics[key] == pytest.approx(sum(values) / 2), key
    assert 0 < metrics["v2t_r1"] < 1  # some are right and some are wrong


def test_an_unreadable_file_changes_nothing_for_the_others_of_its_gallery(root, predictor, tmp_path):
    other, found = Predictor(predictor.model, predictor.tokenizer, predictor.preprocess,
                             Inference(3, skip_unreadable=True)), []
    for folder, numbers in ((tmp_path / "all", (9, 0, 1, 2, 3)), (tmp_path / "readable", (0, 1, 2, 3))):
        folder.mkdir()
        write_records(folder, "video_retrieval.test", [
            {"video": f"{i}.gif", "captions": [TEXTS[i % 6]], "positive_id": str(i), "id": str(i)} for i in numbers])
        for i in range(4):
            (folder / f"{i}.gif").symlink_to(root / f"{i}.gif")
        scores, lines = evaluate_retrieval(other, "video_retrieval", EvalSplit(folder, "test"), EvalOptions())
        found.append((values(scores), [(line.prediction, line.truth) for line in lines]))
    assert found[0] == found[1] and len(found[0][1]) == 8


def test_texts_are_matched_without_the_padding_of_their_batch(predictor):
    """Two batches of three; of the second only one text is wanted."""
    encoded = retrieval.encode_texts(predictor, TEXTS, {0, 1, 2, 4})
    lengths = predictor.tokenizer.lengths(TEXTS)
    assert {i: len(hidden) for i, hidden in encoded.items()} == {i: lengths[i] for i in (0, 1, 2, 4)}
    assert len({lengths[i] for i in (0, 1, 2)}) > 1
    alone, _ = predictor.encode_text([TEXTS[4]])
    torch.testing.assert_close(encoded[4].float(), alone[0], atol=2e-3, rtol=2e-3)


def test_galleries_are_compared_in_parts(monkeypatch):
    unit = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    ids = np.arange(5) % 3, np.arange(4) % 3
    whole = retrieval.rank_all(unit[:5], unit[5:], *ids, 2)
    monkeypatch.setattr(retrieval, "ROWS", 2)
    for found, expected in zip(retrieval.rank_all(unit[:5], unit[5:], *ids, 2), whole, strict=True):
        assert found.tolist() == expected.tolist()


def test_a_negative_that_ties_with_the_best_positive_counts_before_it():
    """Of three queries, one has a tie and one a positive that is likelier; one has no positive among its candidates."""
    owners, ids = [SimpleNamespace(id=str(number)) for number in range(3)], np.array(["x", "y", "z"])
    best, matched = np.array([[0, 1], [0, 1], [0, 1]]), [[0.5, 0.5], [0.25, 0.75], [0.5, 0.25]]
    scores, first = retrieval.score("t2v", np.array([1, 2, 3]), best, matched, ids, ids, owners)
    assert scores["t2v_r1_rerank"].value == pytest.approx(1 / 3) and first == [0, 1, 0]


def values(scores: dict) -> dict[str, float]:
    return {name: score.value for name, score in scores.items()}


def test_only_the_best_by_cosine_are_reranked(root, predictor, monkeypatch, tmp_path):
    """With one candidate nothing can change."""
    write_records(tmp_path, "video_retrieval.test", [
        {"video": f"{i}.gif", "captions": [TEXTS[i]], "positive_id": str(i % 3 if i < 4 else i)} for i in range(6)])
    for i in range(6):
        (tmp_path / f"{i}.gif").symlink_to(root / f"{i}.gif")
    data, records = EvalSplit(tmp_path, "test"), read_records(tmp_path, "video_retrieval", "test")
    one = values(evaluate_retrieval(predictor, "video_retrieval", data, EvalOptions(rerank=1))[0])
    for way in ("t2v", "v2t"):
        assert one[f"{way}_r1_rerank"] == one[f"{way}_r1"]
    # A head that prefers the lower cosine moves the best candidate to the second rank, not further.
    positive_ids = [record.positive_id for record in records]
    cosines = predictor.similarity([record.video for record in records], [record.captions[0] for record in records])
    monkeypatch.setattr(retrieval, "match_pairs", lambda predictor, tokens, texts, pairs: {
        (i, j): -cosines[i, j].item() / 4 for i, j in pairs})
    two = values(evaluate_retrieval(predictor, "video_retrieval", data, EvalOptions(rerank=2))[0])
    for way, scores in (("t2v", cosines.T), ("v2t", cosines)):
        second = scores.argsort(dim=1, descending=True)[:, 1].tolist()
        assert two[f"{way}_r1_rerank"] == sum(
            positive_ids[j] == positive_ids[i] for i, j in enumerate(second)) / len(positive_ids)


def test_a_model_is_evaluated_on_the_tasks_that_it_has_modules_and_records_for(root):
    keys = evaluate(make_predictor("video_caption"), EvalSplit(root, "test", limit=2)).metrics
    assert {key.removeprefix("image_").split("_")[0] for key in keys} == {"caption"}
    result = evaluate(make_predictor("video_qa"), EvalSplit(root, "test", limit=2))
    assert {"qa_color", "caption_exact"} <= set(result.metrics) and not any("r1" in key for key in result.metrics)
    assert len(result.predictions) == 2 + 6 + 2
    result = evaluate(make_predictor("image_retrieval"), EvalSplit(root, "test"))
    assert {key[:3] for key in result.metrics} == {"t2v", "v2t", "t2i", "i2t"}
    assert {prediction.task for prediction in result.predictions} == {"image_retrieval", "video_retrieval"}
    result = evaluate(make_predictor(), EvalSplit(root, "val"))
    assert result.metrics == {} and result.predictions == [] and result.records == 0


# ---- curves and exported models --------------------------------------------------------------------------------------


def test_curves_are_drawn(tmp_path, monkeypatch):
    """Of the metrics the strictest ones, over steps; those of images are dashed, in the color of those of videos."""
    lines = [{"step": i, "loss/vtc": 3.0 - i, "loss": 4.0 - i} for i in range(3)]
    lines += [{"step": 2, "val/qa_order": 0.5}, {"step": 5, "val/t2i_r1": 0.25, "val/t2i_r10": 0.75, "val/t2v_r1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, save = {}, Figure.savefig

    def noted(figure, *given, **more):
        drawn.update((line.get_label(), line) for axes in figure.axes for line in axes.lines)
        save(figure, *given, **more)

    monkeypatch.setattr(Figure, "savefig", noted)
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    points = {name: list(zip(*line.get_data())) for name, line in drawn.items()}
    assert points == {"vtc": [(0, 3.0), (1, 2.0), (2, 1.0)], "qa_order": [(2, 0.5)], "t2i_r1": [(5, 0.25)],
                      "t2v_r1": [(5, 0.5)]}
    assert drawn["t2i_r1"].get_linestyle() == "--" and drawn["t2v_r1"].get_linestyle() == "-"
    assert drawn["t2i_r1"].get_color() == drawn["t2v_r1"].get_color() != drawn["qa_order"].get_color()
    with Image.open(tmp_path / "curves.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 200


def test_an_exported_model_is_half_as_large_and_gives_the_same_outputs(tmp_path):
    predictor = make_predictor()
    save_model(tmp_path / "whole", predictor.model, predictor.tokenizer, predictor.preprocess)
    predictor.save(tmp_path / "half")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert 0.5 <= sizes[1] / sizes[0] < 0.6
    again = mplug2.load(tmp_path / "half")
    assert {parameter.dtype for parameter in again.model.parameters()} == {torch.float32}
    clip = write_media(tmp_path / "clip.gif", 0, 4)
    torch.testing.assert_close(again.similarity([clip], TEXTS), predictor.similarity([clip], TEXTS), atol=5e-3, rtol=0)
    with pytest.raises(FileExistsError, match="half is not empty: choose a new folder"):
        predictor.save(tmp_path / "half")


@pytest.mark.slow
def test_the_shipped_checkpoint_captions_the_tiny_world():
    """Most captions of the first test clips are among the true ones."""
    root = tiny_data.ensure()
    records = read_records(root, "video_caption", "test")[:40]
    written = mplug2.load(Path(tiny_data.__file__).parent / "pretrained").caption([record.video for record in records])
    right = sum(text in map(clean, record.captions) for text, record in zip(written, records))
    assert right >= 30, f"{right} of 40"


# ---- classes, boxes and chance ---------------------------------------------------------------------------------------


def test_classes_and_boxes_come_in_the_order_of_the_inputs_whatever_the_batches(media):
    tasks = "text_classification,image_classification,visual_entailment,image_pair_reasoning,grounding,pretrain"
    predictor = make_predictor(tasks, classes=dict.fromkeys(tasks.split(",")[:4], ("a", "b", "c")))
    texts = [f"{color} {text}" for text, color in zip(TEXTS * 2, COLORS * 3)][: len(media)]
    stills = [path for path in media if path.suffix in (".png", ".jpg")]
    pairs = list(zip(stills * 2, (stills[1:] + stills) * 2))[: len(texts)]
    for task, shown, said in (
        ("text_classification", None, texts), ("image_classification", media, None),
        ("visual_entailment", media, texts), ("image_pair_reasoning", pairs, texts[: len(pairs)]),
        ("text_classification", None, list(zip(texts, texts[1:]))),
    ):
        found = predictor.classify(task, shown, said)
        one_by_one = [predictor.classify(task, shown and [shown[i]], said and [said[i]])[0] for i in range(len(found))]
        assert found == one_by_one and set(found) <= {"a", "b", "c"}
        assert len(found) == len(shown or said)
    boxes = predictor.predict_boxes(stills * 2, texts[: 2 * len(stills)])
    for path, text, box in zip(stills * 2, texts[: 2 * len(stills)], boxes, strict=True):
        torch.testing.assert_close(predictor.predict_boxes([path], [text])[0], box)
    with pytest.raises(ValueError, match="2 media, but 1 texts: expected one text per medium"):
        predictor.classify("visual_entailment", media[:2], texts[:1])
    with pytest.raises(ValueError, match="no classifier for 'video_classification'"):
        predictor.classify("video_classification", media)


def test_chance_is_the_level_of_a_baseline_that_ignores_its_input(tmp_path):
    write_media(tmp_path / "0.png", 0, 1)

    def write(task: str, *records: dict) -> None:
        field = "text" if task.startswith("text") else "image"
        lines = (json.dumps({field: "0.png", **record}) for record in records)
        (tmp_path / f"{task}.test.jsonl").write_text("\n".join(lines))

    write("text_classification", *({"label": label} for label in "aab"))
    write("image_classification", *({"label": label} for label in "xyzzz"))
    write("image_qa", {"qa": [{"question": "a", "answers": ["Red", "blue"], "kind": "k"},
                              {"question": "b", "answers": ["blue!"], "kind": "k"},
                              {"question": "c", "answers": ["one"]}, {"question": "d", "answers": ["two"]}]})
    write("image_caption", {"captions": ["a", "b"]}, {"captions": ["B!"]}, {"captions": ["c"]}, {"captions": ["d"]},
          {"captions": ["e", "f"]})
    write("image_retrieval", *({"captions": ["a"], "positive_id": positive_id, "gallery": gallery}
                               for gallery, positive_id in ("1x", "1x", "1y", "1z", "2x", "2y")))
    write("grounding", *({"text": "a", "box": [0.25, 0.5, 0.5, 1.0]} for _ in range(2)),
          {"text": "a", "box": [0.25, 0.5, 0.5, 1.0]})
    found = chance_level(EvalSplit(tmp_path, "test"))
    expected = {
        "text_classification_accuracy": 2 / 3, "image_classification_accuracy": 3 / 5,
        "image_classification_zero_shot": 3 / 5, "image_qa_k": 1.0, "image_qa_accuracy": 3 / 4,
        "image_caption_exact": 2 / 5,
        "t2i_r1": (2 * 2 / 4 + 2 * 1 / 4 + 2 * 1 / 2) / 6, "t2i_r5": 1.0,
        "grounding_accuracy": 1.0, "grounding_iou": 1.0,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    assert chance_level(EvalSplit(tmp_path, "test", limit=1))["text_classification_accuracy"] == 1.0
    assert chance_level(EvalSplit(tmp_path, "val")) == {}
