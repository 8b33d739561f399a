"""MPLUG2: what each task builds, how the modules are connected, and properties from pixels and ids to outputs."""

import dataclasses
import re

import pytest
import torch
from helpers import (
    QUICK_TASKS,
    assert_differs,
    assert_same,
    configs,
    joined,
    noise,
    norm_by_hand,
    parameter_names,
    random_ids,
    random_mask,
    randomized,
    seeds,
    shuffled,
    slow_except,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mplug2.checkpoint import NEW_MODULES
from mplug2.config import PRESETS
from mplug2.model.heads import BoxHead, LocationTokens
from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.tasks import TASKS

BUILT = {  # task -> its modules, heads included
    "caption": {"vision_encoder", "universal", "decoder"},
    "qa": {"vision_encoder", "text_encoder", "universal", "fusion", "decoder"},
    "retrieval": {
        "vision_encoder", "text_encoder", "universal", "fusion", "contrastive_vision", "contrastive_text",
        "temperature", "matching_head",
    },
    "text_classification": {"text_encoder", "universal", "classifier"},
    "text_qa": {"text_encoder", "universal", "decoder"},
    "text_pair_classification": {"text_encoder", "universal", "classifier"},
    "classification": {"vision_encoder", "universal", "classifier"},
    "visual_entailment": {"vision_encoder", "text_encoder", "universal", "fusion", "classifier"},
    "pair_reasoning": {"vision_encoder", "text_encoder", "universal", "fusion", "classifier", "pair_place"},
    "grounding": {"vision_encoder", "text_encoder", "universal", "fusion", "box_head"},
    "pretrain": {
        "vision_encoder", "text_encoder", "universal", "fusion", "decoder", "contrastive_vision", "contrastive_text",
        "temperature", "matching_head", "masked_head",
    },
}
PROJECTION = {"vision_projection", "vision_norm"}
tasks = pytest.mark.parametrize("task", list(TASKS))


def with_patches(config):
    """The same with at least four patches, because a box is found among several."""
    return dataclasses.replace(config, image_size=2 * config.image_size)


def modules_of(model):
    return {name.split(".")[0] for name in parameter_names(model)}


def batch(config, b, seed, t=3, l=4):
    """Pixels, ids and mask. The texts end in padding."""
    mask = random_mask(b, l, seed)
    mask[:, -1] = False
    pixels = noise(b, 3, t, config.image_size, config.image_size, seed=seed)
    return pixels, random_ids(b, l, seed, config.vocab_size), mask


def forward(model, pixels, ids, mask):
    """All outputs of a model for videos with one text each; at padding they are zero."""
    built, outputs = model.components, {}
    if "vision" in built:
        read = vision = outputs["vision"] = model.encode_vision(pixels)
    if "pair" in built:
        vision = model.concat_pair(torch.stack([vision, vision.flip(0)], dim=1))
    if "text" in built:
        read = text = model.encode_text(ids, mask)
    if "fusion" in built:
        seen, read = model.fuse(vision, text, mask)
        fused = read
    if "classifier" in built:
        outputs |= {f"class of {name}": model.classify(read, name) for name in model.classes}
    if "box" in built:
        outputs["box"] = model.predict_box(fused, seen, mask)
    if "contrastive" in built:
        outputs["unit_vision"], outputs["unit_text"] = model.project_vision(vision), model.project_text(text)
    if "matching" in built:
        outputs["match"] = model.itm_logits(fused)
    if "masked" in built:
        outputs["masked"] = model.mlm_logits(fused) * mask[..., None]
    if "decoder" in built and "fusion" in built:
        outputs["answer"] = model.decode(ids, mask, *answer_memory(seen, fused, mask)) * mask[..., None]
    if "decoder" in built and "vision" not in built:
        outputs["answer"] = model.decode(ids, mask, *answer_memory(None, text, mask)) * mask[..., None]
    elif "decoder" in built and ("masked" in built or "fusion" not in built):
        outputs["caption"] = model.decode(ids, mask, vision) * mask[..., None]
    return outputs


@tasks
def test_a_task_builds_the_modules_of_its_row_and_no_others(task):
    built = BUILT.get(task) or BUILT[task.removeprefix("image_").removeprefix("video_")]
    assert modules_of(MPLUG2(small(), task)) == built | (PROJECTION if "vision_encoder" in built else set())
    assert modules_of(MPLUG2(small(vision_width=16), task)) == built


@given(st.lists(st.sampled_from([*TASKS]), min_size=2, max_size=3, unique=True))
def test_several_tasks_build_the_union_of_their_modules(together):
    config = small(temporal_on_images=False)
    found = parameter_names(MPLUG2(config, ",".join(together)))
    # The universal layers have their vision part if any of the tasks has vision.
    assert found == set().union(*(parameter_names(MPLUG2(config, task)) for task in together))


def test_local_temporal_modules_that_images_bypass_are_not_built_for_image_tasks():
    for task, built in (("image_caption", False), ("video_caption", True), ("pretrain", True), ("grounding", False)):
        names = parameter_names(MPLUG2(small(temporal_on_images=False), task))
        assert any(".lt1." in name for name in names) == built
        assert any(".lt1." in name for name in parameter_names(MPLUG2(small(), task)))


@pytest.mark.parametrize("readout", ["released", "figure"])
@tasks
def test_the_parameters_of_a_task_are_among_those_of_pretraining(task, readout):
    config = small(universal_readout=readout)
    sizes, all_sizes = (
        {name: tuple(parameter.shape) for name, parameter in MPLUG2(config, task_or_all).named_parameters()}
        for task_or_all in (task, "pretrain")
    )
    shared = {name: size for name, size in sizes.items() if name.split(".")[0] not in NEW_MODULES}
    assert shared.items() <= all_sizes.items()


@pytest.mark.parametrize("task", slow_except(QUICK_TASKS, TASKS))
@settings(max_examples=5)
@given(config=configs(temporal_stride=0), on_images=st.booleans(), seed=seeds)
def test_every_parameter_gets_a_gradient(task, config, on_images, seed):
    config = dataclasses.replace(config, temporal_on_images=on_images)
    if "box" in TASKS[task].components:
        config = with_patches(config)
    model = randomized(MPLUG2(config, task, {task: ("a", "b", "c")}), seed)
    outputs = forward(model, *batch(config, 2, seed, t=3 if "temporal" in TASKS[task].components else 1))
    if "unit_vision" in outputs:
        outputs["similarity"] = outputs.pop("unit_vision") @ outputs.pop("unit_text").T / model.temperature
    outputs.pop("vision", None)
    sum((output * noise(*output.shape, seed=seed)).sum() for output in outputs.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("preset, task, count", [
    ("large", "video_caption", 621_853_498), ("large", "video_qa", 1_031_533_370), ("base", "video_qa", 379_952_442),
    ("base", "pretrain", 380_970_359),
])
def test_sizes(preset, task, count):
    with torch.device("meta"):
        model = MPLUG2(PRESETS[preset](), task)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@given(config=configs(), t=st.integers(1, 4), seed=seeds)
def test_vision_is_encoded_projected_and_read_by_the_universal_layers(config, t, seed):
    model, (pixels, _, _) = randomized(MPLUG2(config, "video_caption"), seed), batch(config, 2, seed, t=t)
    tokens = model.vision_encoder(pixels)
    if config.vision_width != config.width:
        tokens = tokens @ model.vision_projection.weight.T + model.vision_projection.bias
        tokens = norm_by_hand(model.vision_norm, tokens)
    assert_same(model.encode_vision(pixels), model.universal.vision(tokens))


@given(config=configs(), l=st.integers(1, 5), seed=seeds)
def test_text_is_encoded_and_read_by_the_universal_layers(config, l, seed):
    model, (_, ids, mask) = randomized(MPLUG2(config, "video_qa"), seed), batch(config, 2, seed, l=l + 1)
    assert_same(model.encode_text(ids, mask), model.universal.text(model.text_encoder(ids, mask), mask))


def test_without_universal_layers_vision_and_text_share_no_weights():
    model, inputs = randomized(MPLUG2(small(universal_layers=0, vision_width=16), "pretrain")), batch(small(), 2, 0)
    assert "universal" not in modules_of(model) and len(model.text_encoder.layers) == model.config.text_layers
    assert_same(model.encode_vision(inputs[0]), model.vision_encoder(inputs[0]))
    with torch.no_grad():
        vision, text = model.encode_vision(inputs[0]), model.encode_text(*inputs[1:])
        for name, parameter in model.named_parameters():
            if name.startswith("vision_encoder"):
                parameter.add_(noise(*parameter.shape, seed=1))
    assert_same(model.encode_text(*inputs[1:]), text)
    assert_differs(model.encode_vision(inputs[0]), vision)


def test_the_projection_of_vision_ends_in_dropout():
    model = randomized(MPLUG2(small(dropout=0.5, latents=2), "video_caption"))
    model.vision_dropout.train()
    torch.manual_seed(0)
    pixels = batch(model.config, 1, 0)[0]
    dropped = model.encode_vision(pixels)
    assert_differs(dropped, model.eval().encode_vision(pixels))


@given(b=st.integers(1, 3), r=st.integers(1, 3), v=st.integers(1, 4), l=st.integers(1, 4), seed=seeds)
def test_the_memory_of_an_answer_is_vision_then_fused_text(b, r, v, l, seed):
    vision, text, mask = noise(b, v, 4, seed=seed), noise(b * r, l, 4, seed=seed), random_mask(b * r, l, seed)
    memory, memory_mask = answer_memory(vision, text, mask)
    assert memory.shape == (b * r, v + l, 4) and memory_mask.shape == (b * r, v + l)
    assert memory.vision is vision  # not repeated
    for i in range(b * r):
        assert torch.equal(joined(memory)[i, :v], vision[i // r])
        assert memory_mask[i, :v].all()
    assert torch.equal(joined(memory)[:, v:], text)
    assert torch.equal(memory_mask[:, v:], mask)


@given(config=configs(), r=st.integers(1, 2), seed=seeds)
def test_an_instruction_is_followed_with_vision_and_without(config, r, seed):
    model = randomized(MPLUG2(config, "video_qa"), seed)
    (pixels, _, _), (_, ids, mask) = batch(config, 2, seed), batch(config, 2 * r, seed)
    vision, text = model.encode_vision(pixels), model.encode_text(ids, mask)
    memory, memory_mask = model.instruction_memory(vision, ids, mask)
    expected, expected_mask = answer_memory(*model.fuse(vision, text, mask), mask)
    assert_same(joined(memory), joined(expected))
    assert torch.equal(memory_mask, expected_mask)
    memory, memory_mask = model.instruction_memory(None, ids, mask)
    assert_same(memory, text)
    assert torch.equal(memory_mask, mask)


def test_text_alone_needs_text_encoder_and_decoder_only():
    model = randomized(MPLUG2(small(), "text_classification,image_caption"))
    _, ids, mask = batch(model.config, 2, 0)
    logits = model.decode(ids, mask, *model.instruction_memory(None, ids, mask))
    assert logits.shape == (2, 4, model.config.vocab_size) and not hasattr(model, "fusion")
    with pytest.raises(ValueError, match="'text_classification,image_caption' has no fusion"):
        model.instruction_memory(model.encode_vision(batch(model.config, 2, 0)[0]), ids, mask)


@given(config=configs(), r=st.integers(1, 3), seed=seeds)
def test_sharing_a_video_equals_one_copy_per_question(config, r, seed):
    model, (_, ids, mask) = randomized(MPLUG2(config, "video_qa"), seed), batch(config, 2 * r, seed)
    pixels = batch(config, 2, seed)[0]
    each = forward(model, pixels.repeat_interleave(r, dim=0), ids, mask)
    assert_same(forward(model, pixels, ids, mask)["answer"], each["answer"])


@given(config=configs(), seed=seeds)
def test_samples_are_independent(config, seed):
    model, order = randomized(MPLUG2(config, "pretrain"), seed), shuffled(3, seed)
    inputs = batch(config, 3, seed)
    expected = forward(model, *inputs)
    for name, found in forward(model, *(tensor[order] for tensor in inputs)).items():
        assert_same(found, expected[name][order])


@given(config=configs(), padding=st.integers(1, 3), seed=seeds)
def test_padding_changes_nothing_from_end_to_end(config, padding, seed):
    model, (pixels, ids, mask) = randomized(MPLUG2(config, "pretrain"), seed), batch(config, 2, seed)
    expected = forward(model, pixels, ids, mask)
    longer = torch.cat([torch.where(mask, ids, (ids + 1) % config.vocab_size), random_ids(2, padding, seed)], dim=1)
    found = forward(model, pixels, longer, F.pad(mask, (0, padding), value=False))
    for name in expected:
        length = ids.shape[1] if name in ("masked", "answer", "caption") else None
        assert_same(found[name][:, :length], expected[name])


@given(seed=seeds)
def test_heads_read_only_the_class_token(seed):
    model = randomized(MPLUG2(small(), "video_retrieval"), seed)
    tokens = noise(3, 4, 16, seed=seed)
    for head, module in (
        (model.project_vision, model.contrastive_vision), (model.project_text, model.contrastive_text),
        (model.itm_logits, model.matching_head),
    ):
        expected = tokens[:, 0] @ module.weight.T + module.bias
        if head != model.itm_logits:
            expected = expected / expected.square().sum(dim=1, keepdim=True).sqrt()
        assert_same(head(tokens), expected)


@given(config=configs(), seed=seeds)
def test_classes_and_boxes_are_read_from_the_class_token(config, seed):
    config = with_patches(config)
    model = randomized(MPLUG2(config, "visual_entailment,image_classification,grounding,image_pair_reasoning",
                              {"visual_entailment": ("a", "b", "c"), "image_classification": ("d", "e")}), seed)
    hidden = noise(3, 4, config.width, seed=seed)
    for task, classes in (("visual_entailment", 3), ("image_classification", 2), ("image_pair_reasoning", 1)):
        head = model.classifier[task]
        assert head.weight.shape == (classes, config.width)
        assert_same(model.classify(hidden, task), hidden[:, 0] @ head.weight.T + head.bias)
    vision = noise(3, 1 + config.patches, config.width, seed=seed + 1)
    mask = torch.ones(3, 4, dtype=torch.bool)
    boxes = model.predict_box(hidden, vision, mask)
    assert boxes.shape == (3, 4) and (0 < boxes).all() and (boxes < 1).all()
    assert_same(boxes, model.predict_box(hidden[:, :1], vision, mask[:, :1]))


@given(side=st.integers(2, 4), seed=seeds)
def test_a_box_is_centered_where_the_token_attends(side, seed):
    head = randomized(BoxHead(6, side), seed)
    assert head.key.bias is None  # the softmax over the patches would not notice it
    token, patches = noise(2, 6, seed=seed), noise(2, side * side, 6, seed=seed + 1)
    weights = ((patches @ head.key.weight.T) @ head.query(token)[:, :, None] / 6**0.5)[..., 0].softmax(-1)
    center = [sum(weights[:, row * side + column] * ((column, row)[axis] + 0.5) / side
                  for row in range(side) for column in range(side))
              for axis in (0, 1)]
    change = head.correct(token)
    for axis in (0, 1):
        odds = center[axis] / (1 - center[axis]) * change[:, axis].exp()
        assert_same(head(token, patches)[:, axis], odds / (1 + odds))
    assert_same(head(token, patches)[:, 2:], 1 / (1 + (-change[:, 2:]).exp()))


@given(corners=st.lists(st.integers(0, 8), min_size=4, max_size=4))
def test_location_tokens_are_the_pixel_borders_of_a_box(corners):
    left, top, right, bottom = min(corners[0], corners[2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2])
    head = LocationTokens(6, image_size=8)
    box = torch.tensor([[(left + right) / 16, (top + bottom) / 16, (right - left) / 8, (bottom - top) / 8]])
    assert head.tokens(box).tolist() == [[left, top, right, bottom]]
    assert_same(head.boxes(head.tokens(box)), box)
    for outward in (-0.4, 0.4):  # of a pixel, on each side: the nearest borders stay the same
        assert torch.equal(head.tokens(box + torch.tensor([0, 0, outward, outward]) / 4), head.tokens(box))
    assert head.boxes(torch.tensor([[5, 6, 3, 2]])).tolist() == [[4 / 8, 4 / 8, 0, 0]]  # nothing
    assert head.tokens(torch.tensor([[1.0, 1.0, 0.5, 0.5]])).tolist() == [[6, 6, 8, 8]]  # a box that reaches outside


@given(config=configs(boxes="tokens"), l=st.integers(1, 3), seed=seeds)
def test_location_tokens_are_written_by_the_decoder_one_after_the_other(config, l, seed):
    config = with_patches(config)
    model = randomized(MPLUG2(config, "grounding"), seed)
    assert "decoder" in modules_of(model)
    pixels, ids, mask = batch(config, 3, seed, t=1, l=1 + l)
    vision, fused = model.fuse(model.encode_vision(pixels), model.encode_text(ids, mask), mask)
    boxes, head = model.predict_box(fused, vision, mask), model.box_head
    memory, memory_mask = answer_memory(vision, fused, mask)
    written = []
    for number in range(3):  # each image alone, with the embeddings by hand
        own, tokens = (joined(memory)[number][None], memory_mask[number][None]), []
        for _ in range(4):
            words = head.location.weight[[config.image_size + 1, *tokens]][None]
            hidden = model.decoder.hidden(words, torch.ones(1, words.shape[1], dtype=torch.bool), *own)
            tokens.append(int((hidden[0, -1] @ head.location.weight[: config.image_size + 1].T).argmax()))
        written.append(tokens)
    assert_same(boxes, head.boxes(torch.tensor(written)).to(boxes))


@given(config=configs(temporal_stride=2), seed=seeds)
def test_boxes_need_images_and_a_video_is_refused(config, seed):
    model = randomized(MPLUG2(with_patches(config), "grounding"), seed)
    pixels, ids, mask = batch(model.config, 2, seed, t=3)
    assert forward(model, pixels[:, :, :1], ids, mask)["box"].shape == (2, 4)
    with pytest.raises(ValueError, match=r"\d+ visual tokens: boxes are predicted in single images, .* pass one frame"):
        forward(model, pixels, ids, mask)


@given(v=st.integers(1, 4), seed=seeds)
def test_the_memory_of_two_images_is_both_with_their_embeddings(v, seed):
    model = randomized(MPLUG2(small(), "image_pair_reasoning"), seed)
    one, two = noise(3, v, 16, seed=seed), noise(3, v, 16, seed=seed + 1)
    found = model.concat_pair(torch.stack([one, two], dim=1))
    assert_same(found[:, :v], one + model.pair_place[0])
    assert_same(found[:, v:], two + model.pair_place[1])


def test_the_masked_head_is_tied_to_the_word_embedding_of_the_text_encoder():
    model, hidden = randomized(MPLUG2(small(), "pretrain")), noise(5, 16)
    assert_same(model.mlm_logits(hidden), model.masked_head(hidden, model.text_encoder.embeddings.word.weight))


@tasks
def test_evaluation_is_deterministic_and_training_is_not(task):
    model = randomized(MPLUG2(small(dropout=0.3, drop_path=0.3), task))
    inputs = batch(model.config, 4, 0, t=3 if "temporal" in TASKS[task].components else 1)
    expected = forward(model, *inputs)
    for name, found in forward(model, *inputs).items():
        assert torch.equal(found, expected[name])
    torch.manual_seed(0)
    for name, found in forward(model.train(), *inputs).items():
        assert_differs(found, expected[name])


@given(config=configs(local_temporal=True, temporal_stride=0), seed=seeds)
def test_a_new_model_starts_as_an_image_encoder_without_the_order_of_frames(config, seed):
    torch.manual_seed(seed)
    model, (pixels, _, _) = MPLUG2(config, "video_caption").double().eval(), batch(config, 2, seed)
    assert_same(model.encode_vision(pixels.flip(2))[:, 0], model.encode_vision(pixels)[:, 0])
    without = MPLUG2(dataclasses.replace(config, local_temporal=False), "video_caption").double().eval()
    weights = model.state_dict()
    without.load_state_dict({name: weights[name] for name in without.state_dict()})
    assert_same(model.encode_vision(pixels), without.encode_vision(pixels))


def test_a_new_model_has_normal_weights_and_zero_biases():
    torch.manual_seed(0)
    config = small(width=48, heads=2, vision_width=24, local_temporal=False)  # LT starts at zero, tested above
    for name, parameter in MPLUG2(config, "pretrain").named_parameters():
        if name == "temperature":
            assert parameter.item() == pytest.approx(0.07)
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            deviation = (3 * config.patch_size**2) ** -0.5 if "patch_embed.linear" in name else 0.02 * (768 / 48) ** 0.5
            assert parameter.std().item() == pytest.approx(deviation, rel=0.4), name
            assert abs(parameter.mean().item()) < deviation / 2, name


@pytest.mark.slow
def test_pixels_to_logits_is_one_graph():
    model = randomized(MPLUG2(small(vision_layers=1, universal_layers=1, decoder_layers=1), "video_caption"))
    inputs = batch(model.config, 2, 0)

    @torch.no_grad()
    def caption(pixels, ids, mask):
        return model.decode(ids, mask, model.encode_vision(pixels))

    assert_same(torch.compile(caption, fullgraph=True, backend="eager")(*inputs), caption(*inputs))


def test_refuses_modules_that_the_task_does_not_have():
    with pytest.raises(ValueError, match=r"unknown task 'video_captoin' \(did you mean 'video_caption'\?\); known"):
        MPLUG2(small(), "video_captoin")
    model, x, mask = MPLUG2(small(), "video_caption"), torch.zeros(1, 2, 16), random_mask(1, 2)
    with pytest.raises(ValueError, match="'video_caption' is named twice"):
        MPLUG2(small(), "video_caption,video_caption")
    for name, call in {
        "text_encoder": lambda: model.encode_text(random_ids(1, 2), mask), "fusion": lambda: model.fuse(x, x, mask),
        "contrastive_vision": lambda: model.project_vision(x), "contrastive_text": lambda: model.project_text(x),
        "matching_head": lambda: model.itm_logits(x), "masked_head": lambda: model.mlm_logits(x),
        "box_head": lambda: model.predict_box(x, torch.zeros(1, 5, 16), mask),
    }.items():
        with pytest.raises(ValueError, match=f"for the task 'video_caption' has no {name}; build it for another"):
            call()
    with pytest.raises(ValueError, match="image is a single patch.* choose a patch_size smaller than image_size"):
        MPLUG2(small(patch_size=8), "grounding")
    with pytest.raises(ValueError, match="'video_caption' has no pair_place; build it .* 'image_pair_reasoning'"):
        model.concat_pair(torch.zeros(1, 2, 2, 16))
    with pytest.raises(ValueError, match="'text_classification' has no classifier for 'visual_entailment'; fine-tune"):
        MPLUG2(small(), "text_classification").classify(x, "visual_entailment")
    with pytest.raises(ValueError, match="'video_retrieval' has no decoder"):
        MPLUG2(small(), "video_retrieval").decode(random_ids(1, 2), mask, x)


def test_refuses_wrong_shapes():
    model, x = MPLUG2(small(), "pretrain"), torch.zeros(2, 3, 16)
    ids, mask = random_ids(2, 3), random_mask(2, 3)
    for call, message in (
        (lambda: model.encode_vision(torch.zeros(2, 3, 8, 8)), "(b 3 t H W) with H=8, W=8, found (2, 3, 8, 8)"),
        (lambda: model.encode_vision(torch.zeros(2, 3, 1, 8, 12)), "(b 3 t H W) with H=8, W=8, found (2, 3, 1, 8, 12)"),
        (lambda: model.encode_text(ids, mask[:, 1:]), "(b l) with b=2, l=3, found (2, 2)"),
        (lambda: model.encode_text(random_ids(2, 12), random_mask(2, 12)), "a text of 12 tokens"),
        (lambda: model.fuse(x[..., 1:], x, mask), "(b v d) with d=16, found (2, 3, 15)"),
        (lambda: model.decode(ids, mask, x[..., 1:]), "(b m d) with d=16, found (2, 3, 15)"),
        (lambda: model.project_vision(x[..., 1:]), "(b v d) with d=16, found (2, 3, 15)"),
        (lambda: model.project_text(x[:, 0]), "(b l d) with d=16, found (2, 16)"),
        (lambda: model.itm_logits(x[None]), "(b l d) with d=16, found (1, 2, 3, 16)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
