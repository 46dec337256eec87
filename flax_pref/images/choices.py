"""Choices that flags offer, without the code that they choose among: `--help` is quick."""

from typing import Literal

ImageFormat = Literal["png", "webp"]
Layout = Literal["webdataset", "flat", "geneval", "hpsv2"]
