"""Parity with the released code: its reference tensors, losses, gradients, beams and rankings, for two variants.

golden/README.md explains the files and the names in them.
"""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from mplug2.data.batches import label_positions
from mplug2.generation import SpecialTokens, beam_search, rank_answers
from mplug2.model.attention import JointMemory
from mplug2.model.mplug2 import answer_memory
from mplug2.objectives.losses import language_loss
from mplug2.pretrained import from_released, to_released

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.released
SPECIAL = SpecialTokens(cls=101, sep=102, pad=0)
BEAMS = {  # name of the settings in results.json -> beams, minimum and maximum length
    "beam5_min3_max12": (5, 3, 12), "beam5_min1_max10": (5, 1, 10), "beam5_min4_max20": (5, 4, 20),
    "beam3_min0_max7": (3, 0, 7), "beam1_min2_max9": (1, 2, 9),
}
variants = pytest.mark.parametrize("variant", ["released", "options"])


@cache
def read(variant):
    """Reference tensors, results, settings and weights of a variant."""
    folder = GOLDEN / variant
    tensors, weights = (torch.load(folder / name, weights_only=True) for name in ("golden.pt", "weights.pt"))
    results, settings = (json.loads((folder / name).read_text()) for name in ("results.json", "config.json"))
    return tensors, results, settings, weights


@cache
def model_of(variant, task="video_qa"):
    _, _, settings, weights = read(variant)
    return from_released(weights, settings["config"], settings["bert_config"], task)


@cache
def computed(variant):
    """Our tensors under the reference names and in their layouts."""
    given, _, settings, _ = read(variant)
    model = copy.deepcopy(model_of(variant))
    calls = {}

    def watch(name, module):
        module.register_forward_hook(lambda module, inputs, output: calls.setdefault(name, []).append(output))

    watch("visual.ln_pre", model.vision_encoder.patch_embed.norm)
    for i, block in enumerate(model.vision_encoder.blocks):
        watch(f"visual.block.{i}", block)
    watch("visual_encoder", model.vision_encoder)
    watch("visn_fc", model.vision_projection)
    watch("visn_proj", model.vision_norm)
    for i, layer in enumerate([*model.text_encoder.layers, *model.universal.layers]):
        watch(f"layer.{i}", layer)
    watch("text.embeddings", model.text_encoder.embeddings)
    first = settings["dims"]["num_hidden_layers"] - model.config.fusion_layers
    for i, layer in enumerate(model.fusion.layers):
        watch(f"fusion.layer.{first + i}", layer)
    watch("decoder.embeddings", model.decoder.embeddings)
    for i, layer in enumerate(model.decoder.layers):
        watch(f"decoder.layer.{i}", layer)

    found = {}
    caption, question, answer = (
        (given[f"in.{name}_ids"], given[f"in.{name}_mask"].bool()) for name in ("caption", "question", "answer")
    )
    memories, universal = {}, range(len(model.text_encoder.layers), model.config.text_layers)
    with torch.no_grad():
        for kind in ("video", "image"):
            vision = found[f"{kind}.embeds"] = model.encode_vision(given[f"in.{kind}"])
            for name in ("visual_encoder", "visn_fc", "visn_proj"):
                found[f"{kind}.{name}"] = calls[name][-1]
            found[f"{kind}.v_module"] = calls[f"layer.{universal[-1]}"][-1]
            found[f"caption.{kind}.logits"] = model.decode(*caption, vision)
            positions = label_positions(caption[1], settings["prompt_length"])
            found[f"caption.{kind}.loss"] = language_loss(model, *caption, vision, positions)
        found["caption.video.loss_no_prompt"] = language_loss(
            model, *caption, found["video.embeds"], label_positions(caption[1])
        )
        found |= {f"v_module.layer.{i}": calls[f"layer.{i}"][0] for i in universal}
        found |= {name: outputs[0] for name, outputs in calls.items() if name.startswith(("visual.", "decoder."))}

        for name in [name for name in calls if name.startswith("layer.")]:
            calls[name].clear()
        for kind in ("image", "video"):
            text = model.encode_text(*question)
            found["fusion.image"], found["fusion.text"] = fused = model.fuse(found[f"{kind}.embeds"], text, question[1])
            memories[kind] = answer_memory(*fused, question[1])
            logits, losses = answer_losses(model, given, *memories[kind])
            found |= {"qa.logits": logits, "qa.answer_loss": losses}
            found["qa.loss" if kind == "video" else "qa.image.loss"] = weighted(losses, given)
        found["qa.states_mask"] = memories["video"][1]
        found |= {f"text.{name}": outputs[0] for name, outputs in calls.items() if name.startswith("layer.")}
        found |= {name: outputs[-1] for name, outputs in calls.items() if name.startswith("fusion.")}
        found["text.embeddings"] = calls["text.embeddings"][0]
        memory, memory_mask = memories["video"]
        for k in (4, 12):
            bank = given["in.bank_ids"], given["in.bank_mask"].bool()
            found[f"rank.k{k}.ids"], found[f"rank.k{k}.probs"] = rank_answers(model, memory, *bank, k, memory_mask)
    found["visual.ln_pre"] = rearrange(found["visual.ln_pre"], "b t m d -> (b t) m d")
    for i in range(model.config.vision_layers):
        found[f"visual.block.{i}"] = rearrange(found[f"visual.block.{i}"], "b t m d -> m (b t) d")
    return found


def answer_losses(model, given, memory, memory_mask):
    """Logits, and the loss of each answer summed over its tokens. A question has `in.qa_k` answers."""
    ids, mask = given["in.answer_ids"], given["in.answer_mask"].bool()
    asked = torch.repeat_interleave(torch.arange(memory.shape[0]), given["in.qa_k"])
    logits = model.decode(ids, mask, JointMemory(memory.vision[asked], memory.text[asked]), memory_mask[asked])
    losses = F.cross_entropy(rearrange(logits[:, :-1], "a l s -> a s l"), ids[:, 1:], reduction="none")
    return logits, (losses * mask[:, 1:]).sum(dim=1)


def weighted(losses, given):
    return (losses * given["in.qa_weights"]).sum() / len(given["in.qa_k"])


TENSORS = [
    (variant, name) for variant in ("released", "options") for name in read(variant)[0] if not name.startswith("in.")
]


@pytest.mark.parametrize("variant, name", TENSORS)
def test_tensors_agree(variant, name):
    expected, found = read(variant)[0][name], computed(variant)[name]
    assert found.shape == expected.shape
    if expected.is_floating_point():
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    else:
        assert found.tolist() == expected.tolist()


@variants
@pytest.mark.parametrize("case", ["caption_video", "caption_image", "qa"])
@pytest.mark.parametrize("beams", BEAMS)
def test_beam_search_agrees(variant, case, beams):
    given, results, _, _ = read(variant)
    model, found, count = model_of(variant), computed(variant), BEAMS[beams]
    memory, memory_mask = found["video.embeds" if case == "caption_video" else "image.embeds"], None
    if case == "qa":
        mask = given["in.question_mask"].bool()
        memory, memory_mask = answer_memory(found["fusion.image"], found["fusion.text"], mask)
    start = torch.full((memory.shape[0], 1), SPECIAL.cls)
    hypotheses = beam_search(model, memory, start, SPECIAL, *count, memory_mask=memory_mask)
    expected = results["beam"][beams][case]
    for sample, ids, scores in zip(hypotheses, expected["ids"], expected["scores"], strict=True):
        best = sample[: count[0]]  # the released code returns only these
        assert [[SPECIAL.cls, *found_ids] for _, found_ids in best] == ids
        assert [score for score, _ in best] == pytest.approx(scores, abs=1e-4)


@variants
@pytest.mark.parametrize("task", ["caption", "qa"])
def test_gradients_agree(variant, task):
    given, results, settings, _ = read(variant)
    model = copy.deepcopy(model_of(variant))
    vision = model.encode_vision(given["in.video"])
    if task == "caption":
        ids, mask = given["in.caption_ids"], given["in.caption_mask"].bool()
        loss = language_loss(model, ids, mask, vision, label_positions(mask, settings["prompt_length"]))
    else:
        mask = given["in.question_mask"].bool()
        memory = answer_memory(*model.fuse(vision, model.encode_text(given["in.question_ids"], mask), mask), mask)
        loss = weighted(answer_losses(model, given, *memory)[1], given)
    loss.backward()
    parameters = to_released(model)
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, float("nan")) if parameter.grad is None else parameter.grad
    gradients = to_released(model)  # the same names and layouts

    for name, digest in results["grad_digest"][task].items():
        gradient = gradients.get(name)
        if digest is None:
            assert gradient is None or gradient.isnan().all(), name
            continue
        gradient, parameter = gradient.double(), parameters[name].double()
        noise = 1e-4 * (1 + digest["norm"])
        assert gradient.norm().item() == pytest.approx(digest["norm"], abs=noise), name
        assert gradient.sum().item() == pytest.approx(digest["sum"], abs=noise), name
        assert (gradient * parameter).sum().item() == pytest.approx(digest["dot_param"], abs=noise), name
