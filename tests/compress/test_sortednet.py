"""SortedNet: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shoestring.compress._saved import load_into, save
from shoestring.compress.sortednet import (
    SortedModel,
    SortedTrainerMixin,
    draw_subnets,
    prefix,
    recalibrate_norms,
    sorted_loss,
    sorted_step,
    step_generator,
    subnet_probs,
    unit_count,
)

WIDTHS = {"width": [0.25, 0.5, 1.0]}


class ConvBlock(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv_2, self.norm_2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(*(ConvBlock(8, 12) for _ in range(4)))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.max_pool2d(self.blocks(self.stem(x)), 2).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(6, 16), nn.ModuleList(Block(16) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(16, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Linear(10, 3)),
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 20), nn.Tanh()),
        nn.Linear(20, 3),
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=11, max_position_embeddings=8, num_labels=3))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 20}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=2, num_labels=3))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=3, n_head=4, n_inner=20, vocab_size=11, n_positions=8))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=24, num_hidden_layers=3, intermediate_size=20, vocab_size=11, head_dim=6, **heads)
    )


BOTH = {"depth": [1, 2, 3], **WIDTHS}
NETWORKS = {
    "mlp": (mlp, WIDTHS),
    "cnn": (cnn, WIDTHS),
    "resnet": (ResNet, {"depth": [1, 2, 4], **WIDTHS}),
    "residual_mlp": (ResidualMLP, {"depth": [1, 2, 4], **WIDTHS}),
    "bert": (bert, BOTH),
    "vit": (vit, BOTH),
    "gpt2": (gpt2, BOTH),
    "llama": (llama, BOTH),
}
every = pytest.mark.parametrize("name", NETWORKS)
transformer = pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama"])


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name][0]().to(dtype)
    for tensor in [*model.parameters(), *model.buffers()]:  # nothing at its neutral value
        if tensor.is_floating_point() and "rotary" not in name and tensor.ndim == 1 and name != "llama":
            tensor.data.add_(0.3 * torch.rand_like(tensor))
    if name in ("bert", "vit", "gpt2", "llama"):
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()


def inputs(name: str, rows: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name in ("bert", "gpt2", "llama"):
        return torch.randint(11, (rows, 7), generator=generator)
    shape = (rows, 2, 8, 8) if name in ("cnn", "resnet", "vit") else (rows, 6)
    return torch.randn(shape, generator=generator, dtype=dtype)


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def sorted_net(name: str, dtype: torch.dtype = torch.float32) -> SortedModel:
    return SortedModel(make(name, dtype), NETWORKS[name][1]).eval()


def loss_fn(model, x):
    return (run(model, x) ** 2).mean()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def inside(key: str, whole: torch.Tensor, small: torch.Tensor) -> torch.Tensor:
    """Where `small` lies in `whole`: the first entries along every axis, of a fused c_attn those of its three parts."""
    where = torch.zeros_like(whole, dtype=torch.bool)
    if "c_attn" in key:
        where.unflatten(-1, (3, -1))[..., : small.shape[-1] // 3] = True
    else:
        where[tuple(slice(n) for n in small.shape)] = True
    return where


# ---- exact properties


@every
def test_largest_subnet_is_the_original_bitwise(name):
    model, x = make(name), inputs(name)
    expected = run(copy.deepcopy(model), x)
    net = SortedModel(model, NETWORKS[name][1])
    assert torch.equal(run(net, x), expected)
    net.set_subnet(0)
    assert not torch.equal(run(net, x), expected)
    net.set_subnet(-1)
    assert torch.equal(run(net, x), expected)
    with net.subnet(len(net) - 1):
        assert torch.equal(run(net, x), expected)
    assert net.model is model
    assert torch.equal(run(net.extract(-1), x), expected)


@every
def test_extract_equals_wrapper(name):
    net, x = sorted_net(name), inputs(name)
    for i in range(len(net)):
        small = net.extract(i)
        net.set_subnet(i)
        torch.testing.assert_close(run(small, x), run(net, x), rtol=0, atol=1e-6)
        assert type(small) is type(net.model)
        assert sum(p.numel() for p in small.parameters()) == net.parameter_count(i)


@every
def test_parameters_are_nested_and_gradients_zero_outside(name):
    net, x = sorted_net(name), inputs(name)
    for i in range(len(net)):
        net.zero_grad()
        with net.subnet(i):
            loss_fn(net, x).backward()
        small = net.extract(i)
        loss_fn(small, x).backward()
        kept = dict(small.named_parameters())
        for key, p in net.model.named_parameters():
            if key not in kept:
                assert p.grad is None, key
                continue
            where = inside(key, p, kept[key])
            assert torch.equal(p[where], kept[key].flatten())
            if p.grad is None:
                assert kept[key].grad is None
                continue
            torch.testing.assert_close(p.grad[where], kept[key].grad.flatten(), rtol=1e-4, atol=1e-7)
            assert not p.grad[~where].any(), key
    for i, smaller in enumerate(net.subnets):  # the product of chains is ordered
        for j, larger in enumerate(net.subnets):
            if all(smaller[key] <= larger[key] for key in smaller):
                a, b = (dict(net.extract(k).named_parameters()) for k in (i, j))
                assert a.keys() <= b.keys()
                assert all(torch.equal(b[key][inside(key, b[key], a[key])], a[key].flatten()) for key in a)


@every
def test_parameters_and_flops_grow(name):
    net, x = sorted_net(name), inputs(name)
    counts, flops = [], []
    for i in range(len(net)):
        with FlopCounterMode(display=False) as counter:
            run(net.extract(i), x)
        counts.append(net.parameter_count(i))
        flops.append(counter.get_total_flops())
    for a, smaller in enumerate(net.subnets):
        for b, larger in enumerate(net.subnets):
            if smaller != larger and all(smaller[key] <= larger[key] for key in smaller):
                assert counts[a] < counts[b]
                assert flops[a] < flops[b]


def test_parameter_count_to_the_unit():
    net = SortedModel(cnn(), WIDTHS)
    first, last = 2 * 2 * 9 + 2 + 2 * 2 + 2 * 9 + 2 + 2 * 2, 3 * 5 + 3
    assert net.parameter_count(0) == first + (2 * 3 + 3) + (3 * 4 * 5 + 5) + last  # 2 of 8, 3 of 12, 5 of 20
    net = SortedModel(llama(), WIDTHS)
    attention, ffn, norms = 24 * 6 * (2 + 1 + 1 + 2), 3 * 24 * 5, 2 * 24  # 2 heads, 1 group, 5 of 20 neurons
    assert net.parameter_count(0) == 3 * (attention + ffn + norms) + 24 + 2 * 11 * 24


def test_accumulated_gradient_is_the_mean_of_the_drawn():
    net, x = sorted_net("residual_mlp", torch.float64), inputs("residual_mlp", dtype=torch.float64)
    drawn = draw_subnets(subnet_probs(len(net)), 5, step_generator(3))
    assert len(set(drawn)) > 2
    expected = [torch.zeros_like(p) for p in net.parameters()]
    losses = []
    for i in drawn:
        net.zero_grad()
        net.set_subnet(i)
        losses.append(loss_fn(net, x))
        losses[-1].backward()
        for total, p in zip(expected, net.parameters(), strict=True):
            total += 0 if p.grad is None else p.grad / 5
    net.set_subnet(-1)
    still = torch.optim.SGD(net.parameters(), lr=0.0)
    loss = sorted_step(net, loss_fn, x, still, generator=step_generator(3), n_accumulate=5)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=0, atol=1e-12)
    for total, p in zip(expected, net.parameters(), strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, total, rtol=0, atol=1e-12)
    net.zero_grad()
    sorted_loss(net, loss_fn, x, drawn).backward()
    for total, p in zip(expected, net.parameters(), strict=True):
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, total, rtol=0, atol=1e-12)


def test_expected_gradient_is_that_of_the_mean_loss():
    net, x = sorted_net("cnn", torch.float64), inputs("cnn", dtype=torch.float64)
    P = subnet_probs(len(net), [5, 2, 1])
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(len(net)):  # every one-hot draw, by its probability
        still = torch.optim.SGD(net.parameters(), lr=0.0)
        one = F.one_hot(torch.tensor(i), len(net))
        sorted_step(net, loss_fn, x, still, generator=step_generator(0), n_accumulate=1, distribution=one)
        for total, p in zip(expected, net.parameters(), strict=True):
            total += P[i] * p.grad
    net.zero_grad()
    losses = [sorted_loss(net, loss_fn, x, [i]) for i in range(len(net))]
    (P @ torch.stack(losses)).backward()
    for total, p in zip(expected, net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_accumulate", [1, 2])
def test_point_mass_on_the_whole_is_plain_training(n_accumulate):
    plain, net = make("cnn"), sorted_net("cnn")
    plain.train()
    net.train()
    a, b = (torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1) for m in (plain, net))
    for step in range(5):
        x = inputs("cnn") * (step + 1)
        a.zero_grad()
        for _ in range(n_accumulate):
            expected = loss_fn(plain, x) / n_accumulate
            expected.backward()
        a.step()
        options = {"n_accumulate": n_accumulate, "full_prob": 1.0}
        loss = sorted_step(net, loss_fn, x, b, generator=step_generator(step), **options)
        torch.testing.assert_close(loss, n_accumulate * expected.detach(), rtol=1e-6, atol=0)
    assert same(state(net.model), state(plain))


@pytest.mark.parametrize("name", ["residual_mlp", "resnet", "llama", "gpt2", "vit"])
def test_depth_cut_of_zeroed_blocks_changes_nothing(name):
    model, x = make(name), inputs(name)
    net = SortedModel(model, {"depth": NETWORKS[name][1]["depth"]})
    blocks = model.get_submodule(net.blocks)
    for block in list(blocks)[1:]:
        for key, p in block.named_parameters():
            if key.startswith(("down", "norm_2")) or any(
                f"{part}." in key for part in ("o_proj", "down_proj", "c_proj", "fc2")
            ):
                p.data.zero_()
    for key, buffer in [*model.named_buffers(), *net.named_buffers()]:
        if "norm_2" in key and "mean" in key:
            buffer.zero_()
    if name == "resnet":
        net = SortedModel(model, net.spec)
    full = run(net.eval(), x)
    for i in range(len(net)):
        net.set_subnet(i)
        torch.testing.assert_close(run(net, x), full, rtol=0, atol=1e-6)


# ---- equation (1), by hand and by masks


def test_width_is_the_sliced_product():
    model, x = make("mlp"), inputs("mlp")
    net = SortedModel(model, WIDTHS).eval()
    a, norm, b, bn, c = model[0], model[1], model[4], model[5], model[7]
    for i, (k, m) in enumerate([(4, 3), (8, 5)]):  # of 16; of 10: 2.5 is 3
        h = F.linear(x, a.weight[:k], a.bias[:k])
        h = F.layer_norm(h, (k,), norm.weight[:k], norm.bias[:k], norm.eps).relu()
        h = F.linear(h, b.weight[:m, :k], b.bias[:m])
        h = (h - bn.running_mean[:m]) / (bn.running_var[:m] + bn.eps).sqrt() * bn.weight[:m] + bn.bias[:m]
        expected = F.linear(F.gelu(h), c.weight[:, :m], c.bias)
        with net.subnet(i):
            torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


def test_narrow_residual_mlp_is_written_out():
    net, x = sorted_net("residual_mlp"), inputs("residual_mlp")
    model, k, m = net.model, 8, 10
    h = F.linear(x, model.stem.weight[:k], model.stem.bias[:k])
    for block in model.blocks[:2]:
        n = F.layer_norm(h, (k,), block.norm.weight[:k], block.norm.bias[:k])
        n = F.gelu(F.linear(n, block.up.weight[:m, :k], block.up.bias[:m]))
        h = h + F.linear(n, block.down.weight[:k, :m], block.down.bias[:k])
    h = F.layer_norm(h, (k,), model.norm.weight[:k], model.norm.bias[:k])
    with net.subnet({"depth": 2, "width": 0.5}):
        torch.testing.assert_close(net(x), F.linear(h, model.head.weight[:, :k], model.head.bias), rtol=1e-5, atol=1e-6)


def mask(model: nn.Module, name: str, share: float) -> None:
    """Zero what reads the units outside the prefix."""
    for key, module in model.named_modules():
        read = {
            "cnn": key in ("7", "11", "13"),
            "resnet": "conv" in key or key == "head",
            "bert": key.endswith("output.dense"),
            "vit": key.endswith(("o_proj", "fc2")),
            "gpt2": key.endswith("c_proj"),
            "llama": key.endswith(("o_proj", "down_proj")),
        }[name]
        if read:
            weight = module.weight.data.T if name == "gpt2" else module.weight.data
            weight[:, round(share * weight.shape[1]) :] = 0


@pytest.mark.parametrize("name", ["cnn", "resnet", "bert", "vit", "gpt2", "llama"])
def test_shrunk_equals_its_masked_twin(name):
    net, x = sorted_net(name), inputs(name)
    twin = copy.deepcopy(net.model)
    mask(twin, name, 0.5)
    small = net.extract({**net.subnets[-1], "width": 0.5})
    torch.testing.assert_close(run(small, x), run(twin, x), rtol=0, atol=1e-5)
    assert (run(twin, x) - run(net.model, x)).abs().max() > 1e-3


def test_heads_and_neurons_of_their_own():
    net, x = SortedModel(make("gpt2"), {"heads": [0.5, 1.0], "ffn": [0.5, 1.0]}).eval(), inputs("gpt2")
    twin = copy.deepcopy(net.model)
    for block in twin.transformer.h:
        block.attn.c_proj.weight.data[12:] = 0
    with net.subnet({"heads": 0.5, "ffn": 1.0}):
        torch.testing.assert_close(run(net, x), run(twin, x), rtol=0, atol=1e-5)


@transformer
def test_depth_is_the_first_layers_through_norm_and_head(name):
    net, x = sorted_net(name), inputs(name)
    shallow = copy.deepcopy(net.model)
    blocks = shallow.get_submodule(net.blocks)
    del blocks[2:]
    shallow.config.num_hidden_layers = 2
    with net.subnet({"depth": 2, "width": 1.0}):
        assert torch.equal(run(net, x), run(shallow, x))


# ---- the network around it


@every
def test_everything_is_put_back(name):
    net, x = sorted_net(name), inputs(name)
    before, sizes, identities = state(net), repr(net), [id(p) for p in net.parameters()]
    with net.subnet(0):
        run(net, x)
        with net.subnet(1):
            inner = run(net, x)
        with net.subnet(-1):
            full = run(net, x)
        outer = run(net.model, x)
    assert same(before, state(net))
    assert repr(net) == sizes
    assert [id(p) for p in net.parameters()] == identities
    assert torch.equal(full, run(net, x))
    with pytest.raises(ZeroDivisionError), net.subnet(0):
        run(net, x)[1 // 0]
    assert same(before, state(net))
    net.set_subnet(1)
    assert torch.equal(inner, run(net, x))
    net.set_subnet(0)
    assert torch.equal(outer, run(net, x))


@every
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    net, x = sorted_net(name), inputs(name)
    small = net.extract(1)
    save(small, tmp_path, {"method": "sortednet"})
    torch.manual_seed(5)
    fresh = SortedModel(NETWORKS[name][0](), NETWORKS[name][1]).extract(1).eval()
    load_into(fresh, tmp_path)
    assert same(state(fresh), state(small))
    assert torch.equal(run(fresh, x), run(small, x))


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_from_pretrained_loads_an_extract(name, tmp_path):
    net, x = sorted_net(name), inputs(name)
    small = net.extract({"depth": 2, "width": 0.5})
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert same(state(loaded), state(small))
    assert torch.equal(run(loaded, x), run(small, x))
    assert net.model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_from_pretrained_loads_what_the_config_can_say(name, tmp_path):
    x = inputs(name)
    small = SortedModel(make(name), {"depth": [2, 3], "ffn": [0.5, 1.0]}).extract(0)
    small.save_pretrained(tmp_path / "ffn")
    assert torch.equal(run(type(small).from_pretrained(tmp_path / "ffn").eval(), x), run(small, x))
    small = SortedModel(make(name), {"heads": [0.5, 1.0]}).extract(0)
    small.save_pretrained(tmp_path / "heads")
    with pytest.raises(RuntimeError):
        type(small).from_pretrained(tmp_path / "heads")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generates_like_its_extract(name):
    net, x = sorted_net(name), inputs(name, rows=1)[:, :3]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = net.extract(0).generate(x, **options)
    with net.subnet(0):
        assert torch.equal(net.model.generate(x, **options), expected)


def test_state_dict_moves_between_wrappers():
    a = sorted_net("resnet")
    recalibrate_norms(a, [inputs("resnet")])
    b = SortedModel(ResNet(), a.spec).eval()
    b.load_state_dict(a.state_dict())
    x = inputs("resnet")
    for i in range(len(a)):
        a.set_subnet(i)
        b.set_subnet(i)
        assert torch.equal(a(x), b(x))


def test_frozen_parameters_and_modes_stay_in_an_extract():
    model = make("mlp")
    model[0].weight.requires_grad_(False)
    small = SortedModel(model, WIDTHS).extract(0)
    assert not small[0].weight.requires_grad
    assert small[4].weight.requires_grad
    assert small[4].weight.is_leaf
    assert not small.training
    assert small[4].weight.untyped_storage().nbytes() == 4 * small[4].weight.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype):
    net = sorted_net("cnn", dtype)
    small = net.extract(0)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(inputs("cnn").to(dtype)).dtype == dtype


def test_meta_device_after_construction():
    net = sorted_net("cnn").to("meta")  # moves statistics too
    with net.subnet(0):
        assert net(torch.empty(2, 2, 8, 8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(context):
    net, x = sorted_net("cnn"), inputs("cnn")
    net.set_subnet(0)
    expected = net(x).detach()
    with context():
        assert torch.equal(net(x), expected)
        assert not net(x).requires_grad
    assert net(x).requires_grad


def test_named_blocks_and_ordered_names():
    from collections import OrderedDict

    torch.manual_seed(0)
    blocks = nn.Sequential(OrderedDict([("first", Block(16)), ("second", Block(16)), ("third", Block(16))]))
    model = nn.Sequential(nn.Linear(6, 16), blocks, nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)))
    with pytest.raises(ValueError, match=r"blocks must name.*1, 2"):
        SortedModel(model, {"depth": [1, 3]})
    net, x = SortedModel(model, {"depth": [1, 3], "width": [0.5, 1.0]}, blocks="1"), inputs("mlp")
    with net.subnet({"depth": 1, "width": 1.0}):
        assert torch.equal(net(x), model[2](blocks.first(model[0](x))))
    assert [name for name, _ in net.extract(0)[1].named_children()] == ["first"]


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(self.a(self.stem(x)).relu()))

    net = SortedModel(Tied(), {"width": [0.5, 1.0]})
    small = net.extract(0)
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (4, 4)
    assert sum(p.numel() for p in small.parameters()) == net.parameter_count(0)


# ---- batch norm


def test_recalibration_is_the_mean_over_batches():
    net = sorted_net("cnn")
    before, weights = state(net), state(nn.ParameterList(net.parameters()))
    batches = [inputs("cnn", 8) + k for k in range(3)]
    recalibrate_norms(net, [(x, None) for x in batches], [0, 2])
    for i, k in ((0, 2), (2, 8)):
        conv = net.model[0]
        maps = [F.conv2d(x, conv.weight[:k], conv.bias[:k], padding=1) for x in batches]
        mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
        small = net.extract(i)
        torch.testing.assert_close(small[1].running_mean, mean.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small[1].running_var, var.detach(), rtol=1e-4, atol=1e-5)
    assert same(weights, state(nn.ParameterList(net.parameters())))
    changed = {key for key, tensor in state(net).items() if not torch.equal(tensor, before[key])}
    assert changed
    assert not any(key.startswith("subnet 1") for key in changed)
    assert not any(module.training for module in net.modules())
    assert net.model[1].momentum == 0.1


def test_training_a_subnet_leaves_the_statistics_of_others():
    net = sorted_net("resnet").train()
    before = state(net)
    with net.subnet(0):
        net(inputs("resnet"))
    changed = {key for key, tensor in state(net).items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(key.startswith("subnet 0: ") for key in changed)


def test_recalibration_without_batches_changes_nothing():
    net = sorted_net("cnn")
    before = state(net)
    with pytest.raises(ValueError, match="loader must give at least one batch"):
        recalibrate_norms(net, [])
    with pytest.raises(ValueError, match="loader is an iterator"):
        recalibrate_norms(net, iter([inputs("cnn")]))
    with pytest.raises(RuntimeError):
        recalibrate_norms(net, [inputs("cnn"), torch.randn(2, 5, 8, 8)])
    assert same(before, state(net))
    assert not any(module.training for module in net.modules())
    with pytest.raises(TypeError, match="must be a SortedModel"):
        recalibrate_norms(net.model, [inputs("cnn")])


# ---- draws


def test_unit_count_rounds_to_the_nearest():
    assert [unit_count(n, w) for n, w in [(8, 0.25), (10, 0.25), (10, 0.24), (3, 0.01), (7, 1.0)]] == [2, 3, 2, 1, 7]


def test_prefix_of_fused_parts():
    W = torch.arange(24.0).reshape(2, 12).requires_grad_()
    small = prefix(W, 1, 2, 3)
    assert small.tolist() == [[0, 1, 4, 5, 8, 9], [12, 13, 16, 17, 20, 21]]
    small.sum().backward()
    assert W.grad.tolist() == [[1, 1, 0, 0] * 3] * 2


def test_probabilities():
    assert subnet_probs(4).tolist() == [0.25] * 4
    torch.testing.assert_close(subnet_probs(3, [1, 3, 4], 0.6), torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64))
    assert subnet_probs(3, full_prob=1.0).tolist() == [0, 0, 1]
    assert subnet_probs(1, full_prob=1.0).tolist() == [1]
    torch.testing.assert_close(subnet_probs(2, [3, 1]), torch.tensor([0.75, 0.25], dtype=torch.float64))
    for odd in ([1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1], "geometric"):
        with pytest.raises(ValueError, match="distribution must be"):
            subnet_probs(3, odd)
    for odd in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match="full_prob must be in"):
            subnet_probs(3, full_prob=odd)
    with pytest.raises(ValueError, match="leaves nothing"):
        subnet_probs(2, [0, 1], full_prob=0.5)


def test_draws_follow_the_probabilities_over_steps():
    P = subnet_probs(4, [1, 2, 3, 4])
    drawn = [i for step in range(2000) for i in draw_subnets(P, 2, step_generator(step))]
    share = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    torch.testing.assert_close(share, P.float(), rtol=0, atol=0.03)
    pairs = torch.tensor(drawn).reshape(-1, 2)
    both = ((pairs == 3).all(1)).float().mean()
    assert abs(both - 0.16) < 0.03  # independent, with replacement


def test_draws_are_the_same_on_every_rank_and_touch_no_global_state():
    P, before = subnet_probs(9), torch.get_rng_state()
    a = [draw_subnets(P, 3, step_generator(step, seed=7)) for step in range(20)]
    torch.rand(5)  # another rank has drawn from its own global generator
    after = torch.get_rng_state()
    assert a == [draw_subnets(P, 3, step_generator(step, seed=7)) for step in range(20)]
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(before, after)
    assert a != [draw_subnets(P, 3, step_generator(step, seed=8)) for step in range(20)]


# ---- training


def test_unused_tensors_have_no_gradient_and_rest():
    net = sorted_net("residual_mlp")
    x, P = inputs("residual_mlp"), F.one_hot(torch.tensor(0), len(net))  # one block, a quarter of the width
    optimizer = torch.optim.AdamW(net.parameters(), 0.1, weight_decay=0.5)
    before = state(net.model)
    sorted_step(net, loss_fn, x, optimizer, generator=step_generator(0), distribution=P)
    after = state(net.model)
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("blocks.3"))
    assert not torch.equal(after["stem.weight"][4:], before["stem.weight"][4:])  # decay reaches what is outside
    torch.testing.assert_close(after["stem.weight"][4:], 0.95 * before["stem.weight"][4:])


def test_trained_prefixes_are_good_and_plain_ones_are_not():
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, :2].prod(1) > 0).long()

    def accuracy(p: float | None) -> list[float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        net = SortedModel(model, WIDTHS)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        for step in range(200):
            loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
            sorted_step(net, loss, (x, y), optimizer, generator=step_generator(step), full_prob=p)
        return [float((net.extract(i)(x).argmax(1) == y).float().mean()) for i in range(3)]

    assert min(accuracy(None)) > 0.93
    assert accuracy(1.0)[0] < 0.85


def test_gradient_checkpointing_inside_a_step():
    x, grads = inputs("llama"), []
    for checkpointing in (False, True):
        net = sorted_net("llama").train()
        if checkpointing:
            net.model.activation_checkpointing_enable()
        still = torch.optim.SGD(net.parameters(), lr=0.0)
        sorted_step(net, loss_fn, x, still, generator=step_generator(1), n_accumulate=3)
        grads.append([None if p.grad is None else p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    net.set_subnet(0)
    with pytest.raises(RuntimeError, match="gradient checkpointing"):
        net(x)


def test_one_process_of_ddp_is_the_plain_step(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        a, b = sorted_net("residual_mlp"), sorted_net("residual_mlp")
        parallel = nn.parallel.DistributedDataParallel(a, find_unused_parameters=True)
        x = inputs("residual_mlp")
        for model, net in ((parallel, a), (b, b)):
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            for step in range(4):
                sorted_step(model, loss_fn, x, optimizer, generator=step_generator(step), n_accumulate=2)
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    finally:
        dist.destroy_process_group()


def test_fit_trains_drawn_subnets():
    from shoestring.loop import fit

    a, b, x = sorted_net("residual_mlp").train(), sorted_net("residual_mlp").train(), inputs("residual_mlp")
    P, g, h = subnet_probs(len(a)), torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(a.parameters(), 0.1)
    fit(a, [x] * 6, lambda m, x: sorted_loss(m, loss_fn, x, draw_subnets(P, 1, g)), optimizer, accumulate=2)
    optimizer = torch.optim.SGD(b.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (sum(sorted_loss(b, loss_fn, x, draw_subnets(P, 1, h)) for _ in range(2)) / 2).backward()
        optimizer.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_trainer_trains_the_drawn_subnets(tmp_path):
    from transformers import Trainer, TrainingArguments

    class SortedTrainer(SortedTrainerMixin, Trainer):
        pass

    rows = [{"input_ids": ids, "labels": int(ids[0]) % 3} for ids in inputs("bert", 16)]
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3, "seed": 3}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 100}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.0, **options, **quiet)
    trainer = SortedTrainer(make("bert"), arguments, train_dataset=rows, spec=BOTH)
    seen, whole = [], trainer.sorted_model._install

    def install(i):
        seen.append(i)
        whole(i)

    trainer.sorted_model._install = install
    trainer.train()
    P = subnet_probs(9)
    assert seen == [i for step in range(3) for i in draw_subnets(P, 2, step_generator(step, 3))]
    assert trainer.sorted_model._undo == []


# ---- what is refused


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        pytest.param({}, "spec must have keys", id="no_keys"),
        pytest.param({"wide": [1.0]}, "spec must have keys", id="unknown_key"),
        pytest.param({"heads": [0.5, 1.0]}, "spec must have keys", id="heads_of_an_mlp"),
        pytest.param({"width": []}, "must be a list of sizes", id="no_sizes"),
        pytest.param({"width": "1.0"}, "must be a list of sizes", id="text"),
        pytest.param({"width": [0.0, 1.0]}, r"must be shares in \(0, 1\]", id="zero"),
        pytest.param({"width": [0.5, 1.5]}, r"must be shares in \(0, 1\]", id="above_one"),
        pytest.param({"width": [float("nan"), 1.0]}, r"must be shares in \(0, 1\]", id="nan"),
        pytest.param({"width": [0.25, 0.5]}, "end with 1.0", id="not_whole"),
        pytest.param({"width": [0.5, 0.25, 1.0]}, "must grow", id="falling"),
        pytest.param({"depth": [0, 4]}, "must be >= 1", id="depth_zero"),
        pytest.param({"depth": [1, 3]}, "must end with all 4 blocks of blocks", id="not_all_blocks"),
        pytest.param({"depth": [1, 5]}, "must end with all 4 blocks of blocks", id="too_deep"),
    ],
)
def test_spec_of_another_model(spec, match):
    model = make("residual_mlp")
    before = state(model)
    with pytest.raises(ValueError, match=match):
        SortedModel(model, spec)
    assert same(before, state(model))


def test_spec_of_another_type():
    with pytest.raises(TypeError, match="spec must be a mapping"):
        SortedModel(make("mlp"), [0.5, 1.0])
    with pytest.raises(TypeError, match="whole number"):
        SortedModel(make("residual_mlp"), {"depth": [1.5, 4]})
    with pytest.raises(ValueError, match="width or else heads and ffn"):
        SortedModel(make("bert"), {"width": [0.5, 1.0], "ffn": [0.5, 1.0]})


def test_subnet_outside_the_spec():
    net = sorted_net("residual_mlp")
    for odd in (9, -10, {"depth": 3, "width": 0.5}, {"depth": 2}, {}):
        for call in (net.set_subnet, net.extract, net.index, net.parameter_count):
            with pytest.raises(ValueError, match="subnet must be"):
                call(odd)
        with pytest.raises(ValueError, match="subnet must be"), net.subnet(odd):
            pass
    for odd in (0.5, "0", None, True):
        with pytest.raises(TypeError, match="subnet must be"):
            net.set_subnet(odd)
    assert net.active == len(net) - 1
    assert net.index({"depth": 2, "width": 0.5}) == 4


class Custom(nn.Module):
    def __init__(self, layer: nn.Module, call) -> None:
        super().__init__()
        self.a, self.odd, self.b, self.call = nn.Linear(4, 8), layer, nn.Linear(8, 2), call

    def forward(self, x):
        return self.b(self.call(self, self.a(x), x))


@pytest.mark.parametrize(
    ("layer", "call", "match"),
    [
        pytest.param(nn.Softmax(-1), lambda m, h, x: m.odd(h), r"odd \(Softmax\)", id="softmax"),
        pytest.param(nn.PReLU(8), lambda m, h, x: m.odd(h), r"odd \(PReLU\)", id="prelu"),
        pytest.param(nn.GroupNorm(2, 8), lambda m, h, x: m.odd(h), r"odd \(GroupNorm\)", id="group_norm"),
        pytest.param(nn.Identity(), lambda m, h, x: torch.cat([h, h], 1), "cat", id="cat"),
        pytest.param(nn.Identity(), lambda m, h, x: h.reshape(-1, 8), "reshape", id="reshape"),
        pytest.param(nn.Identity(), lambda m, h, x: h + torch.cat([x, x], 1), "add", id="add_of_whole"),
        pytest.param(nn.Linear(4, 10), lambda m, h, x: h + m.odd(x)[:, :8], "getitem", id="index"),
        pytest.param(nn.Linear(8, 8), lambda m, h, x: m.odd(h) + m.odd(m.odd(h)), "", id="used_twice"),
        pytest.param(nn.Linear(2, 2), lambda m, h, x: h.unflatten(1, (4, 2)).flatten(1), "unflatten", id="unflatten"),
        pytest.param(nn.Identity(), lambda m, h, x: h if h.sum() > 0 else -h, "followed through", id="control_flow"),
    ],
)
def test_what_cannot_be_cut_is_named(layer, call, match):
    torch.manual_seed(0)
    model = Custom(layer, call)
    before = state(model)
    if match:
        with pytest.raises(ValueError, match=f"width cannot be .*{match}"):
            SortedModel(model, WIDTHS)
    else:  # the same way each time is fine
        net = SortedModel(model, WIDTHS)
        net.set_subnet(0)
        h = F.linear(torch.ones(1, 4), model.a.weight[:2], model.a.bias[:2])
        layer = lambda h: F.linear(h, model.odd.weight[:2, :2], model.odd.bias[:2])  # noqa: E731
        expected = F.linear(layer(h) + layer(layer(h)), model.b.weight[:, :2], model.b.bias)
        torch.testing.assert_close(net(torch.ones(1, 4)), expected)
    assert same(before, state(model))


def test_layers_of_other_kinds_are_named():
    grouped = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"through 1 \(Conv2d\)"):
        SortedModel(grouped, WIDTHS)
    over_places = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"through 1 \(Linear\)"):
        SortedModel(over_places, WIDTHS)
    weighted = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"0\.weight is parametrized"):
        SortedModel(weighted, WIDTHS)
    with pytest.raises(ValueError, match="no hidden layer"):
        SortedModel(nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), WIDTHS)
    twice = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"used twice|tied"):
        SortedModel(nn.Sequential(twice, nn.ReLU(), twice, nn.Linear(8, 2)), WIDTHS)


def test_depth_of_unlike_blocks():
    blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8))
    model = nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"depth cannot be cut before 1\.1"):
        SortedModel(model, {"depth": [1, 3]}, blocks="1")
    with pytest.raises(ValueError, match="blocks must name"):
        SortedModel(model, {"depth": [1, 3]}, blocks="7")
    with pytest.raises(ValueError, match="blocks must name"):
        SortedModel(nn.Linear(4, 2), {"depth": [1, 3]})


def test_unknown_transformer_layers_are_named():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(**sizes, vocab_size=5, is_decoder=True, add_cross_attention=True))
    with pytest.raises(ValueError, match=r"encoder\.layer\.0\.crossattention"):
        SortedModel(model, WIDTHS)


def test_nan_and_meta_weights():
    model = make("mlp")
    model[4].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 4\.bias"):
        SortedModel(model, WIDTHS)
    with pytest.raises(ValueError, match="meta device"):
        SortedModel(make("mlp").to("meta"), WIDTHS)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        SortedModel("model", WIDTHS)


def test_bad_steps_leave_the_model():
    net, x = sorted_net("mlp"), inputs("mlp")
    optimizer, before = torch.optim.SGD(net.parameters(), 0.1), state(net)
    for options, match in (({"n_accumulate": 0}, "n_accumulate"), ({"distribution": [1]}, "distribution")):
        with pytest.raises(ValueError, match=match):
            sorted_step(net, loss_fn, x, optimizer, generator=step_generator(0), **options)
    with pytest.raises(TypeError, match="must be a SortedModel"):
        sorted_step(net.model, loss_fn, x, optimizer, generator=step_generator(0))
    with pytest.raises(ValueError, match="at least one"):
        sorted_loss(net, loss_fn, x, [])
    with pytest.raises(ZeroDivisionError):
        sorted_step(net, lambda m, b: 1 / 0, x, optimizer, generator=step_generator(0))
    assert same(before, state(net))
    assert net._undo == []
