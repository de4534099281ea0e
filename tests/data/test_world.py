"""The captioned world: determinism, separation of splits and pairs, pictures that show what the numbers say."""

import colorsys
import itertools

import numpy as np
import pytest

from shoestring import data
from shoestring.data import world


@pytest.fixture(scope="module")
def scenes():
    return world.draw(3000, seed=3, pairs="all")


def test_a_longer_draw_begins_with_the_shorter():
    long, short = world.draw(1500, seed=5), world.draw(700, seed=5)
    for name in ("images", "captions", "garment", "where", "source"):
        assert (getattr(long, name)[:700] == getattr(short, name)).all()


def test_seeds_and_splits_draw_differently():
    one, other, test = world.draw(50, seed=1), world.draw(50, seed=2), world.draw(50, seed=1, split="test")
    assert (one.images != other.images).any()
    assert (one.source != test.source).any()


def test_a_stream_is_what_draw_cuts():
    first, second = itertools.islice(world.stream(seed=4), 2)
    assert (np.concatenate([first.images, second.images]) == world.draw(2000, seed=4).images).all()


def test_sources_are_garments_of_their_class_and_split(scenes):
    labels = np.asarray(data.load("fashion", split="train")["label"])
    there = scenes.garment >= 0
    assert (labels[scenes.source[there]] == scenes.garment[there]).all()
    assert (scenes.source[~there] == -1).all()
    test = world.draw(1000, split="test")
    labels = np.asarray(data.load("fashion", split="test")["label"])
    assert (labels[test.source[test.garment >= 0]] == test.garment[test.garment >= 0]).all()


def test_pairs_are_withheld_from_training_and_complete_together():
    seen, kept = world.draw(4000), world.draw(1000, pairs="withheld")
    pairs = {}
    for name, part in (("seen", seen), ("withheld", kept)):
        there = part.garment >= 0
        pairs[name] = set(zip(part.garment[there].tolist(), part.colour[there].tolist(), strict=True))
    assert not pairs["seen"] & pairs["withheld"]
    assert len(pairs["seen"]) == 64
    assert len(pairs["withheld"]) == 16
    assert {g for g, _ in pairs["withheld"]} == set(range(10))
    assert {c for _, c in pairs["withheld"]} == set(range(8))


def test_share_of_two_objects(scenes):
    assert abs((scenes.garment[:, 1] >= 0).mean() - 0.25) < 0.03
    assert (world.draw(100, two=0).garment[:, 1] == -1).all()
    assert (world.draw(100, two=1).garment >= 0).all()


def test_the_ground_is_bare_and_objects_stand_where_they_should(scenes):
    ground = scenes.images[scenes.where == 0]
    assert np.median(ground) == round(0.93 * 255)
    rows, columns = np.indices((32, 32))
    for position, axis, side in (("left", columns, -1), ("right", columns, 1), ("top", rows, -1), ("bottom", rows, 1)):
        for k in (0, 1):
            chosen = scenes.where[scenes.position[:, k] == world.POSITIONS.index(position)] == k + 1
            middle = (chosen * axis).sum((1, 2)) / chosen.sum((1, 2))
            assert (side * (middle - 15.5) > 2).all(), position


def test_large_objects_are_larger(scenes):
    extent = (scenes.where == 1).any(1).sum(1).clip((scenes.where == 1).any(2).sum(1))  # the longer side
    assert extent[scenes.size[:, 0] == 1].min() > extent[scenes.size[:, 0] == 0].max()


def test_pixels_have_the_hue_of_their_colour(scenes):
    hues = []
    for k, expected in enumerate((0, 30, 56, 128, 183, 229, 283, 331)):
        chosen = scenes.images[(scenes.colour[:, 0] == k)][:20][scenes.where[scenes.colour[:, 0] == k][:20] == 1]
        hue = 360 * colorsys.rgb_to_hsv(*np.median(chosen / 255, 0))[0]
        hues.append(hue)
        assert abs((hue - expected + 180) % 360 - 180) < 14, world.COLOURS[k]
    assert len({round(hue) for hue in hues}) == 8


def test_captions_say_what_is_there(scenes):
    words = {w: i for i, synonyms in enumerate(world._COLOUR_WORDS) for w in synonyms}
    for k in range(len(scenes)):
        text = scenes.captions[k]
        said = [words[w] for w in text.split() if w in words]
        assert sorted(said) == sorted(c for c in scenes.colour[k] if c >= 0), text
        for g in scenes.garment[k][scenes.garment[k] >= 0]:
            assert any(noun in text for noun in world._GARMENT_WORDS[g]), text
        if scenes.garment[k, 1] < 0:
            for name, synonyms in zip(world.POSITIONS, world._POSITION_WORDS, strict=True):
                if any(text.endswith(" " + phrase) for phrase in synonyms):
                    assert world.POSITIONS[scenes.position[k, 0]] == name


def test_captions_of_two_objects_name_them_in_place():
    rng = np.random.default_rng(0)
    seen = {world.caption((9, 8), (0, 5), (0, 0), (0, 1), rng=rng, mention=0, synonyms=False): None}
    assert list(seen) == ["a red ankle boot on the left and a blue bag on the right"]
    texts = {world.caption((9, 8), (0, 5), (0, 0), (2, 3), rng=rng, mention=0) for _ in range(300)}
    for text in texts:
        boot, bag = text.find("boot"), text.find("bag")
        assert (boot < bag) == ("above" in text or "at the top and" in text), text


def test_mention_and_coarse_are_probabilities():
    rng = np.random.default_rng(0)
    texts = [world.caption((9, -1), (0, -1), (1, -1), (4, -1), rng=rng, mention=0.3, coarse=0.7) for _ in range(3000)]
    assert abs(np.mean([" shoe" in t for t in texts]) - 0.7) < 0.03
    assert abs(np.mean(["large" in t or "big" in t for t in texts]) - 0.3) < 0.03
    assert abs(np.mean(["middle" in t or "centre" in t for t in texts]) - 0.3) < 0.03


def test_a_colour_of_minus_one_is_not_named():
    rng = np.random.default_rng(0)
    assert world.caption((1, -1), (-1, -1), (-1, -1), (-1, -1), rng=rng, mention=1, synonyms=False) == "trousers"


def test_resizing_keeps_the_mean_and_is_the_identity_at_28():
    images = np.random.default_rng(0).random((4, 28, 28)).astype(np.float32)
    assert np.allclose(world._resized(images, 28), images, atol=1e-6)
    for side in (13, 14, 25):
        assert np.allclose(world._resized(images, side).mean((1, 2)), images.mean((1, 2)), atol=1e-5)
    assert np.allclose(world._resized(images, 14), images.reshape(4, 14, 2, 14, 2).mean((2, 4)), atol=1e-6)


def test_as_a_data_set():
    scenes = world.draw(5)
    rows = world.to_dataset(scenes)
    assert rows["caption"] == scenes.captions.tolist()
    assert (np.asarray(rows[2]["image"]) == scenes.images[2]).all()
    assert rows[2]["garment"] == scenes.garment[2].tolist()


def test_emoji_in_two_styles_are_in_the_same_order():
    google, twitter = world.emoji("google", side=16), world.emoji("twitter", side=16)
    assert (google["captions"] == twitter["captions"]).all()
    assert (google["category"] == twitter["category"]).all()
    assert (google["images"] != twitter["images"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split must be train or test, got 'val'"),
        ({"pairs": "none"}, "pairs must be seen, withheld or all"),
        ({"two": 1.5}, r"two must be a share in \[0, 1\], got 1.5"),
        ({"two": float("nan")}, "two must be a share"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"seed": 1.0}, "seed must be a whole number"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        world.draw(3, **options)


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_bad_n(n):
    with pytest.raises(ValueError, match="n must be a whole number >= 1"):
        world.draw(n)
