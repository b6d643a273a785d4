"""OpenAI's files and fine-tuning API in front of QLoRAJobs.

It keeps nothing: the Kubernetes API is its database, and each request is made with the rights of its user.
"""
