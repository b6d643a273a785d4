"""Fine-tunes through the door with OpenAI's client: finetune.py FILE MODEL.

OPENAI_BASE_URL is the door's address, OPENAI_API_KEY a key of it.
"""

import sys
import time
from pathlib import Path

from openai import OpenAI


def main(rows: Path, model: str) -> None:
    """Upload the rows, tune the model, and show the course of the job."""
    client = OpenAI()
    with rows.open("rb") as content:
        file = client.files.create(file=content, purpose="fine-tune")
    print(f"{file.id}: {file.bytes} bytes")
    job = client.fine_tuning.jobs.create(model=model, training_file=file.id, suffix="support-bot")
    status = ""
    while status not in ("succeeded", "failed", "cancelled"):
        if (current := client.fine_tuning.jobs.retrieve(job.id).status) != status:
            status = current
            print(f"{job.id}: {status}")
        time.sleep(1)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=4).data):
        print(event.message)
    ended = client.fine_tuning.jobs.retrieve(job.id)
    print(ended.error.message if ended.error else f"{ended.trained_tokens} tokens: {ended.fine_tuned_model}")
    for results in ended.result_files:
        print(client.files.content(results).text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
