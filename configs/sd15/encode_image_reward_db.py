"""ImageRewardDB for Stable Diffusion 1.5: every two images of a prompt, by their ranks.

    python -m train.encode configs/sd15/encode_image_reward_db.py --source.path /data/ImageRewardDB

The path is a folder with the repository `THUDM/ImageRewardDB` of the Hub, whose archives are extracted where the column
`image_path` of its metadata expects them:

    hf download THUDM/ImageRewardDB --repo-type dataset --local-dir /data/ImageRewardDB
    cd /data/ImageRewardDB/images/train && for archive in *.zip; do unzip -q $archive -d ${archive%.zip}; done

Rank 1 is the best; equal ranks are ties. The script of the repository, which made its configurations `8k_group` and
`8k_pair`, is no longer run by `datasets`; docs/data.md has their columns.
"""

from pathlib import Path

from flax_pref.data.columns import Columns
from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/image_reward_db_sd15"),
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    source=Source(
        layout="datasets",
        path="data/ImageRewardDB",
        files=("metadata-train.parquet",),
        columns=Columns(caption="prompt", images=("image_path",), scores=("rank",), lower_wins=True, group="prompt_id"),
    ),
    encoding=Encoding(size=(512, 512), batch_size=8),
)
