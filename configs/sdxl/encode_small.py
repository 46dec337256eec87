"""The first 4,000 pairs of Pick-a-Pic v2 for SDXL, for small runs.

    python -m train.encode configs/sdxl/encode_small.py --source.path /data/pickapic_v2

The path is a folder with the parquet files of the set, local, mounted or gs://...; without it they are streamed from
the Hub, and no more of them than needed. The encoded pairs take about 2.2 GB.
"""

from pathlib import Path

from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.selection import Choice
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/pick_a_pic_small_sdxl"),
    model="stabilityai/stable-diffusion-xl-base-1.0",
    source=Source(layout="pick_a_pic", path="yuvalkirstain/pickapic_v2"),
    choice=Choice(limit=4_000),
    encoding=Encoding(size=(1024, 1024), batch_size=2),
)
