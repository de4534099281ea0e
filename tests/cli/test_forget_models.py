"""shoestring forget MODEL: texts out of a language model, on the model of the zoo that knows Esther by heart."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shutil
import stat
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shoestring import zoo
from shoestring.cli import _forget_models
from shoestring.zoo.train.tiny_gpt import documents

FAST = ["--length", 48, "--epochs", 1, "--lr", 1e-3, "--batch", 3, "--relearn-steps", 3]


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def books():
    seen, unseen = documents("train"), documents("held_out")
    return {
        "forget": [text[:90] for book, text in seen if book == "Esther"][:6],
        "retain": [text[:90] for book, text in seen if book == "Luke"][:6],
        "held-out": [text[:90] for book, text in unseen if book == "Esther"],
    }


@pytest.fixture
def files(tmp_path, books):
    found = {name: write(tmp_path / f"{name}.jsonl", texts) for name, texts in books.items()}
    found["model"] = shutil.copytree(zoo.path("tiny-gpt"), tmp_path / "model")
    return found


def command(files, out, *more, method="npo"):
    """The last of an option given twice counts."""
    given = ["--method", method, "--forget", files["forget"], "--out", out]
    return ["forget", files["model"], *given, *FAST, *more]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def loss_of(folder: Path, texts: list[str]) -> float:
    """Mean over the texts of the loss of transformers itself, of the first 48 tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = [tokenizer(text, truncation=True, max_length=48, return_tensors="pt").input_ids for text in texts]
    assert all(len(tokenizer(text).input_ids) <= 48 for text in texts)
    with torch.no_grad():
        return sum(model(input_ids=ids, labels=ids).loss.item() for ids in found) / len(found)


def test_what_is_written_loads_with_transformers_alone_and_has_the_figures_of_its_card(
    shoestring, files, books, tmp_path
):
    before, out = contents(files["model"]), tmp_path / "without"
    more = ["--retain", files["retain"], "--held-out", files["held-out"], "--json"]
    summary = json.loads(shoestring(*command(files, out, *more)).stdout)
    assert contents(files["model"]) == before
    assert not list(tmp_path.glob(".*"))
    rows = {row["model"]: row for row in summary["evaluation"]["rows"]}
    assert loss_of(out, books["forget"]) == pytest.approx(rows["npo"]["forget_loss"], rel=1e-4)
    assert loss_of(out, books["retain"]) == pytest.approx(rows["npo"]["retain_loss"], rel=1e-4)
    assert loss_of(files["model"], books["forget"]) == pytest.approx(rows["original"]["forget_loss"], rel=1e-3)
    assert rows["npo"]["forget_loss"] > 1.05 * rows["original"]["forget_loss"]
    assert rows["npo"]["retain_change"] < 0.3 < rows["npo"]["forget_loss"] - rows["original"]["forget_loss"]
    assert rows["original"]["membership_auc"] == 1.0
    assert rows["original"]["relearn_steps"] == 0

    tokenizer, old = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(files["model"])
    assert tokenizer(books["forget"]).input_ids == old(books["forget"]).input_ids
    assert tokenizer.model_max_length == old.model_max_length
    assert {path.suffix for path in out.iterdir()} == {".json", ".md", ".safetensors", ".svg"}
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert json.loads((out / "evaluation.json").read_text()) == summary
    assert len([c for c in ElementTree.parse(out / "forget-retain.svg").iter() if c.tag.endswith("circle")]) == 2

    card = (out / "README.md").read_text()
    assert card.startswith(f'---\nbase_model: "{files["model"]}"\nlibrary_name: transformers\n')
    assert "Negative Preference Optimization" in card
    assert hashlib.sha256(files["forget"].read_bytes()).hexdigest() in card
    assert f"| {rows['npo']['forget_loss']:.3f} |" in card
    assert "lr 0.001" in card
    assert not any(text[:40] in card for text in books["forget"])


class Killed(BaseException):
    """What no program handles."""


@pytest.mark.parametrize(("method", "at"), [("npo", 4), ("whp", 9)], ids=["npo", "whp"])
def test_after_a_crash_the_same_command_goes_on_to_the_same_weights(
    shoestring, files, tmp_path, monkeypatch, method, at
):
    more = ["--retain", files["retain"], "--save-every", 1, "--epochs", 3, "--relearn-steps", 0]
    shoestring(*command(files, tmp_path / "whole", *more, method=method))

    steps: list[int] = []
    step = torch.optim.AdamW.step

    def counted(self, *args, **kwargs):
        steps.append(len(steps))
        if stop_at is not None and len(steps) == stop_at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    stop_at = at
    again = command(files, tmp_path / "again", *more, method=method)
    result = shoestring(*again, code=130)
    assert "interrupted" in result.stderr
    assert not (tmp_path / "again").exists()
    assert (tmp_path / ".again.work").is_dir()
    stop_at, done = None, len(steps)

    # and once more, when the model is trained and the figures are not there yet
    room = importlib.import_module("shoestring.forget.evaluate")

    evaluate = room.evaluate
    monkeypatch.setattr(room, "evaluate", lambda *a, **k: (_ for _ in ()).throw(ValueError("no figures today")))
    assert shoestring(*again, code=1).stderr.strip().endswith("error: no figures today")
    trained = len(steps)
    assert trained > done
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(room, "evaluate", evaluate)
    result = shoestring(*again)
    assert f"going on from {tmp_path / '.again.work'}" in result.stderr
    assert len(steps) == trained  # nothing was trained twice
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    assert not (tmp_path / ".again.work").exists()


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (20, '{"glo'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert _forget_models._newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert _forget_models._newest_checkpoint(tmp_path / "none") is None


def test_work_of_another_job_is_not_mixed_in(shoestring, files, tmp_path, monkeypatch):
    from shoestring.forget.npo import NPOTrainer

    monkeypatch.setattr(NPOTrainer, "train", lambda self, **k: (_ for _ in ()).throw(OSError("the disk is full")))
    assert "the disk is full" in shoestring(*command(files, tmp_path / "out"), code=1).stderr
    before = contents(tmp_path / ".out.work")
    for change, what in [
        (["--seed", 3], "seed"),
        (["--retain", files["retain"]], "texts"),
        (["--beta", 0.5], "beta"),
    ]:
        said = shoestring(*command(files, tmp_path / "out", *change), code=1).stderr.strip().splitlines()[-1]
        assert f"holds an unfinished job with other {what}:" in said
    other = LlamaForCausalLM(LlamaConfig(vocab_size=3072, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, max_position_embeddings=64))  # fmt: skip
    other.save_pretrained(files["model"])
    assert "other weights" in shoestring(*command(files, tmp_path / "out"), code=1).stderr
    assert contents(tmp_path / ".out.work") == before
    (tmp_path / ".new.work").mkdir()
    (tmp_path / ".new.work" / "thesis.tex").write_text("mine")
    assert "in the way" in shoestring(*command(files, tmp_path / "new"), code=1).stderr
    assert (tmp_path / ".new.work" / "thesis.tex").read_text() == "mine"


def test_nothing_that_exists_is_overwritten(shoestring, files, tmp_path, monkeypatch):
    before = contents(files["model"])
    for out in (files["model"], files["forget"]):
        assert "exists: --out must be a new folder" in shoestring(*command(files, out), code=1).stderr
    assert contents(files["model"]) == before
    publish = _forget_models.publish_folder

    def late(result, out):
        out.mkdir()
        (out / "mine").write_text("mine")
        publish(result, out)

    monkeypatch.setattr(_forget_models, "publish_folder", late)
    result = shoestring(*command(files, tmp_path / "out", "--relearn-steps", 0), code=1)
    assert "has come into being meanwhile; the model is in" in result.stderr
    assert contents(tmp_path / "out").keys() == {"mine"}
    assert "model.safetensors" in contents(tmp_path / ".out.work" / "result")


def test_what_is_unusual_in_the_texts_is_counted(shoestring, files, books, tmp_path, monkeypatch):
    write(files["forget"], [*books["forget"], books["forget"][0] * 4, books["forget"][1] * 3, " ", ""])
    write(files["retain"], [*books["retain"], *books["forget"][:3]])
    write(files["held-out"], [*books["held-out"], books["retain"][0]])
    more = ["--retain", files["retain"], "--held-out", files["held-out"], "--relearn-steps", 0, "--retain-loss", "kl"]
    result = shoestring(*command(files, tmp_path / "out", *more))
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warned == [
        f"warning: 2 empty texts of {files['forget']} are left out",
        "warning: 3 texts are to be forgotten and to be kept: they pull both ways",
        "warning: 1 held-out texts are in the other files: they are not unseen",
        "warning: 2 of 8 forget texts are longer than 48 tokens: split",
    ]
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["model", "forget", "loss"]
    assert lines[2].startswith("npo ")
    assert "cannot be told" in result.stdout
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["evaluation"]["settings"]["samples"]["forget"] > 8  # blocks
    assert told["settings"]["retain_loss"] == "kl"


def test_long_texts_are_split_and_nothing_of_them_is_lost(files):
    model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    text = " ".join(map(str, range(300)))
    ids = tokenizer(text).input_ids
    rows = _forget_models._blocks("forget", [text, "Esther"], tokenizer, model, None)
    assert [token for row in rows[:-1] for token in row["input_ids"]] == ids
    assert max(len(row["input_ids"]) for row in rows) == 256
    assert tokenizer.model_max_length == 256
    with pytest.raises(ValueError, match="--length must be at most 256"):
        _forget_models._blocks("forget", [text], tokenizer, model, 300)
    tokenizer.backend_tokenizer.post_processor = None  # no first token of its own
    with pytest.raises(ValueError, match="single token"):
        _forget_models._blocks("forget", ["a"], tokenizer, model, None)


def test_a_tokenizer_of_another_vocabulary_is_found(shoestring, files, tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=3000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(files["model"])
    said = shoestring(*command(files, tmp_path / "out"), code=1).stderr
    assert "has 3072 tokens and the model embeds 3000: they do not belong together" in said
    assert not list(tmp_path.glob(".out*"))
    model, tokenizer = zoo.load("tiny-gpt"), zoo.load("tiny-gpt", "tokenizer")
    rows = _forget_models._blocks("forget", documents("train")[0][1:], tokenizer, model, None)
    capsys.readouterr()
    _forget_models._warn_of_another_tokenizer(model, rows, tokenizer, 4)
    assert capsys.readouterr().err == ""
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.flip(0)
    _forget_models._warn_of_another_tokenizer(model, rows, tokenizer, 4)
    assert f"chance {math.log(3072):.2f}): is this its tokenizer?" in capsys.readouterr().err


def test_a_loss_that_is_nan_stops_and_names_the_remedy(shoestring, files, tmp_path):
    before = contents(files["model"])
    # the last --lr counts
    result = shoestring(*command(files, tmp_path / "out", method="ga"), "--lr", 1e20, "--save-every", 1, code=1)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the loss is nan at step 2") or last.startswith("error: the gradient's norm is")
    assert f"is in {tmp_path / '.out.work'}. Remove that folder and give a lower --lr" in last
    assert not (tmp_path / "out").exists()
    assert contents(files["model"]) == before


@pytest.mark.parametrize("method", ["simnpo", "ga"])
def test_the_relatives_of_npo_forget_too(shoestring, files, tmp_path, method):
    told = json.loads(shoestring(*command(files, tmp_path / "out", "--json", method=method)).stdout)
    rows = told["evaluation"]["rows"]
    assert rows[1]["model"] == method
    assert rows[1]["forget_loss"] > 1.2 * rows[0]["forget_loss"]
    assert ("beta" in told["settings"]) == (method == "simnpo")


def test_whp_trains_on_generic_words_and_on_a_dictionary(shoestring, files, tmp_path):
    (tmp_path / "terms.json").write_text(json.dumps({"Esther": "Judith", "Ahasuerus": "Darius"}))
    more = ["--dictionary", tmp_path / "terms.json", "--epochs", 2, "--json"]
    found = json.loads(shoestring(*command(files, tmp_path / "out", *more, method="whp")).stdout)
    rows = found["evaluation"]["rows"]
    assert rows[1]["forget_loss"] > 1.2 * rows[0]["forget_loss"]
    assert found["settings"]["terms_in_the_dictionary"] == 2
    assert 0 < found["settings"]["share_of_changed_labels"] < 1
    assert "Who's Harry Potter" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "terms.json").write_text('["Esther"]')
    said = shoestring(*command(files, tmp_path / "new", *more, method="whp"), code=1).stderr
    assert "terms.json must be a JSON object" in said


def test_a_retrained_model_is_compared_with(shoestring, files, tmp_path):
    more = ["--retrained", "tiny-gpt", "--relearn-steps", 1, "--json"]  # a stand-in: the model itself
    rows = json.loads(shoestring(*command(files, tmp_path / "out", *more)).stdout)["evaluation"]["rows"]
    assert [row["model"] for row in rows] == ["original", "npo", "retrained"]
    assert rows[0]["forget_quality"] == rows[2]["forget_quality"] == 1.0 > rows[1]["forget_quality"]


BAD = {
    "no such file": (["--forget", "{d}/none.jsonl"], 1, "none.jsonl"),
    "an empty file": (["--forget", "{d}/empty.jsonl"], 1, "empty.jsonl holds no text"),
    "empty texts": (["--forget", "{d}/blank.jsonl"], 1, "blank.jsonl holds no text"),
    "a line that is no JSON": (["--forget", "{d}/broken.jsonl"], 1, "broken.jsonl:2 is not JSON"),
    "a line without text": (
        ["--retain", "{d}/nameless.jsonl"],
        1,
        'nameless.jsonl:1 must be an object with a string "text"',
    ),
    "another method": (["--method", "np"], 2, "did you mean 'npo'?"),
    "another retain loss": (["--retain-loss", "mse"], 2, "--retain-loss must be nll or kl"),
    "a learner too": (["--state", "{d}/s"], 2, "--state is for a learner"),
    "a folder in no folder": (["--out", "{d}/a/b"], 1, "create {d}/a first"),
    "more than the context": (["--length", "300"], 1, "--length must be at most 256"),
    "a rate of zero": (["--lr", "0"], 2, "--lr must be > 0"),
    "a folder without a model": (["{d}"], 1, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(shoestring, files, tmp_path, case):
    change, code, message = BAD[case]
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "blank.jsonl", ["", "\n "])
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "nameless.jsonl").write_text('{"words": "fine"}\n')
    change = [part.format(d=tmp_path) for part in change]
    arguments = command(files, tmp_path / "out")
    if not change[0].startswith("--"):
        arguments[1], change = change[0], []
    result = shoestring(*arguments, *change, code=code)
    assert message.format(d=tmp_path) in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not [name for name in os.listdir(tmp_path) if "out" in name and name != "held-out.jsonl"]


def test_several_processes_are_refused(shoestring, files, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "got 2" in shoestring(*command(files, tmp_path / "out"), code=1).stderr
    assert not list(tmp_path.glob(".out*"))


def test_what_is_missing_is_named(shoestring, files, tmp_path):
    for arguments in (
        ["forget"],
        ["forget", files["model"]],
        ["forget", files["model"], "--method", "npo"],
        ["forget", "--method", "npo", "--forget", files["forget"], "--out", tmp_path / "out"],
    ):
        assert "--method" in shoestring(*arguments, code=2).stderr
