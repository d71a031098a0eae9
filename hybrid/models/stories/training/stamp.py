"""Write the model's current hash into its profile, without recording it again.

    python hybrid/models/stories/training/stamp.py

A profile names its model by a hash. When the rule of that hash changes, the counts stay right, but
the name does not. The counts were recorded with the weights whose checksum is below (the first
version of the profile named the same model by its earlier rule, which was checked), so the profile
is named anew only if the weights are still those.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hybrid.checkpoint import open_checkpoint
from hybrid.files import read_bytes, read_safetensors
from hybrid.placement.profile import FILE_NAME, ActivationProfile, check_profile, load_profile

FOLDER = Path(__file__).parents[1]
RECORDED_WITH = "97b4b25d68dc540e79cad2457b96a05a5c909650ad479ade99645d81d44a2c8f"


def main() -> None:
    weights = read_bytes(FOLDER / "model.safetensors", 1 << 30)
    if hashlib.sha256(weights).hexdigest() != RECORDED_WITH:
        raise SystemExit("the weights are not those that the profile was recorded with: record it")
    path = FOLDER / FILE_NAME
    metadata, counts = read_safetensors(path, 1 << 30)
    about = json.loads(metadata["hybrid_profile"])
    with open_checkpoint(FOLDER) as checkpoint:
        about = {name: value for name, value in about.items() if name != "version"}
        del about["model_hash"]
        n_tokens = about.pop("n_tokens")
        ActivationProfile(checkpoint.weights_hash, n_tokens, **counts, about=about).save(path)
        check_profile(load_profile(path), path, checkpoint.weights_hash, checkpoint.config)
    print(f"{path}: names {checkpoint.weights_hash}")


if __name__ == "__main__":
    main()
