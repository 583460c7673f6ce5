"""MLflow pyfunc of a registered model; a copy of this file is in each model.

It runs where advtrain is not installed, so it imports none of it. Python loads one module of a name, so a change that
older models cannot use needs another file name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from numpy.typing import NDArray

#: Values of the parameter `output`.
OUTPUTS = ("logits", "probabilities", "classes")


class InvalidRequestError(MlflowException):  # type: ignore[misc]  # MLflow has no types
    """A wrong request. The scoring server answers it with status 400 and the reason alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)
        self.reason = reason

    def serialize_as_json(self) -> str:
        """Return the answer; MLflow puts the whole input before `message`."""
        return json.dumps({"error_code": self.error_code, "message": self.reason})


class ServedModel:
    """Model with the parameter `output`: logits, probabilities or class names."""

    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        self.model, self.facts = model, facts

    def get_raw_model(self) -> Any:
        """Return the torch module."""
        return self.model.get_raw_model()

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """Return the outputs of `data` (N, ...) float32 in [0, 1], or token ids (N, L) int64.

        Args:
            data: ndarray, or a DataFrame with the model's inputs in their order. The file tokenizer.json of the model
                turns texts into token ids.
            params: `output`: `logits` (N, K); `probabilities`, a DataFrame with a column per class; `classes`, the
                names (N,).

        Raises:
            InvalidRequestError: a value is outside [0, 1], an id outside the vocabulary, a text too long, there are no
                texts, or the output does not exist.
        """
        output = (params or {}).get("output", OUTPUTS[0])
        if output not in OUTPUTS:
            raise InvalidRequestError(f"output is '{output}', expected one of {', '.join(OUTPUTS)}")
        if (text := self.facts.get("text")) is None:
            self._check(np.asarray(data, np.float32))
        else:
            self._check_ids(np.asarray(data), text["vocabulary"], text["max_length"])
        found = self.model.predict(data)
        if output == OUTPUTS[0]:
            return found
        logits: NDArray[Any] = np.asarray(found)
        if logits.shape[1] == 1:
            raise InvalidRequestError(f"output is '{output}', but the model predicts a number; leave it out")
        names = np.array([str(name) for name in self.facts.get("class_names") or range(logits.shape[1])])
        if output == "classes":
            return names[logits.argmax(1)]
        import pandas as pd

        shares = np.exp(logits - logits.max(1, keepdims=True))
        return pd.DataFrame(shares / shares.sum(1, keepdims=True), columns=names)

    def _check(self, values: NDArray[np.float32]) -> None:
        """Raise an InvalidRequestError for a value outside [0, 1] or NaN."""
        wrong = np.argwhere(~((values >= 0) & (values <= 1)))
        if not len(wrong):
            return
        row, *place = wrong[0].tolist()
        names = self._inputs()
        where = f"row {row}, at {place}"
        if len(place) == 1 and place[0] < len(names):
            where = f"row {row}, column '{names[place[0]]}'"
        raise InvalidRequestError(
            f"input values must lie in [0, 1], scaled as in training (got {values[tuple(wrong[0])]:g} in {where})"
        )

    def _check_ids(self, ids: NDArray[Any], vocabulary: int, max_length: int) -> None:
        """Raise an InvalidRequestError for ids of a wrong shape or value, or a text without tokens."""
        if ids.dtype.kind not in "iu" or ids.ndim != 2:
            raise InvalidRequestError(f"inputs must be token ids (N, L) int64, not {ids.dtype} {ids.shape}")
        if len(ids) == 0:
            raise InvalidRequestError("inputs have no rows; send one text or more")
        if ids.shape[1] > max_length:
            raise InvalidRequestError(
                f"texts have at most {max_length} token ids, not {ids.shape[1]}; cut them"
            )
        wrong = np.argwhere((ids < 0) | (ids >= vocabulary))
        if len(wrong):
            row, place = wrong[0].tolist()
            raise InvalidRequestError(
                f"token ids must lie in [0, {vocabulary}) (got {ids[row, place]} in row {row}, at {place})"
            )
        if not (ids != 0).any(1).all():
            raise InvalidRequestError(f"row {int(np.argmin((ids != 0).any(1)))} has no tokens but padding")

    def _inputs(self) -> list[str]:
        """Return the names of the inputs of a table, as `TableSpec.features` does."""
        names: list[str] = []
        for column in (self.facts.get("table") or {}).get("columns", []):
            values = column.get("categories")
            names += [column["name"]] if values is None else [f"{column['name']}={v}" for v in values]
        return names


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> ServedModel:
    """Load the model in `path`; MLflow calls this."""
    import mlflow.pytorch
    from mlflow.models import Model

    metadata = Model.load(str(Path(path).parent)).metadata or {}
    return ServedModel(mlflow.pytorch._load_pyfunc(path, model_config), metadata.get("advtrain") or {})
