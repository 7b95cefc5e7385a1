"""The per-rank layout against megatron-core itself: the files that it saves and loads, rank by rank, bit for bit."""

from pathlib import Path

import pytest
import torch
from bare import gathered
from mcore_worker import run_worker
from tiny import write_model

from megatron_ext.events import Events
from megatron_ext.hf_folder import read_config
from megatron_ext.weights.convert import convert
from megatron_ext.weights.hf import SafetensorsReader
from megatron_ext.weights.megatron_names import FILE, Naming, Sizes
from megatron_ext.weights.megatron_ranks import MegatronRanksReader
from megatron_ext.weights.megatron_writer import MegatronRanksWriter, RankLayout
from megatron_ext.weights.planning import architecture_of, checkpoint_dtypes
from megatron_ext.weights.streams import row_blocks

LAYOUTS = {
    2: (
        ("llama, odd vocabulary", Sizes(tp=2)),
        ("llama, odd vocabulary", Sizes(pp=2)),
        ("llama with biases, one key head", Sizes(tp=2)),
        ("qwen2 tied", Sizes(pp=2)),
        ("mixtral", Sizes(ep=2)),
        ("qwen3_moe", Sizes(tp=2)),
    ),
    4: (
        ("qwen2 tied", Sizes(2, 2, 1)),
        ("mixtral", Sizes(2, 1, 2)),
        ("qwen3_moe", Sizes(1, 2, 2)),
        ("qwen2_moe", Sizes(2, 1, 2)),
    ),
}
"""Number of processes -> models and layouts that megatron-core runs."""
MODELS = {
    "llama, odd vocabulary": {"vocab_size": 509},
    "llama with biases, one key head": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
    "qwen2 tied": {"tie_word_embeddings": True},
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
}
CASES = [
    pytest.param(
        (processes, case, sizes),
        id=f"{case}, {'-'.join(map(str, sizes))}",
        marks=[pytest.mark.distributed, *([pytest.mark.slow] if processes > 2 else [])],
    )
    for processes, layouts in LAYOUTS.items()
    for case, sizes in layouts
]


def write_ranks(model: Path, folder: Path, sizes: Sizes) -> None:
    family, architecture = architecture_of(read_config(model))
    source = SafetensorsReader(model)
    plan = list(family.plan(architecture, family.layout_of(source.tensors)))
    dtypes = checkpoint_dtypes(plan, source, None)
    writer = MegatronRanksWriter(folder, plan, dtypes, architecture, RankLayout(sizes, Naming("local")))
    for weight in plan:
        for start, count in row_blocks(weight, dtypes[weight.key], most=4000):
            writer.write(weight, start, gathered(weight, source, start, count, dtypes[weight.key]))
    writer.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs all layouts of a number of processes once; gives the folder of one of them, with ``ours`` (files written
    here), ``theirs`` (saved by megatron-core, which had loaded the torch_dist checkpoint), ``logits.pt`` of
    megatron-core's model after it loaded ``ours``, and ``hf``, the source, with its own logits."""
    done: dict[int, Path] = {}

    def folder(processes: int, case: str, sizes: Sizes) -> Path:
        if processes not in done:
            done[processes] = tmp_path_factory.mktemp("ranks")
            run_layouts(processes, done[processes])
        return done[processes] / f"{case} {sizes}"

    return folder


def run_layouts(processes: int, tmp: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 500, (2, 48), generator=torch.Generator().manual_seed(1))
    torch.save(tokens, tmp / "tokens.pt")
    steps = []
    for number, (case, sizes) in enumerate(LAYOUTS[processes]):
        place = tmp / f"{case} {sizes}"
        model, checkpoint = place / "hf", place / "torch_dist"
        write_model(model, case.split()[0].strip(","), seed=number, **MODELS[case])
        checkpoint.mkdir()
        convert(model, checkpoint, dtype=None, events=Events())
        with torch.no_grad():
            torch.save(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits, model / "l.pt")
        write_ranks(model, place / "ours", sizes)
        ranks = {"save_ranks": str(place / "theirs"), "load_ranks": str(place / "ours")}
        asked = {"tokens": str(tmp / "tokens.pt"), "logits": str(place / "logits.pt")}
        steps.append({"checkpoint": str(checkpoint), **sizes._asdict(), **ranks, **asked})
    run_worker(steps, tmp, processes)


@pytest.mark.parametrize("layout", CASES)
def test_each_rank_file_has_the_names_and_bits_that_megatron_core_saves(run, layout):
    place, (_, case, sizes) = run(*layout), layout
    names = {path.name for path in (place / "theirs").iterdir()}
    assert names == {path.name for path in (place / "ours").iterdir()}
    assert len(names) == sizes.tp * sizes.pp * sizes.ep
    vocabulary = MODELS[case].get("vocab_size", 512)
    for name in names:
        ours, theirs = (torch.load(place / side / name / FILE, weights_only=False) for side in ("ours", "theirs"))
        tensors = {key: value for key, value in theirs["model"].items() if isinstance(value, torch.Tensor)}
        held = {key: value for key, value in ours["model"].items() if isinstance(value, torch.Tensor)}
        assert held.keys() == tensors.keys()
        for key, value in tensors.items():
            rows = len(value)
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):  # padding may hold anything
                rows = min(rows, vocabulary - rows * int(name[8:10]))
            assert held[key].shape == value.shape, key
            assert torch.equal(held[key][:rows], value[:rows]), key


@pytest.mark.parametrize("layout", CASES)
def test_a_model_that_loads_the_rank_files_strictly_answers_as_transformers_does(run, layout):
    place = run(*layout)
    theirs = torch.load(place / "hf" / "l.pt")
    ours = torch.load(place / "logits.pt")[..., : theirs.shape[-1]]
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", CASES)
def test_what_megatron_core_saved_reads_back_as_the_source(run, layout):
    place = run(*layout)
    model = place / "hf"
    family, architecture = architecture_of(read_config(model))
    source = SafetensorsReader(model)
    plan = list(family.plan(architecture, family.layout_of(source.tensors)))
    reader = MegatronRanksReader(place / "theirs", plan)
    assert reader.sizes == layout[-1]
    assert set(reader.shapes) == {weight.key for weight in plan}
    for weight in plan:
        assert weight.padded_vocabulary or reader.shapes[weight.key] == weight.shape
        rows = weight.own_shape[0]
        expected = gathered(weight, source, 0, rows, torch.float32)
        assert torch.equal(reader.rows(weight, 0, rows), expected), (weight.key, weight.index)
