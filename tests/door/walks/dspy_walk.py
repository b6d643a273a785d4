"""dspy's provider for OpenAI: a whole fine-tuning, and one that is canceled."""

import functools
import sys

from dspy.clients.openai import OpenAIProvider, TrainingJobOpenAI
from dspy.clients.utils_finetune import TrainDataFormat

messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
rows = [{"messages": messages}] * 10
# It polls every 20 seconds otherwise.
OpenAIProvider.wait_for_job = staticmethod(functools.partial(OpenAIProvider.wait_for_job, poll_frequency=1))
tune = functools.partial(
    OpenAIProvider.finetune, model=f"openai/{sys.argv[2]}", train_data=rows, train_data_format=TrainDataFormat.CHAT
)
print(tune(TrainingJobOpenAI(), train_kwargs={"n_epochs": 2}))
canceled = TrainingJobOpenAI()
canceled.provider_file_id = OpenAIProvider.upload_data(sys.argv[1])
canceled.provider_job_id = OpenAIProvider._start_remote_training(canceled.provider_file_id, sys.argv[2])
name = canceled.provider_job_id
canceled.cancel()
assert OpenAIProvider.get_training_status(name).value == "cancelled"
