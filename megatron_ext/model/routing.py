"""The router of a mixture of experts, with auxiliary losses that no parallel layout and no micro batch size changes.

Each sequence of the global batch (one row; when packing, all samples in it) has a load-balancing loss
``E · Σ_i f_i · P_i``, with f_i the share of its tokens' choices that fell on expert i and P_i the mean probability of
expert i, and a z-loss, the mean square of the router's logsumexp. Padding counts in neither. The sequences of a step
are weighted as the main loss weighs them (by trained tokens, samples or pairs), so that the division by the step's
number of these leaves a mean; the losses of all layers are added, as megatron-core adds them. megatron-core's own are
not used: they are means over a micro batch, padding included, and divided by a number that they do not know.
Source: https://arxiv.org/abs/2101.03961, https://arxiv.org/abs/2202.08906.

Legend: T places on this rank, E experts, R rows of the micro batch, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

PADDING = 0xFFFF
"""Row number of a place that holds no token."""


def encode_places(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One number for each place, which layers pass on where megatron-core passes a mask.

    Args:
        rows: (T,) int64, row of the micro batch, PADDING where there is no token.
        weights: (R,) int64, below 2^32: what the main loss counts in each row.
    """
    counted = torch.cat([weights, weights.new_zeros(1)])[rows.clamp(max=len(weights))]
    return len(weights) << 48 | rows << 32 | counted


class Router(TopKRouter):
    """megatron-core's router; in training it adds the losses, and must know the ``places``.

    Attributes:
        places: (T,) of ``encode_places``, set before each forward.
        seen: (E + 2,) sums since ``reset``: choices of each expert, weighted load-balancing and z-loss.
    """

    places: torch.Tensor | None = None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen = torch.zeros(self.num_experts + 2)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Leave the logits as they are: ``routing`` adds this loss, too."""
        return logits

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and choices of experts, both (T, E)."""
        probabilities, chosen = super().routing(logits)
        if not (self.training and torch.is_grad_enabled()):
            return probabilities, chosen
        if self.places is None:
            raise RuntimeError(f"the router of layer {self.layer_number} trains, but was not told what its places hold")
        balance, z, load = self._losses(logits.flatten(0, 1), chosen, self.places)
        sums = torch.cat([load, balance.detach()[None], z.detach()[None]])
        self.seen = self.seen.to(load.device) + sums
        total = (self.config.moe_aux_loss_coeff or 0.0) * balance + (self.config.moe_z_loss_coeff or 0.0) * z
        return MoEAuxLossAutoScaler.apply(probabilities, total), chosen

    def _losses(
        self, logits: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's part of both losses, summed over rows by weight, and the (E,) choices of its tokens."""
        rows, weights = int(places[0] >> 48), (places & 0xFFFFFFFF).float()
        members = ((places >> 32 & 0xFFFF)[:, None] == torch.arange(rows, device=places.device)).float()  # (T, R)
        own = members.T @ chosen.float()  # (R, E)
        counts = own.clone()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts, group=self.tp_cp_group)
        tokens = (counts.sum(1) / self.topk).clamp(min=1)
        shares = counts / (tokens * self.topk)[:, None]
        weight = (members * weights[:, None]).amax(0) / tokens
        means = members.T @ torch.softmax(logits.float(), dim=-1)
        balance = self.num_experts * (weight * (shares * means).sum(1)).sum()
        z = (weight * (members.T @ torch.logsumexp(logits.float(), dim=-1).square())).sum()
        return balance, z, own.sum(0)


def watched_routers(chunks: list[Any]) -> list[Router]:
    """The routers of a model, which from now on learn their places from each forward's ``padding_mask``."""
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, MoELayer)]
    for layer in layers:
        layer.register_forward_pre_hook(_tell, with_kwargs=True)
    return [layer.router for layer in layers]


def _tell(layer: MoELayer, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    places, hidden = named.pop("padding_mask", None), arguments[0]  # (B, places), (places, B, H)
    if places is not None:
        places = places.T
        if len(places) != len(hidden):  # megatron-core splits it for sequence parallelism on the first stage only
            group = layer.router.tp_group
            places = places.chunk(group.size())[group.rank()]
        places = places.flatten()
    layer.router.places = places
    return arguments, named


def routing_metrics(routers: list[Router], layers: int, count: float) -> dict[str, float]:
    """What the routers of all ranks saw since the last call, which must be one step; every rank must call it.

    Args:
        layers: those of the whole model.
        count: what the main loss counted over the step.

    Returns:
        load_balancing_loss and z_loss, means over layers without their coefficients; expert_load: choices of the
        busiest expert beside their mean over experts, in the layer where that is largest.
    """
    device = torch.cuda.current_device()
    seen = torch.zeros(layers, routers[0].num_experts + 2, dtype=torch.float32, device=device)
    for router in routers:
        seen[router.layer_number - 1] = router.seen.to(seen)
        router.seen = torch.zeros_like(router.seen)
    dist.all_reduce(seen)
    load, sums = seen[:, :-2], seen[:, -2:].mean(0) / count
    busiest = (load.amax(1) / load.mean(1).clamp(min=1e-9)).amax()
    balance, z, most = torch.cat([sums, busiest[None]]).tolist()
    return {"load_balancing_loss": balance, "z_loss": z, "expert_load": most}
