"""OpenAI's client: every call of the files, fine-tuning and models API."""

import sys
import time

import openai

client = openai.OpenAI()
file = client.files.create(file=open(sys.argv[1], "rb"), purpose="fine-tune")
assert client.files.retrieve(file.id).filename == "train.jsonl"
assert client.files.content(file.id).read() == open(sys.argv[1], "rb").read()
assert file.id in [each.id for each in client.files.list()]
job = client.fine_tuning.jobs.create(
    model=sys.argv[2], training_file=file.id, validation_file=file.id, suffix="walk", hyperparameters={"n_epochs": 2}
)
assert job.id in [each.id for each in client.fine_tuning.jobs.list(limit=1)]
while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
    time.sleep(0.5)
assert client.files.content(job.result_files[0]).text.startswith("step,train_loss")
assert len(list(client.fine_tuning.jobs.list_events(job.id, limit=1))) > 3
assert client.fine_tuning.jobs.checkpoints.list(job.id).data[0].fine_tuned_model_checkpoint == job.fine_tuned_model
assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
assert job.fine_tuned_model in [each.id for each in client.models.list()]
second = client.fine_tuning.jobs.create(model=sys.argv[2], training_file=file.id)
assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
try:
    client.fine_tuning.jobs.retrieve("ftjob-none")
except openai.NotFoundError:
    pass
assert client.models.delete(job.fine_tuned_model).deleted
assert client.files.delete(file.id).deleted
print(job.fine_tuned_model)
