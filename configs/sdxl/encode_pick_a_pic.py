"""Pick-a-Pic v2 for SDXL.

    python -m train.encode configs/sdxl/encode_pick_a_pic.py --source.path /data/pickapic_v2

As configs/sd15/encode_pick_a_pic.py, at 1024 pixels: four times the space for the pairs. Sizes and crops of the images
are recorded for SDXL's time_ids. `--encoding.bucket-step 64` encodes each pair in the size nearest to its aspect ratio.
"""

from pathlib import Path

from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/pick_a_pic_sdxl"),
    model="stabilityai/stable-diffusion-xl-base-1.0",
    source=Source(layout="pick_a_pic", path="yuvalkirstain/pickapic_v2"),
    encoding=Encoding(size=(1024, 1024), batch_size=2),
)
