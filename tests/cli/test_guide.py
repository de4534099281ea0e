"""shoestring guide: pictures, sheet and note say what happened, and what cannot be made is named before it is begun."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from shoestring import guide, zoo
from shoestring.data import world
from shoestring.guide.cfgpp import CFGPlusPlusGuidance, cfgpp_sample

SMALL = ("--steps", 3, "--n", 2)


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


@pytest.fixture(scope="module")
def class_folder(tmp_path_factory):
    """A class-conditional model saved as anybody would, without model_index.json."""
    folder = tmp_path_factory.mktemp("garments")
    zoo.load("tiny-class-ddpm").save_pretrained(folder / "unet")
    zoo.load("tiny-class-ddpm", "scheduler").save_pretrained(folder / "scheduler")
    return folder


def test_class_model_makes_the_samplers_pictures(shoestring, tmp_path, class_folder):
    out = tmp_path / "made"
    told = json.loads(
        shoestring(
            "guide", class_folder, "--label", 9, "--label", 1, "--method", "cfgpp", "--scale", 0.4,
            "--compare-scale", 2, "--n", 3, "--batch", 2, "--steps", 4, "--seed", 5, "--out", out, "--json",
        ).stdout
    )  # fmt: skip
    assert told["labels"] == [9, 1, 9]
    assert told["seeds"] == [5, 6, 7]
    assert [(row["method"], row["scale"], row["network_calls"]) for row in told["rows"]] == [
        ("cfgpp", 0.4, 8), ("cfg", 2, 8),
    ]  # fmt: skip
    noise = torch.stack([torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6, 7)])
    conditions = torch.tensor([9, 1, 9]), torch.full((3,), 10)
    model, scheduler = zoo.load("tiny-class-ddpm"), zoo.load("tiny-class-ddpm", "scheduler")
    made = cfgpp_sample(model, scheduler, noise, conditions, 0.4, 4)
    expected = ((made.clamp(-1, 1) + 1) * 127.5).round()[:, 0].numpy()
    for i, file in enumerate(told["rows"][0]["files"]):
        assert abs(pixels(out / file) - expected[i]).max() <= 3
    sheet = Image.open(out / "sheet.png")
    assert sheet.height < sheet.width
    assert json.loads((out / "guide.json").read_text())["rows"] == told["rows"]
    assert sorted(file.name for file in out.iterdir()) == ["cfg", "cfgpp", "guide.json", "sheet.png"]
    assert [file.name for file in tmp_path.iterdir()] == ["made"]


def test_text_model_makes_the_pipelines_pictures(shoestring, tmp_path):
    out = tmp_path / "made"
    result = shoestring(
        "guide", "tiny-t2i", "--prompt", "a large red bag", "--negative", "a shoe", "--method", "cfgpp", *SMALL,
        "--out", out,
    )  # fmt: skip
    assert "network calls a picture" in result.stdout
    told = json.loads((out / "guide.json").read_text())
    # CFG's scale is the mean of those that CFG++ amounts to.
    assert told["rows"][1]["scale"] == pytest.approx(np.mean(_omegas(0.6, 3)))
    pipe = zoo.load("tiny-t2i")
    pipe.set_progress_bar_config(disable=True)
    with guide.apply(pipe, CFGPlusPlusGuidance(0.6)):
        expected = pipe(
            ["a large red bag"] * 2, negative_prompt=["a shoe"] * 2, num_inference_steps=3,
            generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        ).images  # fmt: skip
    for i, image in enumerate(expected):
        assert abs(pixels(out / "cfgpp" / f"{i:03d}.png") - np.asarray(image).astype(int)).max() <= 3
    assert abs(pixels(out / "cfg" / "000.png") - pixels(out / "cfgpp" / "000.png")).max() > 1


def _omegas(scale, steps):
    scheduler = zoo.load("tiny-t2i").scheduler
    scheduler.set_timesteps(steps)
    a = np.array([*scheduler.alphas_cumprod[scheduler.timesteps].double().numpy(), 1.0])
    rho = np.sqrt((1 - a) / a)
    return scale * rho[:-1] / (rho[:-1] - rho[1:])


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (("tiny-class-ddpm", "--method", "adaptive-guidance", "--scale", 2, "--threshold", 0.0), 4),
        (("tiny-t2i", "--prompt", "a red bag", "--negative", "on the left", "--negative", "a shoe", "--method",
          "perp-neg", "--scale", 3), 12),
        (("tiny-class-ddpm", "--method", "elucd", "--classifier", "tiny-resnet"), 3),
        (("tiny-class-ddpm", "--method", "gfcg", "--classifier", "tiny-resnet", "--compare", "cfgpp"), None),
        (("tiny-t2i", "--prompt", "a red bag", "--method", "elucd", "--classifier", "judge-garment", "--label", 8), 3),
        (("tiny-t2i", "--prompt", "a red bag", "--method", "gfcg", "--classifier", "judge-garment", "--label", 8,
          *(word for name in world.GARMENTS for word in ("--class-prompt", name))), None),
    ],
    ids=["adaptive", "perp-neg", "elucd", "gfcg", "elucd of a text model", "gfcg of a text model"],
)  # fmt: skip
def test_every_method_makes_pictures_and_counts(shoestring, tmp_path, arguments, calls):
    out = tmp_path / "made"
    told = json.loads(shoestring("guide", *arguments, *SMALL, "--out", out, "--json").stdout)
    own, other = told["rows"]
    assert own["network_calls"] == calls or (calls is None and 3 <= own["network_calls"] <= 6)
    assert other["network_calls"] == 6
    assert own["seconds"] > 0
    assert all((out / file).is_file() for row in told["rows"] for file in row["files"])
    assert abs(pixels(out / own["files"][0]) - pixels(out / other["files"][0])).max() > 1


def test_diffusion_transformer_is_told_its_classes(shoestring, tmp_path):
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=6, num_layers=1, sample_size=8,
            num_embeds_ada_norm=5,
        )  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "dit" / "transformer")
    DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "dit" / "scheduler")
    out = tmp_path / "made"
    told = json.loads(
        shoestring(
            "guide", tmp_path / "dit", "--method", "cfgpp", "--steps", 2, "--n", 6, "--out", out, "--json"
        ).stdout
    )
    assert told["labels"] == [0, 1, 2, 3, 4, 0]
    assert pixels(out / "cfgpp" / "005.png").shape == (8, 8, 3)
    # Its null class is one more than those it counts.
    noise = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))[None]
    made = cfgpp_sample(model, DDIMScheduler(clip_sample=False), noise, (torch.tensor([0]), torch.tensor([5])), 0.6, 2)
    expected = ((made[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    # Random weights enlarge what rounding tells the two forms apart by.
    assert abs(pixels(out / "cfgpp" / "000.png") - expected).max() <= 8


def test_warnings_of_the_guider_are_told(shoestring, tmp_path):
    result = shoestring(
        "guide", "tiny-class-ddpm", "--method", "cfgpp", "--scheduler", "DPMSolverMultistepScheduler", "--steps", 2,
        "--n", 1, "--out", tmp_path / "made",
    )  # fmt: skip
    assert "warning: DPMSolverMultistepScheduler is not of first order" in result.stderr
    note = json.loads((tmp_path / "made" / "guide.json").read_text())
    assert note["scheduler"] == "DPMSolverMultistepScheduler"
    assert len(note["warnings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny-t2i", "--method", "cfgpp"), "give --prompt"),
        (("tiny-t2i", "--prompt", "a bag", "--label", 3, "--method", "cfgpp"), "--label is for a classifier"),
        (("tiny-t2i", "--prompt", "a bag", "--method", "perp-neg"), "needs --negative"),
        (("tiny-class-ddpm", "--prompt", "a bag", "--method", "cfgpp"), "use --label, not --prompt"),
        (("tiny-class-ddpm", "--label", 10, "--method", "cfgpp"), "--label must be from 0 to 9"),
        (("tiny-class-ddpm", "--method", "perp-neg"), "needs a model that is told texts"),
        (("tiny-class-ddpm", "--method", "cfgpp", "--scale", -1), "guidance_scale must be a number from 0 to 1"),
        (("tiny-class-ddpm", "--method", "cfgpp", "--scheduler", "UNet2DModel"), "--scheduler must be a scheduler"),
        (("tiny-class-ddpm", "--method", "elucd", "--classifier", "judge-colour"), "expects 3 channels"),
        (("tiny-gpt", "--method", "cfgpp"), "is no diffusion model"),
    ],
    ids=["no prompt", "label of a text", "perp-neg without negative", "prompt of a class", "null class",
         "perp-neg of classes", "negative scale", "no scheduler", "another classifier", "language model"],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(shoestring, tmp_path, arguments, says):
    result = shoestring("guide", *arguments, *SMALL, "--out", tmp_path / "made", code=1)
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "cfg++"), "--method must be one of"),
        (("--method", "cfgpp", "--compare", "cgf"), "did you mean 'cfg'?"),
        (("--method", "cfgpp", "--compare", "cfgpp"), "compare it with another"),
        (("--method", "gfcg"), "gfcg needs --classifier"),
        (("--method", "cfgpp", "--classifier", "tiny-resnet"), "--classifier is for elucd and gfcg"),
        (("--method", "cfgpp", "--threshold", 0.5), "--threshold is for adaptive-guidance"),
    ],
    ids=["method", "compare", "itself", "no classifier", "classifier", "threshold"],
)
def test_bad_usage_is_named(shoestring, tmp_path, arguments, says):
    assert says in shoestring("guide", "tiny-class-ddpm", *arguments, "--out", tmp_path / "made", code=2).stderr


def test_nothing_is_overwritten(shoestring, tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine.txt").write_text("mine")
    result = shoestring(
        "guide", "tiny-class-ddpm", "--method", "cfgpp", *SMALL, "--out", tmp_path / "made", code=1
    )  # fmt: skip
    assert "exists already" in result.stderr
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["mine.txt"]
    result = shoestring("guide", "tiny-class-ddpm", "--method", "cfgpp", "--out", tmp_path / "a" / "b", code=1)
    assert f"create {tmp_path / 'a'} first" in result.stderr
