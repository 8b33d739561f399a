"""Files of published weights: they open memory-mapped and run no code; the command converts them."""

import json
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import released_model
import torch
from safetensors.torch import save_file

from mplug2.checkpoint import load_model
from mplug2.data.text import SPECIAL_TOKENS
from mplug2.pretrained import from_released, open_weights
from mplug2.pretrained.__main__ import main
from mplug2.pretrained.files import open_settings, weights_file

GOLDEN = Path(__file__).parents[1] / "golden" / "released"
STATE = torch.load(GOLDEN / "weights.pt", weights_only=True)
SETTINGS = json.loads((GOLDEN / "config.json").read_text())


class Harmful:
    """A pickle that runs a function when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_vocabulary(folder, count):
    folder.mkdir(exist_ok=True)
    words = SPECIAL_TOKENS + [f"word{i}" for i in range(count - len(SPECIAL_TOKENS))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


@pytest.fixture
def released(tmp_path):
    """A released file as training writes it, with everything that it has in addition to the weights."""
    file = tmp_path / "files" / "mplug2_caption.pth"
    write_vocabulary(file.parent, 160)
    torch.save({
        "model": STATE, "config": SETTINGS["config"], "epoch": 9,
        "lr_scheduler": {"warmup_t": 0, "decay_rate": 0.1, "base_values": [2e-5, 2e-6]},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 2e-5, "params": [0]}]},
    }, file)
    return file


def test_files_open_memory_mapped_with_all_their_contents(released, tmp_path, monkeypatch):
    options, load = {}, torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **named: options.update(named) or load(*given, **named))
    contents = open_weights(released)
    assert (options["mmap"], options["weights_only"]) == (True, True)
    assert contents["epoch"] == 9 and contents["lr_scheduler"]["base_values"] == [2e-5, 2e-6]
    for name, entry in contents["model"].items():
        assert torch.equal(entry, STATE[name])
    save_file({name: entry.clone() for name, entry in STATE.items()}, tmp_path / "weights.safetensors")
    contents = open_weights(tmp_path / "weights.safetensors")
    assert contents.keys() == STATE.keys() and all(torch.equal(entry, STATE[name]) for name, entry in contents.items())


def test_a_pickle_that_could_run_code_is_refused(tmp_path):
    trap, marker = tmp_path / "trap.pth", tmp_path / "ran"
    torch.save({"model": STATE, "config": Harmful(marker)}, trap)
    with pytest.raises(ValueError, match="trap.pth: damaged, or it contains more .*getattr.*state dict alone"):
        open_weights(trap)
    trap.write_bytes(pickle.dumps({"model": Harmful(marker)}, protocol=2))
    with pytest.raises(ValueError, match="trap.pth: damaged, or it contains more"):
        open_weights(trap)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_other_files_are_refused_by_name(tmp_path, released):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="clip.pt: a TorchScript program.*state_dict"):
        open_weights(tmp_path / "clip.pt")
    if (handles := Path("/proc/self/fd")).is_dir():  # the archive is closed again
        assert str(tmp_path / "clip.pt") not in {str(handle.readlink()) for handle in handles.iterdir()
                                                 if handle.is_symlink()}
    for size in (0, 1000, released.stat().st_size // 2):
        (tmp_path / "cut.pth").write_bytes(released.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut.pth: .*(truncated|damaged)"):
            open_weights(tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x80" * 20)
    with pytest.raises(ValueError, match="cut.safetensors: cannot be read as safetensors, it may be truncated"):
        open_weights(tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt: expected a state dict, found list"):
        open_weights(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="none.pth: expected a file of weights"):
        open_weights(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="one of model.safetensors"):
        open_weights(tmp_path)


def test_of_several_files_in_a_folder_safetensors_and_the_settings_of_open_clip_are_read(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "open_clip_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    assert weights_file(tmp_path).name == "model.safetensors"
    assert open_settings(tmp_path) == open_settings(tmp_path / "x.bin") == {"name": "open_clip_config.json"}
    (tmp_path / "model.safetensors").unlink()
    assert weights_file(tmp_path).name == "pytorch_model.bin"


def arguments(released, tmp_path, *more, **changes):
    """Arguments of the command, with changed run settings."""
    settings, out = tmp_path / "settings.json", tmp_path / "runs" / "released"
    run, bert = SETTINGS["config"] | changes, SETTINGS["bert_config"]
    settings.write_text(json.dumps({"config": run, "bert_config": bert}))
    return [str(released), "--settings", str(settings), "--out", str(out), *more]


@pytest.mark.released
def test_the_command_converts_a_released_file(released, tmp_path, monkeypatch, capsys):
    given = arguments(released, tmp_path, "--task", "video_caption", test_num_frames=7)
    monkeypatch.setattr(sys, "argv", ["python -m mplug2.pretrained", *given])
    monkeypatch.delitem(sys.modules, "mplug2.pretrained.__main__")
    runpy.run_module("mplug2.pretrained", run_name="__main__", alter_sys=True)
    assert "released: video_caption, " in capsys.readouterr().out
    model, tokenizer, preprocess = load_model(tmp_path / "runs" / "released")
    assert sorted(file.name for file in (tmp_path / "runs" / "released").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]
    assert (model.task, len(tokenizer), preprocess.frames) == ("video_caption", 160, 7)
    expected = from_released(STATE, SETTINGS["config"], SETTINGS["bert_config"], "video_caption")
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(entry, expected.state_dict()[name]) for name, entry in model.state_dict().items())
    golden = torch.load(GOLDEN / "golden.pt", weights_only=True)
    with torch.no_grad():
        vision = model.encode_vision(golden["in.video"])
        logits = model.decode(golden["in.caption_ids"], golden["in.caption_mask"].bool(), vision)
    torch.testing.assert_close(logits, golden["caption.video.logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.released
def test_the_command_refuses_another_prompt_end_token_or_tokenizer(released, tmp_path, capsys):
    def refused(*more, **changes):
        with pytest.raises(SystemExit) as stopped:
            main(arguments(released, tmp_path, *more, **changes))
        assert stopped.value.code == 1
        assert not (tmp_path / "runs" / "released").exists()
        return capsys.readouterr().err

    message = refused(prompt="a picture of")
    assert "prompt='a picture of', but video_caption starts with 'a video of'" in message
    assert "prompt='a video of', but image_caption starts with 'a picture of'" in refused("--task", "image_caption")
    assert "eos='[EOS]': expected [SEP]" in refused(eos="[EOS]")
    write_vocabulary(tmp_path / "other", 161)
    message = refused("--tokenizer", str(tmp_path / "other" / "vocab.txt"))
    assert "the tokenizer has 161 tokens, but the model 160" in message
    (released.parent / "vocab.txt").unlink()
    assert "no vocab.txt or tokenizer.json next to the weights" in refused()
    contents = torch.load(released, weights_only=True)
    del contents["model"]["visn_emb_norm.weight"]
    torch.save(contents, released)
    assert "1 entries are missing: visn_emb_norm.weight" in refused()
    given = arguments(released, tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(SystemExit):
        main(given)
    assert "settings.json: not a JSON file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(released), "--out", str(tmp_path)])
    assert "already exists; remove it or choose another folder" in capsys.readouterr().err


@pytest.mark.released
def test_without_settings_the_file_is_read_as_a_large_run(released, tmp_path, capsys):
    """The run settings come from the file, those of BERT are the large model's: this small file does not fit."""
    with pytest.raises(SystemExit):
        main([str(released), "--out", str(tmp_path / "out")])
    assert "entries are missing: text_decoder.bert.encoder.layer.10." in capsys.readouterr().err
    contents = torch.load(released, weights_only=True)
    contents["config"]["prompt"] = "shown is"
    torch.save(contents, released)
    with pytest.raises(SystemExit):
        main([str(released), "--out", str(tmp_path / "out")])
    assert "prompt='shown is'" in capsys.readouterr().err


def test_the_command_converts_clip_and_bert(tmp_path, capsys):
    from transformers import BertConfig, BertForMaskedLM, CLIPVisionConfig, CLIPVisionModel

    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, image_size=16, patch_size=8
    ))
    bert = BertForMaskedLM(BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=4, intermediate_size=64, vocab_size=40,
        max_position_embeddings=16,
    ))
    clip.save_pretrained(tmp_path / "clip")
    bert.save_pretrained(tmp_path / "bert")
    write_vocabulary(tmp_path / "bert", 40)
    given = ["--clip", str(tmp_path / "clip"), "--bert", str(tmp_path / "bert")]
    main([*given, "--out", str(tmp_path / "start")])
    model, tokenizer, _ = load_model(tmp_path / "start")
    config = model.config
    assert (model.task, len(tokenizer)) == ("pretrain", 40)
    assert (config.image_size, config.vision_width, config.width) == (16, 64, 32)
    assert (config.text_layers, config.universal_layers, config.fusion_layers, config.decoder_layers) == (4, 2, 1, 4)
    assert torch.equal(model.text_encoder.embeddings.word.weight, bert.bert.embeddings.word_embeddings.weight)
    vision = getattr(clip, "vision_model", clip)
    assert torch.equal(model.vision_encoder.norm.weight, vision.post_layernorm.weight)
    main([*given, "--image-size", "24", "--task", "video_retrieval", "--out", str(tmp_path / "larger")])
    model, _, _ = load_model(tmp_path / "larger")
    assert (model.task, model.config.image_size) == ("video_retrieval", 24)

    (tmp_path / "clip" / "config.json").unlink()
    with pytest.raises(SystemExit):
        main([*given, "--out", str(tmp_path / "none")])
    assert "the activation of these weights is unknown" in capsys.readouterr().err
    main([*given, "--quick-gelu", "--out", str(tmp_path / "said")])
    with pytest.raises(SystemExit):
        main(["--clip", str(tmp_path / "clip"), "--out", str(tmp_path / "none")])
    assert "give either FILE, a released checkpoint, or both --clip and --bert" in capsys.readouterr().err


@pytest.mark.released
def test_the_command_converts_other_sizes_and_safetensors(tmp_path):
    dims = SETTINGS["dims"] | {"latents": 3, "vocab": 20, "text_encoder_layers": 3}
    run, bert = released_model.settings(dims)
    save_file(released_model.random_state(dims), tmp_path / "weights.safetensors")
    write_vocabulary(tmp_path, 20)
    (tmp_path / "settings.json").write_text(json.dumps({"config": run, "bert_config": bert}))
    main([str(tmp_path / "weights.safetensors"), "--settings", str(tmp_path / "settings.json"), "--task", "video_qa",
          "--out", str(tmp_path / "out")])
    model, _, _ = load_model(tmp_path / "out")
    assert (model.task, model.config.latents) == ("video_qa", 3)
