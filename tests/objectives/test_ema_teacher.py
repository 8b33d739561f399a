"""The EMA teacher: it follows the model, and its soft targets, their weight and its queue equal their formulas."""

import pytest
import torch
from batches import make_batch, task_batch, unit
from helpers import QUICK_TASKS, noise, randomized, seeds, slow_except, small
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.objectives.build import LossSettings
from mplug2.objectives.ema_teacher import EMATeacher, distilled_contrastive_loss
from mplug2.objectives.losses import contrastive_loss, language_loss
from mplug2.objectives.objectives import Objectives
from mplug2.tasks import TASKS


def make(task: str = "video_qa", seed: int = 0, **settings) -> tuple[MPLUG2, EMATeacher]:
    """A model, and a teacher with other weights."""
    model = randomized(MPLUG2(small(), task), seed)
    ema_teacher = EMATeacher(model, **settings)
    ema_teacher.teacher = randomized(ema_teacher.teacher, seed + 1)
    for one in (model, ema_teacher.teacher):
        if hasattr(one, "temperature"):
            one.temperature.data.fill_(0.2)
    return model, ema_teacher.double()


@pytest.mark.parametrize("task", slow_except(QUICK_TASKS, TASKS))
def test_every_parameter_follows_the_model_and_none_has_gradients(task):
    model, ema_teacher = make(task, decay=0.9)
    before = {name: parameter.clone() for name, parameter in ema_teacher.teacher.named_parameters()}
    assert before.keys() == dict(model.named_parameters()).keys()
    ema_teacher.update(model)
    for name, parameter in ema_teacher.teacher.named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before[name] + 0.1 * dict(model.named_parameters())[name])
        assert not parameter.requires_grad
    assert ema_teacher.steps == 1


def test_the_decay_is_that_of_albef():
    assert EMATeacher(MPLUG2(small(), "video_qa")).decay == LossSettings().ema_decay == 0.995


def test_a_new_teacher_is_the_model_without_dropout():
    torch.manual_seed(0)
    model = MPLUG2(small(dropout=0.5, drop_path=0.5), "video_qa")
    objectives = Objectives(model, EMATeacher(model)).train()
    pixels = noise(2, 3, 2, 8, 8).float()
    teacher = objectives.ema_teacher.teacher
    assert teacher.encode_vision(pixels).equal(teacher.encode_vision(pixels))
    model.eval()
    torch.testing.assert_close(teacher.encode_vision(pixels), model.encode_vision(pixels))
    assert next(teacher.parameters()) is not next(model.parameters())


@given(st.integers(0, 12), st.integers(1, 5), st.floats(0, 1))
def test_alpha_rises_linearly(steps, ramp, alpha):
    model = MPLUG2(small(), "text_classification")
    ema_teacher = EMATeacher(model, alpha=alpha, ramp=ramp)
    for _ in range(steps):
        ema_teacher.update(model)
    assert ema_teacher.alpha == pytest.approx(alpha * min(1, steps / ramp))


def test_answers_learn_from_the_words_and_from_the_distribution_of_the_teacher():
    model, ema_teacher = make(alpha=0.4, ramp=2)
    objectives, batch = Objectives(model, ema_teacher), task_batch("video_qa")
    ids, mask, positions = batch["answer_ids"], batch["answer_mask"], batch["answer_positions"]

    def asked(one: MPLUG2) -> tuple[torch.Tensor, torch.Tensor]:
        about = batch["question_mask"]
        fused = one.fuse(one.encode_vision(batch["pixels"]), one.encode_text(batch["question_ids"], about), about)
        return answer_memory(*fused, about)

    memory = asked(model)
    plain = language_loss(model, ids, mask, memory[0], positions, memory[1])
    torch.testing.assert_close(objectives(batch)["answer"], plain)  # alpha is 0 at the start
    teacher = ema_teacher.teacher
    theirs = teacher.decode(ids[:, :-1], mask[:, :-1], *asked(teacher))
    ours = model.decode(ids[:, :-1], mask[:, :-1], *memory)
    terms = []
    for i, j in mask[:, 1:].nonzero().tolist():
        probabilities = theirs[i, j].exp() / theirs[i, j].exp().sum()
        terms.append(-(probabilities * ours[i, j].log_softmax(0)).sum())
    soft = torch.stack(terms).mean()
    ema_teacher.steps += 1
    torch.testing.assert_close(objectives(batch)["answer"], 0.8 * plain + 0.2 * soft)
    ema_teacher.steps += 5
    loss = objectives(batch)["answer"]
    torch.testing.assert_close(loss, 0.6 * plain + 0.4 * soft)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


@settings(max_examples=8)
@given(st.integers(1, 4), st.integers(0, 5), seeds)
def test_contrastive_distillation_is_the_formula(b, queued, seed):
    model, ema_teacher = make("video_retrieval", alpha=0.3, queue=8)
    ema_teacher.steps += 1
    rng = torch.Generator().manual_seed(seed)
    vision, text = (unit(rng, b, 5).requires_grad_() for _ in range(2))
    teacher_vision, teacher_text = (unit(rng, b, 5) for _ in range(2))
    positive_id, others = torch.arange(b), torch.randint(0, b + 1, (queued,), generator=rng)
    old_vision, old_text = unit(rng, queued, 5), unit(rng, queued, 5)
    if queued:
        ema_teacher.enqueue(old_vision, old_text, others)
    found = distilled_contrastive_loss(
        vision, text, model.temperature, positive_id, teacher_vision, teacher_text, ema_teacher
    )
    all_ids, expected = torch.cat([positive_id, others]), 0.0
    for rows, teacher_rows, columns, old in (
        (vision, teacher_vision, teacher_text, old_text), (text, teacher_text, teacher_vision, old_vision)
    ):
        columns = torch.cat([columns, old])
        for i in range(b):
            ours = (rows[i] @ columns.T / model.temperature).softmax(0)
            theirs = (teacher_rows[i] @ columns.T / 0.2).softmax(0)  # a target: no gradient of the temperature
            positive = (all_ids == positive_id[i]).double()
            target = 0.3 * theirs + 0.7 * positive / positive.sum()
            expected = expected - (target * ours.log()).sum() / (2 * b)
    torch.testing.assert_close(found, expected)
    learned = (vision, text, model.temperature)
    torch.testing.assert_close(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned))


def test_contrastive_distillation_refuses_wrong_shapes():
    model, ema_teacher = make("video_retrieval", queue=4)
    rng = torch.Generator().manual_seed(0)
    for number in range(4):
        vectors = [unit(rng, 3, 5) for _ in range(4)]
        vectors[number] = vectors[number][:2]
        with pytest.raises(ValueError, match=r"expected shape \(b e\) with b=\d, e=5, found"):
            distilled_contrastive_loss(*vectors[:2], model.temperature, torch.arange(3), *vectors[2:], ema_teacher)
    vectors = [unit(rng, 3, 5) for _ in range(4)]
    with pytest.raises(ValueError, match=r"expected shape \(b\) with b=3, found \(1,\)"):
        distilled_contrastive_loss(*vectors[:2], model.temperature, torch.arange(1), *vectors[2:], ema_teacher)


def test_with_alpha_zero_and_an_empty_queue_it_is_the_plain_loss():
    model, ema_teacher = make("video_retrieval", alpha=0.0, queue=4)
    rng = torch.Generator().manual_seed(0)
    vision, text = unit(rng, 3, 5), unit(rng, 3, 5)
    found = distilled_contrastive_loss(vision, text, model.temperature, torch.arange(3), vision, text, ema_teacher)
    torch.testing.assert_close(found, contrastive_loss(vision, text, model.temperature, torch.arange(3)))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_the_queue_holds_the_newest_vectors(counts):
    ema_teacher, size = make("video_retrieval", queue=5)[1], 5
    whole = torch.arange(sum(counts))
    for part in whole.split(counts):
        ema_teacher.enqueue(part[:, None].expand(-1, 5).double(), -part[:, None].expand(-1, 5).double(), part)
    vision, text, positive_id = ema_teacher.queue()
    assert sorted(positive_id.tolist()) == whole[-size:].tolist()
    assert vision[:, 0].equal(positive_id.double()) and text[:, 0].equal(-positive_id.double())
    with pytest.raises(ValueError, match="queue_size=5: a batch has 6 samples; raise --queue-size to 6 or more"):
        ema_teacher.enqueue(vision.new_zeros(6, 5), vision.new_zeros(6, 5), torch.arange(6))


def test_training_fills_the_queue_with_the_teachers_vectors_and_evaluation_does_not():
    model, ema_teacher = make("pretrain", queue=6, alpha=0.4)
    objectives, batch = Objectives(model, ema_teacher), make_batch("image")
    objectives.eval()(batch)
    assert ema_teacher.queued == 0
    objectives.after_step(skipped=False)
    assert ema_teacher.queued == 0
    expected = ema_teacher.teacher.project_vision(ema_teacher.teacher.encode_vision(batch["pixels"]))
    objectives.train()(batch)
    objectives.after_step(skipped=True)  # its vectors may be NaN
    assert ema_teacher.queued == 0 and not ema_teacher.pending and ema_teacher.steps == 1
    losses = objectives(batch)
    objectives.after_step(skipped=False)
    assert ema_teacher.queued == 3 and not ema_teacher.pending
    assert set(losses) == {"vtc", "vtm", "mlm", "caption", "answer"}
    torch.testing.assert_close(ema_teacher.queue()[0], expected)


@pytest.mark.parametrize("queue, kind, passes", [(6, "image", 1), (0, "image", 1), (6, "text", 0)])
def test_the_teacher_encodes_an_image_once_in_a_step(queue, kind, passes):
    """Although VTC and answers both read it."""
    model, ema_teacher = make("pretrain", queue=queue, alpha=0.4)
    seen = []
    ema_teacher.teacher.vision_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    Objectives(model, ema_teacher).train()(make_batch(kind))
    assert len(seen) == passes


def test_no_step_reads_a_value_from_the_device(monkeypatch):
    """A process that reads one waits for its GPU."""
    model, ema_teacher = make("pretrain", queue=6, alpha=0.4)
    objectives, batch = Objectives(model, ema_teacher).train(), make_batch("image")
    vision, text = (unit(torch.Generator().manual_seed(seed), 3, 5) for seed in (0, 1))

    def read(tensor):
        raise AssertionError("a value is read from a tensor")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, read)
        for _ in range(3):
            own = ema_teacher.encode_vision(batch)
            ema_teacher.contrastive_loss(batch, own, vision, text, model.temperature, enqueue=True)
            ema_teacher.answer_logits(batch, own)
            objectives.after_step(skipped=False)
    assert (ema_teacher.steps, ema_teacher.queued) == (3, 9)


def test_its_state_dict_is_complete():
    model, ema_teacher = make("pretrain", queue=4)
    ema_teacher.enqueue(noise(3, 5), noise(3, 5, seed=1), torch.arange(3))
    ema_teacher.update(model)
    other = make("pretrain", seed=5, queue=4)[1]
    other.load_state_dict(ema_teacher.state_dict())
    for one, two in zip(ema_teacher.queue(), other.queue()):
        assert one.equal(two)
    assert other.steps == 1 and other.queued == 3
    assert all(a.equal(b) for a, b in zip(ema_teacher.teacher.parameters(), other.teacher.parameters()))
