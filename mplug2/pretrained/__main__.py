"""Convert published weights to a checkpoint that eval.py and `train.py --init` read.

    python -m mplug2.pretrained FILE --task video_caption --out runs/released      # released mPLUG-2
    python -m mplug2.pretrained --clip FILE --bert FOLDER --out runs/start          # the start of pre-training

Weights are .pth, .pt, .bin or .safetensors files. The tokenizer is BERT's vocab.txt or tokenizer.json: the one
given with --tokenizer, or else the one in the folder of FILE or of BERT.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

from mplug2.checkpoint import PreprocessConfig, save_model
from mplug2.config import ModelConfig
from mplug2.data.text import Tokenizer, clean
from mplug2.model.mplug2 import MPLUG2
from mplug2.pretrained.bert import from_bert
from mplug2.pretrained.clip import clip_sizes, from_clip
from mplug2.pretrained.entries import setting
from mplug2.pretrained.files import open_settings, open_weights, read_json
from mplug2.pretrained.released import LARGE_BERT, LARGE_RUN, from_released
from mplug2.tasks import PROMPTS, TASKS

RELEASED = [name for name, task in TASKS.items() if not task.components & {"classifier", "box"}]
"""Tasks that need no head of our own."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m mplug2.pretrained", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", help="a released mPLUG-2 checkpoint")
    parser.add_argument("--task", choices=RELEASED, help="default: video_caption, or pretrain with --clip and --bert")
    parser.add_argument("--settings", help="JSON file with the `config` and the `bert_config` of the released run "
                        "(default: the config in FILE, and the bert_config of the large model)")
    parser.add_argument("--clip", help="file or folder of a CLIP ViT, with its settings file next to it")
    parser.add_argument("--quick-gelu", action="store_true",
                        help="state that a CLIP file without a settings file was trained with QuickGELU")
    parser.add_argument("--bert", help="folder of a Hugging Face BERT")
    parser.add_argument("--image-size", type=int, help="with --clip: input resolution in pixels (default: CLIP's)")
    parser.add_argument("--tokenizer", help="vocab.txt or tokenizer.json of BERT")
    parser.add_argument("--out", required=True, help="folder to write")
    options = parser.parse_args(arguments)
    if bool(options.file) == bool(options.clip and options.bert):
        parser.error("give either FILE, a released checkpoint, or both --clip and --bert")
    out = Path(options.out)
    try:
        if out.exists():
            raise ValueError(f"{out} already exists; remove it or choose another folder")
        converted = convert_released(options) if options.file else convert_clip_and_bert(options)
        partial = out.with_name(f".{out.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        save_model(partial, *converted)
        partial.rename(out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    model = converted[0]
    print(f"{out}: {model.task}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def convert_released(options: argparse.Namespace) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """A released checkpoint for one task. ValueError if our prompt, end token or tokenizer differs from its own."""
    contents, task = open_weights(options.file), options.task or "video_caption"
    if options.settings:
        settings = read_json(options.settings)
        run, bert = (setting(settings, name, options.settings) for name in ("config", "bert_config"))
    else:
        run, bert = contents.get("config", LARGE_RUN), LARGE_BERT
    if not isinstance(run, Mapping):
        raise ValueError(f"run settings: expected a dictionary, found {type(run).__name__}; give them with --settings")
    if run.get("eos", "[SEP]") != "[SEP]":
        raise ValueError(f"run settings: eos={run['eos']!r}: expected [SEP], which ends our texts")
    if task.endswith("_caption"):
        ours = PROMPTS[task.removesuffix("_caption")]
        if clean(str(run.get("prompt", ours))) != ours:
            raise ValueError(f"run settings: prompt={run['prompt']!r}, but {task} starts with {ours!r}, and a model "
                             "continues only its own prompt well; choose the other captioning task, or an answering "
                             "task")
    model = from_released(contents, run, bert, task)
    tokenizer = tokenizer_of(model.config, options, Path(options.file).parent)
    return model, tokenizer, PreprocessConfig(run.get("test_num_frames", 16))


def convert_clip_and_bert(options: argparse.Namespace) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """A model in the sizes of CLIP and BERT, filled with their weights. It has a quarter as many fusion layers as
    text layers."""
    clip, settings = open_weights(options.clip), open_settings(options.bert)
    if settings is None:
        raise ValueError(f"{options.bert}: expected a config.json next to the weights")
    sizes = {name: setting(settings, name, f"{options.bert}: config.json") for name in (
        "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size",
        "max_position_embeddings",
    )}
    width, heads, ff_width, layers, vocab_size, max_positions = sizes.values()
    vision = clip_sizes(clip)
    config = ModelConfig(
        **vision | {"image_size": options.image_size or vision["image_size"]}, width=width, heads=heads,
        ff_width=ff_width, text_layers=layers, universal_layers=min(2, layers), fusion_layers=max(1, layers // 4),
        decoder_layers=min(12, layers), vocab_size=vocab_size, max_positions=max_positions,
    )
    model = MPLUG2(config, options.task or "pretrain")
    clip_settings = open_settings(options.clip)
    if options.quick_gelu and clip_settings is None:
        clip_settings = {"quick_gelu": True}
    from_clip(model, clip, clip_settings)
    from_bert(model, options.bert)
    return model, tokenizer_of(config, options, Path(options.bert)), PreprocessConfig()


def tokenizer_of(config: ModelConfig, options: argparse.Namespace, folder: Path) -> Tokenizer:
    """The tokenizer. ValueError if its size is not the model's: with another one every text would be nonsense."""
    if not options.tokenizer and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"{folder}: no vocab.txt or tokenizer.json next to the weights; use --tokenizer with "
                         "that of the BERT that the model was trained with (released: bert-large-uncased)")
    tokenizer = Tokenizer.load(options.tokenizer or folder)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{options.tokenizer or folder}: the tokenizer has {len(tokenizer)} tokens, but the model "
                         f"{config.vocab_size}; use --tokenizer with that of the BERT that it was trained with")
    return tokenizer


if __name__ == "__main__":
    main()
