"""Write a checkpoint of ours from weights of others, once; eval.py and train.py --init take it from there.

    python -m mplug2.pretrained FILE --task video_caption --out runs/released      # released mPLUG-2
    python -m mplug2.pretrained --clip FILE --bert FOLDER --out runs/start          # the starting point of pre-training

Weights are .pth, .pt, .bin or .safetensors. The tokenizer, BERT's vocab.txt or tokenizer.json, is looked for beside
FILE or in FOLDER, if --tokenizer does not say where it is.
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
"""Tasks whose heads a checkpoint of others may hold."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m mplug2.pretrained", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", help="a released mPLUG-2 checkpoint")
    parser.add_argument("--task", choices=RELEASED, help="default: video_caption, or pretrain with --clip and --bert")
    parser.add_argument("--settings", help="JSON object with the settings of the released run as `config` and "
                        "`bert_config`; default: the run's own in FILE, and those of the large model")
    parser.add_argument("--clip", help="file or folder of a CLIP ViT, with its settings beside it")
    parser.add_argument("--quick-gelu", action="store_true",
                        help="say that the CLIP file, which comes without settings, was trained with QuickGELU")
    parser.add_argument("--bert", help="folder of a Hugging Face BERT")
    parser.add_argument("--image-size", type=int, help="pixels a side, with --clip; default: as CLIP was trained")
    parser.add_argument("--tokenizer", help="vocab.txt or tokenizer.json of BERT")
    parser.add_argument("--out", required=True, help="folder to write")
    given = parser.parse_args(arguments)
    if bool(given.file) == bool(given.clip and given.bert):
        parser.error("give either FILE, a released checkpoint, or both --clip and --bert")
    out = Path(given.out)
    try:
        if out.exists():
            raise ValueError(f"{out} exists already; remove it, or choose another folder")
        converted = convert_released(given) if given.file else start(given)
        aside = out.with_name(f".{out.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        save_model(aside, *converted)
        aside.rename(out)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    model = converted[0]
    print(f"{out}: {model.task}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def convert_released(given: argparse.Namespace) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """A released checkpoint for one task. ValueError for another prompt, end token or tokenizer than its own."""
    contents, task = open_weights(given.file), given.task or "video_caption"
    if given.settings:
        settings = read_json(given.settings)
        run, bert = (setting(settings, name, given.settings) for name in ("config", "bert_config"))
    else:
        run, bert = contents.get("config", LARGE_RUN), LARGE_BERT
    if not isinstance(run, Mapping):
        raise ValueError(f"run settings: expected a dictionary, found {type(run).__name__}; give them by --settings")
    if run.get("eos", "[SEP]") != "[SEP]":
        raise ValueError(f"run settings: eos={run['eos']!r}, but our texts end in [SEP]")
    if task.endswith("_caption"):
        ours = PROMPTS[task.removesuffix("_caption")]
        if clean(str(run.get("prompt", ours))) != ours:
            raise ValueError(f"run settings: prompt={run['prompt']!r}, but captions of the task {task} start with "
                             f"{ours!r}; from another prompt than its own a model writes garbled ones: choose the "
                             "other captioning task, or question answering")
    model = from_released(contents, run, bert, task)
    tokenizer = tokenizer_of(model.config, given, Path(given.file).parent)
    return model, tokenizer, PreprocessConfig(run.get("test_num_frames", 16))


def start(given: argparse.Namespace) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """A model of the sizes of CLIP and BERT, filled with both; a quarter as many fusion layers as text layers."""
    clip, settings = open_weights(given.clip), open_settings(given.bert)
    if settings is None:
        raise ValueError(f"{given.bert}: there is no config.json beside these weights")
    sizes = {name: setting(settings, name, f"{given.bert}: config.json") for name in (
        "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size",
        "max_position_embeddings",
    )}
    width, heads, ff_width, layers, vocab_size, max_positions = sizes.values()
    vision = clip_sizes(clip)
    config = ModelConfig(
        **vision | {"image_size": given.image_size or vision["image_size"]}, width=width, heads=heads,
        ff_width=ff_width, text_layers=layers, universal_layers=min(2, layers), fusion_layers=max(1, layers // 4),
        decoder_layers=min(12, layers), vocab_size=vocab_size, max_positions=max_positions,
    )
    model = MPLUG2(config, given.task or "pretrain")
    clip_settings = open_settings(given.clip)
    if given.quick_gelu and clip_settings is None:
        clip_settings = {"quick_gelu": True}
    from_clip(model, clip, clip_settings)
    from_bert(model, given.bert)
    return model, tokenizer_of(config, given, Path(given.bert)), PreprocessConfig()


def tokenizer_of(config: ModelConfig, given: argparse.Namespace, folder: Path) -> Tokenizer:
    """The tokenizer, which must have exactly the tokens of the model: another one makes nonsense of every text."""
    if not given.tokenizer and not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"{folder}: there is no vocab.txt or tokenizer.json beside the weights; give that of the BERT "
                         "that the model was trained with (released: bert-large-uncased) as --tokenizer")
    tokenizer = Tokenizer.load(given.tokenizer or folder)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{given.tokenizer or folder}: a tokenizer of {len(tokenizer)} tokens, but the model has "
                         f"{config.vocab_size}; give the one of the BERT that it was trained with as --tokenizer")
    return tokenizer


if __name__ == "__main__":
    main()
