"""Files of data sets on the Hub, read where they are."""

from typing import IO, NamedTuple

from huggingface_hub import HfFileSystem

PREFIX = "hf://"


class HubFile(NamedTuple):
    """A file of a dataset on the Hub, read without downloading all of it."""

    filesystem: HfFileSystem
    path: str

    @property
    def name(self) -> str:
        """Without its folders."""
        return self.path.rpartition("/")[2]

    def open(self, mode: str) -> IO[bytes]:
        """Opens it."""
        return self.filesystem.open(self.path, mode)

    def __str__(self) -> str:
        return f"{PREFIX}{self.path}"
