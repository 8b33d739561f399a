"""The Hugging Face Hub: addresses, a model in the local cache, and model cards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from predictors import make_predictor

import mplug2
from mplug2 import hub
from mplug2.checkpoint import real_folder

REPOSITORY = Path(__file__).parents[1]
PRETRAINED = REPOSITORY / "tiny_data" / "pretrained"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(home: Path, exported: Path) -> dict[str, str]:
    """A cache of the Hub that has `exported` as someone/tiny, and the environment in which it is all there is."""
    model = home / "hub" / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (model / "snapshots").mkdir()
    exported.rename(model / "snapshots" / REVISION)
    return {**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_model_of_the_hub_is_loaded_from_the_local_cache_everywhere(tmp_path):
    mplug2.load(PRETRAINED).save(tmp_path / "exported", license="mit")
    environment = hub_cache(tmp_path / "home", tmp_path / "exported")
    clip = REPOSITORY / "docs/examples/blue_seven_left.gif"

    def run(*command: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
                              env={**environment, "PYTHONPATH": str(REPOSITORY)}, check=False)
        assert done.returncode == code, done.stderr
        return done

    loaded = run("-c", f"import mplug2; print(mplug2.load('hf://someone/tiny').caption(['{clip}']))")
    assert loaded.stdout.strip() == str(mplug2.load(PRETRAINED).caption([clip]))
    asked = ["--input", str(clip), "--question", "which digit is it"]
    for address in "hf://someone/tiny", f"hf://someone/tiny@{REVISION}":
        assert run(str(REPOSITORY / "eval.py"), "--checkpoint", address, *asked).stdout.strip() == "seven"
    failed = run(str(REPOSITORY / "eval.py"), "--checkpoint", "hf://someone/other", *asked, code=2).stderr
    assert "hf://someone/other cannot be read; check the name" in failed and "Traceback" not in failed
    run(str(REPOSITORY / "eval.py"), "--checkpoint", "hf://someone/tiny", "--limit", "4", "--splits", "test",
        "--task", "video_caption")
    assert (tmp_path / "runs/tiny/eval/metrics.json").is_file()  # and nothing in the cache
    assert not (tmp_path / "home/hub/models--someone--tiny/snapshots" / REVISION / "eval").exists()


@pytest.mark.parametrize("address", ["hf://tiny", "hf://a/b/c", "hf://", "hf://a/b@", "hf://../x y"])
def test_a_malformed_address_is_refused(address):
    assert hub.is_address(address)
    with pytest.raises(ValueError, match="expected hf://user/name, or hf://user/name@revision"):
        real_folder(address)


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'install huggingface_hub, with pip install -e "\.\[hub\]"'):
        real_folder("hf://a/b")


@pytest.mark.parametrize("error", [RuntimeError(), OSError("no route\nto the host"), KeyError("x")])
def test_every_failure_of_the_package_is_one_line(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(ValueError, match="cannot be read; check the name, and that this machine is online") as found:
        real_folder("hf://a/b")
    assert type(error).__name__ in str(found.value) and "\n" not in str(found.value)


def test_paths_are_no_addresses():
    assert not any(map(hub.is_address, ["runs/tiny/last", "/hf/x", "hf", "./hf:"]))


def test_the_card_of_an_exported_model_says_what_is_known(tmp_path):
    run = tmp_path / "runs" / "mine"
    make_predictor().save(run / "step_0000010")
    predictor = mplug2.load(run / "step_0000010")
    predictor.save(tmp_path / "unknown")
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\nlibrary_name: mplug2\n")
    assert "**Training data**: unknown." in card and "not stated: ask the author" in card
    assert "No evaluation was recorded" in card and "**Training settings**: unknown." in card

    (run / "settings.json").write_text(json.dumps({"train": {"max_steps": 77, "lr": 0.004, "recipe": ""}}))
    (run / "step_0000010" / "eval").mkdir()
    (run / "step_0000010" / "eval" / "metrics.json").write_text(json.dumps(
        {"test/caption_exact": 0.875, "standard_errors": {"test/caption_exact": 0.01}, "records": {"test": {}}}))
    config = json.loads((run / "step_0000010" / "config.json").read_text())
    (run / "step_0000010" / "config.json").write_text(json.dumps({**config, "data": ["/home/me/clips"]}))
    predictor.save(tmp_path / "known", license="cc-by-4.0")
    card = (tmp_path / "known" / "README.md").read_text()
    for part in ("license: cc-by-4.0", "# known", "**Training data**: clips.", "max_steps 77, lr 0.004",
                 "**License**: cc-by-4.0.", "87.5", 'mplug2.load("hf://USER/known")'):
        assert part in card
    assert "recipe" not in card and "/home/me" not in card
    count = sum(parameter.numel() for parameter in predictor.model.parameters())
    assert f"{count:,} parameters" in card


def test_a_predictor_that_was_not_loaded_can_be_exported(tmp_path):
    make_predictor().save(tmp_path / "new")
    assert "**Training data**: unknown." in (tmp_path / "new" / "README.md").read_text()
