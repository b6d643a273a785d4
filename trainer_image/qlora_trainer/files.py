"""Names of the files that one step leaves for another, or for people."""

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
HISTORY_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
SUMMARY_FILE = "summary.json"
CARD_FILE = "README.md"
MANIFEST_FILE = "manifest.json"
