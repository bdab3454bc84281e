"""A model file in half the bytes: all tensors as fp16, which every reader turns into fp32 again.

    python -m experiments.tiny_imagenet.half out/model.safetensors weights/uniflow-tiny.safetensors
"""
import argparse
import os

from encoder import UserError, open_weights, read_config, write_model
from tools.script import run_command


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("source", metavar="SOURCE", help="a model file")
    ap.add_argument("target", metavar="TARGET", help="the file to write")
    args = ap.parse_args(argv)
    names, read = open_weights(args.source)
    tensors = {name: read(name).half() for name in sorted(names)}
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise UserError(f"{args.source} cannot be written as fp16: {name} has a value beyond its range")
    write_model(args.target, read_config(args.source), tensors)
    print(f"{args.target}: {os.path.getsize(args.target) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main, "experiments.tiny_imagenet.half")
