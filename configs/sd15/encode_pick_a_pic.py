"""Pick-a-Pic v2 for Stable Diffusion 1.5.

    python -m train.encode configs/sd15/encode_pick_a_pic.py --source.path /data/pickapic_v2

The path is a folder with the parquet files of the set, local, mounted or gs://...; without it they are streamed from
the Hub. The 959,040 rows of the training split become about 126 GB for the pairs and 7 GB for the captions.
"""

from pathlib import Path

from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/pick_a_pic_sd15"),
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    source=Source(layout="pick_a_pic", path="yuvalkirstain/pickapic_v2"),
    encoding=Encoding(size=(512, 512), batch_size=8),
)
