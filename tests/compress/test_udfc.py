"""UDFC: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from shoestring.compress._saved import load_into, save
from shoestring.compress.udfc import (
    chains,
    channel_rows,
    compress_by,
    nonnegative_coefficients,
    quantize,
    reconstruction_coefficients,
    udfc_compress,
)

NO_RIDGE = {"alpha1": 0.0, "alpha2": 0.008}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and running statistics, as a trained network has them, in evaluation mode."""
    g = generator(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(torch.randn(module.weight.shape, generator=g) / module.weight[0].numel() ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=g))
            elif isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.5, 2.0),
                ):
                    if tensor is not None:
                        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return model.eval()


def plain(bias: bool = False, act: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    return settle(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1, bias=bias),
            nn.BatchNorm2d(8),
            act(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=bias),
            nn.BatchNorm2d(12),
            act(),
            nn.Flatten(),
            nn.Linear(12 * 9, 5),
        ),
        seed,
    )


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class SmallResNet(nn.Module):
    """The layout of torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.bn1(self.conv1(x))), 2)
        x = F.adaptive_avg_pool2d(self.layer1(x), 1)
        return self.fc(x.view(x.size(0), -1))


class Inverted(nn.Module):
    """Expand, depthwise, project, as MobileNet and EfficientNet have it."""

    def __init__(self, act: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.expand, self.bn0 = nn.Conv2d(2, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.depthwise, self.bn1 = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False), nn.BatchNorm2d(10)
        self.project, self.bn2 = nn.Conv2d(10, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act(self.bn1(self.depthwise(self.act(self.bn0(self.expand(x))))))
        return x + self.bn2(self.project(inner))


def resnet() -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=2, embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], layer_type="basic", num_labels=5
    )
    with torch.random.fork_rng():
        return settle(ResNetForImageClassification(config))


def out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer = model(x)
    return answer if isinstance(answer, Tensor) else answer.logits


def images(n: int = 4, size: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 2, size, size, generator=generator(9)).to(dtype)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


MODELS = {"plain": plain, "biased": lambda: plain(True), "resnet": SmallResNet, "depthwise": Inverted, "hf": resnet}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def rows(M: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(M, d, generator=generator(seed), dtype=torch.float64)


# ---- the coefficients


def test_coefficients_satisfy_the_normal_equations():
    t, A = rows(6, 30), rows(9, 30, 1)
    S = reconstruction_coefficients(t, A, 0.3)
    torch.testing.assert_close(S @ (A @ A.T) + 0.3 * S, t @ A.T, rtol=0, atol=1e-12)


def test_coefficients_equal_scikit_learns_ridge():
    t, A = rows(6, 30), rows(9, 30, 1)
    ridge = Ridge(alpha=0.7, fit_intercept=False).fit(A.T.numpy(), t.T.numpy())
    np.testing.assert_allclose(reconstruction_coefficients(t, A, 0.7).numpy(), ridge.coef_, rtol=0, atol=1e-10)


def test_coefficients_without_a_ridge_are_exact_in_the_span_also_where_rows_depend_on_each_other():
    A = rows(5, 30)
    A = torch.cat([A, A[:2] + A[2:4]])
    t = rows(3, 7, 1) @ A
    torch.testing.assert_close(reconstruction_coefficients(t, A, 0.0) @ A, t, rtol=0, atol=1e-10)


def test_prior_is_the_centre_of_the_ridge():
    t, A, p = rows(6, 30), rows(9, 30, 1), rows(6, 9, 2)
    S = reconstruction_coefficients(t, A, 0.3, p)
    torch.testing.assert_close((S @ A - t) @ A.T + 0.3 * (S - p), torch.zeros(6, 9, dtype=t.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(reconstruction_coefficients(p @ A, A, 0.3, p), p, rtol=0, atol=1e-12)


def loss(t: Tensor, A: Tensor, S: Tensor, alpha1: float) -> Tensor:
    return (t - S @ A).square().sum(1) + alpha1 * S.square().sum(1)


def test_loss_is_at_most_that_of_no_reconstruction_and_falls_as_more_is_kept():
    t, A = rows(6, 20), rows(12, 20, 1)
    before = t.square().sum(1)
    for R in range(1, 13):
        now = loss(t, A[:R], reconstruction_coefficients(t, A[:R], 0.2), 0.2)
        assert (now < before).all()
        before = now


def test_nonnegative_coefficients_equal_scipys():
    for d in (8, 40):
        t, A = rows(7, d), rows(15, d, 1)
        t[0] = -A.sum(0)
        stacked = np.concatenate([A.T.numpy(), math.sqrt(0.3) * np.eye(15)])
        expected = np.array([nnls(stacked, np.concatenate([row, np.zeros(15)]))[0] for row in t.numpy()])
        found = nonnegative_coefficients(t, A, 0.3).numpy()
        assert (found >= 0).all()
        assert (found == 0).any()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_nonnegative_prior_is_the_centre_of_the_ridge():
    t, A, p = rows(7, 20), rows(15, 20, 1), rows(7, 15, 2)
    stacked = np.concatenate([A.T.numpy(), math.sqrt(0.3) * np.eye(15)])
    goals = np.concatenate([t.numpy(), math.sqrt(0.3) * p.numpy()], 1)
    expected = np.array([nnls(stacked, goal)[0] for goal in goals])
    np.testing.assert_allclose(nonnegative_coefficients(t, A, 0.3, p).numpy(), expected, rtol=0, atol=1e-7)


def test_rows_of_two_layers_are_multiples_exactly_where_their_maps_are():
    """relu(b' + g' * relu(b + g * x)): channel 1 is 6 times channel 0, channel 2 is not."""
    first, depth = torch.randn(3, 2, 1, 1, generator=generator()), torch.randn(3, 1, 3, 3, generator=generator(1))
    b0, b1 = torch.tensor([0.5, 1.0, 0.5]), torch.tensor([0.3, 1.8, 0.3])
    first[1], depth[1] = 2 * first[0], 3 * depth[0]
    depth[2] = depth[0]  # the same depthwise filter on another map
    ones = torch.ones(3)
    t = channel_rows([(first, ones, b0), (depth, ones, b1)], 0.01)
    assert t.shape == (3, 9 * 3 + 1)
    torch.testing.assert_close(t[1], 6 * t[0])
    x = images()
    maps = F.relu(F.conv2d(F.relu(F.conv2d(x, first, b0)), depth, b1, groups=3))
    torch.testing.assert_close(maps[:, 1], 6 * maps[:, 0])
    assert F.cosine_similarity(t[0], t[2], 0) < 0.99


# ---- quantisation


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantised_weights_are_the_nearest_of_the_grid_which_keeps_the_largest(bits):
    W = torch.randn(50, 20, generator=generator(bits))
    found = quantize(W, bits)
    q = 2 ** (bits - 1) - 1
    grid = torch.arange(-q, q + 1) * (W.abs().max() / q)
    nearest = grid[(W[..., None] - grid).abs().argmin(-1)]
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-6)
    assert found.unique().numel() <= 2 * q + 1
    assert found.abs().max() == W.abs().max()
    torch.testing.assert_close(quantize(found, bits), found, rtol=0, atol=1e-7)
    assert torch.equal(quantize(torch.zeros(3), bits), torch.zeros(3))


@every_model
def test_every_weight_is_on_a_grid_after_compression(make):
    model = settle(make())
    small = udfc_compress(model, images(), pruning_ratio=0.25, weight_bits=4)
    for name, module in small.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            W = module.weight.detach().double()
            steps = W / (W.abs().max() / 7)
            assert (steps - steps.round()).abs().max() < 1e-4, name


def test_pruning_and_rounding_are_one_solve_of_equation_6():
    """By hand: t of the full-precision filters, A of the rounded ones that are left, e_j where a filter is left."""
    model = nn.Sequential(*plain(True)[:3], nn.Conv2d(8, 5, 3)).double().eval()
    small = udfc_compress(model, pruning_ratio=0.25, weight_bits=3, alpha1=0.1, alpha2=0.5)
    conv, bn = model[0], model[1]
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    b = bn.bias + scale * (conv.bias - bn.running_mean)
    W = conv.weight.detach()
    kept = W.flatten(1).norm(dim=1).argsort()[2:].sort().values
    rounded = quantize(W[kept], 3)
    t = torch.cat([scale[:, None] * W.flatten(1), 0.5**0.5 * b[:, None]], 1)
    A = torch.cat([scale[kept, None] * rounded.flatten(1), 0.5**0.5 * b[kept, None]], 1)
    e = torch.eye(8, dtype=torch.float64)[:, kept]
    S = e + torch.linalg.solve(A @ A.T + 0.1 * torch.eye(6, dtype=t.dtype), A @ (t - e @ A).T).T
    V_hat = quantize(torch.einsum("ojhw,jk->okhw", model[3].weight, S), 3)
    torch.testing.assert_close(small[0].weight.detach(), rounded)
    torch.testing.assert_close(small[3].weight, V_hat, rtol=0, atol=1e-10)


# ---- the whole network


@every_model
def test_ratio_zero_without_bits_is_the_identical_model(make):
    model = settle(make())
    for nonnegative in (False, True):
        assert same_state(udfc_compress(model, images(), pruning_ratio=0, nonnegative=nonnegative), model)


def test_ratio_zero_with_rounding_that_changes_nothing_is_the_identical_model():
    """The residual form: S = I although the ridge is large."""
    model = plain().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_((module.weight * 20).round().clamp(-7, 7))
                module.weight.view(-1)[0] = 7
    for nonnegative in (False, True):
        same = udfc_compress(model, pruning_ratio=0, weight_bits=4, alpha1=10.0, nonnegative=nonnegative)
        torch.testing.assert_close(out(same, images(dtype=torch.float64)), out(model, images(dtype=torch.float64)))


@pytest.mark.parametrize("nonnegative", [False, True], ids=["signed", "nonnegative"])
def test_pruning_a_positive_multiple_is_exact(nonnegative):
    """t_j = c t_k: relu commutes with c > 0. The dense network is reproduced to 1e-6 as alpha1 -> 0."""
    model = plain(bias=True).double()
    conv, bn = model[0], model[1]
    with torch.no_grad():
        c, gain = 0.05, torch.tensor([1.3, 0.7], dtype=torch.float64)
        for (j, k), g in zip([(5, 2), (1, 7)], gain, strict=True):
            conv.weight[j] = c * conv.weight[k]  # the smallest two, so they are pruned
            bn.weight[j], bn.running_var[j] = g * bn.weight[k], bn.running_var[k]
            b = bn.bias[k] + bn.weight[k] / (bn.running_var[k] + bn.eps).sqrt() * (conv.bias[k] - bn.running_mean[k])
            scale = bn.weight[j] / (bn.running_var[j] + bn.eps).sqrt()
            bn.bias[j] = c * g * b - scale * (conv.bias[j] - bn.running_mean[j])
    assert conv.weight.flatten(1).norm(dim=1).argsort()[:2].sort().values.tolist() == [1, 5]
    twin = nn.Sequential(*copy.deepcopy(model)[:4], nn.Conv2d(8, 3, 1).double())  # nothing else is pruned there
    dense = out(twin, images(dtype=torch.float64))
    small = udfc_compress(twin, pruning_ratio=0.25, alpha1=1e-10, nonnegative=nonnegative)
    assert small[0].out_channels == 6
    torch.testing.assert_close(out(small, images(dtype=torch.float64)), dense, rtol=0, atol=1e-6)
    unrepaired = compress_by(twin, lambda t, basis, prior: prior, pruning_ratio=0.25)
    assert (out(unrepaired, images(dtype=torch.float64)) - dense).abs().max() > 1e-3


def test_a_depthwise_multiple_is_exact():
    model = settle(Inverted(nn.ReLU)).double()
    with torch.no_grad():
        for conv, bn, c in ((model.expand, model.bn0, 0.1), (model.depthwise, model.bn1, 0.5)):
            conv.weight[3] = c * conv.weight[6]
            bn.weight[3], bn.running_var[3] = bn.weight[6], bn.running_var[6]
            bn.running_mean[3] = c * bn.running_mean[6]
            bn.bias[3] = (0.1 if bn is model.bn0 else 0.05) * bn.bias[6]
            if bn is model.bn1:  # its input is 0.1 of the other's already
                bn.running_mean[3] = 0.05 * bn.running_mean[6]
    x = images(dtype=torch.float64)
    small = udfc_compress(model, pruning_ratio=0.1, alpha1=1e-12)
    assert (small.expand.out_channels, small.depthwise.groups, small.project.in_channels) == (9, 9, 9)
    torch.testing.assert_close(out(small, x), out(model, x), rtol=0, atol=1e-6)


def test_linear_network_in_the_span_is_unchanged():
    """No relu, and 8 filters of 2 x 1 x 1: 3 numbers with the offset, which the 6 kept ones span. alpha1 = 0."""
    model = settle(
        nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 10, 1), nn.AvgPool2d(2), nn.Conv2d(10, 3, 3))
    ).double()
    small = udfc_compress(model, pruning_ratio=0.25, **NO_RIDGE)
    assert [small[i].out_channels for i in (0, 2, 4)] == [6, 8, 3]
    x = images(dtype=torch.float64)
    # The second layer's 10 filters of 8 + 1 numbers are not in the span of 8: what is kept of them must be right
    first = nn.Sequential(*small[:2], small[2])
    full = out(model[:3], x)
    keep = [i for i in range(10) if any(torch.allclose(out(first, x)[:, j], full[:, i], atol=1e-9) for j in range(8))]
    assert len(keep) == 8
    narrow = nn.Sequential(*model[:2], nn.Conv2d(8, 3, 1).double())
    torch.testing.assert_close(out(udfc_compress(narrow, pruning_ratio=0.5, **NO_RIDGE), x), out(narrow, x))


@every_model
@pytest.mark.parametrize("bits", [None, 5], ids=["full", "rounded"])
def test_shrunk_model_equals_its_masked_twin(make, bits):
    model = settle(make())
    for nonnegative in (False, True):
        options = {"pruning_ratio": 0.3, "weight_bits": bits, "nonnegative": nonnegative, "alpha1": 0.1}
        small = udfc_compress(model, images(), **options)
        masked = udfc_compress(model, images(), remove=False, **options)
        assert [p.shape for p in masked.parameters()] == [p.shape for p in model.parameters()]
        torch.testing.assert_close(out(small, images()), out(masked, images()), rtol=0, atol=1e-5)
        assert (out(small, images()) - out(model, images())).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [None, 5], ids=["full", "rounded"])
def test_a_large_ridge_is_plain_pruning_and_rounding(bits):
    model = plain(True)
    none = compress_by(model, lambda t, basis, prior: prior, pruning_ratio=0.25, weight_bits=bits)
    large = udfc_compress(model, pruning_ratio=0.25, weight_bits=bits, alpha1=1e12)
    torch.testing.assert_close(out(large, images()), out(none, images()), rtol=0, atol=1e-6)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for conv, bn in ((by_hand[0], by_hand[1]), (by_hand[4], by_hand[5])):
            gone = conv.weight.flatten(1).norm(dim=1).argsort()[: len(conv.weight) // 4]
            for tensor in (conv.weight, conv.bias, bn.weight, bn.bias):
                tensor[gone] = 0
            bn.running_mean[gone] = 0
        if bits:
            for i in (0, 4, 8):
                by_hand[i].weight.copy_(quantize(by_hand[i].weight, bits))
    if bits is None:  # rounding sees the largest weight of what is left, which by_hand's next layer still holds
        torch.testing.assert_close(out(none, images()), out(by_hand, images()), rtol=0, atol=1e-6)


def test_smallest_filters_go_in_the_norm_asked_for():
    model = nn.Sequential(nn.Conv2d(1, 3, (1, 2)), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 3.0], [5.0, 0.0], [9.0, 9.0]]).view(3, 1, 1, 2))  # 4.2, 5; 6, 5
    two = udfc_compress(model, pruning_ratio=0.34, importance="l2")
    one = udfc_compress(model, pruning_ratio=0.34, importance="l1")
    assert two[0].weight.flatten(1).tolist() == [[5, 0], [9, 9]]
    assert one[0].weight.flatten(1).tolist() == [[3, 3], [9, 9]]


def test_a_group_is_a_filter_and_what_reads_it():
    """Filter 0 is the smallest, but read by a weight of 4: sqrt(18 + 16) > sqrt(25 + 0.01)."""
    model = nn.Sequential(nn.Conv2d(1, 3, (1, 2)), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 3.0], [5.0, 0.0], [9.0, 9.0]]).view(3, 1, 1, 2))
        model[2].weight.copy_(torch.tensor([4.0, 0.1, 0.1]).view(1, 3, 1, 1))
    small = udfc_compress(model, pruning_ratio=0.34, importance="group")
    assert small[0].weight.flatten(1).tolist() == [[3, 3], [9, 9]]


def test_permuting_filters_changes_nothing():
    model = plain(True).double()
    moved = copy.deepcopy(model)
    order = torch.randperm(8, generator=generator())
    with torch.no_grad():
        for tensor in (*moved[0].parameters(), *moved[1].parameters(), moved[1].running_mean, moved[1].running_var):
            tensor.copy_(tensor[order])
        moved[4].weight.copy_(moved[4].weight[:, order])
    x = images(dtype=torch.float64)
    for bits in (None, 6):
        one, two = (udfc_compress(m, pruning_ratio=0.3, weight_bits=bits) for m in (model, moved))
        torch.testing.assert_close(out(one, x), out(two, x), rtol=0, atol=1e-10)


def test_batch_norm_folded_beforehand_gives_the_same_coefficients():
    """Of equal scales, so that folding leaves the ranking as it is."""
    model = plain(True).double()
    with torch.no_grad():
        model[1].weight.fill_(1.7)
        model[1].running_var.fill_(0.8)
    model = nn.Sequential(*model[:3], nn.Conv2d(8, 3, 3).double())
    folded = nn.Sequential(nn.utils.fuse_conv_bn_eval(model[0], model[1]), *model[2:]).eval()
    x = images(dtype=torch.float64)
    one, two = udfc_compress(model, pruning_ratio=0.3), udfc_compress(folded, pruning_ratio=0.3)
    torch.testing.assert_close(one[3].weight, two[2].weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(out(one, x), out(two, x), rtol=0, atol=1e-10)


def test_ranking_and_coefficients_are_those_of_the_original_weights():
    """The second layer of a net of three: its S does not depend on what was folded into it."""
    model = nn.Sequential(*plain(True)[:4], nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 3, 1)).double().eval()
    small = udfc_compress(model, pruning_ratio=0.5)
    W, b = model[4].weight.detach(), model[4].bias.detach()
    kept = W.flatten(1).norm(dim=1).argsort()[6:].sort().values
    t = torch.cat([W.flatten(1), 0.008**0.5 * b[:, None]], 1)
    S = torch.eye(12, dtype=torch.float64)[:, kept]
    gone = [j for j in range(12) if j not in kept]
    A = t[kept]
    S[gone] = torch.linalg.solve(A @ A.T + 0.01 * torch.eye(6, dtype=t.dtype), A @ t[gone].T).T
    torch.testing.assert_close(small[6].weight[:, :, 0, 0], model[6].weight[:, :, 0, 0] @ S, rtol=0, atol=1e-10)
    torch.testing.assert_close(small[4].bias, b[kept])


@pytest.mark.parametrize("bits", [None, 6], ids=["full", "rounded"])
@pytest.mark.parametrize("nonnegative", [False, True], ids=["signed", "nonnegative"])
def test_repair_brings_redundant_filters_nearer(nonnegative, bits):
    """64 filters, each near a multiple of one of eight."""
    model = settle(nn.Sequential(nn.Conv2d(2, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)))
    g = generator()
    with torch.no_grad():
        near = torch.randn(8, 2, 3, 3, generator=g).repeat(8, 1, 1, 1) + 0.1 * torch.randn(64, 2, 3, 3, generator=g)
        size = 0.2 + torch.rand(64, generator=g)
        model[0].weight.copy_(size[:, None, None, None] * near)
        model[0].bias.copy_(0.3 * size)
    options = {"pruning_ratio": 0.3, "weight_bits": bits}
    repaired = udfc_compress(model, nonnegative=nonnegative, **options)
    plainly = compress_by(model, lambda t, basis, prior: prior, **options)
    errors = [(out(small, images()) - out(model, images())).square().mean() for small in (repaired, plainly)]
    assert errors[0] < 0.3 * errors[1]


# ---- what is left


def test_parameter_counts_to_the_unit():
    small = udfc_compress(plain(True), pruning_ratio=0.3)  # 8 -> 6, 12 -> 9
    assert [type(module) for module in small] == [type(module) for module in plain()]
    count = 6 * 2 * 9 + 6 + 2 * 6 + 9 * 6 * 9 + 9 + 2 * 9 + 5 * 9 * 9 + 5
    assert sum(p.numel() for p in small.parameters()) == count
    assert (small[4].in_channels, small[4].out_channels, small[5].num_features, small[8].in_features) == (6, 9, 9, 81)


@pytest.mark.parametrize(("ratio", "left"), [(0.0, 10), (0.1, 9), (0.29, 8), (0.3, 7), (0.7, 3), (0.99, 1)])
def test_how_many_go(ratio, left):
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 2, 3))
    assert udfc_compress(model, pruning_ratio=ratio)[0].out_channels == left
    thousand = nn.Sequential(nn.Conv2d(1, 1000, 1), nn.ReLU(), nn.Conv2d(1000, 1, 1))
    assert udfc_compress(thousand, pruning_ratio=ratio, alpha1=1.0)[0].out_channels == max(1, round(1000 * (1 - ratio)))


@every_model
def test_saves_and_loads_bit_for_bit(make, tmp_path):
    model = settle(make())
    small = udfc_compress(model, images(), pruning_ratio=0.3, weight_bits=6)
    assert type(small) is type(model)
    assert small.state_dict().keys() == model.state_dict().keys()
    save(small, tmp_path, {"method": "udfc"})
    loaded = load_into(settle(make(), seed=1), tmp_path).eval()
    assert same_state(small, loaded)
    assert torch.equal(out(small, images()), out(loaded, images()))


def test_transformers_resnet_saves_itself_and_loads(tmp_path):
    small = udfc_compress(resnet(), pruning_ratio=0.25)
    small.save_pretrained(tmp_path)
    loaded = load_into(resnet(), tmp_path).eval()
    assert torch.equal(out(small, images()), out(loaded, images()))
    assert small.resnet.encoder.stages[0].layers[0].layer[0].convolution.out_channels == 6
    assert small.resnet.encoder.stages[0].layers[0].layer[1].convolution.out_channels == 8  # the residual stream


def test_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = udfc_compress(plain(True), pruning_ratio=0.25)
    torch.onnx.export(small, (images(),), tmp_path / "small.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    np.testing.assert_allclose(answer, out(small, images()).numpy(), rtol=0, atol=1e-4)


def test_the_input_is_copied_or_changed_as_asked():
    model = plain()
    before = copy.deepcopy(model)
    small = udfc_compress(model, pruning_ratio=0.25, weight_bits=4)
    assert same_state(model, before)
    assert udfc_compress(model, pruning_ratio=0.25, weight_bits=4, inplace=True) is model
    assert same_state(model, small)


def test_modes_gradients_and_random_numbers_are_left_alone():
    model = plain().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    state = torch.get_rng_state()
    small = udfc_compress(model, pruning_ratio=0.25)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert model.training
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(p.is_leaf for p in small.parameters())
    assert torch.equal(state, torch.get_rng_state())
    small(images()).sum().backward()
    assert small[4].weight.grad.shape == (9, 6, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=["half", "bfloat16", "double"])
def test_dtype_is_kept_and_the_algebra_is_double(dtype):
    model = plain(True).to(dtype)
    small = udfc_compress(model, pruning_ratio=0.25)
    assert {p.dtype for p in small.parameters()} == {dtype}
    wide = udfc_compress(copy.deepcopy(model).double(), pruning_ratio=0.25)
    for one, two in zip(small.parameters(), wide.parameters(), strict=True):
        assert torch.equal(one, two.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu():
    small = udfc_compress(plain(True).cuda(), pruning_ratio=0.25)
    for one, two in zip(small.parameters(), udfc_compress(plain(True), pruning_ratio=0.25).parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=0, atol=1e-5)


# ---- which layers


def test_inside_of_residual_blocks_is_found_and_the_stream_left_alone():
    found, refused = chains(SmallResNet())
    assert [chain.layers for chain in found] == [[(f"layer1.{i}.conv1", f"layer1.{i}.bn1")] for i in (0, 1)]
    assert [chain.consumers for chain in found] == [[f"layer1.{i}.conv2"] for i in (0, 1)]
    assert refused.keys() == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    assert all("residual" in reason for reason in refused.values())
    found, refused = chains(resnet())
    assert len(found) == 3
    assert "resnet.embedder.embedder.convolution" in refused


def test_all_consumers_of_shared_channels_are_rewritten():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(2, 40, 1), nn.BatchNorm2d(40)
            self.left, self.right = nn.Conv2d(40, 3, 3, padding=1), nn.Conv2d(40, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.stem(x))
            return self.left(x) + self.right(x)

    model = settle(Fork()).double()
    assert sorted(chains(model)[0][0].consumers) == ["left", "right"]
    small = udfc_compress(model, pruning_ratio=0.5, **NO_RIDGE)
    inside = images(dtype=torch.float64)
    torch.testing.assert_close(out(small, inside), out(model, inside), rtol=0, atol=1e-8)
    assert (small.left.in_channels, small.right.in_channels) == (20, 20)


def test_efficientnet_lite0_is_compressed_and_its_stream_named():
    from shoestring.backbones import _efficientnet_lite0_network

    model = _efficientnet_lite0_network().eval()
    found, refused = chains(model)
    assert len(found) == 18
    assert sum(len(chain.layers) == 2 for chain in found) == 16  # every block
    assert all("residual" in r or "output" in r for r in refused.values())
    small = udfc_compress(model, pruning_ratio=0.1)
    masked = udfc_compress(model, pruning_ratio=0.1, remove=False)
    x = 50 * torch.randn(1, 3, 64, 64, generator=generator())
    torch.testing.assert_close(out(small, x), out(masked, x), rtol=1e-4, atol=1e-5)


def test_the_packages_own_efficientnet_keeps_its_class():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    with torch.random.fork_rng():
        model = settle(package.EfficientNet.from_name("efficientnet-lite0"))
    found, _ = chains(model)
    assert sum(len(chain.layers) == 2 for chain in found) == 16
    assert ("_conv_head", "_bn1") in [chain.layers[0] for chain in found]
    small = udfc_compress(model, pruning_ratio=0.25)
    assert small._blocks[1]._depthwise_conv.groups == 72
    assert out(small, torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


class Odd(nn.Module):
    """conv -> `between` -> conv."""

    def __init__(self, between, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first or nn.Conv2d(2, 4, 3, padding=1), second or nn.Conv2d(4, 4, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Shuffled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, [1, 0, 3, 2]]


class Added(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


REFUSED = {
    "silu": (lambda: Odd(nn.SiLU()), "first: its channels go into between (SiLU)"),
    "gelu": (lambda: Odd(nn.GELU()), "GELU"),
    "indexed": (lambda: Odd(Shuffled()), "getitem"),
    "sum": (lambda: Odd(Added()), "residual"),
    "late batch norm": (lambda: Odd(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))), "does not directly follow"),
    "no statistics": (lambda: Odd(nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
    "grouped consumer": (lambda: Odd(nn.ReLU(), second=nn.Conv2d(4, 4, 3, groups=2)), "2 groups"),
    "grouped": (lambda: Odd(nn.ReLU(), first=nn.Conv2d(2, 4, 3, groups=2)), "see different inputs"),
    "linear over width": (lambda: Odd(nn.ReLU(), second=nn.Linear(12, 3)), "over other dimensions"),
    "one convolution": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3)), "0: its channels are an output"),
    "no convolution": (lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), "no convolution"),
    "layer norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.LayerNorm(10), nn.Conv2d(4, 4, 3)), "1 is a LayerNorm"),
    "group norm": (lambda: Odd(nn.GroupNorm(2, 4)), "between is a GroupNorm"),
    "GPT-2": (lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), "LayerNorm"),
    "BERT": (
        lambda: BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        ),
        "LayerNorm",
    ),
    "ViT": (
        lambda: ViTForImageClassification(
            ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
        "LayerNorm",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_nothing_to_prune_is_refused_with_the_reason_and_the_layer(make, message):
    with torch.random.fork_rng():
        model = make()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        udfc_compress(model, images(), weight_bits=4, inplace=True)
    assert same_state(model, before)


def test_a_layer_used_twice_or_a_tied_weight_is_left_alone():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    twice = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), conv, nn.ReLU(), conv)
    found, refused = chains(twice)
    assert not found
    assert "2" in refused["0"]
    assert "more than one place" in refused["2"]
    tied = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    tied[2].weight = tied[0].weight
    assert not chains(tied)[0]


def test_a_branch_on_the_shape_of_the_input_is_decided_by_the_example():
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.last = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 5), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.large(x) if x.shape[-1] > 20 else self.small(x))

    assert chains(Choosy())[0][0].layers == [("large", None)]
    assert chains(Choosy(), images())[0][0].layers == [("small", None)]


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm], ids=["parametrization", "hook"]
)
def test_a_computed_weight_is_refused(wrap):
    model = plain()
    wrap(model[4])
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="layer 4 has a parametrization"):
        udfc_compress(model, inplace=True)
    assert same_state(model, before)


# ---- bad input

BAD = [
    ({"pruning_ratio": 1.0}, ValueError, r"pruning_ratio must be in \[0, 1\), got 1"),
    ({"pruning_ratio": -0.1}, ValueError, "pruning_ratio"),
    ({"pruning_ratio": math.nan}, ValueError, "pruning_ratio"),
    ({"pruning_ratio": "0.3"}, TypeError, "pruning_ratio"),
    ({"weight_bits": 1}, ValueError, r"weight_bits must be in \[2, 8\], got 1"),
    ({"weight_bits": 9}, ValueError, "weight_bits"),
    ({"weight_bits": 4.0}, TypeError, "weight_bits"),
    ({"importance": "l3"}, ValueError, "importance"),
    ({"alpha1": -1.0}, ValueError, "alpha1 must be a finite number >= 0, got -1"),
    ({"alpha1": math.inf}, ValueError, "alpha1"),
    ({"alpha2": math.nan}, ValueError, "alpha2"),
    ({"alpha2": None}, TypeError, "alpha2"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), BAD, ids=["-".join(map(str, (*o, *o.values()))) for o, _, _ in BAD]
)
def test_bad_arguments_are_refused_and_the_model_is_as_before(options, error, message):
    model = plain()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        udfc_compress(model, inplace=True, **options)
    assert same_state(model, before)


def test_nan_weights_meta_device_and_what_is_no_module_are_refused():
    model = plain()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in 4\.weight"):
        udfc_compress(model)
    with pytest.raises(ValueError, match="meta device"):
        udfc_compress(plain().to("meta"))
    with pytest.raises(TypeError, match="model must be"):
        udfc_compress({"weight": torch.ones(2)})


def test_an_error_half_way_leaves_the_model_as_before():
    model = plain()
    before = copy.deepcopy(model)
    calls = []

    def solve(t: Tensor, basis: Tensor, prior: Tensor) -> Tensor:
        calls.append(len(t))
        if len(calls) == 2:
            raise RuntimeError("no")
        return prior

    with pytest.raises(RuntimeError, match="no"):
        compress_by(model, solve, pruning_ratio=0.3, weight_bits=4, inplace=True)
    assert calls == [8, 12]
    assert same_state(model, before)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        reconstruction_coefficients(torch.ones(2, 3), torch.ones(2, 4), 0.1)
    with pytest.raises(ValueError, match="alpha1"):
        nonnegative_coefficients(torch.ones(2, 3), torch.ones(2, 3), -0.1)
