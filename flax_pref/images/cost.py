"""The cost of an image, beside an image set: predictions of the UNet, and seconds where they were measured."""

import json
from typing import NamedTuple

from etils import epath

COST = "cost.json"


class ImageCost(NamedTuple):
    """The cost of an image.

    Attributes:
        predictions: of the UNet.
        seconds: of drawing, by all devices together and without compilation; None where too little was drawn at once.
        devices: that it was measured on, e.g. "8 x TPU v5 lite".
    """

    predictions: int
    seconds: float | None = None
    devices: str = ""


def write_cost(folder: epath.PathLike, cost: ImageCost) -> None:
    """Writes `cost.json` into an image set; a time that was measured before stays where there is no new one."""
    before = read_cost(folder)
    if cost.seconds is None and before is not None and before.predictions == cost.predictions:
        cost = before
    (epath.Path(folder) / COST).write_text(json.dumps(cost._asdict(), indent=2) + "\n")


def read_cost(folder: epath.PathLike) -> ImageCost | None:
    """The cost of an image of a folder; None where it is unknown, as in folders that others have drawn."""
    try:
        told = json.loads((epath.Path(folder) / COST).read_text())
        cost = ImageCost(int(told["predictions"]), told["seconds"] and float(told["seconds"]), str(told["devices"]))
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return cost if cost.predictions > 0 and (cost.seconds is None or cost.seconds > 0) else None
