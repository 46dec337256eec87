"""Pick-a-Pic v1 for Stable Diffusion 1.5.

    python -m train.encode configs/sd15/encode_pick_a_pic_v1.py --source.path /data/pickapic_v1

The path is a folder with the parquet files of the set; without it they are streamed from the Hub. Pick-a-Pic v2 has the
same columns. Layout pick_a_pic reads both, too, and refuses labels that are neither 1, 0 nor twice 0.5.
"""

from pathlib import Path

from flax_pref.data.columns import Columns
from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/pick_a_pic_v1_sd15"),
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    source=Source(
        layout="datasets",
        path="yuvalkirstain/pickapic_v1",
        stream=True,
        columns=Columns(
            caption="caption",
            images=("jpg_0", "jpg_1"),
            scores=("label_0", "label_1"),
            required=("has_label", "are_different"),
            ids=("image_0_uid", "image_1_uid"),
        ),
    ),
    encoding=Encoding(size=(512, 512), batch_size=8),
)
