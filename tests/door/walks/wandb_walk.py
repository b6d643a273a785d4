"""The importer of Weights & Biases, which reads a job with its results and files."""

import sys
import time
from typing import Any

import openai
from wandb.integration.openai.fine_tuning import WandbLogger

client = openai.OpenAI()
file = client.files.create(file=open(sys.argv[1], "rb"), purpose="fine-tune")
job = client.fine_tuning.jobs.create(model=sys.argv[2], training_file=file.id)
while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
    time.sleep(0.5)
logged: list[dict[str, Any]] = []
kept = WandbLogger._log_fine_tune.__func__


def log(kind: Any, *arguments: Any) -> Any:
    """Keep the metrics that the run is given."""
    record = kind._run.log

    def keep(metrics: dict[str, Any], **where: Any) -> None:
        logged.append(metrics)
        record(metrics, **where)

    kind._run.log = keep
    return kept(kind, *arguments)


WandbLogger._log_fine_tune = classmethod(log)
WandbLogger._ensure_logged_in = classmethod(lambda kind: None)
print(WandbLogger.sync(fine_tune_job_id=job.id, openai_client=client, log_datasets=False))
assert {"train_loss", "valid_loss"} <= {name for metrics in logged for name in metrics}, logged
print(job.fine_tuned_model)
