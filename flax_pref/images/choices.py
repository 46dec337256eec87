"""Choices that flags offer, without the code that they choose among: `--help` is quick."""

from typing import Literal

ImageFormat = Literal["png", "webp"]
Layout = Literal["webdataset", "flat", "geneval", "geneval2", "dpg", "t2i_compbench", "hpsv2"]
