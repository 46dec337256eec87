"""HPDv3 for SDXL, as it lies on the Hub: a JSON list, and an archive of images in parts.

    python -m train.encode configs/sdxl/encode_hpdv3.py --source.path /data/HPDv3

The path is a folder with the repository `MizzenAI/HPDv3`, whose archive is extracted in it:

    hf download MizzenAI/HPDv3 --repo-type dataset --local-dir /data/HPDv3
    cd /data/HPDv3 && cat images.tar.gz.* | tar xz

`path1` is always the preferred image. Layout hpdv3 reads the same files without a copy of the list in the cache of
`datasets`, and takes a margin from the votes.
"""

from pathlib import Path

from flax_pref.data.columns import Columns
from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/hpdv3_sdxl"),
    model="stabilityai/stable-diffusion-xl-base-1.0",
    source=Source(
        layout="datasets",
        path="data/HPDv3",
        files=("train.json",),
        columns=Columns(
            caption="prompt", winner="path1", loser="path2", models=("model1", "model2"), confidence="confidence"
        ),
    ),
    encoding=Encoding(size=(1024, 1024), batch_size=2),
)
