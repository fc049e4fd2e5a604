"""Losses between unit image vectors x and unit text vectors y of a batch.

InfoNCE in both directions (Radford et al. 2021), the sigmoid loss (SigLIP; Zhai et al. 2023), and 1 − cosine
on the pairs (LIFT's contrastive-free variant). Legend: B pairs on this rank, N = W·B in the global batch of
W ranks, P texts per image, T = N·P, M further texts, D dimensions; s scale, b bias.

**Ranks.** Each holds its B pairs and returns a loss whose mean over the ranks is that of the global batch
(see `distributed`): texts are gathered, with gradient only if they have one; images never are.

**Several texts per image**, P(i) of image i, all positives. With N(i) the texts of other images that are
not masked, I(t) the images that text t is not masked for, and o(t) the image of t:

    InfoNCE  ½ · mean_i mean_{t∈P(i)} [ −log e^{s x_i·y_t} / (e^{s x_i·y_t} + Σ_{u∈N(i)} e^{s x_i·y_u})
                                        −log e^{s x_i·y_t} / Σ_{j∈I(t)} e^{s x_j·y_t} ]
    SigLIP   mean_i Σ_t 1/|P(o(t))| · log(1 + e^{∓(s x_i·y_t + b)}),  − if o(t) = i, else + and t ∈ N(i)
    Cosine   mean_i mean_{t∈P(i)} [1 − x_i·y_t]

So positives of one image do not compete with each other, an image counts once however many texts it has,
and with one text each this is the plain loss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lift_trainer.config import LossName, Mask
from lift_trainer.distributed import column_logsumexp, gather, mean, rank, world_size

INITIAL_SCALE = 1 / 0.07
MAX_SCALE = 100.0
SIGLIP_SCALE = 10.0
SIGLIP_BIAS = -10.0


class LossValue(NamedTuple):
    """A loss and what to watch beside it; all tensors of shape [], of this rank's images."""

    loss: torch.Tensor
    accuracy: torch.Tensor
    """Share of images to which, of all texts of the global batch, one of their own is the most similar."""
    masked: torch.Tensor
    """Share of the pairs of an image and a text that is not its own which the mask took out."""
    positive: torch.Tensor
    """Mean cosine of images with their own texts."""
    negative: torch.Tensor
    """Mean cosine of images with the texts of others in the batch, masked or not."""

    def detach(self) -> LossValue:
        return LossValue(*(value.detach() for value in self))

    def over_ranks(self) -> LossValue:
        """Of the global batch, float32, for the log. Collective: every rank calls it."""
        return LossValue(*mean(torch.stack([value.detach().float() for value in self])).unbind())


class Extra(NamedTuple):
    """Texts beyond the batch, negatives of every image but those that they describe.

    Under several ranks each gives its share of them, equally many.
    """

    vectors: torch.Tensor
    """float [M, D], unit length."""
    captions: torch.Tensor
    """int64 [M]: number of each caption."""
    known: torch.Tensor
    """int64 [B, K]: every caption of each image of the batch, also those not drawn; −1 where it has fewer."""


class InfoNCE(nn.Module):
    """½ · (cross-entropy of s·xyᵀ by rows + by columns), s = exp(log_scale) within [1, 100].

    Texts beyond the batch are further columns of the first half; they have no image for the second.
    """

    def __init__(
        self, mask: Mask = "none", scale: float = INITIAL_SCALE, *, learn_scale: bool = True
    ) -> None:
        """
        Args:
            mask: which pairs are no negatives: `caption` those with an equal caption; `caption+image` also
                those of the same image, which is in the batch twice.
            scale: 1 / temperature at the start.
            learn_scale: False keeps it (ShareLock).
        """
        super().__init__()
        self.mask = mask
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)

    def clamp_(self) -> None:
        """Bring the scale back into [1, 100]; call after every optimiser step."""
        _clamp(self.log_scale)

    @property
    def scale(self) -> float:
        return float(self.log_scale.detach().exp())

    def forward(
        self,
        x_bd: torch.Tensor,
        y_bd: torch.Tensor,
        captions_b: torch.Tensor,
        images_b: torch.Tensor | None = None,
        extra: Extra | None = None,
    ) -> LossValue:
        """
        Args:
            x_bd: float32 [B, D], unit vectors.
            y_bd: float32 [B, D], or [B, P, D] with finite values where a text is absent.
            captions_b: int64 [B] or [B, P]: the number of each caption, equal where captions are equal;
                −1: absent (each image needs one that is not).
            images_b: int64 [B]: the number of each image; needed by the mask `caption+image`.
            extra: negatives beyond the batch, always masked by caption and image.
        """
        if y_bd.ndim == 3:
            return self._several(x_bd, y_bd, captions_b, images_b, extra)
        pairs = _Pairs.of(y_bd[:, None], captions_b[:, None], images_b, self.mask)
        scaled_bd = self.log_scale.exp() * x_bd
        logits_bn = scaled_bd @ pairs.texts_td.T
        if self.mask != "none":
            logits_bn = logits_bn.masked_fill(pairs.hidden_bt, -torch.inf)
        own_b = pairs.own_b
        rows_bm, masked = logits_bn, pairs.masked()
        if extra is not None:
            further_bm, hidden_bm = _further(scaled_bd, extra)
            rows_bm = torch.cat([logits_bn, further_bm.masked_fill(hidden_bm, -torch.inf)], 1)
            masked = pairs.masked(hidden_bm)
        images = F.cross_entropy(rows_bm, own_b)
        if world_size() == 1:
            texts = F.cross_entropy(logits_bn.T, own_b)
        else:
            own_logits_b = logits_bn.gather(1, own_b[:, None])[:, 0]
            texts = (column_logsumexp(logits_bn)[pairs.first : pairs.first + len(x_bd)] - own_logits_b).mean()
        accuracy = (logits_bn.detach().argmax(1) == own_b).float().mean()
        return LossValue((images + texts) / 2, accuracy, masked, *pairs.cosines(x_bd))

    def _several(
        self,
        x_bd: torch.Tensor,
        y_bpd: torch.Tensor,
        captions_bp: torch.Tensor,
        images_b: torch.Tensor | None,
        extra: Extra | None,
    ) -> LossValue:
        pairs = _Pairs.of(y_bpd, captions_bp, images_b, self.mask)
        scaled_bd = self.log_scale.exp() * x_bd
        logits_bt = scaled_bd @ pairs.texts_td.T
        # Not −∞: an image whose texts are all masked has no negatives, and log Σ of nothing no gradient.
        far = torch.finfo(logits_bt.dtype).min / 4
        own_bt = pairs.own_bt
        negatives_bt = logits_bt.masked_fill(own_bt | pairs.hidden_bt | pairs.absent_t, far)
        masked = pairs.masked()
        if extra is not None:
            further_bm, hidden_bm = _further(scaled_bd, extra)
            negatives_bt = torch.cat([negatives_bt, further_bm.masked_fill(hidden_bm, far)], 1)
            masked = pairs.masked(hidden_bm)
        own_bp = logits_bt[own_bt].view(captions_bp.shape)
        images_bp = F.softplus(negatives_bt.logsumexp(1, keepdim=True) - own_bp)
        columns_t = column_logsumexp(logits_bt.masked_fill(pairs.hidden_bt, -torch.inf))
        start = pairs.first * captions_bp.shape[1]
        texts_bp = columns_t[start : start + own_bp.numel()].view_as(own_bp) - own_bp
        loss = ((images_bp + texts_bp) * pairs.weight_bp).sum(1).mean() / 2
        return LossValue(loss, pairs.accuracy(logits_bt), masked, *pairs.cosines(x_bd))


class SigLIP(nn.Module):
    """Σ over all pairs of log(1 + e^{∓(s·x·y + b)}), − for an image's own text, over the number of images.

    A masked pair is left out of the sum. Texts beyond the batch are further negatives, of weight 1.
    """

    def __init__(
        self,
        mask: Mask = "none",
        scale: float = SIGLIP_SCALE,
        bias: float = SIGLIP_BIAS,
        *,
        learn_scale: bool = True,
    ) -> None:
        """As `InfoNCE`; `bias` is learned when the scale is. SAIL starts at 20 and −10."""
        super().__init__()
        self.mask = mask
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn_scale)

    def clamp_(self) -> None:
        """Bring the scale back into [1, 100]; call after every optimiser step."""
        _clamp(self.log_scale)

    @property
    def scale(self) -> float:
        return float(self.log_scale.detach().exp())

    def forward(
        self,
        x_bd: torch.Tensor,
        y_bd: torch.Tensor,
        captions_b: torch.Tensor,
        images_b: torch.Tensor | None = None,
        extra: Extra | None = None,
    ) -> LossValue:
        """As `InfoNCE.forward`."""
        y_bpd, captions_bp = (y_bd, captions_b) if y_bd.ndim == 3 else (y_bd[:, None], captions_b[:, None])
        pairs = _Pairs.of(y_bpd, captions_bp, images_b, self.mask)
        scaled_bd = self.log_scale.exp() * x_bd
        logits_bt = scaled_bd @ pairs.texts_td.T + self.bias
        signed_bt = torch.where(pairs.own_bt, -logits_bt, logits_bt)
        loss_b = (F.softplus(signed_bt).masked_fill(pairs.hidden_bt, 0) * pairs.weight_t).sum(1)
        masked = pairs.masked()
        if extra is not None:
            further_bm, hidden_bm = _further(scaled_bd, extra)
            loss_b = loss_b + F.softplus(further_bm + self.bias).masked_fill(hidden_bm, 0).sum(1)
            masked = pairs.masked(hidden_bm)
        return LossValue(loss_b.mean(), pairs.accuracy(logits_bt), masked, *pairs.cosines(x_bd))


class Cosine(nn.Module):
    """1 − cosine of each image with its text; no negatives, no temperature."""

    scale = 1.0

    def clamp_(self) -> None:
        """Nothing is learned."""

    def forward(
        self,
        x_bd: torch.Tensor,
        y_bd: torch.Tensor,
        captions_b: torch.Tensor,
        images_b: torch.Tensor | None = None,
        extra: Extra | None = None,
    ) -> LossValue:
        """As `InfoNCE.forward`. Texts of other ranks are gathered for the accuracy only, without gradient."""
        y_bpd, captions_bp = (y_bd, captions_b) if y_bd.ndim == 3 else (y_bd[:, None], captions_b[:, None])
        pairs = _Pairs.of(y_bpd.detach(), captions_bp, None, "none")
        if y_bd.ndim == 2:
            loss = 1 - (x_bd * y_bd).sum(1).mean()
        else:
            loss = 1 - ((x_bd[:, None] * y_bpd).sum(2) * pairs.weight_bp).sum(1).mean()
        accuracy = pairs.accuracy(x_bd.detach() @ pairs.texts_td.T)
        return LossValue(loss, accuracy, pairs.masked(), *pairs.cosines(x_bd))


Loss = InfoNCE | SigLIP | Cosine


def build_loss(
    name: LossName,
    mask: Mask,
    *,
    scale: float | None = None,
    bias: float | None = None,
    learn_scale: bool = True,
) -> Loss:
    """A loss; `scale` and `bias` where they are not to start at the loss's own defaults."""
    match name:
        case "infonce":
            return InfoNCE(mask, INITIAL_SCALE if scale is None else scale, learn_scale=learn_scale)
        case "siglip":
            return SigLIP(
                mask,
                SIGLIP_SCALE if scale is None else scale,
                SIGLIP_BIAS if bias is None else bias,
                learn_scale=learn_scale,
            )
        case "cosine":
            return Cosine()


def _clamp(log_scale: nn.Parameter) -> None:
    if log_scale.requires_grad:
        with torch.no_grad():
            log_scale.clamp_(0.0, math.log(MAX_SCALE))


class _Pairs(NamedTuple):
    """Who belongs to whom: this rank's B images against all T = N·P texts of the global batch."""

    texts_td: torch.Tensor
    first: int
    """Number of this rank's first image among the N."""
    owner_t: torch.Tensor
    """int64: number of the image each text belongs to."""
    hidden_bt: torch.Tensor
    """Pairs that the mask takes out; of all texts but the image's own."""
    hidden: torch.Tensor
    """How many of them are of texts that exist."""
    absent_t: torch.Tensor
    weight_t: torch.Tensor
    """1 / number of texts of the text's image; 0: absent."""
    weight_bp: torch.Tensor
    """The same for this rank's texts."""

    @classmethod
    def of(
        cls, y_bpd: torch.Tensor, captions_bp: torch.Tensor, images_b: torch.Tensor | None, mask: Mask
    ) -> _Pairs:
        (count, texts), device = captions_bp.shape, y_bpd.device
        captions_np, first = gather(captions_bp), rank() * count
        captions_t, present_np = captions_np.reshape(-1), captions_np >= 0
        owner_t = torch.arange(len(captions_np), device=device).repeat_interleave(texts)
        hidden_bt = torch.zeros((), dtype=torch.bool, device=device).expand(count, len(owner_t))
        if mask != "none":
            hidden_bt = hidden_bt.clone()
            for captions_b in captions_bp.T:
                hidden_bt |= (captions_b[:, None] == captions_t[None, :]) & (captions_b >= 0)[:, None]
            if mask == "caption+image":
                assert images_b is not None, "the mask caption+image needs the number of each image"
                hidden_bt |= images_b[:, None] == gather(images_b).repeat_interleave(texts)[None, :]
            hidden_bt &= (first + torch.arange(count, device=device))[:, None] != owner_t[None, :]
        weight_np = (present_np / present_np.sum(1, keepdim=True)).to(y_bpd.dtype)
        return cls(
            texts_td=gather(y_bpd).flatten(0, 1),
            first=first,
            owner_t=owner_t,
            hidden_bt=hidden_bt,
            hidden=(hidden_bt.sum(0) * present_np.reshape(-1)).sum()
            if mask != "none"
            else owner_t.new_zeros(()),
            absent_t=~present_np.reshape(-1),
            weight_t=weight_np.reshape(-1),
            weight_bp=weight_np[first : first + count],
        )

    @property
    def own_b(self) -> torch.Tensor:
        """int64 [B]: number of each of this rank's images."""
        return self.first + torch.arange(len(self.weight_bp), device=self.owner_t.device)

    @property
    def own_bt(self) -> torch.Tensor:
        """Texts of the image itself, also absent ones."""
        return self.own_b[:, None] == self.owner_t[None, :]

    def masked(self, hidden_bm: torch.Tensor | None = None) -> torch.Tensor:
        """Share of pairs of an image and another's text that are hidden, those of further texts included."""
        hidden, others = self.hidden, self.others
        if hidden_bm is not None:
            hidden, others = hidden + hidden_bm.sum(), others + hidden_bm.numel()
        return hidden / others.clamp(min=1)

    @property
    def others(self) -> torch.Tensor:
        """Pairs of an image and another's text in the global batch, over the number of ranks.

        Not those of this rank: where images differ in their number of texts, so would ranks, and a mean of
        their shares would not be the share.
        """
        images = len(self.owner_t) // self.weight_bp.shape[1]
        return (images - 1) * (~self.absent_t).sum() / world_size()

    def accuracy(self, logits_bt: torch.Tensor) -> torch.Tensor:
        best_b = logits_bt.detach().masked_fill(self.absent_t, -torch.inf).argmax(1)
        return (self.owner_t[best_b] == self.own_b).float().mean()

    @torch.no_grad()
    def cosines(self, x_bd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cosine with own texts and with others'."""
        texts_npd = self.texts_td.unflatten(0, (-1, self.weight_bp.shape[1]))
        own_bp = (x_bd[:, None] * texts_npd[self.first : self.first + len(x_bd)]).sum(2)
        all_d = (~self.absent_t).to(x_bd.dtype) @ self.texts_td
        others = x_bd.sum(0) @ all_d - (own_bp * (self.weight_bp > 0)).sum()
        return (own_bp * self.weight_bp).sum(1).mean(), others / self.others.clamp(min=1)


def _further(scaled_bd: torch.Tensor, extra: Extra) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, W·M] of the texts beyond the batch, and which of them describe the image."""
    captions_m = gather(extra.captions)
    hidden_bm = torch.zeros(len(scaled_bd), len(captions_m), dtype=torch.bool, device=scaled_bd.device)
    for known_b in extra.known.T:
        hidden_bm |= known_b[:, None] == captions_m[None, :]
    return scaled_bd @ gather(extra.vectors).T, hidden_bm
