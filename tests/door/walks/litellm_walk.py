"""litellm's calls for files and fine-tuning jobs, with the provider openai."""

import sys
import time

import litellm

with open(sys.argv[1], "rb") as rows:
    file = litellm.create_file(file=rows, purpose="fine-tune", custom_llm_provider="openai")
assert litellm.file_retrieve(file_id=file.id, custom_llm_provider="openai").id == file.id
assert litellm.file_content(file_id=file.id, custom_llm_provider="openai").content == open(sys.argv[1], "rb").read()
job = litellm.create_fine_tuning_job(
    model=sys.argv[2], training_file=file.id, hyperparameters={"n_epochs": 2}, custom_llm_provider="openai"
)
while job.status != "succeeded":
    time.sleep(0.5)
    job = litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, custom_llm_provider="openai")
assert job.id in [each.id for each in litellm.list_fine_tuning_jobs(limit=5, custom_llm_provider="openai")]
second = litellm.create_fine_tuning_job(model=sys.argv[2], training_file=file.id, custom_llm_provider="openai")
canceled = litellm.cancel_fine_tuning_job(fine_tuning_job_id=second.id, custom_llm_provider="openai")
assert canceled.status == "cancelled"
assert litellm.file_delete(file_id=file.id, custom_llm_provider="openai").deleted
print(job.fine_tuned_model)
