"""Names of the files that one step leaves for another, or for people."""

from qlora_api.contract import REPORT_FILE as REPORT_FILE

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
GGUF_FILE = "adapter.gguf"
HISTORY_FILE = "metrics.jsonl"
METRICS_FILE = "metrics.csv"
CURVE_FILE = "loss.png"
SUMMARY_FILE = "summary.json"
MODEL_CARD_FILE = "README.md"
PUBLISHED_MANIFEST = "manifest.json"
SAMPLES_FILE = "samples.json"
ANSWERS_FILE = "answers.jsonl"
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    }
)
PROCESSOR_FILES = frozenset({"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"})
"""Other files that servers of a multimodal model need: copied, never read here."""
