"""What AIRD adds: relations between the two spaces while it trains, FaceBN where it is tested."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shared.kernels import relation_scores
from shared.kernels.dispatch import without_autocast

Mode = Literal["online", "anchored"]


class RelationModule(nn.Module):
    """R(a, b) = relu(W_i a - W_j b): a linear map and a ReLU (Eq. 2).

    dim_i, dim_j: sizes of a and b. d: size of the relation. Of two biases only the difference would
    show, so there is one.
    """

    def __init__(self, dim_i: int, dim_j: int, d: int = 128) -> None:
        super().__init__()
        self.W_i = nn.Linear(dim_i, d)
        self.W_j = nn.Linear(dim_j, d, bias=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a: [B, dim_i], b: [B, dim_j] -> [B, d]."""
        return F.relu(self.W_i(a) - self.W_j(b))


class RelationCritic(nn.Module):
    """R_t and R_{t,s} (Eq. 2), which share nothing, and the cosines that Eq. 4 scores."""

    def __init__(self, dim_t: int, dim_s: int, d: int = 128) -> None:
        super().__init__()
        self.R_t = RelationModule(dim_t, dim_t, d)
        self.R_ts = RelationModule(dim_t, dim_s, d)

    def forward(
        self, e_t: Tensor, e_s: Tensor, partner: Tensor, bank: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines of the positive [B] and of the negatives [B, n], in float32 also under autocast.

        e_t: [B, D_t], e_s: [B, D_s] of samples j. partner: [B, D_t], teacher features of samples i.
        bank: [M, D_t] teacher features, index: [B, n] of them as the samples k.
        query = R_{t,s}(partner, e_s); keys = R_t(partner, e_t or bank_k): r^t_{ij} and r^t_{ik}.
        A relation whose numbers are all 0 has cosine 0.
        """
        with without_autocast(e_s):
            work = torch.promote_types(e_s.dtype, torch.float32)
            e_t, e_s, partner, bank = (x.to(work) for x in (e_t, e_s, partner, bank))
            query = F.normalize(self.R_ts(partner, e_s), dim=-1)
            keys = self.R_t.W_j(torch.cat([e_t, bank]))
            own = torch.arange(len(e_t), device=e_t.device)[:, None]
            index = torch.cat([own, index + len(e_t)], dim=1)
            cosines = relation_scores(query, self.R_t.W_i(partner), keys, index, None)
        return cosines[:, 0], cosines[:, 1:]


@contextlib.contextmanager
def face_bn(model: nn.Module, gamma: float = 0.1, mode: Mode = "online") -> Iterator[nn.Module]:
    """FaceBN (Eq. 9): inside the context every batch norm adapts to each batch it is given.

        mu <- gamma mu + (1 - gamma) mean(x)
        var <- gamma var + (1 - gamma) mean((x - mu)^2), with the mu just updated

    over samples and pixels, in float32; then x is normalised by that mixture. online (the paper):
    from batch to batch, so the result depends on batch size and order. anchored: the right-hand
    sides are always the training statistics. gamma 1 is the network in evaluation mode, to the bit.

    A batch must be a fair sample of the new faces: hundreds, of many people. Few faces, or many of
    one person, give statistics of their own, and recognition collapses (README.md has numbers).
    Where a batch's statistics are not finite, those before it stand.

    Starts from the training statistics, so one context is one data set; the model is in evaluation
    mode inside. Afterwards, also after an exception, buffers, modes and hooks are those there were.
    A context inside another one of the same model starts anew, and the outer one then goes on.
    An empty batch changes nothing. Across ranks there is no exchange.

    Raises ValueError for a gamma outside [0, 1], another mode, a model wrapped or compiled (give
    the bare module) and one whose statistics cannot be adapted, or that has none.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"face_bn: gamma is {gamma}; it must lie in [0, 1]")
    if mode not in ("online", "anchored"):
        raise ValueError(f"face_bn: no mode {mode!r}; there are: online, anchored")
    layers = _batch_norms(model)
    training = {module: module.training for module in model.modules()}
    adapting = [_Adapting(bn, gamma, mode) for bn in layers]
    try:
        model.eval()
        for one in adapting:
            one.enter()
        yield model
    finally:
        for one in adapting:
            one.leave()
        for module, was in training.items():
            module.training = was


class _Adapting:
    """The hook in front of one batch norm: gives it other statistics, by which it then normalises.

    Subclasses with a forward of their own (SyncBatchNorm, timm's) are served alike.
    """

    def __init__(self, bn: _BatchNorm, gamma: float, mode: Mode) -> None:
        self.bn, self.gamma, self.mode = bn, gamma, mode
        hooks = bn._forward_pre_hooks.values()
        self.outer = next((h for h in reversed(hooks) if isinstance(h, _Adapting)), None)
        assert bn.running_mean is not None and bn.running_var is not None
        self.trained: tuple[Tensor, Tensor] = (bn.running_mean, bn.running_var)
        if self.outer is not None:
            self.trained = self.outer.trained
        self.mean, self.var = self.trained
        self.active = self.left = False

    def enter(self) -> None:
        if self.outer is not None:
            self.outer.active = False
        self.active = True
        self.bn.running_mean, self.bn.running_var = self.trained
        self.handle = self.bn.register_forward_pre_hook(self)

    def leave(self) -> None:
        self.handle.remove()
        self.left = True
        self.bn.running_mean, self.bn.running_var = self.trained
        if self.outer is not None and not self.outer.left:
            self.outer.active = True

    # normal tensors also inside inference_mode: outside of it they could not be used with autograd
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, bn: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        if not self.active or self.gamma == 1 or x.numel() == 0:
            return
        work = torch.promote_types(x.dtype, torch.float32)
        over = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, var = (s.to(work) for s in (self.mean, self.var))
        now = self.gamma * mean + (1 - self.gamma) * x.mean(over, dtype=work)
        spread = (x - now.view(shape)).square_().mean(over)
        then = self.gamma * var + (1 - self.gamma) * spread
        fine = now.isfinite() & then.isfinite()
        mean, var = torch.where(fine, now, mean), torch.where(fine, then, var)
        if self.mode == "online":
            self.mean, self.var = mean, var
        bn.running_mean, bn.running_var = (
            new.to(was.dtype) for new, was in zip((mean, var), self.trained, strict=True)
        )


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Those of the model, each once. Raises ValueError where FaceBN could not do what it says."""
    found = []
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if compiled or isinstance(module, wrappers):
            kind = "compiled, and would not see it" if compiled else "a parallel wrapper"
            raise ValueError(f"face_bn: {where} is {kind}; give the bare module")
        if isinstance(module, _BatchNorm):
            if module.running_mean is None or module.running_var is None:
                raise ValueError(f"face_bn: {where} has no training statistics to start from")
            found.append(module)
        elif "running_mean" in module._buffers:
            raise ValueError(f"face_bn: {where} has statistics but is no batch norm of torch")
    if not found:
        raise ValueError(f"face_bn: {type(model).__name__} has no batch norm to adapt")
    return found
