"""Converts an adapter into a GGUF file, for llama.cpp and Ollama, with llama.cpp's own converter.

The converter is a program, which runs in a process that is forked for it, with limits: an untrusted config.json
decides what it does.
"""

import json
import logging
import os
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from math import sqrt
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

import qlora_trainer
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.printable import one_line, shortened
from qlora_api.schema import replace
from qlora_api.spec.output import GgufSpec, GgufStatus
from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, GGUF_FILE
from qlora_trainer.core.filesystem import file_sha256, require_space, scratch_folder
from qlora_trainer.core.sandbox import DryRunFailed, LimitReached, is_out_of_memory, within_limits
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.model.adapter.shapes import B_SUFFIX, expected_tensors
from qlora_trainer.model.architecture.text_part import text_part
from qlora_trainer.model.source.files import CONFIG

logger = logging.getLogger(__name__)

_PACKAGE = Path(qlora_trainer.__file__).parent
# A wheel has it in the package, a checkout next to all packages.
_FOLDERS = (_PACKAGE / "llama.cpp", _PACKAGE.parents[1] / "third_party" / "llama.cpp")
CONVERTER = next(filter(Path.is_dir, _FOLDERS), _FOLDERS[0]) / "convert_lora_to_gguf.py"
_SECONDS = 1800
_MEMORY_BYTES = 4 * 2**30
"""Of the converter, on top of a few copies of the adapter."""
_ARCHITECTURE = "general.architecture"


class NotConvertible(Exception):  # noqa: N818 - a finding about the adapter
    """The converter does not convert it. The message has the reason."""


@dataclass(frozen=True)
class GgufFile:
    """A converted adapter in a folder of this machine."""

    path: Path
    status: GgufStatus


def require_convertible(
    model_folder: Path, target_modules: tuple[str, ...], lora: ResolvedLora, gguf: GgufSpec, scratch: Path
) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) unless the converter supports the model and each of its adapted layers.

    For the prepare step, before a GPU is used: it converts an adapter that has the layers of the job's, and rank 1.
    `model_folder` has config.json; the folder `scratch` is made, and removed afterwards.
    """
    with scratch_folder(scratch) as folder:
        adapter = folder / ADAPTER_FILE
        try:
            within_limits(_write_trial, (model_folder, target_modules, lora, adapter), what="an adapter to convert")
            _convert(adapter, model_folder / CONFIG, replace(lora, rank=1), gguf, folder / "trial")
        except (LimitReached, NotConvertible) as failure:
            raise bad_configuration(
                f"spec.output.gguf: llama.cpp's converter does not convert adapters of this model: {failure}; remove "
                "output.gguf, or choose a model of another family"
            ) from failure
        except DryRunFailed as failure:
            # Presumably not the model's fault: the process was killed.
            raise StepFailure(ExitCode.INTERNAL_ERROR, f"spec.output.gguf: {failure}") from failure


@contextmanager
def gguf_file(job: TrainedJob, adapter: Path, workspace: WorkspaceLayout) -> Iterator[GgufFile | None]:
    """Yield the GGUF file of the verified adapter in that folder, until the block ends, or None if the job wants none.

    The same adapter gives the same bytes. Raises StepFailure: STORAGE_FULL without room for it, INTERNAL_ERROR if it
    cannot be converted although prepare has tried that.
    """
    wanted = job.spec.output.gguf
    if wanted is None:
        yield None
        return
    tensors = adapter / ADAPTER_FILE
    require_space(workspace.root, 2 * tensors.stat().st_size, "converting the adapter to GGUF")
    with scratch_folder(workspace.root / "gguf") as folder:
        config = workspace.root / job.prepared.model_path / CONFIG
        try:
            architecture = _convert(tensors, config, job.spec.lora, wanted, folder / job.name)
        except (DryRunFailed, NotConvertible) as failure:
            raise StepFailure(
                ExitCode.INTERNAL_ERROR,
                f"the adapter is not published, as spec.output.gguf asks for a file that cannot be made: {failure}",
            ) from failure
        path = folder / GGUF_FILE
        status = GgufStatus(
            file=GGUF_FILE,
            sha256=file_sha256(path),
            size_bytes=path.stat().st_size,
            architecture=architecture,
        )
        yield GgufFile(path, status)


def llama_cpp_alpha(lora: ResolvedLora) -> float:
    """The alpha that makes llama.cpp, which multiplies by alpha / rank, scale alike."""
    return lora.alpha * sqrt(lora.rank) if lora.use_rslora else float(lora.alpha)


def _convert(tensors: Path, config: Path, lora: ResolvedLora, gguf: GgufSpec, folder: Path) -> str:
    """Write GGUF_FILE next to `folder`, with its name, and return the architecture."""
    # No job has a name with a dot.
    base = folder.with_name(".base")
    for made in (folder, base):
        made.mkdir()
    # The converter reads other files in their folder too, and would load tensors of a base that is quantized.
    settings = json.loads(config.read_bytes())
    settings.pop("quantization_config", None)
    (base / CONFIG).write_text(json.dumps(settings))
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps({"lora_alpha": llama_cpp_alpha(lora)}))
    (folder / ADAPTER_FILE).symlink_to(tensors.absolute())
    arguments = ("--base", str(base), "--outtype", gguf.type, "--outfile", str(folder.with_name(GGUF_FILE)))
    memory = _MEMORY_BYTES + 4 * tensors.stat().st_size
    found: str | NotConvertible = within_limits(
        _run_converter, (folder, arguments), seconds=_SECONDS, memory_bytes=memory, what="the conversion to GGUF"
    )
    if isinstance(found, NotConvertible):
        raise found
    return found


def _run_converter(adapter: Path, arguments: tuple[str, ...]) -> str | NotConvertible:
    # A process that was forked has none of its parent's threads, which PyTorch would wait for.
    torch.set_num_threads(1)
    os.environ |= {"NO_LOCAL_GGUF": "1", "HF_HUB_OFFLINE": "1"}
    sys.path.insert(0, str(CONVERTER.parent))
    sys.argv = [CONVERTER.name, *arguments, str(adapter)]
    said = _Errors()
    logging.getLogger().addHandler(said)
    try:
        # Its progress bar is no line of a log.
        with redirect_stderr(StringIO()):
            runpy.run_path(str(CONVERTER), run_name="__main__")
    except SystemExit as end:
        return NotConvertible(_shorten(said.text) or f"it has ended with exit code {end.code}")
    except (NotImplementedError, TypeError, AttributeError) as error:
        # An adapter takes the place of a tensor there, and lacks most of what one has.
        logger.info("the converter failed", exc_info=True)
        said_so = str(error) if isinstance(error, NotImplementedError) else ""
        return NotConvertible(_shorten(said_so) or "it changes the form of a layer in a way that no adapter can follow")
    except (MemoryError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.info("the converter failed", exc_info=True)
        return NotConvertible(f"{type(error).__name__}: {_shorten(str(error))}")
    return _architecture_of(adapter.with_name(GGUF_FILE), adapter / ADAPTER_FILE)


def _shorten(text: str) -> str:
    return shortened(one_line(text), 300)


class _Errors(logging.Handler):
    """Keeps what the converter reports before it ends itself."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = self.text or record.getMessage()


def _architecture_of(converted: Path, tensors: Path) -> str | NotConvertible:
    # The converter leaves out layers that it takes for a part that the base has no use for.
    with safe_open(tensors, framework="pt") as file:
        names = list(file.keys())
    layers = Counter(_block(name) for name in names if name.endswith(B_SUFFIX))
    reader = GGUFReader(converted)
    # By block: what it leaves out of one is not made up for by what it divides in another.
    missing = layers - Counter(_block(tensor.name) for tensor in reader.tensors if tensor.name.endswith(".lora_b"))
    if missing:
        return NotConvertible(
            f"it converts {layers.total() - missing.total()} of the {layers.total()} layers that have an adapter"
        )
    return str(reader.fields[_ARCHITECTURE].contents())


def _block(name: str) -> str:
    """The block's number in a tensor's name of PEFT or GGUF, or an empty string."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else ""


def _write_trial(model_folder: Path, target_modules: tuple[str, ...], lora: ResolvedLora, path: Path) -> None:
    """Write an adapter of rank 1, layers different: the converter joins equal ones."""
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    shapes = expected_tensors(text_part(config), target_modules, replace(lora, rank=1))
    numbers = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(each.shape, generator=numbers).to(each.dtype) for name, each in shapes.items()}, path)
