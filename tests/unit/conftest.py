"""Hides GPUs from the tests of this folder, as some fork processes."""

import os

# Before a test loads bitsandbytes, which starts CUDA.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
