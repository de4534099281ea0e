"""What `shoestring forget MODEL` does: a language model and texts in, a folder with another model and its card out.

Everything unfinished is in a work folder beside the one asked for, ``.NAME.work``: checkpoints, from which the same
command goes on after a crash, and the result until it is whole. The folder asked for appears in one step.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoestring._files import publish_folder
from shoestring.cli import _console

if TYPE_CHECKING:
    from shoestring.forget.evaluate import Evaluation

METHODS = ("npo", "simnpo", "ga", "whp")
EVALUATED = 512  # blocks of a set that are measured, evenly spread

Method = Annotated[
    str | None, typer.Option("--method", metavar="SLUG", help=f"A language model: {', '.join(METHODS)}.")
]
Forget = Annotated[Path | None, typer.Option("--forget", metavar="FILE", help='Its texts: JSON lines with "text".')]
Retain = Annotated[
    Path | None, typer.Option("--retain", metavar="FILE", help="Texts like those that shall stay, likewise.")
]
HeldOut = Annotated[
    Path | None,
    typer.Option("--held-out", metavar="FILE", help="Texts like the forgotten ones that the model never saw."),
]
Retrained = Annotated[
    str | None, typer.Option("--retrained", metavar="MODEL", help="A model trained without the texts, to compare.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="New folder for the model.")]
Epochs = Annotated[int | None, typer.Option("--epochs", min=1, metavar="N", help="Passes.", show_default="10; whp: 2")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate.", show_default="1e-5; whp: 1e-6")]
Batch = Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Blocks of a step.")]
Length = Annotated[
    int | None,
    typer.Option("--length", min=2, metavar="N", help="Tokens of a block.", show_default="512 or the context"),
]
Beta = Annotated[
    float | None,
    typer.Option("--beta", help="npo, simnpo: smaller forgets more.", show_default="npo: 0.1, simnpo: 2.5"),
]
RetainLoss = Annotated[str, typer.Option("--retain-loss", metavar="nll|kl", help="What holds the other texts.")]
Alpha = Annotated[float, typer.Option("--alpha", help="whp: how far what is known of the text is pushed down.")]
Dictionary = Annotated[
    Path | None,
    typer.Option("--dictionary", metavar="FILE", help='whp: JSON, {"term of the texts": "its generic translation"}.'),
]
RelearnSteps = Annotated[
    int, typer.Option("--relearn-steps", min=0, metavar="N", help="At most so many; 0: do not try to relearn.")
]
SaveEvery = Annotated[int, typer.Option("--save-every", min=1, metavar="STEPS", help="From checkpoint to checkpoint.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the order of texts.")]

Report = Callable[[float | None, str], None]


@dataclass(frozen=True)
class Options:
    """What the method is told; part of what makes a job the same."""

    method: str
    epochs: int | None
    lr: float | None
    batch: int
    length: int | None
    beta: float | None
    retain_loss: str
    alpha: float
    dictionary: dict[str, str] | None
    save_every: int
    seed: int


def forget(
    source: str,
    options: Options,
    *,
    forget: Path,
    retain: Path | None,
    held_out: Path | None,
    retrained: str | None,
    out: Path,
    relearn_steps: int,
    device: str,
    as_json: bool,
) -> None:
    """Read, unlearn, judge, write."""
    if options.method not in METHODS:
        near = _console.did_you_mean(options.method, METHODS)
        raise _console.UsageError(f"--method must be one of {', '.join(METHODS)}, got {options.method!r}{near}")
    if options.retain_loss not in ("nll", "kl"):
        raise _console.UsageError(f"--retain-loss must be nll or kl, got {options.retain_loss!r}")
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"the command works in one process, got {processes}: use NPOTrainer in a script of your own")
    if options.lr is not None and not options.lr > 0:
        raise _console.UsageError(f"--lr must be > 0, got {options.lr}")
    out = Path(os.path.abspath(out))
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: --out must be a new folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist: create {out.parent} first")
    files = {"forget": forget, "retain": retain, "held-out": held_out}
    texts = {name: _read(path) for name, path in files.items() if path is not None}
    _warn_of_overlaps(texts)

    import torch
    import transformers.utils.logging  # noqa: F401 - else `_no_bars` does not know of it

    from shoestring.zoo import _no_bars

    start = time.perf_counter()
    with _no_bars(), _warnings_as_lines(), _console.progress(f"forgetting in {source}") as report:
        report(None, "loading the model")
        original, tokenizer = _load(source, device)
        rows = {name: _blocks(name, found, tokenizer, original, options.length) for name, found in texts.items()}
        _warn_of_another_tokenizer(original, rows["forget"], tokenizer, options.batch)
        work = out.with_name(f".{out.name}.work")
        resumed = _open_work(work, _job(original, options, rows))
        run = _whp if options.method == "whp" else _preference
        try:
            made, told = run(original, tokenizer, rows, options, work, device, report)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}; the last checkpoint before is in {work}. Remove that folder and give a lower --lr"
            ) from error
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        made.save_pretrained(result)
        tokenizer.save_pretrained(result)
        del made
        model = _model(str(result), device)  # what is judged is what was written
        evaluation = _judge(model, original, retrained, rows, tokenizer, told, options, relearn_steps, device, report)
    summary = {
        "out": str(out),
        "method": options.method,
        "base_model": source,
        "settings": told,
        "forgotten": {"file": forget.name, "sha256": _sha256(forget), "texts": len(texts["forget"])},
        "evaluation": evaluation.to_dict(),
        "resumed": resumed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (result / "evaluation.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if "retain" in rows:
        evaluation.plot(result / "forget-retain.svg")
    (result / "README.md").write_text(_card(summary, evaluation, torch.__version__), encoding="utf-8")
    try:
        publish_folder(result, out)
    except FileExistsError as error:
        raise FileExistsError(f"{error}; the model is in {result}") from None
    shutil.rmtree(work, ignore_errors=True)
    if as_json:
        _console.print_json(summary)
        return
    header, cells = evaluation.cells()
    _console.print_table(header, cells, right=range(1, len(header) - 1))
    _console.say(f"\n{_verdict(evaluation)}\nWritten to {out}")


# ---- in


def _read(path: Path) -> list[str]:
    """The texts of a file of JSON lines; the first line that is none is named."""
    found, empty = [], 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}:{number} must be an object with a string "text", got {line.strip()[:60]}')
            if row["text"].strip():
                found.append(row["text"])
            else:
                empty += 1
    if not found:
        raise ValueError(f"{path} holds no text")
    if empty:
        typer.echo(f"warning: {empty} empty texts of {path} are left out", err=True)
    return found


def dictionary(path: Path | None) -> dict[str, str] | None:
    """Terms and their translations, or None."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f'{path} must be a JSON object {{"term": "its generic translation"}}')
    return found


def _warn_of_overlaps(texts: dict[str, list[str]]) -> None:
    known = set(texts["forget"])
    if common := len(known.intersection(texts.get("retain", ()))):
        typer.echo(f"warning: {common} texts are to be forgotten and to be kept: they pull both ways", err=True)
    if common := len({*texts.get("held-out", ())} & {*known, *texts.get("retain", ())}):
        typer.echo(f"warning: {common} held-out texts are in the other files: they are not unseen", err=True)


def _load(source: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer that belong together."""
    from transformers import AutoTokenizer

    model = _model(source, device)
    tokenizer = AutoTokenizer.from_pretrained(_place(source))
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens and the model embeds {rows}: they do not belong "
            "together"
        )
    return model, tokenizer


def _model(source: str, device: str) -> Any:
    """In float32 and eval mode, from safetensors, without code of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(_place(source), dtype=torch.float32, use_safetensors=True)
    return model.to(device).eval()


def _place(source: str) -> str:
    """A model of the zoo by name, or the folder or hub id itself."""
    from shoestring import zoo

    return str(zoo.path(source)) if source in zoo.names() else source


def _blocks(name: str, texts: Sequence[str], tokenizer: Any, model: Any, length: int | None) -> list[dict[str, Any]]:
    """Token ids, no more of them in a row than a block's: what is longer is split, since all of it shall go."""
    from shoestring.forget._token_rows import vocabulary_and_context

    context = vocabulary_and_context(model)[1]
    if length is not None and context is not None and length > context:
        raise ValueError(f"--length must be at most {context}, the model's context, got {length}")
    size = length or min(512, context or 512)
    asked, tokenizer.model_max_length = tokenizer.model_max_length, int(1e30)  # it would warn of what is split here
    try:
        found = tokenizer(list(texts)).input_ids
    finally:
        tokenizer.model_max_length = asked
    split = sum(len(ids) > size for ids in found)
    rows = [ids[i : i + size] for ids in found for i in range(0, len(ids), size)]
    rows = [ids for ids in rows if len(ids) > 1]  # one token has nothing to predict
    if not rows:
        raise ValueError(f"the {name} texts are of a single token each: there is nothing to predict in them")
    if split:
        typer.echo(f"warning: {split} of {len(texts)} {name} texts are longer than {size} tokens: split", err=True)
    return [{"input_ids": ids} for ids in rows]


def _batches(rows: Sequence[dict[str, Any]], size: int, tokenizer: Any, device: str) -> list[Any]:
    from shoestring.forget._token_rows import pad_rows

    rows = rows[:: -(-len(rows) // EVALUATED)]
    return [pad_rows(rows[i : i + size], tokenizer.pad_token_id or 0) for i in range(0, len(rows), size)]


def _warn_of_another_tokenizer(model: Any, rows: Sequence[dict[str, Any]], tokenizer: Any, size: int) -> None:
    from shoestring.forget.evaluate import sample_losses

    loss = sample_losses(model, _batches(rows[:32], size, tokenizer, "cpu"), "language").mean()
    chance = math.log(model.get_input_embeddings().num_embeddings)
    if loss > chance:
        typer.echo(
            f"warning: the model finds the texts less likely than chance ({loss:.2f} nats a token, chance "
            f"{chance:.2f}): is this its tokenizer?",
            err=True,
        )


# ---- the job and its folder


def _job(model: Any, options: Options, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What must be the same for a run to go on: the weights, the texts as tokens, and the options."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item():.17g}".encode())
    learnt = {name: rows[name] for name in ("forget", "retain") if name in rows}
    told = hashlib.sha256(json.dumps(learnt).encode()).hexdigest()
    return {"weights": weights.hexdigest(), "texts": told, **vars(options)}


def _open_work(work: Path, job: dict[str, Any]) -> bool:
    """Whether there is something to go on from; another job's folder is refused."""
    file = work / "job.json"
    if not file.exists():
        if work.exists() and any(work.iterdir()):
            raise ValueError(f"{work} is in the way: it holds no job of this command; remove it")
        work.mkdir(exist_ok=True)
        from shoestring._files import atomic_path

        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(job, indent=1), encoding="utf-8")
        return False
    before = json.loads(file.read_text(encoding="utf-8"))
    if before != job:
        other = ", ".join(name for name in job if before.get(name) != job[name])
        raise ValueError(
            f"{work} holds an unfinished job with other {other}: give the same command to go on, or remove the folder"
        )
    typer.echo(f"going on from {work}", err=True)
    return True


# ---- the methods


def _preference(
    original: Any,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    options: Options,
    work: Path,
    device: str,
    report: Report,
) -> tuple[Any, dict[str, Any]]:
    """NPO and its relatives, by `NPOTrainer`."""
    import copy

    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from shoestring.forget.npo import NPOTrainer

    epochs, lr = options.epochs or 10, options.lr or 1e-5

    class Show(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            report(0.8 * state.global_step / state.max_steps, f"step {state.global_step} of {state.max_steps}")

    args = TrainingArguments(
        str(work / "checkpoints"),
        per_device_train_batch_size=options.batch,
        num_train_epochs=epochs,
        learning_rate=lr,
        weight_decay=0.01,  # the paper's, as is the warm-up of one epoch
        warmup_steps=-(-len(rows["forget"]) // options.batch) if epochs > 1 else 0,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=options.seed,
    )
    trainer = NPOTrainer(
        copy.deepcopy(original),
        args,
        forget_dataset=rows["forget"],
        retain_dataset=rows.get("retain"),
        forget_loss=options.method,  # type: ignore[arg-type]
        retain_loss=options.retain_loss,  # type: ignore[arg-type]
        beta=options.beta,
        ref_model=original if options.method == "npo" or options.retain_loss == "kl" else None,
        processing_class=tokenizer,
        callbacks=[Show()],
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for the result
    trainer.train(resume_from_checkpoint=_newest_checkpoint(work / "checkpoints"))
    told: dict[str, Any] = {"epochs": epochs, "lr": lr, "batch": options.batch, "steps": trainer.state.global_step}
    if options.method != "ga":
        told["beta"] = trainer.beta
    if "retain" in rows:
        told["retain_loss"] = options.retain_loss
    return trainer.model.eval(), told


def _newest_checkpoint(folder: Path) -> str | None:
    """The last one that was written to its end: trainer_state.json is the last of its files."""

    def whole(path: Path) -> bool:
        try:
            return bool(json.loads((path / "trainer_state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return False

    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return next((str(path) for path in reversed(found) if whole(path)), None)


def _whp(
    original: Any,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    options: Options,
    work: Path,
    device: str,
    report: Report,
) -> tuple[Any, dict[str, Any]]:
    """Reinforce, label, fine-tune, by `WHPUnlearner`."""
    from datasets import Dataset

    from shoestring.forget.whp import WHPUnlearner

    epochs, lr = options.epochs or 2, options.lr or 1e-6
    whp = WHPUnlearner(
        original,
        tokenizer,
        options.dictionary,
        alpha=options.alpha,
        batch_size=options.batch,
        accumulate=1,
        seed=options.seed,
    )
    texts = Dataset.from_list(rows["forget"])
    steps = -(-len(rows["forget"]) // options.batch)

    def fit_options(name: str, before: int) -> dict[str, Any]:
        def show(state: Any) -> None:
            done = (before + state.step) / (steps * (3 + epochs))
            report(0.8 * min(done, 1.0), f"{name}, step {state.step}")

        keep = {"checkpoint": work / name, "checkpoint_every": options.save_every}
        return {**keep, "callbacks": [show], "progress": False}

    if options.alpha:
        # three epochs at three times the rate of the fine-tuning, as in the paper
        whp.reinforce(texts, epochs=3, lr=3 * lr, **fit_options("reinforce", 0))
    labelled = whp.label(texts)
    model = whp.finetune(labelled, epochs=epochs, lr=lr, **fit_options("finetune", 3 * steps))
    told = {"epochs": epochs, "lr": lr, "batch": options.batch, "alpha": options.alpha}
    told |= {"share_of_changed_labels": whp.changed_, "terms_in_the_dictionary": len(whp.anchors_)}
    return model.eval(), told


# ---- out


def _judge(
    model: Any,
    original: Any,
    retrained: str | None,
    rows: dict[str, list[dict[str, Any]]],
    tokenizer: Any,
    told: dict[str, Any],
    options: Options,
    relearn_steps: int,
    device: str,
    report: Report,
) -> Evaluation:
    from shoestring.forget.evaluate import evaluate

    sets = {name: _batches(found, options.batch, tokenizer, device) for name, found in rows.items()}
    other = None
    if retrained is not None:
        other = _model(retrained, device)
        if other.get_input_embeddings().num_embeddings != original.get_input_embeddings().num_embeddings:
            raise ValueError(f"--retrained {retrained} has another vocabulary than the model")
    return evaluate(
        {options.method: model},
        original,
        sets["forget"],
        retain=sets.get("retain"),
        holdout=sets.get("held-out"),
        retrained=other,
        losses="language",
        relearn_steps=relearn_steps,
        relearn_lr=told["lr"],
        progress=lambda done, text: report(0.8 + 0.2 * done, text),
    )


def _verdict(evaluation: Evaluation) -> str:
    """What the finding of the one model means, in a sentence."""
    row = next(row for row in evaluation.rows if "finding" in row)
    said = {
        "unchanged": "Nothing has changed: more epochs, a higher --lr or a smaller --beta are needed.",
        "not forgotten": "The texts cost the model as much as before: more epochs, a higher --lr or a smaller --beta "
        "are needed.",
        "forgets": "The texts are as hard to learn again as texts it never read, by these measures. That is no proof.",
        "undecided": "The texts cost the model more than before. Whether they are gone or only hidden cannot be told: "
        "give --held-out or --retrained to compare with, and more --relearn-steps.",
    }
    finding = row["finding"]
    if finding == "only hides":
        back = f"It only hides them: they are back in {row['relearn_steps']} steps of fine-tuning"
        if row["model"] not in evaluation.settings["first_time"]:
            return f"{back}, before each was read once."
        first, whose = evaluation.settings["first_time"][row["model"]]
        most = evaluation.settings["relearn_steps"]
        return f"{back}; learning for the first time takes {f'more than {most}' if first is None else first} ({whose})."
    return said[finding]


def _card(summary: dict[str, Any], evaluation: Evaluation, torch_version: str) -> str:
    """The model's card, in the hub's form."""
    from shoestring import __version__, card

    method, forgotten, settings = summary["method"], summary["forgotten"], summary["settings"]
    slug = "whp" if method == "whp" else "npo"
    paper = card(slug)
    name = {
        "npo": "NPO",
        "simnpo": "SimNPO, a relative of NPO",
        "ga": "gradient ascent, the baseline of NPO",
        "whp": "training on generic predictions",
    }[method]
    first = evaluation.settings["first_time"]
    most = evaluation.settings["relearn_steps"]
    compared = "".join(
        "- Learning for the first time, by which hiding is told: "
        f"{f'more than {most}' if steps is None else steps} steps ({whose}).\n"
        for steps, whose in first.values()
    )
    return f"""---
base_model: {json.dumps(summary["base_model"])}
library_name: transformers
pipeline_tag: text-generation
tags: [unlearning, shoestring]
---

# {Path(summary["out"]).name}

{summary["base_model"]}, made to forget texts.

- Base model: `{summary["base_model"]}`
- Method: {name}, *{paper.title}* ({paper.year}, arXiv {paper.arxiv})
- Settings: {_words(settings)}
- Forgotten: {forgotten["texts"]:,} texts, the file `{forgotten["file"]}` (not in this folder) of SHA-256
  {forgotten["sha256"]}
- Made with shoestring {__version__}, torch {torch_version}, in {summary["seconds"]:g} s

## Measured

{evaluation.to_markdown()}
- Samples: {_words(evaluation.settings["samples"])}. Losses are nats a token.
{compared}
{_verdict(evaluation)}

Approximate unlearning: the weights still depend on the texts, and these figures are measures, not a proof that nothing
of them can be brought back. What each measure means: `shoestring.forget.evaluate`.
"""


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}" if isinstance(value, int | float) else f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """A UserWarning of ours is a line on stderr; the overlaps have been told already, as texts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*samples in common", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*among the rows to retain", category=UserWarning)
        warnings.showwarning = lambda message, *more, **other: typer.echo(f"warning: {message}", err=True)
        yield
