"""The file type of each layer of an artifact."""

import json

from qlora_trainer.stores.contents import PublishedFile
from qlora_trainer.stores.model_pack import pack


def test_a_gguf_file_is_weights_as_a_safetensors_file_is() -> None:
    names = ("adapter_model.safetensors", "adapter.gguf", "adapter_config.json", "loss.png")
    _, manifest = pack("tiny", {name: PublishedFile(sha256="0" * 64, size=1) for name in names})
    layers = json.loads(manifest)["layers"]
    kinds = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in layers}
    assert kinds == {
        "adapter_model.safetensors": "application/vnd.cncf.model.weight.v1.raw",
        "adapter.gguf": "application/vnd.cncf.model.weight.v1.raw",
        "adapter_config.json": "application/vnd.cncf.model.weight.config.v1.raw",
        "loss.png": "application/vnd.cncf.model.doc.v1.raw",
    }
