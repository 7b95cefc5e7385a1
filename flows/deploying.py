"""`mflow deploy`: work pools, deployments and automations of deployments/, put onto the server in one go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_ext.config_files import read_yaml
from tasks.store import ROOT, Store

FOLDER = Path(__file__).resolve().parent.parent / "deployments"
POOLS = {
    "local": "Process pool: runs on the machine of its worker.",
    "gpu": "Process pool for workers on machines with CUDA devices.",
    "ascend": "Process pool for workers on machines with Ascend NPUs.",
}


def deploy_all() -> list[str]:
    """Create or update everything; the answer is one line for each thing. Prefect's environment is settled before.

    Relative paths in recipes and the artifact store count from the folder in which this is called.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        lines = [_pool(client, name, description) for name, description in POOLS.items()]
        lines += [_deployment(entry) for entry in read_yaml(FOLDER / "prefect.yaml")["deployments"]]
        lines += [_automation(client, entry) for entry in read_yaml(FOLDER / "automations.yaml")["automations"]]
    return lines


def _pool(client: Any, name: str, description: str) -> str:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=name, type="process", description=description, base_job_template=template)
        client.create_work_pool(pool)
    return f"pool        {name}"


def _deployment(entry: dict[str, Any]) -> str:
    from prefect.deployments.runner import RunnerDeployment

    pool = entry["work_pool"]
    variables = dict(pool["job_variables"])
    variables["working_dir"] = os.getcwd()
    variables["env"] = {**variables["env"], ROOT: str(Store.current().root)}
    deployment = RunnerDeployment.from_entrypoint(
        entry["entrypoint"],
        name=entry["name"],
        description=entry.get("description"),
        parameters=entry.get("parameters", {}),
        tags=entry["tags"],
        work_pool_name=pool["name"],
        job_variables=variables,
    )
    deployment.apply()
    return f"deployment  {deployment.full_name}"


def _automation(client: Any, entry: dict[str, Any]) -> str:
    from prefect.events.schemas.automations import AutomationCore

    wanted = AutomationCore.model_validate(entry)
    found = client.read_automations_by_name(wanted.name)
    if found:
        client.update_automation(found[0].id, wanted)
    else:
        client.create_automation(wanted)
    return f"automation  {wanted.name}"
