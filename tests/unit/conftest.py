"""Hides GPUs from the tests of this folder: some fork processes that compute, which none can that has started CUDA."""

import os

# Before a test loads bitsandbytes, which starts CUDA.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
