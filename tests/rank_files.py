"""Checkpoints in files of ranks, of small models: made, exported again, and changed as other programs leave them."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import write_model

from megatron_ext.events import Events, Follower
from megatron_ext.weights.convert import convert
from megatron_ext.weights.export import export
from megatron_ext.weights.manifest import MANIFEST
from megatron_ext.weights.megatron_names import FILE, Naming, Sizes
from megatron_ext.weights.megatron_writer import RankLayout

MODELS = {
    "llama": {"vocab_size": 509, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
}
ONE = Sizes()
NAMES = Naming()
LAYER = "decoder.layers."


class Models:
    """Gives the Hugging Face folder of a case of MODELS, written once."""

    def __init__(self, place: Path) -> None:
        self._place, self._done = place, {}

    def __call__(self, case: str) -> Path:
        if case not in self._done:
            self._done[case] = write_model(self._place / case, case.split()[0], dtype="bfloat16", **MODELS[case])
        return self._done[case]


def ranks(model: Path, folder: Path, sizes: Sizes = ONE, naming: Naming = NAMES, **options) -> Path:
    """The checkpoint folder of ``model`` in files of ranks."""
    folder.mkdir()
    layout = RankLayout(sizes, naming, options.pop("make_vocab_size_divisible_by", 128))
    convert(model, folder, dtype=options.pop("dtype", None), events=Events(), layout=layout, **options)
    return folder


def exported(checkpoint: Path, model: Path, folder: Path, **options) -> dict[str, torch.Tensor]:
    folder.mkdir()
    export(checkpoint, model, folder, dtype=options.pop("dtype", None), events=Events(), **options)
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def assert_source(back: dict[str, torch.Tensor], model: Path) -> None:
    source = load_file(model / "model.safetensors")
    assert back.keys() == source.keys()
    assert [name for name in source if back[name].dtype != source[name].dtype] == []
    assert [name for name in source if not torch.equal(back[name], source[name])] == []


def foreign(model: Path, folder: Path, sizes: Sizes = ONE, naming: Naming = NAMES) -> Path:
    """Files of ranks as another program leaves them: without our manifest."""
    ranks(model, folder, sizes, naming)
    (folder / MANIFEST).unlink()
    return folder


def change(path: Path, how) -> None:
    """Save the state of a rank's file again, changed by ``how`` in place."""
    state = torch.load(path / FILE, weights_only=False)
    how(state)
    torch.save(state, path / FILE)


def notes_of(events: Path) -> list[str]:
    return [event["text"] for event in Follower(events).new() if event["event"] == "note"]
