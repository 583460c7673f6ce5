"""Downloads of pretrained weights that fail."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from advtrain.errors import UserError
from advtrain.models.pretrained import _hub_file


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("no connection"), "'timm/x' cannot be downloaded: no connection"),
        (OSError("disk full"), "'timm/x' cannot be downloaded: disk full"),
        (EntryNotFoundError("404"), "'timm/x' of the Hugging Face hub has none of the files model.safe"),
    ],
)
def test_failed_download_is_reported(tmp_path, monkeypatch, error, message):
    def download(repository, name):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UserError, match=message):
        _hub_file("timm/x", None, allow_download=True)
