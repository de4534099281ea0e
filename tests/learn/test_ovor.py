"""OVOR: prefix prompts in real vision transformers (small, random weights), and outliers around features."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from shoestring.learn.ovor import (
    PrefixPromptViT,
    VirtualOutlierRegularizer,
    energy_margin_loss,
    fit_task,
    kth_neighbour_distance,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["vit sdpa", "vit eager", "dinov2", "timm"])
def vit(request):
    torch.manual_seed(0)
    if request.param == "timm":
        return TimmLike().eval()
    if request.param == "dinov2":
        return Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2)).eval()
    config = ViTConfig(**SMALL, intermediate_size=64, attn_implementation=request.param.split()[1])
    return ViTModel(config, add_pooling_layer=False).eval()


class TimmLike(nn.Module):
    """The parts of timm's vision transformer that matter here (timm needs a torchvision that works)."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 4, nn.Linear(32, 96), nn.Linear(32, 32)
            self.q_norm, self.k_norm = nn.LayerNorm(8), nn.Identity()
            self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

        def forward(self, x):
            B, N, C = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) * 8**-0.5).softmax(-1)
            return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, N, C)))

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(32), "attn": self.Attention()}) for _ in range(3)
        )
        self.norm = nn.LayerNorm(32)

    def forward_features(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x))
        return self.norm(x)


def features(model, images):
    if hasattr(model, "forward_features"):
        return model.forward_features(images)[:, 0]
    return model(pixel_values=images).last_hidden_state[:, 0]


IMAGES = draw(5, 3, 32, 32)


# ---- prompts


def test_prompts_of_length_zero_are_the_plain_model_bit_for_bit(vit):
    with torch.no_grad():
        plain = features(vit, IMAGES)
        assert torch.equal(PrefixPromptViT(vit, {0: 0, 2: 0})(IMAGES), plain)


def test_attention_is_the_standard_one_with_more_keys_and_values(vit):
    """By hand, from the module's own weights."""
    prompted = PrefixPromptViT(vit, {1: 6})
    attention = next(m for m in vit.modules() if "prefix" in m.__dict__)
    x = draw(2, 7, 32, seed=1)
    P = prompted.prompts["1"]
    if hasattr(attention, "qkv"):
        q, k, v = attention.qkv(x).split(32, 2)
        q = attention.q_norm(q.view(2, 7, 4, 8)).flatten(2)
        out, found = attention.proj, attention(x)
    else:
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        out, found = attention.o_proj, attention(x)[0]
    k = torch.cat([P[:3].expand(2, 3, 32), k], 1)
    v = torch.cat([P[3:].expand(2, 3, 32), v], 1)
    heads = []
    for i in range(4):
        part = slice(8 * i, 8 * i + 8)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(found, out(torch.cat(heads, -1)), rtol=1e-5, atol=1e-6)


def test_prompts_alone_are_trained(vit):
    prompted = PrefixPromptViT(vit, {0: 2, 1: 4})
    prompted(IMAGES).square().sum().backward()
    trained = {name for name, p in prompted.named_parameters() if p.grad is not None}
    assert trained == {"prompts.0", "prompts.1"}
    assert all(p.grad.abs().sum() > 0 for p in prompted.prompts.values())
    assert all(p.min().item() >= 0 and p.max().item() <= 1 for p in prompted.prompts.values())


def test_the_papers_lengths_have_107520_parameters():
    config = ViTConfig(hidden_size=768, num_hidden_layers=5, num_attention_heads=12, intermediate_size=8, image_size=16)
    prompted = PrefixPromptViT(ViTModel(config, add_pooling_layer=False))
    assert sum(p.numel() for p in prompted.parameters() if p.requires_grad) == 107_520


def test_one_pass_of_the_model_a_batch(vit):
    prompted = PrefixPromptViT(vit, {0: 2})
    calls = []
    norm = vit.norm if hasattr(vit, "norm") else vit.layernorm
    norm.register_forward_hook(lambda *_: calls.append(1))
    prompted(IMAGES)
    assert calls == [1]


def test_saved_once_copied_and_loaded(vit):
    prompted = PrefixPromptViT(vit, {0: 2, 1: 4}).eval()
    state = prompted.state_dict()
    assert [name for name in state if "prompt" in name or "prefix" in name] == ["prompts.0", "prompts.1"]
    twin = copy.deepcopy(prompted)
    with torch.no_grad():
        before = prompted(IMAGES)
        assert torch.equal(twin(IMAGES), before)
        twin.prompts["0"].add_(1.0)  # the copy's attention follows the copy's prompts
        assert not torch.equal(twin(IMAGES), before)
        assert torch.equal(prompted(IMAGES), before)
        twin.load_state_dict(load(save({name: t.contiguous() for name, t in state.items()})))
        assert torch.equal(twin(IMAGES), before)


def test_prompts_follow_the_generator_and_leave_the_global_one_alone(vit):
    before = torch.get_rng_state()
    one = PrefixPromptViT(copy.deepcopy(vit), {0: 4}).prompts["0"]
    two = PrefixPromptViT(copy.deepcopy(vit), {0: 4}, generator=torch.Generator().manual_seed(3)).prompts["0"]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, two)


def test_bad_models_and_lengths(vit):
    for lengths, message in (
        ({9: 2}, "names block 9, but there are 3 blocks"),
        ({0: 3}, r"lengths\[0\] must be an even"),
    ):
        with pytest.raises(ValueError, match=message):
            PrefixPromptViT(vit, lengths)
    assert all(p.requires_grad for p in vit.parameters())
    with pytest.raises(TypeError, match="vit must be a vision transformer"):
        PrefixPromptViT(nn.Linear(3, 3))
    PrefixPromptViT(vit, {0: 2})
    with pytest.raises(ValueError, match="has prefix prompts already"):
        PrefixPromptViT(vit, {0: 2})


# ---- energy


def test_no_loss_beyond_the_margins_and_huber_within():
    inside, outside = torch.tensor([[16.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert energy_margin_loss(inside, outside).item() == 0
    small, large = torch.tensor([[14.5, -50.0]]), torch.tensor([[9.0, -50.0]])  # energies -14.5 and -9
    assert energy_margin_loss(small, outside).item() == pytest.approx(0.5 * 0.5**2)
    assert energy_margin_loss(inside, large).item() == pytest.approx(6 - 0.5)
    rows = draw(4, 3)
    shifted = energy_margin_loss(rows, rows, -1.0 - 5.0, 1.0 - 5.0)
    assert energy_margin_loss(rows + 0.0, rows, -1.0, 1.0) != shifted
    torch.testing.assert_close(
        energy_margin_loss(rows + 5.0, rows + 5.0, -6.0, -4.0), energy_margin_loss(rows, rows, -1.0, 1.0)
    )


# ---- outliers


def test_kth_neighbour_distance_is_that_of_scikit_learn():
    rows, among = draw(30, 5, dtype=torch.float64), draw(80, 5, seed=1, dtype=torch.float64)
    for k in (1, 7, 80):
        expected = NearestNeighbors(n_neighbors=k).fit(among).kneighbors(rows)[0][:, -1] ** 2
        np.testing.assert_allclose(kth_neighbour_distance(rows, among, k), expected, rtol=1e-9)
    assert torch.allclose(kth_neighbour_distance(rows, among, 500), kth_neighbour_distance(rows, among, 80))


def test_kept_outliers_are_the_farthest_of_all_tried():
    H = 3.0 * draw(120, 6, dtype=torch.float64) + 2.0
    sampler = VirtualOutlierRegularizer(k=5, n_boundary=10, n_candidates=20, per_class=7)
    kept = sampler.sample(H, 3, generator=torch.Generator().manual_seed(4))
    assert len(kept) == 21
    unit = F.normalize(H, dim=1)
    out = torch.cdist(unit, unit).sort(1).values[:, 4].topk(10).indices
    noise = draw(200, 6, seed=4, dtype=torch.float64)
    tried = H[out].repeat_interleave(20, 0) + 0.1 * H[out].norm(dim=1).repeat_interleave(20)[:, None] * noise
    far = torch.cdist(F.normalize(tried, dim=1), unit).sort(1).values[:, 4]
    order = far.argsort(descending=True)
    assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in tried[order[:21]].tolist()}


def test_without_noise_outliers_are_boundary_rows():
    H = draw(120, 6)
    kept = VirtualOutlierRegularizer(k=5, n_boundary=10, n_candidates=4, std=0.0).sample(H, 1)
    unit = F.normalize(H, dim=1)
    boundary = {tuple(row) for row in H[torch.cdist(unit, unit).sort(1).values[:, 4].topk(10).indices].tolist()}
    assert {tuple(row) for row in kept.tolist()} <= boundary
    assert len(kept) == 40  # all there are


def test_few_rows_and_the_official_origin():
    assert VirtualOutlierRegularizer().sample(draw(3, 6), 2).shape == (80, 6)  # fewer rows than k and n_boundary
    H = draw(60, 6) + 100.0
    kept = VirtualOutlierRegularizer(outliers="origin", std=0.5).sample(H, 2)
    assert kept.norm(dim=1).max() < 5
    one, two = (VirtualOutlierRegularizer().sample(H, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, VirtualOutlierRegularizer().sample(H, 2, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be an int >= 1, got 0"),
        ({"std": -1.0}, "std must be >= 0, got -1"),
        ({"weight": float("nan")}, "weight must be >= 0, got nan"),
        ({"margin_in": 0.0}, "margin_in must be < margin_out, got 0.0 and -3.0"),
        ({"outliers": "middle"}, "outliers must be 'boundary' or 'origin'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VirtualOutlierRegularizer(**options)


def test_bad_features():
    for H in (torch.full((5, 3), torch.nan), draw(0, 3), draw(4)):
        with pytest.raises(ValueError, match="features must be"):
            VirtualOutlierRegularizer().sample(H, 2)


# ---- a task


def task(classes=(1, 4), n=60):
    X = draw(n, 8, seed=7)
    y = torch.tensor(classes)[(X[:, 0] > 0).long()]
    return X, y


def head(seed=0):
    made = nn.Linear(8, 6)
    made.load_state_dict({"weight": draw(6, 8, seed=seed), "bias": draw(6, seed=seed + 1)})
    return made


def test_rows_of_other_classes_do_not_change_by_a_bit():
    net, before = head(), head()
    X, y = task()
    fit_task(nn.Identity(), net, X, y, epochs=5, outlier_epochs=3)
    others = [0, 2, 3, 5]
    assert torch.equal(net.weight[others], before.weight[others])
    assert torch.equal(net.bias[others], before.bias[others])
    assert not torch.equal(net.weight[[1, 4]], before.weight[[1, 4]])


def test_weight_zero_is_plain_training():
    X, y = task()
    ends = []
    for options in ({"weight": 0.0}, {"weight": 0.0, "outliers": "origin"}, {"weight": 1.0}):
        net = head()
        fit_task(nn.Identity(), net, X, y, epochs=2, outlier_epochs=4, regularizer=VirtualOutlierRegularizer(**options))
        ends.append(net.weight)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_outlier_epochs_move_the_head_only_and_raise_what_they_should():
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**SMALL, intermediate_size=64), add_pooling_layer=False)
    prompted, net = PrefixPromptViT(vit, {0: 4}), nn.Linear(32, 4)
    images, y = draw(24, 3, 32, 32, seed=2), torch.arange(24) % 2
    prompts = prompted.prompts["0"].detach().clone()
    before = net.weight.detach().clone()
    fit_task(prompted, net, images, y, epochs=0, outlier_epochs=2)
    assert torch.equal(prompted.prompts["0"], prompts)
    assert not torch.equal(net.weight, before)
    fit_task(prompted, net, images, y, epochs=1, outlier_epochs=0)
    assert not torch.equal(prompted.prompts["0"], prompts)


def test_the_outlier_phase_parts_the_energies():
    X, y = task(n=200)
    gaps = []
    for outlier_epochs in (0, 30):
        net = head()
        reg = VirtualOutlierRegularizer(margin_in=-6.0, margin_out=-1.0, weight=1.0, std=0.5)
        fit_task(nn.Identity(), net, X, y, epochs=5, outlier_epochs=outlier_epochs, regularizer=reg, lr=0.05)
        with torch.no_grad():
            logits = [net(rows)[:, [1, 4]] for rows in (X, reg.sample(X, 2))]
        gaps.append(float(energy_margin_loss(*logits, -6.0, -1.0)))
    assert gaps[1] < 0.9 * gaps[0]


def test_the_rate_falls_as_the_papers_cosine():
    X, y = task()
    history = fit_task(nn.Identity(), head(), X, y, epochs=3, outlier_epochs=2, batch_size=60)
    expected = [1e-3 * np.cos(99 * np.pi * e / (200 * 4)) for e in range(5)]
    np.testing.assert_allclose([record["lr"] for record in history], expected, rtol=1e-12)


def test_bad_tasks():
    net = head()
    before = net.weight.detach().clone()
    X, y = task()
    for labels, message in (
        (y.float(), "y must be"),
        (y[:-1], "y must be"),
        (y + 5, r"y must be in \[0, 6\)"),
        (y - 2, r"y must be in \[0, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_task(nn.Identity(), net, X, labels)
    assert torch.equal(net.weight, before)
