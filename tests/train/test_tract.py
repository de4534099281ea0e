"""TrAct: the closed form, the convolution's patches, the layers, and models of the user."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from shoestring.loop import fit
from shoestring.train import tract
from shoestring.train.tract import (
    TrActConv2d,
    TrActLinear,
    patch_moment,
    ridge_solve,
    tract_,
    tract_conv2d,
    tract_linear,
    tract_weight_gradient,
    untract,
)

SHAPES = pytest.mark.parametrize(("b", "n"), [(5, 12), (8, 8), (40, 7), (1, 3), (3, 1)])
GEOMETRIES = {
    "stride 1": {"kernel_size": 3, "padding": 1},
    "no padding, no bias": {"kernel_size": 3, "bias": False},
    "patch embedding": {"kernel_size": 4, "stride": 4},
    "rectangle": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0)},
    "stride beyond the kernel": {"kernel_size": 2, "stride": 3},
    "dilation": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel, dilation": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate, same, even kernel": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
    "circular, groups, stride": {
        "kernel_size": 3, "padding": (1, 2), "padding_mode": "circular", "groups": 2, "stride": 2,
    },
    "whole image, fewer patches than inputs": {"kernel_size": 8},
    "whole image, groups": {"kernel_size": 8, "groups": 2},
}  # fmt: skip
GEOMETRY = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def least_squares(x: Tensor, G: Tensor, lambda_: float) -> Tensor:
    """argmin_D (1/b) ||x D^T - b G||^2 + lambda ||D||^2 by QR of the augmented system, without any normal equation."""
    b, n = x.shape
    rows = torch.cat([x / b**0.5, lambda_**0.5 * torch.eye(n, dtype=x.dtype)])
    target = torch.cat([G * b**0.5, torch.zeros(n, G.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, target, driver="gels").solution.T


def explicit(x: Tensor, G: Tensor, lambda_: float) -> Tensor:
    """Equation (2), with an inverse."""
    return G.T @ x @ torch.linalg.inv(x.T @ x / len(x) + lambda_ * torch.eye(x.shape[1], dtype=x.dtype))


def backward(layer: nn.Module, x: Tensor, seed: int = 9) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Outputs, gradient of the input and of the parameters, for a given gradient of the outputs."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    z = layer(x)
    z.backward(draw(*z.shape, seed=seed, dtype=z.dtype))
    return z.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


def unfolded_gradient(layer: nn.Conv2d, x: Tensor, G: Tensor, lambda_: float) -> Tensor:
    """By all patches, as `F.unfold` gives them, one matrix a group."""
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), 0
    parts = []
    for images, outputs in zip(x.chunk(layer.groups, 1), G.chunk(layer.groups, 1), strict=True):
        a = F.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride)  # (B, n, L)
        a, g = a.transpose(1, 2).flatten(0, 1), outputs.flatten(2).transpose(1, 2).flatten(0, 1)
        parts.append(explicit(a, g, lambda_))
    return torch.cat(parts).reshape(layer.weight.shape)


# ---- the closed form


@SHAPES
@pytest.mark.parametrize("lambda_", [0.1, 3.0])
def test_primal_dual_and_least_squares_agree(b, n, lambda_):
    x, G = draw(b, n), draw(b, 4, seed=1)
    g = tract_weight_gradient(x, G, lambda_)
    primal = ridge_solve(x.T @ x / b, x.T @ G, lambda_).T
    dual = ridge_solve(x @ x.T / b, G, lambda_).T @ x
    for other in (least_squares(x, G, lambda_), explicit(x, G, lambda_), primal, dual):
        torch.testing.assert_close(g, other, rtol=1e-10, atol=1e-10)


def test_the_objective_is_least_at_the_gradient():
    x, G = draw(9, 5), draw(9, 3, seed=1)

    def objective(D: Tensor) -> Tensor:
        return (x @ D.T - 9 * G).square().sum() / 9 + 0.2 * D.square().sum()

    D = tract_weight_gradient(x, G, 0.2).requires_grad_()
    assert torch.autograd.grad(objective(D), D)[0].abs().max() < 1e-10


def test_the_smaller_matrix_is_solved(monkeypatch):
    sizes = []
    monkeypatch.setattr(tract, "ridge_solve", lambda S, B, lambda_: sizes.append(S.shape) or ridge_solve(S, B, lambda_))
    tract_weight_gradient(draw(4, 9), draw(4, 2))
    tract_weight_gradient(draw(9, 4), draw(9, 2))
    assert sizes == [(4, 4), (4, 4)]


@SHAPES
def test_a_large_lambda_gives_the_plain_gradient(b, n):
    x, G = draw(b, n), draw(b, 4, seed=1)
    plain = G.T @ x
    for lambda_ in (1e2, 1e4, 1e8):
        error = (lambda_ * tract_weight_gradient(x, G, lambda_) - plain).norm() / plain.norm()
        assert error <= torch.linalg.matrix_norm(x.T @ x / b, 2) / lambda_ + 1e-14
        assert error > 0 or lambda_ > 1e7


@pytest.mark.parametrize("lambda_", [0.1, 2.0])
def test_whitened_inputs_only_scale_the_plain_gradient(lambda_):
    x = torch.linalg.qr(draw(30, 6)).Q * 30**0.5  # x^T x / b = I
    G = draw(30, 4, seed=1)
    torch.testing.assert_close(tract_weight_gradient(x, G, lambda_), G.T @ x / (1 + lambda_), rtol=1e-12, atol=1e-12)


def test_without_ridge_the_step_of_the_outputs_does_not_depend_on_a_mixing_of_the_inputs():
    x, M, G = draw(30, 6), draw(6, 6, seed=2) + 3 * torch.eye(6), draw(30, 4, seed=1)
    step = x @ tract_weight_gradient(x, G, 1e-12).T
    mixed = (x @ M) @ tract_weight_gradient(x @ M, G, 1e-12).T
    torch.testing.assert_close(mixed, step, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(x @ M @ (G.T @ x @ M).T, x @ (G.T @ x).T, rtol=0.1)  # plain gradients do depend on it


@pytest.mark.parametrize(("b", "n"), [(5, 12), (8, 8)])
def test_without_ridge_the_outputs_move_exactly_along_their_gradient(b, n):
    x, G = draw(b, n), draw(b, 4, seed=1)
    torch.testing.assert_close(x @ tract_weight_gradient(x, G, 1e-11).T, b * G, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("k", [2, 7])
def test_a_batch_k_times_over_changes_nothing(k):
    x, G = draw(6, 9), draw(6, 4, seed=1)  # 6 rows are dual, 42 primal
    repeated = tract_weight_gradient(x.repeat(k, 1), G.repeat(k, 1) / k)
    torch.testing.assert_close(repeated, tract_weight_gradient(x, G), rtol=1e-11, atol=1e-11)


def test_dark_images_count_more_than_in_backpropagation():
    x = torch.eye(2, dtype=torch.float64) * torch.tensor([1.0, 0.1])  # a bright and a dark image, same gradient
    plain, ours = torch.ones(1, 2) @ x.float(), tract_weight_gradient(x, torch.ones(2, 1), 1e-3)
    assert plain[0, 0] / plain[0, 1] == 10
    assert ours[0, 0] / ours[0, 1] < 0.2  # the dark one needs the larger change of weights


def test_it_is_linear_in_G_so_that_gradient_scaling_works():
    for b, n in ((4, 9), (9, 4)):
        x, G, H = draw(b, n), draw(b, 3, seed=1), draw(b, 3, seed=2)
        apart = 65536 * tract_weight_gradient(x, G) - tract_weight_gradient(x, H)
        torch.testing.assert_close(tract_weight_gradient(x, 65536 * G - H), apart, rtol=1e-11, atol=1e-7)


def test_leading_dimensions_are_independent_layers():
    for b, n in ((4, 9), (9, 4)):
        x, G = draw(3, b, n), draw(3, b, 2, seed=1)
        alone = torch.stack([tract_weight_gradient(x[i], G[i]) for i in range(3)])
        torch.testing.assert_close(tract_weight_gradient(x, G), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("b", "n"), [(64, 200), (400, 100)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-4), (torch.float16, 2e-4)])
def test_low_precision_is_computed_in_float32(b, n, dtype, tolerance):
    x, G = (draw(b, n) + 1).to(dtype), draw(b, 8, seed=1).to(dtype)
    g = tract_weight_gradient(x, G)
    exact = tract_weight_gradient(x.double(), G.double())
    assert g.dtype == torch.float32
    assert (g - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize(("b", "n"), [(40, 768), (3000, 768), (3000, 27)])
def test_rounding_never_makes_the_matrix_indefinite(b, n):
    x = 255 + 1e-3 * draw(b, n, dtype=torch.float32)  # nearly one and the same bright image
    g = tract_weight_gradient(x, draw(b, 4, seed=1, dtype=torch.float32), 1e-6)
    assert g.isfinite().all()
    bright = draw(n, 3, dtype=torch.float32) * 300
    S = bright @ bright.T  # of rank 3 but for rounding
    floor = 4 * torch.finfo(torch.float32).eps * S.trace().double()
    exact = torch.linalg.inv(S.double() + floor * torch.eye(n, dtype=torch.float64))
    assert (ridge_solve(S, torch.eye(n), 1e-6) - exact).norm() / exact.norm() < 0.5


def test_the_floor_of_lambda_is_below_any_lambda_in_use():
    for dtype in (torch.float32, torch.float64):
        S, B = torch.eye(27, dtype=dtype), torch.ones(27, 1, dtype=dtype)
        torch.testing.assert_close(ridge_solve(S, B, 1e-4), B / 1.0001, rtol=1e-6, atol=0)


def test_a_nan_is_not_hidden():
    for b, n in ((4, 9), (9, 4)):
        x, G = draw(b, n), draw(b, 3, seed=1)
        bad = x.clone()
        bad[1, 2] = torch.nan
        assert tract_weight_gradient(bad, G).isnan().all()
        bad[1, 2] = torch.inf
        assert not tract_weight_gradient(bad, G).isfinite().any()
        bad_G = G.clone()
        bad_G[0, 1] = torch.nan
        g = tract_weight_gradient(x, bad_G)
        assert g[1].isnan().all()
        torch.testing.assert_close(g[[0, 2]], tract_weight_gradient(x, G)[[0, 2]])


# ---- patches


@GEOMETRY
def test_patch_moment_is_that_of_all_unfolded_patches(geometry):
    options = {k: v for k, v in geometry.items() if k not in ("bias", "padding_mode")}
    if isinstance(options.get("padding"), str):
        options["padding"] = 1
    x = draw(3, 4, 8, 9)
    groups = options.pop("groups", 1)
    for S, images in zip(patch_moment(x, **options, groups=groups), x.chunk(groups, 1), strict=True):
        a = F.unfold(images, **options).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(S, a.T @ a / len(a), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3000, 20000])
def test_patch_moment_in_blocks_is_that_of_one(size, monkeypatch):
    x = draw(5, 4, 8, 9)
    whole = patch_moment(x, 3, padding=1, groups=2)
    blocks = []
    original = tract._patches
    monkeypatch.setattr(tract, "BLOCK", size)
    monkeypatch.setattr(tract, "_patches", lambda windows: blocks.append(original(windows)) or blocks[-1])
    torch.testing.assert_close(patch_moment(x, 3, padding=1, groups=2), whole, rtol=1e-12, atol=1e-12)
    assert len(blocks) > 2
    assert max(8 * block.numel() for block in blocks) <= max(size, 8 * 36 * 9)  # one row of 9 places


def test_patch_moment_takes_any_memory_format_and_dtype():
    x = draw(3, 4, 8, 9)
    S = patch_moment(x, 3)
    torch.testing.assert_close(patch_moment(x.to(memory_format=torch.channels_last), 3), S, rtol=1e-12, atol=1e-12)
    half = patch_moment(x.bfloat16(), 3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), patch_moment(x.bfloat16().double(), 3), rtol=1e-5, atol=1e-5)


# ---- the layers


def test_official_values_of_a_linear_layer():  # printed in the official repository, src/tract.py
    torch.manual_seed(0)
    x, y = torch.randn(30, 8), torch.randn(30, 5)
    layer = TrActLinear(8, 5, lambda_=0.1)
    (y - layer(x)).pow(2).mean().backward()
    official = torch.tensor([0.0741, 0.0949, -0.0559, -0.0398, -0.1364, 0.0013, 0.1603, -0.0468])
    torch.testing.assert_close(layer.weight.grad[0], official, rtol=0, atol=5.1e-5)
    torch.testing.assert_close(layer.bias.grad[:2], torch.tensor([-0.1162, 0.1062]), rtol=0, atol=5.1e-5)


def test_official_values_of_a_convolution():
    torch.manual_seed(0)
    x, y = torch.randn(30, 2, 6, 4), torch.randn(30, 5, 4, 2)
    layer = TrActConv2d(2, 5, 3, 1, 0, lambda_=0.1)
    (y - layer(x)).pow(2).mean().backward()
    official = torch.tensor([[-0.0501, -0.0166, 0.0214], [-0.0230, 0.0324, 0.0655], [0.0010, 0.0600, 0.0290]])
    torch.testing.assert_close(layer.weight.grad[0, 0], official, rtol=0, atol=5.1e-5)
    torch.testing.assert_close(layer.bias.grad[:2], torch.tensor([0.0052, -0.0397]), rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_plain_layer_but_for_the_gradient_of_its_weight(shape, dtype, bias):
    plain = nn.Linear(6, 4, bias=bias, dtype=dtype)
    ours = tract_(copy.deepcopy(plain), lambda_=0.3)
    x = draw(*shape, dtype=dtype)
    z, grad_x, grads = backward(plain, x)
    our_z, our_grad_x, our_grads = backward(ours, x)
    assert torch.equal(our_z, z)
    assert torch.equal(our_grad_x, grad_x)
    if bias:
        torch.testing.assert_close(our_grads["bias"], grads["bias"])
    G = draw(*z.shape, seed=9, dtype=dtype)
    expected = tract_weight_gradient(x.reshape(-1, 6), G.reshape(-1, 4), 0.3).to(dtype)
    assert our_grads["weight"].dtype == dtype
    assert torch.equal(our_grads["weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@GEOMETRY
def test_conv_is_the_plain_layer_but_for_the_gradient_of_its_weight(geometry, dtype):
    plain = nn.Conv2d(4, 8, **geometry, dtype=dtype)
    ours = tract_(copy.deepcopy(plain), lambda_=0.3)
    x = draw(3, 4, 8, 9 if "whole" not in str(geometry) else 8, dtype=dtype)
    z, grad_x, grads = backward(plain, x)
    our_z, our_grad_x, our_grads = backward(ours, x)
    assert torch.equal(our_z, z)
    torch.testing.assert_close(our_grad_x, grad_x)
    if ours.bias is not None:
        torch.testing.assert_close(our_grads["bias"], grads["bias"])
    G = draw(*z.shape, seed=9)
    expected = unfolded_gradient(plain, x.double(), G, 0.3).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(our_grads["weight"], expected, rtol=tolerance, atol=tolerance)


def test_a_kernel_of_the_whole_image_is_a_linear_layer():
    for batch in (5, 80):  # fewer and more patches than the 48 inputs
        conv = TrActConv2d(3, 6, 4, dtype=torch.float64)
        linear = TrActLinear(48, 6, dtype=torch.float64)
        linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
        x, y = draw(batch, 3, 4, 4), draw(batch, 6, seed=1)
        F.mse_loss(conv(x).flatten(1), y).backward()
        F.mse_loss(linear(x.flatten(1)), y).backward()
        torch.testing.assert_close(conv.weight.grad.flatten(1), linear.weight.grad, rtol=1e-10, atol=1e-10)


def test_a_1x1_convolution_is_a_linear_layer_on_pixels():
    conv, linear = TrActConv2d(3, 6, 1, dtype=torch.float64), TrActLinear(3, 6, dtype=torch.float64)
    linear.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    x, y = draw(2, 3, 5, 4), draw(2, 5, 4, 6, seed=1)
    F.mse_loss(conv(x).movedim(1, -1), y).backward()
    F.mse_loss(linear(x.movedim(1, -1)), y).backward()
    torch.testing.assert_close(conv.weight.grad.flatten(1), linear.weight.grad, rtol=1e-10, atol=1e-10)


def test_the_mean_is_over_patches_so_that_resolution_leaves_lambda_alone():
    conv = TrActConv2d(2, 3, 4, stride=4, dtype=torch.float64, lambda_=0.5)
    tile = draw(6, 2, 4, 4)
    gradients = []
    for images in (tile, tile.tile(1, 1, 5, 5)):  # 1 and 25 equal patches an image
        conv.zero_grad()
        conv(images).square().mean().backward()
        gradients.append(conv.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-10)


def test_groups_are_layers_of_their_own():
    grouped = TrActConv2d(4, 6, 3, groups=2, dtype=torch.float64)
    x = draw(3, 4, 7, 7)
    grouped(x).square().mean().backward()
    for i, images in enumerate(x.chunk(2, 1)):
        one = TrActConv2d(2, 3, 3, dtype=torch.float64)
        one.load_state_dict({"weight": grouped.weight.chunk(2)[i], "bias": grouped.bias.chunk(2)[i]})
        (one(images).square().mean() / 2).backward()
        torch.testing.assert_close(grouped.weight.grad.chunk(2)[i], one.weight.grad, rtol=1e-10, atol=1e-10)


def test_one_image_without_a_batch():
    conv = TrActConv2d(3, 6, 3, padding="same", dtype=torch.float64)
    x = draw(3, 6, 5)
    z = conv(x)
    assert torch.equal(z, F.conv2d(x, conv.weight, conv.bias, padding="same"))
    z.square().mean().backward()
    alone = conv.weight.grad.clone()
    conv.zero_grad()
    conv(x[None]).square().mean().backward()
    torch.testing.assert_close(alone, conv.weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(8, 2), nn.Conv2d(3, 4, 3)], ids=["Linear", "Conv2d"])
def test_an_empty_batch_gives_zeros(layer):
    layer = tract_(copy.deepcopy(layer))
    x = torch.empty(0, 8) if isinstance(layer, nn.Linear) else torch.empty(0, 3, 5, 5)
    layer(x).sum().backward()
    assert not layer.weight.grad.any()
    assert not layer.bias.grad.any()


def test_channels_last_and_non_contiguous_inputs():
    conv = TrActConv2d(4, 6, 3, dtype=torch.float64)
    _, _, grads = backward(conv, draw(3, 4, 8, 9))
    z = conv(draw(3, 4, 8, 9).to(memory_format=torch.channels_last))
    conv.zero_grad()
    z.backward(draw(*z.shape, seed=9))
    torch.testing.assert_close(conv.weight.grad, grads["weight"], rtol=1e-10, atol=1e-10)
    linear = TrActLinear(6, 3, dtype=torch.float64)
    x = draw(6, 4, 5)
    for tokens in (x.permute(1, 2, 0), x.permute(1, 2, 0).contiguous()):
        linear.zero_grad()
        linear(tokens).square().mean().backward()
        grads[str(tokens.is_contiguous())] = linear.weight.grad
    torch.testing.assert_close(grads["True"], grads["False"], rtol=1e-12, atol=1e-12)


def test_gradients_add_up_over_micro_batches_as_they_do_for_any_layer():
    layer = TrActLinear(6, 3, dtype=torch.float64)
    x = draw(20, 6)
    separate = []
    for part in x.split(10):
        layer.zero_grad()
        layer(part).square().mean().backward()
        separate.append(layer.weight.grad)
    layer.zero_grad()
    for part in x.split(10):
        layer(part).square().mean().backward()
    torch.testing.assert_close(layer.weight.grad, sum(separate), rtol=1e-12, atol=1e-12)
    layer.zero_grad()
    (layer(x[:10]).square().mean() + layer(x[10:]).square().mean()).backward()  # one layer called twice
    torch.testing.assert_close(layer.weight.grad, sum(separate), rtol=1e-12, atol=1e-12)


def test_a_frozen_weight_or_bias_costs_and_gets_nothing(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("computed for a frozen weight")

    for layer, x in ((TrActLinear(6, 3), draw(4, 6)), (TrActConv2d(2, 3, 3), draw(4, 2, 5, 5))):
        layer.bias.requires_grad_(False)
        layer(x.float()).sum().backward()
        assert layer.bias.grad is None
        assert layer.weight.grad is not None
        layer.zero_grad()
        layer.weight.requires_grad_(False)
        with monkeypatch.context() as patched:
            patched.setattr(tract, "ridge_solve", never)
            patched.setattr(tract, "patch_moment", never)
            layer(x.float().requires_grad_()).sum().backward()
        assert layer.weight.grad is None


def test_no_grad_and_inference_mode_are_plain():
    layer, x = TrActConv2d(2, 3, 3), draw(4, 2, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))


def test_an_activation_may_work_in_place_on_the_outputs():
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True))
    ours = tract_(copy.deepcopy(plain))
    x = draw(4, 2, 5, 5, dtype=torch.float32)
    _, grad_x, _ = backward(plain, x)
    torch.testing.assert_close(backward(ours, x)[1], grad_x)


def test_double_backward_is_refused():
    for layer, x in ((TrActLinear(6, 3), draw(4, 6)), (TrActConv2d(2, 3, 3), draw(4, 2, 5, 5))):
        x = x.float().requires_grad_()
        for wanted in (layer.weight, x):
            (gradient,) = torch.autograd.grad(layer(x).pow(3).sum(), wanted, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.square().sum().backward()


def test_torch_func_is_refused():
    layer = TrActLinear(6, 3)
    weights = dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda p: torch.func.functional_call(layer, p, (torch.ones(2, 6),)).sum())(weights)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv2d, dual"])
def test_autocast_computes_the_closed_form_in_float32(kind, inside):
    plain = nn.Linear(50, 8) if kind == "Linear" else nn.Conv2d(3, 8, 3 if kind == "Conv2d" else 8)
    x = draw(200, 50, dtype=torch.float32) if kind == "Linear" else draw(40, 3, 8, 8, dtype=torch.float32)
    x = x + 2  # bfloat16 would lose x^T x
    ours = tract_(copy.deepcopy(plain))
    results = []
    for layer in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            tracked = x.clone().requires_grad_()
            z = layer(tracked)
            assert z.dtype == torch.bfloat16
            if inside:
                z.backward(draw(*z.shape, seed=9).to(z.dtype))
        if not inside:
            z.backward(draw(*z.shape, seed=9).to(z.dtype))
        results.append((z, tracked.grad, layer.bias.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2])
    assert ours.weight.grad.dtype == torch.float32
    G = draw(*z.shape, seed=9).to(z.dtype).double()
    if kind == "Linear":
        exact = explicit(x.double(), G, 0.1)
    else:
        exact = unfolded_gradient(plain, x.double(), G, 0.1)
    limit = 0.05 if kind == "Conv2d" else 1e-3  # there autograd's own G^T x comes in bfloat16
    assert (ours.weight.grad - exact).norm() / exact.norm() < limit


def test_half_layers():
    for dtype in (torch.bfloat16, torch.float16):
        for layer, x in ((TrActLinear(6, 3, dtype=dtype), draw(9, 6)), (TrActConv2d(2, 3, 3, dtype=dtype), None)):
            x = draw(4, 2, 6, 6) if x is None else x
            layer(x.to(dtype)).float().square().mean().backward()
            half = layer.weight.grad
            assert half.dtype == dtype
            exact = copy.deepcopy(layer).double()
            exact.zero_grad()
            exact(x.to(dtype).double()).square().mean().backward()
            torch.testing.assert_close(half.double(), exact.weight.grad, rtol=0.05, atol=0.02)


def test_a_nan_in_the_inputs_reaches_the_weight_gradient_of_its_group():
    conv = TrActConv2d(4, 6, 3, groups=2)
    x = draw(3, 4, 7, 7, dtype=torch.float32)
    x[1, 0, 2, 2] = torch.nan
    conv(x).sum().backward()
    assert conv.weight.grad[:3].isnan().all()
    assert conv.weight.grad[3:].isfinite().all()


def test_meta_device():
    for layer, x in ((TrActLinear(6, 3, device="meta"), (4, 6)), (TrActConv2d(2, 3, 3, device="meta"), (4, 2, 5, 5))):
        layer(torch.empty(x, device="meta")).sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape
        assert layer.weight.is_meta


@pytest.mark.parametrize("groups", [1, 2])
def test_torch_compile_makes_one_graph_with_the_same_gradients(groups):
    model = tract_(nn.Sequential(nn.Conv2d(2, 4, 3, groups=groups), nn.Flatten(), nn.Linear(36, 3)))
    x = draw(4, 2, 5, 5, dtype=torch.float32)
    z, grad_x, grads = backward(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_z, compiled_grad_x, compiled_grads = backward(compiled, x)
    torch.testing.assert_close(compiled_z, z)
    torch.testing.assert_close(compiled_grad_x, grad_x)
    for name, gradient in grads.items():
        torch.testing.assert_close(compiled_grads[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_initial_weights_and_state_dict_are_those_of_the_plain_layer():
    for plain, ours, arguments in (
        (nn.Linear, TrActLinear, (6, 3)),
        (nn.Conv2d, TrActConv2d, (2, 3, 3, 2, 1, 1, 1, False, "reflect")),
    ):
        torch.manual_seed(5)
        a = plain(*arguments)
        torch.manual_seed(5)
        b = ours(*arguments, lambda_=0.2)
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict())
        state = load(save(b.state_dict()))
        a.load_state_dict(state)
        b.load_state_dict(state)
        assert b.lambda_ == 0.2
        assert "lambda_=0.2" in repr(b)


# ---- models of the user


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(self.norm(x))).mean((2, 3)))


def test_the_first_layer_or_the_named_one_is_taken_in_place():
    model = Net()
    conv, parameters = model.conv, list(model.parameters())
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    model.eval()
    optimizer = torch.optim.Adam(model.parameters())
    before = torch.get_rng_state()
    assert tract_(model, 0.3) is model
    assert torch.equal(torch.get_rng_state(), before)
    assert model.conv is conv
    assert isinstance(conv, TrActConv2d)
    assert conv.lambda_ == 0.3
    assert not conv.training
    assert type(model.head) is nn.Linear
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    weight = conv.weight.clone()
    model(torch.randn(2, 2, 5, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, conv.weight)
    assert calls == [1]
    handle.remove()
    model(torch.randn(2, 2, 5, 5))
    assert calls == [1]
    assert isinstance(tract_(Net(), name="head").head, TrActLinear)
    assert type(tract_(Net(), name="head").conv) is nn.Conv2d


def test_untract_gives_back_the_plain_layer():
    model = tract_(Net())
    tract_(model, name="head")
    conv = model.conv
    assert untract(model) is model
    assert model.conv is conv
    assert type(conv) is nn.Conv2d
    assert type(model.head) is nn.Linear
    assert "lambda_" not in repr(model)
    assert not hasattr(conv, "lambda_")
    x = torch.randn(2, 2, 5, 5)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    for (name, gradient), other in zip(backward(model, x)[2].items(), backward(plain, x)[2].values(), strict=True):
        assert torch.equal(gradient, other), name
    assert type(untract(TrActLinear(2, 3))) is nn.Linear
    tract_(model)  # again


def test_a_layer_used_at_two_places_is_taken_at_both():
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, nn.Linear(6, 2))})
    tract_(model)
    assert isinstance(model["a"], TrActLinear)
    assert model["b"][0] is model["a"]
    untract(model)
    assert type(model["b"][0]) is nn.Linear


def test_copies_and_saved_models_train_alike():
    model = tract_(Net(), 0.7)
    x = torch.randn(4, 2, 5, 5)
    _, _, grads = backward(model, x)
    twin = copy.deepcopy(model)
    assert twin.conv.weight is not model.conv.weight
    rebuilt = tract_(Net(), 0.7)
    rebuilt.load_state_dict(load(save(model.state_dict())))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    Net().load_state_dict(torch.load(file, weights_only=True))  # into the plain model
    for other in (twin, rebuilt):
        other.load_state_dict(model.state_dict())
        for name, gradient in backward(other, x)[2].items():
            assert torch.equal(gradient, grads[name])


def test_parametrizations_come_after():
    model = tract_(nn.Sequential(nn.Linear(6, 3)))
    nn.utils.parametrizations.weight_norm(model[0])
    x, G = draw(9, 6, dtype=torch.float32), draw(9, 3, seed=1, dtype=torch.float32)
    model(x).backward(G)
    direction = model[0].parametrizations.weight.original1
    magnitude = model[0].parametrizations.weight.original0
    g = tract_weight_gradient(x, G)
    expected = torch.autograd.grad(torch._weight_norm(direction, magnitude), direction, g)[0]
    torch.testing.assert_close(direction.grad, expected)
    with pytest.raises(ValueError, match="remove it before untract"):
        untract(model)
    with pytest.raises(ValueError, match="call tract_ first"):
        tract_(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


class Padded(nn.Conv2d):
    """As EfficientNet's: its forward pads by itself and calls conv2d by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        z = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight=self.weight, bias=self.bias, stride=self.stride, groups=self.groups)
        return torch.tanh(z)


def test_a_derived_layer_keeps_its_own_forward():
    plain = Padded(2, 4, 3, stride=2, dtype=torch.float64)
    ours = tract_(copy.deepcopy(plain))
    assert isinstance(ours, Padded)
    x = draw(3, 2, 6, 6)
    z, grad_x, _ = backward(plain, x)
    our_z, our_grad_x, grads = backward(ours, x)
    assert torch.equal(our_z, z)
    torch.testing.assert_close(our_grad_x, grad_x)
    G = draw(*z.shape, seed=9) * (1 - z**2)
    exact = nn.Conv2d(2, 4, 3, stride=2, dtype=torch.float64)
    expected = unfolded_gradient(exact, F.pad(x, (0, 1, 0, 1)), G, 0.1)
    torch.testing.assert_close(grads["weight"], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(backward(copy.deepcopy(ours), x)[2]["weight"], grads["weight"])
    assert "lambda_=0.1" in repr(ours)
    assert type(untract(ours)) is Padded


def test_a_derived_layer_that_never_uses_its_weight_is_refused():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    with pytest.raises(RuntimeError, match=r"forward of Standardised called neither linear nor conv2d"):
        tract_(Standardised(2, 3, 3))(torch.ones(1, 2, 4, 4))


def first_weight_gradient(model: nn.Module, layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """As the model computes it, and as all patches that reached the layer say."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, inputs, z: seen.update(x=inputs[0].detach()) or z.retain_grad()),
        layer.register_forward_hook(lambda _, inputs, z: seen.update(z=z)),
    ]
    output = model(x)
    output = output if isinstance(output, Tensor) else output[0]
    output.square().mean().backward()
    for handle in handles:
        handle.remove()
    padding = getattr(layer, "static_padding", nn.Identity())
    expected = unfolded_gradient(layer, padding(seen["x"]), seen["z"].grad, 0.1)
    return layer.weight.grad, expected


def test_efficientnet():
    from efficientnet_lite_pytorch import EfficientNet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = EfficientNet.from_name("efficientnet-lite0").double()
    tract_(model)
    assert type(model._conv_stem).__name__ == "TrActConv2dStaticSamePadding"
    ours, expected = first_weight_gradient(model, model._conv_stem, draw(2, 3, 64, 64))
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "ConvNext"])
def test_transformers_models(kind):
    transformers = pytest.importorskip("transformers")
    options = {
        "ViT": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        | {"image_size": 16, "patch_size": 4},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}Model")(config).double()
    plain = copy.deepcopy(model)
    tract_(model)
    (layer,) = [module for module in model.modules() if isinstance(module, TrActConv2d)]
    x = draw(3, 3, 16, 16)
    assert torch.equal(plain(x)[0], model(x)[0])
    ours, expected = first_weight_gradient(model, layer, x)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


def test_it_trains_by_the_one_loop():
    x = draw(64, 8, dtype=torch.float32) * torch.logspace(0, -2, 8)  # from bright to dark
    y = (x / torch.logspace(0, -2, 8)).sum(1, keepdim=True)
    losses = {}
    for name in ("plain", "tract"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 1))
        if name == "tract":
            tract_(model, 1e-3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        history = fit(
            model, [(x, y)], lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), optimizer,
            epochs=100, progress=False,
        )  # fmt: skip
        losses[name] = history[-1]["loss"]
    assert losses["tract"] < 0.1 * losses["plain"]
    json.dumps(losses)


# ---- what is refused


@pytest.mark.parametrize("lambda_", [0, -0.1, float("nan"), float("inf")])
def test_a_bad_lambda_is_refused_and_changes_nothing(lambda_):
    model = Net()
    for call in (
        lambda: tract_(model, lambda_),
        lambda: TrActLinear(2, 3, lambda_=lambda_),
        lambda: TrActConv2d(2, 3, 3, lambda_=lambda_),
        lambda: tract_weight_gradient(torch.ones(2, 2), torch.ones(2, 2), lambda_),
        lambda: ridge_solve(torch.eye(2), torch.eye(2), lambda_),
        lambda: tract_linear(torch.ones(2, 2), torch.ones(2, 2), lambda_=lambda_),
        lambda: tract_conv2d(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2), lambda_=lambda_),
    ):
        with pytest.raises(ValueError, match=rf"lambda_ must be finite and > 0, got {lambda_}"):
            call()
    assert type(model.conv) is nn.Conv2d


@pytest.mark.parametrize("lambda_", [None, "0.1", True])
def test_a_lambda_that_is_no_number_is_refused(lambda_):
    with pytest.raises(TypeError, match="lambda_ must be a number"):
        tract_(nn.Linear(2, 2), lambda_)


def test_a_layer_whose_lambda_was_set_wrongly_says_so():
    layer = TrActLinear(2, 2)
    layer.lambda_ = -1.0
    with pytest.raises(ValueError, match=r"lambda_ must be finite and > 0, got -1\.0"):
        layer(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("model", "name", "error", "message"),
    [
        (nn.ReLU(), None, ValueError, "must hold a Linear or Conv2d, got ReLU"),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Linear(3, 2)), None, ValueError, "first layer '0' is a Conv1d"),
        (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), None, ValueError, "first layer '0' is a Embedding"),
        (Net(), "stem", ValueError, r"such as \['conv', 'head'\], got 'stem'"),
        (Net(), "conv.weight", ValueError, "name must be that of a layer"),
        (Net(), "norm", TypeError, "layer 'norm' must be a Linear or Conv2d, got BatchNorm2d"),
        (Net(), "", TypeError, "the layer must be a Linear or Conv2d, got Net"),
        (nn.ConvTranspose2d(2, 3, 3), None, ValueError, "is a ConvTranspose2d"),
        (nn.MultiheadAttention(4, 2), "out_proj", TypeError, "read by MultiheadAttention and never called"),
        (nn.LazyLinear(3), None, ValueError, "LazyLinear without weights yet"),
        (nn.Linear(2, 2, dtype=torch.complex64), None, TypeError, "must be real, got torch.complex64"),
    ],
    ids=["none", "1d", "words", "unknown", "weight", "norm", "root", "transposed", "attention", "lazy", "complex"],
)
def test_a_layer_that_cannot_be_taken_is_refused_by_name(model, name, error, message):
    classes = [type(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        tract_(model, name=name)
    assert [type(module) for module in model.modules()] == classes


def test_a_layer_is_taken_once():
    model = tract_(Net())
    with pytest.raises(ValueError, match="layer 'conv' trains by TrAct already"):
        tract_(model)
    with pytest.raises(ValueError, match="the layer trains by TrAct already"):
        tract_(TrActLinear(2, 2))
    with pytest.raises(ValueError, match="Net has no layer that trains by TrAct"):
        untract(Net())


def test_complex_numbers_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="weight must be real"):
        TrActLinear(2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="x must be real"):
        tract_weight_gradient(torch.ones(2, 2, dtype=torch.complex64), torch.ones(2, 2))
    with pytest.raises(TypeError, match="x must be real"):
        patch_moment(torch.ones(1, 1, 2, 2, dtype=torch.complex64), 1)
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(4, 3\)"):
        tract_weight_gradient(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="needs stride 1"):
        tract_conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2, requires_grad=True), None, 2, "same")
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        TrActConv2d(3, 4, 3, groups=2)
    with pytest.raises(RuntimeError, match="channels"):
        TrActConv2d(3, 4, 3)(torch.ones(1, 2, 4, 4))
