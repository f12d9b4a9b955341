"""push and from_pretrained: models and engines on the Hugging Face hub, in this package's own files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

import effnet_quant
from effnet_quant.card import ModelCard
from effnet_quant.engines.engine import Engine, load_engine
from effnet_quant.engines.onnx_file import read_onnx, read_onnx_card
from effnet_quant.errors import UserError
from effnet_quant.files import existing_file
from effnet_quant.models.hub import endpoint, failed, fetch_from_hub, hub, is_reachable, quiet, split
from effnet_quant.models.weights import read_card, read_weights
from effnet_quant.quantization.placement.insertion import placement_of
from effnet_quant.quantization.placement.summary import summarize
from effnet_quant.quantization.spec import resolve_spec
from effnet_quant.saved_model import load, save

MODEL, ENGINE, README = "model.safetensors", "model.onnx", "README.md"
_MARK = "<!-- written by effnet_quant.push; without this line, it leaves the file alone -->"


def push(
    model_or_file: nn.Module | str | Path, name: str, card: ModelCard | None = None, *, private: bool = True
) -> str:
    """Upload a model or an engine to a repository of the Hugging Face hub, which is created if need be.

    The repository gets ``model.safetensors`` (as ``save`` writes it) or ``model.onnx``, and a README.md with the model's
    card and what is quantized. A README.md of your own stays. huggingface_hub's login is used (``hf auth login``, or the
    variable ``HF_TOKEN``).

    Args:
        model_or_file: a model, a ``.safetensors`` file of ``save`` or an ``.onnx`` file of ``export_onnx``.
        name: ORG/NAME.
        card: describes a model, as in ``save``; files bring their own.
        private: whether a new repository is private. An old one stays as it is.

    Returns:
        The repository's address.

    Raises:
        UserError: the file is no such file, the hub can't be reached, or it refuses.
    """
    repository, revision = split(name)
    if revision is not None:
        raise UserError(f"{name}: push writes to the main branch; leave out @{revision}.")
    package = hub()
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model_or_file, nn.Module):
            path = Path(folder) / MODEL
            save(model_or_file, path, card)
        elif card is not None:
            raise UserError("a file brings its own card; leave out card=.")
        else:
            path = existing_file(model_or_file)
        readme = _readme(path, repository).encode()
        if not is_reachable():
            raise UserError(f"nothing is pushed: {endpoint()} can't be reached; try again.")
        api = package.HfApi(endpoint=endpoint())
        with quiet():
            try:
                api.create_repo(repository, exist_ok=True, private=private)
                files: dict[str, str | bytes] = {(ENGINE if path.suffix == ".onnx" else MODEL): str(path)}
                own = fetch_from_hub(repository, README)
                if own is None or _MARK in own.read_text(encoding="utf-8", errors="replace"):
                    files[README] = readme
                api.create_commit(
                    repository,
                    [package.CommitOperationAdd(place, content) for place, content in files.items()],
                    commit_message=f"{', '.join(files)} by effnet-quant {effnet_quant.__version__}",
                )
            except UserError:
                raise
            except Exception as error:  # the package raises its own, and those of its HTTP library
                raise failed(name, error) from error
    return f"{endpoint()}/{repository}"


def from_pretrained(name: str, file: str | None = None) -> nn.Module | Engine:
    """The model or the engine that ``push`` has uploaded. Nothing but its own kinds of file is read, and no code is run.

    Args:
        name: ORG/NAME or ORG/NAME@REVISION.
        file: "model.safetensors" for the model or "model.onnx" for an engine in ONNX Runtime. None: the first of these that
            is there.

    Raises:
        UserError: the repository can't be read, has no such file, or the file is damaged.
    """
    if file not in (None, MODEL, ENGINE):
        raise UserError(f"{file} is none of the files that push writes: {MODEL}, {ENGINE}.")
    for candidate in (MODEL, ENGINE) if file is None else (file,):
        path = fetch_from_hub(name, candidate)
        if path is not None:
            return load(path) if candidate == MODEL else load_engine(path)
    raise UserError(
        f"{name} has no {file or f'{MODEL} and no {ENGINE}'}, as effnet_quant.push writes them; "
        f"create_model('hf-hub:{name}') loads models of timm's."
    )


def _readme(path: Path, repository: str) -> str:
    """The repository's README.md for a file, which is checked as if it came from a stranger."""
    if path.suffix == ".onnx":
        read_onnx(path)
        card, kind, parts = read_onnx_card(path), "An engine", ""
    elif path.suffix == ".safetensors":
        read_weights(path)
        card, kind = read_card(path), "A model"
        parts = _parts(load(path)) if card.arch is not None else ""
    else:
        raise UserError(f"{path}: push takes a model, a .safetensors file of save or an .onnx file of export_onnx.")
    rows = "\n".join(f"| {title} | {_cell(value)} |" for title, value in _facts(card) if value)
    result = "model" if path.suffix == ".safetensors" else "engine"
    tags = ["effnet-quant", *(["quantized"] if card.quantized else [])]
    return f"""---
library_name: effnet-quant
pipeline_tag: image-classification
tags: [{", ".join(tags)}]
---
{_MARK}

# {repository.partition("/")[2]}

{kind} of effnet-quant.

| | |
| --- | --- |
{rows}

```python
from effnet_quant import from_pretrained

{result} = from_pretrained("{repository}")
```
{parts}"""


def _facts(card: ModelCard) -> list[tuple[str, str]]:
    images = "" if card.input is None else f"{card.input.image_size} x {card.input.image_size} pixels"
    spec = None if card.quant_spec is None else resolve_spec(card.quant_spec)
    return [
        ("architecture", card.arch or ""),
        ("task", card.task),
        ("classes", str(card.num_classes or "")),
        ("names of classes", ", ".join((card.classes or ())[:10]) + (" …" if len(card.classes or ()) > 10 else "")),
        ("images", images),
        ("activation", (card.activation or "").replace("_", "-")),
        ("weights", f"{spec.weight}" if spec else "float"),
        ("activations", f"{spec.activation}" if spec else "float"),
        ("runtime", card.target or ""),
    ]


def _parts(model: nn.Module) -> str:
    """What of a model is quantized, and what stays in float and why."""
    if placement_of(model) is None:
        return ""
    return f"\n## What is quantized\n\n```\n{summarize(model)}\n```\n"


def _cell(text: str) -> str:
    """Text of unknown origin in a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
