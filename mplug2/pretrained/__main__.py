"""Convert published weights to a checkpoint that eval.py and `train.py --init` read.

    python -m mplug2.pretrained FILE --task video_caption --out runs/released      # released mPLUG-2
    python -m mplug2.pretrained --clip FILE --bert FOLDER --out runs/start          # the start of pre-training

Weights are .pth, .pt, .bin or .safetensors files. The tokenizer is BERT's vocab.txt or tokenizer.json: the one
given with --tokenizer, or else the one in the folder of FILE or of BERT.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mplug2.checkpoint import PreprocessConfig, read_json_object, save_model
from mplug2.config import ModelConfig
from mplug2.data.text import Tokenizer, clean
from mplug2.did_you_mean import did_you_mean
from mplug2.flags import check_range, one_line_errors, parse
from mplug2.model.mplug2 import MPLUG2
from mplug2.pretrained.bert import from_bert
from mplug2.pretrained.clip import clip_sizes, from_clip
from mplug2.pretrained.entries import setting
from mplug2.pretrained.files import open_settings, open_weights
from mplug2.pretrained.released import LARGE_BERT, LARGE_RUN, from_released
from mplug2.tasks import PROMPTS, TASKS

RELEASED = [name for name, task in TASKS.items() if not task.components & {"classifier", "box"}]
"""Tasks that need no head of our own."""


PROG = "python -m mplug2.pretrained"


@dataclass(frozen=True)
class ConversionSettings:
    file: str = field(default="", metadata={"positional": True})
    """A released mPLUG-2 checkpoint."""
    task: str = field(default="", metadata={"known": RELEASED})
    """Task of the model. Default: video_caption, or pretrain with --clip and --bert."""
    settings: str = ""
    """JSON file with the `config` and the `bert_config` of the released run. Default: the config in FILE, and the
    bert_config of the large model."""
    clip: str = ""
    """File or folder of a CLIP ViT, with its settings file next to it."""
    quick_gelu: bool = False
    """State that a CLIP file without a settings file was trained with QuickGELU."""
    bert: str = ""
    """Folder of a Hugging Face BERT."""
    image_size: int | None = None
    """With --clip: input resolution in pixels. Default: CLIP's."""
    tokenizer: str = ""
    """vocab.txt or tokenizer.json of BERT. Default: the one next to the weights."""
    out: str = ""
    """Folder to write."""

    def __post_init__(self):
        if bool(self.file) == bool(self.clip and self.bert):
            raise ValueError("give either FILE, a released checkpoint, or both --clip and --bert")
        if not self.out:
            raise ValueError("no folder to write: name it with --out")
        if self.task and self.task not in RELEASED:
            raise ValueError(f"task={self.task!r}{did_you_mean(self.task, RELEASED)}: expected one of "
                             f"{', '.join(RELEASED)}")
        check_range(self, "image_size", 1)


def main(arguments: list[str] | None = None) -> None:
    options = parse(ConversionSettings, __doc__, PROG, arguments)
    out = Path(options.out)
    with one_line_errors(PROG):
        if out.exists():
            raise ValueError(f"{out} already exists; remove it or choose another folder")
        converted = convert_released(options) if options.file else convert_clip_and_bert(options)
        partial = out.with_name(f".{out.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        save_model(partial, *converted)
        partial.rename(out)
    model = converted[0]
    print(f"{out}: {model.task}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def convert_released(options: ConversionSettings) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
    """A released checkpoint for one task. ValueError if our prompt, end token or tokenizer differs from its own."""
    contents, task = open_weights(options.file), options.task or "video_caption"
    if options.settings:
        settings = read_json_object(options.settings)
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


def convert_clip_and_bert(options: ConversionSettings) -> tuple[MPLUG2, Tokenizer, PreprocessConfig]:
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


def tokenizer_of(config: ModelConfig, options: ConversionSettings, folder: Path) -> Tokenizer:
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
