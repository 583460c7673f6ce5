"""Record of what a data source found: files used and passed over, and forms of images."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Found:
    """Files, and forms of images, of a data source; all empty for a data set that is built in."""

    files: int = 0  # files read
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> paths below data.path
    sizes: dict[str, int] = field(default_factory=dict)  # "WIDTHxHEIGHT" as stored -> number of images
    modes: dict[str, int] = field(
        default_factory=dict
    )  # Pillow's mode, such as L, RGB or P -> number of images
    notes: list[str] = field(default_factory=list)  # what was decided or converted, one sentence each
