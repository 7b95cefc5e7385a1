"""`mflow` as scripts call it: exit codes, one plain line on an error, several values after one flag."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PREFECT_IS_MISSING = "import sys\nsys.modules['prefect'] = None\n"


def mflow(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ext.cli", *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if name != "MFLOW_ARTIFACTS"}
    return subprocess.run(command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True)


@pytest.fixture
def without_prefect(tmp_path) -> dict[str, str]:
    """An environment in which importing prefect fails, as on a bare GPU node."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(PREFECT_IS_MISSING)
    return {"PYTHONPATH": str(tmp_path / "bare")}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["convert", "--model", "absent", "--out", "out"], "absent does not exist"),
        (["convert", "--model", ".", "--out", "out"], "has no config.json"),
        (["tokenize", "--input", "absent.jsonl", "--tokenizer", ".", "--out", "out"], "absent.jsonl"),
        (["train", "absent.yaml"], "absent.yaml"),
        (["inspect", "absent"], "absent"),
        (["run", "full-sft", "absent.yaml"], "absent.yaml"),
        (["explain", "full-sft", "absent.yaml"], "absent.yaml"),
    ],
)
def test_missing_input_exits_with_2_and_one_line(arguments, named, tmp_path):
    done = mflow(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert", "--modle", "x"], "error: No such option: --modle (Possible options: --model); see "),
        (["konvert"], "error: No such command 'konvert'. Did you mean 'convert'?; see "),
        (
            ["convert", "--model", "x", "--out", "y", "--dtype", "fp8"],
            "error: Invalid value for '--dtype': 'fp8' is not",
        ),
    ],
)
def test_unknown_options_commands_and_values_exit_with_2_and_one_line(arguments, said, tmp_path):
    done = mflow(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


def test_help_lists_every_command_without_prefect(without_prefect, tmp_path):
    done = mflow("--help", cwd=tmp_path, **without_prefect)
    assert done.returncode == 0, done.stderr
    engine = ["convert", "tokenize", "train", "export", "evaluate", "inspect", "doctor"]
    flows = ["run", "explain", "artifacts", "deploy", "up"]
    assert [command for command in engine + flows if f"  {command} " not in done.stdout] == []


def test_doctor_names_the_machine_and_what_is_missing(without_prefect, tmp_path):
    done = mflow("doctor", "--json", cwd=tmp_path, **without_prefect)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["torch"]["state"] == "ok"
    assert findings["artifact store"]["detail"] == str(tmp_path / "artifacts")
    assert findings["prefect api"]["state"] in ("ok", "missing")
    assert all(finding["remedy"] for finding in findings.values() if finding["state"] == "problem")


def test_several_values_may_follow_one_flag(without_prefect, tmp_path):
    from tiny import write_jsonl, write_tokenizer

    rows = [{"messages": [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]}]
    files = [write_jsonl(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    folder = write_tokenizer(tmp_path / "tokenizer")
    out = tmp_path / "tokens"
    done = mflow("tokenize", "--input", *files, "--tokenizer", folder, "--out", out, cwd=tmp_path, **without_prefect)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "manifest.json").read_text())["documents"] == 2

    shown = mflow("inspect", out, cwd=tmp_path, **without_prefect)
    assert shown.returncode == 0, shown.stderr
    assert "<|im_start|>" in shown.stdout
    again = mflow("tokenize", "--input", *files, "--tokenizer", folder, "--out", out, cwd=tmp_path)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def limited_to_small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_disk_that_fills_up_exits_with_2_and_leaves_nothing(command, tmp_path):
    from tiny import write_model

    model = write_model(tmp_path / "model")
    inputs = ["--model", str(model)]
    if command == "export":
        assert mflow("convert", *inputs, "--out", "checkpoint", cwd=tmp_path).returncode == 0
        inputs += ["--checkpoint", "checkpoint"]
    before = sorted(path.name for path in tmp_path.iterdir())
    line = [sys.executable, "-m", "megatron_ext.cli", command, *inputs, "--out", "out"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limited_to_small_files)
    assert done.returncode == 2, done.stderr
    assert "free some space" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_refused_training_leaves_nothing_and_touches_no_other(tmp_path):
    from training import TRAIN, write_checkpoint, write_dataset

    checkpoint = write_checkpoint(tmp_path / "base")
    dataset = write_dataset(tmp_path / "data", checkpoint, [20, 30, 40, 20])
    mine = {"model": {"checkpoint": str(checkpoint)}, "data": {"dataset": str(dataset)}, "train": TRAIN}
    (tmp_path / "job.yaml").write_text(json.dumps({**mine, "runtime": {"platform": "cpu"}, "out": "out"}))

    def train(*overrides: str) -> subprocess.CompletedProcess[str]:
        return mflow("train", "job.yaml", *(part for o in overrides for part in ("--set", o)), cwd=tmp_path)

    for fault in (
        "model.checkpoint=absent",
        "data.dataset=absent",
        "runtime.micro_batch_size=3",
        "runtime.platform=npu",
    ):
        assert train(fault).returncode == 2, fault
        assert not (tmp_path / "out").exists(), fault
    foreign = train(f"out={tmp_path / 'base' / 'hf'}")
    assert foreign.returncode == 2
    assert "holds no training" in foreign.stderr

    done = train("train.train_iters=1", "train.lr_warmup_iters=0")
    assert done.returncode == 0, done.stderr
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert train("train.lr=1e-2").returncode == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
