"""The least work for a new job: a script that creates its claim and its first Job, and nothing else.

It watches QLoRAJobs and creates the same objects as the operator, over the same connection, without a queue, a status,
an Event, or code for restarts and errors. The operator's extra time is the cost of these.
"""

import asyncio
import sys
from pathlib import Path

from benchmarks.operator.client import watch
from benchmarks.operator.objects import PROFILE
from qlora_api.contract import needed_contract
from qlora_api.naming import workspace_claim_name, workspace_folder
from qlora_api.status import Resolved
from qlora_operator.decisions.manifests.objects import build_claim, build_job, document
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.connection import connect

_AT_A_TIME = 16


async def main(kubeconfig: Path) -> None:
    """Serve until the process is ended."""
    gate = asyncio.Semaphore(_AT_A_TIME)
    served: set[str] = set()
    async with connect(kubeconfig) as cluster, asyncio.TaskGroup() as group:
        async for event in watch(kubeconfig, "qlorajobs", metadata_only=False):
            job = parse_job(event.body)
            # A server that is busy ends watches, and the next one shows everything once more.
            if job.uid not in served:
                served.add(job.uid)
                group.create_task(_serve(cluster, job, gate))


async def _serve(cluster: Cluster, job: QLoRAJob, gate: asyncio.Semaphore) -> None:
    resolved = Resolved(
        contract_version=needed_contract(1),
        profile=PROFILE,
        claim_name=workspace_claim_name(job.name, job.uid),
        claim_created=True,
        workspace_path=workspace_folder(job.name, job.uid),
        document=document(job, PROFILE),
    )
    async with gate:
        await cluster.create_claim(job.namespace, build_claim(job, resolved))
        await cluster.create_job(job.namespace, build_job(job, resolved, "prepare", 1))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
