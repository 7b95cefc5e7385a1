"""Megatron-LM's per-rank layout, read at any tensor-, pipeline- and expert-parallel size: a file for each rank.

A folder ``release/`` or ``iter_NNNNNNN/`` holds ``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``: the state dict of one
rank's part of the model, with settings, and after training optimizer and random states, which are not read. Nothing
but the files themselves says which layers and experts a rank holds: it counts them from 0.
Source: megatron/training/checkpointing.py of Megatron-LM; megatron-core's layers and experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import CheckpointError
from megatron_ext.families.base import Weight, placed
from megatron_ext.weights.files import same_bits
from megatron_ext.weights.megatron_names import FILE, FOLDER, NO_WEIGHTS, Found, Sizes, fused_norm, understood
from megatron_ext.weights.pickles import load_pickle

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
BEFORE_CORE = "language_model."
"""Beginning of the names that Megatron-LM used before megatron-core."""
Place = tuple[str, tuple[int, ...]]
"""Key of a torch_dist checkpoint, and (layer, expert) in the whole model."""


class MegatronRanksReader:
    """Reads rows of the whole model's weights out of the ranks' files, whose pages stay in the files until used.

    ``folder`` is the iteration's folder and ``plan`` the model's weights. ``shapes`` and ``dtypes`` are those that a
    torch_dist checkpoint of the same weights has; a parameter that is not in the plan appears under its own name.
    ``args`` are Megatron-LM's settings, if a file holds some.

    Raises:
        CheckpointError: ranks are missing, or do not fit each other or the plan; names the folder or weight.
        UntrustedPickleError: a file wants a class that could run a program, and ``trust_pickle`` is not set.
        SourceError: a file is truncated or damaged.
    """

    def __init__(self, folder: Path, plan: Sequence[Weight], *, trust_pickle: bool = False) -> None:
        self._folder = folder
        self._known = {weight.key: weight for weight in plan}
        self._experts = max((weight.index[1] + 1 for weight in plan if len(weight.index) > 1), default=0)
        self._pieces: dict[Place, list[torch.Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        ranks = _Ranks(folder, trust_pickle)
        self.sizes, self.args = ranks.sizes, ranks.args
        shards: dict[Place, dict[int, torch.Tensor]] = {}
        for (tp, pp, ep), offset, model in ranks.chunks():
            for name, tensor in model.items():
                for place, part in self._placed(name, offset, ep, tensor):
                    self._check_copy(place, part, shards.get(place, {}), self.sizes.folder(tp, pp, ep))
                    shards.setdefault(place, {}).setdefault(tp, part)
        self._drop_tied_copy(shards)
        for place, found in shards.items():
            self._pieces[place] = self._in_order(place, found)
        for key in dict.fromkeys(key for key, _ in shards):
            self._describe(key)

    def rows(self, weight: Weight, start: int, count: int) -> torch.Tensor:
        """``count`` rows of ``weight``, of its layer and expert, from ``start`` on."""
        pieces, split = self._pieces[weight.key, weight.index], weight.rule.split
        if split is None or len(pieces) == 1:
            return pieces[0][start : start + count]
        if split.axis == 1:
            return torch.cat([piece[start : start + count] for piece in pieces], dim=1)
        total = sum(len(piece) for piece in pieces)
        found = [
            pieces[rank][own : own + rows]
            for rank, own, _, rows in cut(start, count, total // (split.blocks * len(pieces)), len(pieces))
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def close(self) -> None:
        """Let go of the files."""
        self._pieces.clear()

    def _check_copy(self, place: Place, copy: torch.Tensor, found: Mapping[int, torch.Tensor], rank: str) -> None:
        """What parallelism does not split is the same on every rank that holds it: else these are of two models."""
        if not found or place[0] not in self._known or self._known[place[0]].rule.split is not None:
            return
        if not same_bits(copy, next(iter(found.values()))):
            raise CheckpointError(
                f"{placed(*place)} of {rank} in {self._folder} differs from the other ranks', which all hold the same; "
                "copy all folders of one checkpoint"
            )

    def _placed(
        self, name: str, layers_before: int, ep: int, tensor: torch.Tensor
    ) -> Iterator[tuple[Place, torch.Tensor]]:
        """Where in the whole model a rank's parameter belongs; several places if it stacks experts."""
        found, experts_before = understood(name), ep * self._local_experts
        place = place_in_model(name, self._known, layers_before, experts_before)
        if place is None:
            yield (_unknown(name, found, layers_before), ()), tensor
        elif found.stacked:
            for expert, part in enumerate(self._unstacked(name, tensor)):
                yield (place[0], (*place[1], experts_before + expert)), part
        else:
            yield place, tensor

    @property
    def _local_experts(self) -> int:
        if self._experts % self.sizes.ep:
            raise CheckpointError(
                f"{self._folder} has {self.sizes.ep} expert-parallel ranks, which do not divide {self._experts} experts"
            )
        return self._experts // self.sizes.ep

    def _unstacked(self, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Each expert's (out, in) weight of one of GroupedMLP's tensors, which keep them as (in, out)."""
        first = name.endswith("weight1")
        hidden = tensor.shape[0 if first else -1]
        if tensor.ndim != 2 or tensor.numel() % (self._local_experts * hidden):
            raise CheckpointError(f"{name} in {self._folder} has shape {list(tensor.shape)}, which holds no experts")
        stack = (self._local_experts, hidden, -1) if first else (self._local_experts, -1, hidden)
        return [expert.t() for expert in tensor.view(stack)]

    def _drop_tied_copy(self, shards: dict[Place, dict[int, torch.Tensor]]) -> None:
        """The last pipeline stage of a tied model holds the embedding once more, as its output layer."""
        if OUTPUT in self._known or (OUTPUT, ()) not in shards:
            return
        copies, own = shards.pop((OUTPUT, ())), shards.get((EMBEDDING, ()), {})
        if not all(rank in own and same_bits(copy, own[rank]) for rank, copy in copies.items()):
            raise CheckpointError(
                f"{OUTPUT} in {self._folder} differs from {EMBEDDING}, but config.json says tie_word_embeddings true; "
                "give the config.json of this checkpoint's model"
            )

    def _in_order(self, place: Place, found: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """The pieces that together make one weight, by rank. Experts may be split less than the rest of the model."""
        key, index = place
        weight = self._known.get(key)
        if weight is None or weight.rule.split is None:
            return [found[min(found)]]
        axis, some = weight.rule.split.axis, found[min(found)]
        ranks = self.sizes.tp
        if len(index) > 1 and some.ndim > axis:
            ranks = max(1, min(ranks, weight.own_shape[axis] // max(1, some.shape[axis])))
        pieces = {rank % ranks: tensor for rank, tensor in found.items()}
        if missing := [rank for rank in range(ranks) if rank not in pieces]:
            raise CheckpointError(f"{self._folder} has no {placed(*place)} of tensor-parallel rank {missing[0]}")
        if shapes := {tuple(piece.shape) for piece in pieces.values()} - {tuple(some.shape)}:
            raise CheckpointError(
                f"{placed(*place)} in {self._folder} has shape {list(some.shape)} on one rank "
                f"and {list(shapes.pop())} on another"
            )
        return [pieces[rank] for rank in range(ranks)]

    def _describe(self, key: str) -> None:
        """Shape and type of the weight of all layers and experts together."""
        indices = [index for name, index in self._pieces if name == key]
        stack = tuple(max(numbers) + 1 for numbers in zip(*indices, strict=True))
        for index in product(*(range(size) for size in stack)):
            if (key, index) not in self._pieces:
                raise CheckpointError(f"{self._folder} has no {placed(key, index)}; a rank's file is not whole")
        shapes = {self._shape((key, index)): index for index in indices}
        if len(shapes) > 1:
            (one, first), (other, second) = list(shapes.items())[:2]
            raise CheckpointError(
                f"{placed(key, first)} in {self._folder} has shape {list(one)}, "
                f"but {placed(key, second)} has {list(other)}"
            )
        self.shapes[key] = (*stack, *next(iter(shapes)))
        types = {piece.dtype for index in indices for piece in self._pieces[key, index]}
        self.dtypes[key] = reduce(torch.promote_types, types)

    def _shape(self, place: Place) -> tuple[int, ...]:
        pieces = self._pieces[place]
        shape = list(pieces[0].shape)
        if len(pieces) > 1 and (split := self._known[place[0]].rule.split):
            shape[split.axis] *= len(pieces)
        return tuple(shape)


def cut(start: int, count: int, share: int, ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """Where the rows from ``start`` on lie that tensor parallelism cuts: (rank, its row, row of the request, rows).

    Each block of the weight has ``share`` rows on each rank; a rank has its shares of all blocks below each other.
    """
    done = 0
    while done < count:
        part, within = divmod(start + done, share)
        block, rank = divmod(part, ranks)
        rows = min(share - within, count - done)
        yield rank, block * share + within, done, rows
        done += rows


def place_in_model(name: str, known: Collection[str], layers_before: int = 0, experts_before: int = 0) -> Place | None:
    """Which of the ``known`` keys, and which layer and expert, a rank's parameter is; None if it is none of them."""
    found = understood(name)
    key = next((key for key in (_key(found.mcore), _key(fused_norm(found.mcore))) if key in known), None)
    if key is None or found.layer is None:
        return None if key is None else (key, ())
    if found.expert is None:
        return key, (found.layer + layers_before,)
    return key, (found.layer + layers_before, found.expert + experts_before)


class _Ranks:
    """The files of all ranks, and what their names and contents say of the layout."""

    def __init__(self, folder: Path, trust_pickle: bool) -> None:
        self._folder = folder
        found: dict[tuple[int, ...], Path] = {}
        for path in sorted(folder.glob("mp_rank_*")):
            if match := FOLDER.fullmatch(path.name):
                found[tuple(int(number) for number in match.groups() if number is not None)] = path / FILE
        if len({len(numbers) for numbers in found}) != 1:
            raise CheckpointError(f"{folder} has no mp_rank_* folders, or folders of several layouts")
        states = {numbers: load_pickle(path, trust=trust_pickle) for numbers, path in found.items()}
        self._models = {numbers: _models(state, found[numbers]) for numbers, state in states.items()}
        self._check_iterations({found[numbers]: state for numbers, state in states.items()})
        self.args = next((state["args"] for state in states.values() if state.get("args") is not None), None)
        self._models = {self._rank(numbers): models for numbers, models in self._models.items()}
        self.sizes = Sizes(*(max(numbers) + 1 for numbers in zip(*self._models, strict=True)))
        self._check_whole()

    def chunks(self) -> Iterator[tuple[tuple[int, int, int], int, dict[str, torch.Tensor]]]:
        """((tp, pp, ep), layers before it, parameters) of each part of the model, from its first layer to its last."""
        offset = 0
        for number in range(max(len(models) for models in self._models.values())):
            for stage in range(self.sizes.pp):
                held = {rank: m[number] for rank, m in self._models.items() if rank[1] == stage and number < len(m)}
                layers = {_layers(model) for model in held.values()}
                if len(layers) > 1:
                    raise CheckpointError(
                        f"{self._folder}: ranks of pipeline stage {stage} hold {min(layers)} and {max(layers)} layers"
                    )
                for rank, model in held.items():
                    yield rank, offset, model
                offset += max(layers, default=0)

    def _rank(self, numbers: tuple[int, ...]) -> tuple[int, int, int]:
        """(tp, pp, ep) of a folder's numbers; a second of two is the expert's where one file has the whole depth."""
        if len(numbers) != 2:
            return (*numbers, 0, 0)[:3]
        first = next(iter(self._models.values()))
        whole = EMBEDDING in first[0] and any("decoder.final_layernorm.weight" in model for model in first)
        return (numbers[0], 0, numbers[1]) if whole else (*numbers, 0)

    def _check_iterations(self, states: Mapping[Path, Mapping[str, Any]]) -> None:
        """All files that name an iteration name the same."""
        saved = {state["iteration"]: path for path, state in states.items() if isinstance(state.get("iteration"), int)}
        if len(saved) > 1:
            (one, first), (other, second) = list(saved.items())[:2]
            raise CheckpointError(
                f"{first} is of iteration {one}, but {second} of iteration {other}; copy all folders of one checkpoint"
            )

    def _check_whole(self) -> None:
        """Each stage is there at each tensor-parallel rank, and at each expert-parallel one."""
        ranks = set(self._models)
        tensor, expert = {(tp, pp) for tp, pp, _ in ranks}, {(pp, ep) for _, pp, ep in ranks}
        for tp, pp, ep in product(*(range(size) for size in self.sizes)):
            if (tp, pp) not in tensor or (pp, ep) not in expert:
                raise CheckpointError(f"{self._folder} has no {self.sizes.folder(tp, pp, ep)}; copy all of its folders")


def _models(state: Any, path: Path) -> list[dict[str, torch.Tensor]]:
    """The parameters of a rank's parts of the model: one, or one for each virtual pipeline stage."""
    names = [
        name for name in ("model", *(f"model{i}" for i in range(1000))) if isinstance(state, dict) and name in state
    ]
    if not names or not all(isinstance(state[name], Mapping) for name in names):
        raise CheckpointError(f"{path} holds no model; is it a file of a Megatron-LM checkpoint?")
    models = [dict(_flat(state[name])) for name in names]
    if old := next((name for model in models for name in model if name.startswith(BEFORE_CORE)), None):
        raise CheckpointError(
            f"{path} names its weights as Megatron-LM did before megatron-core ({old}); "
            "convert it with Megatron-LM's tools/checkpoint to mcore first"
        )
    return models


def _flat(model: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state dict under dotted names, without the wrappers' ``module.``."""
    for name, value in model.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and not name.endswith(NO_WEIGHTS):
            full = prefix + name
            while full.startswith("module."):
                full = full.removeprefix("module.")
            yield full, value.detach()


def _layers(model: Mapping[str, torch.Tensor]) -> int:
    numbers = [found.layer for name in model if (found := understood(name)).layer is not None]
    return max(numbers, default=-1) + 1


def _key(mcore: str) -> str:
    return mcore.replace("{i}.", "").replace("{e}.", "")


def _unknown(name: str, found: Found, layers_before: int) -> str:
    """A parameter that the plan does not know, with its layer's number in the whole model."""
    if found.layer is None:
        return name
    return name.replace(f"layers.{found.layer}.", f"layers.{found.layer + layers_before}.", 1)
