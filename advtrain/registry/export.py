"""Export of models as pickle-free pt2 archives that check their inputs; file digests."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advtrain.data import Dataset
from advtrain.data.texts import TOKENIZER
from advtrain.documents import parse_yaml, read_yaml
from advtrain.errors import UserError
from advtrain.models.archive import load_archive, refusal
from advtrain.models.network import example_inputs
from advtrain.recipe.data import TextShape
from advtrain.registry.facts import FACTS, data_facts

#: Tags of a version: {file: SHA-256} as JSON, and the SHA-256 of that JSON text.
FILES_TAG, FILES_DIGEST_TAG = "advtrain.files", "advtrain.files_digest"
#: Largest number of characters of a version's description in MLflow.
MAX_DESCRIPTION = 5000
#: File that MLflow adds to downloaded models.
_MLFLOW_OWN = "registered_model_meta"
#: File name extensions of pickles.
PICKLES = (".pkl", ".pickle", ".pth", ".pt", ".bin", ".joblib")


class RangeChecked(nn.Module):
    """Wrapper of a model that rejects inputs outside [0, 1] and NaN, also after export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's outputs for x (N, ...) float32 in [0, 1]."""
        inside = ((x >= 0) & (x <= 1)).all()
        torch._assert_async(inside, "input values must lie in [0, 1]")
        outputs: Tensor = self.model(x)
        return outputs


class IdsChecked(nn.Module):
    """Wrapper of a model of texts that rejects ids outside its vocabulary, also after export."""

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.model, self.vocabulary = model, vocabulary

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's logits for token ids x (N, L) int64, padded with 0 at the end."""
        inside = ((x >= 0) & (x < self.vocabulary)).all() & (x != 0).any(1).all()
        torch._assert_async(
            inside, f"token ids must lie in [0, {self.vocabulary}), with one above 0 in every text"
        )
        outputs: Tensor = self.model(x)
        return outputs


def _checked(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    return IdsChecked(model, shape.vocabulary) if isinstance(shape, TextShape) else RangeChecked(model)


def log_archive(run_id: str, model: nn.Module, dataset: Dataset) -> Any:
    """Log a pt2 archive with signature, example and the facts of its data (`data_facts`).

    The example has two rows, which keeps the batch size dynamic. Texts may have any length up to that of the example,
    and their tokenizer.json is in the same folder.
    """
    import mlflow
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    example = example_inputs(dataset.shape, 2).numpy()
    with torch.no_grad():
        outputs = model(torch.from_numpy(example))
    shape = dataset.shape if dataset.text is None else (-1,)
    signature = ModelSignature(
        Schema([TensorSpec(example.dtype, (-1, *shape))]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, outputs.shape[1]))]),
        ParamSchema([ParamSpec("output", DataType.string, "logits")]),
    )
    # Not mlflow.pytorch.log_model: it follows the active run and experiment of a surrounding program.
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="model", source_run_id=run_id, params=run.data.params
    )
    with warnings.catch_warnings():
        # the warning concerns weights in NHWC order, which load unchanged
        warnings.filterwarnings("ignore", message="No complete tensor found")
        return Model.log(
            None,
            _Flavor,
            name="model",
            model_id=logged.model_id,
            run_id=run_id,
            pytorch_model=_checked(model, dataset.shape),
            tokenizer=None if dataset.text is None else dataset.text.tokenizer,
            signature=signature,
            input_example=example,
            metadata={FACTS: data_facts(dataset)},
            serialization_format="pt2",
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"torch=={torch.__version__.split('+')[0]}",
                "numpy",
            ],
        )


class _Flavor:
    """MLflow's PyTorch flavor, whose pyfunc is `advtrain_pyfunc_v1`."""

    @staticmethod
    def save_model(path: str, mlflow_model: Any, tokenizer: str | None = None, **options: Any) -> None:
        """Save the model, with the code of its pyfunc, and the tokenizer of texts."""
        import mlflow.pytorch

        code = Path(__file__).with_name("advtrain_pyfunc_v1.py")
        mlflow.pytorch.save_model(path=path, mlflow_model=mlflow_model, code_paths=[str(code)], **options)
        mlflow_model.flavors["python_function"]["loader_module"] = code.stem
        mlflow_model.save(str(Path(path) / "MLmodel"))
        if tokenizer is not None:
            (Path(path) / TOKENIZER).write_text(tokenizer, encoding="utf-8")


def check_export(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise a UserError if the model could not be registered after training.

    It is exported as `log_archive` does it. The archive must load, and give the model's outputs for other batch sizes.

    Args:
        model: model on the CPU.
        shape: shape of a sample.
    """
    model, file, advice = model.eval(), io.BytesIO(), "a trained model is registered as such an archive"
    try:
        with torch.no_grad(), _quiet():
            example = (example_inputs(shape, 2),)
            dynamic = {axis: torch.export.Dim.AUTO for axis in range(1 + isinstance(shape, TextShape))}
            program = torch.export.export(_checked(model, shape), example, dynamic_shapes=[dynamic])
            torch.export.save(program, file)
    except Exception as error:  # torch.export raises many exception types
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0][:300]
        raise UserError(f"the model cannot be exported with torch.export, and {advice}: {reason}") from error
    archive = load_archive(file.getvalue())
    for rows in (1, 3):
        x = _trial(shape, rows)
        try:
            with torch.no_grad():
                found, expected, again = archive(x), model(x), model(x)
        except Exception as error:  # from the exported graph
            raise UserError(
                f"the model's torch.export archive fails on a batch of {rows}, and {advice}: its code fixes the batch "
                f"size, as len(x) does; write x.shape[0], or x.flatten(1) ({str(error).splitlines()[0][:200]})"
            ) from error
        is_random = not torch.equal(expected, again)
        if not is_random and not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise UserError(
                f"the model's torch.export archive gives other outputs than the model on a batch of {rows}, and "
                f"{advice}: its code depends on the batch size or on values of the input"
            )


def _trial(shape: tuple[int, ...], rows: int) -> Tensor:
    """Return inputs that differ from the example of an export, and are shorter if they are texts."""
    if isinstance(shape, TextShape):
        length = max(1, shape[0] // rows)
        return 1 + torch.arange(rows * length).view(rows, length) % (shape.vocabulary - 1)
    return torch.linspace(0, 1, rows * math.prod(shape)).view(rows, *shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log lines of torch.export, which print whole graphs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def downloaded(client: Any, source: str, run_id: str | None) -> Iterator[Path]:
    """Yield a temporary folder with the downloaded artifacts of a model.

    `model/` comes from the URI `source`. `report/`, `rows/` and `recipe.yaml` come from the run, if it has them.

    Raises:
        UserError: the artifacts cannot be downloaded.
    """
    import mlflow

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            model = Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=source,
                    dst_path=str(_made(folder / "model")),
                    tracking_uri=client.tracking_uri,
                )
            )
            if model.resolve() != (folder / "model").resolve():  # MLflow keeps the folder's name
                model.rename(folder / "renamed")
                (folder / "model").rmdir()
                (folder / "renamed").rename(folder / "model")
            present = {a.path for a in client.list_artifacts(run_id)} if run_id else set()
            for name in ("recipe.yaml", "report", "rows"):
                if name in present:
                    client.download_artifacts(run_id, name, str(folder))
            for cached in folder.rglob("__pycache__"):  # written where somebody loaded the model in place
                shutil.rmtree(cached)
        except Exception as error:  # from MLflow, the operating system, or any artifact store
            raise UserError(f"the artifacts of '{source}' cannot be downloaded: {error}") from error
        yield folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def description_of(folder: Path) -> str | None:
    """Return the model card in `folder`, shortened to the length of a description in MLflow."""
    card = folder / "report" / "model_card.md"
    return card.read_text()[:MAX_DESCRIPTION] if card.is_file() else None


def file_digests(folder: Path) -> dict[str, str]:
    """Return {relative path: SHA-256} of the files in `folder` that `digested` lists."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in digested(folder)}


def digested(folder: Path) -> list[str]:
    """Return the relative paths of files to digest; in `report/` only JSON and Parquet files."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    evidence = [n for n in names if not n.startswith("report/") or n.endswith((".json", ".parquet"))]
    return [n for n in evidence if n.rpartition("/")[2] != _MLFLOW_OWN]


def digest_tags(digests: dict[str, str]) -> dict[str, str]:
    """Return the tags of a version that hold the digests of its files."""
    text = json.dumps(digests, sort_keys=True)
    return {FILES_TAG: text, FILES_DIGEST_TAG: hashlib.sha256(text.encode()).hexdigest()}


def changed_files(
    tags: dict[str, str], folder: Path, *, recorded: str | None = None, unrecorded: bool = False
) -> list[str]:
    """Return one sentence per difference from the registered files; empty if all files match.

    Args:
        recorded: digest over all files in the audit log, if there is one.
        unrecorded: whether a version without digests is accepted.
    """
    text, digest = tags.get(FILES_TAG), tags.get(FILES_DIGEST_TAG)
    if text is None and digest is None and unrecorded:
        return []
    if text is None or digest is None:
        return ["the digests of its files were not recorded at registration; register it again"]
    if hashlib.sha256(text.encode()).hexdigest() != digest or recorded not in (None, digest):
        return [f"the digests themselves were changed: tag {FILES_TAG}"]
    expected: dict[str, str] = json.loads(text)
    present = file_digests(folder)
    found = [f"{name} is missing" for name in sorted(expected.keys() - present.keys())]
    found += [f"{name} was added" for name in sorted(present.keys() - expected.keys())]
    return found + [
        f"{n} was changed" for n in sorted(expected.keys() & present.keys()) if expected[n] != present[n]
    ]


def pickles(folder: Path) -> list[str]:
    """Return the files in `folder` that could run code when loaded.

    These are pickles, found by extension or first byte, and pt2 archives that `load_archive` refuses.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pt2":
            if reason := refusal(path.read_bytes()):
                found.append(f"{name} ({reason})")
        elif path.suffix in PICKLES or path.read_bytes()[:1] == b"\x80":  # first opcode of protocols 2 to 5
            found.append(name)
    return found


def shape_of(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of one input and its outputs from an MLmodel file."""
    inputs, outputs = (sample_shape(side) for side in signature_of(path))
    return tuple(inputs), tuple(outputs)


def signature_of(path: Path) -> tuple[str, str]:
    """Return the input and output signature as text from an MLmodel file."""
    values = read_yaml(path, "file of MLflow")
    signature = values.get("signature") if isinstance(values, dict) else None
    if not isinstance(signature, dict):
        raise UserError(f"'{path.name}' has no signature")
    return str(signature.get("inputs")), str(signature.get("outputs"))


def sample_shape(side: str) -> list[int]:
    """Return the shape of one sample from an input or output signature."""
    try:
        (spec,) = parse_yaml(side, "the signature")
        return [int(size) for size in spec["tensor-spec"]["shape"][1:]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the signature is not that of one tensor: {side[:200]}") from error
