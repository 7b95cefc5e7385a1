"""Prefect plugin: ``prefect deployment run full-sft`` finds the one deployment of that name, whatever its flow.

Enabled by ``[tool.prefect.plugins]`` in pyproject.toml, or anywhere by ``PREFECT_PLUGINS_ENABLED=1``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from prefect.plugins import HookContext, SetupResult, register_hook

PREFECT_PLUGIN_API_REQUIRES = ">=0.1,<1"
COMMANDS = (["deployment", "run"], ["deployments", "run"])


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """Teach the client bare names, in the processes of ``prefect deployment run`` only."""
    if sys.argv[1:3] in COMMANDS:
        accept_bare_names()
    return None


def accept_bare_names() -> None:
    """Let ``PrefectClient.read_deployment_by_name`` take a name without a flow.

    A name that several deployments bear is an error that lists them.
    """
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    original = PrefectClient.read_deployment_by_name

    @functools.wraps(original)
    async def read_deployment_by_name(self: Any, name: str) -> Any:
        if "/" in name:
            return await original(self, name)
        named = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
        found = await self.read_deployments(deployment_filter=named)
        if len(found) == 1:
            return found[0]
        full_names = [
            f"{(await self.read_flow(d.flow_id)).name}/{d.name}" for d in found or await self.read_deployments()
        ]
        fault = "is the name of several deployments" if found else "is the name of no deployment"
        remedy = "" if full_names else "; create them with: mflow deploy"
        raise ValueError(f"{name!r} {fault}; Available: {', '.join(full_names) or 'none'}{remedy}")

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[method-assign]
