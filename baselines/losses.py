"""One function for each method that the papers' tables compare with.

e_s, e_t: embeddings [B, D_s], [B, D_t] of student and teacher; z_s, z_t: their logits [B, C];
a, b: their feature maps [B, C, h, w]. Weights are those of RepDistiller (the public code of CRD,
Tian et al. 2020), which the tables were made with, unless another source is named; beside them the
task loss has weight 1. Computed in float32 (float64 when given it), also under autocast. Only the
student receives gradient; where a source learns a projection of the teacher's embedding, that does
too. Plain KD (Hinton et al. 2015; .9 beside .1 of the task loss, T 4), FitNet (100), AT (1000, the
sum over stages), PKT (30000) and RKD (1; 25 and 50 are inside) are shared with the papers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.baselines import attention_transfer, fitnet, pkt, rkd
from shared.kernels.dispatch import same_rows, without_autocast
from shared.losses import at_least_float32, decoupled, kd, nce, same_shape, unit, warm_up

__all__ = [
    "adadistill", "attention_transfer", "cc", "cosine", "crcd", "crd", "dkd", "fitnet", "kd",
    "moved_centers", "pkt", "relation_cosines", "rkd", "sp", "vid", "warm_up",
]  # fmt: skip
Side = tuple[Tensor, Tensor]  # cosines to the positive [B] and to the negatives [B, n]
VARIANCE_MIN = 1e-5  # of vid
SQUARE_MIN = 1e-6  # of a relation's length


def cosine(e_s: Tensor, e_t: Tensor) -> Tensor:
    """Mean over the batch of 1 - cos(e_s, e_t). No published form or weight: ours, 10.

    e_s, e_t: [B, D]. A row of zeros has cosine 0. Raises ValueError where the shapes differ.
    """
    same_shape("cosine", e_s, e_t)
    s, t = (unit(at_least_float32(e)) for e in (e_s, e_t.detach()))
    return 1 - (s * t).sum(1).mean()


def sp(a: Tensor, b: Tensor) -> Tensor:
    """SP (Tung & Mori 2019): sum over i, j of (G^s_ij - G^t_ij)^2 / B^2. Weight 3000.

    a: [B, ...], b: [B, ...] of other sizes: the networks' last maps, flattened to F. G = F F^T,
    then every row divided by its L2 norm; a row of zeros stays one. Raises ValueError for other
    numbers of rows.
    """
    same_rows("sp", a, b)
    with without_autocast(a):
        g_s, g_t = (_gram(at_least_float32(x).flatten(1)) for x in (a, b.detach()))
        return F.mse_loss(g_s, g_t)


def cc(d_s: Tensor, d_t: Tensor) -> Tensor:
    """CC: mean over i of sum over d of delta_id delta_(i+1)d, delta = |d_s - d_t|. Weight .02.

    d_s, d_t: [B, d], embeddings of student and teacher, each behind a linear layer that is learned
    (both receive gradient); i + 1 is the next row of the batch, B - 1 products. This is the code of
    RepDistiller, from the authors. Their paper (Peng et al. 2019) instead takes the mean squared
    difference of the two B x B correlation matrices, each a Gaussian kernel of the embeddings in
    its Taylor series, and adds a loss of single instances.
    Raises ValueError for shapes that differ and fewer than two rows.
    """
    same_shape("cc", d_s, d_t)
    if len(d_s) < 2:
        raise ValueError("cc: a batch of one image has no neighbours; it needs two and more")
    delta = (at_least_float32(d_s) - at_least_float32(d_t)).abs()
    return (delta[:-1] * delta[1:]).sum(1).mean()


def vid(mu: Tensor, f_t: Tensor, rho: Tensor) -> Tensor:
    """VID (Ahn et al. 2019): mean over elements of 1/2 ((mu - f_t)^2 / v + ln v).

    mu: [B, C, h, w], the student's map behind a regressor; f_t: the teacher's; rho: [C], learned,
    with v = ln(1 + e^rho) + 1e-5 the variance of a channel, 5 at first. Weight 1, summed over
    stages. The paper sums over elements; its public code takes their mean.
    Raises ValueError where the shapes differ.
    """
    same_shape("vid", mu, f_t)
    v = (F.softplus(at_least_float32(rho)) + VARIANCE_MIN).view(-1, 1, 1)
    square = (at_least_float32(mu) - at_least_float32(f_t.detach())).square()
    return 0.5 * (square / v + v.log()).mean()


def crd(
    student: Side,
    teacher: Side,
    *,
    tau: float,
    m: int,
    log_z: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
) -> Tensor:
    """CRD (Tian et al. 2020, Eq. 18): `shared.losses.nce` of the student, plus that of the teacher.

    student: cosines of the student's projected embeddings to the teacher's memory, of the image
    itself [B] and of n images of other classes [B, n]; teacher: those of the teacher's projected
    embeddings to the student's memory. tau: .07. m: training-set size. log_z: ln Z of each side.
    Weight .8, beside KD of weight 1 (in RepDistiller 1 or 0).
    The paper's critic has no Z; its code divides by one, m times the mean of e^(cos / tau) in the
    first batch, and adds 1e-7 where logarithms need nothing.
    """
    z_s, z_t = log_z
    return nce(*student, tau=tau, m=m, log_z=z_s) + nce(*teacher, tau=tau, m=m, log_z=z_t)


def crcd(
    student: Side,
    teacher: Side,
    *,
    tau: float,
    m: int,
    log_z: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
) -> Tensor:
    """CRCD (Zhu et al. 2021): CRD's loss of relations to an anchor in place of embeddings.

    With s_j, t_j the projected embeddings of image j and a^t an anchor, the memory's row of another
    image of the batch, student holds the cosines between v^ts = unit(s_j - a^t) and
    v^t = unit(t_k - a^t), t_k the memory's rows: k = j [P], and n images k of other classes [P, n],
    for P pairs of an image and an anchor. teacher is the same with the roles exchanged, which the
    authors' code has as its projection of the teacher's embedding is learned. tau: .05, n: 500.
    Weight 1 beside KD of .9, both of that code.
    What was checked is the authors' public code, which they call incomplete, and the abstract; the
    paper's equations were not at hand. Left out: the paper's second relation, between gradients of
    the task loss by the embedding, whose use that code leaves unclear, and the code's last 4 % of
    epochs without distillation. For how anchors are drawn see baselines.model.
    """
    return crd(student, teacher, tau=tau, m=m, log_z=log_z)


def relation_cosines(qk: Tensor, qa: Tensor, ka: Tensor) -> Tensor:
    """cos(q - a, k - a) of unit vectors from their inner products q.k, q.a, k.a; shapes broadcast.

    The squared lengths 2 - 2 q.a and 2 - 2 k.a are held at 1e-6 and above, where float32 would not
    tell them from 0: a relation of an image to itself has no direction.
    """
    q, k = ((2 - 2 * x).clamp(min=SQUARE_MIN) for x in (qa, ka))
    return (qk - qa - ka + 1) * (q.rsqrt() * k.rsqrt())


def dkd(
    z_s: Tensor,
    z_t: Tensor,
    y: Tensor,
    *,
    temperature: float = 4.0,
    target: float = 1.0,
    non_target: float = 8.0,
) -> Tensor:
    """DKD (Zhao et al. 2022): T^2 times the mean over B of target * TCKD + non_target * NCKD.

    z_s, z_t: [B, C] logits, y: [B] labels; see shared.losses.decoupled. Weight 1 after 20 epochs of
    `warm_up`. The authors choose non_target by the pair of networks; 8 is their code's default.
    Raises ValueError for fewer than two classes.
    """
    tckd, nckd, _ = decoupled(z_t.detach(), z_s, y, temperature)
    return temperature**2 * (target * tckd + non_target * nckd).mean()


def adadistill(e_s: Tensor, centers: Tensor, y: Tensor, *, scale: float, margin: float) -> Tensor:
    """AdaDistill (Boutros et al. 2024): CosFace on class centres that the teacher has made.

    Mean over the batch of -ln softmax(scale * (cos(e_s, c_j) - margin [j = y]))_y, over classes j.
    e_s: [B, D]; centers: [C, D], see `moved_centers`, no gradient; y: [B]. Replaces the task loss:
    weight 1, task loss 0. Their code's scale is 64 and its margin .35 (it has ArcFace, too: .45).
    Checked against the authors' code; the numbers of the paper's equations were not at hand.
    Raises ValueError where the dimensions differ.
    """
    if e_s.shape[1] != centers.shape[1]:
        raise ValueError(
            f"adadistill: embeddings of {e_s.shape[1]} and centres of {centers.shape[1]} numbers "
            "differ; project one to the other first"
        )
    with without_autocast(e_s):
        cosines = unit(at_least_float32(e_s)) @ unit(at_least_float32(centers.detach())).T
        wanted = F.one_hot(y, len(centers)).to(cosines.dtype)
        return F.cross_entropy(scale * (cosines - margin * wanted), y)


@torch.no_grad()
def moved_centers(centers: Tensor, e_s: Tensor, e_t: Tensor, y: Tensor) -> Tensor:
    """AdaDistill's class centres after a batch: c_y <- alpha c_y + (1 - alpha) t, [C, D].

    centers: [C, D], e_s, e_t: [B, D], y: [B]; s, t are the unit embeddings, and alpha =
    cos(s, t) * cos(c_y, t), either product and its second factor held in [1e-6, 1]. At first s is
    far from t and the centre is the sample's own feature; as the student learns, it becomes the
    class's. A hard sample, one far from its centre, moves it more. A centre is not normalised here.
    Where a class has several images in the batch, the authors' code keeps one of their centres,
    whichever is written last; ours is the mean of them.
    """
    s, t = unit(at_least_float32(e_s)), unit(at_least_float32(e_t))
    own = centers[y]
    hard = (unit(own) * t).sum(1, keepdim=True).clamp(1e-6, 1)
    alpha = ((s * t).sum(1, keepdim=True) * hard).clamp(1e-6, 1)
    moved = (alpha * own + (1 - alpha) * t).to(centers.dtype)
    at = y[:, None].expand_as(moved)
    return centers.scatter_reduce(0, at, moved, "mean", include_self=False)


def _gram(f: Tensor) -> Tensor:
    """F F^T with rows of length 1."""
    return unit(f @ f.T)
