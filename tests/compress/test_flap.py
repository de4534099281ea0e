import copy
import math
import subprocess
import sys
import tempfile

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

from shoestring.compress._flap_layouts import branches_of
from shoestring.compress.flap import (
    ColumnStats,
    allocate,
    column_scores,
    column_statistics,
    compensation,
    flap_load,
    flap_prune,
    standardize,
    wifv,
)

transformers.logging.disable_progress_bar()

WIDTH, NEURONS, LAYERS, TOKENS = 32, 40, 3, 64
GQA = {"num_key_value_heads": 4, "intermediate_size": NEURONS, "hidden_size": WIDTH, "num_attention_heads": 8}
ENCODER = {"hidden_size": WIDTH, "num_attention_heads": 8, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, num_hidden_layers=LAYERS, **GQA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(vocab_size=TOKENS, num_hidden_layers=LAYERS, **GQA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=TOKENS, num_hidden_layers=LAYERS, **GQA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=TOKENS, num_hidden_layers=LAYERS, head_dim=8, **GQA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=TOKENS, n_embd=WIDTH, n_head=8, n_layer=LAYERS, n_inner=NEURONS, n_positions=64)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=TOKENS, **ENCODER)),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=TOKENS, **ENCODER)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(vocab_size=TOKENS, **ENCODER)),
    "vit": lambda: ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=5, **ENCODER)),
}
ARCHITECTURES = list(MODELS)
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "neox"]
AUTO = {"bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM, "vit": AutoModelForImageClassification}


def make(name: str, dtype: torch.dtype = torch.float64):
    """A model whose every parameter, biases too, is away from its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def inputs(name: str, rows: int = 20, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return torch.randn(rows, 3, 16, 16, generator=generator, dtype=torch.float64)
    return torch.randint(3, TOKENS, (rows, 24), generator=generator)


@torch.no_grad()
def answers(model, x):
    return model(x).logits


def counts(model) -> list[tuple[int, int]]:
    """Heads (or key-value groups) and neurons of every layer, by the shapes."""
    units = [branch.units for branch in branches_of(model)]
    return list(zip(units[::2], units[1::2], strict=True))


def consumers(model) -> list[nn.Module]:
    return [branch.consumer for branch in branches_of(model)]


@torch.no_grad()
def inputs_of(model, modules, x) -> list[torch.Tensor]:
    """What the modules read while the model reads x: (tokens, d) each."""
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [m.register_forward_hook(lambda m, args, out: seen.__setitem__(m, args[0].flatten(0, -2))) for m in modules]
    model(x)
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in modules]


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- statistics and scores


def test_statistics_do_not_depend_on_the_split():
    x = torch.randn(500, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 100
    whole = ColumnStats().update(x)
    parts = ColumnStats().update(x[:1])
    for piece in (x[1:4], x[4:4], x[4:300].view(8, 37, 7)):
        parts.update(piece)
    left, right = ColumnStats().update(x[300:310]), ColumnStats().update(x[310:])
    merged = ColumnStats().merge(parts).merge(left.merge(right)).merge(ColumnStats())
    for stats in (whole, merged):
        assert stats.n == 500
        assert (stats.mean - x.mean(0)).abs().max() < 1e-10
        assert (stats.variance - x.var(0, unbiased=True)).abs().max() < 1e-10
        assert (stats.mean_square - (x**2).mean(0)).abs().max() < 1e-9
    assert right.n == 190  # what is merged in stays as it is


def test_statistics_of_half_precision_are_float64():
    x = torch.full((4096, 2), 1000.0, dtype=torch.float16)
    x[::2] += 1
    stats = ColumnStats().update(x)
    assert stats.mean.dtype == torch.float64
    assert torch.allclose(stats.mean, torch.tensor(1000.5, dtype=torch.float64))
    assert torch.allclose(stats.variance, torch.tensor(0.25 * 4096 / 4095, dtype=torch.float64))


def test_statistics_refuse():
    with pytest.raises(ValueError, match="columns"):
        ColumnStats().update(torch.ones(2, 3)).update(torch.ones(2, 4))
    with pytest.raises(ValueError, match="at least 2 rows"):
        _ = ColumnStats().update(torch.ones(1, 3)).variance
    with pytest.raises(ValueError, match="floating"):
        ColumnStats().update(torch.ones(1, 3, dtype=torch.int64))


def test_scores_are_the_definitions():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator) + 1
    W = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    stats = ColumnStats().update(x)
    for j in range(6):
        F = sum((float(v) - float(x[:, j].mean())) ** 2 for v in x[:, j]) / 49
        norm = math.sqrt(sum(float(v) ** 2 for v in x[:, j]) / 50)
        assert column_scores(W, stats, "IFV")[j].item() == pytest.approx(F)
        assert column_scores(W, stats, "WIFV")[j].item() == pytest.approx(F * sum(float(w) ** 2 for w in W[:, j]))
        assert column_scores(W, stats, "WIFN")[j].item() == pytest.approx(
            sum(abs(float(w)) for w in W[:, j]) / 4 * norm
        )


def test_rescaling_a_linear_branch_leaves_wifv_and_moves_ifv():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    W = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    a = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 10.0], dtype=torch.float64)
    before, after = ColumnStats().update(x), ColumnStats().update(x * a)
    assert torch.allclose(column_scores(W, before, "WIFV"), column_scores(W / a, after, "WIFV"), rtol=1e-12)
    assert not torch.allclose(column_scores(W, before, "IFV"), column_scores(W / a, after, "IFV"))


def test_error_of_uncorrelated_columns_is_the_sum_of_scores():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, dtype=torch.float64, generator=generator)
    x = torch.linalg.qr(x - x.mean(0)).Q * torch.arange(1, 7) + 5  # columns without any correlation
    W = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    stats, R = ColumnStats().update(x), torch.tensor([1, 3, 4])
    dense = x @ W.T
    W_pruned = W.clone()
    W_pruned[:, R] = 0
    error = dense - (x @ W_pruned.T + compensation(W, stats.mean, R))
    assert error.mean(0).abs().max() < 1e-12
    assert (error**2).sum().item() / 99 == pytest.approx(wifv(W, stats.variance)[R].sum().item(), rel=1e-10)


def test_standardized_scores():
    S = torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)
    assert standardize(S).tolist() == [-1, 0, 1]
    assert standardize(torch.ones(3)).tolist() == [0, 0, 0]
    assert standardize(torch.ones(1)).tolist() == [0]


# ---- allocation


def test_kept_cost_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, generator=generator)
    costs = torch.randint(1, 50, (60,), generator=generator)
    total, descending = int(costs.sum()), scores.argsort(descending=True)
    for ratio in (0.0, 0.1, 0.3, 0.55, 0.9, 0.999):
        keep = allocate(scores, costs, ratio)
        off = abs(int(costs[keep].sum()) - (1 - ratio) * total)
        assert off <= costs.max() / 2 + 1e-9
        assert off == pytest.approx(min(abs(int(costs[descending[:k]].sum()) - (1 - ratio) * total) for k in range(61)))
        if keep.any() and not keep.all():
            assert scores[keep].min() > scores[~keep].max()
    assert allocate(scores, costs, 0.0).all()


def test_what_is_kept_at_a_higher_ratio_is_a_subset():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (80,), generator=generator).double()  # many ties
    costs = torch.randint(1, 9, (80,), generator=generator)
    before = torch.ones(80, dtype=torch.bool)
    for ratio in torch.linspace(0, 0.99, 50).tolist():
        keep = allocate(scores, costs, ratio)
        assert not (keep & ~before).any()
        before = keep
    assert before.sum() < 3


def test_allocation_refuses():
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\)"):
        allocate(torch.ones(2), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="one shape"):
        allocate(torch.ones(2), torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="NaN"):
        allocate(torch.tensor([1.0, math.nan]), torch.ones(2), 0.1)
    with pytest.raises(ValueError, match="costs must be > 0"):
        allocate(torch.ones(2), torch.tensor([1.0, 0.0]), 0.1)


# ---- pruning


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ratio_zero_changes_nothing(name):
    model, x = make(name, torch.float32), inputs(name)
    same = flap_prune(model, x, 0.0)
    assert same is not model
    assert type(same) is type(model)
    assert same_state(same, model)
    assert same.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removal_answers_as_the_mask(name, structure):
    model, x = make(name), inputs(name)
    for bias in (True, False):
        small, masked = (
            flap_prune(model, x, 0.4, structure=structure, bias=bias, remove=remove) for remove in (True, False)
        )
        assert (answers(small, x) - answers(masked, x)).abs().max() < 1e-10
        assert (answers(small, x) - answers(model, x)).abs().max() > 1e-4
        assert counts(masked) == counts(model)
        assert small.num_parameters() < 0.9 * model.num_parameters()


def test_removal_answers_as_the_mask_in_single_precision():
    model, x = make("llama", torch.float32), inputs("llama")
    small, masked = (flap_prune(model, x, 0.4, remove=remove) for remove in (True, False))
    assert (answers(small, x) - answers(masked, x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_counts_to_the_unit(name):
    model, x = make(name), inputs(name)
    head = WIDTH // 8 if name != "qwen3" else 8
    w = WIDTH + (name not in ("llama", "mistral", "qwen3"))  # a row with its bias
    unit = {True: (2 + 2) * head * w + 2 * head * WIDTH, False: 3 * head * w + head * WIDTH}[name in DECODERS[:4]]
    gated = name in DECODERS[:4]
    neuron = 3 * WIDTH if gated else 2 * WIDTH + 1
    new_biases = LAYERS * 2 * WIDTH if gated else 0
    units = 4 if gated else 8
    total = LAYERS * (units * unit + NEURONS * neuron)
    for ratio in (0.2, 0.5):
        for structure in ("AL-AM", "UL-UM"):
            small = flap_prune(model, x, ratio, structure=structure)
            gone = sum((units - g) * unit + (NEURONS - f) * neuron for g, f in counts(small))
            zeros = 0
            if type(small) is LlamaForCausalLM:  # what transformers' one switch wants beside ours
                groups, neurons = counts(small)[0]
                zeros = LAYERS * (4 * groups * head + 2 * neurons)
            assert small.num_parameters() == model.num_parameters() - gone + new_biases + zeros
            assert abs(gone - ratio * total) <= (unit / 2 if structure == "AL-AM" else LAYERS * neuron / 2)


@pytest.mark.parametrize("power", [1, 2])
def test_units_kept_are_those_of_the_equations(power):
    """From the inputs of all layers at once, by loops."""
    model, x = make("llama"), inputs("llama")
    units, W, seen = [], [c.weight for c in consumers(model)], inputs_of(model, consumers(model), x)
    for layer in range(2 * LAYERS):
        attention = layer % 2 == 0
        S = seen[layer].var(0) * (W[layer] ** 2).sum(0)
        S = S**power if attention else S
        Z = (S - S.mean()) / S.std()
        for u, columns in enumerate(Z.view(4, 8) if attention else Z.view(-1, 1)):
            units.append((columns.mean().item(), layer, u, 6 * 4 * WIDTH if attention else 3 * WIDTH))
    units.sort(reverse=True)
    total = sum(cost for *_, cost in units)
    kept, cost, best = 0, 0, (total * 0.7, 0)
    for _, _, _, c in units:
        kept, cost = kept + 1, cost + c
        best = min(best, (abs(cost - total * 0.7), kept))
    small = flap_prune(model, x, 0.3, attn_power=power, remove=False)
    left = {(layer, u) for _, layer, u, _ in units[: best[1]]}
    for layer, consumer in enumerate(consumers(small)):
        columns = consumer.weight.abs().sum(0).view(4 if layer % 2 == 0 else NEURONS, -1)
        assert {u for u, column in enumerate(columns) if column.sum() > 0} == {u for k, u in left if k == layer}


def test_the_square_of_attention_decides():
    model, x = make("gpt2"), inputs("gpt2")
    assert counts(flap_prune(model, x, 0.5, attn_power=1)) != counts(flap_prune(model, x, 0.5, attn_power=2))


def test_uniform_takes_the_lowest_of_every_layer():
    model, x = make("gpt2"), inputs("gpt2")
    seen = inputs_of(model, consumers(model), x)
    small = flap_prune(model, x, 0.3, structure="UL-UM", remove=False)
    assert set(counts(flap_prune(model, x, 0.3, structure="UL-UM"))) == {
        (6, 25)
    }  # 2 of 8 heads, and 15 neurons: 0.3 of the block
    for layer, (consumer, dense) in enumerate(zip(consumers(small), consumers(model), strict=True)):
        S = seen[layer].var(0) * (dense.weight**2).sum(1)
        S = (S**2).view(8, 4).sum(1) if layer % 2 == 0 else S
        gone = consumer.weight.abs().sum(1).view(len(S), -1).sum(1) == 0
        assert set(S.argsort()[: int(gone.sum())].tolist()) == set(gone.nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_constant_neurons_go_without_a_trace(name):
    model, x = make(name), inputs(name)
    for i, branch in enumerate(branches_of(model)):
        if i % 2:  # MLP: ten neurons that do not look at their input
            for module, _ in branch.producers:
                if module.bias is None:
                    module.bias = nn.Parameter(torch.zeros(NEURONS, dtype=torch.float64))
                (module.weight.T if name == "gpt2" else module.weight).data[5:15] = 0
                module.bias.data[5:15] = 0.5
    heads, neurons = branches_of(model)[:2]
    ratio = 10 * neurons.cost / (heads.units * heads.cost + neurons.units * neurons.cost)
    options = {"structure": "UL-UM", "min_heads": 8 if name != "llama" else 4}
    small = flap_prune(model, x, ratio, **options)
    assert counts(small)[0][1] == NEURONS - 10
    other = inputs(name, seed=2)
    assert (answers(small, other) - answers(model, other)).abs().max() < 1e-10
    bare = flap_prune(model, x, ratio, bias=False, **options)
    assert (answers(bare, other) - answers(model, other)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["double", "single"]
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_compensation_keeps_the_mean_output(name, dtype, tolerance):
    model, x = make(name, dtype), inputs(name)
    x = x.to(dtype) if name == "vit" else x

    def first_mean(model, kind):
        means = []
        hook = consumers(model)[kind].register_forward_hook(lambda m, a, out: means.append(out.flatten(0, 1).mean(0)))
        answers(model, x)
        hook.remove()
        return means[0]

    for kind, option in ((0, {"min_neurons": NEURONS}), (1, {"min_heads": 8 if name != "llama" else 4})):
        for bias in (True, False):
            small = flap_prune(model, x, 0.3, bias=bias, **option)
            assert counts(small)[0][kind] < counts(model)[0][kind]
            off = (first_mean(small, kind) - first_mean(model, kind)).abs().max()
            assert off < tolerance if bias else off > 100 * tolerance


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_permuting_units_permutes_the_answer(name):
    model, x = make(name), inputs(name)
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for branch in branches_of(other):
        order = torch.randperm(branch.units, generator=generator)
        for module, rows in branch.producers:
            index = rows[order].flatten()
            module.weight.data = module.weight.data[index]
            if module.bias is not None:
                module.bias.data = module.bias.data[index]
        branch.consumer.weight.data = branch.consumer.weight.data[:, branch.columns[order].flatten()]
    assert (answers(model, x) - answers(other, x)).abs().max() < 1e-10
    small, permuted = flap_prune(model, x, 0.4), flap_prune(other, x, 0.4)
    assert counts(small) == counts(permuted)
    assert (answers(small, x) - answers(permuted, x)).abs().max() < 1e-10


def test_biases_that_are_there_are_added_to():
    model, x = make("gpt2"), inputs("gpt2")
    dense, stats = consumers(model)[1], ColumnStats().update(inputs_of(model, consumers(model), x)[1])
    small = consumers(flap_prune(model, x, 0.3, remove=False))[1]
    gone = (small.weight.abs().sum(1) == 0).nonzero().flatten()
    assert len(gone)
    expected = dense.bias + stats.mean[gone] @ dense.weight[gone]
    assert (small.bias - expected).abs().max() < 1e-12


def test_every_layer_keeps_its_minimum():
    model, x = make("llama"), inputs("llama")
    assert min(counts(flap_prune(model, x, 0.99))) >= (1, 1)
    for structure in ("AL-AM", "UL-UM"):
        small = flap_prune(model, x, 0.9, min_heads=2, min_neurons=3, structure=structure)
        assert all(groups >= 2 and neurons >= 3 for groups, neurons in counts(small))
        assert answers(small, x).isfinite().all()


def test_metric_may_be_a_function():
    model, x = make("llama"), inputs("llama")
    own = flap_prune(model, x, 0.3, metric=lambda W, stats: stats.variance)
    assert same_state(own, flap_prune(model, x, 0.3, metric="IFV"))
    by_name = {metric: flap_prune(model, x, 0.3, metric=metric, remove=False) for metric in ("WIFV", "IFV", "WIFN")}
    assert not same_state(by_name["WIFV"], by_name["IFV"])
    assert not same_state(by_name["WIFV"], by_name["WIFN"])


def test_pruned_once_more():
    model, x = make("gpt2"), inputs("gpt2")
    once = flap_prune(model, x, 0.3)
    twice = flap_prune(once, x, 0.3)
    masked = flap_prune(once, x, 0.3, remove=False)
    assert twice.num_parameters() < once.num_parameters()
    assert (answers(twice, x) - answers(masked, x)).abs().max() < 1e-10
    with tempfile.TemporaryDirectory() as folder:
        twice.save_pretrained(folder)
        assert same_state(flap_load(folder, dtype=torch.float64), twice)
    with pytest.raises(ValueError, match="layers of equal sizes"):
        flap_prune(once, x, 0.3, structure="UL-UM")


# ---- calibration


class Letters:
    """A tokenizer: a begin token, and a token a letter."""

    def __call__(self, text):
        return {"input_ids": [3, *(ord(letter) % 32 + 4 for letter in text)]}


def test_texts_are_joined_and_cut():
    model = make("llama")
    texts = ["in the beginning", "was", "the word " * 9] * 4
    ids = [token for text in texts for token in Letters()(text)["input_ids"]]
    whole = torch.tensor(ids)[: len(ids) // 16 * 16].view(-1, 16)
    by_texts = flap_prune(model, iter(texts), 0.3, tokenizer=Letters(), sequence_length=16)
    assert same_state(by_texts, flap_prune(model, whole, 0.3))
    assert same_state(by_texts, flap_prune(model, torch.tensor(ids), 0.3, sequence_length=16))
    first = flap_prune(model, (t for t in texts), 0.3, tokenizer=Letters(), sequence_length=16, max_sequences=3)
    assert same_state(first, flap_prune(model, whole[:3], 0.3))


def test_stream_is_read_no_further_than_needed():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "a text without an end"

    flap_prune(make("llama"), endless(), 0.3, tokenizer=Letters(), sequence_length=16, max_sequences=20)
    assert len(taken) < 30


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_batches_and_padding_do_not_matter(name):
    model, x = make(name), inputs(name)
    expected = answers(flap_prune(model, x, 0.3), x)
    assert torch.allclose(answers(flap_prune(model, list(x), 0.3), x), expected, atol=1e-9)
    padded = torch.cat([x, torch.zeros(len(x), 5, dtype=torch.int64)], 1)
    mask = (torch.arange(29) < 24).long().expand(len(x), -1)
    batches = [
        transformers.BatchEncoding({"input_ids": i, "attention_mask": m, "labels": i})
        for i, m in zip(padded.split(3), mask.split(3), strict=True)
    ]
    assert torch.allclose(answers(flap_prune(model, iter(batches), 0.3), x), expected, atol=1e-9)
    counted = flap_prune(model, [{"input_ids": padded}], 0.3)  # padding that counts, to see that it would show
    assert not torch.allclose(answers(counted, x), expected, atol=1e-9)


def test_statistics_of_two_machines_are_merged():
    model, x = make("llama"), inputs("llama")
    left, right = column_statistics(model, x[:7]), column_statistics(model, iter(x[7:]))
    merged = [a.merge(b) for a, b in zip(left, right, strict=True)]
    for ratio in (0.2, 0.5):
        assert torch.allclose(
            answers(flap_prune(model, merged, ratio), x), answers(flap_prune(model, x, ratio), x), atol=1e-10
        )
    with pytest.raises(ValueError, match="column_statistics of this model"):
        flap_prune(model, merged[1:] + merged[:1], 0.2)


# ---- the object that comes back


@pytest.mark.parametrize("structure", ["AL-AM", "UL-UM"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded_bit_for_bit(name, structure, tmp_path):
    model, x = make(name, torch.float32), inputs(name)
    small = flap_prune(model, x, 0.4, structure=structure)
    small.save_pretrained(tmp_path)
    for back in (flap_load(tmp_path), AUTO.get(name, AutoModelForCausalLM).from_pretrained(tmp_path)):
        assert type(back) is type(small)
        assert isinstance(back, type(model))
        assert same_state(back, small)
        assert torch.equal(answers(back, x), answers(small, x))


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "vit"])
def test_uniform_counts_keep_the_class(name):
    model, x = make(name), inputs(name)
    small = flap_prune(model, x, 0.4, structure="UL-UM", bias=name in ("llama", "vit"))
    assert type(small) is type(model)
    assert small.config.model_type == model.config.model_type


def test_transformers_alone_loads_uniform_and_names_shoestring_otherwise(tmp_path):
    model, x = make("llama", torch.float32), inputs("llama")
    uniform = flap_prune(model, x, 0.4, structure="UL-UM")
    uniform.save_pretrained(tmp_path / "uniform")
    flap_prune(model, x, 0.4).save_pretrained(tmp_path / "adaptive")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "uniform")!r})
x = torch.tensor({x[:2].tolist()})
torch.save(model(x).logits, {str(tmp_path / "logits")!r})
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "adaptive")!r})
except ValueError as error:
    print(error)
assert "shoestring" not in sys.modules
"""
    code = code.replace("torch.save(model(x).logits, ", "model(x).logits.detach().numpy().tofile(")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "shoestring.compress.flap" in done.stdout
    expected = answers(uniform, x[:2])
    found = torch.frombuffer(bytearray((tmp_path / "logits").read_bytes()), dtype=torch.float32)
    assert torch.allclose(found.view_as(expected), expected, atol=1e-6)  # other numbers of threads


@pytest.mark.parametrize("name", DECODERS)
def test_generates_with_the_cache_as_without(name, tmp_path):
    model, x = make(name), inputs(name)
    flap_prune(model, x, 0.5).save_pretrained(tmp_path)
    small = flap_load(tmp_path)
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    plain = small.generate(x[:2, :6], use_cache=False, **options)
    assert plain.shape == (2, 14)
    assert torch.equal(small.generate(x[:2, :6], use_cache=True, **options), plain)
    assert torch.equal(small.generate(x[:2, :6], cache_implementation="static", **options), plain)


def test_gradients_flow_through_what_is_left():
    small, x = flap_prune(make("llama"), inputs("llama"), 0.4), inputs("llama")
    small(x[:2], labels=x[:2]).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in small.parameters())


def test_the_model_given_stays_as_it_was():
    model, x = make("llama", torch.bfloat16), inputs("llama")
    model.train()
    model.model.layers[1].eval()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    small = flap_prune(model, x, 0.4)
    assert same_state(model, before)
    assert model.config.to_dict() == before.config.to_dict()
    assert all(not module._forward_pre_hooks for module in model.modules())
    for kept in (model, small):
        assert kept.training
        assert not kept.model.layers[1].training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert torch.equal(torch.get_rng_state(), state)


def test_in_place():
    model, x = make("llama"), inputs("llama")
    small = flap_prune(model, x, 0.4)
    assert flap_prune(model, x, 0.4, inplace=True) is model
    assert same_state(model, small)


def test_progress():
    for calibration in (inputs("llama"), list(inputs("llama")), iter(inputs("llama"))):
        seen: list[float] = []
        flap_prune(make("llama"), calibration, 0.3, progress=lambda done, text, seen=seen: seen.append(done))
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
        assert len(seen) > 3


# ---- what is refused


BAD = {
    "ratio of one": ({"pruning_ratio": 1.0}, ValueError, r"pruning_ratio must be in \[0, 1\), got 1.0"),
    "negative ratio": ({"pruning_ratio": -0.1}, ValueError, "pruning_ratio"),
    "ratio that is no number": ({"pruning_ratio": "0.2"}, TypeError, "pruning_ratio"),
    "unknown metric": ({"metric": "L2"}, ValueError, "'WIFV', 'IFV' or 'WIFN'"),
    "unknown structure": ({"structure": "UL-MM"}, ValueError, "'AL-AM' or 'UL-UM'"),
    "power of three": ({"attn_power": 3}, ValueError, "attn_power"),
    "no heads": ({"min_heads": 0}, ValueError, "min_heads"),
    "no neurons": ({"min_neurons": 0}, ValueError, "min_neurons"),
    "nothing prunable": ({"min_heads": 4, "min_neurons": NEURONS}, ValueError, "nothing prunable"),
    "tokens fewer than a block": ({"calibration": torch.arange(100)}, ValueError, "at least sequence_length = 128"),
    "texts shorter than a block": ({"calibration": ["a", "b"], "tokenizer": Letters()}, ValueError, "sequence_length"),
    "texts without a tokenizer": ({"calibration": ["a", "b"]}, ValueError, "needs a tokenizer"),
    "one text": ({"calibration": "a text", "tokenizer": Letters()}, TypeError, "iterable"),
    "no calibration": ({"calibration": []}, ValueError, "calibration is empty"),
    "no calibration rows": ({"calibration": torch.zeros(0, 8, dtype=torch.int64)}, ValueError, "calibration is empty"),
    "one token": ({"calibration": torch.tensor([[5]])}, ValueError, "at least 2 tokens"),
    "calibration of numbers": ({"calibration": [1, 2]}, TypeError, "tensors, dicts or texts, got int"),
    "calibration that ends badly": ({"calibration": [inputs("llama"), 3]}, TypeError, "got int"),
    "a metric that gives NaN": ({"metric": lambda W, s: s.mean * math.nan}, ValueError, "NaN or infinity at the input"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_refused_and_left_as_it_was(case):
    change, error, words = BAD[case]
    model = make("llama")
    before = copy.deepcopy(model)
    options = {"calibration": inputs("llama"), "inplace": True, **change}
    with pytest.raises(error, match=words):
        flap_prune(model, **options)
    assert same_state(model, before)
    assert model.config.to_dict() == before.config.to_dict()
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_refuses_models():
    x = inputs("llama")
    with pytest.raises(TypeError, match=r"transformers\.PreTrainedModel, got Linear"):
        flap_prune(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match=r"llama, mistral, qwen2, .*vit, got 't5'"):
        flap_prune(transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_ff=8, num_layers=1)), x)
    model = make("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in model\.layers\.0\.mlp\.up_proj\.weight"):
        flap_prune(model, x)
    with pytest.raises(ValueError, match="meta device"):
        flap_prune(make("llama").to("meta"), x)
    model = make("llama")
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="plain linear"):
        flap_prune(model, x)


def test_load_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        flap_load(tmp_path)
    small = flap_prune(make("llama"), inputs("llama"), 0.3)
    small.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace("FlapLlamaForCausalLM", "FlapNothing")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="must name a model class"):
        flap_load(tmp_path)
