"""Procedural faces: the embedded data set every recipe trains on by default.

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

import argparse
import functools
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

VERSION = 1  # raised whenever a pixel changes

RANGE = 1_000_000  # identities a split may have
FIRST = {"train": 0, "development": RANGE, "test": 2 * RANGE, "shifted": 2 * RANGE}
NATIVE_FIRST = 3 * RANGE
HATS = 0.33  # share of the pictures in which the head is covered
CHUNK = 16  # instances of one identity drawn together: the working set stays in the L2 cache

Array = np.ndarray


@dataclass(frozen=True)
class Faces:
    """Parameters of the generator; all of them are in the cache key."""

    size: int = 64  # px, 16..112
    seed: int = 0  # data seed: another seed is another population
    coarse: float = 0.6  # spread of what survives at 16x16 (head shape, skin, hair, ...)
    fine: float = 1.4  # spread of what only HR shows (iris and brow texture, moles, ...)

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 112:
            raise ValueError(f"Faces.size is {self.size}; give 16 to 112 pixels")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Faces.seed is {self.seed}; give 0 to 2**63 - 1")
        for name in ("coarse", "fine"):
            if not 0 <= getattr(self, name) <= 3:
                raise ValueError(f"Faces.{name} is {getattr(self, name)}; give 0 to 3")


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
    "eye_h": (0.070, 0.012), "slant": (0.06, 0.13), "lid": (0.045, 0.012), "iris": (0.076, 0.006),
    "pupil": (0.40, 0.08), "brow_tilt": (0.03, 0.16), "brow_arch": (0.035, 0.030),
    "brow_thick": (0.032, 0.011), "brow_length": (0.155, 0.020), "nostril": (0.022, 0.004),
    "bridge": (0.35, 0.18), "lip_up": (0.035, 0.011), "lip_low": (0.047, 0.013),
    "bow": (0.012, 0.010), "corner": (0.0, 0.016), "blush": (0.16, 0.10),
}  # fmt: skip
_COARSE_U = ("skin", "hair", "length", "volume", "fringe", "hairline", "part", "curl", "masculine",
             "age", "beard", "glasses", "frame")  # fmt: skip
_FINE_U = ("iris_hue", "iris_ring", "iris_light", "lip_hue", "lip_tone", "brow_texture", "brow_tone",
           "strands", "freckles", "wrinkles", "scar", "scar_x", "scar_y", "scar_turn", "lens",
           "rim", "lashes", "moustache", "iris_turn", "bags")  # fmt: skip
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


def _generator(seed: int, identity: int, stream: int, instance: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.Philox(key=[seed, identity], counter=[0, 0, stream, instance])
    )


def _numbers(faces: Faces, identity: int) -> SimpleNamespace:
    """The identity's numbers. ``_u`` names are about uniform on [0, 1] at the default knobs."""
    rng = _generator(faces.seed, identity, 0, 0)
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


def _along(stops: list[tuple[float, float, float]], t: float) -> Array:
    """The colour [3] at t in [0, 1] of a palette."""
    place = min(max(t, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(place), len(stops) - 2)
    a, b = np.float32(stops[i]), np.float32(stops[i + 1])
    return a + np.float32(place - i) * (b - a)


def _ramp(t: float, low: float, high: float) -> float:
    """0 below low, 1 above high, straight between."""
    return min(max((t - low) / (high - low), 0.0), 1.0)


# ------------------------------------------------------------------------- what every face shares


def _smooth(shape: tuple[int, ...], cells: tuple[int, int], seed: int) -> Array:
    """Smooth noise of unit range: a coarse lattice of numbers, bicubically enlarged."""
    lattice = np.random.Generator(np.random.Philox(key=[seed, VERSION])).random((shape[0], 1, *cells))
    fine = F.interpolate(torch.from_numpy(lattice), size=shape[1:], mode="bicubic")
    return fine[:, 0].clamp_(0, 1).float().numpy()


@functools.lru_cache(maxsize=4)
def _stage(size: int) -> SimpleNamespace:
    """All that depends on the size alone: coordinates, textures, clothes, backgrounds, noise."""
    s = SimpleNamespace(size=size, canvas=2 * round(size * 0.625), px=2 / size)
    s.reach = s.canvas / size
    a = ((np.arange(s.canvas, dtype=np.float32) + 0.5) * 2 / size - s.reach).astype(np.float32)
    s.x, s.y = (np.ascontiguousarray(m) for m in np.meshgrid(a, a))
    half = ((np.arange(s.canvas // 2, dtype=np.float32) + 0.5) * 4 / size - s.reach).astype(np.float32)
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
    hats: torch.Tensor  # [3, 2, A, A] where a beanie, a cap, a headscarf is; the same times its light
    gloss: torch.Tensor  # [A, A] strength of the highlight
    bases: torch.Tensor  # [8, h, h] displacements
    pivot: float  # height of the neck's turning point


def _person(faces: Faces, identity: int) -> _Person:
    s, p = _stage(faces.size), _numbers(faces, identity)
    x, y, ax = s.x, s.y, np.abs(s.x)
    full = (slice(None), slice(None))

    def at(cx: float, cy: float, rx: float, ry: float) -> tuple[tuple[slice, slice], Array, Array]:
        """The window of the canvas round a point, with coordinates from that point."""
        rows, columns = (
            slice(max(int((c - r + s.reach) / s.px), 0), max(int((c + r + s.reach) / s.px) + 2, 1))
            for c, r in ((cy, ry), (cx, rx))
        )
        return (rows, columns), x[rows, columns] - np.float32(cx), y[rows, columns] - np.float32(cy)

    def fill(image: Array, mask: Array, colour: Array, where: tuple[slice, slice] = full) -> None:
        view = image[(slice(None), *where)]
        view += mask * (colour.reshape(3, *colour.shape[1:] or (1, 1)) - view)

    def shade(image: Array, amount: Array, where: tuple[slice, slice] = full) -> None:
        image[(slice(None), *where)] *= 1 - amount

    def bump(u: Array, v: Array, su: float, sv: float) -> Array:
        return np.exp(-((u * (1 / su)) ** 2) - (v * (1 / sv)) ** 2)

    # colours
    skin = _along(_SKIN, p.skin) + np.float32([0.2, -0.2, -0.8]) * np.float32(p.undertone)
    grey = _ramp(p.age, 0.74, 0.88)
    hair = _along(_HAIR, p.hair * (1 - 0.55 * _ramp(p.skin, 0.45, 0.75)))
    hair = hair + np.float32(grey) * (np.float32([0.74, 0.74, 0.75]) - hair)
    masculine = _ramp(p.masculine, 0.35, 0.65)

    # head: a squircle u^2 + t^2 - k u^2 t^2 = 1 whose width shrinks towards the jaw
    yc, wide, high = -0.06, p.width, p.height
    t = (y - yc) * (1 / high)
    low = np.clip(t, 0, 1.3)
    taper = 1 - (0.42 - p.jaw - 0.06 * masculine) * low * low * (1.5 - 0.5 * low)
    u2, t2 = (x / (wide * taper)) ** 2, t * t
    r2 = u2 + t2 - np.where(t > 0, np.float32(np.clip(p.square, 0, 0.75)), 0.1) * (
        np.minimum(u2, 1) * np.minimum(t2, 1))
    radius = np.sqrt(np.maximum(r2, 1e-6))
    head = _cover(s, (radius - 1) * (0.9 * wide))

    # hair: outline a skull enlarged by the volume, straight down at the sides to its length
    length = 0.62 * p.length + 0.38 * (1 - masculine)
    bald = 1 - _ramp(length, 0.05, 0.09)
    thin = _ramp(p.age, 0.6, 0.9) * masculine * _ramp(p.hairline, 0.45, 0.8)
    side = -0.20 + 0.20 * _ramp(length, 0.10, 0.40) + 1.15 * _ramp(length, 0.48, 0.95)
    volume = 0.02 + (0.05 + 0.15 * p.volume) * _ramp(length, 0.10, 0.40)
    curl = _ramp(p.curl, 0.55, 0.95)
    ripple = (0.022 * curl) * np.sin(17 * np.arctan2(x, yc - y) + 40 * p.part)
    swell = np.where(y < yc, 1, 1 + 0.10 * p.volume * np.clip(y - yc, 0, 1))
    outer = np.sqrt(
        (x / ((wide + 0.62 * volume + 0.03) * swell)) ** 2
        + (np.minimum(t, 0) * (high / (high + volume))) ** 2
    ) + ripple  # fmt: skip
    strands = (1 - curl) * s.strands[int(p.strands * 23.99)] + curl * s.curls[int(p.strands * 23.99)]
    locks = hair[:, None, None] * (0.70 + 0.55 * strands) + 0.04 * (strands - 0.5)
    in_outer = _cover(s, (outer - 1) * wide)
    end = side + 0.07 * (strands - 0.5)

    # back layer: hair behind, neck
    back = np.zeros((3, s.canvas, s.canvas), np.float32)
    back_hair = in_outer * _cover(s, y - end) * (1 - bald)
    fill(back, back_hair, locks * np.float32(0.62))
    neck = _cover(s, np.maximum(ax - p.neck - 0.35 * np.clip(y - 0.68, 0, 1) ** 1, 0.2 - y))
    neck_tone = 0.86 - 0.34 * bump(x, y - (yc + high), 0.5, 0.14) - 0.5 * (ax / p.neck * 0.5) ** 4
    fill(back, neck, skin[:, None, None] * np.clip(neck_tone, 0.4, 1))
    back_alpha = np.maximum(back_hair, neck)

    # front layer: ears, head
    front = np.zeros_like(back)
    ear_y = p.eye_y + 0.10
    ears = _cover(s, (np.sqrt(((ax - wide * 0.97) / (p.ear * 0.72)) ** 2
                              + ((y - ear_y) / (p.ear * 1.25)) ** 2) - 1) * (p.ear * 0.8))  # fmt: skip
    fill(front, ears, skin * np.float32([0.92, 0.84, 0.82]))
    shade(front, 0.4 * bump(ax - wide * 1.03, y - ear_y, p.ear * 0.28, p.ear * 0.7) * ears)
    tone = 1.03 - 0.20 * np.clip(r2, 0, 1) ** 3 - 0.10 * bump(x, y - (yc + high), 0.4, 0.12)
    fill(front, head, skin[:, None, None] * tone)
    front_alpha = np.maximum(ears, head)

    # modelling of the face: sockets, cheeks, nose, chin
    blush = max(p.blush, 0) * (1 - 0.5 * p.skin)
    cheeks = bump(ax - 0.27, y - 0.18, 0.13, 0.11)
    front *= 1 + cheeks * (np.float32([0.10, -0.9, -0.7]) * np.float32(blush) + 0.05)[:, None, None]
    shade(front, 0.20 * bump(ax - p.eye_x, y - p.eye_y + 0.02, 0.16, 0.10))
    shade(front, 0.16 * bump(x, y - (p.mouth_y + 0.105), 0.11, 0.03))
    where, u, v = at(0, p.nose_y, 0.30, 0.40)
    w = p.nose_w
    ridge = np.clip((v + 0.30) * 3.3, 0, 1) * _cover(s, v - 0.02)
    shade(front, (0.30 * p.bridge + 0.06) * bump(np.abs(u) - 0.55 * w, v * 0, 0.035, 1) * ridge, where)
    shade(front, -0.16 * bump(u, v * 0, 0.030, 1) * ridge - 0.12 * bump(u, v + 0.03, 0.05, 0.05), where)
    wings = bump(np.abs(u) - w, v, 0.028, 0.045)
    under = bump(u, v - 0.055, w * 0.95, 0.022)
    shade(front, 0.30 * wings + 0.32 * under, where)
    holes = np.sqrt(((np.abs(u) - 0.55 * w) / (p.nostril * 1.5)) ** 2 + ((v - 0.035) / p.nostril) ** 2)
    fill(front, 0.75 * _cover(s, (holes - 1) * p.nostril), skin * 0.28, where)

    # ageing: forehead lines, crow's feet, folds beside the mouth, bags under the eyes
    lines = _ramp(p.wrinkles + 0.35 * (p.age - 0.5), 0.5, 0.95) * min(faces.fine, 1.4) / 1.4
    if lines > 0:
        where, u, v = at(0, -0.34, 0.33, 0.14)
        for k in range(3):
            curve = 0.075 * k - 0.08 + 0.12 * u * u + 0.012 * np.sin(9 * u + 40 * p.bags + 2 * k)
            shade(front, 0.34 * lines * bump(u, v - curve, 0.26, 0.018), where)
        for sign in (-1, 1):
            where, u, v = at(sign * 0.22, p.mouth_y - 0.06, 0.14, 0.20)
            shade(front, 0.36 * lines * bump(u * sign - 0.35 * v - 0.01, v, 0.024, 0.13), where)
            where, u, v = at(sign * (p.eye_x + p.eye_w + 0.06), p.eye_y, 0.08, 0.09)
            rays = np.abs(np.sin(22 * v + 12 * u * sign * v / 0.06))
            shade(front, 0.34 * lines * rays**4 * bump(u, v, 0.06, 0.07), where)
    bags = _ramp(p.bags, 0.45, 1) * min(faces.fine, 1.4) / 1.4

    # marks: moles and freckles in one scatter, then a scar
    fill_moles = _ramp(1, 0, 1) * np.clip(1.6 * (p.mole - 0.25), 0, 0.85)
    freckled = 0.55 * _ramp(p.freckles, 0.62, 0.9) * (1 - 0.6 * p.skin)
    strength = np.concatenate([fill_moles, np.full(_FRECKLES, freckled)]).astype(np.float32)
    spread = np.where(np.arange(_MOLES + _FRECKLES) < _MOLES, 1.0, 0.0)
    mx = (p.points[:, 0] - 0.5) * (0.66 + 0.06 * spread)
    my = 0.13 + (p.points[:, 1] - 0.5) * (0.26 + 0.62 * spread)
    size = np.where(spread > 0, 0.020 + 0.014 * p.points[:, 2], 0.013 + 0.006 * p.points[:, 2])
    marks = _scatter(s, mx, my, size, strength)
    front *= 1 - np.float32([0.72, 0.84, 0.92])[:, None, None] * marks
    if p.scar > 0.72:
        turn = 3.1 * p.scar_turn
        where, u, v = at((p.scar_x - 0.5) * 0.5, 0.05 + (p.scar_y - 0.5) * 0.6, 0.15, 0.15)
        along, across = u * math.cos(turn) + v * math.sin(turn), v * math.cos(turn) - u * math.sin(turn)
        scar = _cover(s, np.abs(across) - 0.009) * _cover(s, np.abs(along) - 0.10)
        fill(front, 0.75 * scar, skin * 0.5 + np.float32([0.48, 0.30, 0.30]), where)
        shade(front, 0.35 * _cover(s, np.abs(across - 0.022) - 0.009) * _cover(s, np.abs(along) - 0.1),
              where)  # fmt: skip

    # beard and moustache
    beard = _ramp(p.beard, 0.50, 0.68) * _ramp(p.masculine, 0.48, 0.60)
    stubble = 0.22 * masculine * _ramp(p.beard, 0.25, 0.45)
    if beard + stubble > 0:
        full_beard = _ramp(p.beard, 0.62, 0.85)
        edge = p.mouth_y - 0.03 + 0.16 * (1 - full_beard) - 0.30 * np.clip(ax - 0.10, 0, 0.4) * full_beard
        inner = np.sqrt((x / 0.15) ** 2 + ((y - p.mouth_y) / 0.085) ** 2)
        area = _cover(s, (edge - y) * 0.5) * np.clip((inner - 1) * 6 + 0.5, 0, 1)
        area *= _cover(s, (ax - (0.20 + 0.5 * full_beard)) * 0.5) * head
        lip = bump(x, (y - p.mouth_y + 0.075 - 0.25 * x * x) * 1.0, 0.19, 0.038)
        area = np.maximum(area, (0.4 + 0.9 * p.moustache) * lip * head)
        area = np.minimum(area, 1) * (beard * (0.72 + 0.35 * strands) + stubble * (1 - beard))
        fill(front, np.clip(area, 0, 0.95), locks * np.float32(0.85))

    # mouth: upper and lower lip, a dark slit with teeth that opens when it is stretched
    w = p.mouth_w
    where, u, v = at(0, p.mouth_y, w + 0.05, 0.14)
    q = np.clip(1 - (u / w) ** 2, 0, 1)
    middle = p.corner * (u / w) ** 2
    top = middle - p.lip_up * q * (1 + 0.25 * (1 - masculine)) + p.bow * bump(u, v * 0, 0.035, 1) * q
    bottom = middle + p.lip_low * np.sqrt(q) * q
    lips = skin * 0.45 + 0.5 * _along(_LIPS, p.lip_hue) * (1 - 0.4 * p.skin)
    lips = lips * np.float32(0.92 + 0.25 * (p.lip_tone - 0.5))
    span = _cover(s, np.abs(u) - w)
    fill(front, span * _cover(s, np.maximum(top - v, v - middle)), lips * 0.84, where)
    fill(front, span * _cover(s, np.maximum(middle - v, v - bottom)), lips, where)
    shade(front, -0.14 * bump(u, v - p.lip_low * 0.5, 0.07, 0.014), where)
    slit = np.abs(v - middle) - 0.013 * (0.4 + 0.6 * q)
    fill(front, span * _cover(s, slit), np.float32([0.22, 0.08, 0.08]), where)
    fill(front, 0.8 * span * _cover(s, np.abs(v - middle + 0.006) - 0.004) * (np.abs(u) < w * 0.7),
         np.float32([0.86, 0.84, 0.80]), where)  # fmt: skip

    # eyes and brows
    iris = _along(_IRIS, p.iris_hue * (1 - 0.6 * _ramp(p.skin, 0.5, 0.9)))
    brow_hair = hair * np.float32(0.35 + 0.65 * p.brow_tone)
    for sign in (-1, 1):
        where, u, v = at(sign * p.eye_x, p.eye_y, p.eye_w + 0.09, 0.17)
        u = u * sign  # outwards
        v = v + p.slant * u
        q = np.clip(1 - (u / p.eye_w) ** 2, 0, 1)
        upper, lower = -p.eye_h * q, 0.62 * p.eye_h * q
        ball = _cover(s, np.maximum(upper - v, v - lower)) * (np.abs(u) < p.eye_w)
        shade(front, 0.30 * bags * bump(u, v - p.eye_h - 0.04, 0.11, 0.024), where)
        shade(front, 0.34 * bump(u, v - upper + p.lid, p.eye_w * 0.9, 0.014), where)
        fill(front, ball, np.float32([0.93, 0.92, 0.91]), where)
        shade(front, 0.30 * ball * bump(u * 0, v - upper, 1, 0.03), where)
        ru = u * sign
        r = np.sqrt(ru**2 + (v + 0.008) ** 2) * (1 / p.iris)
        angle = np.arctan2(v + 0.008, ru)
        spokes = 1 + 0.35 * np.sin((3 + int(p.iris_turn * 5)) * angle + 20 * p.iris_ring) * (r > 0.5)
        inner = 0.55 * _ramp(p.iris_ring, 0.3, 0.9) * np.clip(1.6 - 2 * r, 0, 1)
        colour = iris[:, None, None] * (spokes * (0.75 + 0.6 * p.iris_light))
        colour += inner * np.float32([0.55, 0.32, 0.05])[:, None, None]
        fill(front, ball * _cover(s, (r - 1) * p.iris), colour, where)
        shade(front, ball * 0.6 * np.exp(-(((r - 0.95) * 6) ** 2)), where)
        fill(front, ball * _cover(s, (r - p.pupil) * p.iris), np.float32([0.03, 0.02, 0.02]), where)
        glint = _cover(s, np.sqrt((ru + 0.022) ** 2 + (v + 0.034) ** 2) - 0.016)
        fill(front, 0.9 * ball * glint, np.float32([1, 1, 1]), where)
        lash = _cover(s, np.abs(v - upper) - 0.010 - 0.012 * p.lashes * (1 - 0.5 * masculine))
        fill(front, 0.85 * lash * (np.abs(u) < p.eye_w + 0.02), hair * 0.25, where)
        shade(front, 0.30 * _cover(s, np.abs(v - lower) - 0.006) * (np.abs(u) < p.eye_w), where)
        where, u, v = at(sign * p.eye_x, p.eye_y - p.brow_gap, 0.24, 0.14)
        u = u * sign
        e = u * (1 / p.brow_length)
        curve = -p.brow_tilt * u - p.brow_arch * (1 - (e - 0.35) ** 2) * 1.2
        thick = max(p.brow_thick, 0.010) * (0.8 + 0.35 * masculine) * np.clip(1.15 - 0.55 * (e + 1) * 0.5, 0, 1)
        comb = 1 - (0.6 * p.brow_texture) * (np.sin(80 * u - 45 * (v - curve)) > 0.2)
        brow = _cover(s, np.abs(v - curve) - thick) * _cover(s, (np.abs(e) - 1) * p.brow_length)
        fill(front, 0.88 * brow * comb, brow_hair, where)

    # front hair: above the hairline, and at the sides
    height = yc - high * (0.58 + 0.18 * (p.hairline - 0.5) + 0.34 * thin)
    parting = (p.part - 0.5) * 1.2 * wide
    fringe = _ramp(p.fringe, 0.55, 0.9) * _ramp(length, 0.15, 0.35) * (1 - thin)
    straight = height + fringe * (p.eye_y - p.brow_gap + 0.02 - height)
    swept = height + (0.16 + 0.5 * (length > 0.4)) * np.minimum(((x - parting) / wide) ** 2, 1.2) * 0.5
    line = fringe * straight + (1 - fringe) * swept + 0.05 * (strands - 0.5)
    inside = (0.93 - 0.20 * _ramp(length, 0.45, 0.9) * (0.4 + 0.6 * p.volume)) * wide
    inside = inside + 0.06 * np.clip(y - 0.1, 0, 1)
    cap = np.maximum(_cover(s, y - line), _cover(s, (inside - ax)) * _cover(s, y - end))
    cap = cap * in_outer * (1 - bald) * (0.55 + 0.45 * _ramp(length, 0.10, 0.16))
    cap = cap * (1 - thin * 0.9 * _cover(s, y - (yc - 0.45 * high)))
    shine = 0.9 + 0.35 * bump(x * 0.4, y - (yc - 0.75 * high), 0.3, 0.16)
    fill(front, cap, locks * shine)
    shade(front, 0.30 * head * (1 - cap) * bump(x * 0, y - line - 0.02, 1, 0.035) * (1 - bald))
    front_alpha = np.maximum(front_alpha, cap)
    front *= front_alpha > 0

    if p.glasses > 0.74:
        _glasses(s, p, at, fill, front)

    # surface normals: an ellipsoid with a nose, brows, cheeks and a mouth; a cylinder below
    nx, ny = x / (wide * 1.12), (y - yc) / (high * 1.25)
    bare = 1 - cap  # hair hides the relief of the face
    nose = bump(x, y - p.nose_y + 0.04, 0.085, 0.16) * bare
    nx = nx + 1.1 * nose * (x / 0.085) - 0.25 * bare * cheeks * (ax - 0.27) / 0.13 * -np.sign(x)
    ny = ny + 0.7 * nose * (y - p.nose_y + 0.04) / 0.16 + 0.5 * bare * bump(
        ax - p.eye_x, y - p.eye_y + 0.10, 0.17, 0.05) * (y - p.eye_y + 0.10) / 0.05  # fmt: skip
    lower = np.clip((radius - 1.02) * 8, 0, 1) * (y > 0.35)
    nx = nx + lower * (0.75 * x - nx)
    ny = ny + lower * (-0.25 - ny)
    norm = 1 / np.sqrt(1 + 1.1 * (nx * nx + ny * ny))
    normals = np.stack([nx * norm, ny * norm, norm])
    gloss = 0.10 + 0.16 * cap

    styles = []
    for mask, light in s.clothes:
        show = (1 - front_alpha) * mask
        rgb = front * front_alpha + (1 - front_alpha - show) * back * back_alpha
        alpha = front_alpha + (1 - front_alpha) * np.maximum(mask, back_alpha)
        styles.append((np.concatenate([rgb, alpha[None]]), show * light))
    return _Person(
        looks=torch.from_numpy(np.stack([a for a, _ in styles]).astype(np.float32)),
        cloth=torch.from_numpy(np.stack([b for _, b in styles]).astype(np.float32)),
        normals=torch.from_numpy(normals.astype(np.float32)),
        hats=torch.from_numpy(_hats(s, p, volume)),
        gloss=torch.from_numpy(gloss.astype(np.float32)),
        bases=torch.from_numpy(_bases(s, p)),
        pivot=yc + high,
    )


def _scatter(s: SimpleNamespace, mx: Array, my: Array, size: Array, strength: Array) -> Array:
    """Round spots at (mx, my) [P], added into one map [A, A]."""
    n = math.ceil(0.05 / s.px)
    step = np.arange(-n, n + 1)
    cx, cy = ((m + s.reach) / s.px - 0.5 for m in (mx, my))
    ix, iy = np.rint(cx).astype(int)[:, None] + step, np.rint(cy).astype(int)[:, None] + step
    dx, dy = (ix - cx[:, None]) * s.px, (iy - cy[:, None]) * s.px
    d = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
    spots = np.clip(0.5 - (d - size[:, None, None]) / s.px, 0, 1) * strength[:, None, None]
    out = np.zeros((s.canvas, s.canvas), np.float32)
    np.maximum.at(out, (iy[:, :, None], ix[:, None, :]), spots.astype(np.float32))
    return out


def _glasses(s: SimpleNamespace, p: SimpleNamespace, at: Callable, fill: Callable, front: Array) -> None:
    """Frames round both eyes, bridge and temples; the glass is a little lighter."""
    colour = np.float32(_FRAMES[int(p.frame * 4.99)])
    rx, ry, rim = 0.165 + 0.03 * p.lens, 0.105 + 0.05 * p.rim, 0.012 + 0.016 * p.rim
    where, u, v = at(0, p.eye_y + 0.015, 0.62, 0.24)
    a = (np.abs(u) - p.eye_x) * (1 / rx)
    b = v * (1 / ry)
    k = 0.9 * p.lens  # from round to nearly rectangular
    d = (np.sqrt(np.maximum(a * a + b * b - k * a * a * b * b * (np.abs(a) < 1.2), 0)) - 1) * ry
    fill(front, 0.12 * _cover(s, d), np.float32([0.85, 0.92, 1.0]), where)
    lines = _cover(s, np.abs(d) - rim)
    lines = np.maximum(lines, _cover(s, np.maximum(np.abs(v + 0.02) - rim, np.abs(u) - p.eye_x + rx)))
    temples = np.maximum(np.abs(v + 0.03) - rim, np.maximum(p.eye_x + rx - np.abs(u), np.abs(u) - p.width))
    fill(front, 0.92 * np.maximum(lines, _cover(s, temples)), colour, where)


def _hats(s: SimpleNamespace, p: SimpleNamespace, volume: float) -> Array:
    """Headgear that fits this head. An instance may wear it, so that hair is no sure sign."""
    x, y, yc = s.x, s.y, -0.06
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
        return np.exp(-(((np.abs(x) if cx else x) - cx) / sx) ** 2 - ((y - cy) / sy) ** 2)

    depth = 0.52 * np.exp(-1.3 * ((x / (p.width * 1.1)) ** 2 + ((y + 0.06) / p.height) ** 2))
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
    s, n = _stage(faces.size), len(instances)
    normal, uniform = np.empty((n, 24), np.float32), np.empty((n, 28), np.float32)
    for i, instance in enumerate(instances):
        rng = _generator(faces.seed, identity, 1 + shifted, int(instance))
        normal[i] = rng.standard_normal(24, dtype=np.float32)
        uniform[i] = rng.random(28, dtype=np.float32)
    normal = normal.clip(-2.2, 2.2)
    c = _conditions(normal, uniform, shifted)
    v = {k: torch.from_numpy(np.ascontiguousarray(a)) for k, a in c.items()}

    def col(name: str, i: int | None = None) -> torch.Tensor:  # [N, 1, 1]
        return (v[name] if i is None else v[name][:, i])[:, None, None]

    # colour: cloth, Lambert's shading and a highlight, on the canvas
    style = torch.from_numpy((uniform[:, 0] * 6).astype(np.int64))
    canvas = person.looks[style]
    cloth = person.cloth[style]
    for i in np.flatnonzero(uniform[:, 20] < HATS):
        mask, light = person.hats[int(uniform[i, 20] * (3 / HATS))]
        canvas[i].mul_(1 - mask)
        canvas[i, 3] += mask
        cloth[i].mul_(1 - mask)
        for k in range(3):
            canvas[i, k] += light * v["hat"][i, k]
    nx, ny, nz = person.normals
    lambert = (nx * col("light", 0)).add_(ny * col("light", 1)).add_(nz * col("light", 2)).clamp_(0)
    spot = lambert * lambert
    spot = spot.mul_(spot).mul_(spot).mul_(person.gloss).mul_(canvas[:, 3]).mul_(col("highlight"))
    lambert.mul_(col("diffuse")).add_(col("ambient"))
    for k in range(3):
        canvas[:, k].add_(cloth * col("cloth", k)).mul_(lambert).add_(spot)

    # place: displacement on the canvas, affine to the image, one sampling
    b, d = person.bases, {k: col("move", k) for k in range(8)}
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
    place = torch.empty(n, s.size, s.size, 2, dtype=torch.float32)
    for k in range(2):
        place[..., k] = (s.ox * col("affine", 3 * k)).add_(s.oy * col("affine", 3 * k + 1))
        place[..., k] += col("affine", 3 * k + 2)
    place /= s.reach
    options: dict[str, Any] = dict(mode="bilinear", padding_mode="border", align_corners=False)
    grid = F.grid_sample(field, place, **options).permute(0, 2, 3, 1)
    face = F.grid_sample(canvas, grid, **options)

    # scene: background, colour temperature, noise
    pick = torch.from_numpy((uniform[:, 1:3] * 96).astype(np.int64))
    blend, glow = s.fields[pick[:, 0]], s.fields[pick[:, 1]]
    gap = 1 - face[:, 3]
    image = face[:, :3]
    noise = torch.empty_like(image)
    for i, (dx, dy) in enumerate((uniform[:, 3:5] * (2 * s.size)).astype(int)):
        noise[i] = s.noise[:, dy : dy + s.size, dx : dx + s.size]
    for k in range(3):
        scene = (blend * col("scene", k)).add_(glow * col("scene", k + 3)).add_(col("scene", k + 6))
        image[:, k].add_(scene.clamp_(0, 1).mul_(gap)).mul_(col("gain", k))
    grey = image[:, 0].add(image[:, 1]).add_(image[:, 2]).mul_(1 / 3).mul_(col("faded"))
    image.mul_(1 - col("faded")[:, None]).add_(grey[:, None])
    if shifted:
        image = _worsen(image, v)
    image = image.add(noise.mul_(v["noise"][:, None, None, None]))
    return image.mul_(255).round_().clamp_(0, 255).to(torch.uint8).numpy()


def _conditions(normal: Array, uniform: Array, shifted: bool) -> dict[str, Array]:
    """What an instance varies, from its draws [N, 24] and [N, 28]."""
    n, u = normal.T, uniform.T
    far = 1.5 if shifted else 1.0
    yaw = np.clip(0.20 * n[0], -0.44, 0.44)  # radians: 2 standard deviations are 23 degrees
    pitch = np.clip(0.11 * n[1], -0.25, 0.25)
    roll = 0.08 * n[2]
    zoom = 1 / (1.06 + 0.06 * n[3])
    cos, sin = np.cos(roll) * zoom, np.sin(roll) * zoom
    shift_x, shift_y = 0.05 * n[4], 0.05 * n[5] - 0.02
    aspect = 1 + 0.04 * n[16]
    affine = np.stack([cos * aspect, sin, -shift_x, -sin * aspect, cos, -shift_y], 1)

    side, above = 0.6 * far * n[6] - yaw, -0.30 * far * n[7] - 0.35
    length = np.sqrt(1 + side**2 + above**2)
    light = np.stack([side / length, above / length, 1 / length], 1)
    contrast = 0.30 + 0.55 * u[5] if not shifted else 0.65 + 0.45 * u[5]
    exposure = 1.0 + 0.16 * far * n[8]
    warm, green = 0.075 * far * n[9], 0.012 * n[10]
    gain = np.stack([1 + warm, 1 + green - 0.1 * warm, 1 - warm], 1) * exposure[:, None]

    smile, opening = 0.02 + 0.035 * n[11], 0.075 * np.clip(n[12] - 0.3, 0, 1)
    move = np.stack([np.sin(-yaw), 0.6 * smile, 0.035 * n[13], np.sin(pitch), smile, opening,
                     0.035 * n[14], 0.05 * np.clip(0.7 * n[15] - 0.2, -0.3, 1)], 1)  # fmt: skip

    def muted(value: Array, saturation: Array, hue: Array) -> Array:
        turn = 2 * math.pi * (hue[:, None] + np.array([0, 1 / 3, 2 / 3]))
        return value[:, None] * (1 + saturation[:, None] * np.cos(turn))

    scene = muted(0.10 + 0.75 * u[6], 0.35 * u[7], u[8])
    blend = muted(0.10 + 0.75 * u[9], 0.35 * u[10], u[11]) - scene
    glow = np.repeat(0.25 * (u[12, :, None] - 0.5), 3, 1)
    noise = 0.008 + 0.020 * u[13] if not shifted else 0.02 + 0.04 * u[13]
    out = dict(
        affine=affine, light=light, diffuse=contrast, ambient=1.06 - 0.85 * contrast,
        highlight=u[14] * 0.8, gain=gain, move=move, noise=noise,
        cloth=muted(0.12 + 0.75 * u[15], 0.6 * u[16], u[17]),
        scene=np.concatenate([blend, glow, scene], 1),
        hat=muted(0.12 + 0.70 * u[21], 0.6 * u[22], u[23]), faded=0.7 * u[24],
        blur=0.10 + 0.14 * u[18], levels=0.03 + 0.09 * u[19],
    )  # fmt: skip
    return {k: a.astype(np.float32) for k, a in out.items()}


def _worsen(image: torch.Tensor, v: dict[str, torch.Tensor]) -> torch.Tensor:
    """The shifted conditions: blur, then 8x8 block DCT coefficients rounded as a codec does."""
    n, _, size, _ = image.shape
    side = v["blur"][:, None, None, None]
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
    step = v["levels"][:, None, None, None, None, None] * torch.from_numpy(
        (1 + 0.5 * (k[:, None] + k)).astype(np.float32)
    )
    x = image.view(n, 3, blocks, 8, blocks, 8).transpose(3, 4)
    for _ in range(2):
        x = _along_rows(x, forward).transpose(4, 5)
    x = (x / step).round_() * step
    for _ in range(2):
        x = _along_rows(x, backward).transpose(4, 5)
    return x.transpose(3, 4).reshape(n, 3, 8 * blocks, 8 * blocks)[..., :size, :size]


def _along_rows(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """matrix [8, 8] times the last axis of x, in an order of sums that never changes."""
    out = x[..., 0:1] * matrix[:, 0]
    for k in range(1, 8):
        out += x[..., k : k + 1] * matrix[:, k]
    return out


def render(
    faces: Faces,
    identities: Sequence[int] | Array,
    instances: Sequence[int] | Array,
    *,
    shifted: bool = False,
    workers: int = 0,
) -> Array:
    """Images uint8 [N, 3, size, size] RGB of the paired lists identities [N] and instances [N].

    An image depends on ``faces``, its identity, its instance and ``shifted`` only. ``workers``
    threads share the identities (0: the calling thread). Raises ValueError for lists of unequal
    length or negative numbers.
    """
    who, which = np.asarray(identities, np.int64), np.asarray(instances, np.int64)
    if who.ndim != 1 or who.shape != which.shape:
        raise ValueError(f"identities {who.shape} and instances {which.shape} must be paired lists")
    if who.size and (who.min() < 0 or which.min() < 0):
        raise ValueError("identity and instance numbers must not be negative")
    out = np.empty((len(who), 3, faces.size, faces.size), np.uint8)
    order = np.argsort(who, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(who[order])) + 1) if len(who) else []
    _stage(faces.size)  # made once, before threads ask for it

    def one(group: Array) -> None:
        identity = int(who[group[0]])
        person = _person(faces, identity)
        for i in range(0, len(group), CHUNK):
            part = group[i : i + CHUNK]
            out[part] = _draw(faces, person, identity, which[part], shifted)

    if workers < 2:
        for group in groups:
            one(group)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, groups))
    return out


# -------------------------------------------------------------------------- splits and protocols


def split(
    faces: Faces,
    name: Literal["train", "development", "test", "shifted"],
    identities: int,
    instances: int,
    *,
    cache: Path,
    progress: bool = True,
) -> tuple[Array, Array]:
    """Pixels uint8 [N, 3, S, S] (memory-mapped, read-only) and labels int64 [N], 0..identities-1.

    Ordered by identity, then instance. Identities of train, development and test are disjoint;
    shifted shows the test identities in other light, with noise, blur and compression artefacts.
    Rendered once for each (VERSION, faces, name, identities, instances) into ``cache``; a damaged
    file is rendered again. Raises ValueError for an unknown name or a number out of range, OSError
    when the cache cannot be written.
    """
    if name not in FIRST:
        raise ValueError(f"unknown split {name!r}; there are {', '.join(FIRST)}")
    _check_count("identities", identities, RANGE)
    _check_count("instances", instances, RANGE)
    parameters = dict(
        version=VERSION, **asdict(faces), split=name, identities=identities, instances=instances
    )

    def write(file: IO[bytes]) -> None:
        shape = (identities * instances, 3, faces.size, faces.size)
        np.lib.format.write_array_header_1_0(
            file, dict(descr="|u1", fortran_order=False, shape=shape)
        )
        for who, which in _batches(identities, instances, name, progress):
            pixels = render(
                faces, who + FIRST[name], which, shifted=name == "shifted", workers=WORKERS
            )
            file.write(pixels.data)

    path = _cached(Path(cache), f"procedural-{_key(parameters)}-{name}.npy", parameters, write)
    return np.load(path, mmap_mode="r"), np.repeat(np.arange(identities), instances)


@dataclass(frozen=True)
class Native:
    """Images at their own small sizes, for open-set identification."""

    images: list[Array]  # uint8 [3, h, w], 6..60 px a side
    ids: Array  # int64 [N]; -1 for unmated
    role: Array  # str [N]: "gallery", "mated" or "unmated"


def native(
    faces: Faces,
    identities: int,
    unmated: int,
    per_identity: int,
    *,
    cache: Path,
    progress: bool = True,
) -> Native:
    """Native-LR faces: ``identities`` people with ``per_identity`` images, ``unmated`` strangers.

    Half of a person's images (the larger half) are gallery, the others mated probes; a stranger
    has one image, an unmated probe, which is never in the gallery. Sizes are log-normal, 6..60 px,
    with a mean of about 24 wide x 20 high, as in QMUL-SurvFace (Cheng et al. 2018). Pictures are
    drawn at ``faces.size`` (at least 64), cropped to their shape and reduced by antialiased
    bicubic interpolation. Raises ValueError for a number out of range, OSError as ``split`` does.
    """
    _check_count("identities", identities, RANGE)
    _check_count("unmated", unmated, RANGE - identities, least=0)
    _check_count("per_identity", per_identity, RANGE, least=2)
    sharp = Faces(**{**asdict(faces), "size": max(faces.size, 64)})
    parameters = dict(
        version=VERSION, **asdict(sharp), split="native", identities=identities, unmated=unmated,
        per_identity=per_identity,
    )  # fmt: skip
    galleries = (per_identity + 1) // 2

    def write(file: IO[bytes]) -> None:
        images: list[Array] = []
        plan = [(identities, per_identity, 0), (unmated, 1, identities)]
        for people, each, first in plan:
            for who, which in _batches(people, each, "native", progress):
                who = who + NATIVE_FIRST + first
                pixels = render(sharp, who, which, workers=WORKERS)
                images += [
                    _reduce(sharp, *pair) for pair in zip(pixels, who, which, strict=True)
                ]
        np.savez(
            file,
            pixels=np.concatenate([i.ravel() for i in images]),
            shapes=np.array([i.shape for i in images]),
        )

    path = _cached(Path(cache), f"procedural-{_key(parameters)}-native.npz", parameters, write)
    with np.load(path) as stored:
        pixels, shapes = stored["pixels"], stored["shapes"]
    ends = np.cumsum(shapes.prod(1))[:-1]
    images = [p.reshape(s) for p, s in zip(np.split(pixels, ends), shapes, strict=True)]
    roles = (["gallery"] * galleries + ["mated"] * (per_identity - galleries)) * identities
    return Native(
        images=images,
        ids=np.concatenate([np.repeat(np.arange(identities), per_identity), np.full(unmated, -1)]),
        role=np.array(roles + ["unmated"] * unmated),
    )


def _reduce(faces: Faces, image: Array, identity: int, instance: int) -> Array:
    """One picture [3, S, S] at a native size [3, h, w]."""
    a, b = _generator(faces.seed, int(identity), 3, int(instance)).standard_normal(2)
    width = 22.6 * math.exp(0.36 * a)
    height = 0.83 * width * math.exp(0.10 * b)
    w, h = (min(max(round(v), 6), 60) for v in (width, height))
    size = faces.size
    high, wide = (min(size, round(size * r)) for r in (h / w, w / h))
    top, left = (size - high) * 2 // 5, (size - wide) // 2  # the head is above the middle
    crop = torch.from_numpy(image[:, top : top + high, left : left + wide].astype(np.float32))
    small = F.interpolate(crop[None], size=(h, w), mode="bicubic", antialias=True)[0]
    return small.round_().clamp_(0, 255).to(torch.uint8).numpy()


def pairs(
    labels: Sequence[int] | Array, count: int = 6000, folds: int = 10, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Verification pairs: indices first [P], second [P] and same [P] (bool), P = count.

    As in LFW's view 2 (Huang et al. 2007): fold k is pairs k P/folds..(k+1) P/folds, half of each
    fold is of the same identity, no identity is in two folds, and no pair comes twice. Raises
    ValueError when the labels cannot give that many.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or folds < 1 or count < 1 or count % (2 * folds):
        raise ValueError(f"labels must be a list, and count ({count}) a multiple of 2 x folds ({folds})")
    rng = np.random.Generator(np.random.Philox(key=[seed, 21]))
    half = count // folds // 2
    parts = np.array_split(rng.permutation(np.unique(labels)), folds)
    first, second = [], []
    for k, people in enumerate(parts):
        members = [np.flatnonzero(labels == i) for i in people]
        mates = [np.stack(np.triu_indices(len(m), 1), 1) for m in members]
        mated = np.concatenate([m[t] for m, t in zip(members, mates, strict=True)] or [np.empty((0, 2), int)])
        here = np.concatenate(members or [np.empty(0, int)])
        possible = len(here) * (len(here) - 1) // 2 - len(mated)
        if min(len(mated), possible) < half:
            raise ValueError(
                f"fold {k + 1} of {folds} needs {half} pairs of each kind, but its {len(people)} "
                f"identities give {len(mated)} same and {possible} different; ask for fewer pairs "
                "or give more images"
            )
        mated = mated[rng.choice(len(mated), half, replace=False)]
        other: dict[tuple[int, int], None] = {}  # ordered, so that the draw is reproducible
        while len(other) < half:
            for i, j in np.sort(rng.choice(here, (4 * half, 2)), axis=1).tolist():
                if labels[i] != labels[j] and len(other) < half:
                    other[i, j] = None
        both = np.concatenate([mated, np.array(list(other))])
        first.append(both[:, 0])
        second.append(both[:, 1])
    same = np.tile(np.repeat([True, False], half), folds)
    return np.concatenate(first), np.concatenate(second), same


def gallery_probes(labels: Sequence[int] | Array) -> tuple[Array, Array]:
    """Closed-set identification: the first image of each identity [C] and all others [N - C]."""
    labels = np.asarray(labels)
    gallery = np.sort(np.unique(labels, return_index=True)[1])
    return gallery, np.setdiff1d(np.arange(len(labels)), gallery)


def _check_count(what: str, value: int, most: int, least: int = 1) -> None:
    if not least <= value <= most:
        raise ValueError(f"{what} is {value}; give {least} to {most}")


# --------------------------------------------------------------------------------------- cache

WORKERS = min(2, os.cpu_count() or 1)  # threads a split is drawn with; more hardly help


def _batches(
    identities: int, instances: int, name: str, progress: bool
) -> Iterator[tuple[Array, Array]]:
    """Identities [n] and instances [n] in order, some whole identities at a time, with progress."""
    step = max(1, 512 // instances)
    terminal = sys.stderr.isatty()
    start = said = time.monotonic()
    with tqdm(total=identities * instances, desc=f"drawing {name} faces", unit="image",
              disable=not (progress and terminal)) as bar:  # fmt: skip
        for first in range(0, identities, step):
            who = np.arange(first, min(first + step, identities))
            yield np.repeat(who, instances), np.tile(np.arange(instances), len(who))
            bar.update(len(who) * instances)
            if progress and not terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                done = (first + len(who)) / identities
                left = (said - start) * (1 - done) / done
                print(f"drawing {name} faces: {done:.0%}, {left:.0f} s left", file=sys.stderr)


def _key(parameters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def _cached(
    cache: Path, name: str, parameters: dict[str, Any], write: Callable[[IO[bytes]], None]
) -> Path:
    """The file cache/name, written if it is missing or not what its JSON sidecar says."""
    path, sidecar = cache / name, cache / f"{name}.json"
    if path.exists():
        fault = _fault(path, sidecar, parameters)
        if not fault:
            return path
        print(f"{path}: {fault}; drawing it again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as (file, temporary):
        write(file)
        file.flush()
        described = dict(parameters=parameters, **_fingerprint(temporary))
    with _replacing(sidecar) as (file, _):
        file.write(json.dumps(described, indent=1).encode())
    return path


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(bytes=path.stat().st_size, sha256=digest)


def _fault(path: Path, sidecar: Path, parameters: dict[str, Any]) -> str:
    """What is wrong with a cached file; empty if nothing is."""
    try:
        said = json.loads(sidecar.read_bytes())
    except (OSError, ValueError):
        return "its description is missing or damaged"
    if said != dict(parameters=parameters, **_fingerprint(path)):
        return "it is not what its description says (damaged or cut short)"
    return ""


@contextmanager
def _replacing(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A temporary file in path's folder that becomes path when the block ends well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


# ----------------------------------------------------------------------------------------- sheet


def sheet(faces: Faces, name: str, identities: int, instances: int, lr: int) -> Array:
    """Contact sheet uint8 [rows, columns, 3]: HR at the left, the same at ``lr`` at the right."""
    who = np.repeat(np.arange(identities), instances) + FIRST[name]
    pixels = render(
        faces, who, np.tile(np.arange(instances), identities), shifted=name == "shifted"
    )
    small = F.interpolate(
        torch.from_numpy(pixels).float(), size=lr, mode="bicubic", antialias=True
    )
    small = F.interpolate(small.round_().clamp_(0, 255), size=faces.size, mode="nearest")
    halves = [pixels, small.to(torch.uint8).numpy()]
    shape = (identities, instances, 3, faces.size, faces.size)
    both = [h.reshape(shape).transpose(0, 3, 1, 4, 2) for h in halves]
    rows = identities * faces.size
    return np.concatenate([h.reshape(rows, instances * faces.size, 3) for h in both], axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.data.procedural", description=sheet.__doc__)
    parser.add_argument("--sheet", type=Path, required=True, metavar="OUT.png")
    parser.add_argument("--split", choices=tuple(FIRST), default="train")
    defaults = Faces()
    for option, value in (("size", 64), ("identities", 8), ("instances", 8), ("lr", 16), ("seed", 0)):
        parser.add_argument(f"--{option}", type=int, default=value)
    for option in ("coarse", "fine"):
        parser.add_argument(f"--{option}", type=float, default=getattr(defaults, option))
    a = parser.parse_args(arguments)
    try:
        faces = Faces(size=a.size, seed=a.seed, coarse=a.coarse, fine=a.fine)
        _check_count("--identities", a.identities, 200)
        _check_count("--instances", a.instances, 100)
        _check_count("--lr", a.lr, a.size)
        picture = sheet(faces, a.split, a.identities, a.instances, a.lr)
        from matplotlib.image import imsave  # only the sheet needs it

        imsave(a.sheet, picture)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
