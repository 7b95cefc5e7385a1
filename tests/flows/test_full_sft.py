"""The chain on a real server: built, then cached; only what changed or broke is built again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prefect_site import ROOT, Site, states

STAGES = [
    "pin-sources", "convert-checkpoint", "tokenize-dataset", "train-model", "export-checkpoint", "evaluate-base",
    "evaluate-tuned", "write-report",
]  # fmt: skip


def folder_of(said: dict[str, Any], stage: str) -> Path:
    return Path(next(s["artifact"] for s in said["stages"] if s["name"] == stage))


def test_the_first_run_builds_every_stage_and_says_where(server: Site, built: dict[str, Any]) -> None:
    assert states(built) == dict.fromkeys(STAGES, "built")
    assert all((Path(stage["artifact"]) / "artifact.json").is_file() for stage in built["stages"])
    assert set(built["scores"]) == {"base", "tuned"}
    assert built["scores"]["tuned"]["demo_routing"].keys() == built["scores"]["base"]["demo_routing"].keys()
    assert "<html" in Path(built["report"]).read_text(encoding="utf-8").lower()
    assert (
        folder_of(built, "convert-checkpoint") / "latest_checkpointed_iteration.txt"
    ).read_text().strip() == "release"
    assert (folder_of(built, "export-checkpoint") / "config.json").is_file()
    certificates = [
        folder_of(built, stage) / "certificate.json" for stage in ("convert-checkpoint", "export-checkpoint")
    ]
    assert [json.loads(path.read_text())["level"] for path in certificates] == ["digest", "digest"]
    assert "bit for bit" in Path(built["report"]).read_text(encoding="utf-8")


def test_the_second_run_is_cached_here_and_in_the_ui(server: Site, built: dict[str, Any]) -> None:
    from prefect.client.schemas.sorting import TaskRunSort

    code, said, _ = server.run(server.recipe())
    assert code == 0
    assert states(said) == dict.fromkeys(STAGES, "cached")
    with server.client() as client:
        seen: set[str] = set()
        for _ in range(100):  # task runs reach the server's database through its event queue
            runs = client.read_task_runs(sort=TaskRunSort.END_TIME_DESC, limit=len(STAGES))
            seen = {run.state_name for run in runs if run.state_name}
            if seen == {"Cached"}:
                break
            time.sleep(0.1)
    assert seen == {"Cached"}


def test_a_reused_stage_is_cached_even_when_prefect_forgot_it(server: Site, built: dict[str, Any]) -> None:
    shutil.rmtree(server.store / ".prefect-results")
    code, said, errors = server.run(server.recipe())
    assert code == 0
    assert states(said) == dict.fromkeys(STAGES, "cached")
    assert "Finished in state Cached('found in the store'" in errors


def test_damaged_artifacts_are_built_again_and_nothing_else_is(server: Site, built: dict[str, Any]) -> None:
    shutil.rmtree(folder_of(built, "tokenize-dataset"))
    scores = folder_of(built, "evaluate-base") / "results.json"
    scores.write_text(scores.read_text()[:-5])
    weights = next(folder_of(built, "convert-checkpoint").rglob("*.distcp"))
    with weights.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    verified = server.command("mflow", "artifacts", "verify")
    assert verified.returncode == 1
    assert weights.name in verified.stderr
    code, said, _ = server.run(server.recipe())
    assert code == 0
    rebuilt = {"tokenize-dataset", "evaluate-base", "convert-checkpoint"}
    assert states(said) == {stage: "built" if stage in rebuilt else "cached" for stage in STAGES}
    assert server.command("mflow", "artifacts", "verify").returncode == 0


def test_a_new_learning_rate_rebuilds_from_training_on_and_explain_said_so(server: Site, built: dict[str, Any]) -> None:
    change = ("--set", "train.lr=0.0005")
    started = time.monotonic()
    explained = server.command("mflow", "explain", "full-sft", str(server.recipe()), *change)
    seconds = time.monotonic() - started
    assert explained.returncode == 0, explained.stderr
    lines = dict(line.split("  ", 1) for line in explained.stdout.splitlines() if "  " in line)
    assert lines["train-model"].strip() == "will build, because train.lr changed 0.001 → 0.0005"
    assert lines["evaluate-base"].strip() == "cached"
    assert "4 steps to run" in explained.stdout
    assert seconds < 20
    code, said, errors = server.run(server.recipe(), *change)
    assert code == 0, errors
    downstream = {"train-model", "export-checkpoint", "evaluate-tuned", "write-report"}
    assert states(said) == {stage: "built" if stage in downstream else "cached" for stage in STAGES}


def test_another_level_of_verification_trains_and_scores_nothing_again(server: Site, built: dict[str, Any]) -> None:
    explained = server.command("mflow", "explain", "full-sft", str(server.recipe()), "--set", "model.verify=none")
    assert explained.returncode == 0, explained.stderr
    lines = dict(line.split("  ", 1) for line in explained.stdout.splitlines() if "  " in line)
    for stage in ("convert-checkpoint", "export-checkpoint"):
        assert lines[stage].strip() == 'will build, because model.verify changed "digest" → "none"'
    for stage in ("train-model", "evaluate-tuned", "evaluate-base"):
        assert lines[stage].strip() == "cached"


def test_the_ui_has_progress_scores_curve_and_report(server: Site, built: dict[str, Any]) -> None:
    with server.client() as client:
        found = {artifact.key: artifact for artifact in client.read_latest_artifacts()}
    assert found["report"].type == "markdown"
    assert built["report"].rsplit("/", 1)[1] in str(found["report"].data)
    assert found["loss-curve"].type == "image"
    scores = json.loads(str(found["evaluate-tuned-scores"].data))
    assert {row["task"] for row in scores} == {"demo_routing"}


def test_another_store_does_not_hit(server: Site, built: dict[str, Any], tmp_path: Path) -> None:
    program = (
        "from flows.stages import pin_sources\n"
        "from megatron_ext.config import ModelConfig\n"
        f"state = pin_sources(ModelConfig(path={str(folder_of(built, 'export-checkpoint'))!r}), return_state=True)\n"
        "print(state.result().folder)"
    )
    folders = []
    for store in (server.store, tmp_path / "other"):
        environment = server.environment | {"MFLOW_ARTIFACTS": str(store)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        folders.append(done.stdout.strip().splitlines()[-1])
    assert folders[0].startswith(str(server.store))
    assert folders[1].startswith(str(tmp_path / "other"))
    assert Path(folders[1], "artifact.json").is_file()


def test_bad_input_ends_with_one_line_and_nothing_written(server: Site, tmp_path: Path) -> None:
    environment = server.environment | {"MFLOW_ARTIFACTS": str(tmp_path / "store")}
    for change, words in [
        ("train.lrr=1", "did you mean 'lr'"),
        ("data.files=[nothing.jsonl]", "nothing.jsonl"),
        ("data.chat_template=qwen25", "did you mean"),
    ]:
        arguments = ("mflow", "run", "full-sft", str(server.recipe()), "--set", change)
        done = server.command(*arguments, env=environment)
        assert done.returncode == 2
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
        said = json.loads(server.command(*arguments, "--json", env=environment).stdout)
        assert said["state"] == "failed"
        assert said["stages"] == []
    assert not list(tmp_path.glob("store/[!.]*"))


def test_a_row_that_does_not_fit_fails_its_stage_with_the_users_file_and_the_retry(
    server: Site, built: dict, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"foo": 1}\n')
    recipe = server.recipe(data={"files": [str(bad)]})
    code, said, errors = server.run(recipe)
    assert code == 2
    assert said["state"] == "failed"
    assert str(bad) in said["error"]
    assert states(said)["tokenize-dataset"] == "failed"
    assert "train-model" not in states(said)
    assert not list(server.store.glob("datasets/.partial-*"))
    assert re.fullmatch(rf"retry with: \S*mflow run full-sft {recipe}", errors.splitlines()[-1])
    assert "Traceback" not in errors
