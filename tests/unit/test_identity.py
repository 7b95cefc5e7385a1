"""Fingerprints: what changes the result changes them, nothing else does, and nothing unstable gets in."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config import RuntimeConfig, TrainConfig
from tasks.build import Build, Input
from tasks.identity import differences, fingerprint, stable

TRAIN = TrainConfig(global_batch_size=2, train_iters=3, lr=1e-3)


def build(train: TrainConfig = TRAIN, runtime: RuntimeConfig = RuntimeConfig(), content: str = "abc") -> Build:  # noqa: B008
    return Build(job="x", identity={"train": train}, inputs={"a": Input(content, lambda: "/p", "a")}, runtime=runtime)


def test_resources_do_not_affect_identity() -> None:
    other = RuntimeConfig(nproc_per_node=8, tensor_model_parallel_size=2, num_threads=3, platform="cuda")
    assert build().fingerprint("s", 1) == build(runtime=other).fingerprint("s", 1)


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"precision": "fp32"}, {"seed": 1}, {"seq_length": 64}])
def test_what_changes_the_result_changes_identity(change: dict) -> None:
    changed = build(TRAIN.model_copy(update=change))
    assert changed.fingerprint("s", 1) != build().fingerprint("s", 1)


def test_version_stage_and_inputs_change_identity() -> None:
    names = {
        build().fingerprint("s", 1),
        build().fingerprint("s", 2),
        build().fingerprint("t", 1),
        build(content="abd").fingerprint("s", 1),
    }
    assert len(names) == 4


def test_the_order_of_keys_does_not_matter_and_the_order_of_files_does() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})


@pytest.mark.parametrize("value", [Path("/tmp"), {1, 2}, float("nan"), object(), {1: 2}, b"x", lambda: 1])
def test_a_value_without_a_stable_form_is_refused_with_its_place(value: object) -> None:
    with pytest.raises(TypeError, match=r"identity\.here"):
        stable({"here": value})


def test_differences_name_the_key_and_both_values() -> None:
    old, new = (build(TRAIN.model_copy(update={"lr": lr})).document("s", 1) for lr in (1e-5, 2e-5))
    assert differences(old, new) == {"config.train.lr": (1e-5, 2e-5)}
