"""Open Image Preferences v1, binarized, for SDXL.

    python -m train.encode configs/sdxl/encode_open_image_preferences.py

The library `datasets` downloads the set from the Hub (fewer than 10,000 pairs); `--source.stream` reads its parquet
files there instead.
"""

from pathlib import Path

from flax_pref.data.columns import Columns
from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/open_image_preferences_sdxl"),
    model="stabilityai/stable-diffusion-xl-base-1.0",
    source=Source(
        layout="datasets",
        path="data-is-better-together/open-image-preferences-v1-binarized",
        columns=Columns(caption="prompt", winner="chosen", loser="rejected"),
    ),
    encoding=Encoding(size=(1024, 1024), batch_size=2),
)
