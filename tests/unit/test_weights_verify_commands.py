"""The gate of commands and stages: exit codes, what is left where it fails, and what its level belongs to."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conversions import OUT_PROJECTION, WEIGHTS, architecture, damage, write_pristine
from safetensors.torch import load_file

from megatron_ext import cli
from megatron_ext.config import ModelConfig, RuntimeConfig
from megatron_ext.errors import ConfigError, VerificationError
from megatron_ext.weights import convert as converting
from megatron_ext.weights.certificate import CERTIFICATE
from megatron_ext.weights.verify import check_level


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_pristine(tmp_path_factory.mktemp("pristine"))


def mflow(monkeypatch, *arguments: str | Path) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mflow", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_mflow_verify_exits_with_0_1_or_2_as_cmp_does(pristine, tmp_path, monkeypatch, capsys):
    checkpoint = Path(shutil.copytree(pristine / "checkpoint", tmp_path / "checkpoint"))
    line = ["verify", "--checkpoint", checkpoint, "--model", pristine / "hf"]
    assert mflow(monkeypatch, *line) == 0
    assert "bit for bit in fp32" in capsys.readouterr().out
    damage(checkpoint, load_file(pristine / "hf" / WEIGHTS)[OUT_PROJECTION], 0, 0)
    assert mflow(monkeypatch, *line, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["verified"]
    assert OUT_PROJECTION in said["reason"]
    absent = ["verify", "--checkpoint", checkpoint, "--model", tmp_path / "absent"]
    assert mflow(monkeypatch, *absent) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert mflow(monkeypatch, *absent, "--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert not said["verified"]
    assert "absent does not exist" in said["reason"]


def test_convert_that_fails_the_gate_exits_with_1_and_leaves_nothing(pristine, tmp_path, monkeypatch, capsys):
    tensor, write_latest = load_file(pristine / "hf" / WEIGHTS)[OUT_PROJECTION], converting.write_latest

    def write_and_damage(out, iteration):
        write_latest(out, iteration)
        damage(out, tensor, 0, 0)

    monkeypatch.setattr(converting, "write_latest", write_and_damage)
    line = ["convert", "--model", pristine / "hf", "--out", tmp_path / "out"]
    assert mflow(monkeypatch, *line) == 1
    assert OUT_PROJECTION in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert mflow(monkeypatch, *line, "--verify", "none", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verified"] is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"version": 2}', None], ids=str)
def test_a_damaged_certificate_is_named_before_anything_is_written_and_ignored_where_none_is_needed(
    content, pristine, tmp_path, monkeypatch, capsys
):
    checkpoint = Path(shutil.copytree(pristine / "checkpoint", tmp_path / "checkpoint"))
    damaged = checkpoint / CERTIFICATE
    damaged.unlink()
    damaged.mkdir() if content is None else damaged.write_bytes(content)
    both = ["--checkpoint", checkpoint, "--model", pristine / "hf"]
    for line in (["verify", *both], ["export", *both, "--out", tmp_path / "out"]):
        assert mflow(monkeypatch, *line) == 2
        assert f"{damaged} is no certificate: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert mflow(monkeypatch, "export", *both, "--out", tmp_path / "out", "--verify", "none") == 0


DAMAGING = """
import numpy, sys
if sys.argv[:1] == ["-m"]:
    import megatron_ext.weights.convert as converting
    def damaging(out, iteration, original=converting.write_latest):
        original(out, iteration)
        path = max(out.rglob("*.distcp"), key=lambda path: path.stat().st_size)
        numpy.memmap(path, "u1", "r+")[-100_000:] ^= 1
    converting.write_latest = damaging
"""


def test_a_stage_whose_result_differs_fails_and_publishes_nothing(pristine, tmp_path, monkeypatch):
    """In the stage's own subprocess every byte of the last weights changes after they were written."""
    from tasks.artifacts import Sources
    from tasks.convert_checkpoint import convert_checkpoint
    from tasks.pin_sources import pin_sources
    from tasks.stage import produce
    from tasks.store import Store

    monkeypatch.setenv("MFLOW_ARTIFACTS", str(tmp_path / "store"))
    model = ModelConfig(path=str(pristine / "hf"))
    sources = Sources.of(produce(pin_sources.spec, pin_sources.build(model))[0])
    build = convert_checkpoint.build(model, sources, runtime=RuntimeConfig())
    (tmp_path / "damage").mkdir()
    (tmp_path / "damage" / "sitecustomize.py").write_text(DAMAGING)
    with monkeypatch.context() as damaged:
        damaged.setenv("PYTHONPATH", str(tmp_path / "damage"))
        with pytest.raises(VerificationError, match="Nothing was published"):
            produce(convert_checkpoint.spec, build)
    store = Store.current()
    assert store.artifacts()
    assert not [m for m in store.artifacts() if m.kind == "checkpoints"]
    assert not [path for path in (tmp_path / "store" / "checkpoints").rglob("*") if path.is_file() and path.suffix]


def test_the_level_belongs_to_the_artifact_and_not_to_what_is_made_of_it(pristine, tmp_path, monkeypatch):
    from tasks.artifacts import Sources
    from tasks.convert_checkpoint import convert_checkpoint
    from tasks.pin_sources import pin_sources
    from tasks.stage import produce

    monkeypatch.setenv("MFLOW_ARTIFACTS", str(tmp_path / "store"))
    configs = [ModelConfig(path=str(pristine / "hf"), verify=level) for level in ("none", "digest", "logits")]
    sources = Sources.of(produce(pin_sources.spec, pin_sources.build(configs[0]))[0])
    builds = [convert_checkpoint.build(config, sources, runtime=RuntimeConfig()) for config in configs]
    assert len({build.fingerprint("s", 1) for build in builds}) == 3
    assert len({build.content("s", 1) for build in builds}) == 1


def test_a_machine_without_the_memory_for_logits_is_told_before_anything_is_written():
    huge = architecture().model_copy(update={"hidden_size": 1 << 20, "ffn_hidden_size": 1 << 22})
    with pytest.raises(ConfigError, match=r"needs .* GB of memory.*verify with digest"):
        check_level("logits", huge, "cpu")
    check_level("digest", huge, "cpu")
