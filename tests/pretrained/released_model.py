"""A second implementation of the released model in any size: its entries, and what it computes, in plain torch.

It uses the released names, convolutions, unfused projections and additive masks, and shares no code with the package.
`golden/` has reference tensors for two variants; this file is the oracle for all other sizes. Sizes have the names of
`dims` in golden/*/config.json, and `latents`.
"""

import torch
from torch.nn import functional as F


def entries(d):
    """Name -> shape of every entry of a fine-tuned checkpoint."""
    h, v, found = d["hidden"], d["vision_width"], {}

    def linear(name, rows, columns, *kernel):
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns, *kernel), (rows,)

    def norm(name, width):
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    def clip_block(name, width):
        found[f"{name}.attn.in_proj_weight"], found[f"{name}.attn.in_proj_bias"] = (3 * width, width), (3 * width,)
        linear(f"{name}.attn.out_proj", width, width)
        linear(f"{name}.mlp.c_fc", 4 * width, width)
        linear(f"{name}.mlp.c_proj", width, 4 * width)
        norm(f"{name}.ln_1", width)
        norm(f"{name}.ln_2", width)

    def attention(name):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{name}.{part}", h, h)
        norm(f"{name}.output.LayerNorm", h)

    def embeddings(name):
        found[f"{name}.embeddings.position_ids"] = (1, d["max_pos"])
        for part, rows in (("word", d["vocab"]), ("position", d["max_pos"]), ("token_type", 2)):
            found[f"{name}.embeddings.{part}_embeddings.weight"] = (rows, h)
        norm(f"{name}.embeddings.LayerNorm", h)

    def layers(name, count, cross, universal):
        for i in range(count):
            layer = f"{name}.encoder.layer.{i}"
            attention(f"{layer}.attention")
            if cross or i in universal:
                attention(f"{layer}.crossattention")
            if i in universal[:1]:
                found[f"{layer}.latents"] = (d["latents"], h)
            for suffix in ("", "_vision") if i in universal else ("",):
                linear(f"{layer}.intermediate{suffix}.dense", d["intermediate"], h)
                linear(f"{layer}.output{suffix}.dense", h, d["intermediate"])
                norm(f"{layer}.output{suffix}.LayerNorm", h)

    norm("visn_emb_norm", h)
    if v != h:
        linear("visn_fc", h, v)
        norm("visn_layer_norm", h)
    tower, clip = "visual_encoder", d["clip_width"]
    found[f"{tower}.positional_embedding"] = (d["clip_ctx"], clip)
    found[f"{tower}.text_projection"] = (clip, d["clip_embed"])
    found[f"{tower}.logit_scale"] = ()
    found[f"{tower}.token_embedding.weight"] = (d["clip_vocab"], clip)
    norm(f"{tower}.ln_final", clip)
    for i in range(d["clip_layers"]):
        clip_block(f"{tower}.transformer.resblocks.{i}", clip)
    tower = "visual_encoder.visual"
    found[f"{tower}.class_embedding"] = (v,)
    found[f"{tower}.positional_embedding"] = (1 + (d["image_res"] // d["patch"]) ** 2, v)
    found[f"{tower}.proj"] = (v, d["clip_embed"])
    found[f"{tower}.conv1.weight"] = (v, 3, 3 if d["temporal_downsampling"] else 1, d["patch"], d["patch"])
    norm(f"{tower}.ln_pre", v)
    norm(f"{tower}.ln_post", v)
    for i in range(d["vision_layers"]):
        block = f"{tower}.transformer.resblocks.{i}"
        clip_block(block, v)
        for temporal in (f"{block}.lmhra1", f"{block}.lmhra2"):
            norm(f"{temporal}.ln", v)
            linear(f"{temporal}.down_proj", v // 2, v, 1, 1, 1)
            linear(f"{temporal}.conv", v // 2, 1, 3, 1, 1)
            linear(f"{temporal}.up_proj", v, v // 2, 1, 1, 1)

    embeddings("text_encoder")
    layers("text_encoder", d["text_encoder_layers"], False, _last(d["text_encoder_layers"], d["num_uni_layer"]))
    embeddings("fusion_encoder")
    layers("fusion_encoder", d["num_hidden_layers"], True, range(0))
    embeddings("text_decoder.bert")
    # The decoder's last layers are built like universal layers, with latents if the first of them exists.
    decoder, universal = d["text_decode_layers"], d["num_uni_layer"]
    layers("text_decoder.bert", decoder, True, _last(decoder, universal))
    if universal > decoder:
        del found["text_decoder.bert.encoder.layer.0.latents"]
    head = "text_decoder.cls.predictions"
    found[f"{head}.bias"] = (d["vocab"],)
    linear(f"{head}.transform.dense", h, h)
    norm(f"{head}.transform.LayerNorm", h)
    linear(f"{head}.decoder", d["vocab"], h)
    return found


def _last(count, universal):
    return range(max(0, count - universal), count)


def random_state(d, seed=0):
    """Random weights, large enough to keep activations apart. The duplicated entries are equal."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids")
        else torch.randn(shape, generator=generator) * (0.3 if len(shape) < 2 else 0.15) + name.endswith("norm.weight")
        for name, shape in entries(d).items()
    }
    head = "text_decoder.cls.predictions"
    state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"].clone()
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"].clone()
    return state


def settings(d):
    """The run settings and the BERT settings for these sizes."""
    run = {
        "clip_name": "custom", "image_res": d["image_res"], "vision_width": d["vision_width"],
        "temporal_stride": d["temporal_stride"], "temporal_downsampling": d["temporal_downsampling"],
        "clip_dims": {"vision_layers": d["vision_layers"], "vision_patch_size": d["patch"]},
    }
    bert = {
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12,
        "hidden_size": d["hidden"], "num_attention_heads": d["heads"], "intermediate_size": d["intermediate"],
        "max_position_embeddings": d["max_pos"], "vocab_size": d["vocab"], "type_vocab_size": 2,
        **{name: d[name] for name in ("num_hidden_layers", "text_encoder_layers", "fusion_layers", "num_uni_layer",
                                      "text_decode_layers", "stride_layer")},
    }
    return run, bert


class Released:
    """What the released code computes with a state dict, in evaluation mode."""

    def __init__(self, state, d):
        self.state, self.d = state, d

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, eps=1e-12):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def vision(self, pixels):
        """B 3 T H W -> V'."""
        tower, d = "visual_encoder.visual", self.d
        stride, padding = (d["temporal_stride"], 1) if d["temporal_downsampling"] else (1, 0)
        x = F.conv3d(pixels, self.state[f"{tower}.conv1.weight"], stride=(stride, d["patch"], d["patch"]),
                     padding=(padding, 0, 0))
        b, v, t, rows, _ = x.shape
        x = x.permute(0, 2, 3, 4, 1).reshape(b * t, rows * rows, v)
        x = torch.cat([self.state[f"{tower}.class_embedding"].expand(b * t, 1, v), x], dim=1)
        x = self.norm(f"{tower}.ln_pre", x + self.state[f"{tower}.positional_embedding"], 1e-5)
        for i in range(d["vision_layers"]):
            block = f"{tower}.transformer.resblocks.{i}"
            x = self.temporal(f"{block}.lmhra1", x, b)
            y = self.norm(f"{block}.ln_1", x, 1e-5).transpose(0, 1)
            in_weight, in_bias, out_weight, out_bias = (
                self.state[f"{block}.attn.{part}"]
                for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
            )
            y, _ = F.multi_head_attention_forward(
                y, y, y, v, v // 64, in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias,
                need_weights=False,
            )
            x = self.temporal(f"{block}.lmhra2", x + y.transpose(0, 1), b)
            y = self.linear(f"{block}.mlp.c_fc", self.norm(f"{block}.ln_2", x, 1e-5))
            x = x + self.linear(f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))
        x = x.reshape(b, t, -1, v)
        x = torch.cat([x[:, :, 0].mean(dim=1, keepdim=True), x[:, :, 1:].flatten(1, 2)], dim=1)
        x = self.norm(f"{tower}.ln_post", x, 1e-5)
        if d["vision_width"] != d["hidden"]:
            x = self.norm("visn_layer_norm", self.linear("visn_fc", x))
        universal = list(_last(d["text_encoder_layers"], d["num_uni_layer"]))
        stream = self.state[f"text_encoder.encoder.layer.{universal[0]}.latents"].expand(b, -1, -1)
        for i in universal[:-1]:
            stream = self.layer(f"text_encoder.encoder.layer.{i}", stream, memory=x)
        stream = self.layer(f"text_encoder.encoder.layer.{universal[-1]}", x, memory=stream)
        return self.norm("visn_emb_norm", x + stream)

    def temporal(self, name, x, b):
        frames, m, v = x.shape  # class token and patches of each frame
        y = self.norm(f"{name}.ln", x[:, 1:], 1e-5).reshape(b, frames // b, m - 1, 1, v).permute(0, 4, 1, 2, 3)

        def conv(part, y, **options):
            return F.conv3d(y, self.state[f"{name}.{part}.weight"], self.state[f"{name}.{part}.bias"], **options)

        y = conv("conv", conv("down_proj", y), padding=(1, 0, 0), groups=v // 2)
        y = conv("up_proj", y * torch.sigmoid(1.702 * y))
        return torch.cat([x[:, :1], x[:, 1:] + y.permute(0, 2, 3, 4, 1).reshape(frames, m - 1, v)], dim=1)

    def attention(self, name, x, memory, mask):
        heads = self.d["heads"]
        query, key, value = (
            self.linear(f"{name}.self.{part}", y).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part, y in (("query", x), ("key", memory), ("value", memory))
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores + (1 - mask.float()) * -10000.0
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        return self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", mixed))

    def layer(self, name, x, mask=None, memory=None, memory_mask=None):
        x = self.attention(f"{name}.attention", x, x, mask)
        if memory is not None:
            x = self.attention(f"{name}.crossattention", x, memory, memory_mask)
        y = self.linear(f"{name}.output.dense", F.gelu(self.linear(f"{name}.intermediate.dense", x)))
        return self.norm(f"{name}.output.LayerNorm", x + y)

    def embed(self, name, ids):
        word, position, token_type = (
            self.state[f"{name}.embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type")
        )
        x = word[ids] + position[: ids.shape[1]] + token_type[0]
        return self.norm(f"{name}.embeddings.LayerNorm", x)

    def text(self, ids, mask):
        x = self.embed("text_encoder", ids)
        for i in range(self.d["text_encoder_layers"]):
            x = self.layer(f"text_encoder.encoder.layer.{i}", x, mask[:, None, None])
        return x

    def fuse(self, vision, text, mask):
        first = self.d["num_hidden_layers"] - self.d["fusion_layers"]
        for i in range(self.d["fusion_layers"]):
            name = f"fusion_encoder.encoder.layer.{first + i}"
            if i and i % self.d["stride_layer"] == 0:
                joint = torch.cat([torch.ones_like(vision[:, :, 0]), mask], dim=1)
                both = self.layer(name, torch.cat([vision, text], dim=1), joint[:, None, None])
                vision, text = vision + both[:, : vision.shape[1]], both[:, vision.shape[1]:]
            else:
                text = self.layer(name, text, mask[:, None, None], vision)
        return vision, text

    def decode(self, ids, mask, memory, memory_mask):
        x, causal = self.embed("text_decoder.bert", ids), torch.ones(ids.shape[1], ids.shape[1]).tril() * mask[:, None]
        masks = causal[:, None], memory_mask[:, None, None]
        for i in range(self.d["text_decode_layers"]):
            x = self.layer(f"text_decoder.bert.encoder.layer.{i}", x, masks[0], memory, masks[1])
        head = "text_decoder.cls.predictions"
        x = self.norm(f"{head}.transform.LayerNorm", F.gelu(self.linear(f"{head}.transform.dense", x)))
        return self.linear(f"{head}.decoder", x)
