"""A model file in half the bytes: all tensors as fp16, which every reader turns into fp32 again.

    python experiments/tiny_imagenet/half.py out/model.safetensors weights/uniflow-tiny.safetensors
"""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from encoder import open_weights, read_config, write_model

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = sys.argv[1:]
    names, get = open_weights(source)
    tensors = {name: get(name).half() for name in sorted(names)}
    assert all(x.isfinite().all() for x in tensors.values()), "a value is beyond fp16"
    write_model(target, read_config(source), tensors)
    print(f"{target}: {os.path.getsize(target) / 1e6:.1f} MB")
