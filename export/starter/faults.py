"""What is wrong with painted objects, metric by metric: measured beside the picture they should have been.

A generator's failure is no damage of one kind. A cat that came out as a blob is distorted, and also lacks detail,
edges, perhaps parts of it and the colours of a cat. Each object is looked for a few pixels around where it should be:
one that was only moved is none the worse, but for a little detail, since what lies beyond its outline stays where it is
(of 600 scenes with moved objects 0.05 in the mean, 0.34 at most). Realism is measured object by object, seven metrics
over the pixels of all objects; consistency and layout, of which nothing is measured, are taken as a share of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from edge_agent.superiority import METRICS

REACH = 4  # pixels that an object is looked for around its place
# Share of the way to another object or to none, whichever is further, at the object's best place. Up to the first an
# eye sees no difference, from the second on it names no object.
HARMLESS, UNRECOGNISED = 0.1, 0.4
# Share of what a metric looks at whose loss counts in full: fine structure, contrast, saturation, pixels.
LOST = {"definition": 0.6, "detail": 0.6, "clarity": 0.4, "sharpness": 0.6, "color": 0.4, "integrity": 0.4}
UNSEEN = 0.05  # share whose loss nobody notices
GONE = 0.12  # largest difference of a channel, 0 to 1, below which a pixel looks like the background
# What malformed objects do at least to metrics that see it in part.
BESIDE_REALISM = {"integrity": 0.4, "consistency": 0.4, "layout": 0.2}


@dataclass(frozen=True)
class Shown:
    """N pictures as they should be, float [N, 3, H, W] in [0, 1] each, and what to hold painted ones against."""

    pictures: torch.Tensor
    twins: torch.Tensor
    """The same places, filled with other objects."""
    empty: torch.Tensor
    """The backgrounds alone."""
    sprites: torch.Tensor
    """int64 [N, H, W]: 0 for the background, k for the k-th object."""


def faults(shown: Shown, painted: torch.Tensor) -> torch.Tensor:
    """[N, M] in [0, 1], 0 being none: how far each metric's fault goes in ``painted``, float [N, 3, H, W] in [0, 1]."""
    number = max(1, int(shown.sprites.max()))
    masks = torch.stack([shown.sprites == index for index in range(1, number + 1)], dim=1).float()
    area = masks.sum(dim=(2, 3))  # [N, K]
    found = _found(shown, painted, masks)
    objects = masks.amax(dim=1)  # [N, H, W]

    def distance(to: torch.Tensor) -> torch.Tensor:
        """[N, K]: mean over an object's pixels."""
        return torch.einsum("nhw,nkhw->nk", (to - shown.pictures).abs().mean(dim=1), masks) / area.clamp(
            min=1
        )

    def tint(of: torch.Tensor) -> torch.Tensor:
        return of - of.mean(dim=1, keepdim=True)

    def over(values: torch.Tensor) -> torch.Tensor:
        """[N]: sum of [N, H, W] over all objects' pixels."""
        return (values * objects).sum(dim=(1, 2))

    def lost(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        had = over(before)
        return torch.where(had > 1e-3, 1 - over(after) / had.clamp(min=1e-3), 0.0)

    pictures, empty = shown.pictures, shown.empty
    own = distance(found) / torch.maximum(distance(shown.twins), distance(empty)).clamp(min=0.02)
    malformed = ((own - HARMLESS) / (UNRECOGNISED - HARMLESS)).clamp(0, 1) * (area > 0)
    realism = malformed.sum(dim=1) / (area > 0).sum(dim=1).clamp(min=1)
    own_tint, twin_tint, no_tint = (
        over((tint(of) - tint(pictures)).abs().mean(dim=1)) for of in (found, shown.twins, empty)
    )
    tinted = own_tint / torch.maximum(twin_tint, no_tint).clamp(min=1e-3)
    stands_out = (pictures - empty).abs().amax(dim=1)
    missing = over(((found - empty).abs().amax(dim=1) < GONE) * (stands_out > 2 * GONE).float())
    measured = {
        "definition": (lost(_fine(pictures, 3), _fine(found, 3)) + lost(_fine(pictures, 5), _fine(found, 5)))
        / 2,
        "detail": lost(_fine(pictures, 5), _fine(found, 5)),
        "sharpness": lost(_fine(pictures, 3), _fine(found, 3)),
        "clarity": lost(stands_out, (found - empty).abs().amax(dim=1)),
        "color": lost(_saturation(pictures), _saturation(found)),
        "integrity": missing / over((stands_out > 2 * GONE).float()).clamp(min=1),
    }
    shares = {
        name: ((value - UNSEEN) / (LOST[name] - UNSEEN)).clamp(0, 1) for name, value in measured.items()
    }
    shares["realism"] = realism
    shares["harmony"] = ((tinted - HARMLESS) / (UNRECOGNISED - HARMLESS)).clamp(0, 1)
    for name, share in BESIDE_REALISM.items():
        shares[name] = torch.maximum(shares.get(name, torch.zeros_like(realism)), share * realism)
    return torch.stack([shares[name] for name in METRICS], dim=1)


def _found(shown: Shown, painted: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """``painted`` with each object moved to where it should be, [N, 3, H, W]: the move of least difference to it."""
    height, width = painted.shape[-2:]
    framed = F.pad(painted, [REACH] * 4, mode="replicate")
    best = torch.full(masks.shape[:2], torch.inf, device=painted.device)
    found = painted.clone()
    for down in range(2 * REACH + 1):
        for right in range(2 * REACH + 1):
            moved = framed[..., down : down + height, right : right + width]
            differ = torch.einsum("nhw,nkhw->nk", (moved - shown.pictures).abs().mean(dim=1), masks)
            better = differ < best
            best = torch.where(better, differ, best)
            taken = (masks * better[:, :, None, None]).amax(dim=1, keepdim=True) > 0
            found = torch.where(taken, moved, found)
    return found


def _fine(pictures: torch.Tensor, window: int) -> torch.Tensor:
    """[N, H, W]: what a box blur of ``window`` pixels takes away."""
    margin = window // 2
    blurred = F.avg_pool2d(F.pad(pictures, [margin] * 4, mode="replicate"), window, stride=1)
    return (pictures - blurred).abs().mean(dim=1)


def _saturation(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.amax(dim=1) - pictures.amin(dim=1)
