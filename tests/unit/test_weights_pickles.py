"""Pickles from strangers: settings of real Megatron checkpoints load, anything that could run does not."""

import io
import os
import pathlib
import random
import signal
import subprocess
from argparse import Namespace

import numpy as np
import pytest
import torch

from megatron_ext.errors import SourceError, UntrustedPickleError
from megatron_ext.weights.pickles import load_pickle


class Malicious:
    """Runs a command when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Setting:
    """A class of nobody's."""


def saved(folder, content):
    torch.save(content, folder / "model_optim_rng.pt")
    return folder / "model_optim_rng.pt"


@pytest.mark.parametrize("function", [os.system, subprocess.getoutput, eval])
@pytest.mark.parametrize("place", ["args", "model"])
def test_a_pickle_that_would_run_a_command_is_refused_by_name_and_runs_nothing(function, place, tmp_path):
    trace = tmp_path / "ran"
    command = f"__import__('pathlib').Path({str(trace)!r}).touch()" if function is eval else f"touch {trace}"
    path = saved(tmp_path, {place: Malicious(function, command), "weight": torch.ones(2)})
    with pytest.raises(UntrustedPickleError) as caught:
        load_pickle(path)
    assert f".{function.__name__}" in str(caught.value)
    assert "--trust-pickle" in str(caught.value)
    assert not trace.exists()
    load_pickle(path, trust=True)
    assert trace.exists()  # so the file was armed


def test_a_foreign_class_is_refused_by_name_and_loads_when_trusted(tmp_path):
    path = saved(tmp_path, {"args": Namespace(setting=Setting())})
    with pytest.raises(UntrustedPickleError, match=r"test_weights_pickles\.Setting"):
        load_pickle(path)
    assert isinstance(load_pickle(path, trust=True)["args"].setting, Setting)


def test_what_megatron_keeps_beside_the_weights_loads(tmp_path):
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.rerun_state_machine import RerunDiagnostic, RerunMode, RerunState
    from megatron.core.transformer.enums import AttnBackend, CudaGraphScope

    args = Namespace(
        num_layers=4, params_dtype=torch.bfloat16, exit_signal=signal.SIGTERM, attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder, save=pathlib.PosixPath("/x"), cuda_graph_scope=[CudaGraphScope.attn],
        optimizer_config=OptimizerConfig(lr=1e-4), lr=np.float64(1e-4),
    )  # fmt: skip
    random_states = [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}]
    rerun = {"mode": RerunMode.DISABLED, "state": RerunState.NOT_RUNNING_YET, "type": RerunDiagnostic}
    extra = io.BytesIO(b"bytes")
    model = {"weight": torch.nn.Parameter(torch.arange(6.0).view(2, 3)), "x._extra_state": extra}
    content = {"args": args, "model": model, "rng_state": random_states, "rerun_state_machine": rerun}
    loaded = load_pickle(saved(tmp_path, content | {"checkpoint_version": 3.0}))
    assert (loaded["args"].num_layers, loaded["args"].params_dtype) == (4, torch.bfloat16)
    assert loaded["checkpoint_version"] == 3.0
    assert torch.equal(loaded["model"]["weight"], model["weight"])


def test_tensors_stay_in_the_file_until_they_are_used(tmp_path):
    def anonymous():
        status = pathlib.Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in status if line.startswith("RssAnon"))
        return int(line.split()[1]) // 1024

    path = saved(tmp_path, {"model": {"weight": torch.ones(40 << 20, dtype=torch.uint8)}})
    before = anonymous()
    loaded = load_pickle(path)
    assert loaded["model"]["weight"].sum() == 40 << 20
    assert anonymous() - before < 20


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -2000])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = saved(tmp_path, {"model": {"weight": torch.ones(1000)}})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model_optim_rng\.pt"):
        load_pickle(path)


def test_the_format_before_torch_1_6_loads_and_is_guarded_too(tmp_path):
    path, trace = tmp_path / "old.bin", tmp_path / "ran"
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickle(path)["weight"], torch.ones(2))
    harm = {"weight": torch.ones(2), "x": Malicious(os.system, f"touch {trace}")}
    torch.save(harm, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UntrustedPickleError, match=r"posix\.system"):
        load_pickle(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x80\x04\x95 another pickle"])
def test_what_torch_did_not_write_and_a_missing_file_are_named(content, tmp_path):
    (tmp_path / "odd.bin").write_bytes(content)
    with pytest.raises(SourceError, match=r"odd\.bin"):
        load_pickle(tmp_path / "odd.bin")
    with pytest.raises(SourceError, match="missing"):
        load_pickle(tmp_path / "absent.bin")


@pytest.mark.parametrize("trust", [False, True])
def test_a_damaged_byte_of_a_tensor_is_found_by_the_files_own_checksum(trust, tmp_path):
    path = saved(tmp_path, {"weight": torch.full((4096,), 3.0)})
    assert load_pickle(path, trust=trust)["weight"].sum() == 3 * 4096
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4096,), 3.0).numpy().tobytes()) + 5000] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"model_optim_rng\.pt is truncated or damaged \(Bad CRC-32 .*data/0"):
        load_pickle(path, trust=trust)


def test_a_file_without_checksums_loads(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"weight": torch.ones(4096)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_pickle(path)["weight"], torch.ones(4096))


def test_checksums_are_computed_once_while_the_file_stays_the_same(tmp_path, monkeypatch):
    path = saved(tmp_path, {"weight": torch.ones(4096)})
    load_pickle(path)
    monkeypatch.setattr("zipfile.ZipFile.open", None)
    assert torch.equal(load_pickle(path)["weight"], torch.ones(4096))
