"""`mflow` as scripts call it: exit codes, one plain line on an error, several values after one flag."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PREFECT_IS_MISSING = "import sys\nsys.modules['prefect'] = None\n"


def mflow(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ext.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


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


def test_unknown_option_and_command_exit_with_2(tmp_path):
    assert mflow("convert", "--modle", "x", cwd=tmp_path).returncode == 2
    assert mflow("konvert", cwd=tmp_path).returncode == 2


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
