"""The losses equal their formulas; positives, prompts and padding do not count where they must not."""

import dataclasses
import math
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from batches import make_batch, make_model, make_texts, similarity_for, task_batch, unit
from helpers import QUICK_TASKS, configs, noise, random_ids, randomized, seeds, slow_except, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.boxes import generalized_iou
from mplug2.data.batches import label_positions
from mplug2.generation import SpecialTokens, greedy
from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.objectives.ema_teacher import EMATeacher
from mplug2.objectives.losses import (
    TEMPERATURE_RANGE,
    box_losses,
    contrastive_loss,
    decoder_logits,
    hard_negatives,
    label_loss,
    language_loss,
    location_loss,
    masked_loss,
    matching_loss,
    scaled_similarity,
)
from mplug2.objectives.objectives import Objectives, classification_input, encode_visual
from mplug2.objectives.packing import pad_and_concat, split_padded
from mplug2.tasks import TASKS

model = make_model()


# ---- contrastive -----------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.floats(0.01, 0.5), seeds)
def test_contrastive_loss_is_the_formula_with_a_target_that_positives_share(positive_id, temperature, seed):
    rng = torch.Generator().manual_seed(seed)
    b = len(positive_id)
    vision, text = unit(rng, b), unit(rng, b)
    expected = 0.0
    for rows, columns in ((vision, text), (text, vision)):
        for i in range(b):
            scores = [math.exp(float(rows[i] @ columns[j]) / temperature) for j in range(b)]
            positives = [j for j in range(b) if positive_id[j] == positive_id[i]]
            expected -= sum(math.log(scores[j] / sum(scores)) for j in positives) / len(positives) / (2 * b)
    found = contrastive_loss(vision, text, torch.tensor(temperature, dtype=torch.float64), torch.tensor(positive_id))
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_contrastive_gradient_is_that_of_both_sides_and_of_the_temperature():
    """Also through the columns that a row is compared with."""
    rng = torch.Generator().manual_seed(0)
    arguments = *(unit(rng, 4).requires_grad_() for _ in range(2)), torch.tensor(0.2).double().requires_grad_()
    positive_id = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda *given: contrastive_loss(*given, positive_id), arguments)


@settings(max_examples=10, deadline=None)
@given(seeds)
def test_the_order_of_positives_makes_no_difference(seed):
    rng = torch.Generator().manual_seed(seed)
    vision, text, temperature = unit(rng, 5), unit(rng, 5), torch.tensor(0.1).double()
    positive_id = torch.tensor([7, 1, 7, 2, 7])
    swapped = text[[4, 1, 0, 3, 2]]
    losses = [contrastive_loss(vision, one, temperature, positive_id) for one in (text, swapped)]
    torch.testing.assert_close(*losses)
    different = [contrastive_loss(vision, one, temperature, torch.arange(5)) for one in (text, swapped)]
    assert abs(different[0] - different[1]) > 1e-6


@pytest.mark.parametrize("start, edge", [(1e-6, TEMPERATURE_RANGE[0]), (-1.0, TEMPERATURE_RANGE[0]), (3.0, 0.5)])
def test_the_temperature_stays_in_its_range_and_its_gradient_is_never_stuck_at_zero(start, edge):
    assert TEMPERATURE_RANGE == (0.001, 0.5)
    trained, batch = make_model("image_retrieval"), task_batch("image_retrieval")
    trained.temperature.data.fill_(start)
    # Similarities that differ by so little that the softmax is not one-hot at the lowest temperature.
    for projection in (trained.contrastive_vision, trained.contrastive_text):
        projection.weight.data.mul_(1e-3)
        projection.bias.data.fill_(1.0)
    Objectives(trained)(batch)["vtc"].backward()
    assert trained.temperature.item() == pytest.approx(edge)
    assert trained.temperature.grad != 0
    trained.temperature.data.fill_(start)  # as after a step of the optimizer: a checkpoint may follow
    Objectives(trained).after_step(skipped=False)
    assert trained.temperature.item() == pytest.approx(edge) and trained.temperature.requires_grad


def test_similarities_are_float32_under_autocast():
    rng = torch.Generator().manual_seed(0)
    rows, columns = unit(rng, 6).float(), unit(rng, 5).float()
    expected = rows.double() @ columns.double().T / 0.0227
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_similarity(rows, columns, torch.tensor(0.0227))
        loss = contrastive_loss(rows[:5], columns, torch.tensor(0.0227), torch.arange(5))
    assert found.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss, contrastive_loss(rows[:5], columns, torch.tensor(0.0227), torch.arange(5)))


def test_contrastive_loss_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"expected shape \(b e\) with b=3, e=4, found \(2, 4\)"):
        contrastive_loss(torch.ones(3, 4), torch.ones(2, 4), torch.tensor(0.1), torch.arange(3))
    with pytest.raises(ValueError, match=r"expected shape \(b\) with b=3, found \(2,\)"):
        contrastive_loss(torch.ones(3, 4), torch.ones(3, 4), torch.tensor(0.1), torch.arange(2))


# ---- matching --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=8), seeds)
def test_a_hard_negative_is_never_a_positive(positive_id, seed):
    positive_id, rng = torch.tensor(positive_id), torch.Generator().manual_seed(seed)
    # Similarities so far apart that the softmax is 0 except for one: the others must still be possible.
    chosen, exists = hard_negatives(1000 * torch.randn(len(positive_id), len(positive_id), generator=rng), positive_id)
    for i in range(len(positive_id)):
        assert exists[i] == any(positive_id != positive_id[i])
        assert not exists[i] or positive_id[chosen[i]] != positive_id[i]


def test_hard_negatives_are_drawn_with_the_softmax_of_the_similarity():
    torch.manual_seed(0)
    positive_id = torch.tensor([0, 1, 2, 3, 1])
    row = torch.tensor([5.0, 0.3, 1.0, -1.0, 2.0])
    n = 4000
    draws = torch.cat([hard_negatives(row.repeat(5, 1), positive_id)[0][1:2] for _ in range(n)])  # row 1: not 1, not 4
    weights = row.exp() * torch.tensor([1, 0, 1, 1, 0])
    expected = weights / weights.sum()
    found = draws.bincount(minlength=5) / n
    assert found[1] == found[4] == 0
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() <= 4 * deviation + 1e-4).all(), (found, expected)


def test_negatives_without_a_chance_are_drawn_alike():
    """Where a positive has all of the probability, the softmax of each negative is zero in float32."""
    torch.manual_seed(0)
    similarity = torch.tensor([1e4, 0.0, 0.0, 0.0]).expand(4, 4)
    chosen = torch.cat([hard_negatives(similarity, torch.arange(4))[0][:1] for _ in range(300)])
    assert chosen.bincount(minlength=4)[0] == 0 and chosen.bincount(minlength=4)[1:].min() > 70


def vtm(vision: torch.Tensor, text: torch.Tensor, mask: torch.Tensor, similarity: torch.Tensor,
        positive_id: torch.Tensor) -> torch.Tensor:
    """VTM of `Objectives` for V' `b v d`, encoded captions `b l d` and their similarity."""
    with (patch("mplug2.objectives.objectives.encode_visual", return_value=vision),
          patch("mplug2.objectives.objectives.scaled_similarity", return_value=similarity),
          patch.object(Objectives, "encode_texts", return_value={"caption": text})):
        objectives = Objectives(model, skip=frozenset({"vtc"}))
        return objectives({"caption_mask": mask, "positive_id": positive_id})["vtm"]


def test_matching_loss_is_the_cross_entropy_of_a_match_and_of_negatives_that_exist():
    fused = [noise(3, 4, 16, seed=seed) for seed in range(3)]
    has_text, has_vision = torch.tensor([True, False, True]), torch.tensor([False, True, False])
    probabilities = [model.itm_logits(one).softmax(dim=1) for one in fused]
    losses = [*probabilities[0][:, 1], *probabilities[1][[0, 2], 0], probabilities[2][1, 0]]
    torch.testing.assert_close(matching_loss(model, *fused, has_text, has_vision), -torch.stack(losses).log().mean())
    with pytest.raises(ValueError, match=r"expected shape \(b\) with b=3, found \(2,\)"):
        matching_loss(model, *fused, has_text, has_vision[1:])


def test_the_matching_gradient_reaches_each_pair_and_its_negatives():
    vision, text = (noise(2, size, 16, seed=size).requires_grad_() for size in (3, 4))
    mask, positive_id = torch.ones(2, 4, dtype=torch.bool), torch.arange(2)

    def loss(vision, text):
        return vtm(vision, text, mask, similarity_for([1, 0]), positive_id)

    assert torch.autograd.gradcheck(loss, (vision, text), fast_mode=True)


@pytest.mark.parametrize("positive_id", [[0, 1, 2], [0, 1, 1], [5, 5, 5]])
def test_matching_loss_is_over_each_pair_and_its_two_hard_negatives(positive_id):
    torch.manual_seed(0)
    vision, text = noise(3, 5, 16), noise(3, 4, 16, seed=1)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    wanted_text, wanted_vision = [2, 0, 0], [1, 0, 0]  # with another positive_id in the first two cases

    def probabilities(i: int, j: int) -> torch.Tensor:
        """(no match, match) for vision i and text j, alone and without padding."""
        length = int(mask[j].sum())
        fused = model.fuse(vision[i: i + 1], text[j: j + 1, :length], mask[j: j + 1, :length])[1]
        return model.itm_logits(fused)[0].softmax(0)

    losses = [-probabilities(i, i)[1].log() for i in range(3)]
    if len(set(positive_id)) > 1:  # otherwise only the pairs count
        losses += [-probabilities(i, wanted_text[i])[0].log() for i in range(3)]
        losses += [-probabilities(wanted_vision[j], j)[0].log() for j in range(3)]
    # Rows draw texts and columns draw visions: one similarity matrix cannot select all of these.
    drawn = [hard_negatives(similarity_for(wanted), torch.tensor(positive_id))
             for wanted in (wanted_text, wanted_vision)]
    with patch("mplug2.objectives.objectives.hard_negatives", side_effect=drawn):
        found = vtm(vision, text, mask, torch.zeros(3, 3).double(), torch.tensor(positive_id))
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_rows_of_the_similarity_draw_texts_and_columns_draw_visions():
    similarity, positive_id = noise(4, 4), torch.arange(4)
    vision, text, mask = noise(4, 5, 16), noise(4, 3, 16), torch.ones(4, 3) > 0
    with patch("mplug2.objectives.objectives.hard_negatives", wraps=hard_negatives) as drawn:
        vtm(vision, text, mask, similarity, positive_id)
    by_text, by_vision = (call.args[0] for call in drawn.call_args_list)
    assert by_text.equal(similarity) and by_vision.equal(similarity.T)


def test_nan_inside_the_encoder_gives_nan_losses_and_no_error():
    """The training loop skips such a step and names its samples; an error would end the run."""
    broken, batch = make_model(), make_batch("image")
    broken.vision_encoder.blocks[0].mlp_down.bias.data[0] = float("nan")
    losses = Objectives(broken)(batch)
    assert losses["vtc"].isnan() and losses["vtm"].isnan()
    sum(losses.values()).backward()


# ---- masked ----------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seeds, st.floats(0, 1))
def test_masked_loss_counts_masked_positions_only(seed, share):
    rng = torch.Generator().manual_seed(seed)
    hidden = noise(3, 5, 16, seed=seed).requires_grad_()
    ids = random_ids(3, 5, seed)
    masked = torch.rand(3, 5, generator=rng) < share
    positions = masked.flatten().nonzero()[:, 0]
    loss = masked_loss(model, hidden, ids, positions)
    log_probs = model.mlm_logits(hidden).log_softmax(-1)
    terms = [-log_probs[i, j, ids[i, j]] for i, j in masked.nonzero().tolist()]
    torch.testing.assert_close(loss, torch.stack(terms).mean() if terms else torch.zeros_like(loss))
    loss.backward()  # must work without any masked position too
    assert ((hidden.grad != 0).any(-1) == masked).all()
    other = torch.where(masked, ids, (ids + 1) % 29)
    torch.testing.assert_close(masked_loss(model, hidden, other, positions), loss)


# ---- language --------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(4, 8), min_size=1, max_size=4), st.integers(1, 3), seeds)
def test_language_loss_is_the_mean_over_the_tokens_after_the_prompt(lengths, prompt_length, seed):
    rng = torch.Generator().manual_seed(seed)
    ids, mask = make_texts(lengths, rng)
    memory = noise(len(lengths), 6, 16, seed=seed)
    memory_mask = torch.arange(6) < torch.randint(1, 7, (len(lengths), 1), generator=rng)
    terms = []
    for i, length in enumerate(lengths):  # alone, without padding, token by token
        real = memory[i: i + 1, : int(memory_mask[i].sum())]
        for position in range(prompt_length, length):
            past = ids[i: i + 1, :position]
            logits = model.decode(past, torch.ones_like(past) > 0, real)[0, -1]
            terms.append(-logits.log_softmax(0)[ids[i, position]])
    found = language_loss(model, ids, mask, memory, label_positions(mask, prompt_length), memory_mask)
    torch.testing.assert_close(found, torch.stack(terms).mean())
    assert len(terms) == sum(lengths) - prompt_length * len(lengths)


# ---- all losses of a batch -------------------------------------------------------------------------------------------

LOSSES = {"caption": {"caption"}, "qa": {"answer"}, "retrieval": {"vtc", "vtm"}, "grounding": {"l1", "giou"},
          "pretrain": {"vtc", "vtm", "mlm", "caption", "answer"}}


@pytest.mark.parametrize("task", slow_except(QUICK_TASKS, TASKS))
@settings(max_examples=4)
@given(configs(temporal_stride=0, image_size=8, patch_size=4), st.booleans(), seeds)
def test_the_losses_of_a_task_reach_all_of_its_parameters(task, config, on_images, seed):
    """For all sizes and forms. Every weight is random, so no zero start hides a parameter."""
    config = dataclasses.replace(config, temporal_on_images=on_images)
    trained = randomized(MPLUG2(config, task, {task: ("a", "b", "c")}), seed)
    if hasattr(trained, "temperature"):
        trained.temperature.data.fill_(0.07)
    torch.manual_seed(seed)
    losses = Objectives(trained)(task_batch(task, seed))
    assert set(losses) == LOSSES.get(task.partition("_")[2] or task, LOSSES.get(task, {"label"}))
    assert all(loss.shape == () and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    unreached = [name for name, parameter in trained.named_parameters()
                 if parameter.grad is None or parameter.grad.abs().max() == 0]
    assert unreached == []


def test_text_alone_trains_masked_language_modeling():
    batch = make_batch("text")
    losses = Objectives(model)(batch)
    assert set(losses) == {"mlm"}
    hidden = model.encode_text(batch["masked_ids"], batch["caption_mask"])
    torch.testing.assert_close(losses["mlm"], masked_loss(
        model, hidden, batch["caption_ids"], batch["masked_positions"]))


@pytest.mark.parametrize("stride", [0, 1])
@pytest.mark.parametrize("mlm", ["fused", "text", "both"])
def test_masked_captions_are_predicted_from_fused_text_or_text_or_both(mlm, stride):
    model, batch = randomized(MPLUG2(small(fusion_stride=stride))), make_batch("video", b=2, r=3)
    vision, mask = model.encode_vision(batch["pixels"]), batch["caption_mask"]
    text = model.encode_text(batch["masked_ids"], mask)
    from_text, from_fused = (masked_loss(model, hidden, batch["caption_ids"], batch["masked_positions"])
                             for hidden in (text, model.fuse(vision, text, mask)[1]))
    assert abs(from_text - from_fused) > 1e-3
    expected = {"fused": from_fused, "text": from_text, "both": (from_fused + from_text) / 2}[mlm]
    losses = Objectives(model, mlm=mlm)(batch)
    torch.testing.assert_close(losses["mlm"], expected)
    torch.testing.assert_close(losses["answer"], Objectives(model)(batch)["answer"])
    torch.testing.assert_close(Objectives(model, mlm=mlm)(make_batch("text"))["mlm"],
                               Objectives(model)(make_batch("text"))["mlm"])


def text_answers(seed: int = 0) -> dict:
    """A batch of texts and their answers, without pixels."""
    batch = make_batch("image", r=1, seed=seed)
    return {name: value for name, value in batch.items() if name.startswith(("question", "answer", "positive_id"))}


def test_answers_about_text_alone_are_read_from_the_encoded_text():
    batch, teacher = text_answers(), EMATeacher(randomized(MPLUG2(small(), "pretrain"), 1), alpha=0.5).double()
    memory, mask = model.encode_text(batch["question_ids"], batch["question_mask"]), batch["question_mask"]
    arguments = batch["answer_ids"], batch["answer_mask"], memory, batch["answer_positions"], mask
    losses = Objectives(model)(batch)
    assert set(losses) == {"answer"}
    torch.testing.assert_close(losses["answer"], language_loss(model, *arguments))
    teacher.steps += 1
    theirs = decoder_logits(teacher.teacher, *arguments[:2], teacher.teacher.encode_text(
        batch["question_ids"], mask), *arguments[3:])
    torch.testing.assert_close(Objectives(model, teacher)(batch)["answer"],
                               language_loss(model, *arguments, theirs, 0.5))


def test_a_text_is_classified_by_the_word_that_the_decoder_writes():
    """In a hundred steps a model learns to answer a text with its last word, which greedy decoding then writes."""
    torch.manual_seed(0)
    trained = MPLUG2(small(vocab_size=12, dropout=0.0), "text_classification,image_caption").train()
    optimizer, objectives = torch.optim.Adam(trained.parameters(), lr=3e-3), Objectives(trained)

    def texts(b: int) -> dict:
        words = torch.randint(5, 8, (b, 2))
        ends = torch.tensor([[2]]).expand(b, 1), torch.tensor([[3]]).expand(b, 1)
        question, answer = torch.cat([ends[0], words, ends[1]], 1), torch.cat([ends[0], words[:, 1:], ends[1]], 1)
        batch = {"positive_id": torch.arange(b), "question_ids": question, "answer_ids": answer}
        batch |= {"question_mask": question > -1, "answer_mask": answer > -1}
        return batch | {"answer_positions": label_positions(batch["answer_mask"])}

    for _ in range(100):
        optimizer.zero_grad()
        objectives(texts(32))["answer"].backward()
        optimizer.step()
    test, special = texts(64), SpecialTokens(cls=2, sep=3, pad=0)
    memory, mask = trained.eval().instruction_memory(None, test["question_ids"], test["question_mask"])
    written = greedy(trained, memory, test["answer_ids"][:, :1], special, 3, mask)
    right = [row == answer[1:2].tolist() for row, answer in zip(written, test["answer_ids"])]
    assert sum(right) / len(right) > 0.9  # chance: 1 in 3 words


@pytest.mark.parametrize("skip", [{"vtc"}, {"vtm"}, {"vtc", "vtm"}, {"mlm"}, {"caption"}, {"answer"}])
def test_a_loss_that_is_skipped_is_not_computed_and_the_others_stay(skip):
    batch, functions = make_batch("image"), {"vtc": "contrastive_loss", "vtm": "matching_loss", "mlm": "masked_loss"}
    torch.manual_seed(0)
    expected = Objectives(model)(batch)
    torch.manual_seed(0)
    with ExitStack() as stack:
        for name in skip & set(functions):
            stack.enter_context(patch(f"mplug2.objectives.objectives.{functions[name]}", side_effect=AssertionError))
        with patch.object(model, "encode_text", wraps=model.encode_text) as encoded:
            found = Objectives(model, skip=frozenset(skip))(batch)
    assert set(found) == set(expected) - skip
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    # 3 captions, 3 masked captions, 6 questions: only the texts that are needed are encoded.
    texts = 3 * (not {"vtc", "vtm"} <= skip) + 3 * ("mlm" not in skip) + 6 * ("answer" not in skip)
    assert len(encoded.call_args.args[0]) == texts


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=3), seeds)
def test_split_padded_is_the_inverse_of_pad_and_concat(b, shapes, seed):
    texts = [noise(b * r, l, 2, seed=seed + i) for i, (r, l) in enumerate(shapes)]
    joined = pad_and_concat(texts, b)
    assert joined.shape == (b * sum(r for r, _ in shapes), max(l for _, l in shapes), 2)
    for text, part in zip(texts, split_padded(joined, [r for r, _ in shapes], b)):
        torch.testing.assert_close(part[:, : text.shape[1]], text)
        assert (part[:, text.shape[1]:] == 0).all()
    last_sample = joined.unflatten(0, (b, -1))[-1]  # the texts about one sample are consecutive
    torch.testing.assert_close(last_sample[0, : shapes[0][1]], texts[0][-shapes[0][0]])


@pytest.mark.parametrize("stride", [0, 1])
def test_captions_masked_words_and_answers_are_read_from_their_memory(stride):
    """Captions from V' alone, masked words from the fused text, answers from [V', fused question], r per video.

    With connected-attention layers, each question has its own V'.
    """
    model = randomized(MPLUG2(small(fusion_layers=2, fusion_stride=stride)))
    batch = make_batch("video", b=2, r=3)
    losses = Objectives(model)(batch)
    vision = model.encode_vision(batch["pixels"])
    prompted, mask = batch["prompted_ids"], batch["prompted_mask"]
    caption = language_loss(model, prompted, mask, vision, label_positions(mask, 3))
    torch.testing.assert_close(losses["caption"], caption)

    text = model.encode_text(batch["masked_ids"], batch["caption_mask"])
    fused = model.fuse(vision, text, batch["caption_mask"])[1]
    torch.testing.assert_close(losses["mlm"], masked_loss(
        model, fused, batch["caption_ids"], batch["masked_positions"]))

    total, count = 0.0, 0
    for i in range(6):  # questions 0, 1, 2 are about video 0
        keep = batch["question_mask"][i]
        question = batch["question_ids"][i: i + 1, keep]
        seen, fused = model.fuse(vision[i // 3][None], model.encode_text(question, question > -1), question > -1)
        answer = batch["answer_ids"][i: i + 1, batch["answer_mask"][i]]
        tokens = answer.shape[1] - 1
        memory = torch.cat([seen, fused], dim=1)
        total += tokens * language_loss(model, answer, answer > -1, memory, torch.arange(tokens))
        count += tokens
    torch.testing.assert_close(losses["answer"], total / count)


def test_keys_and_values_of_vision_are_computed_once_for_all_texts_about_it():
    """Per layer. Fusion reads V' a second time for the captions with another vision, and the decoder for captions."""
    batch, rows = make_batch("video", b=2, r=3), {}
    b, v, l = 2, model.encode_vision(batch["pixels"]).shape[1], batch["question_ids"].shape[1]
    with ExitStack() as stack:
        for stage in (model.fusion, model.decoder):
            handle = stage.layers[-1].cross_attention.key_value.register_forward_pre_hook(
                lambda _, inputs, stage=stage: rows.setdefault(stage, []).append(inputs[0][..., 0].numel()))
            stack.callback(handle.remove)
        Objectives(model)(batch)
    assert rows == {model.fusion: [b * v, b * v], model.decoder: [b * v, b * v, b * 3 * l]}


def test_hard_negatives_come_from_the_contrastive_similarity_without_gradients():
    batch = make_batch("image", b=4)
    with patch("mplug2.objectives.objectives.hard_negatives", wraps=hard_negatives) as drawn:
        Objectives(model)(batch)
    similarity = drawn.call_args_list[0].args[0]
    vision = model.project_vision(model.encode_vision(batch["pixels"]))
    text = model.project_text(model.encode_text(batch["caption_ids"], batch["caption_mask"]))
    torch.testing.assert_close(similarity, (vision @ text.T / model.temperature).detach())
    assert not similarity.requires_grad


# ---- labels and boxes ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), seeds)
def test_label_loss_is_cross_entropy_of_classes_and_squared_error_of_numbers(labels, seed):
    output = noise(len(labels), 4, seed=seed)
    expected = [-math.log(row[label].exp() / row.exp().sum()) for row, label in zip(output, labels)]
    assert label_loss(output, torch.tensor(labels)).item() == pytest.approx(sum(expected) / len(labels))
    squares = [(row[0] - label).item() ** 2 for row, label in zip(output, labels)]
    assert label_loss(output[:, :1], torch.tensor(labels).double()).item() == pytest.approx(sum(squares) / len(labels))


def test_box_losses_are_the_summed_distance_and_one_minus_giou():
    boxes, target = noise(4, 4).sigmoid(), noise(4, 4, seed=1).sigmoid()
    losses = box_losses(boxes, target)
    expected = sum(abs(a - b) for one, other in zip(boxes.tolist(), target.tolist()) for a, b in zip(one, other)) / 4
    assert losses["l1"].item() == pytest.approx(expected)
    torch.testing.assert_close(losses["giou"], 1 - generalized_iou(boxes, target)[1].mean())


@pytest.mark.parametrize("b", [1, 3])
def test_the_location_loss_is_the_mean_log_probability_of_the_four_borders(b):
    config = small(boxes="tokens", image_size=8, patch_size=4)
    model = randomized(MPLUG2(config, "grounding"))
    vision, fused = noise(b, 1 + config.patches, config.width), noise(b, 5, config.width, seed=1)
    mask, box = torch.ones(b, 5, dtype=torch.bool), torch.tensor([[0.5, 0.25, 0.5, 0.5]] * b).double()
    memory, total = answer_memory(vision, fused, mask), 0.0
    for place, token in enumerate([2, 0, 6, 4]):  # left, top, right, bottom of 8 pixels
        before = torch.tensor([[2, 0, 6, 4][:place]] * b, dtype=torch.long)
        log_probs = model.box_head.logits(model.decoder, before, *memory)[:, -1].log_softmax(dim=-1)
        total = total - log_probs[:, token].sum().item()
    assert location_loss(model, fused, vision, mask, box).item() == pytest.approx(total / (4 * b))


def test_grounding_has_the_loss_of_its_boxes():
    for boxes, names in (("soft_argmax", {"l1", "giou"}), ("tokens", {"location"})):
        model = randomized(MPLUG2(small(boxes=boxes, image_size=8, patch_size=4), "grounding"))
        losses = Objectives(model)(task_batch("grounding"))
        assert set(losses) == names and all(loss.requires_grad for loss in losses.values())


def test_boxes_far_from_each_other_are_pulled_together():
    box = torch.tensor([[0.1, 0.1, 0.1, 0.1]]).double().requires_grad_()
    box_losses(box, torch.tensor([[0.8, 0.9, 0.1, 0.1]]).double())["giou"].backward()
    assert (box.grad[0, :2] < 0).all()  # against the gradient: to the right and down


def test_labels_are_read_from_text_or_vision_or_fused_text():
    tasks = "text_classification,video_classification,visual_entailment,image_pair_reasoning"
    trained = randomized(MPLUG2(small(), tasks, dict.fromkeys(tasks.split(","), ("a", "b", "c"))))
    for task in tasks.split(","):
        batch = task_batch(task)
        vision = encode_visual(trained, batch)
        if task == "image_pair_reasoning":
            one, two = (trained.encode_vision(batch["pixels"][:, i]) for i in (0, 1))
            torch.testing.assert_close(vision, trained.concat_pair(torch.stack([one, two], dim=1)))
        expected = vision
        if task != "video_classification":
            expected = trained.encode_text(batch["text_ids"], batch["text_mask"])
            if task != "text_classification":
                expected = trained.fuse(vision, expected, batch["text_mask"])[1]
        torch.testing.assert_close(classification_input(trained, batch, vision)[0], expected)
        loss = Objectives(trained)(batch)["label"]
        torch.testing.assert_close(loss, label_loss(trained.classify(expected, task), batch["label"]))
