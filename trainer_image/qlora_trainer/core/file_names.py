"""Names of the files that one step leaves for another, or for people."""

from qlora_api.contract import REPORT_FILE as REPORT_FILE

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
GGUF_FILE = "adapter.gguf"
HISTORY_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
SUMMARY_FILE = "summary.json"
MODEL_CARD_FILE = "README.md"
PUBLISHED_MANIFEST = "manifest.json"
SAMPLES_FILE = "samples.json"
ANSWERS_FILE = "answers.jsonl"
