"""Which columns of a table hold a preference: one row a pair, one row a list of images, or one row an image."""

import dataclasses
from typing import Literal

Form = Literal["roles", "pair", "list", "group"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns of a set with `layout` datasets, by name.

    Images are named in one of four ways: `winner` and `loser`; two `images` with a `label` or two `scores`; one column
    `images` that holds lists, with one column `scores` of lists; or one column `images` and one column `scores` with an
    image a row, where rows with the same `group` were compared. In the last two, every two images are a pair.

    Example:
        >>> fp.Columns(caption="prompt", winner="chosen", loser="rejected").form
        'roles'
    """

    caption: str = "caption"
    """Column with the prompt of the images."""
    winner: str | None = None
    """Column with the preferred image."""
    loser: str | None = None
    """Column with the other image."""
    images: tuple[str, ...] = ()
    """Columns with the two images; one column if it holds lists of images, or with group one image a row."""
    label: str | None = None
    """Column that says which of the two images is preferred, by the values first, second and ties."""
    first: tuple[str, ...] = ()
    """Values of label that prefer the first image, as text: 1, true, image_1; class labels by their names."""
    second: tuple[str, ...] = ()
    """Values of label that prefer the second image."""
    ties: tuple[str, ...] = ()
    """Values of label that prefer neither image."""
    scores: tuple[str, ...] = ()
    """Columns with a score or rank of each image; one column if images is one. Equal scores are a tie."""
    lower_wins: bool = False
    """Prefer the image with the lower score, as with ranks."""
    group: str | None = None
    """Column whose value is shared by the rows whose images were compared, as the id of a prompt."""
    required: tuple[str, ...] = ()
    """Columns of truth values; rows where one is false are left out, as rows without a label."""
    ids: tuple[str, ...] = ()
    """Columns with the ids of the images, in the order of images (default: their paths, else a number of each row)."""
    models: tuple[str, ...] = ()
    """Columns with the models that drew the images, in the order of images."""
    confidence: str | None = None
    """Column with the confidence of the judgement, 0 to 1."""
    margin: str | None = None
    """Column with how much better the winner is (default: the difference of scores, if there are any)."""

    def __post_init__(self):
        if not self.named:
            return
        if (self.winner is None) != (self.loser is None):
            raise ValueError("columns: winner and loser come together; name both, or images")
        ways = (self.winner is not None, self.label is not None, bool(self.scores))
        if sum(ways) != 1 or (self.winner is None) != bool(self.images):
            raise ValueError(
                "columns: expected winner and loser; or images with label; or images with scores; not several of them"
            )
        values = (*self.first, *self.second, *self.ties)
        if (self.label is not None) != bool(self.first and self.second) or len(set(values)) < len(values):
            raise ValueError(
                f"columns: first={self.first}, second={self.second}, ties={self.ties}: expected the values of label "
                "that prefer the first image, those that prefer the second, and those of ties, each once"
            )
        count = len(self.images) or 2
        if count > 2 or (self.scores and len(self.scores) != count) or (self.label is not None and count != 2):
            raise ValueError(
                f"columns: images={self.images}, scores={self.scores}: expected two of each, or one of each that "
                "holds lists or has a group; a label compares two images"
            )
        for name, found in (("ids", self.ids), ("models", self.models)):
            if found and len(found) != count:
                raise ValueError(f"columns: {name}={found}: expected {count} columns, one for each of images")
        if self.lower_wins and not self.scores:
            raise ValueError("columns: lower_wins says how scores are read; name scores")
        if self.group is not None and (count != 1 or self.confidence is not None or self.margin is not None):
            raise ValueError(
                "columns: group needs one column of images and one of scores, and has no confidence or margin"
            )

    @property
    def named(self) -> bool:
        """Whether any column but that of the caption is named, or a setting of one."""
        return any(
            getattr(self, field.name) != field.default for field in dataclasses.fields(self) if field.name != "caption"
        )

    @property
    def form(self) -> Form:
        """How a row and its images make pairs."""
        if self.winner is not None:
            return "roles"
        return "pair" if len(self.images) == 2 else "list" if self.group is None else "group"

    @property
    def of_images(self) -> tuple[str, ...]:
        """Columns with images: the preferred one first, else in their order."""
        return self.images if self.winner is None or self.loser is None else (self.winner, self.loser)
