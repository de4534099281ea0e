"""Every model of the zoo: it is there, loads whole, offline and quickly, is as good as its card says, and its script
trains it again. What is damaged or missing is named."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from shoestring import zoo
from shoestring.zoo.train import script, train_model

NAMES = sorted(zoo._PARTS)
GENERATIVE = ("tiny-t2i", "tiny-class-ddpm", "tiny-class-ddpm-weak", "tiny-gpt", "tiny-captioner", "tiny-var")
LEAD = 0.02  # "within 2 points"


def test_the_whole_zoo_is_shipped():
    assert zoo.names() == NAMES


def test_all_weights_together_are_small():
    files = [file for file in zoo._MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".jinja", ".gitkeep", ""}


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_what_a_card_must(name):
    card = zoo.card(name)
    assert card["name"] == name
    assert card["smoke"] is False
    for key in ("what", "data", "licence"):
        assert isinstance(card[key], str)
        assert len(card[key]) > 2, key
    assert card["steps"] > 0
    assert card["seconds"] > 0
    assert card["quality"]
    assert card["quality_fast"]
    assert set(card["files"]) == {
        file.relative_to(zoo.path(name)).as_posix()
        for file in zoo.path(name).rglob("*")
        if file.is_file() and file.name != "card.json"
    }


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_half_precision_and_parameters_counted(name):
    from safetensors import safe_open

    for file in zoo.path(name).rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
        assert {kind for kind in kinds if kind.is_floating_point} == {torch.float16}, file
    model = zoo.load(name)
    modules = model.components.values() if hasattr(model, "components") else [model]
    found = sum(p.numel() for m in modules if isinstance(m, torch.nn.Module) for p in m.parameters())
    assert found == zoo.card(name)["parameters"]


LOADS = """
import socket, sys, time, warnings
def refuse(*args, **kwargs):
    raise RuntimeError("the network was called")
socket.socket.connect = socket.create_connection = refuse
import torch
from shoestring import zoo
from shoestring.zoo import _PARTS
import importlib
name = sys.argv[1]
for where, _ in _PARTS[name].values():
    module, _, cls = where.partition(":")
    getattr(importlib.import_module(module), cls)
print("imported", file=sys.stderr)
warnings.simplefilter("error")
for part in zoo.parts(name):
    start = time.perf_counter()
    zoo.load(name, part)
    print(part, time.perf_counter() - start)
"""


@pytest.mark.parametrize("name", NAMES)
def test_loads_offline_quickly_and_without_a_word(name):
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", LOADS, name], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.partition("imported\n")[2] == ""
    for line in ran.stdout.split("\n")[:-1]:
        part, seconds = line.rsplit(maxsplit=1)
        assert float(seconds) < 2, f"{name} {part}"


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_reach_the_quality_of_the_card(name):
    def load(part="model"):
        return zoo.load(name, part)

    measured, told = script(name).quality(load, fast=True, progress=False), zoo.card(name)["quality_fast"]
    assert set(measured) == set(told)
    for figure, expected in told.items():
        tolerance = LEAD * max(1.0, abs(expected))  # points of a share, per cent of a perplexity or distance
        assert abs(measured[figure] - expected) <= tolerance, f"{figure}: {measured[figure]}, the card says {expected}"


@pytest.mark.parametrize("name", NAMES)
def test_the_training_script_runs(name, tmp_path):
    out = tmp_path / name
    start = sum(os.times()[2:4])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "shoestring.zoo.train", name, "--smoke", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert sum(os.times()[2:4]) - start < 30  # seconds of CPU, of one thread: the machine may have other work
    card = json.loads(ran.stdout[ran.stdout.index("{") :])
    assert card["smoke"] is True
    assert os.listdir(tmp_path) == [name]  # no temporary folder is left
    for part in zoo.parts(name):
        assert type(zoo.load_from(out, name, part)) is type(zoo.load(name, part))
    assert set(card["quality"]) == set(zoo.card(name)["quality_fast"])


@pytest.mark.parametrize("name", GENERATIVE)
def test_samples_can_be_looked_at(name):
    sheet = script(name).sheet(lambda part="model": zoo.load(name, part))
    assert len(sheet) > 200 if isinstance(sheet, str) else min(sheet.size) > 100


def test_dtype_and_eval_mode():
    model = zoo.load("judge-fashion", dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model.training


def test_training_leaves_the_random_state_of_the_caller(tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train_model("judge-fashion", tmp_path / "judge", smoke=True, progress=False)
    assert (torch.get_rng_state() == before).all()


def test_a_training_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    out = tmp_path / "judge"
    train_model("judge-fashion", out, smoke=True, progress=False)
    old = (out / "card.json").read_bytes()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script("judge-fashion"), "quality", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_model("judge-fashion", out, smoke=True, progress=False)
    assert (out / "card.json").read_bytes() == old
    assert os.listdir(tmp_path) == ["judge"]


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A zoo of its own with one model, to damage."""
    shutil.copytree(zoo.path("judge-colour"), tmp_path / "judge-colour")
    monkeypatch.setattr(zoo, "_MODELS", tmp_path)
    return tmp_path / "judge-colour"


def test_a_flipped_bit_is_found(copied):
    file = copied / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is damaged .*`python -m shoestring\.zoo\.train judge-colour"
    ):
        zoo.load("judge-colour")


def test_a_truncated_file_is_found(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        zoo.load("judge-colour")


def test_a_missing_file_is_named(copied):
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: reinstall shoestring"):
        zoo.load("judge-colour")


def test_a_missing_model_is_named(copied):
    assert zoo.names() == ["judge-colour"]
    with pytest.raises(FileNotFoundError, match=r"tiny-gpt.* is missing: reinstall shoestring"):
        zoo.load("tiny-gpt")


def test_a_broken_card_is_named(copied):
    (copied / "card.json").write_text("{")
    for call in (zoo.card, zoo.load):
        with pytest.raises(ValueError, match=r"card\.json is damaged"):
            call("judge-colour")


def test_unknown_names_and_parts():
    with pytest.raises(ValueError, match=r"name must be one of .*tiny-gpt.*, got 'gpt'"):
        zoo.load("gpt")
    with pytest.raises(ValueError, match="part of tiny-gpt must be one of model, tokenizer, got 'vae'"):
        zoo.load("tiny-gpt", "vae")
    with pytest.raises(TypeError, match=r"dtype must be a floating torch\.dtype"):
        zoo.load("judge-colour", dtype=torch.int8)
