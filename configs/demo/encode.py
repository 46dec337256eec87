"""The demo's pairs, encoded for training.

    python -m train.encode configs/demo/encode.py

Reads runs/demo/pairs.parquet, which `python -m train.demo configs/demo/demo.py` writes, and takes ten seconds for its
640 pairs on two CPU cores.
"""

from pathlib import Path

from flax_pref.data.encode import Encoding
from flax_pref.data.preparation import EncodeConfig
from flax_pref.data.sources import Source

config = EncodeConfig(
    output=Path("runs/demo/prepared"),
    model="demo",
    source=Source(layout="pick_a_pic", path="runs/demo/pairs.parquet"),
    encoding=Encoding(size=(64, 64), batch_size=32),
)
