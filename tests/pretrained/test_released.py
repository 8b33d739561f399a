"""Released checkpoints of any size: agreement with a second implementation, names, settings, and every error."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import released_model
import torch
from helpers import joined
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mplug2.config import tiny
from mplug2.model.mplug2 import MPLUG2, answer_memory
from mplug2.pretrained import from_released, to_released
from mplug2.pretrained.entries import check_entries
from mplug2.pretrained.released import never_used

pytestmark = pytest.mark.released
SMALL = {
    "image_res": 16, "patch": 8, "vision_width": 64, "vision_layers": 1, "temporal_downsampling": False,
    "temporal_stride": 2, "hidden": 32, "heads": 2, "intermediate": 64, "vocab": 40, "max_pos": 16,
    "num_hidden_layers": 4, "text_encoder_layers": 3, "num_uni_layer": 2, "fusion_layers": 3, "text_decode_layers": 2,
    "stride_layer": 2, "clip_embed": 16, "clip_ctx": 8, "clip_vocab": 50, "clip_width": 32, "clip_layers": 2,
    "latents": 6,
}
LARGE = SMALL | {
    "image_res": 224, "patch": 14, "vision_width": 1024, "vision_layers": 24, "hidden": 1024, "heads": 16,
    "intermediate": 4096, "vocab": 30522, "max_pos": 512, "num_hidden_layers": 24, "text_encoder_layers": 24,
    "fusion_layers": 6, "text_decode_layers": 12, "stride_layer": 1000, "clip_embed": 768, "clip_ctx": 77,
    "clip_vocab": 49408, "clip_width": 768, "clip_layers": 12, "latents": 50,
}
STATE = released_model.random_state(SMALL)
TASKS = ["video_caption", "video_qa"]
tasks = pytest.mark.parametrize("task", TASKS)


def load(state, task="video_qa", dims=SMALL, **changes):
    run, bert = released_model.settings(dims | changes)
    return from_released(state, run, bert, task)


@cache
def used(task):
    return set(to_released(load(STATE, task)))


@st.composite
def dims(draw):
    """Sizes that golden/ does not cover: several vision heads, equal widths, one universal layer, other strides."""
    def pick(*values):
        return draw(st.sampled_from(values))

    width, heads, head_width = pick(64, 128, 192), pick(1, 2, 4), pick(8, 16)
    hidden = width if draw(st.booleans()) else heads * head_width
    text, stack = pick(2, 3, 4), pick(3, 4, 5)
    patch = pick(4, 8)
    return SMALL | {
        "patch": patch, "image_res": patch * pick(1, 2, 3), "vision_width": width, "vision_layers": pick(1, 2),
        "temporal_downsampling": draw(st.booleans()), "temporal_stride": pick(1, 2, 3), "hidden": hidden,
        "heads": heads, "intermediate": pick(32, 80), "text_encoder_layers": text,
        "num_uni_layer": draw(st.integers(1, text)), "num_hidden_layers": stack,
        "fusion_layers": draw(st.integers(1, stack)), "stride_layer": pick(1, 2, 3, 1000),
        "text_decode_layers": pick(1, 3), "latents": pick(1, 5),
    }


@settings(max_examples=4, deadline=None)
@given(dims(), st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 7))
def test_any_size_agrees(dims, seed, frames, length):
    state = released_model.random_state(dims, seed)
    model, released = load(state, dims=dims), released_model.Released(state, dims)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(2, 3, frames, dims["image_res"], dims["image_res"], generator=generator)
    ids = torch.randint(dims["vocab"], (2, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [1 + seed % length]])
    with torch.no_grad():
        vision, text = model.encode_vision(pixels), model.encode_text(ids, mask)
        memory, memory_mask = answer_memory(*model.fuse(vision, text, mask), mask)
        found = vision, text, joined(memory), model.decode(ids, mask, memory, memory_mask)
        expected_vision, expected_text = released.vision(pixels), released.text(ids, mask)
        expected_memory = torch.cat(released.fuse(expected_vision, expected_text, mask), dim=1)
        logits = released.decode(ids, mask.float(), expected_memory, memory_mask)
    for ours, expected in zip(found, (expected_vision, expected_text, expected_memory, logits)):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task, count", [
    ("video_caption", 621_853_498), pytest.param("video_qa", 1_031_533_370, marks=pytest.mark.slow),
])
def test_every_entry_of_the_large_models_is_accounted_for(task, count):
    listed = json.loads((Path(__file__).parents[1] / "golden" / "keys_large.json").read_text())
    state = {name: torch.empty(entry["shape"], device="meta") for name, entry in listed.items()}
    assert len(state) == 2223
    model = load(state, task, LARGE)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    for name, entry in to_released(model).items():
        assert list(entry.shape) == listed[name]["shape"]
    with pytest.raises(ValueError, match="1 entries are neither used nor known to be unused: text_decoder.extra"):
        load(state | {"text_decoder.extra": torch.empty(1)}, task, LARGE)


@tasks
def test_to_released_is_the_inverse(task):
    model = load(STATE, task)
    back = to_released(model)
    assert not model.training and back and all(torch.equal(entry, STATE[name]) for name, entry in back.items())
    again = load(back, task)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for one, value in ((again, 7.0), (model, 5.0)):  # all of them are copies: nothing is shared
        next(one.parameters()).data.fill_(value)
        assert not any((entry == value).all() for entry in back.values() if entry.numel() > 1)


def test_nothing_that_a_task_does_not_use_is_read():
    for task in TASKS:
        state = {name: entry if name in used(task) else entry.to("meta") for name, entry in STATE.items()}
        assert not any(parameter.is_meta for parameter in load(state, task).parameters())
    text = {"text_encoder.embeddings.word_embeddings.weight", "text_encoder.encoder.layer.0.output.dense.bias"}
    assert text <= used("video_qa") - used("video_caption")
    # Layer 3 is the third that runs. With a stride of 2 it is the connected one, without cross-attention.
    assert not any(name.startswith("fusion_encoder.encoder.layer.3.crossattention") for name in used("video_qa"))
    assert not any(name.startswith("fusion_encoder.encoder.layer.0.") for name in used("video_qa"))


@tasks
def test_nested_prefixed_and_momentum_files_give_the_same_model(task):
    prefixed = {
        name if "text_decoder" in name else name.replace("_encoder.", "_encoder.bert.", 1): entry
        for name, entry in STATE.items()
    }
    prefixed = {name.replace("fusion_encoder.bert.", "fusion_encoder.fusion.bert."): e for name, e in prefixed.items()}
    assert "text_encoder.bert.embeddings.word_embeddings.weight" in prefixed
    momentum = {name.replace(".", "_m.", 1): entry + 1 for name, entry in prefixed.items()}
    heads = {"temp": torch.ones(()), "itm_head.weight": torch.ones(2, 32), "vision_proj_m.bias": torch.ones(8),
             "text_encoder.cls.predictions.transform.dense.weight": torch.ones(32, 32)}
    expected = to_released(load(STATE, task))
    for file in (
        {"model": STATE, "epoch": 3, "config": {"image_res": 16}}, {"module": {"model": STATE}}, prefixed,
        {"model": {**momentum, **prefixed, **heads}, "lr_scheduler": {"warmup": [1, 2.5]}},
    ):
        found = to_released(load(file, task))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="visn_fc.bias occurs twice"):
        load(STATE | {"bert.visn_fc.bias": STATE["visn_fc.bias"]}, task)
    with pytest.raises(ValueError, match="these entries are not tensors: epoch"):
        load({"epoch": 3, **STATE}, task)


@tasks
def test_no_used_entry_may_be_missing(task):
    patterns = never_used(load(STATE, task))
    for name in STATE:
        others = STATE.keys() - {name}
        if name in used(task):
            with pytest.raises(ValueError, match=f"^file: 1 entries are missing: {re.escape(name)}$"):
                check_entries(others, used(task), patterns, "file")
        else:
            check_entries(others, used(task), patterns, "file")
    with pytest.raises(ValueError, match="released checkpoint: 1 entries are missing: visn_fc.bias"):
        load({name: entry for name, entry in STATE.items() if name != "visn_fc.bias"}, task)


@tasks
def test_an_unknown_entry_is_an_error(task):
    patterns = never_used(load(STATE, task))
    strange = [f"{name}x" for name in STATE] + [f"visual_encoder.{name}" for name in STATE]
    # Layers that the settings do not have, and entries that only other layers have; CLIP's text tower has any depth.
    moved = [re.sub(r"\.\d+\.", f".{number}.", name) for name in STATE for number in range(5)]
    strange += [name for name in moved if name not in STATE and "visual_encoder.transformer" not in name]
    for extra in strange:
        with pytest.raises(ValueError, match=f"^file: 1 entries are neither used nor known .*: {re.escape(extra)}$"):
            check_entries([*STATE, extra], used(task), patterns, "file")
    with pytest.raises(ValueError) as error:
        load({f"{name}x": entry for name, entry in STATE.items()}, task)
    assert f"{len(used(task))} entries are missing" in str(error.value) and "more" in str(error.value)
    assert f"{len(STATE)} entries are neither used" in str(error.value) and len(str(error.value)) < 4000


@settings(max_examples=6, deadline=None)
@given(st.deferred(lambda: st.sampled_from(sorted(used("video_qa")))))
def test_an_entry_of_another_shape_is_named_with_both_shapes(name):
    entry = STATE[name]
    grown = torch.cat([entry, entry[..., :1]], dim=-1)
    if name.endswith("latents"):
        grown = grown[None]
    with pytest.raises(ValueError) as error:
        load(STATE | {name: grown})
    if name != "visual_encoder.visual.positional_embedding":
        message = f"the entry {name} has shape {tuple(grown.shape)}, but the settings imply {tuple(entry.shape)};"
        assert message in str(error.value)


def test_settings_of_another_checkpoint_are_refused():
    for changes, message in (
        ({"vocab": 41}, r"word_embeddings\.weight has shape \(40, 32\), but the settings imply \(41, 32\)"),
        ({"temporal_downsampling": True}, r"conv1\.weight has shape \(64, 3, 1, 8, 8\).* \(64, 3, 3, 8, 8\)"),
        ({"vision_layers": 2}, "28 entries are missing: .*resblocks.1.attn.in_proj_weight"),
        ({"num_uni_layer": 1}, "17 entries are missing|neither used nor known to be unused: .*layer.1.latents"),
        ({"text_decode_layers": 1}, "neither used nor known to be unused: text_decoder.bert.encoder.layer.1"),
        ({"num_hidden_layers": 3}, "neither used nor known to be unused: fusion_encoder.encoder.layer.3"),
        ({"num_hidden_layers": 2}, "fusion_layers=3: expected at most num_hidden_layers=2"),
        ({"heads": 3}, "heads=3 does not divide width=32"),
    ):
        with pytest.raises(ValueError, match=message):
            load(STATE, **changes)


def test_unsupported_settings_are_refused_by_name():
    run, bert = released_model.settings(SMALL)
    for run_changes, bert_changes, message in (
        ({}, {"hidden_act": "relu"}, "hidden_act='relu' is not supported: our layers have 'gelu'"),
        ({}, {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"image_res": 20}, {}, "patch_size=8 does not divide image_size=20"),
    ):
        with pytest.raises(ValueError, match=message):
            from_released(STATE, run | run_changes, bert | bert_changes)
    with pytest.raises(ValueError, match="BERT settings: the setting stride_layer is missing"):
        from_released(STATE, run, {name: value for name, value in bert.items() if name != "stride_layer"})
    del run["clip_dims"]
    with pytest.raises(ValueError, match="clip_name='custom': expected one of ViT-B-32, ViT-B-16, ViT-L-14; describe"):
        from_released(STATE, run, bert)
    with pytest.raises(ValueError, match="no weights for these parameters of the task 'visual_entailment': classifier"):
        load(STATE, "visual_entailment")


HEADS = {"vision_proj": (12, 32), "text_proj": (12, 32), "itm_head": (2, 32)}


def with_heads() -> dict[str, torch.Tensor]:
    """The released checkpoint with the heads of pre-training, in the names of ALBEF and mPLUG."""
    generator, state = torch.Generator().manual_seed(5), dict(STATE)
    for name, shape in HEADS.items():
        state |= {f"{name}.weight": torch.randn(shape, generator=generator),
                  f"{name}.bias": torch.randn(shape[:1], generator=generator)}
    return {**state, "temp": torch.tensor(0.05), "image_queue": torch.zeros(12, 8)}


def test_retrieval_is_loaded_from_a_checkpoint_of_pretraining():
    """The shared modules equal those of question answering; the decoder is not needed, whatever is in the file."""
    state = with_heads()
    model, other = load(state, "video_retrieval"), load(STATE, "video_qa")
    parameters = dict(model.named_parameters())
    assert torch.equal(model.contrastive_vision.weight, state["vision_proj.weight"])
    assert torch.equal(model.contrastive_text.bias, state["text_proj.bias"])
    assert torch.equal(model.matching_head.weight, state["itm_head.weight"])
    assert model.temperature.item() == pytest.approx(0.05)
    assert model.config.contrastive_width == 12 and not hasattr(model, "decoder")
    for name, parameter in other.named_parameters():
        if not name.startswith("decoder."):
            assert torch.equal(parameter, parameters.pop(name))
    assert {name.split(".")[0] for name in parameters} == {
        "contrastive_vision", "contrastive_text", "matching_head", "temperature"}
    back = to_released(model)
    assert all(torch.equal(back[name], state[name]) for name in back)
    without = {name: entry for name, entry in state.items() if not name.startswith("text_decoder.")}
    assert all(torch.equal(a, b) for a, b in zip(load(without, "video_retrieval").parameters(), model.parameters()))


def test_heads_with_other_names_are_listed():
    state = {name.replace("vision_proj", "visn_head.proj"): entry for name, entry in with_heads().items()}
    with pytest.raises(ValueError, match="no heads for video_retrieval: vision_proj.bias, vision_proj.weight") as error:
        load(state, "video_retrieval")
    for name in "visn_head", "text_proj.weight", "itm_head.weight", "temp":
        assert name in str(error.value)
    with pytest.raises(ValueError, match="no heads for image_retrieval.*may be heads: none"):
        load(STATE, "image_retrieval")


def test_clip_name_stands_for_the_sizes_of_clip():
    for name, patch, layers in (("ViT-B-16", 16, 12), ("ViT-B-32", 32, 12)):
        dims = SMALL | {"patch": patch, "image_res": 2 * patch, "vision_layers": layers}
        run, bert = released_model.settings(dims)
        del run["clip_dims"]
        run["clip_name"] = name
        state = {name: torch.empty(shape, device="meta") for name, shape in released_model.entries(dims).items()}
        model = from_released(state, run, bert)
        assert (model.config.patch_size, model.config.vision_layers) == (patch, layers)


def test_the_copy_of_the_head_wins():
    word, head = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions"
    model = load(STATE | {word: STATE[word] + 1, f"{head}.bias": STATE[f"{head}.bias"] + 1})
    assert torch.equal(model.decoder.embeddings.word.weight, STATE[f"{head}.decoder.weight"])
    assert torch.equal(model.decoder.head.bias, STATE[f"{head}.decoder.bias"])
    with pytest.raises(ValueError, match="word_embeddings.weight has shape"):
        load(STATE | {word: STATE[word][:-1]})


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6))
def test_positions_are_resized_to_the_resolution_of_the_run(side, frames):
    name = "visual_encoder.visual.positional_embedding"
    model = load(STATE, image_res=8 * side)
    found, given = model.vision_encoder.patch_embed.position, STATE[name]
    grid = given[1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(side, side), mode="bilinear").permute(0, 2, 3, 1).reshape(side**2, -1)
    assert torch.equal(found[0], given[0])
    torch.testing.assert_close(found[1:], expected, atol=1e-6, rtol=1e-6)
    if side == 2:
        assert torch.equal(found, given)
    with torch.no_grad():
        vision = model.encode_vision(torch.randn(1, 3, frames, 8 * side, 8 * side))
    assert vision.shape == (1, 1 + frames * side**2, 32)


def test_positions_that_are_no_square_are_refused():
    name = "visual_encoder.visual.positional_embedding"
    with pytest.raises(ValueError, match=r"positional_embedding has shape \(4, 64\): expected a class token and a"):
        load(STATE | {name: STATE[name][:4]}, image_res=24)


def test_half_precision_files_give_a_float32_model():
    state = {name: entry.half() if entry.is_floating_point() else entry for name, entry in STATE.items()}
    for parameter, full in zip(load(state).parameters(), load(STATE).parameters()):
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, full, atol=1e-3, rtol=1e-3)


def test_to_released_refuses_what_the_released_code_does_not_have():
    for changes, message in (
        ({"vision_head_width": 32}, "vision_head_width=32: expected 64, as in all released checkpoints"),
        ({"vision_head_width": 64, "local_temporal_placement": "figure"}, "local_temporal_placement='figure'"),
    ):
        with pytest.raises(ValueError, match=message):
            to_released(MPLUG2(tiny(**changes), "video_caption"))
    with pytest.raises(ValueError, match="from_released did not make this model"):
        to_released(MPLUG2(tiny(vision_head_width=64), "video_qa"))


def test_other_token_types_and_settings_of_another_type_are_refused():
    run, bert = released_model.settings(SMALL)
    with pytest.raises(ValueError, match="type_vocab_size=3 is not supported"):
        from_released(STATE, run, {**bert, "type_vocab_size": 3})
    with pytest.raises(ValueError, match="run settings: expected a dictionary, found str"):
        from_released(STATE, "released", bert)
