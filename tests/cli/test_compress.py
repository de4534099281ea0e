"""shoestring compress: what is written can be used, the table tells the truth, and nothing is overwritten."""

import json

import pytest
import torch
import transformers

from shoestring import zoo
from shoestring.compress import load_into
from shoestring.compress.flap import flap_load


@pytest.fixture
def texts(tmp_path):
    from shoestring import data

    verses = data.load("kjv", split="all")[:1500]["text"]
    file = tmp_path / "verses.jsonl"
    file.write_text("".join(json.dumps({"text": verse}) + "\n" for verse in verses))
    return file


def test_udfc_writes_a_smaller_network_that_answers_as_measured(shoestring, tmp_path):
    out = tmp_path / "small"
    told = json.loads(
        shoestring(
            "compress", "tiny-resnet", "--method", "udfc", "--ratio", "0.2", "--data", "fashion",
            "--split", "test", "--out", out, "--json",
        ).stdout
    )  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(out)
    model = load_into(transformers.ResNetForImageClassification(config), out).float().eval()
    assert sum(p.numel() for p in model.parameters()) == told["after"]["parameters"]
    assert told["after"]["parameters"] < told["before"]["parameters"] == zoo.card("tiny-resnet")["parameters"]
    # Half precision on disk, as the model came; safetensors' header is all that is on top.
    size = (out / "model.safetensors").stat().st_size
    assert told["after"]["bytes of weights"] == pytest.approx(size, rel=0.02)
    assert told["after"]["bytes of weights"] < told["before"]["bytes of weights"]
    assert told["before"]["accuracy %"] == pytest.approx(90, abs=2)
    assert 60 < told["after"]["accuracy %"] <= told["before"]["accuracy %"]
    assert "udfc" in (out / "README.md").read_text()


def test_flap_writes_a_model_that_transformers_loads(shoestring, tmp_path, texts):
    out = tmp_path / "small"
    shoestring(
        "compress", "tiny-gpt", "--method", "flap", "--ratio", "0.25", "--calibration", texts,
        "--structure", "UL-UM", "--out", out,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    whole = zoo.load("tiny-gpt")
    blocks = sum(p.numel() for p in whole.model.layers.parameters())
    assert sum(p.numel() for p in model.model.layers.parameters()) == pytest.approx(0.75 * blocks, rel=0.03)
    ids = tokenizer("In the beginning God created the heaven and the earth.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < whole(input_ids=ids, labels=ids).loss + 1.5
    assert flap_load(out).config.num_hidden_layers == whole.config.num_hidden_layers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny-resnet", "--method", "udfc", "--ratio", "1"), "pruning_ratio must be in [0, 1)"),
        (("tiny-resnet", "--method", "udfc", "--bits", "9"), "weight_bits must be in [2, 8]"),
        (("tiny-gpt", "--method", "udfc"), "nothing"),
        (("tiny-resnet", "--method", "udfc", "--data", "kjv"), "must have a column 'image'"),
        (("tiny-gpt", "--method", "flap", "--calibration", "fashion"), "no column of texts"),
    ],
    ids=["ratio of one", "nine bits", "no convolutions", "texts for images", "images for texts"],
)
def test_bad_input_is_named_and_nothing_is_written(shoestring, tmp_path, arguments, says):
    result = shoestring("compress", *arguments, "--out", tmp_path / "small", code=1)
    assert says in result.stderr or says == "nothing"
    assert list(tmp_path.iterdir()) == []


def test_bad_usage_is_named(shoestring, tmp_path):
    out = tmp_path / "small"
    assert "did you mean 'flap'" in shoestring("compress", "x", "--method", "flop", "--out", out, code=2).stderr
    assert "--calibration" in shoestring("compress", "tiny-gpt", "--method", "flap", "--out", out, code=2).stderr
    out.mkdir()
    (out / "mine").write_text("kept")
    assert "exists already" in shoestring("compress", "tiny-resnet", "--method", "udfc", "--out", out, code=1).stderr
    assert (out / "mine").read_text() == "kept"
