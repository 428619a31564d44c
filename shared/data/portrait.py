"""How a procedural face is drawn and photographed; `shared.data.procedural` makes data of them.

No download: a face is a drawing with about 100 numbers drawn once per identity, photographed under
other numbers drawn once per instance. Two knobs decide how hard low resolution is: ``coarse``
spreads what survives at 16x16 (head, skin, hair, beard, glasses), ``fine`` what only the full
image shows (irises, brows, lips, moles, freckles, wrinkles, scars).

    identity -> numbers -> RGBA canvas 1.25 times the output, surface normals, displacement bases
    instance -> clothes, light, expression, pose, background, colour temperature, noise -> uint8

Randomness is numpy's counter-based Philox with key (seed, identity) and counter (instance), so any
image can be drawn alone. Its bits do not depend on batch, order or threads by construction:
identities are drawn one at a time, and instances use only operations that are exactly rounded
element by element (add, multiply, clamp) and ``grid_sample``, which works on one image at a time;
there is no matrix product and no reduction over floats.

Coordinates: the image is [-1, 1] x [-1, 1], x to the right, y down; the canvas reaches to 1.25.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

VERSION = 1  # raised whenever a pixel changes

HATS = 0.28  # share of the pictures in which the head is covered
CHUNK = 16  # instances of one identity drawn together: the working set stays in the L2 cache

HEAD_Y = -0.06  # height of the middle of the head

Array = np.ndarray
Window = tuple[slice, slice]
FULL = (slice(None), slice(None))


@dataclass(frozen=True)
class Family:
    """Parameters of a generator; all of them are in the cache key."""

    SIZES: ClassVar = (16, 112)

    size: int = 64  # px
    seed: int = 0  # data seed: another seed is another population
    coarse: float = 0.6  # spread of what survives at 16x16 (faces: head shape, skin, hair, ...)
    fine: float = 1.4  # spread of what only HR shows (iris and brow texture, moles, ...)

    def __post_init__(self) -> None:
        kind, (least, most) = type(self).__name__, self.SIZES
        if not least <= self.size <= most:
            raise ValueError(f"{kind}.size is {self.size}; give {least} to {most} pixels")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"{kind}.seed is {self.seed}; give 0 to 2**63 - 1")
        for name in ("coarse", "fine"):
            if not 0 <= getattr(self, name) <= 3:
                raise ValueError(f"{kind}.{name} is {getattr(self, name)}; give 0 to 3")

    def draw(self, shifted: bool, task: tuple[int, Array]) -> Array:
        """Instances [N] of one identity, uint8 [N, 3, S, S]; task = (identity, instances)."""
        raise NotImplementedError


class Faces(Family):
    """Procedural faces."""

    def draw(self, shifted: bool, task: tuple[int, Array]) -> Array:
        identity, instances = task
        person = _person(self, identity)
        parts = [instances[i : i + CHUNK] for i in range(0, len(instances), CHUNK)]
        return np.concatenate([_draw(self, person, identity, part, shifted) for part in parts])


# ---------------------------------------------------------------------------------- the numbers

# name: (mean, spread at knob 1); lengths in units of half the image
_COARSE = {
    "width": (0.475, 0.04), "height": (0.62, 0.045), "jaw": (0.20, 0.10), "square": (0.25, 0.28),
    "ear": (0.11, 0.02), "neck": (0.25, 0.035), "eye_y": (-0.03, 0.025), "eye_x": (0.215, 0.025),
    "eye_w": (0.140, 0.018), "nose_y": (0.215, 0.03), "nose_w": (0.085, 0.02),
    "mouth_y": (0.370, 0.025), "mouth_w": (0.165, 0.03), "brow_gap": (0.155, 0.02),
    "undertone": (0.0, 0.035),
}  # fmt: skip
_FINE = {
    "eye_h": (0.070, 0.012), "slant": (0.04, 0.13), "lid": (0.045, 0.012), "iris": (0.076, 0.006),
    "pupil": (0.40, 0.08), "brow_tilt": (-0.01, 0.16), "brow_arch": (0.035, 0.030),
    "brow_thick": (0.032, 0.011), "brow_length": (0.155, 0.020), "nostril": (0.022, 0.004),
    "bridge": (0.35, 0.18), "lip_up": (0.035, 0.011), "lip_low": (0.047, 0.013),
    "bow": (0.012, 0.010), "corner": (0.0, 0.016), "blush": (0.16, 0.10),
}  # fmt: skip
_COARSE_U = ("skin", "hair", "length", "volume", "fringe", "hairline", "part", "curl", "masculine",
             "age", "beard", "glasses", "frame")  # fmt: skip
_FINE_U = ("iris_hue", "iris_ring", "iris_light", "iris_turn", "lip_hue", "lip_tone", "lashes",
           "brow_texture", "brow_tone", "strands", "moustache", "freckles", "wrinkles", "bags",
           "scar", "scar_x", "scar_y", "scar_turn", "lens", "rim")  # fmt: skip
_MOLES, _FRECKLES = 10, 44

_SKIN = [(0.99, 0.87, 0.79), (0.95, 0.78, 0.67), (0.88, 0.67, 0.53), (0.76, 0.54, 0.40),
         (0.58, 0.39, 0.27), (0.40, 0.26, 0.18)]  # fmt: skip
_HAIR = [(0.07, 0.06, 0.07), (0.16, 0.10, 0.07), (0.31, 0.19, 0.11), (0.47, 0.30, 0.16),
         (0.58, 0.24, 0.09), (0.74, 0.52, 0.25), (0.90, 0.76, 0.47)]  # fmt: skip
_IRIS = [(0.20, 0.11, 0.06), (0.42, 0.24, 0.10), (0.50, 0.42, 0.15), (0.22, 0.48, 0.25),
         (0.20, 0.48, 0.66), (0.36, 0.62, 0.90), (0.52, 0.58, 0.64)]  # fmt: skip
_LIPS = [(0.72, 0.36, 0.34), (0.80, 0.30, 0.34), (0.62, 0.22, 0.26), (0.84, 0.46, 0.42)]
_FRAMES = [(0.06, 0.06, 0.07), (0.35, 0.17, 0.08), (0.55, 0.08, 0.10), (0.10, 0.20, 0.45),
           (0.70, 0.62, 0.40)]  # fmt: skip


def generator(seed: int, identity: int, stream: int, instance: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=[seed, identity], counter=[0, 0, stream, instance])
    )


def _numbers(faces: Faces, identity: int) -> SimpleNamespace:
    """The identity's numbers. ``_u`` names are about uniform on [0, 1] at the default knobs."""
    rng = generator(faces.seed, identity, 0, 0)
    p: dict[str, Any] = {}
    for table, knob in ((_COARSE, faces.coarse), (_FINE, faces.fine)):
        for (name, (mean, spread)), g in zip(
            table.items(), rng.standard_normal(len(table)), strict=True
        ):
            p[name] = mean + spread * knob * float(np.clip(g, -2.2, 2.2))
    for names, knob in ((_COARSE_U, 1.7 * faces.coarse), (_FINE_U, 0.72 * faces.fine)):
        for name, g in zip(names, rng.standard_normal(len(names)), strict=True):
            p[name] = 0.5 + 0.5 * math.erf(knob * g / math.sqrt(2))
    p["mole"] = 0.72 * faces.fine * rng.standard_normal(_MOLES)
    p["points"] = rng.random((_MOLES + _FRECKLES, 3))
    return SimpleNamespace(**p)


def rgb(red: float, green: float, blue: float) -> Array:
    return np.array([red, green, blue], np.float32)


def along(stops: list[tuple[float, float, float]], t: float) -> Array:
    """The colour [3] at t in [0, 1] of a palette."""
    place = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    a, b = rgb(*stops[i]), rgb(*stops[i + 1])
    return a + np.float32(place - i) * (b - a)


def ramp(t: float, low: float, high: float) -> float:
    """0 below low, 1 above high, straight between."""
    return min(max((t - low) / (high - low), 0.0), 1.0)


# ------------------------------------------------------------------------- what every face shares


def _smooth(shape: tuple[int, ...], cells: tuple[int, int], seed: int) -> Array:
    """Smooth noise of unit range: a coarse lattice of numbers, bicubically enlarged."""
    lattice = np.random.Generator(np.random.Philox(key=[seed, VERSION])).random(
        (shape[0], 1, *cells)
    )
    fine = F.interpolate(torch.from_numpy(lattice), size=shape[1:], mode="bicubic")
    return fine[:, 0].clamp_(0, 1).float().numpy()


@functools.lru_cache(maxsize=4)
def stage(size: int) -> SimpleNamespace:
    """All that depends on the size alone: coordinates, textures, clothes, backgrounds, noise."""
    s = SimpleNamespace(size=size, canvas=2 * round(size * 0.625), px=2 / size)
    s.reach = s.canvas / size
    a = ((np.arange(s.canvas, dtype=np.float32) + 0.5) * 2 / size - s.reach).astype(np.float32)
    s.x, s.y = (np.ascontiguousarray(m) for m in np.meshgrid(a, a))
    half = ((np.arange(s.canvas // 2, dtype=np.float32) + 0.5) * 4 / size - s.reach).astype(
        np.float32
    )
    s.hx, s.hy = (np.ascontiguousarray(m) for m in np.meshgrid(half, half))
    o = torch.arange(size, dtype=torch.float32).add(0.5).mul(2 / size).sub(1)
    s.ox, s.oy = o.expand(size, size).contiguous(), o[:, None].expand(size, size).contiguous()
    s.strands = _smooth((24, s.canvas, s.canvas), (5, 40), 11)
    s.curls = _smooth((24, s.canvas, s.canvas), (26, 26), 12)
    s.fields = torch.from_numpy(_smooth((96, size, size), (4, 4), 13))
    s.noise = torch.from_numpy(
        np.random.Generator(np.random.Philox(key=[14, VERSION])).standard_normal(
            (3, 3 * size, 3 * size), dtype=np.float32)
    )  # fmt: skip
    s.clothes = [_clothes(s, style) for style in range(6)]
    return s


def _cover(s: SimpleNamespace, d: Array) -> Array:
    """Share of a pixel inside a shape, from its signed distance (negative inside)."""
    return np.clip(0.5 - d / s.px, 0, 1)


def _clothes(s: SimpleNamespace, style: int) -> tuple[Array, Array]:
    """Where clothes are [A, A], and how light their cloth is [A, A]. Never part of identity."""
    x, y = np.abs(s.x), s.y
    shoulders = 0.74 + 0.10 * x**2 + 0.30 * np.clip(x - 0.30, 0, 0.6) ** 2 - y
    shoulders += 0.9 * np.clip(0.30 - x, 0, 0.3) * -0.35
    light = 0.92 + 0.12 * s.strands[style] - 0.10 * np.exp(-(((x - 0.62) / 0.10) ** 2))
    if style in (0, 4):  # crew neck; striped crew neck
        neck = 1 - np.sqrt((x / 0.31) ** 2 + ((y - 0.66) / 0.17) ** 2)
        light = light * (1 - 0.25 * np.exp(-(((neck + 0.16) / 0.06) ** 2)))
        if style == 4:
            light = light * (1 - 0.45 * _cover(s, 0.06 - np.abs((y * 5) % 1 - 0.5) / 5))
        neck = neck * 0.25
    elif style == 1:  # V-neck
        neck = (0.98 - y) * 0.62 - x
    elif style == 2:  # turtleneck
        shoulders = np.minimum(shoulders, np.maximum(x - 0.29 - 0.1 * (y - 0.6), 0.60 - y))
        neck = np.full_like(x, -1)
        light = light * (1 - 0.2 * np.exp(-(((y - 0.74) / 0.03) ** 2)))
    elif style == 3:  # shirt with a collar
        neck = (0.92 - y) * 0.55 - x
        collar = _cover(s, np.abs(x - 0.14 - (0.86 - y) * 0.55) - 0.10) * (y < 0.90)
        light = light * (1 + 0.22 * collar) * (1 - 0.4 * _cover(s, x - 0.012) * (y > 0.9))
    else:  # round, wide neck
        neck = (1 - np.sqrt((x / 0.46) ** 2 + ((y - 0.66) / 0.24) ** 2)) * 0.3
    return _cover(s, np.maximum(shoulders, neck)), np.clip(light, 0.2, 1.15).astype(np.float32)


# -------------------------------------------------------------------------------- one identity


@dataclass
class _Person:
    """What the instances of one identity are made from; A = canvas, h = A / 2."""

    looks: torch.Tensor  # [styles, 4, A, A] premultiplied RGB and alpha, without cloth
    cloth: torch.Tensor  # [styles, A, A] visible cloth, to be coloured
    normals: torch.Tensor  # [3, A, A] surface normals, z towards the camera
    hats: (
        torch.Tensor
    )  # [3, 2, A, A] where a beanie, a cap, a headscarf is; the same times its light
    gloss: torch.Tensor  # [A, A] strength of the highlight
    bases: torch.Tensor  # [8, h, h] displacements


class _Painter:
    """The numbers, the stage and the front layer [3, A, A] that the parts of a face paint on."""

    def __init__(self, s: SimpleNamespace, p: SimpleNamespace) -> None:
        self.s, self.p = s, p
        self.masculine = ramp(p.masculine, 0.35, 0.65)
        self.skin = along(_SKIN, p.skin) + rgb(0.2, -0.2, -0.8) * np.float32(p.undertone)
        hair = along(_HAIR, p.hair * (1 - 0.55 * ramp(p.skin, 0.45, 0.75)))
        grey = np.float32(ramp(p.age, 0.74, 0.88))
        self.hair = hair + grey * (rgb(0.74, 0.74, 0.75) - hair)
        self.front = np.zeros((3, s.canvas, s.canvas), np.float32)

    def at(self, cx: float, cy: float, rx: float, ry: float) -> tuple[Window, Array, Array]:
        """The window of the canvas round a point, and its coordinates from that point."""
        s = self.s
        rows, columns = (
            slice(max(int((c - r + s.reach) / s.px), 0), max(int((c + r + s.reach) / s.px) + 2, 1))
            for c, r in ((cy, ry), (cx, rx))
        )
        return (
            (rows, columns),
            s.x[rows, columns] - np.float32(cx),
            s.y[rows, columns] - np.float32(cy),
        )

    def fill(self, mask: Array, colour: Array, where: Window = FULL) -> None:
        """Cover a share of each pixel with a colour [3] or [3, h, w]."""
        view = self.front[(slice(None), *where)]
        view += mask * (colour.reshape(3, *(colour.shape[1:] or (1, 1))) - view)

    def shade(self, amount: Array, where: Window = FULL) -> None:
        """Darken; a negative amount lightens."""
        self.front[(slice(None), *where)] *= 1 - amount

    def cover(self, d: Array) -> Array:
        return _cover(self.s, d)


def _bump(u: Array, v: Array, su: float, sv: float) -> Array:
    return np.exp(-((u * (1 / su)) ** 2) - (v * (1 / sv)) ** 2)


def _line(u: Array, su: float) -> Array:
    return np.exp(-((u * (1 / su)) ** 2))


def _person(faces: Faces, identity: int) -> _Person:
    """Draw an identity, back to front."""
    s, p = stage(faces.size), _numbers(faces, identity)
    c = _Painter(s, p)
    x, y, ax, cover, masculine = s.x, s.y, np.abs(s.x), c.cover, c.masculine

    # head: a squircle u^2 + t^2 - k u^2 t^2 = 1 whose width shrinks towards the jaw
    wide, high = p.width, p.height
    t = (y - HEAD_Y) * (1 / high)
    low = np.clip(t, 0, 1.3)
    taper = 1 - (0.42 - p.jaw - 0.06 * masculine) * low * low * (1.5 - 0.5 * low)
    u2, t2 = (x / (wide * taper)) ** 2, t * t
    square = np.where(t > 0, np.float32(min(max(p.square, 0.0), 0.75)), np.float32(0.1))
    r2 = u2 + t2 - square * np.minimum(u2, 1) * np.minimum(t2, 1)
    radius = np.sqrt(np.maximum(r2, 1e-6))
    head = cover((radius - 1) * (0.9 * wide))

    # hair: its outline is a skull enlarged by the volume, then straight down to its length
    length = 0.62 * p.length + 0.38 * (1 - masculine)
    bald = 1 - ramp(length, 0.05, 0.09)
    thin = ramp(p.age, 0.6, 0.9) * masculine * ramp(p.hairline, 0.45, 0.8)
    volume = 0.02 + (0.05 + 0.15 * p.volume) * ramp(length, 0.10, 0.40)
    curl = ramp(p.curl, 0.55, 0.95)
    ripple = (0.022 * curl) * np.sin(17 * np.arctan2(x, HEAD_Y - y) + 40 * p.part)
    swell = 1 + 0.10 * p.volume * np.clip(y - HEAD_Y, 0, 1)
    crown = np.minimum(t, 0) * (high / (high + volume))
    outer = np.sqrt((x / ((wide + 0.62 * volume + 0.03) * swell)) ** 2 + crown**2) + ripple
    outline = cover((outer - 1) * wide) * (1 - bald)
    pattern = int(p.strands * 23.99)
    strands = (1 - curl) * s.strands[pattern] + curl * s.curls[pattern]
    locks = c.hair[:, None, None] * (0.76 + 0.44 * strands) + 0.04 * (strands - 0.5)
    side = -0.20 + 0.20 * ramp(length, 0.10, 0.40) + 1.15 * ramp(length, 0.48, 0.95)
    ends = cover(y - side - 0.07 * (strands - 0.5))

    # back layer: hair behind the neck, neck
    back_hair = outline * ends
    neck = cover(np.maximum(ax - p.neck - 0.35 * np.clip(y - 0.68, 0, 1), 0.2 - y))
    under_chin = _bump(x, y - (HEAD_Y + high), 0.5, 0.14)
    tone = np.clip(0.86 - 0.34 * under_chin - 0.5 * (ax * (0.5 / p.neck)) ** 4, 0.4, 1)
    back = back_hair * locks * np.float32(0.62)
    back += neck * (c.skin[:, None, None] * tone - back)
    back_alpha = np.maximum(back_hair, neck)

    # front layer: ears, head, face, then the hair in front
    ear_y = p.eye_y + 0.10
    lobe = np.sqrt(((ax - wide * 0.97) / (p.ear * 0.72)) ** 2 + ((y - ear_y) / (p.ear * 1.25)) ** 2)
    ears = cover((lobe - 1) * (p.ear * 0.8))
    c.fill(ears, c.skin * rgb(0.92, 0.84, 0.82))
    c.shade(0.4 * _bump(ax - wide * 1.03, y - ear_y, p.ear * 0.28, p.ear * 0.7) * ears)
    round_off = 0.20 * np.clip(r2, 0, 1) ** 3 + 0.10 * _bump(x, y - (HEAD_Y + high), 0.4, 0.12)
    c.fill(head, c.skin[:, None, None] * (1.03 - round_off))
    cheeks = _bump(ax - 0.27, y - 0.18, 0.13, 0.11)
    _relief(c, cheeks)
    _marks(c, min(faces.fine / 1.4, 1))
    _beard(c, head, strands, locks)
    _mouth(c)
    for sign in (-1, 1):
        _eye(c, sign, min(faces.fine / 1.4, 1))

    height = HEAD_Y - high * (0.58 + 0.18 * (p.hairline - 0.5) + 0.34 * thin)
    parting = (p.part - 0.5) * 1.2 * wide
    fringe = ramp(p.fringe, 0.55, 0.9) * ramp(length, 0.15, 0.35) * (1 - thin)
    straight = height + fringe * (p.eye_y - p.brow_gap + 0.02 - height)
    fall = (0.08 + 0.25 * (length > 0.4)) * np.minimum(((x - parting) / wide) ** 2, 1.2)
    line = fringe * straight + (1 - fringe) * (height + fall) + 0.05 * (strands - 0.5)
    inside = (0.93 - 0.20 * ramp(length, 0.45, 0.9) * (0.4 + 0.6 * p.volume)) * wide
    sides = cover(inside + 0.06 * np.clip(y - 0.1, 0, 1) - ax) * ends
    cap = np.maximum(cover(y - line), sides) * outline * (0.55 + 0.45 * ramp(length, 0.10, 0.16))
    cap = cap * (1 - thin * 0.9 * cover(y - (HEAD_Y - 0.45 * high)))
    c.fill(cap, locks * (0.9 + 0.35 * _bump(x, y - (HEAD_Y - 0.75 * high), 0.75, 0.16)))
    c.shade((0.30 * (1 - bald)) * head * (1 - cap) * _line(y - line - 0.02, 0.035))
    if p.glasses > 0.74:
        _glasses(c)
    front_alpha = np.maximum(np.maximum(ears, head), cap)

    styles = []
    for mask, light in s.clothes:
        show = (1 - front_alpha) * mask
        colour = c.front * front_alpha + (1 - front_alpha - show) * back * back_alpha
        alpha = front_alpha + (1 - front_alpha) * np.maximum(mask, back_alpha)
        styles.append((np.concatenate([colour, alpha[None]]), show * light))
    return _Person(
        looks=torch.from_numpy(np.stack([a for a, _ in styles]).astype(np.float32)),
        cloth=torch.from_numpy(np.stack([b for _, b in styles]).astype(np.float32)),
        normals=torch.from_numpy(_normals(c, cheeks, 1 - cap, radius)),
        hats=torch.from_numpy(_hats(s, p, volume)),
        gloss=torch.from_numpy((0.10 + 0.16 * cap).astype(np.float32)),
        bases=torch.from_numpy(_bases(s, p)),
    )


def _relief(c: _Painter, cheeks: Array) -> None:
    """Blush, eye sockets, chin and nose."""
    s, p = c.s, c.p
    x, y, ax = s.x, s.y, np.abs(s.x)
    red = rgb(0.10, -0.9, -0.7) * np.float32(max(p.blush, 0) * (1 - 0.5 * p.skin))
    c.front *= 1 + cheeks * (red + np.float32(0.05))[:, None, None]
    c.shade(0.20 * _bump(ax - p.eye_x, y - p.eye_y + 0.02, 0.16, 0.10))
    c.shade(0.16 * _bump(x, y - (p.mouth_y + 0.105), 0.11, 0.03))
    where, u, v = c.at(0, p.nose_y, 0.30, 0.40)
    au, w = np.abs(u), p.nose_w
    ridge = np.clip((v + 0.30) * 3.3, 0, 1) * c.cover(v - 0.02)
    c.shade((0.30 * p.bridge + 0.06) * _line(au - 0.55 * w, 0.035) * ridge, where)
    c.shade(-0.16 * _line(u, 0.030) * ridge - 0.12 * _bump(u, v + 0.03, 0.05, 0.05), where)
    c.shade(
        0.30 * _bump(au - w, v, 0.028, 0.045) + 0.32 * _bump(u, v - 0.055, w * 0.95, 0.022), where
    )
    holes = np.sqrt(((au - 0.55 * w) / (p.nostril * 1.5)) ** 2 + ((v - 0.035) / p.nostril) ** 2)
    c.fill(0.75 * c.cover((holes - 1) * p.nostril), c.skin * np.float32(0.28), where)


def _marks(c: _Painter, fine: float) -> None:
    """Forehead lines, folds beside the mouth, crow's feet; moles and freckles; a scar."""
    p = c.p
    lines = ramp(p.wrinkles + 0.35 * (p.age - 0.5), 0.5, 0.95) * fine
    if lines > 0:
        where, u, v = c.at(0, -0.34, 0.33, 0.14)
        for k in range(3):
            curve = 0.075 * k - 0.08 + 0.12 * u * u + 0.012 * np.sin(9 * u + 40 * p.bags + 2 * k)
            c.shade(0.34 * lines * _bump(u, v - curve, 0.26, 0.018), where)
        for sign in (-1, 1):
            where, u, v = c.at(sign * 0.22, p.mouth_y - 0.06, 0.14, 0.20)
            c.shade(0.36 * lines * _bump(u * sign - 0.35 * v - 0.01, v, 0.024, 0.13), where)
            where, u, v = c.at(sign * (p.eye_x + p.eye_w + 0.06), p.eye_y, 0.08, 0.09)
            rays = np.sin(22 * v + 200 * u * sign * v) ** 2
            c.shade(0.34 * lines * rays * rays * _bump(u, v, 0.06, 0.07), where)

    mole = np.arange(_MOLES + _FRECKLES) < _MOLES
    strength = np.full(len(mole), 0.55 * ramp(p.freckles, 0.62, 0.9) * (1 - 0.6 * p.skin))
    strength[:_MOLES] = np.clip(1.6 * (p.mole - 0.25), 0, 0.85)
    a, b, size = p.points.T
    spots = scatter(
        c.s,
        (a - 0.5) * np.where(mole, 0.72, 0.66),
        0.13 + (b - 0.5) * np.where(mole, 0.88, 0.26),
        np.where(mole, 0.020 + 0.014 * size, 0.013 + 0.006 * size),
        strength,
    )
    c.front *= 1 - rgb(0.72, 0.84, 0.92)[:, None, None] * spots

    if p.scar > 0.72:
        cos, sin = math.cos(3.1 * p.scar_turn), math.sin(3.1 * p.scar_turn)
        where, u, v = c.at((p.scar_x - 0.5) * 0.5, 0.05 + (p.scar_y - 0.5) * 0.6, 0.15, 0.15)
        across, span = v * cos - u * sin, c.cover(np.abs(u * cos + v * sin) - 0.10)
        light = c.skin * np.float32(0.5) + rgb(0.48, 0.30, 0.30)
        c.fill(0.75 * span * c.cover(np.abs(across) - 0.009), light, where)
        c.shade(0.35 * span * c.cover(np.abs(across - 0.022) - 0.009), where)


def scatter(s: SimpleNamespace, mx: Array, my: Array, size: Array, strength: Array) -> Array:
    """Round spots of radius size [P] at (mx, my) [P], the strongest at each pixel, [A, A]."""
    n = math.ceil(0.05 / s.px)
    step = np.arange(-n, n + 1)
    cx, cy = ((m + s.reach) / s.px - 0.5 for m in (mx, my))
    ix, iy = (np.rint(m).astype(int)[:, None] + step for m in (cx, cy))
    dx, dy = (ix - cx[:, None]) * s.px, (iy - cy[:, None]) * s.px
    d = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
    spots = np.clip(0.5 - (d - size[:, None, None]) / s.px, 0, 1) * strength[:, None, None]
    out = np.zeros((s.canvas, s.canvas), np.float32)
    np.maximum.at(out, (iy[:, :, None], ix[:, None, :]), spots.astype(np.float32))
    return out


def _beard(c: _Painter, head: Array, strands: Array, locks: Array) -> None:
    """From stubble to a full beard, with more or less of a moustache."""
    p, x, y, ax = c.p, c.s.x, c.s.y, np.abs(c.s.x)
    beard = ramp(p.beard, 0.50, 0.68) * ramp(p.masculine, 0.48, 0.60)
    stubble = 0.22 * c.masculine * ramp(p.beard, 0.25, 0.45)
    if beard + stubble == 0:
        return
    full = ramp(p.beard, 0.62, 0.85)
    edge = p.mouth_y - 0.03 + 0.16 * (1 - full) - 0.30 * full * np.clip(ax - 0.10, 0, 0.4)
    bare = np.sqrt((x / 0.15) ** 2 + ((y - p.mouth_y) / 0.085) ** 2)  # round the lips
    area = c.cover((edge - y) * 0.5) * np.clip((bare - 1) * 6 + 0.5, 0, 1)
    area *= c.cover((ax - (0.20 + 0.5 * full)) * 0.5)
    lip = _bump(x, y - p.mouth_y + 0.075 - 0.25 * x * x, 0.19, 0.038)
    area = np.minimum(np.maximum(area, (0.4 + 0.9 * p.moustache) * lip), 1) * head
    density = beard * (0.72 + 0.35 * strands) + stubble * (1 - beard)
    c.fill(np.clip(area * density, 0, 0.95), locks * np.float32(0.85))


def _mouth(c: _Painter) -> None:
    """Two lips and a dark slit with teeth, which opens when an instance stretches it."""
    p, w = c.p, c.p.mouth_w
    where, u, v = c.at(0, p.mouth_y, w + 0.05, 0.14)
    e = (u * (1 / w)) ** 2
    q = np.clip(1 - e, 0, 1)
    middle = p.corner * e
    top = middle - p.lip_up * q * (1.25 - 0.25 * c.masculine) + p.bow * _line(u, 0.035) * q
    bottom = middle + p.lip_low * np.sqrt(q) * q
    lips = c.skin * np.float32(0.45) + along(_LIPS, p.lip_hue) * np.float32(0.5 - 0.2 * p.skin)
    lips = lips * np.float32(0.92 + 0.25 * (p.lip_tone - 0.5))
    span = c.cover(np.abs(u) - w)
    c.fill(span * c.cover(np.maximum(top - v, v - middle)), lips * np.float32(0.84), where)
    c.fill(span * c.cover(np.maximum(middle - v, v - bottom)), lips, where)
    c.shade(-0.14 * _bump(u, v - p.lip_low * 0.5, 0.07, 0.014), where)
    slit = np.abs(v - middle) - 0.013 * (0.4 + 0.6 * q)
    c.fill(span * c.cover(slit), rgb(0.22, 0.08, 0.08), where)
    teeth = c.cover(np.abs(v - middle + 0.006) - 0.004) * (np.abs(u) < w * 0.7)
    c.fill(0.8 * span * teeth, rgb(0.86, 0.84, 0.80), where)


def _eye(c: _Painter, sign: int, fine: float) -> None:
    """One eye (sign -1: the left one in the picture) and its brow."""
    p = c.p
    where, across, v = c.at(sign * p.eye_x, p.eye_y, p.eye_w + 0.09, 0.17)
    u = across * sign  # outwards
    v = v + p.slant * u
    q = np.clip(1 - (u * (1 / p.eye_w)) ** 2, 0, 1)
    upper, lower = -p.eye_h * q, 0.62 * p.eye_h * q
    within = np.abs(u) < p.eye_w
    ball = c.cover(np.maximum(upper - v, v - lower)) * within
    bags = 0.30 * fine * ramp(p.bags, 0.45, 1)
    c.shade(bags * _bump(u, v - p.eye_h - 0.04, 0.11, 0.024), where)
    c.shade(0.34 * _bump(u, v - upper + p.lid, p.eye_w * 0.9, 0.014), where)
    c.fill(ball, rgb(0.93, 0.92, 0.91), where)
    c.shade(0.30 * ball * _line(v - upper, 0.03), where)

    # iris: two tones, spokes, a dark ring at its edge; pupil and glint
    down = v + 0.008
    r = np.sqrt(across**2 + down**2) * (1 / p.iris)
    spokes = np.sin((3 + int(p.iris_turn * 5)) * np.arctan2(down, across) + 20 * p.iris_ring)
    hue = along(_IRIS, p.iris_hue * (1 - 0.6 * ramp(p.skin, 0.5, 0.9)))
    colour = hue[:, None, None] * ((1 + 0.35 * spokes * (r > 0.5)) * (0.75 + 0.6 * p.iris_light))
    inner = 0.55 * ramp(p.iris_ring, 0.3, 0.9) * np.clip(1.6 - 2 * r, 0, 1)
    colour += inner * rgb(0.55, 0.32, 0.05)[:, None, None]
    c.fill(ball * c.cover((r - 1) * p.iris), colour, where)
    c.shade(0.6 * ball * _line(r - 0.95, 1 / 6), where)
    c.fill(ball * c.cover((r - p.pupil) * p.iris), rgb(0.03, 0.02, 0.02), where)
    glint = c.cover(np.sqrt((across + 0.022) ** 2 + (v + 0.034) ** 2) - 0.016)
    c.fill(0.9 * ball * glint, rgb(1, 1, 1), where)
    lash = c.cover(np.abs(v - upper) - 0.010 - 0.012 * p.lashes * (1 - 0.5 * c.masculine))
    c.fill(0.85 * lash * (np.abs(u) < p.eye_w + 0.02), c.hair * np.float32(0.25), where)
    c.shade(0.30 * c.cover(np.abs(v - lower) - 0.006) * within, where)

    where, u, v = c.at(sign * p.eye_x, p.eye_y - p.brow_gap, 0.24, 0.14)
    u = u * sign
    e = u * (1 / p.brow_length)
    v = v + p.brow_tilt * u + 1.2 * p.brow_arch * (1 - (e - 0.35) ** 2)
    thick = max(p.brow_thick, 0.010) * (0.8 + 0.35 * c.masculine) * np.clip(0.875 - 0.275 * e, 0, 1)
    comb = 1 - (0.6 * p.brow_texture) * (np.sin(80 * u - 45 * v) > 0.2)
    brow = c.cover(np.abs(v) - thick) * c.cover((np.abs(e) - 1) * p.brow_length)
    c.fill(0.88 * brow * comb, c.hair * np.float32(0.35 + 0.65 * p.brow_tone), where)


def _glasses(c: _Painter) -> None:
    """Frames round both eyes, bridge and temples; the glass is a little lighter."""
    p, cover = c.p, c.cover
    rx, ry, rim = 0.165 + 0.03 * p.lens, 0.105 + 0.05 * p.rim, 0.012 + 0.016 * p.rim
    where, u, v = c.at(0, p.eye_y + 0.015, 0.62, 0.24)
    au = np.abs(u)
    a2, b2 = ((au - p.eye_x) * (1 / rx)) ** 2, (v * (1 / ry)) ** 2
    corners = (0.9 * p.lens) * a2 * b2 * (a2 < 1.44)  # from round to nearly rectangular
    d = (np.sqrt(np.maximum(a2 + b2 - corners, 0)) - 1) * ry
    bridge = np.maximum(np.abs(v + 0.02) - rim, au - p.eye_x + rx)
    temples = np.maximum(np.abs(v + 0.03) - rim, np.maximum(p.eye_x + rx - au, au - p.width))
    frame = np.minimum(np.minimum(np.abs(d) - rim, bridge), temples)
    c.fill(0.12 * cover(d), rgb(0.85, 0.92, 1.0), where)
    c.fill(0.92 * cover(frame), rgb(*_FRAMES[int(p.frame * 4.99)]), where)


def _normals(c: _Painter, cheeks: Array, bare: Array, radius: Array) -> Array:
    """Unit normals [3, A, A]: an ellipsoid with nose, brows and cheeks where no hair hides them
    (``bare``), and shoulders below."""
    p, x, y, ax = c.p, c.s.x, c.s.y, np.abs(c.s.x)
    nose = 1.1 * bare * _bump(x, y - p.nose_y + 0.04, 0.085, 0.16)
    ridge = bare * _bump(ax - p.eye_x, y - p.eye_y + 0.10, 0.17, 0.05)
    nx = x * (1 / (p.width * 1.12)) + nose * x * (1 / 0.085)
    nx = nx + 1.9 * bare * cheeks * (ax - 0.27) * np.sign(x)
    ny = (y - HEAD_Y) * (1 / (p.height * 1.25)) + 4 * nose * (y - p.nose_y + 0.04)
    ny = ny + 10 * ridge * (y - p.eye_y + 0.10)
    body = np.clip((radius - 1.02) * 8, 0, 1) * np.clip((y - 0.2) * 4, 0, 1)
    nx = nx + body * (0.75 * x - nx)
    ny = ny + body * (-0.25 - ny)
    nz = 1 / np.sqrt(1 + 1.1 * (nx * nx + ny * ny))
    return np.stack([nx * nz, ny * nz, nz]).astype(np.float32)


def _hats(s: SimpleNamespace, p: SimpleNamespace, volume: float) -> Array:
    """Headgear that fits this head. An instance may wear it, so that hair is no sure sign."""
    x, y, yc = s.x, s.y, HEAD_Y
    wide, high = p.width + 0.5 * volume + 0.05, p.height + 0.7 * volume + 0.05
    dome = (np.sqrt((x / wide) ** 2 + ((y - yc) / high) ** 2) - 1) * wide
    rim = yc - 0.36 * p.height + 0.10 * (x / wide) ** 2
    knit = 0.85 + 0.15 * np.sin(60 * x)
    beanie = _cover(s, np.maximum(dome, y - rim))
    cuff = np.where(y > rim - 0.13, 0.75, 1.0)
    brim = (np.sqrt((x / (0.95 * p.width)) ** 2 + ((y - rim - 0.01) / 0.075) ** 2) - 1) * 0.075
    cap = np.maximum(beanie, _cover(s, brim))
    peak = np.where(brim < 0, 0.65, 1.0)
    drape = np.where(y < yc, dome, np.abs(x) - wide - 0.16 * np.clip(y - yc, 0, 1) ** 2)
    face = np.sqrt((x / (0.88 * p.width)) ** 2 + ((y - yc - 0.05) / (0.92 * p.height)) ** 2) - 1
    scarf = _cover(s, np.maximum(drape, -face * p.width))
    fold = 0.80 + 0.25 * s.strands[3] - 0.35 * np.exp(-((face * 7) ** 2))
    hats = ((beanie, cuff * knit), (cap, peak), (scarf, fold))
    return np.stack([np.stack([m, m * light]) for m, light in hats]).astype(np.float32)


_YAW, _SMILE_X, _GAZE, _DEPTH, _SMILE_Y, _OPEN, _BROWS, _LIDS = range(8)


def _bases(s: SimpleNamespace, p: SimpleNamespace) -> Array:
    """Displacement bases [8, h, h] at half the canvas's resolution, in image units.

    The first three move the sampling point along x, the others along y. Yaw and pitch move a point
    in proportion to the depth of the head there (0 on the shoulders), so features slide over it.
    """
    x, y = s.hx, s.hy

    def bump(cx: float, cy: float, sx: float, sy: float) -> Array:
        return np.exp(-((((np.abs(x) if cx else x) - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    depth = 0.52 * np.exp(-1.3 * ((x / (p.width * 1.1)) ** 2 + ((y - HEAD_Y) / p.height) ** 2))
    depth += 0.09 * bump(0, p.nose_y - 0.02, 0.12, 0.14)
    corners = bump(p.mouth_w, p.mouth_y, 0.11, 0.10)
    jaw = bump(0, p.mouth_y + 0.03, 0.24, 0.16)
    lids = bump(p.eye_x, p.eye_y - 0.03, 0.18, 0.075)
    brows = bump(p.eye_x, p.eye_y - p.brow_gap, 0.20, 0.09)
    gaze = bump(p.eye_x, p.eye_y, 0.09, 0.06)
    lip = np.tanh((y - p.mouth_y) / 0.06)
    return np.stack(
        [depth, -np.sign(x) * corners, gaze, depth, corners, -0.5 * (1 + lip) * jaw, brows, -lids]
    ).astype(np.float32)


# ----------------------------------------------------------------------------------- instances


def _draw(faces: Faces, person: _Person, identity: int, instances: Array, shifted: bool) -> Array:
    """Instances [N] of one identity as uint8 [N, 3, S, S]."""
    s, n = stage(faces.size), len(instances)
    normal, uniform = draws(faces, identity, instances, shifted)
    v = columns(conditions(normal, uniform, shifted))

    # colour: cloth, Lambert's shading and a highlight, on the canvas
    style = torch.from_numpy((uniform[:, 0] * 6).astype(np.int64))
    canvas = person.looks[style]
    cloth = person.cloth[style]
    for i in np.flatnonzero(uniform[:, 20] < HATS).tolist():
        mask, light = person.hats[int(uniform[i, 20] * (3 / HATS))]
        canvas[i].mul_(1 - mask)
        canvas[i, 3] += mask
        cloth[i].mul_(1 - mask)
        for k in range(3):
            canvas[i, k] += light * v["hat"][i, k]
    for k in range(3):
        canvas[:, k].add_(cloth * v["cloth"][:, k])
    shade(canvas, person.normals, person.gloss, v)

    # place: displacement on the canvas, affine to the image, one sampling
    b, d = person.bases, {k: v["move"][:, k] for k in range(8)}
    h = b.shape[-1]
    field = torch.empty(n, 2, h, h, dtype=torch.float32)
    hx, hy = torch.from_numpy(s.hx), torch.from_numpy(s.hy)
    field[:, 0] = hx + b[_YAW] * d[_YAW]
    field[:, 1] = hy + b[_DEPTH] * d[_DEPTH]
    for k in (_SMILE_X, _GAZE):
        field[:, 0] += b[k] * d[k]
    for k in (_SMILE_Y, _OPEN, _BROWS, _LIDS):
        field[:, 1] += b[k] * d[k]
    field /= s.reach
    grid = sample(field, place(s, v)).permute(0, 2, 3, 1)
    return photograph(s, sample(canvas, grid), v, uniform, shifted)


def draws(family: Family, identity: int, instances: Array, shifted: bool) -> tuple[Array, Array]:
    """An instance's own numbers: normal [N, 24], cut off at 2.2, and uniform [N, 28]."""
    normal = np.empty((len(instances), 24), np.float32)
    uniform = np.empty((len(instances), 28), np.float32)
    for i, instance in enumerate(instances):
        rng = generator(family.seed, identity, 1 + shifted, int(instance))
        normal[i] = rng.standard_normal(24, dtype=np.float32)
        uniform[i] = rng.random(28, dtype=np.float32)
    return normal.clip(-2.2, 2.2), uniform


def columns(numbers: dict[str, Array]) -> dict[str, torch.Tensor]:
    """[N] or [N, K] numbers as tensors [N, 1, 1] or [N, K, 1, 1]: one for each image."""
    return {
        k: torch.from_numpy(np.ascontiguousarray(a))[..., None, None] for k, a in numbers.items()
    }


def shade(
    canvas: torch.Tensor, normals: torch.Tensor, gloss: torch.Tensor, v: dict[str, torch.Tensor]
) -> None:
    """Lambert's shading and a highlight, on canvases [N, 4, A, A] in place."""
    nx, ny, nz = normals
    light = v["light"]
    lambert = (nx * light[:, 0]).add_(ny * light[:, 1]).add_(nz * light[:, 2]).clamp_(0)
    spot = lambert * lambert
    spot = spot.mul_(spot).mul_(spot).mul_(gloss).mul_(canvas[:, 3]).mul_(v["highlight"])
    lambert.mul_(v["diffuse"]).add_(v["ambient"])
    for k in range(3):
        canvas[:, k].mul_(lambert).add_(spot)


def place(s: SimpleNamespace, v: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where on the canvas each pixel of an image looks, [N, S, S, 2], for `sample`."""
    affine = v["affine"]
    out = torch.empty(len(affine), s.size, s.size, 2, dtype=torch.float32)
    for k in range(2):
        out[..., k] = (s.ox * affine[:, 3 * k]).add_(s.oy * affine[:, 3 * k + 1])
        out[..., k] += affine[:, 3 * k + 2]
    out /= s.reach
    return out


def sample(canvas: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return F.grid_sample(canvas, grid, mode="bilinear", padding_mode="border", align_corners=False)


def photograph(
    s: SimpleNamespace,
    layers: torch.Tensor,
    v: dict[str, torch.Tensor],
    uniform: Array,
    shifted: bool,
) -> Array:
    """Premultiplied RGBA [N, 4, S, S] before a background, in coloured light, with noise: uint8
    [N, 3, S, S]."""
    pick = torch.from_numpy((uniform[:, 1:3] * 96).astype(np.int64))
    blend, glow = s.fields[pick[:, 0]], s.fields[pick[:, 1]]
    gap = 1 - layers[:, 3]
    image = layers[:, :3]
    noise = torch.empty_like(image)
    for i, (dx, dy) in enumerate((uniform[:, 3:5] * (2 * s.size)).astype(int)):
        noise[i] = s.noise[:, dy : dy + s.size, dx : dx + s.size]
    for k in range(3):
        a, b, c = (v["scene"][:, k + j] for j in (0, 3, 6))
        scene = (blend * a).add_(glow * b).add_(c)
        image[:, k].add_(scene.clamp_(0, 1).mul_(gap)).mul_(v["gain"][:, k])
    grey = image[:, 0].add(image[:, 1]).add_(image[:, 2]).mul_(1 / 3).mul_(v["faded"])
    image.mul_(1 - v["faded"][:, None]).add_(grey[:, None])
    if shifted:
        image = _worsen(image, v)
    image = image.add(noise.mul_(v["noise"][:, None]))
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8).numpy()


def conditions(normal: Array, uniform: Array, shifted: bool) -> dict[str, Array]:
    """What an instance varies, from its draws [N, 24] and [N, 28].

    Add, multiply, divide, square root only: exactly rounded, so the same in any batch.
    """
    n, u = normal.T, uniform.T
    far = 1.5 if shifted else 1.0
    yaw, pitch, roll = 0.20 * n[0], 0.11 * n[1], 0.08 * n[2]  # sines: up to 26, 14, 10 degrees
    zoom = 1 / (1.07 + 0.05 * n[3])
    cos, sin = np.sqrt(1 - roll * roll) * zoom, roll * zoom
    shift_x, shift_y = 0.045 * n[4], 0.045 * n[5] - 0.02
    aspect = 1 + 0.04 * n[16]
    affine = np.stack([cos * aspect, sin, -shift_x, -sin * aspect, cos, -shift_y], 1)

    side, above = 0.6 * far * n[6] - yaw, -0.30 * far * n[7] - 0.35
    length = np.sqrt(1 + side**2 + above**2)
    light = np.stack([side / length, above / length, 1 / length], 1)
    contrast = 0.30 + 0.55 * u[5] if not shifted else 0.65 + 0.45 * u[5]
    exposure = 1.0 + 0.13 * far * n[8]
    warm, green = 0.075 * far * n[9], 0.012 * n[10]
    gain = np.stack([1 + warm, 1 + green - 0.1 * warm, 1 - warm], 1) * exposure[:, None]

    smile, opening = 0.03 + 0.035 * n[11], 0.075 * np.clip(n[12] - 0.3, 0, 1)
    move = np.stack([-yaw, 0.6 * smile, 0.022 * n[13], pitch, smile, opening,
                     0.024 * n[14], 0.05 * np.clip(0.7 * n[15] - 0.2, -0.3, 1)], 1)  # fmt: skip

    def muted(value: Array, saturation: Array, hue: Array) -> Array:
        turn = (hue[:, None] + np.array([0, 1 / 3, 2 / 3])) % 1
        return value[:, None] * (1 + saturation[:, None] * (4 * np.abs(turn - 0.5) - 1))

    scene = muted(0.10 + 0.75 * u[6], 0.35 * u[7], u[8])
    blend = muted(0.10 + 0.75 * u[9], 0.35 * u[10], u[11]) - scene
    glow = np.repeat(0.25 * (u[12, :, None] - 0.5), 3, 1)
    noise = 0.006 + 0.014 * u[13] if not shifted else 0.02 + 0.04 * u[13]
    out = dict(
        affine=affine, light=light, diffuse=contrast, ambient=1.06 - 0.85 * contrast,
        highlight=u[14] * 0.8, gain=gain, move=move, noise=noise,
        cloth=muted(0.12 + 0.75 * u[15], 0.6 * u[16], u[17]),
        scene=np.concatenate([blend, glow, scene], 1),
        hat=muted(0.12 + 0.70 * u[21], 0.6 * u[22], u[23]), faded=0.6 * u[24],
        blur=0.10 + 0.14 * u[18], levels=0.03 + 0.09 * u[19],
    )  # fmt: skip
    return {k: a.astype(np.float32) for k, a in out.items()}


def _worsen(image: torch.Tensor, v: dict[str, torch.Tensor]) -> torch.Tensor:
    """The shifted conditions: blur, then 8x8 block DCT coefficients rounded as a codec does."""
    n, _, size, _ = image.shape
    side = v["blur"][:, None]
    for _ in range(round(size / 32)):  # so that the blur is the same share of the face
        for axis in (2, 3):
            edge = image.narrow(axis, 0, 1), image.narrow(axis, size - 1, 1)
            before = torch.cat([edge[0], image.narrow(axis, 0, size - 1)], axis)
            after = torch.cat([image.narrow(axis, 1, size - 1), edge[1]], axis)
            image = image * (1 - 2 * side) + (before + after) * side
    blocks = -(-size // 8)
    image = F.pad(image, (0, 8 * blocks - size, 0, 8 * blocks - size), mode="replicate")
    k = np.arange(8)
    dct = np.sqrt(np.where(k == 0, 1, 2) / 8)[:, None] * np.cos(np.pi * np.outer(k, k + 0.5) / 8)
    forward, backward = (torch.from_numpy(m.astype(np.float32)) for m in (dct, dct.T.copy()))
    coarser = np.tile(1 + 0.5 * (k[:, None] + k), (blocks, blocks)).astype(np.float32)
    step = v["levels"][:, None] * torch.from_numpy(coarser)
    for _ in range(2):  # rows, then columns: each time what was vertical becomes horizontal
        image = _vertically(image, forward).transpose(2, 3)
    image = (image / step).round_() * step
    for _ in range(2):
        image = _vertically(image, backward).transpose(2, 3)
    return image[..., :size, :size]


def _vertically(image: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """matrix [8, 8] times every 8 pixels of a column, in an order of sums that never changes."""
    n, channels, _, wide = image.shape
    x = image.reshape(n, channels, -1, 8, wide)
    out = x[..., :1, :] * matrix[:, :1]
    for k in range(1, 8):
        out += x[..., k : k + 1, :] * matrix[:, k : k + 1]
    return out.reshape(image.shape)


def render(
    family: Family,
    identities: Sequence[int] | Array,
    instances: Sequence[int] | Array,
    *,
    shifted: bool = False,
    workers: int = 0,
) -> Array:
    """Images uint8 [N, 3, size, size] RGB of the paired lists identities [N] and instances [N].

    An image depends on ``family`` (Faces, or objects.Objects), its identity, its instance and
    ``shifted`` only. ``workers`` processes share the identities when there are two or more; each
    takes seconds to start, so that they pay from tens of thousands of images (threads do not:
    Python's lock serialises the many small steps). Raises ValueError for lists of unequal length
    or negative numbers.
    """
    who, which = np.asarray(identities, np.int64), np.asarray(instances, np.int64)
    if who.ndim != 1 or who.shape != which.shape:
        raise ValueError(f"identities {who.shape} and instances {which.shape} must be paired lists")
    if who.size and (who.min() < 0 or which.min() < 0):
        raise ValueError("identity and instance numbers must not be negative")
    out = np.empty((len(who), 3, family.size, family.size), np.uint8)
    order = np.argsort(who, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(who[order])) + 1) if len(who) else []
    draw = functools.partial(family.draw, shifted)
    tasks = [(int(who[group[0]]), which[group]) for group in groups]
    if workers < 2:
        with _one_thread():
            for group, task in zip(groups, tasks, strict=True):
                out[group] = draw(task)
        return out
    # spawn, not fork: a fork after torch has started threads can hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for group, album in zip(groups, pool.map(draw, tasks, chunksize=16), strict=True):
            out[group] = album
    return out


_drawing = threading.Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread meanwhile: on busy cores, waiting for each other in steps of microseconds
    made two threads 15 times slower than one. The lock lets each caller restore its own count."""
    with _drawing:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
