"""CLIP and BERT in small random configurations: our encoders agree with those of transformers; and every error."""

import re

import pytest
import torch
import transformers as hf  # its models are imported when they are used
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from mplug2.config import tiny
from mplug2.model.mplug2 import MPLUG2
from mplug2.pretrained import from_bert, from_clip

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def randomized(module, seed=0):
    """Replace all initial zeros and ones by noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.data == 1)
    return module.eval()


def clip_model(width=64, layers=2, side=2, patch=8, vision_only=False, seed=0, **changes):
    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "patch_size": patch,
        "num_attention_heads": width // 64, "image_size": side * patch, **changes,
    }
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1,
    }
    if vision_only:
        return randomized(hf.CLIPVisionModel(hf.CLIPVisionConfig(**vision)), seed)
    return randomized(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), seed)


def vision_config(width=64, layers=2, side=2, patch=8, **changes):
    return tiny(
        image_size=side * patch, patch_size=patch, vision_width=width, vision_layers=layers, vision_head_width=64,
        **changes,
    )


def openai_names(model):
    """The state dict of a Hugging Face CLIP in the names of OpenAI and open_clip."""
    renamed = {}
    for name, entry in model.state_dict().items():
        if not name.startswith("vision_model."):
            continue
        for theirs, first in (
            ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
            ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
            ("vision_model.embeddings.patch_embedding", "visual.conv1"), ("vision_model.pre_layrnorm", "visual.ln_pre"),
            ("vision_model.post_layernorm", "visual.ln_post"),
            ("vision_model.encoder.layers", "visual.transformer.resblocks"), ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(theirs, first)
        renamed[name] = entry
    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
    rest = (
        "positional_embedding", "text_projection", "logit_scale", "visual.proj", "token_embedding.weight",
        "ln_final.weight", "transformer.resblocks.0.ln_1.bias",
    )
    return renamed | {name: torch.zeros(2) for name in rest}


def tower(clip):
    """The vision tower. In transformers 4 a CLIPVisionModel wraps it too."""
    return getattr(clip, "vision_model", clip)


@torch.no_grad()
def check_vision(model, clip):
    """For an image, our encoder is CLIP's last hidden state with its last LayerNorm on every token."""
    vision = tower(clip)
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    expected = vision.post_layernorm(vision(pixels).last_hidden_state)
    torch.testing.assert_close(model.vision_encoder(pixels[:, :, None]), expected, **CLOSE)


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([64, 128, 192]), st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.booleans(),
       st.booleans(), st.integers(0, 2**16))
def test_images_are_encoded_as_in_clip(width, layers, side, patch, vision_only, downsampling, seed):
    clip = clip_model(width, layers, side, patch, vision_only, seed)
    model = MPLUG2(vision_config(width, layers, side, patch, temporal_stride=2 * downsampling)).eval()
    randomized(model.vision_encoder)  # local temporal modules too: from_clip resets them to identities
    from_clip(model, clip.state_dict(), clip.config.to_dict())
    check_vision(model, clip)


def test_every_naming_scheme_and_file_type_of_clip_gives_the_same_encoder(tmp_path):
    clip, config = clip_model(width=128), vision_config(width=128)
    clip.save_pretrained(tmp_path / "hf")
    vision = clip_model(width=128, vision_only=True)
    tower(vision).load_state_dict(tower(clip).state_dict())
    vision.save_pretrained(tmp_path / "hf_vision")
    first = openai_names(clip)
    torch.save(first, tmp_path / "ViT.pt")
    prefixed = {f"vision_model.{name}": entry for name, entry in tower(clip).state_dict().items()}
    torch.save(prefixed, tmp_path / "hf" / "old.bin")
    (tmp_path / "open_clip").mkdir()
    save_file(first, tmp_path / "open_clip" / "open_clip_model.safetensors")
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(
        '{"model_cfg": {"quick_gelu": true, "vision_cfg": {"layers": 2, "width": 128}}}'
    )
    for source, given_settings in (
        (tmp_path / "hf", None), (tmp_path / "hf_vision" / "model.safetensors", None),
        (tmp_path / "hf" / "old.bin", None), (tmp_path / "open_clip", None),
        (tmp_path / "ViT.pt", {"quick_gelu": True}),
    ):
        model = MPLUG2(config).eval()
        from_clip(model, source, given_settings)
        check_vision(model, clip)


def test_a_video_without_motion_is_encoded_like_its_frame():
    """Temporal modules are identities, and with temporal down-sampling the kernel is at the center tap."""
    clip = clip_model()
    for downsampling in (False, True):
        model = MPLUG2(vision_config(temporal_stride=2 * downsampling)).eval()
        from_clip(model, clip.state_dict(), clip.config.to_dict())
        image = torch.randn(1, 3, 1, 16, 16)
        with torch.no_grad():
            one, many = model.vision_encoder(image), model.vision_encoder(image.expand(-1, -1, 5, -1, -1))
        frames = 3 if downsampling else 5
        torch.testing.assert_close(many[:, 1:], one[:, 1:].repeat(1, frames, 1), **CLOSE)


def test_positions_of_clip_are_resized():
    clip = clip_model(side=2)
    model = MPLUG2(vision_config(side=3))
    from_clip(model, clip.state_dict(), clip.config.to_dict())
    given = clip.vision_model.embeddings.position_embedding.weight
    expected = F.interpolate(given[1:].T.reshape(1, 64, 2, 2), size=(3, 3), mode="bilinear").reshape(64, 9).T
    torch.testing.assert_close(model.vision_encoder.patch_embed.position, torch.cat([given[:1], expected]))


def test_an_unsupported_clip_is_refused_by_name():
    model, clip = MPLUG2(vision_config()), clip_model()
    state, found = clip.state_dict(), clip.config.to_dict()
    before = [parameter.clone() for parameter in model.parameters()]

    def vision(**changes):
        return found | {"vision_config": found["vision_config"] | changes}

    first = openai_names(clip)
    for source, given_settings, message in (
        (state, vision(hidden_act="gelu"), "hidden_act='gelu' is not supported: .* hidden_act='quick_gelu'"),
        (state, vision(num_attention_heads=2), "num_attention_heads=2 is not supported: .*=1"),
        (state, found | {"vision_config": {}}, "num_attention_heads=12 is not supported"),  # the default is left out
        (state, vision(layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
        (state, found | {"model_type": "siglip"}, "model_type='siglip': expected clip"),
        (state, None, "the activation of these weights is unknown"),
        (first, None, "the activation of these weights is unknown"),
        (first, {"quick_gelu": False}, "quick_gelu=False is not supported"),
        (first, {"model_cfg": {"vision_cfg": {"width": 64}}}, "quick_gelu=False is not supported"),
        (first, {"quick_gelu": True, "vision_cfg": {"head_width": 32}}, "head_width=32 is not supported: .*=64"),
        (first | {"visual.ls": torch.ones(1)}, {"quick_gelu": True}, "neither used nor known to be unused: visual.ls"),
        ({"visual.trunk.norm.weight": torch.ones(1)}, {"quick_gelu": True}, "no class embedding of a ViT"),
        (clip_model(layers=3).state_dict(), found, "16 entries are neither used .*layers.2.layer_norm1.bias"),
        (clip_model(layers=1).state_dict(), found, "16 entries are missing: .*layers.1.layer_norm1.bias"),
        (clip_model(patch=4, side=4).state_dict(), found, r"patch_embedding.weight has shape \(64, 3, 4, 4\)"),
        (clip_model(intermediate_size=128).state_dict(), found, r"fc1.weight has shape \(128, 64\), .* \(256, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_clip(model, source, given_settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())), "a refused source changed the model"


def bert_config(width=32, heads=2, layers=4, **changes):
    return hf.BertConfig(hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=48,
                         vocab_size=50, max_position_embeddings=16, **changes)


def text_config(width=32, heads=2, **changes):
    sizes = {"width": width, "heads": heads, "ff_width": 48, "vocab_size": 50, "max_positions": 16, "text_layers": 4}
    return tiny(**sizes | changes)


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([8, 16]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 9),
       st.integers(0, 2**16))
def test_text_is_encoded_as_in_bert(heads, head_width, layers, universal, length, seed):
    config = bert_config(heads * head_width, heads, layers)
    bert = randomized(hf.BertModel(config), seed)
    model = MPLUG2(text_config(heads * head_width, heads, text_layers=layers, universal_layers=min(universal, layers),
                               fusion_layers=1, decoder_layers=1)).eval()
    from_bert(model, bert.state_dict(), config.to_dict())
    ids = torch.randint(50, (2, length))
    mask = torch.arange(length) < torch.tensor([[length], [1 + seed % length]])
    with torch.no_grad():
        found, expected = model.encode_text(ids, mask), bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(found[mask], expected[mask], **CLOSE)


def test_decoder_and_heads_agree_with_bert():
    config = bert_config()
    bert = randomized(hf.BertForMaskedLM(config))
    model = MPLUG2(text_config(decoder_layers=3)).eval()
    randomized(model.decoder, seed=1)
    from_bert(model, bert.state_dict(), config.to_dict())
    causal = hf.BertLMHeadModel(bert_config(layers=3, is_decoder=True, add_cross_attention=True)).eval()
    state = {name: entry for name, entry in bert.state_dict().items() if ".layer.3." not in name}
    for i, layer in enumerate(model.decoder.layers):  # BERT has no cross-attention: copy ours
        cross = layer.cross_attention
        values = [cross.query.weight, *cross.key_value.weight.chunk(2)]
        values += [cross.query.bias, *cross.key_value.bias.chunk(2)]
        values += [cross.out.weight, cross.out.bias, layer.cross_norm.weight, layer.cross_norm.bias]
        names = [f"self.{part}.{kind}" for kind in ("weight", "bias") for part in ("query", "key", "value")]
        names += ["output.dense.weight", "output.dense.bias", "output.LayerNorm.weight", "output.LayerNorm.bias"]
        state |= {f"bert.encoder.layer.{i}.crossattention.{name}": value for name, value in zip(names, values)}
    causal.load_state_dict(state)
    ids, memory = torch.randint(50, (2, 6)), torch.randn(2, 3, 32)
    mask = torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        expected = causal(ids, encoder_hidden_states=memory).logits
        torch.testing.assert_close(model.decode(ids, mask, memory), expected, **CLOSE)
        torch.testing.assert_close(model.mlm_logits(model.encode_text(ids, mask)), bert(ids).logits, **CLOSE)


def test_fusion_has_the_last_layers_of_bert_and_cross_attention_keeps_its_values():
    config = bert_config()
    bert = randomized(hf.BertModel(config))
    model = MPLUG2(text_config(fusion_layers=2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    from_bert(model, bert.state_dict(), config.to_dict())
    for ours, theirs in zip(model.fusion.layers, bert.encoder.layer[2:], strict=True):
        attention = theirs.attention.self
        parts = [attention.query.weight, attention.key.weight, attention.value.weight]
        assert torch.equal(ours.self_attention.qkv.weight, torch.cat(parts))
        assert torch.equal(ours.feed_forward_norm.bias, theirs.output.LayerNorm.bias)
    kept = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    not_in_bert = re.compile(
        r".*\.cross_(attention|norm)\..*|vision_\w+\..*|universal\.(latents|vision_norm\..*)|contrastive_.*|"
        r"temperature|matching_head\..*|decoder\.head\..*|masked_head\..*"  # this source has no language-model head
    )
    assert kept == {name for name in before if not_in_bert.fullmatch(name)}


def test_folders_and_old_names_of_bert_are_read(tmp_path):
    config = bert_config()
    bert = randomized(hf.BertForMaskedLM(config))
    expected = MPLUG2(text_config())
    from_bert(expected, bert.state_dict(), config.to_dict())
    bert.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): entry
        for name, entry in bert.state_dict().items()
    }
    old |= {"bert.pooler.dense.bias": torch.ones(32), "bert.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(old, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "old" / "config.json").write_text((tmp_path / "new" / "config.json").read_text())
    for folder in ("new", "old"):
        model = MPLUG2(text_config())
        initial = {name: parameter.clone() for name, parameter in model.named_parameters()}
        from_bert(model, tmp_path / folder)
        for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(found, wanted) or torch.equal(found, initial[name])
        assert torch.equal(model.decoder.head.norm.weight, bert.cls.predictions.transform.LayerNorm.weight)


def test_an_unsupported_bert_is_refused_by_name():
    model, config = MPLUG2(text_config()), bert_config()
    state, found = hf.BertForMaskedLM(config).state_dict(), config.to_dict()
    before = [parameter.clone() for parameter in model.parameters()]
    for source, given_settings, message in (
        (state, None, "no settings next to the weights"),
        (state, found | {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        (state, found | {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        (state, found | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        (state, found | {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        (state, found | {"num_attention_heads": 4}, "num_attention_heads=4, but the model has heads=2"),
        (state, found | {"num_attention_heads": 1}, "num_attention_heads=1, but the model has heads=2"),
        (state, found | {"num_hidden_layers": 3}, "num_hidden_layers=3, but the model has text_layers=4"),
        (state | {"bert.extra": torch.ones(1)}, found, "neither used nor known to be unused: extra"),
        ({name: entry for name, entry in state.items() if "layer.1." not in name}, found, "16 entries are missing"),
        (hf.BertModel(bert_config(width=64)).state_dict(), found, r"word_embeddings.weight has shape \(50, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            from_bert(model, source, given_settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())), "a refused source changed the model"
