"""The first 4,000 pairs of Pick-a-Pic v2 for Stable Diffusion 1.5, for small runs.

    python -m train.encode configs/sd15/encode_small.py --source.path /data/pickapic_v2

The path is a folder with the parquet files of the set, local, mounted or gs://...; without it they are streamed from
the Hub, and no more of them than needed. The encoded pairs take about 0.6 GB.
"""

from pathlib import Path

from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.selection import Choice
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/pick_a_pic_small_sd15"),
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    source=Source(layout="pick_a_pic", path="yuvalkirstain/pickapic_v2"),
    choice=Choice(limit=4_000),
    encoding=Encoding(size=(512, 512), batch_size=8),
)
