"""How a procedural object is drawn; `shared.data.procedural` makes data of them. No download.

Fine-grained classes by shape and texture: leaves, pots, beetles and moths. `SPECIES` classes that
follow each other are the species of one genus. The genus fixes what survives at 16x16 (kind,
outline, limbs, main colours; ``coarse`` is how far genera differ), the species what only the full
image shows (pattern, veins, teeth, bands, marks; ``fine`` is how far species differ).

    class -> numbers -> RGBA canvas 1.25 times the output, surface normals
    instance -> light, turn, scale, shear, background, colour temperature, noise -> uint8

Light, backgrounds, noise, the shifted conditions and the reasons why an image alone has the same
bits as in any batch are those of faces: `shared.data.portrait`, which has the coordinates too. The
Philox key of a class's own numbers is (seed, class), that of its genus (seed, genus).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from shared.data.portrait import (
    CHUNK,
    Array,
    Family,
    along,
    columns,
    conditions,
    draws,
    generator,
    photograph,
    place,
    ramp,
    rgb,
    sample,
    scatter,
    shade,
    stage,
)

VERSION = 1  # raised whenever a pixel changes

SPECIES = 5  # classes of a genus
GENUS, SPECIMEN = 4, 5  # streams of the generator; portrait has the others

# about uniform on [0, 1] at the default knobs, 1/2 at knob 0
_COARSE = ("kind", "width", "height", "waist", "shoulder", "tip", "limbs", "main", "second")
_FINE = ("pattern", "period", "turn", "ink", "strength", "veins", "slant", "teeth", "depth",
         "band", "bands", "spot", "spot_at")  # fmt: skip
_MARKS = 7

_LEAVES = [(0.10, 0.30, 0.14), (0.24, 0.48, 0.14), (0.48, 0.62, 0.20), (0.80, 0.68, 0.18),
           (0.80, 0.40, 0.12), (0.58, 0.14, 0.14)]  # fmt: skip
_CLAYS = [(0.60, 0.28, 0.16), (0.82, 0.56, 0.36), (0.90, 0.86, 0.76), (0.38, 0.56, 0.50),
          (0.18, 0.36, 0.62), (0.24, 0.22, 0.26)]  # fmt: skip
_WINGCASES = [(0.22, 0.20, 0.24), (0.10, 0.40, 0.26), (0.14, 0.32, 0.60), (0.50, 0.18, 0.46),
              (0.76, 0.16, 0.12), (0.88, 0.54, 0.12)]  # fmt: skip
_WINGS = [(0.90, 0.86, 0.72), (0.88, 0.66, 0.22), (0.80, 0.36, 0.14), (0.48, 0.32, 0.22),
          (0.40, 0.42, 0.50), (0.26, 0.46, 0.70)]  # fmt: skip
_INKS = [(0.07, 0.05, 0.06), (0.45, 0.08, 0.08), (0.95, 0.90, 0.78), (0.92, 0.70, 0.15),
         (0.10, 0.16, 0.42)]  # fmt: skip


class Objects(Family):
    """Procedural leaves, pots, beetles and moths."""

    SIZES: ClassVar = (8, 256)

    def draw(self, shifted: bool, task: tuple[int, Array]) -> Array:
        number, instances = task
        thing = _thing(self, number)
        parts = [instances[i : i + CHUNK] for i in range(0, len(instances), CHUNK)]
        return np.concatenate([_draw(self, thing, number, part, shifted) for part in parts])


# ------------------------------------------------------------------------------------ one class


@dataclass
class _Thing:
    """What the instances of one class are made from; A = canvas."""

    look: torch.Tensor  # [4, A, A] premultiplied RGB and alpha
    normals: torch.Tensor  # [3, A, A] surface normals, z towards the camera
    gloss: torch.Tensor  # [] strength of the highlight


def _numbers(objects: Objects, number: int) -> SimpleNamespace:
    """The class's numbers, all about uniform on [0, 1] at the default knobs."""
    genus = generator(objects.seed, number // SPECIES, GENUS, 0)
    species = generator(objects.seed, number, SPECIMEN, 0)
    p: dict[str, Any] = {}
    for names, rng, knob in (
        (_COARSE, genus, 1.7 * objects.coarse),
        (_FINE, species, 0.72 * objects.fine),
    ):
        for name, g in zip(names, rng.standard_normal(len(names)), strict=True):
            p[name] = 0.5 + 0.5 * math.erf(knob * g / math.sqrt(2))
    p["marks"] = 0.72 * objects.fine * species.standard_normal(_MARKS)
    p["points"] = species.random((_MARKS, 3))
    return SimpleNamespace(**p)


class _Painter:
    """The numbers, the stage and the canvas that the parts of an object are painted on."""

    def __init__(self, s: SimpleNamespace, p: SimpleNamespace) -> None:
        self.s, self.p = s, p
        self.x, self.y, self.ax = s.x, s.y, np.abs(s.x)
        self.look = np.zeros((4, s.canvas, s.canvas), np.float32)

    def inked(self, ground: Array) -> Array:
        """The genus's ink [3], clearly lighter or darker than what it is on."""
        ink, light = along(_INKS, self.p.second), float(ground.mean())
        if abs(float(ink.mean()) - light) > 0.35:
            return ink
        wanted = light + (0.35 if light < 0.45 else -0.35)
        return np.clip(ink * np.float32(wanted / float(ink.mean())), 0, 1)

    def cover(self, d: Array) -> Array:
        """Share of a pixel inside a shape, from its signed distance (negative inside)."""
        return np.clip(0.5 - d * (1 / self.s.px), 0, 1)

    def over(self, mask: Array, colour: Array) -> None:
        """A layer of a colour [3] on top of all so far."""
        self.look *= 1 - mask
        self.look[:3] += mask * colour[:, None, None]
        self.look[3] += mask

    def tint(self, mask: Array, colour: Array) -> None:
        """Paint on what is there."""
        self.look[:3] += mask * (colour[:, None, None] * self.look[3] - self.look[:3])

    def ellipse(self, u: Array, v: Array, ru: float, rv: float) -> Array:
        """About the signed distance to an ellipse round the origin."""
        return (np.sqrt((u * (1 / ru)) ** 2 + (v * (1 / rv)) ** 2) - 1) * min(ru, rv)

    def limb(self, *points: tuple[float, float], thick: float) -> Array:
        """Signed distance to a pair of bent limbs through points (|x|, y)."""
        out = np.full_like(self.x, 9)
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            dx, dy = x1 - x0, y1 - y0
            u, v = self.ax - x0, self.y - y0
            t = np.clip((u * dx + v * dy) * (1 / (dx * dx + dy * dy)), 0, 1)
            out = np.minimum(out, np.sqrt((u - t * dx) ** 2 + (v - t * dy) ** 2))
        return out - thick

    def pattern(self, a: Array, b: Array) -> Array:
        """Where ink is, 0..1, on surface coordinates (across, along); soft over about a pixel, so
        that it fades where a period is no more than that."""
        p = self.p
        period = 0.13 * 1.7**p.period
        k = 2 * math.pi / period
        kind = min(int(p.pattern * 7), 6)
        angle = (p.turn - 0.5) * (2.4 if kind in (0, 3, 4) else 1.2)
        u = k * (math.cos(angle) * a + math.sin(angle) * b)
        v = k * (math.cos(angle) * b - math.sin(angle) * a)
        if kind == 0:  # stripes
            height = np.sin(v)
        elif kind == 1:  # dots
            height = np.sin(u) + np.sin(v) - 0.7
        elif kind == 2:  # checks
            height = 1.4 * np.sin(0.7 * u) * np.sin(0.7 * v)
        elif kind == 3:  # zigzag
            height = np.sin(v + 1.3 * np.arcsin(0.98 * np.sin(0.7 * u)))
        elif kind == 4:  # waves
            height = np.sin(u + 1.6 * np.sin(0.5 * v))
        elif kind == 5:  # rings
            height = np.sin(k * np.sqrt(a * a + (b - 0.5 * (p.turn - 0.5)) ** 2))
        else:  # net
            height = 1.2 * np.maximum(np.sin(0.7 * u), np.sin(0.7 * v)) - 0.9
        sharp = 0.25 * period / self.s.px
        strength = (0.63 + 0.3 * p.strength) * ramp(sharp, 0.2, 0.5)
        return strength * np.clip(0.5 + (height - 0.5 * (p.ink - 0.5)) * sharp, 0, 1)

    def marks(
        self, inside: Array, ground: Array, reach: tuple[float, float], middle: float
    ) -> None:
        """Small spots; which there are, and where, is the species's own."""
        a, b, size = self.p.points.T
        strength = np.clip(2.0 * (self.p.marks - 0.15), 0, 0.9)
        across, down = (a - 0.5) * 2 * reach[0], middle + (b - 0.5) * 2 * reach[1]
        spots = scatter(self.s, across, down, 0.026 + 0.024 * size, strength)
        dark = float(ground.mean()) < 0.35
        self.tint(spots * inside, rgb(0.97, 0.95, 0.88) if dark else rgb(0.06, 0.04, 0.05))

    def lines(self, across: Array, period: float, thick: float) -> Array:
        """Thin lines, one a period."""
        return self.cover(np.abs((across * (1 / period)) % 1 - 0.5) * period - thick)


Drawn = tuple[Array, Array, float]  # slopes of the surface nx, ny [A, A], and its gloss


def _leaf(c: _Painter) -> Drawn:
    """Outline t^a (1 - t)^b with lobes (genus) and teeth; midrib and veins."""
    p, x, y = c.p, c.x, c.y
    high, wide = 0.60 + 0.10 * p.height, 0.24 + 0.34 * p.width
    t = np.clip((y[:, :1] + high + 0.08) * (1 / (2 * high)), 1e-4, 1 - 1e-4)  # 0: tip; [A, 1]
    a, b = 0.55 + 0.8 * p.tip, 0.45 + 0.6 * p.shoulder
    w = wide * (t / (a / (a + b))) ** a * ((1 - t) / (b / (a + b))) ** b
    lobes = ramp(p.waist, 0.55, 0.9)
    w = w * (1 + 0.34 * lobes * np.sin((5 + int(3 * p.limbs)) * math.pi * t))
    slope = np.sqrt(1 + np.clip(np.gradient(w[:, 0])[:, None] / c.s.px, -2, 2) ** 2)
    w = w * (1 - (0.02 + 0.22 * p.depth) * (t * (7 + int(p.teeth * 16)) % 1))
    d = np.maximum((c.ax - w) / slope, np.abs(y + 0.08) - high)
    green = along(_LEAVES, p.main)
    stalk = np.maximum(np.abs(x - 0.10 * (y - high) ** 2) - 0.022, np.abs(y - high - 0.02) - 0.16)
    c.over(c.cover(stalk), green * np.float32(0.7))
    inside = c.cover(d)
    c.over(inside, green)
    rib = c.inked(green) * np.float32(0.6) + green * np.float32(0.4)
    c.tint(inside * c.pattern(c.ax, y), rib)
    period = 0.10 + 0.16 * p.veins
    rise = y + (0.3 + 1.1 * p.slant) * c.ax
    vein = green * np.float32(0.45) + rgb(0.40, 0.42, 0.26)
    c.tint(inside * (0.75 * c.lines(rise, period, 0.010)), vein)
    c.tint(inside * (0.9 * c.cover(c.ax - 0.014)), vein)
    c.marks(inside, green, (0.6 * wide, 0.6 * high), -0.05)
    fold = np.sign(x) * -0.35 + x * (0.9 / wide)
    return fold + 1.2 * (np.sin(rise * (2 * math.pi / period)) * 0.12), 0.3 * y, 0.10


def _pot(c: _Painter) -> Drawn:
    """A solid of revolution: lip, neck, shoulder, belly, foot; handles (genus); painted bands."""
    p, y = c.p, c.y
    high, wide = 0.46 + 0.16 * p.height, 0.30 + 0.24 * p.width
    neck, belly = wide * (0.25 + 0.65 * p.waist), -0.35 + 0.7 * p.shoulder
    lip, foot = neck + 0.03 + 0.14 * p.tip, wide * (0.40 + 0.30 * (1 - p.shoulder))
    at = [-high, -high + 0.04, -high + 0.05 + 0.10 * (1 + p.tip), belly * high, high - 0.03, high]
    w = _through(y[:, :1], at, [lip, lip, neck, wide, foot, foot])
    slope = np.sqrt(1 + np.clip(np.gradient(w[:, 0])[:, None] / c.s.px, -2, 2) ** 2)
    d = np.maximum((c.ax - w) / slope, np.abs(y) - high)
    clay = along(_CLAYS, p.main)
    ink = c.inked(clay)
    if abs(p.limbs - 0.5) > 0.15:  # a jug's one handle, or two
        side = c.ax if p.limbs > 0.5 else c.x
        ring = c.ellipse(side - 0.75 * wide - 0.02, y + 0.12, 0.26, 0.24)
        c.over(c.cover(np.abs(ring) - 0.038), clay * np.float32(0.8))
    inside = c.cover(d)
    c.over(inside, clay)
    u = np.clip(c.x / w, -0.999, 0.999)
    around = np.arcsin(u) * wide
    middle, half = (p.band - 0.5) * 0.7 * high, 0.10 + 0.30 * p.bands
    band = c.cover(np.abs(y - middle) - half) * inside
    c.tint(band * c.pattern(around, y - middle), ink)
    edge = np.abs(np.abs(y - middle) - half - 0.03)
    c.tint(inside * (0.8 * c.cover(edge - 0.012 - 0.012 * p.depth)), ink)
    grooves = c.lines(y, 0.06 + 0.10 * p.veins, 0.010)
    c.tint((inside - band) * (0.35 * p.teeth * grooves), clay * np.float32(0.4))
    rim = c.ellipse(c.x, y + high, lip, 0.055)
    c.over(c.cover(rim), clay * np.float32(0.55))
    c.tint(c.cover(np.abs(rim) - 0.015), clay * np.float32(1.1))
    c.marks(inside, clay, (0.6 * wide, 0.7 * high), 0.05)
    return 1.3 * u, 0.5 * y, 0.30


def _beetle(c: _Painter) -> Drawn:
    """Wing cases with a seam, thorax, head, six legs, feelers or horns."""
    p, y = c.p, c.y
    wide, high = 0.27 + 0.18 * p.width, 0.36 + 0.12 * p.height
    shell = along(_WINGCASES, p.main)
    ink = c.inked(shell)
    dark = shell * np.float32(0.35) + rgb(0.03, 0.02, 0.03)
    long = 0.14 + 0.26 * p.limbs
    for y0, y1, y2 in ((-0.20, -0.34, -0.50), (0.05, 0.06, 0.20), (0.28, 0.40, 0.66)):
        knee = (wide + 0.6 * long, y1)
        c.over(c.cover(c.limb((0.1, y0), knee, (wide + long, y2), thick=0.022)), dark)
    top = 0.16 - high  # where the wing cases begin
    feelers = c.limb((0.05, top - 0.3), (0.12 + 0.2 * p.tip, top - 0.46),
                     (0.06 + 0.42 * p.tip, top - 0.50), thick=0.016)  # fmt: skip
    c.over(c.cover(feelers), dark)
    c.over(c.cover(c.ellipse(c.x, y - top + 0.25, 0.12 + 0.08 * p.shoulder, 0.13)), dark)
    thorax = c.cover(c.ellipse(c.x, y - top + 0.06, wide * (0.55 + 0.4 * p.waist), 0.19))
    c.over(thorax, shell * np.float32(0.45) + ink * np.float32(0.30))
    d = c.ellipse(c.x, y - 0.18, wide, high)
    case = c.cover(np.maximum(d, top + 0.07 - y))
    c.over(case, shell)
    c.tint(case * c.pattern(c.ax, y - 0.1), ink)
    rows = c.lines(c.ax + 0.4 * (p.slant - 0.5) * y, 0.06 + 0.08 * p.veins, 0.012)
    c.tint(case * (0.5 * p.teeth * rows), dark)
    middle, half = 0.15 + (p.band - 0.5) * 0.5, 0.02 + 0.05 * p.bands
    c.tint(case * (p.depth * c.cover(np.abs(y - middle) - half)), dark)
    c.tint(case * c.cover(c.ax - 0.012), dark)
    c.tint(case * (0.6 * c.cover(np.abs(d) - 0.02)), dark)
    c.marks(np.maximum(case, thorax), shell, (0.7 * wide, 0.9 * high), 0.12)
    return c.x * (1.5 / wide), (y - 0.1) * (1.1 / high), 0.50


def _moth(c: _Painter) -> Drawn:
    """Two pairs of wings, the species's bands, margins and eyespots on them; body and feelers."""
    p, x, y = c.p, c.x, c.y
    wing = along(_WINGS, p.main)
    dark = wing * np.float32(0.25) + rgb(0.04, 0.03, 0.03)
    c.over(c.cover(c.limb((0.02, -0.30), (0.10, -0.5), (0.12 + 0.2 * p.tip, -0.62), thick=0.015)),
           dark)  # fmt: skip
    a1 = 0.35 + 0.5 * p.height
    fore = c.ellipse(*_turned(c.ax - 0.36, y + 0.20, -a1), 0.40, 0.16 + 0.12 * p.width)
    a2, long, wide = 0.5 + 0.6 * p.shoulder, 0.26 + 0.14 * p.limbs, 0.15 + 0.1 * p.waist
    hind = c.ellipse(*_turned(c.ax - 0.26, y - 0.24, a2), long, wide)
    scallop = (0.004 + 0.016 * p.depth) * np.sin((30 + 40 * p.teeth) * (y - 0.3 * c.ax))
    d = np.minimum(fore, hind) + scallop
    for part, tone in ((hind + scallop, 0.82), (fore + scallop, 1.0)):
        c.over(c.cover(part), wing * np.float32(tone))
        c.tint(c.cover(np.abs(part) - 0.014), dark)
    inside = c.cover(d)
    r = np.sqrt(c.ax**2 + (y + 0.05) ** 2)
    turned = np.arctan2(y + 0.05, c.ax + 0.05) * 0.45
    c.tint(inside * c.pattern(turned, r), c.inked(wing))
    edge = 0.03 + 0.06 * p.bands
    c.tint(inside * (0.8 * p.band * c.cover(np.abs(d + edge) - 0.012)), dark)
    spoke = 0.10 + 0.10 * p.veins
    veins = np.abs((turned * (1 / spoke)) % 1 - 0.5) * (spoke * 2.2) * r
    c.tint(inside * (0.45 * p.slant * c.cover(veins - 0.008)), dark)
    at, size = 0.28 + 0.24 * p.spot_at, 0.09 * ramp(p.spot, 0.35, 1.0)
    for sy in (-0.22, 0.24):
        ring = np.sqrt((c.ax - at) ** 2 + (y - sy) ** 2) - size
        if size > 0:
            c.tint(inside * c.cover(ring), dark)
            c.tint(inside * c.cover(np.abs(ring + 0.5 * size) - 0.2 * size), rgb(0.95, 0.86, 0.5))
    c.marks(inside, wing, (0.55, 0.40), 0.0)
    c.over(c.cover(c.ellipse(x, y - 0.04, 0.055, 0.32)), dark)
    rise = np.sign(x) * -0.25
    return rise + 6 * x * np.exp(-((x * 12) ** 2)), 0.2 * y, 0.05


KINDS: tuple[Callable[[_Painter], Drawn], ...] = (_leaf, _pot, _beetle, _moth)


def _turned(u: Array, v: Array, angle: float) -> tuple[Array, Array]:
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * u + sin * v, cos * v - sin * u


def _through(y: Array, at: list[float], value: list[float]) -> Array:
    """A smooth curve through (at, value), flat at each of them."""
    out = np.full_like(y, value[0])
    for y0, y1, v0, v1 in zip(at, at[1:], value, value[1:], strict=False):
        t = np.clip((y - y0) * (1 / (y1 - y0)), 0, 1)
        out = out + (v1 - v0) * t * t * (3 - 2 * t)
    return out


def _thing(objects: Objects, number: int) -> _Thing:
    s, p = stage(objects.size), _numbers(objects, number)
    c = _Painter(s, p)
    nx, ny, gloss = KINDS[min(int(p.kind * len(KINDS)), len(KINDS) - 1)](c)
    nz = 1 / np.sqrt(1 + nx * nx + ny * ny)
    return _Thing(
        look=torch.from_numpy(c.look),
        normals=torch.from_numpy(np.stack([nx * nz, ny * nz, nz]).astype(np.float32)),
        gloss=torch.tensor(gloss, dtype=torch.float32),
    )


# ------------------------------------------------------------------------------------ instances


def _draw(objects: Objects, thing: _Thing, number: int, instances: Array, shifted: bool) -> Array:
    """Instances [N] of one class as uint8 [N, 3, S, S]."""
    s = stage(objects.size)
    normal, uniform = draws(objects, number, instances, shifted)
    c = conditions(normal, uniform, shifted)
    v = columns({**c, "affine": _pose(normal), "faded": c["faded"] * np.float32(0.5)})
    canvas = thing.look.repeat(len(instances), 1, 1, 1)
    shade(canvas, thing.normals, thing.gloss, v)
    return photograph(s, sample(canvas, place(s, v)), v, uniform, shifted)


def _pose(normal: Array) -> Array:
    """Turn, scale, shear and shift [N, 6] from the draws [N, 24]; exactly rounded operations."""
    n = normal.T
    sin = 0.09 * n[17]  # up to 11 degrees
    cos = np.sqrt(1 - sin * sin)
    wide, high = 1 / (1.0 + 0.05 * n[18] + 0.03 * n[19]), 1 / (1.0 + 0.05 * n[18] - 0.03 * n[19])
    shear = 0.05 * n[20]
    affine = np.stack([cos * wide, (sin + shear * cos) * wide, -0.03 * n[21],
                       -sin * high, (cos - shear * sin) * high, -0.03 * n[22]], 1)  # fmt: skip
    return affine.astype(np.float32)
