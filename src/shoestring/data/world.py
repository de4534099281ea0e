"""A captioned world of colour images, drawn from real garments: 32 x 32 RGB, one or two objects, everything known.

The garments of the ``fashion`` bundle are tinted in one of eight colours, scaled, and placed on a light ground. A
caption from a small grammar names garment and colour, and at times size and position, in varying words. What is in
the picture is kept as numbers beside it, so that a judge need not guess. A fifth of the (garment, colour) pairs can
be withheld from training, to see whether a model composes what it never saw together.

>>> scenes = draw(1000, seed=0)
>>> scenes.images.shape, str(scenes.captions[1])
((1000, 32, 32, 3), 'a photo of a yellow slipper at the top')
>>> GARMENTS[scenes.garment[1, 0]], COLOURS[scenes.colour[1, 0]], POSITIONS[scenes.position[1, 0]]
('sandal', 'yellow', 'top')

The same garments without colour or caption, with their class as the label, are `shoestring.data.load("fashion")`.
The ``emoji`` bundle is the naturally captioned set beside it: `emoji`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoestring import data

if TYPE_CHECKING:
    import datasets

__all__ = [
    "COARSE",
    "COLOURS",
    "GARMENTS",
    "POSITIONS",
    "SIZES",
    "Scenes",
    "caption",
    "draw",
    "emoji",
    "stream",
    "to_dataset",
    "withheld",
]

GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
COARSE = ("top", "trousers", "top", "dress", "top", "shoe", "top", "shoe", "bag", "shoe")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
POSITIONS = ("left", "right", "top", "bottom", "centre")

SIDE = 32
BLOCK = 1000  # scenes that are drawn at once, from a generator of their own
NONE = -1  # the second object of a scene with one
_SPLITS = ("train", "test")
_GROUND = 0.93
_RGB = np.array(
    [
        [0.85, 0.10, 0.12],
        [0.97, 0.52, 0.08],
        [0.95, 0.88, 0.15],
        [0.13, 0.62, 0.20],
        [0.10, 0.78, 0.82],
        [0.12, 0.25, 0.85],
        [0.50, 0.15, 0.62],
        [0.98, 0.55, 0.75],
    ],
    np.float32,
)
_CENTRES = {"left": (16, 8), "right": (16, 24), "top": (8, 16), "bottom": (24, 16), "centre": (16, 16)}  # (row, column)

_GARMENT_WORDS = (
    ("t-shirt", "tee"),
    ("trousers", "pants"),
    ("pullover", "sweater"),
    ("dress", "gown"),
    ("coat", "jacket"),
    ("sandal", "slipper"),
    ("shirt", "blouse"),
    ("sneaker", "trainer"),
    ("bag", "handbag"),
    ("ankle boot", "boot"),
)
_COLOUR_WORDS = (
    ("red", "crimson"),
    ("orange", "amber"),
    ("yellow", "golden"),
    ("green", "emerald"),
    ("cyan", "turquoise"),
    ("blue", "azure"),
    ("purple", "violet"),
    ("pink", "rose"),
)
_SIZE_WORDS = (("small", "little"), ("large", "big"))
_POSITION_WORDS = (
    ("on the left", "at the left"),
    ("on the right", "at the right"),
    ("at the top", "on top"),
    ("at the bottom", "below"),
    ("in the middle", "in the centre"),
)
_TEMPLATES = ("{}", "{}", "a photo of {}", "a picture of {}", "an image of {}", "this shows {}")
_PAIRS = {
    ("left", "right"): ("{a} on the left and {b} on the right", "{a} to the left of {b}", "{b} to the right of {a}"),
    ("top", "bottom"): ("{a} at the top and {b} at the bottom", "{a} above {b}", "{b} below {a}"),
}


@dataclass(frozen=True)
class Scenes:
    """N pictures and all that is known of them. ``scenes[10:20]`` and ``scenes[mask]`` are `Scenes` too.

    Attributes
    ----------
    images : (N, 32, 32, 3) uint8
    captions : (N,) str
    garment, colour, size, position : (N, 2) int8
        Numbers in `GARMENTS`, `COLOURS`, `SIZES`, `POSITIONS` of the first and second object; -1: there is no second.
    where : (N, 32, 32) uint8
        0 ground, 1 first object, 2 second object.
    source : (N, 2) int32
        Rows of the ``fashion`` split that the garments are from, or -1.
    """

    images: NDArray[np.uint8]
    captions: NDArray[np.str_]
    garment: NDArray[np.int8]
    colour: NDArray[np.int8]
    size: NDArray[np.int8]
    position: NDArray[np.int8]
    where: NDArray[np.uint8]
    source: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> Scenes:
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))


def withheld(garment: NDArray[np.integer[Any]], colour: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which (garment, colour) pairs are kept from training: 16 of 80, one or two of every garment, two of every colour.

    Examples
    --------
    >>> withheld(*np.indices((10, 8))).sum()
    np.int64(16)
    """
    return (garment + 3 * colour) % 5 == 0


def draw(n: int, *, split: str = "train", seed: int = 0, two: float = 0.25, pairs: str = "seen") -> Scenes:
    """The first n scenes of a `stream` with the same arguments.

    Examples
    --------
    >>> bool((draw(10).images == draw(2000).images[:10]).all())
    True
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a whole number >= 1, got {n!r}")
    blocks, left = [], int(n)
    for block in stream(split=split, seed=seed, two=two, pairs=pairs):
        blocks.append(block[:left])
        left -= BLOCK
        if left <= 0:
            break
    return Scenes(*(np.concatenate([getattr(b, f.name) for b in blocks]) for f in fields(Scenes)))


def stream(*, split: str = "train", seed: int = 0, two: float = 0.25, pairs: str = "seen") -> Iterator[Scenes]:
    """Scenes without end, a block of 1000 at a time, in the memory of one block.

    Parameters
    ----------
    split : {"train", "test"}
        Whose garments: no garment of the test split is ever in a training scene.
    seed : int, default=0
        Equal arguments give equal scenes, on every machine.
    two : float, default=0.25
        Share of scenes with two objects.
    pairs : {"seen", "withheld", "all"}
        Which (garment, colour) pairs occur; see `withheld`.

    Yields
    ------
    Scenes

    Raises
    ------
    ValueError
        An unknown split or choice of pairs, a share outside [0, 1], a negative seed.

    Notes
    -----
    A pixel of an object is ``m c (0.35 + 0.65 v) + (1 - m) ground`` with the garment's grey value v, its filled
    outline m, both resized to 13 to 15 (small) or 25 to 28 pixels (large), and the colour c, jittered by 0.03. Large
    objects stand in the middle, small ones in one of five places; of two objects both are small.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be train or test, got {split!r}")
    if pairs not in ("seen", "withheld", "all"):
        raise ValueError(f"pairs must be seen, withheld or all, got {pairs!r}")
    if not 0 <= two <= 1:
        raise ValueError(f"two must be a share in [0, 1], got {two!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")

    def blocks() -> Iterator[Scenes]:
        block = 0
        while True:
            yield _block(split, np.random.default_rng([int(seed), _SPLITS.index(split), block]), two, pairs)
            block += 1

    return blocks()


def _block(split: str, rng: np.random.Generator, two: float, pairs: str) -> Scenes:
    grey, outline, _ = _garments(split)
    objects = np.where(rng.random(BLOCK) < two, 2, 1)
    both = np.arange(2) < objects[:, None]  # (N, 2): is there such an object?

    garment, colour = np.divmod(_allowed_pairs(pairs)[rng.integers(len(_allowed_pairs(pairs)), size=(BLOCK, 2))], 8)
    source = np.array([rng.choice(rows) for rows in (_rows_of(split)[g] for g in garment.flat)]).reshape(BLOCK, 2)
    size = np.where(objects == 2, 0, rng.integers(2, size=BLOCK))[:, None].repeat(2, 1)
    place = np.where(size[:, 0] == 1, 4, rng.integers(5, size=BLOCK))
    beside = rng.integers(2, size=BLOCK)  # two objects: left and right, or top and bottom
    position = np.where(objects[:, None] == 2, np.stack([2 * beside, 2 * beside + 1], 1), place[:, None])

    pixels = np.where(size == 1, rng.integers(25, 29, (BLOCK, 2)), rng.integers(13, 16, (BLOCK, 2)))
    jitter = rng.integers(-1, 2, (BLOCK, 2, 2))
    rgb = np.clip(_RGB[colour] + rng.normal(0, 0.03, (BLOCK, 2, 3)), 0, 1).astype(np.float32)

    canvas = np.full((BLOCK, SIDE, SIDE, 3), _GROUND, np.float32)
    where = np.zeros((BLOCK, SIDE, SIDE), np.uint8)
    centres = np.array([_CENTRES[p] for p in POSITIONS])[position] + jitter
    corner = np.clip(centres - pixels[..., None] // 2, 0, SIDE - pixels[..., None])  # (N, 2, 2): row, column
    for number in (0, 1):
        for side in np.unique(pixels[:, number]):
            rows = np.flatnonzero(both[:, number] & (pixels[:, number] == side))
            v, m = _resized(grey[source[rows, number]], side), _resized(outline[source[rows, number]], side)
            at = np.arange(side)
            i = (
                rows[:, None, None],
                corner[rows, number, 0, None, None] + at[:, None],
                corner[rows, number, 1, None, None] + at,
            )
            tint = rgb[rows, number][:, None, None] * (0.35 + 0.65 * v[..., None])
            canvas[i] += m[..., None] * (tint - canvas[i])
            where[i] = np.where(m > 0.5, number + 1, where[i])

    def present(part: NDArray[Any], dtype: Any = np.int8) -> NDArray[Any]:
        return np.where(both, part, NONE).astype(dtype)

    things = [present(part) for part in (garment, colour, size, position)]
    captions = np.array([caption(*(part[k] for part in things), rng=rng) for k in range(BLOCK)])
    images = np.round(canvas * 255).astype(np.uint8)
    garment, colour, size, position = things
    return Scenes(images, captions, garment, colour, size, position, where, present(source, np.int32))


def caption(
    garment: Any,
    colour: Any,
    size: Any,
    position: Any,
    *,
    rng: np.random.Generator,
    mention: float = 0.5,
    coarse: float = 0.0,
    synonyms: bool = True,
) -> str:
    """A sentence for one scene.

    Parameters
    ----------
    garment, colour, size, position : (2,) int
        As in `Scenes`: the second is -1 if there is one object. A colour, size or position of -1 is not spoken of.
    rng : numpy.random.Generator
        Draws the words.
    mention : float, default=0.5
        Probability with which the size is named, and for one object the position.
    coarse : float, default=0
        Probability with which a garment is called by its coarse name (`COARSE`: "top", "shoe", ...).
    synonyms : bool, default=True
        False: always the words of `GARMENTS`, `COLOURS`, ... and no "a photo of".

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> caption((9, -1), (0, -1), (1, -1), (4, -1), rng=rng, mention=0, synonyms=False)
    'a red ankle boot'
    >>> caption((9, 8), (0, 5), (0, 0), (0, 1), rng=rng, mention=1, synonyms=False)
    'a small red ankle boot on the left and a small blue bag on the right'
    """

    def word(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))] if synonyms else words[0]

    def thing(k: int) -> str:
        noun = COARSE[garment[k]] if rng.random() < coarse else word(_GARMENT_WORDS[garment[k]])
        words = [word(_COLOUR_WORDS[colour[k]])] if colour[k] >= 0 else []
        if size[k] >= 0 and rng.random() < mention:
            words.insert(0, word(_SIZE_WORDS[size[k]]))
        phrase = " ".join([*words, noun])
        if noun in ("trousers", "pants"):
            return phrase
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"

    if garment[1] < 0:
        sentence = thing(0)
        if position[0] >= 0 and rng.random() < mention:
            sentence += " " + word(_POSITION_WORDS[position[0]])
    else:
        forms = _PAIRS[POSITIONS[position[0]], POSITIONS[position[1]]]
        sentence = word(forms).format(a=thing(0), b=thing(1))
    return word(_TEMPLATES).format(sentence)


def to_dataset(scenes: Scenes) -> datasets.Dataset:
    """Scenes as a `datasets.Dataset`: columns ``image`` (PIL), ``caption``, and the four attributes as lists of two.

    Examples
    --------
    >>> to_dataset(draw(2)).column_names
    ['image', 'caption', 'garment', 'colour', 'size', 'position']
    """
    import datasets
    from PIL import Image

    numbers = {name: getattr(scenes, name).tolist() for name in ("garment", "colour", "size", "position")}
    images = [Image.fromarray(image) for image in scenes.images]
    columns = datasets.Dataset.from_dict({"image": images, "caption": scenes.captions.tolist(), **numbers})
    return columns.cast_column("image", datasets.Image())


def emoji(style: str = "google", *, side: int = 64) -> dict[str, NDArray[Any]]:
    """The ``emoji`` bundle as arrays: pictures whose name is their caption, with a hierarchy and two drawing styles.

    Parameters
    ----------
    style : {"google", "twitter"}
        The same 1906 emoji in the same order: what differs is how they are drawn.
    side : int, default=64
        Pixels of a side.

    Returns
    -------
    dict
        ``images`` (N, side, side, 3) uint8, ``captions`` (N,) str, ``category`` and ``subcategory`` (N,) int64.

    Examples
    --------
    >>> pictures = emoji(side=32)
    >>> pictures["images"].shape, str(pictures["captions"][0])
    ((1906, 32, 32, 3), 'grinning face')
    """
    rows: Any = data.load("emoji", split=style)
    images = np.stack([np.asarray(image.convert("RGB").resize((side, side))) for image in rows["image"]])
    numbers = {name: np.asarray(rows[name]) for name in ("category", "subcategory")}
    return {"images": images, "captions": np.array(rows["name"]), **numbers}


@cache
def _garments(split: str) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Grey values and filled outlines, (n, 28, 28) in [0, 1], and classes (n,)."""
    from scipy import ndimage

    rows: Any = data.load("fashion", split=split)
    grey = np.stack([np.asarray(image) for image in rows["image"]]).astype(np.float32) / 255
    inside = np.zeros((3, 3, 3), bool)
    inside[1] = ndimage.generate_binary_structure(2, 1)  # holes are filled in each picture by itself
    padded = np.pad(grey > 0.08, ((0, 0), (1, 1), (1, 1)))
    outline = ndimage.binary_fill_holes(padded, inside)[:, 1:-1, 1:-1]
    return grey.astype(np.float32), outline.astype(np.float32), np.asarray(rows["label"])


@cache
def _rows_of(split: str) -> tuple[NDArray[np.int64], ...]:
    labels = _garments(split)[2]
    return tuple(np.flatnonzero(labels == c) for c in range(len(GARMENTS)))


@cache
def _allowed_pairs(pairs: str) -> NDArray[np.int64]:
    """8 garment + colour, of the pairs that may occur."""
    kept = withheld(*np.indices((len(GARMENTS), len(COLOURS))))
    return np.flatnonzero({"seen": ~kept, "withheld": kept, "all": np.ones_like(kept)}[pairs])


def _resized(images: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(n, 28, 28) -> (n, side, side), every pixel the mean of the area it covers: W X W', W (side, 28)."""
    edges = np.arange(side + 1) * (images.shape[1] / side)
    low, high = np.maximum(edges[:-1, None], np.arange(28)), np.minimum(edges[1:, None], np.arange(28) + 1)
    w = np.clip(high - low, 0, None).astype(np.float32) * np.float32(side / images.shape[1])
    return w @ images @ w.T
