"""megatron-core on a CPU in processes of its own (the platform redirects torch.cuda): ``mcore_worker.py JOB.json``.

The job is a list of steps {"checkpoint", "tp"?, "pp"?, "ep"?, "save"?: folder, "save_ranks"?: folder, "load_ranks"?:
folder, "tokens"?: file, "logits"?: file}: load the checkpoint into the model that training builds, then, in this order,
save its weights into an empty folder, as torch_dist or as Megatron-LM saves each rank's; load the files of ranks,
strictly; answer with the logits of the tokens (B, T) -> (B, T, V).
"""

import json
import os
import subprocess
import sys
from pathlib import Path


def run_worker(steps: list[dict], tmp: Path, processes: int = 1) -> None:
    """Run the steps on ``processes`` ranks; fails with their last lines."""
    job = tmp / "job.json"
    job.write_text(json.dumps(steps))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, job],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * processes, "\n".join(outputs)[-5000:]


def main() -> None:
    from megatron_ext.platforms.base import select

    platform = select("cpu")
    platform.prepare()
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_ext.platforms import megatron_fixes

    megatron_fixes.apply(platform.name)
    job = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}.store", rank=rank, world_size=world)
    current = None
    for step in job:
        layout = [step.get(name, 1) for name in ("tp", "pp", "ep")]
        if layout != current:  # groups are made once for steps of one layout: gloo keeps its threads for ever
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(
                *layout[:2], expert_model_parallel_size=layout[2], create_gloo_process_groups=False
            )
            current = layout
        tensor_parallel.get_cuda_rng_tracker().reset()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        run_step(step, platform)
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def run_step(step: dict, platform) -> None:
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_ext.config import RuntimeConfig, TrainConfig
    from megatron_ext.model.provider import build_model
    from megatron_ext.training.checkpoints import load_weights
    from megatron_ext.weights.manifest import read_manifest

    checkpoint = Path(step["checkpoint"])
    train = TrainConfig(seq_length=64, global_batch_size=1, train_iters=1, lr=1.0, precision="fp32")
    runtime = RuntimeConfig(
        tensor_model_parallel_size=step.get("tp", 1),
        pipeline_model_parallel_size=step.get("pp", 1),
        expert_model_parallel_size=step.get("ep", 1),
        platform="cpu",
    )
    model = build_model(read_manifest(checkpoint).architecture, train, runtime, platform).eval()
    load_weights(model, checkpoint)
    if "save" in step:
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        dist_checkpointing.save(model.sharded_state_dict(metadata=groups), step["save"])
    if "save_ranks" in step and parallel_state.get_expert_data_parallel_rank() == 0:
        file = file_of_rank(Path(step["save_ranks"]))
        file.parent.mkdir(parents=True)
        torch.save({"model": model.state_dict_for_save_checkpoint(), "checkpoint_version": 3.0}, file)
    if "load_ranks" in step:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = torch.load(file_of_rank(Path(step["load_ranks"])), weights_only=False)
        model.load_state_dict(state["model"], strict=True)
    if "logits" in step:
        logits = forward(model, torch.load(step["tokens"]))
        if logits is not None:
            torch.save(logits, step["logits"])


def file_of_rank(folder: Path) -> Path:
    """The file of this rank, named as ``get_checkpoint_name`` of Megatron-LM does."""
    from megatron.core import parallel_state as mpu

    name = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    if mpu.get_expert_model_parallel_world_size() > 1:
        name += f"_{mpu.get_expert_model_parallel_rank():03d}"
    return folder / name / "model_optim_rng.pt"


def forward(model, tokens):
    """Logits (B, T, V) on one rank: the first data- and tensor-parallel rank of the last pipeline stage."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)

    def step(_, model):
        return model(tokens, positions, None), lambda logits, non_loss_data: logits

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return None
        logits = gather_from_tensor_model_parallel_region(outputs[0])
    ranks = parallel_state.get_tensor_model_parallel_rank() + parallel_state.get_data_parallel_rank()
    return logits if ranks == 0 else None


if __name__ == "__main__":
    main()
